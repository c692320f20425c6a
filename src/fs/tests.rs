use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use async_trait::async_trait;
use parking_lot::Mutex;

use super::*;
use crate::{
    digest::Digest,
    pin::Pin,
    tree::{Object, builder::TreeBuilder, unpack},
};

const OWNER: Owner = Owner { uid: 1000, gid: 1001 };

/// Inode, bytes read, bytes of the file.
type Advice = (Ino, Range<u64>, Range<u64>);

/// Objects in memory; the first `cached` bytes of each are at hand.
#[derive(Default)]
struct InMemory {
    objects: Vec<Vec<u8>>,
    cached: AtomicU64,
    /// Answers one byte too few.
    short: bool,
    advised: Mutex<Vec<Advice>>,
}

#[async_trait]
impl Content for InMemory {
    fn read_cached(&self, object: ObjectNo, range: Range<u64>, buf: &mut Vec<u8>) -> bool {
        let hit = range.end <= self.cached.load(Relaxed);
        if hit {
            buf.clear();
            buf.extend_from_slice(&self.objects[object.0 as usize][range.start as usize..range.end as usize]);
        }
        hit
    }
    async fn read(&self, object: ObjectNo, range: Range<u64>) -> Result<Bytes, ReadError> {
        let end = range.end as usize - usize::from(self.short);
        Ok(Bytes::copy_from_slice(
            &self.objects[object.0 as usize][range.start as usize..end],
        ))
    }
    fn advise(&self, ino: Ino, _: ObjectNo, range: Range<u64>, file: Range<u64>) {
        self.advised.lock().push((ino, range, file));
    }
    fn cached_bytes(&self, _: ObjectNo, range: Range<u64>) -> u64 {
        self.cached
            .load(Relaxed)
            .min(range.end)
            .saturating_sub(range.start)
    }
    fn seal(&self, _: ObjectNo) -> Option<Arc<File>> {
        tempfile::tempfile().ok().map(Arc::new)
    }
}

/// `/a` 300 bytes in a bundle behind `/d/b`, `/d/b` 200, `/whole` all of an object, `/empty`, `/link`, `/d/e/`.
fn sample(content: InMemory) -> (GridFs, Arc<InMemory>) {
    let dir = tempfile::tempdir().unwrap();
    let mut builder = TreeBuilder::new(dir.path(), 1 << 20).unwrap();
    let at = |seconds| Timestamp { seconds, nanos: 5 };
    let object = |key: &str, size, pin, digest| Object {
        key: key.into(),
        size,
        pin,
        digest,
    };
    let bundle = object("bundle", 500, Pin::Content, Some(Digest::of(b"bundle")));
    let bundle = builder.add_object(bundle, None).unwrap();
    let whole = object(
        "whole",
        100,
        Pin::ETag("\"e\"".into()),
        Some(Digest::of(b"whole")),
    );
    let whole = builder.add_object(whole, None).unwrap();
    builder.add_directory(b"", 0o755, at(1)).unwrap();
    builder.add_directory(b"d", 0o700, at(-2)).unwrap();
    builder.add_directory(b"d/e", 0o755, at(3)).unwrap();
    let place = |object, offset| Some(tree::Content { object, offset });
    builder
        .add_file(b"a", 0o644, at(4), 300, place(bundle, 200), None)
        .unwrap();
    builder
        .add_file(b"d/b", 0o4755, at(5), 200, place(bundle, 0), None)
        .unwrap();
    builder
        .add_file(b"whole", 0o644, at(6), 100, place(whole, 0), None)
        .unwrap();
    builder.add_file(b"empty", 0o644, at(7), 0, None, None).unwrap();
    builder.add_symlink(b"link", 0o777, at(8), b"d/b").unwrap();
    let built = builder.finish(dir.path()).unwrap();
    let rows = dir.path().join("rows");
    unpack(
        File::open(&built.rows.path).unwrap(),
        built.rows.size,
        built.rows.digest,
        &rows,
    )
    .unwrap();
    let content = Arc::new(content);
    let snapshot = Snapshot {
        reference: "alice:x/1".into(),
        tree: Arc::new(Tree::open(&rows).unwrap()),
        content: content.clone(),
    };
    (GridFs::new(snapshot, OWNER), content)
}

fn bytes() -> InMemory {
    let object = |len: usize, factor: usize| (0..len).map(|at| (at * factor) as u8).collect();
    InMemory {
        objects: vec![object(500, 7), object(100, 11)],
        ..InMemory::default()
    }
}

fn ino(fs: &GridFs, path: &str) -> Ino {
    path.split('/')
        .filter(|name| !name.is_empty())
        .fold(Ino(1), |dir, name| {
            fs.lookup(dir, name.as_bytes())
                .unwrap()
                .unwrap_or_else(|| panic!("{path}"))
                .ino
        })
}

fn names(fs: &GridFs, dir: Ino, from: u64, room: usize) -> Vec<(String, u64, u64)> {
    let mut names = Vec::new();
    fs.list(dir, from, |entry| {
        if names.len() == room {
            return Room::Full;
        }
        let name = String::from_utf8(entry.name.to_vec()).unwrap();
        names.push((name, entry.next, entry.attributes.ino.0));
        Room::Left
    })
    .unwrap();
    names
}

#[test]
fn attributes_are_as_published_and_links_count_directories() {
    let (fs, _) = sample(bytes());
    let root = fs.attributes(Ino(1)).unwrap();
    assert_eq!(
        (root.kind, root.links, root.mode, root.owner),
        (Kind::Directory, 3, 0o755, OWNER)
    );
    let d = fs.attributes(ino(&fs, "d")).unwrap();
    assert_eq!(
        (d.links, d.mode, d.modified),
        (
            3,
            0o700,
            Timestamp {
                seconds: -2,
                nanos: 5
            }
        )
    );
    assert_eq!(fs.attributes(ino(&fs, "d/e")).unwrap().links, 2);
    let b = fs.attributes(ino(&fs, "d/b")).unwrap();
    assert_eq!(
        (b.kind, b.size, b.blocks, b.links, b.mode),
        (Kind::File, 200, 1, 1, 0o4755)
    );
    let link = fs.attributes(ino(&fs, "link")).unwrap();
    assert_eq!((link.kind, link.size), (Kind::Symlink, 3));
    assert_eq!(fs.readlink(link.ino).unwrap(), b"d/b");
    assert_eq!(
        fs.statistics(),
        Statistics {
            blocks: 1,
            entries: 8
        }
    );
}

#[test]
fn absence_is_an_answer_and_failure_is_not_absence() {
    let (fs, _) = sample(bytes());
    assert_eq!(fs.lookup(Ino(1), b"nothing").unwrap(), None);
    assert!(matches!(fs.lookup(Ino(99), b"a"), Err(FsError::NoSuchInode(99))));
    assert!(matches!(fs.lookup(Ino(0), b"a"), Err(FsError::NoSuchInode(0))));
    assert!(matches!(
        fs.lookup(Ino(u64::MAX), b"a"),
        Err(FsError::NoSuchInode(_))
    ));
    assert!(matches!(
        fs.lookup(ino(&fs, "a"), b"x"),
        Err(FsError::NotADirectory)
    ));
    assert!(matches!(
        fs.lookup(Ino(1), &[b'n'; 256]),
        Err(FsError::NameTooLong(256))
    ));
    assert!(matches!(fs.readlink(ino(&fs, "a")), Err(FsError::NotASymlink)));
    assert!(matches!(
        fs.read_cached(Ino(1), 0, 1, &mut Vec::new()),
        Err(FsError::IsADirectory)
    ));
    assert!(matches!(
        fs.read_cached(ino(&fs, "link"), 0, 1, &mut Vec::new()),
        Err(FsError::NotAFile)
    ));
    assert!(matches!(
        fs.list(ino(&fs, "a"), 0, |_| Room::Left),
        Err(FsError::NotADirectory)
    ));
}

#[test]
fn a_listing_can_go_on_from_every_entry() {
    let (fs, _) = sample(bytes());
    let all = names(&fs, Ino(1), 0, usize::MAX);
    let only_names: Vec<&str> = all.iter().map(|(name, ..)| name.as_str()).collect();
    assert_eq!(only_names, [".", "..", "a", "d", "empty", "link", "whole"]);
    let d = ino(&fs, "d");
    let listed = names(&fs, d, 0, 2);
    assert_eq!(listed, [(".".into(), 1, d.0), ("..".into(), 2, 1)]);
    for (at, entry) in all.iter().enumerate() {
        assert_eq!(names(&fs, Ino(1), entry.1, usize::MAX), all[at + 1..]);
    }
    for room in 1..all.len() {
        let mut joined: Vec<(String, u64, u64)> = Vec::new();
        loop {
            let page = names(&fs, Ino(1), joined.last().map_or(0, |last| last.1), room);
            if page.is_empty() {
                break;
            }
            joined.extend(page);
        }
        assert_eq!(joined, all);
    }
    for past in [8, u64::from(u32::MAX), u64::MAX] {
        assert_eq!(names(&fs, Ino(1), past, 9), []);
    }
}

#[tokio::test]
async fn reads_give_the_files_bytes_from_either_path() {
    let (fs, content) = sample(bytes());
    let files = [
        ("a", 0, 200..500),
        ("d/b", 0, 0..200),
        ("whole", 1, 0..100),
        ("empty", 0, 0..0),
    ];
    for (path, object, place) in files {
        let ino = ino(&fs, path);
        let expected = &content.objects[object][place.clone()];
        for offset in [0, 1, 99, 199, 299, 300, 5000, u64::MAX] {
            for length in [0, 1, 100, 1 << 20, u64::MAX] {
                let from = (offset as usize).min(expected.len());
                let to = offset
                    .saturating_add(length)
                    .min(expected.len() as u64)
                    .max(from as u64) as usize;
                assert_eq!(fs.read(ino, offset, length).await.unwrap(), expected[from..to]);
                for cached in [0, 250, 500] {
                    content.cached.store(cached, Relaxed);
                    let mut buf = vec![1, 2, 3];
                    if fs.read_cached(ino, offset, length, &mut buf).unwrap() {
                        assert_eq!(buf, expected[from..to]);
                    } else {
                        assert!((place.start + to) as u64 > cached);
                    }
                }
            }
        }
    }
}

#[tokio::test]
async fn what_is_too_short_is_an_error_and_names_the_file() {
    let (fs, _) = sample(InMemory {
        short: true,
        ..bytes()
    });
    let error = fs.read(ino(&fs, "d/b"), 10, 20).await.unwrap_err();
    assert_eq!(error.to_string(), "reading d/b");
    assert!(matches!(
        error,
        FsError::Read {
            source: ReadError::Length { wanted: 20, got: 19 },
            ..
        }
    ));
}

#[tokio::test]
async fn advice_is_given_once_per_read_and_within_the_file() {
    let (fs, content) = sample(bytes());
    let a = ino(&fs, "a");
    assert!(!fs.read_cached(a, 10, 20, &mut Vec::new()).unwrap());
    fs.read(a, 10, 20).await.unwrap();
    content.cached.store(500, Relaxed);
    assert!(fs.read_cached(a, 30, 20, &mut Vec::new()).unwrap());
    assert_eq!(
        *content.advised.lock(),
        [(a, 210..230, 200..500), (a, 230..250, 200..500)]
    );
}

#[test]
fn only_whole_objects_are_handed_to_the_kernel() {
    let (fs, _) = sample(bytes());
    assert!(fs.sealed(ino(&fs, "whole")).unwrap().is_some());
    for path in ["a", "d/b", "empty"] {
        assert!(fs.sealed(ino(&fs, path)).unwrap().is_none(), "{path}");
    }
}

#[test]
fn extended_attributes_say_where_bytes_come_from() {
    let (fs, content) = sample(bytes());
    let value = |path, name: &str| {
        fs.xattr(ino(&fs, path), name.as_bytes())
            .map(|value| String::from_utf8(value).unwrap())
    };
    assert_eq!(value("whole", "user.grid.key").unwrap(), "whole");
    assert_eq!(value("whole", "user.grid.etag").unwrap(), "\"e\"");
    assert_eq!(
        value("whole", "user.grid.digest").unwrap(),
        Digest::of(b"whole").to_string()
    );
    assert_eq!(value("a", "user.grid.reference").unwrap(), "alice:x/1");
    assert_eq!(value("", "user.grid.reference").unwrap(), "alice:x/1");
    // The digest of a bundle is not that of a file in it.
    assert!(matches!(
        value("a", "user.grid.digest"),
        Err(FsError::NoSuchAttribute)
    ));
    assert!(matches!(
        value("a", "security.selinux"),
        Err(FsError::UnsupportedAttribute)
    ));
    for (cached, percent) in [(0, "0%"), (350, "50%"), (499, "99%"), (500, "100%")] {
        content.cached.store(cached, Relaxed);
        assert_eq!(value("a", "user.grid.cached").unwrap(), percent);
    }
    let listed = fs.xattr_names(ino(&fs, "whole")).unwrap();
    let mut listed: Vec<&[u8]> = listed
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
        .collect();
    listed.sort_unstable();
    let expected = ["cached", "digest", "etag", "key", "reference"].map(|name| format!("user.grid.{name}"));
    assert_eq!(listed, expected.each_ref().map(|name| name.as_bytes()));
    assert_eq!(fs.xattr_names(ino(&fs, "link")).unwrap(), b"");
}
