//! The tree against a plain model: a sorted map from paths to attributes.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use grid_mount::{
    block::{BLOCK_SIZE, block_count},
    digest::{BlockSum, Digest},
    origin::Pin,
    tree::{
        Content, Digests, EntryKind, Object, ObjectNo, RowNo, Timestamp, Totals, Tree, TreeError,
        builder::{BuiltTree, TreeBuilder},
        unpack,
    },
};
use proptest::{collection::vec, prelude::*};

#[derive(Clone, Debug, PartialEq)]
enum Kind {
    Directory,
    File {
        size: u64,
        content: Option<Content>,
        digest: Option<Digest>,
    },
    Symlink(Vec<u8>),
}

#[derive(Clone, Debug, PartialEq)]
struct Node {
    mode: u16,
    modified: Timestamp,
    kind: Kind,
}

/// A tree as the model sees it, what is added to the builder for it, and its objects.
#[derive(Clone, Debug)]
struct Model {
    nodes: BTreeMap<Vec<u8>, Node>,
    /// In the order of adding; implied directories are missing, some directories come twice.
    added: Vec<Vec<u8>>,
    objects: Vec<(Object, Option<Vec<BlockSum>>)>,
}

fn parent(path: &[u8]) -> Option<&[u8]> {
    if path.is_empty() {
        return None;
    }
    Some(&path[..path.iter().rposition(|byte| *byte == b'/').unwrap_or(0)])
}

fn name(path: &[u8]) -> &[u8] {
    &path[path.iter().rposition(|byte| *byte == b'/').map_or(0, |at| at + 1)..]
}

fn children<'m>(model: &'m Model, dir: &[u8]) -> Vec<&'m [u8]> {
    let mut paths: Vec<&[u8]> = model
        .nodes
        .keys()
        .map(Vec::as_slice)
        .filter(|path| parent(path) == Some(dir))
        .collect();
    paths.sort_by_key(|path| name(path));
    paths
}

/// Names that sort awkwardly around the slash, share prefixes, or are not text.
fn any_name() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        6 => prop::sample::select(vec!["a", "b", "ab", "a-", "a.", "a0", "A", "...", "a b", "\u{e9}", "e\u{301}", "\n", "\u{1}"])
            .prop_map(|name| name.as_bytes().to_vec()),
        2 => vec(prop::sample::select((1..=255u8).filter(|b| *b != b'/').collect::<Vec<_>>()), 1..6),
        1 => (any::<u8>(), 250..=255usize).prop_map(|(byte, len)| vec![if byte == 0 || byte == b'/' { b'x' } else { byte }; len]),
    ]
    .prop_filter("not a file name", |name| name != b"." && name != b"..")
}

fn any_timestamp() -> impl Strategy<Value = Timestamp> {
    (prop_oneof![any::<i64>(), -2..2i64], 0..1_000_000_000u32)
        .prop_map(|(seconds, nanos)| Timestamp { seconds, nanos })
}

fn any_pin() -> impl Strategy<Value = Pin> {
    prop_oneof![
        Just(Pin::Content),
        "\\PC{0,8}".prop_map(Pin::ETag),
        "\\PC{0,8}".prop_map(Pin::VersionId),
    ]
}

fn any_digest() -> impl Strategy<Value = Digest> {
    any::<[u8; 32]>().prop_map(Digest::from_bytes)
}

#[derive(Clone, Debug)]
enum RawKind {
    Directory,
    File {
        size: u64,
        object: prop::sample::Index,
        offset: u64,
        digest: Digest,
    },
    Symlink(Vec<u8>),
}

fn any_kind() -> impl Strategy<Value = RawKind> {
    prop_oneof![
        1 => Just(RawKind::Directory),
        4 => (prop_oneof![Just(0u64), 1..5000u64], any::<prop::sample::Index>(), any::<u64>(), any_digest())
            .prop_map(|(size, object, offset, digest)| RawKind::File { size, object, offset, digest }),
        1 => vec(1..=255u8, 1..40).prop_map(RawKind::Symlink),
    ]
}

fn any_objects() -> impl Strategy<Value = Vec<(Object, Option<Vec<BlockSum>>)>> {
    // Some objects are large enough that their sums span frames.
    let size =
        prop_oneof![3 => Just(0u64), 6 => 1..10 * BLOCK_SIZE, 1 => 4000 * BLOCK_SIZE..9000 * BLOCK_SIZE];
    let object = ("\\PC{0,20}", size, any_pin(), prop::option::of(any_digest()));
    (vec(object, 0..6), any::<bool>()).prop_map(|(objects, sums)| {
        let make = |(number, (key, size, pin, digest)): (usize, _)| {
            let sum = |block: u64| BlockSum::of(format!("{number} {block}").as_bytes());
            let sums = sums.then(|| (0..block_count(size)).map(sum).collect());
            (
                Object {
                    key,
                    size,
                    pin,
                    digest,
                },
                sums,
            )
        };
        objects.into_iter().enumerate().map(make).collect()
    })
}

fn any_model() -> impl Strategy<Value = Model> {
    let deep = vec(any_name(), 0..6).prop_map(|names| names.join(&b'/'));
    // Many siblings in one directory.
    let wide = (0..400u32).prop_map(|n| format!("wide/{n}").into_bytes());
    let path = prop_oneof![3 => deep, 2 => wide];
    let entry = (path, 0..0o10000u16, any_timestamp(), any_kind());
    (vec(entry, 0..150), any_objects(), any::<bool>(), any::<u64>()).prop_map(
        |(entries, objects, digests, seed)| {
            let mut model = Model {
                nodes: BTreeMap::new(),
                added: Vec::new(),
                objects,
            };
            let mut explicit = BTreeSet::new();
            for (path, mode, modified, kind) in entries {
                let kind = match kind {
                    RawKind::Directory => Kind::Directory,
                    RawKind::Symlink(target) => Kind::Symlink(target),
                    RawKind::File {
                        mut size,
                        object,
                        offset,
                        digest,
                    } => {
                        let sizes: Vec<u64> = model.objects.iter().map(|(object, _)| object.size).collect();
                        let object = if sizes.is_empty() {
                            0
                        } else {
                            object.index(sizes.len())
                        };
                        size = size.min(sizes.get(object).copied().unwrap_or(0));
                        let content = (size > 0).then(|| Content {
                            object: ObjectNo(object as u32),
                            offset: offset % (sizes[object] - size + 1),
                        });
                        // An empty file may do without.
                        let digest = (digests && (size > 0 || offset % 2 == 0)).then_some(digest);
                        Kind::File {
                            size,
                            content,
                            digest,
                        }
                    }
                };
                // Only what fits with what is there: conflicts have tests of their own.
                let ancestors_fit = std::iter::successors(parent(&path), |path| parent(path)).all(|path| {
                    model
                        .nodes
                        .get(path)
                        .is_none_or(|node| node.kind == Kind::Directory)
                });
                let is_new = !model.nodes.contains_key(&path)
                    || (kind == Kind::Directory
                        && model.nodes[&path].kind == Kind::Directory
                        && !explicit.contains(&path));
                if !ancestors_fit || !is_new || (path.is_empty() && kind != Kind::Directory) {
                    continue;
                }
                for ancestor in std::iter::successors(parent(&path), |path| parent(path)) {
                    let implied = Node {
                        mode: 0o755,
                        modified: Timestamp {
                            seconds: i64::MIN,
                            nanos: 0,
                        },
                        kind: Kind::Directory,
                    };
                    model.nodes.entry(ancestor.to_vec()).or_insert(implied);
                }
                model.nodes.insert(path.clone(), Node { mode, modified, kind });
                explicit.insert(path.clone());
                model.added.push(path);
            }
            if model.nodes.is_empty() {
                model.nodes.insert(
                    Vec::new(),
                    Node {
                        mode: 0o755,
                        modified: Timestamp::default(),
                        kind: Kind::Directory,
                    },
                );
            }
            // An implied directory is as new as the newest thing added below it.
            let implied: Vec<Vec<u8>> = model
                .nodes
                .keys()
                .filter(|path| !explicit.contains(*path))
                .cloned()
                .collect();
            for dir in implied {
                let below = |path: &&Vec<u8>| {
                    std::iter::successors(parent(path), |path| parent(path)).any(|path| path == dir)
                };
                let newest = explicit
                    .iter()
                    .filter(below)
                    .map(|path| model.nodes[path].modified)
                    .max();
                model.nodes.get_mut(&dir).unwrap().modified = newest.unwrap_or_default();
            }
            // Any order, and directories sometimes twice.
            let twice: Vec<Vec<u8>> = model
                .added
                .iter()
                .filter(|path| model.nodes[*path].kind == Kind::Directory)
                .step_by(2)
                .cloned()
                .collect();
            model.added.extend(twice);
            let order = |path: &Vec<u8>| Digest::of(&[&seed.to_le_bytes(), path.as_slice()].concat());
            if seed % 3 != 0 {
                model.added.sort_by_key(order);
            }
            model
        },
    )
}

fn build(model: &Model, memory_limit: usize, out: &Path) -> Result<BuiltTree, TreeError> {
    let mut builder = TreeBuilder::new(out, memory_limit)?;
    for (number, (object, sums)) in model.objects.iter().enumerate() {
        assert_eq!(
            builder.add_object(object.clone(), sums.as_deref())?,
            ObjectNo(number as u32)
        );
    }
    for path in &model.added {
        let Node { mode, modified, kind } = &model.nodes[path];
        match kind {
            Kind::Directory => builder.add_directory(path, *mode, *modified)?,
            Kind::Symlink(target) => builder.add_symlink(path, *mode, *modified, target)?,
            Kind::File {
                size,
                content,
                digest,
            } => builder.add_file(path, *mode, *modified, *size, *content, *digest)?,
        }
    }
    builder.finish(out)
}

fn open(built: &BuiltTree, dir: &Path) -> Tree {
    let out = dir.join("rows");
    unpack(
        fs::File::open(&built.rows.path).unwrap(),
        built.rows.size,
        built.rows.digest,
        &out,
    )
    .unwrap();
    Tree::open(&out).unwrap()
}

fn check_directory(tree: &Tree, model: &Model, path: &[u8], row: RowNo) {
    let EntryKind::Directory {
        children: range,
        subdirectories,
    } = tree.entry(row).unwrap().kind
    else {
        panic!("not a directory");
    };
    let expected = children(model, path);
    assert_eq!(range.len(), expected.len());
    let is_dir = |path: &&&[u8]| model.nodes[**path].kind == Kind::Directory;
    assert_eq!(subdirectories as usize, expected.iter().filter(is_dir).count());
    // From every offset; large directories from some.
    for offset in (0..=expected.len()).step_by(1 + expected.len() / 16) {
        let listed: Vec<&[u8]> = range
            .clone()
            .skip(offset)
            .map(|row| tree.entry(RowNo(row)).unwrap().name)
            .collect();
        assert_eq!(
            listed,
            expected[offset..]
                .iter()
                .map(|path| name(path))
                .collect::<Vec<_>>()
        );
    }
    for child in expected {
        let found = tree.lookup(row, name(child)).unwrap().unwrap();
        assert!(range.contains(&found.0));
        // Near misses.
        let mut absent = name(child).to_vec();
        absent.push(b'~');
        let with_parent = |name: &[u8]| {
            if path.is_empty() {
                name.to_vec()
            } else {
                [path, name].join(&b'/')
            }
        };
        assert_eq!(
            tree.lookup(row, &absent).unwrap().is_some(),
            model.nodes.contains_key(&with_parent(&absent))
        );
        absent.truncate(absent.len() - 2);
        assert_eq!(
            tree.lookup(row, &absent).unwrap().is_some(),
            !absent.is_empty() && model.nodes.contains_key(&with_parent(&absent))
        );
    }
}

fn check(tree: &Tree, digests: Option<&Digests>, model: &Model) {
    let mut totals = Totals::default();
    for (path, node) in &model.nodes {
        let row = tree
            .find(path)
            .unwrap()
            .unwrap_or_else(|| panic!("{path:?} is missing"));
        assert_eq!(&tree.path(row).unwrap(), path);
        let entry = tree.entry(row).unwrap();
        assert_eq!(
            (entry.row, entry.mode, entry.modified),
            (row, node.mode, node.modified),
            "{path:?}"
        );
        assert_eq!(entry.name, name(path));
        assert_eq!(
            tree.find(parent(path).unwrap_or_default()).unwrap(),
            Some(entry.parent)
        );
        let digest = digests.map(|digests| digests.of(tree, row).unwrap());
        match &node.kind {
            Kind::Directory => {
                totals.directories += 1;
                assert_eq!(digest.flatten(), None);
                check_directory(tree, model, path, row);
            }
            Kind::File {
                size,
                content,
                digest: expected,
            } => {
                totals.files += 1;
                totals.bytes += size;
                assert_eq!(
                    entry.kind,
                    EntryKind::File {
                        size: *size,
                        content: *content
                    }
                );
                let range = content.map(|content| (content.object, content.offset..content.offset + size));
                assert_eq!(tree.object_range(row).unwrap(), range);
                if let Some(digest) = digest {
                    assert_eq!(digest, Some(expected.unwrap_or(Digest::of(b""))));
                }
                assert!(matches!(tree.lookup(row, b"a"), Err(TreeError::NotADirectory)));
            }
            Kind::Symlink(target) => {
                totals.symlinks += 1;
                assert_eq!(digest.flatten(), None);
                assert_eq!(entry.kind, EntryKind::Symlink { target });
            }
        }
        let next = tree.next_file(row).unwrap();
        let end = next.map_or(tree.row_count(), |next| next.0);
        let is_file = |row| matches!(tree.entry(RowNo(row)).unwrap().kind, EntryKind::File { .. });
        assert!(next.is_none_or(|next| next > row && is_file(next.0)));
        assert!(!(row.0 + 1..end).any(is_file));
    }
    assert_eq!(tree.row_count() as usize, model.nodes.len());
    assert_eq!(tree.totals(), totals);
    assert!(tree.entry(RowNo(tree.row_count())).is_err());
    // Breadth-first: depths and parents never go down.
    let order: Vec<(usize, RowNo)> = (0..tree.row_count())
        .map(|row| {
            let path = tree.path(RowNo(row)).unwrap();
            let depth = if path.is_empty() {
                0
            } else {
                1 + path.iter().filter(|byte| **byte == b'/').count()
            };
            (depth, tree.entry(RowNo(row)).unwrap().parent)
        })
        .collect();
    assert!(order.is_sorted());
}

fn check_objects(tree: &Tree, sums: Option<&[u8]>, model: &Model) {
    assert_eq!(tree.object_count() as usize, model.objects.len());
    assert!(tree.object(ObjectNo(tree.object_count())).is_err());
    for (number, (object, expected)) in model.objects.iter().enumerate() {
        let number = ObjectNo(number as u32);
        assert_eq!(&tree.object(number).unwrap(), object);
        let blocks = block_count(object.size);
        let (Some(sums), Some(expected)) = (sums, expected) else {
            assert!(tree.sum_frames(number, 0..blocks).unwrap().is_empty());
            continue;
        };
        for wanted in [
            0..blocks,
            1..blocks,
            blocks / 2..blocks / 2 + 1,
            0..u64::MAX,
            blocks..blocks + 7,
        ] {
            let frames = tree.sum_frames(number, wanted.clone()).unwrap();
            let mut found = Vec::new();
            for frame in &frames {
                let bytes = &sums[frame.range.start as usize..frame.range.end as usize];
                found.extend(frame.sums(bytes).unwrap());
                let mut bent = bytes.to_vec();
                bent[0] ^= 1;
                assert!(matches!(frame.sums(&bent), Err(TreeError::WrongDigest { .. })));
                assert!(frame.pick(&bytes[..bytes.len().min(8)]).is_err());
            }
            let wanted = wanted.start.min(blocks) as usize..wanted.end.min(blocks) as usize;
            assert!(wanted.is_empty() && found.is_empty() || found == expected[wanted]);
        }
    }
}

/// Calls everything, and lets nothing panic or run away; answers may be wrong.
fn exercise(tree: &Tree) {
    let rows = tree.row_count();
    for row in (0..rows).chain([rows, u32::MAX]).map(RowNo) {
        if let Ok(entry) = tree.entry(row) {
            assert!(entry.parent < row || row == Tree::ROOT);
            let _ = tree.lookup(entry.parent, entry.name);
            if let EntryKind::Directory { children, .. } = entry.kind {
                assert!(children.end <= rows && (children.is_empty() || children.start > row.0));
                for child in children.take(8) {
                    let _ = tree.entry(RowNo(child));
                }
            }
        }
        let _ = (
            tree.lookup(row, b"a"),
            tree.path(row),
            tree.next_file(row),
            tree.object_range(row),
        );
        if let Ok(path) = tree.path(row) {
            let _ = tree.find(&path);
        }
    }
    let objects = tree.object_count();
    for object in (0..objects).chain([objects, u32::MAX]).map(ObjectNo) {
        let _ = tree.object(object);
        for frame in tree.sum_frames(object, 0..u64::MAX).unwrap_or_default() {
            let _ = frame.pick(&[0; 1 << 16]);
        }
    }
}

/// Few, as each builds a tree; `PROPTEST_CASES` asks for more.
fn config() -> ProptestConfig {
    let asked = ProptestConfig::default();
    match std::env::var_os("PROPTEST_CASES") {
        Some(_) => asked,
        None => ProptestConfig { cases: 48, ..asked },
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn every_answer_is_the_models(model in any_model()) {
        let dir = tempfile::tempdir().unwrap();
        let built = build(&model, 64 << 20, dir.path()).unwrap();
        let tree = open(&built, dir.path());
        prop_assert_eq!(built.totals, tree.totals());
        let digests = built.digests.as_ref().map(|part| {
            let out = dir.path().join("digests");
            unpack(fs::File::open(&part.path).unwrap(), part.size, part.digest, &out).unwrap();
            Digests::open(&out).unwrap()
        });
        let with_bytes: Vec<bool> = model.nodes.values().filter_map(|node| match &node.kind {
            Kind::File { size: 1.., digest, .. } => Some(digest.is_some()),
            _ => None,
        }).collect();
        prop_assert_eq!(digests.is_some(), with_bytes.contains(&true));
        check(&tree, digests.as_ref(), &model);
        let sums = built.sums.as_ref().map(|part| {
            let bytes = fs::read(&part.path).unwrap();
            assert_eq!((Digest::of(&bytes), bytes.len() as u64, part.wire_size), (part.digest, part.size, part.size));
            bytes
        });
        prop_assert_eq!(tree.has_sums(), sums.is_some());
        check_objects(&tree, sums.as_deref(), &model);
    }

    #[test]
    fn spilling_changes_nothing(model in any_model(), limit in 0..8192usize) {
        let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let roomy = build(&model, 64 << 20, one.path()).unwrap();
        let tight = build(&model, limit, other.path()).unwrap();
        prop_assert_eq!(roomy.rows.digest, tight.rows.digest);
        prop_assert_eq!(fs::read(&roomy.rows.path).unwrap(), fs::read(&tight.rows.path).unwrap());
        prop_assert_eq!(roomy.digests.map(|part| part.digest), tight.digests.map(|part| part.digest));
        prop_assert_eq!(roomy.sums.map(|part| part.digest), tight.sums.map(|part| part.digest));
        // Scratch files are gone; only parts are left.
        let mut left: Vec<String> = fs::read_dir(other.path()).unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        left.retain(|name| !["rows.zst", "digests.zst", "sums"].contains(&name.as_str()));
        prop_assert!(left.is_empty(), "{:?}", left);
    }

    #[test]
    fn damage_gives_errors_never_panics(
        model in any_model(),
        changes in vec((any::<prop::sample::Index>(), any::<u8>(), any::<bool>()), 1..12),
        cut in prop::option::weighted(0.3, any::<prop::sample::Index>()),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let built = build(&model, 64 << 20, dir.path()).unwrap();
        let good = zstd::decode_all(fs::File::open(&built.rows.path).unwrap()).unwrap();
        for together in [false, true] {
            let mut bytes = good.clone();
            for (at, value, in_head) in &changes {
                if !together {
                    bytes.copy_from_slice(&good);
                }
                // Headers and the first rows are few of the bytes and most of the danger.
                let at = at.index(if *in_head { 512.min(bytes.len()) } else { bytes.len() });
                bytes[at] = *value;
                if let Ok(tree) = Tree::from_bytes(bytes.clone()) {
                    exercise(&tree);
                }
            }
            if let Some(cut) = cut {
                bytes.truncate(cut.index(bytes.len()));
                prop_assert!(Tree::from_bytes(bytes).is_err());
            }
        }
    }

    #[test]
    fn arbitrary_bytes_are_refused(bytes in vec(any::<u8>(), 0..2048)) {
        prop_assert!(Tree::from_bytes(bytes.clone()).is_err());
        prop_assert!(Digests::from_bytes(bytes).is_err());
    }
}

/// A small tree with everything in it, as bytes.
fn small_tree() -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let mut builder = TreeBuilder::new(dir.path(), 1 << 20).unwrap();
    let time = Timestamp {
        seconds: 1_700_000_000,
        nanos: 1,
    };
    let sums = [BlockSum::of(b"block"); 3];
    for (number, pin) in [
        Pin::Content,
        Pin::ETag("\"e\"".into()),
        Pin::VersionId("v".into()),
    ]
    .into_iter()
    .enumerate()
    {
        let digest = (number == 0).then(|| Digest::of(b"object"));
        let object = Object {
            key: format!("key/{number}"),
            size: 3 * BLOCK_SIZE,
            pin,
            digest,
        };
        let object = builder.add_object(object, Some(&sums)).unwrap();
        let content = Some(Content { object, offset: 7 });
        builder
            .add_file(
                format!("d{number}/f").as_bytes(),
                0o644,
                time,
                1000,
                content,
                None,
            )
            .unwrap();
    }
    builder.add_symlink(b"d0/link", 0o777, time, b"../d1").unwrap();
    builder
        .add_file(b"d0/sub/empty", 0o644, time, 0, None, None)
        .unwrap();
    let built = builder.finish(dir.path()).unwrap();
    zstd::decode_all(fs::File::open(built.rows.path).unwrap()).unwrap()
}

#[test]
fn every_field_may_hold_anything() {
    let good = small_tree();
    let rows = Tree::from_bytes(good.clone()).unwrap().row_count();
    // Rows and objects, one before and after them, sizes, and the ends of the number line.
    let mut values: Vec<u32> = (0..rows + 2).collect();
    values.extend([
        48,
        64,
        255,
        256,
        0x2f2f_2f2f,
        0x4000_0000,
        i32::MAX as u32,
        i32::MIN as u32,
        u32::MAX - 1,
        u32::MAX,
    ]);
    values.extend([good.len() as u32 - 1, good.len() as u32, good.len() as u32 + 1]);
    for at in (0..good.len() - 4).step_by(2) {
        for value in &values {
            let mut bytes = good.clone();
            bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
            if let Ok(tree) = Tree::from_bytes(bytes) {
                exercise(&tree);
            }
        }
    }
}

#[test]
fn a_tree_is_refused_at_every_length_but_its_own() {
    let good = small_tree();
    for len in 0..good.len() {
        assert!(Tree::from_bytes(good[..len].to_vec()).is_err(), "{len}");
    }
    assert!(Tree::from_bytes([good.as_slice(), &[0]].concat()).is_err());
}

#[test]
fn what_a_newer_writer_may_add() {
    let good = small_tree();
    let u32_at = |at: usize| u32::from_le_bytes(good[at..at + 4].try_into().unwrap()) as usize;
    let (header_len, sections) = (u32_at(12), u32_at(96));
    // A section that this reader does not know, pointing at the header's padding, is skipped.
    let entry = 128 + 24 * sections;
    assert!(entry + 24 <= header_len, "the header has no room for this test");
    let mut grown = good.clone();
    grown[96..100].copy_from_slice(&(sections as u32 + 1).to_le_bytes());
    grown[entry..entry + 4].copy_from_slice(&99u32.to_le_bytes());
    exercise(&Tree::from_bytes(grown).unwrap());
    // A flag or a version that it does not know is not.
    let mut flagged = good.clone();
    flagged[20] |= 1;
    assert!(matches!(
        Tree::from_bytes(flagged),
        Err(TreeError::UnknownFeature { .. })
    ));
    let mut newer = good;
    newer[8] = 2;
    assert!(matches!(
        Tree::from_bytes(newer),
        Err(TreeError::UnknownFormat { version: 2 })
    ));
}

#[test]
fn digests_of_another_tree_are_refused() {
    let tree = Tree::from_bytes(small_tree()).unwrap();
    let file = tree.find(b"d0/f").unwrap().unwrap();
    let of = |count: u64| {
        let header = [
            b"GRIDDGST".as_slice(),
            &1u64.to_le_bytes(),
            &count.to_le_bytes(),
            &[0; 8],
        ]
        .concat();
        Digests::from_bytes([header, vec![7; 32 * count as usize]].concat())
            .unwrap()
            .of(&tree, file)
    };
    assert_eq!(
        of(tree.totals().files).unwrap(),
        Some(Digest::from_bytes([7; 32]))
    );
    assert!(of(tree.totals().files + 1).is_err());
    assert!(of(0).is_err());
}

#[test]
fn trees_are_shared_between_threads() {
    fn shared<T: Send + Sync>() {}
    shared::<Tree>();
    shared::<Digests>();
}
