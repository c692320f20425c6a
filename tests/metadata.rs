//! Metadata through a real mount: what is asked once and never again, and what `du`, `df` and
//! `getfattr` say. The entries themselves are compared with a native copy in `fuse_mount.rs`.

#[path = "support/sandbox.rs"]
mod sandbox;
#[path = "support/kernel.rs"]
mod support;

use std::{
    fs,
    os::unix::fs::{DirEntryExt, MetadataExt},
    path::{Path, PathBuf},
    process::{Command, Output},
};

use grid_mount::{
    digest::Digest,
    fuse::{self, IoModeWish, MountOptions, Mounted, Operation},
};
use support::{Published, REFERENCE, can_mount, is_root, me, noise};
use tokio::runtime::Runtime;

/// Dropped in this order: the mount goes before the directory it is on.
struct Mount {
    mounted: Mounted,
    _runtime: Runtime,
    dir: tempfile::TempDir,
}

const DIRECTORIES: u64 = 20;
const FILES: u64 = 300;

impl Mount {
    /// [`DIRECTORIES`] directories of [`FILES`] files of 100 bytes, and `large`.
    fn new(wish: IoModeWish) -> Option<Self> {
        if !can_mount() || !is_root() {
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let (source, store, point) = (
            dir.path().join("source"),
            dir.path().join("store"),
            dir.path().join("mnt"),
        );
        for dir in [&source, &store, &point] {
            fs::create_dir(dir).unwrap();
        }
        for directory in 0..DIRECTORIES {
            let inner = source.join(format!("d{directory:02}"));
            fs::create_dir_all(inner.join("sub")).unwrap();
            for file in 0..FILES {
                fs::write(inner.join(format!("f{file:03}")), [7; 100]).unwrap();
            }
        }
        fs::write(source.join("large"), noise(1, 3 << 20)).unwrap();
        let published = Published::new(&source, &store);
        let runtime = Runtime::new().unwrap();
        let mut options = MountOptions::new(&point, REFERENCE, me());
        options.io_mode = wish;
        let mounted = fuse::mount(published.fs(me()), options, runtime.handle()).unwrap();
        Some(Self {
            mounted,
            _runtime: runtime,
            dir,
        })
    }

    fn point(&self) -> PathBuf {
        self.dir.path().join("mnt")
    }

    fn source(&self) -> PathBuf {
        self.dir.path().join("source")
    }

    fn asked(&self, operation: Operation) -> u64 {
        self.mounted.counters().get(operation)
    }

    fn asked_but_statfs(&self) -> u64 {
        self.mounted.counters().total() - self.asked(Operation::StatFs)
    }
}

fn run(program: &str, arguments: &[&str], dir: &Path) -> String {
    let output: Output = Command::new(program)
        .args(arguments)
        .current_dir(dir)
        .env("LC_ALL", "C")
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_first_find_asks_per_page_and_a_second_not_at_all() {
    let Some(mount) = Mount::new(IoModeWish::NoOpen) else {
        return;
    };
    let listed = run("find", &[".", "-ls"], &mount.point());
    let entries = listed.lines().count() as u64;
    assert_eq!(entries, 1 + DIRECTORIES * (FILES + 2) + 1);
    // With attributes or without, a listing is answered by the page; no file is asked for by itself.
    let asked = mount.asked_but_statfs();
    assert!(asked < entries / 4, "{asked} requests for {entries} entries");
    for command in [
        &["find", ".", "-ls"][..],
        &["find", "."],
        &["ls", "-lR", "--color=never"],
        &["du", "-s"],
    ] {
        // Whatever has not been asked yet (`ls` asks for access lists), is asked the first time.
        run(command[0], &command[1..], &mount.point());
        let (listing, attributes) = (
            mount.asked(Operation::ReadDir) + mount.asked(Operation::ReadDirPlus),
            mount.asked(Operation::Lookup) + mount.asked(Operation::GetAttr),
        );
        run(command[0], &command[1..], &mount.point());
        assert_eq!(
            mount.asked(Operation::ReadDir) + mount.asked(Operation::ReadDirPlus),
            listing,
            "{command:?}"
        );
        assert_eq!(
            mount.asked(Operation::Lookup) + mount.asked(Operation::GetAttr),
            attributes,
            "{command:?}"
        );
    }
    let before = mount.asked_but_statfs();
    assert_eq!(run("find", &[".", "-ls"], &mount.point()), listed);
    assert_eq!(mount.asked_but_statfs(), before);
}

/// Names alone cost no inode; attributes come along once somebody goes through a directory and asks for them.
#[test]
fn a_listing_brings_attributes_once_they_are_wanted() {
    let Some(mount) = Mount::new(IoModeWish::NoOpen) else {
        return;
    };
    run("find", &["."], &mount.point());
    // Directories brought theirs along, or each would have been looked up to be opened.
    assert!(
        mount.asked(Operation::Lookup) <= 2,
        "{}",
        mount.asked(Operation::Lookup)
    );
    for path in ["d00/f000", "d07/f150", "d19/f299"] {
        let before = mount.asked(Operation::Lookup);
        fs::metadata(mount.point().join(path)).unwrap();
        assert_eq!(
            mount.asked(Operation::Lookup),
            before + 1,
            "{path} came with attributes"
        );
    }

    let Some(mount) = Mount::new(IoModeWish::NoOpen) else {
        return;
    };
    run("ls", &["-l", "d00"], &mount.point());
    // Those of the first, short page, and what names the directory.
    let asked = mount.asked(Operation::Lookup);
    assert!((16..=40).contains(&asked), "{asked}");

    let Some(mount) = Mount::new(IoModeWish::NoOpen) else {
        return;
    };
    run("find", &[".", "-ls"], &mount.point());
    // The files of the first directory, and `large`; nothing of the nineteen others.
    let asked = mount.asked(Operation::Lookup);
    assert!((1..=FILES + 2).contains(&asked), "{asked}");
}

#[test]
fn an_entry_without_attributes_has_its_number_and_its_type() {
    let Some(mount) = Mount::new(IoModeWish::NoOpen) else {
        return;
    };
    for dir in ["", "d00", "d00/sub"] {
        let dir = mount.point().join(dir);
        let listed: Vec<fs::DirEntry> = fs::read_dir(&dir).unwrap().map(Result::unwrap).collect();
        let said: Vec<_> = listed
            .iter()
            .map(|entry| (entry.ino(), entry.file_type().unwrap()))
            .collect();
        for (entry, (ino, kind)) in listed.iter().zip(said) {
            let found = entry.metadata().unwrap();
            assert_eq!(
                (found.ino(), found.file_type()),
                (ino, kind),
                "{:?}",
                entry.path()
            );
        }
    }
}

#[test]
fn directories_are_never_opened_by_the_agent() {
    for wish in [IoModeWish::NoOpen, IoModeWish::Passthrough] {
        let Some(mount) = Mount::new(wish) else { return };
        run("find", &["."], &mount.point());
        // "Not implemented" for the first directory (and whatever else is asked once and never again);
        // the others are not asked about.
        let declined = mount.asked(Operation::Declined);
        assert!((1..DIRECTORIES / 4).contains(&declined), "{wish:?}: {declined}");
        run("find", &["."], &mount.point());
        assert_eq!(mount.asked(Operation::Declined), declined, "{wish:?}");
        assert_eq!(
            (mount.asked(Operation::Open), mount.asked(Operation::Release)),
            (0, 0)
        );
    }
}

#[test]
fn a_name_that_is_not_there_is_asked_for_once() {
    let Some(mount) = Mount::new(IoModeWish::NoOpen) else {
        return;
    };
    let absent: Vec<PathBuf> = (0..50)
        .map(|n| mount.point().join(format!("d00/absent{n}")))
        .collect();
    let look = || absent.iter().for_each(|path| assert!(!path.exists()));
    look();
    let asked = mount.asked(Operation::Lookup);
    assert!(asked >= 50, "{asked}");
    for _ in 0..3 {
        look();
    }
    assert_eq!(mount.asked(Operation::Lookup), asked);
}

#[test]
fn link_counts_du_and_df_make_sense() {
    let Some(mount) = Mount::new(IoModeWish::NoOpen) else {
        return;
    };
    let links = |path: &str| fs::metadata(mount.point().join(path)).unwrap().nlink();
    assert_eq!(
        (links(""), links("d07"), links("d07/sub")),
        (2 + DIRECTORIES, 3, 2)
    );
    assert_eq!((links("large"), links("d07/f001")), (1, 1));

    // Apparent sizes without directories, whose own size is the file system's affair.
    let bytes = (3 << 20) + DIRECTORIES * FILES * 100;
    let sum = |root: &Path| -> u64 {
        let sizes = run("find", &[".", "-type", "f", "-printf", "%s\n"], root);
        sizes.lines().map(|size| size.parse::<u64>().unwrap()).sum()
    };
    assert_eq!(sum(&mount.point()), bytes);
    assert_eq!(sum(&mount.source()), bytes);
    let du = run("du", &["-s", "--block-size=1"], &mount.point());
    let du: u64 = du.split_whitespace().next().unwrap().parse().unwrap();
    let rounded = (3 << 20) + DIRECTORIES * FILES * 512 + (1 + 2 * DIRECTORIES) * 4096;
    assert_eq!(du, rounded);

    let df = run(
        "df",
        &[
            "--output=size,used,avail,pcent,itotal,iused,source",
            "--block-size=4096",
            ".",
        ],
        &mount.point(),
    );
    let line: Vec<&str> = df.lines().nth(1).unwrap().split_whitespace().collect();
    let blocks = bytes.div_ceil(4096).to_string();
    let entries = (2 + DIRECTORIES * (FILES + 2)).to_string();
    assert_eq!(line[..6], [&blocks, &blocks, "0", "100%", &entries, &entries]);
}

#[test]
fn every_file_says_where_it_is_from() {
    let Some(mount) = Mount::new(IoModeWish::NoOpen) else {
        return;
    };
    let said = |path: &str| -> Vec<(String, String)> {
        let path = mount.point().join(path);
        let names = xattr_names(&path);
        names
            .iter()
            .map(|name| (name.clone(), xattr(&path, name)))
            .collect()
    };
    let value = |said: &[(String, String)], name: &str| {
        said.iter()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.clone())
    };
    let large = said("large");
    assert_eq!(value(&large, "user.grid.reference").as_deref(), Some(REFERENCE));
    assert_eq!(value(&large, "user.grid.key").as_deref(), Some("object-1"));
    assert_eq!(
        value(&large, "user.grid.digest"),
        Some(Digest::of(&1usize.to_le_bytes()).to_string())
    );
    assert_eq!(value(&large, "user.grid.cached").as_deref(), Some("100%"));
    // In a bundle: its place, but no digest, which would be the bundle's.
    let small = said("d03/f100");
    assert_eq!(value(&small, "user.grid.key").as_deref(), Some("object-0"));
    assert_eq!(value(&small, "user.grid.digest"), None);
    assert_eq!(
        said("d03"),
        [("user.grid.reference".to_owned(), REFERENCE.to_owned())]
    );
}

/// What was promised of a failing disk: the agent dies of it, but the tree goes first, the keeper starts the
/// next one, which fetches it anew, and whoever was listing only waits.
#[test]
fn a_tree_that_cannot_be_read_any_more_costs_an_agent_and_no_answer() {
    if !Path::new("/dev/fuse").exists() {
        sandbox::skip("a mapped tree that fails", "there is no /dev/fuse");
        return;
    }
    let sandbox = sandbox::Sandbox::new();
    let source = sandbox.path("source");
    for directory in 0..8 {
        let dir = source.join(format!("d{directory}"));
        fs::create_dir_all(&dir).unwrap();
        for file in 0..500 {
            fs::write(dir.join(format!("f{file:03}")), "").unwrap();
        }
    }
    let point = sandbox.path("mnt/point");
    sandbox.ok(&["publish", source.to_str().unwrap(), "data"]);
    sandbox.ok(&["data", point.to_str().unwrap()]);
    let agent = sandbox.agent_pid().unwrap();
    let trees = fs::read_dir(sandbox.path("cache/grid/trees")).unwrap();
    let trees: Vec<PathBuf> = trees
        .map(|entry| entry.unwrap().path())
        .filter(|path| fs::metadata(path).unwrap().len() > 64 << 10)
        .collect();
    let [tree] = &trees[..] else { panic!("{trees:?}") };
    fs::OpenOptions::new()
        .write(true)
        .open(tree)
        .unwrap()
        .set_len(4096)
        .unwrap();

    let listed = |root: &Path| {
        let mut lines: Vec<String> = run("find", &[".", "-type", "f"], root)
            .lines()
            .map(str::to_owned)
            .collect();
        lines.sort();
        lines
    };
    assert_eq!(listed(&point), listed(&source));
    assert_ne!(sandbox.agent_pid().unwrap(), agent, "nothing failed");
    let log = fs::read_to_string(sandbox.path("run/grid-mount/agent.log")).unwrap();
    assert!(log.contains("is removed to be fetched anew"), "{log}");
    // Of what fuser answers after us, as the kernel wants it only once, nobody is told.
    assert!(!log.contains("FUSE reply"), "{log}");
}

fn c_string(text: impl AsRef<std::ffi::OsStr>) -> std::ffi::CString {
    use std::os::unix::ffi::OsStrExt;
    std::ffi::CString::new(text.as_ref().as_bytes()).unwrap()
}

fn xattr_names(path: &Path) -> Vec<String> {
    let (path, mut room) = (c_string(path), [0u8; 1024]);
    // SAFETY: a NUL-terminated string and room of the length given, alive during the call.
    let len = unsafe { libc::listxattr(path.as_ptr(), room.as_mut_ptr().cast(), room.len()) };
    let names = &room[..usize::try_from(len).expect("listxattr")];
    names
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
        .map(|name| String::from_utf8(name.to_vec()).unwrap())
        .collect()
}

fn xattr(path: &Path, name: &str) -> String {
    let (path, name, mut room) = (c_string(path), c_string(name), [0u8; 1024]);
    // SAFETY: two NUL-terminated strings and room of the length given, alive during the call.
    let len = unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), room.as_mut_ptr().cast(), room.len()) };
    String::from_utf8(room[..usize::try_from(len).expect("getxattr")].to_vec()).unwrap()
}
