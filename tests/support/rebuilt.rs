//! Rebuilds a version from its record, without the agent, and compares it with a source directory.

#![allow(dead_code)]

use std::{
    collections::BTreeMap,
    fs::Metadata,
    os::unix::{
        ffi::OsStrExt,
        fs::{FileTypeExt, MetadataExt},
    },
    path::Path,
};

use futures::TryStreamExt;
use grid_mount::{
    block::block_count,
    catalog::{Record, TreePart},
    digest::{BlockSum, Digest},
    origin::{Pin, Store},
    tree::{Digests, EntryKind, ObjectNo, RowNo, Tree, unpack},
};

/// Everything about an entry that a reader can see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    pub mode: u32,
    pub modified: (i64, i64),
    pub kind: SeenKind,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SeenKind {
    Directory,
    /// Size and digest of the content.
    File(u64, Digest),
    Symlink(Vec<u8>),
}

pub type Entries = BTreeMap<Vec<u8>, Seen>;

/// What lies in a local directory, apart from what no version can hold.
pub fn source(root: &Path) -> Entries {
    walkdir::WalkDir::new(root)
        .into_iter()
        .filter_map(|entry| {
            let entry = entry.unwrap();
            let meta: Metadata = entry.path().symlink_metadata().unwrap();
            let file_type = meta.file_type();
            let kind = if file_type.is_dir() {
                SeenKind::Directory
            } else if file_type.is_symlink() {
                SeenKind::Symlink(
                    std::fs::read_link(entry.path())
                        .unwrap()
                        .as_os_str()
                        .as_bytes()
                        .to_vec(),
                )
            } else if file_type.is_socket() || file_type.is_fifo() || file_type.is_char_device() {
                return None;
            } else {
                let bytes = std::fs::read(entry.path()).unwrap();
                SeenKind::File(bytes.len() as u64, Digest::of(&bytes))
            };
            let path = entry
                .path()
                .strip_prefix(root)
                .unwrap()
                .as_os_str()
                .as_bytes()
                .to_vec();
            let modified = (meta.mtime(), meta.mtime_nsec());
            Some((
                path,
                Seen {
                    mode: meta.mode() & 0o7777,
                    modified,
                    kind,
                },
            ))
        })
        .collect()
}

async fn bytes_of(store: &Store, key: &str, pin: &Pin, size: u64) -> Vec<u8> {
    if size == 0 {
        return Vec::new();
    }
    let stream = store.get_range(key, pin, 0..size).await.unwrap();
    stream
        .try_fold(Vec::new(), |mut all, bytes| async move {
            all.extend_from_slice(&bytes);
            Ok(all)
        })
        .await
        .unwrap()
}

async fn part(store: &Store, part: &TreePart, out: &Path) -> Vec<u8> {
    let packed = bytes_of(store, &part.key, &Pin::Content, part.wire_size).await;
    unpack(packed.as_slice(), part.size, part.digest, out).unwrap();
    std::fs::read(out).unwrap()
}

/// Reads every byte of a version from its origin and checks digests and sums on the way.
pub async fn rebuilt(record: &Record, catalog: &Store, origin: &Store) -> Entries {
    let scratch = tempfile::tempdir().unwrap();
    let rows = part(catalog, &record.tree.rows, &scratch.path().join("rows")).await;
    let tree = Tree::from_bytes(rows).unwrap();
    let digests = match &record.tree.digests {
        Some(digests) => {
            let digests = part(catalog, digests, &scratch.path().join("digests")).await;
            Some(Digests::from_bytes(digests).unwrap())
        }
        None => None,
    };
    let sums = match &record.tree.sums {
        Some(sums) => Some(bytes_of(catalog, &sums.key, &Pin::Content, sums.size).await),
        None => None,
    };
    let mut objects = BTreeMap::new();
    for number in (0..tree.object_count()).map(ObjectNo) {
        let object = tree.object(number).unwrap();
        let bytes = bytes_of(origin, &object.key, &object.pin, object.size).await;
        if let Some(digest) = object.digest {
            assert_eq!(Digest::of(&bytes), digest, "{}", object.key);
        }
        if let Some(sums) = &sums {
            let mut expected = Vec::new();
            for frame in tree.sum_frames(number, 0..block_count(object.size)).unwrap() {
                let range = frame.range.start as usize..frame.range.end as usize;
                expected.extend(frame.sums(&sums[range]).unwrap());
            }
            let actual: Vec<_> = bytes
                .chunks(grid_mount::block::BLOCK_SIZE as usize)
                .map(BlockSum::of)
                .collect();
            assert_eq!(actual, expected, "{}", object.key);
        }
        objects.insert(number, bytes);
    }
    let mut entries = Entries::new();
    for row in (0..tree.row_count()).map(RowNo) {
        let entry = tree.entry(row).unwrap();
        let kind = match entry.kind {
            EntryKind::Directory { .. } => SeenKind::Directory,
            EntryKind::Symlink { target } => SeenKind::Symlink(target.to_vec()),
            EntryKind::File { size, content } => {
                let bytes = match content {
                    None => &[],
                    Some(content) => {
                        &objects[&content.object][content.offset as usize..(content.offset + size) as usize]
                    }
                };
                let digest = Digest::of(bytes);
                if let Some(digests) = &digests {
                    assert_eq!(digests.of(&tree, row).unwrap(), Some(digest));
                }
                SeenKind::File(bytes.len() as u64, digest)
            }
        };
        let modified = (entry.modified.seconds, entry.modified.nanos.into());
        entries.insert(
            tree.path(row).unwrap(),
            Seen {
                mode: entry.mode.into(),
                modified,
                kind,
            },
        );
    }
    entries
}

/// Equal, and if not, says where first: two maps of thousands of entries are no message.
pub fn assert_same(actual: &Entries, expected: &Entries) {
    for path in expected.keys().chain(actual.keys()) {
        assert_eq!(
            actual.get(path),
            expected.get(path),
            "{}",
            String::from_utf8_lossy(path)
        );
    }
}
