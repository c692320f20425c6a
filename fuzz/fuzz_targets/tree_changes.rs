//! A good tree with some bytes changed: gets past the header, where random bytes do not.
#![no_main]

mod exercise;

use std::sync::OnceLock;

use grid_mount::{
    block::BLOCK_SIZE,
    digest::{BlockSum, Digest},
    origin::Pin,
    tree::{Content, Object, Timestamp, Tree, TreeError, builder::TreeBuilder},
};
use libfuzzer_sys::fuzz_target;

fn build() -> Result<Vec<u8>, Box<dyn std::error::Error>> {
    let dir = tempfile::tempdir()?;
    let mut builder = TreeBuilder::new(dir.path(), 1 << 20)?;
    let time = Timestamp {
        seconds: 1_700_000_000,
        nanos: 1,
    };
    let pins = [
        Pin::Content,
        Pin::ETag("\"e\"".into()),
        Pin::VersionId("v".into()),
    ];
    let mut objects = Vec::new();
    for (number, pin) in pins.into_iter().enumerate() {
        let digest = (number == 0).then(|| Digest::of(b"object"));
        let object = Object {
            key: format!("key/{number}"),
            size: 5000 * BLOCK_SIZE,
            pin,
            digest,
        };
        objects.push(builder.add_object(object, Some(&[BlockSum::of(b"block"); 5000]))?);
    }
    for number in 0..40u64 {
        let path = format!("d{}/e{}/f{number}", number % 3, number % 5);
        let content = Content {
            object: objects[number as usize % 3],
            offset: number * 1000,
        };
        builder.add_file(
            path.as_bytes(),
            0o644,
            time,
            1000,
            Some(content),
            Some(Digest::of(b"file")),
        )?;
    }
    builder.add_symlink(b"d0/link", 0o777, time, b"../d1")?;
    builder.add_file(b"empty", 0o644, time, 0, None, None)?;
    builder.add_directory(b"nothing", 0o755, time)?;
    let built = builder.finish(dir.path())?;
    let rows = std::fs::File::open(&built.rows.path).map_err(|source| TreeError::Io {
        path: built.rows.path,
        source,
    })?;
    Ok(zstd::decode_all(rows)?)
}

static GOOD: OnceLock<Vec<u8>> = OnceLock::new();

// Each change: an offset (u16, wrapped) and four bytes to put there.
fuzz_target!(|changes: &[u8]| {
    let mut bytes = GOOD.get_or_init(|| build().expect("a good tree")).clone();
    for change in changes.as_chunks::<6>().0 {
        let [low, high, value @ ..] = *change;
        let at = usize::from(u16::from_le_bytes([low, high])) % (bytes.len() - 4);
        bytes[at..at + 4].copy_from_slice(&value);
    }
    if let Ok(tree) = Tree::from_bytes(bytes) {
        exercise::exercise(&tree);
    }
});
