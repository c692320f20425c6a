//! What the tests of the kernel side share: a tree made from a directory, its bytes from local files,
//! and the question whether this machine can mount at all.

#![allow(dead_code)] // each test uses its part

use std::{
    fs::{self, File},
    ops::Range,
    os::unix::{
        ffi::OsStrExt,
        fs::{FileExt, MetadataExt},
    },
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering::Relaxed},
    },
};

use super::sandbox::skip;
use async_trait::async_trait;
use bytes::Bytes;
use grid_mount::{
    digest::Digest,
    fs::{Content, GridFs, Owner, ReadError, Snapshot},
    origin::Pin,
    tree::{self, Ino, Object, ObjectNo, Timestamp, Tree, builder::TreeBuilder, unpack},
};

/// Files from this size on are objects of their own; smaller ones share one.
pub const WHOLE: u64 = 64 << 10;

/// Whether mounting works here. A machine that runs the tests for others must be able to.
pub fn can_mount() -> bool {
    let can = Path::new("/dev/fuse").exists();
    if !can {
        skip("mounting", "there is no /dev/fuse");
    }
    can
}

pub fn can_mount_as_root() -> bool {
    if !is_root() {
        skip("mounting as root", "the tests do not run as root");
    }
    is_root() && can_mount()
}

pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

pub fn me() -> Owner {
    Owner {
        uid: nix::unistd::geteuid().as_raw(),
        gid: nix::unistd::getegid().as_raw(),
    }
}

/// Where reads are answered from.
#[repr(u8)]
#[derive(Clone, Copy)]
pub enum From {
    /// The request's thread.
    Hits,
    /// A task.
    Misses,
    /// In turn.
    Both,
    /// A task that fails.
    Nowhere,
}

/// Objects as local files.
pub struct LocalObjects {
    files: Vec<Arc<File>>,
    from: AtomicU8,
    turn: AtomicBool,
    pub seals: AtomicBool,
    pub reads: AtomicU64,
}

impl LocalObjects {
    pub fn answer_from(&self, from: From) {
        self.from.store(from as u8, Relaxed);
    }
}

#[async_trait]
impl Content for LocalObjects {
    fn read_cached(&self, object: ObjectNo, range: Range<u64>, buf: &mut Vec<u8>) -> bool {
        let hit = match self.from.load(Relaxed) {
            0 => true,
            2 => self.turn.fetch_xor(true, Relaxed),
            _ => false,
        };
        if hit {
            buf.resize((range.end - range.start) as usize, 0);
            self.files[object.0 as usize]
                .read_exact_at(buf, range.start)
                .unwrap();
            self.reads.fetch_add(1, Relaxed);
        }
        hit
    }

    async fn read(&self, object: ObjectNo, range: Range<u64>) -> Result<Bytes, ReadError> {
        if self.from.load(Relaxed) == From::Nowhere as u8 {
            return Err(ReadError::Other("the test says so".into()));
        }
        self.reads.fetch_add(1, Relaxed);
        let file = self.files[object.0 as usize].clone();
        let read = tokio::task::spawn_blocking(move || {
            let mut bytes = vec![0; (range.end - range.start) as usize];
            file.read_exact_at(&mut bytes, range.start).map(|()| bytes)
        });
        let bytes = read
            .await
            .unwrap()
            .map_err(|error| ReadError::Other(error.into()))?;
        Ok(bytes.into())
    }

    fn advise(&self, _: Ino, _: ObjectNo, _: Range<u64>, _: Range<u64>) {}

    fn cached_bytes(&self, _: ObjectNo, range: Range<u64>) -> u64 {
        range.end - range.start
    }

    fn seal(&self, object: ObjectNo) -> Option<Arc<File>> {
        self.seals
            .load(Relaxed)
            .then(|| self.files[object.0 as usize].clone())
    }
}

/// A published directory: the rows file and the objects.
pub struct Published {
    pub rows: PathBuf,
    pub content: Arc<LocalObjects>,
}

pub const REFERENCE: &str = "alice:test data,x/1";

impl Published {
    /// Publishes `source` into `store`, an empty directory.
    pub fn new(source: &Path, store: &Path) -> Self {
        let mut builder = TreeBuilder::new(store, 64 << 20).unwrap();
        let bundle_path = store.join("object-0");
        let bundle_file = File::create(&bundle_path).unwrap();
        // The size of the bundle has to be known before files can refer to it: walk twice.
        let mut paths = vec![];
        walk(source, source, &mut paths);
        let size = |path: &Path| fs::symlink_metadata(source.join(path)).unwrap();
        let small: u64 = paths
            .iter()
            .map(|path| size(path))
            .filter(|meta| meta.is_file() && meta.len() < WHOLE)
            .map(|meta| meta.len().next_multiple_of(4096))
            .sum();
        bundle_file.set_len(small).unwrap();
        let object = |number: usize, size| Object {
            key: format!("object-{number}"),
            size,
            pin: Pin::Content,
            digest: Some(Digest::of(&number.to_le_bytes())),
        };
        let bundle = builder.add_object(object(0, small), None).unwrap();
        let mut objects = 1;
        let mut end = 0;
        for path in &paths {
            let meta = size(path);
            let modified = Timestamp {
                seconds: meta.mtime(),
                nanos: meta.mtime_nsec() as u32,
            };
            let mode = (meta.mode() & 0o7777) as u16;
            let name = path.as_os_str().as_bytes();
            if meta.is_dir() {
                builder.add_directory(name, mode, modified).unwrap();
            } else if meta.is_symlink() {
                let target = fs::read_link(source.join(path)).unwrap();
                builder
                    .add_symlink(name, mode, modified, target.as_os_str().as_bytes())
                    .unwrap();
            } else if meta.len() >= WHOLE {
                fs::copy(source.join(path), store.join(format!("object-{objects}"))).unwrap();
                let whole = builder.add_object(object(objects, meta.len()), None).unwrap();
                objects += 1;
                let content = Some(tree::Content {
                    object: whole,
                    offset: 0,
                });
                builder
                    .add_file(name, mode, modified, meta.len(), content, None)
                    .unwrap();
            } else {
                bundle_file
                    .write_all_at(&fs::read(source.join(path)).unwrap(), end)
                    .unwrap();
                let content = (meta.len() > 0).then_some(tree::Content {
                    object: bundle,
                    offset: end,
                });
                end += meta.len().next_multiple_of(4096);
                builder
                    .add_file(name, mode, modified, meta.len(), content, None)
                    .unwrap();
            }
        }
        Self::finish(builder, store)
    }

    /// From a builder whose objects lie in `store` as `object-0`, `object-1`, …
    pub fn finish(builder: TreeBuilder, store: &Path) -> Self {
        let built = builder.finish(store).unwrap();
        let rows = store.join("rows");
        unpack(
            File::open(&built.rows.path).unwrap(),
            built.rows.size,
            built.rows.digest,
            &rows,
        )
        .unwrap();
        Self::open(store)
    }

    /// What another process published.
    pub fn open(store: &Path) -> Self {
        let rows = store.join("rows");
        let objects = Tree::open(&rows).unwrap().object_count();
        let files = (0..objects)
            .map(|object| Arc::new(File::open(store.join(format!("object-{object}"))).unwrap()))
            .collect();
        let content = Arc::new(LocalObjects {
            files,
            from: AtomicU8::new(From::Both as u8),
            turn: AtomicBool::new(false),
            seals: AtomicBool::new(true),
            reads: AtomicU64::new(0),
        });
        Self { rows, content }
    }

    pub fn fs(&self, owner: Owner) -> GridFs {
        let snapshot = Snapshot {
            reference: REFERENCE.into(),
            tree: Arc::new(Tree::open(&self.rows).unwrap()),
            content: self.content.clone(),
        };
        GridFs::new(snapshot, owner)
    }
}

fn walk(root: &Path, dir: &Path, paths: &mut Vec<PathBuf>) {
    paths.push(dir.strip_prefix(root).unwrap().to_owned());
    let mut entries: Vec<_> = fs::read_dir(dir).unwrap().map(Result::unwrap).collect();
    entries.sort_by_key(|entry| entry.file_name());
    for entry in entries {
        if entry.file_type().unwrap().is_dir() {
            walk(root, &entry.path(), paths);
        } else {
            paths.push(entry.path().strip_prefix(root).unwrap().to_owned());
        }
    }
}

/// Bytes that look random and are the same every time.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    let mut bytes = vec![0; len];
    hasher.finalize_xof().fill(&mut bytes);
    bytes
}

/// A small directory with everything that a directory can have.
pub fn sample(dir: &Path) {
    use std::os::unix::fs::{PermissionsExt, symlink};
    fs::create_dir_all(dir.join("d/e/f")).unwrap();
    fs::create_dir(dir.join("nothing in here")).unwrap();
    let files = [
        ("empty", 0),
        ("one", 1),
        ("d/small", 1000),
        ("d/e/block", 128 << 10),
        ("d/e/f/more", (128 << 10) + 1),
        ("d/below", WHOLE as usize - 1),
        ("d/at", WHOLE as usize),
        ("large", (5 << 20) + 12345),
        ("naïve \n name", 77),
    ];
    for (seed, (name, len)) in files.into_iter().enumerate() {
        fs::write(dir.join(name), noise(seed as u64, len)).unwrap();
    }
    symlink("d/small", dir.join("link")).unwrap();
    symlink("no/where", dir.join("d/dangling")).unwrap();
    symlink("..", dir.join("d/up")).unwrap();
    fs::set_permissions(dir.join("one"), fs::Permissions::from_mode(0o4751)).unwrap();
    fs::set_permissions(dir.join("d/small"), fs::Permissions::from_mode(0o400)).unwrap();
    fs::set_permissions(dir.join("d/e"), fs::Permissions::from_mode(0o1775)).unwrap();
    let times = [
        ("one", (1, 2)),
        ("d/small", (-5, 999_999_999)),
        ("d/e", (4_000_000_000, 123_456_789)),
    ];
    for (name, (seconds, nanos)) in times {
        let time = nix::sys::time::TimeSpec::new(seconds, nanos);
        let flags = nix::sys::stat::UtimensatFlags::NoFollowSymlink;
        nix::sys::stat::utimensat(nix::fcntl::AT_FDCWD, &dir.join(name), &time, &time, flags).unwrap();
    }
}

/// One line per entry: everything of it that a copy must have, contents as a digest.
pub fn inventory(root: &Path) -> Vec<String> {
    let mut paths = vec![];
    walk(root, root, &mut paths);
    paths
        .iter()
        .map(|path| {
            let full = root.join(path);
            let meta = fs::symlink_metadata(&full).unwrap();
            let what = if meta.is_symlink() {
                format!("-> {:?}", fs::read_link(&full).unwrap())
            } else if meta.is_dir() {
                format!("links {}", meta.nlink())
            } else {
                format!("{} {}", meta.len(), Digest::of(&fs::read(&full).unwrap()))
            };
            format!(
                "{path:?} {:o} {}.{:09} {what}",
                meta.mode(),
                meta.mtime(),
                meta.mtime_nsec()
            )
        })
        .collect()
}
