use super::*;
use crate::{
    pin::Pin,
    tree::{EntryKind, Tree},
};

const THEN: Timestamp = Timestamp {
    seconds: 1_700_000_000,
    nanos: 5,
};
const LATER: Timestamp = Timestamp {
    seconds: 1_800_000_000,
    nanos: 0,
};

fn object(size: u64) -> Object {
    Object {
        key: "data/1".into(),
        size,
        pin: Pin::ETag("\"e\"".into()),
        digest: None,
    }
}

/// Builds with what `fill` adds, once in memory and once spilling every record.
fn build(fill: impl Fn(&mut TreeBuilder) -> Result<(), TreeError>) -> Result<Tree, TreeError> {
    let mut trees = [64 << 20, 0].map(|limit| {
        let dir = tempfile::tempdir().unwrap();
        let mut builder = TreeBuilder::new(dir.path(), limit)?;
        fill(&mut builder)?;
        let built = builder.finish(dir.path())?;
        let bytes = zstd::decode_all(std::fs::File::open(built.rows.path).unwrap()).unwrap();
        assert_eq!(
            (Digest::of(&bytes), bytes.len() as u64),
            (built.rows.digest, built.rows.size)
        );
        Tree::from_bytes(bytes)
    });
    let [roomy, tight] = &mut trees;
    assert_eq!(
        roomy.as_ref().map_err(|error| error.to_string()).err(),
        tight.as_ref().map_err(|error| error.to_string()).err()
    );
    let [roomy, _] = trees;
    roomy
}

fn conflict(fill: impl Fn(&mut TreeBuilder) -> Result<(), TreeError>) -> String {
    match build(fill) {
        Err(TreeError::Conflict { path, .. }) => path,
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("no conflict"),
    }
}

#[test]
fn a_path_added_twice_is_named() {
    let file = |builder: &mut TreeBuilder, path: &[u8]| builder.add_file(path, 0o644, THEN, 0, None, None);
    assert_eq!(
        conflict(|b| file(b, b"a/b").and_then(|()| file(b, b"a/b"))),
        "a/b"
    );
    assert_eq!(
        conflict(|b| file(b, b"a/b/c").and_then(|()| file(b, b"a/b"))),
        "a/b"
    );
    assert_eq!(conflict(|b| file(b, b"a").and_then(|()| file(b, b"a/b/c"))), "a");
    assert_eq!(
        conflict(|b| b.add_directory(b"a", 0o755, THEN).and_then(|()| file(b, b"a"))),
        "a"
    );
    assert_eq!(
        conflict(|b| file(b, b"a").and_then(|()| b.add_symlink(b"a", 0o777, THEN, b"x"))),
        "a"
    );
    assert_eq!(
        conflict(|b| b
            .add_symlink(b"a", 0o777, THEN, b"x")
            .and_then(|()| file(b, b"a/b"))),
        "a"
    );
    let directories = |b: &mut TreeBuilder| {
        b.add_directory(b"a", 0o755, THEN)?;
        b.add_directory(b"a", 0o700, THEN)
    };
    assert_eq!(conflict(directories), "a");
}

#[test]
fn what_cannot_be_an_entry_is_refused_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let mut builder = TreeBuilder::new(dir.path(), 1 << 20).unwrap();
    let long_name = vec![b'n'; 256];
    let long_path = [b"n/".repeat(2047), b"nn".to_vec()].concat();
    for path in [
        &b"/"[..],
        b"/a",
        b"a/",
        b"a//b",
        b".",
        b"a/..",
        b"a/./b",
        b"a\0b",
        &long_name,
        &long_path,
    ] {
        assert!(
            matches!(
                builder.add_directory(path, 0o755, THEN),
                Err(TreeError::BadPath { .. })
            ),
            "{path:?}"
        );
    }
    builder.add_directory(&long_name[1..], 0o755, THEN).unwrap();
    builder.add_directory(&long_path[1..], 0o755, THEN).unwrap_err();
    builder.add_directory(&long_path[2..], 0o755, THEN).unwrap();
    assert!(matches!(
        builder.add_file(b"", 0o644, THEN, 0, None, None),
        Err(TreeError::BadPath { .. })
    ));
    assert!(matches!(
        builder.add_symlink(b"", 0o644, THEN, b"t"),
        Err(TreeError::BadPath { .. })
    ));
    assert!(matches!(
        builder.add_directory(b"m", 0o100644, THEN),
        Err(TreeError::BadEntry { .. })
    ));
    let nanos = Timestamp {
        seconds: 0,
        nanos: 1_000_000_000,
    };
    assert!(matches!(
        builder.add_directory(b"t", 0o755, nanos),
        Err(TreeError::BadEntry { .. })
    ));
    for target in [&b""[..], b"a\0", &[b't'; 4096]] {
        assert!(matches!(
            builder.add_symlink(b"l", 0o777, THEN, target),
            Err(TreeError::BadEntry { .. })
        ));
    }
    let number = builder.add_object(object(100), None).unwrap();
    let at = |offset| {
        Some(Content {
            object: number,
            offset,
        })
    };
    let elsewhere = Some(Content {
        object: ObjectNo(1),
        offset: 0,
    });
    for (size, content) in [
        (1, None),
        (0, at(0)),
        (101, at(0)),
        (50, at(51)),
        (1, at(u64::MAX)),
        (u64::MAX, at(1)),
    ] {
        let added = builder.add_file(b"f", 0o644, THEN, size, content, None);
        assert!(
            matches!(added, Err(TreeError::BadEntry { .. })),
            "{size} {content:?}"
        );
    }
    let added = builder.add_file(b"f", 0o644, THEN, 1, elsewhere, None);
    assert!(matches!(added, Err(TreeError::NoSuchObject(ObjectNo(1)))));
    // None of it is in the tree.
    builder.add_file(b"f", 0o644, THEN, 50, at(50), None).unwrap();
    let built = builder.finish(dir.path()).unwrap();
    assert_eq!(
        (built.totals.files, built.totals.symlinks, built.totals.bytes),
        (1, 0, 50)
    );
}

#[test]
fn sums_and_digests_come_for_all_or_for_none() {
    let dir = tempfile::tempdir().unwrap();
    let mut builder = TreeBuilder::new(dir.path(), 1 << 20).unwrap();
    let sum = BlockSum::of(b"");
    builder.add_object(object(0), None).unwrap();
    builder
        .add_object(object(BLOCK_SIZE + 1), Some(&[sum, sum]))
        .unwrap();
    builder.add_object(object(0), None).unwrap();
    for (size, sums) in [
        (1, None),
        (BLOCK_SIZE + 1, Some(&[sum][..])),
        (1, Some(&[])),
        (0, Some(&[sum])),
    ] {
        let added = builder.add_object(object(size), sums);
        assert!(
            matches!(added, Err(TreeError::BadObject { .. })),
            "{size} {sums:?}"
        );
    }
    let mixed = build(|builder| {
        let object = builder.add_object(object(10), None)?;
        let content = Some(Content { object, offset: 0 });
        builder.add_file(b"a", 0o644, THEN, 10, content, None)?;
        builder.add_file(b"b", 0o644, THEN, 0, None, Some(Digest::of(b"")))?;
        builder.add_file(b"c", 0o644, THEN, 10, content, Some(Digest::of(b"c")))
    });
    assert!(matches!(mixed, Err(TreeError::BadEntry { path, .. }) if path == "c"));
}

#[test]
fn implied_directories_are_as_new_as_what_is_below() {
    let tree = build(|builder| {
        builder.add_file(b"a/b/c/new", 0o644, LATER, 0, None, None)?;
        builder.add_file(b"a/old", 0o644, THEN, 0, None, None)?;
        builder.add_file(b"z/old", 0o644, THEN, 0, None, None)?;
        builder.add_directory(b"a/b", 0o700, THEN)?;
        builder.add_directory(b"a/b", 0o700, THEN)
    })
    .unwrap();
    let of = |path: &[u8]| tree.entry(tree.find(path).unwrap().unwrap()).unwrap();
    for (path, mode, modified) in [
        (&b""[..], 0o755, LATER),
        (b"a", 0o755, LATER),
        (b"a/b", 0o700, THEN),
        (b"a/b/c", 0o755, LATER),
        (b"z", 0o755, THEN),
    ] {
        assert_eq!((of(path).mode, of(path).modified), (mode, modified), "{path:?}");
    }
}

#[test]
fn nothing_added_is_an_empty_root() {
    let tree = build(|_| Ok(())).unwrap();
    let root = tree.entry(Tree::ROOT).unwrap();
    assert_eq!(
        (root.mode, root.modified, root.name),
        (0o755, Timestamp::default(), &b""[..])
    );
    assert_eq!(
        root.kind,
        EntryKind::Directory {
            children: 0..0,
            subdirectories: 0
        }
    );
    assert_eq!(tree.row_count(), 1);
}

#[test]
fn a_builder_that_is_dropped_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut builder = TreeBuilder::new(dir.path(), 0).unwrap();
    for number in 0..100 {
        builder
            .add_directory(format!("d{number}").as_bytes(), 0o755, THEN)
            .unwrap();
    }
    drop(builder);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}
