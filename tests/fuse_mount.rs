//! Real mounts through `/dev/fuse`, as root and as an ordinary user, compared with a native copy.

#[path = "support/sandbox.rs"]
mod sandbox;
#[path = "support/kernel.rs"]
mod support;

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read},
    os::unix::{
        ffi::OsStrExt,
        fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Duration,
};

use grid_mount::{
    fs::Owner,
    fuse::{
        self, Ended, IoMode, IoModeWish, MountError, MountOptions, Mounted, Operation, UnmountError, Way,
    },
    tree::{self, Object, Timestamp, builder::TreeBuilder},
};
use support::{From, Published, REFERENCE, can_mount, can_mount_as_root, inventory, is_root, me, sample};
use tokio::runtime::Runtime;

/// The user that root becomes for the tests of an ordinary user.
const NOBODY: u32 = 65534;
const DEADLINE: Duration = Duration::from_secs(20);

/// Dropped in this order: the mount goes before the directory it is on.
struct Mount {
    mounted: Mounted,
    published: Published,
    runtime: Runtime,
    dir: tempfile::TempDir,
}

impl Mount {
    fn sample(wish: IoModeWish) -> Self {
        Self::make(wish, sample)
    }

    fn make(wish: IoModeWish, fill: impl FnOnce(&Path)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("source")).unwrap();
        fill(&dir.path().join("source"));
        fs::create_dir(dir.path().join("store")).unwrap();
        let published = Published::new(&dir.path().join("source"), &dir.path().join("store"));
        Self::of(dir, published, |options| options.io_mode = wish)
    }

    fn of(dir: tempfile::TempDir, published: Published, change: impl FnOnce(&mut MountOptions)) -> Self {
        let runtime = Runtime::new().unwrap();
        let point = dir.path().join("mnt");
        fs::create_dir(&point).unwrap();
        let mut options = MountOptions::new(&point, REFERENCE, me());
        change(&mut options);
        let mounted = fuse::mount(published.fs(options.owner), options, runtime.handle()).unwrap();
        Self {
            mounted,
            published,
            runtime,
            dir,
        }
    }

    fn source(&self) -> PathBuf {
        self.dir.path().join("source")
    }

    fn point(&self) -> PathBuf {
        self.dir.path().join("mnt")
    }

    /// Everything but `statfs`, which the kernel asks for anew each time (`find` does, once).
    fn requests(&self) -> Vec<(&'static str, u64)> {
        let asked = Operation::ALL
            .iter()
            .filter(|operation| **operation != Operation::StatFs);
        asked
            .map(|operation| (operation.name(), self.mounted.counters().get(*operation)))
            .collect()
    }

    fn ended(&self) -> Ended {
        self.runtime
            .block_on(async { tokio::time::timeout(DEADLINE, self.mounted.wait()).await.unwrap() })
    }

    fn is_visible(&self) -> bool {
        fuse::mounts()
            .unwrap()
            .iter()
            .any(|mount| mount.mount_point == self.point())
    }
}

/// Runs this very test again as an ordinary user; true in the process that is root.
fn left_to_an_ordinary_user(test: &str) -> bool {
    if !is_root() {
        return false;
    }
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    // Where this binary lies may be closed to others.
    let binary = dir.path().join("test");
    fs::copy(std::env::current_exe().unwrap(), &binary).unwrap();
    let scratch = dir.path().join("tmp");
    fs::create_dir(&scratch).unwrap();
    nix::unistd::chown(&scratch, Some(NOBODY.into()), Some(NOBODY.into())).unwrap();
    // In a mount namespace of its own, where /dev/fuse is open to everybody, as it is by default on
    // Linux; some containers and minimal systems leave it to root.
    let node = dir.path().join("fuse");
    let script = r#"mount --bind "$1" /dev/fuse && shift && exec "$@""#;
    nix::sys::stat::mknod(
        &node,
        nix::sys::stat::SFlag::S_IFCHR,
        nix::sys::stat::Mode::empty(),
        fs::metadata("/dev/fuse").unwrap().rdev(),
    )
    .unwrap();
    fs::set_permissions(&node, fs::Permissions::from_mode(0o666)).unwrap();
    let output = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c", script, "sh"])
        .arg(&node)
        .args([
            "setpriv",
            &format!("--reuid={NOBODY}"),
            &format!("--regid={NOBODY}"),
            "--clear-groups",
        ])
        .arg(&binary)
        .args([test, "--exact", "--nocapture", "--test-threads=1"])
        .env("TMPDIR", &scratch)
        .current_dir(&scratch)
        .output()
        .unwrap();
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    println!("{text}");
    assert!(
        output.status.success() && text.contains("1 passed"),
        "as an ordinary user: {text}"
    );
    true
}

fn has_fusermount() -> bool {
    let found = Command::new("fusermount3").arg("-V").output().is_ok();
    if !found {
        sandbox::skip("mounting with fusermount3", "it is not installed");
    }
    found
}

fn equals_the_source(mount: &Mount) {
    let native = inventory(&mount.source());
    for from in [From::Both, From::Hits, From::Misses] {
        mount.published.content.answer_from(from);
        assert_eq!(inventory(&mount.point()), native);
    }
    let diff = Command::new("diff")
        .args(["-r", "--no-dereference"])
        .args([mount.source(), mount.point()])
        .output()
        .unwrap();
    assert!(
        diff.status.success() && diff.stdout.is_empty(),
        "{}",
        String::from_utf8_lossy(&diff.stdout)
    );
    for entry in ["", "d", "d/small", "large"] {
        let meta = fs::metadata(mount.point().join(entry)).unwrap();
        assert_eq!((meta.uid(), meta.gid()), (me().uid, me().gid));
    }
}

fn everything_that_writes_is_refused(mount: &Mount) {
    let at = |name: &str| mount.point().join(name);
    let before = inventory(&mount.point());
    let refused = |what: &str, result: io::Result<()>| {
        let error = result.expect_err(what);
        assert_eq!(error.raw_os_error(), Some(libc::EROFS), "{what}: {error}");
    };
    let nix_refused =
        |what: &str, result: nix::Result<()>| assert_eq!(result, Err(nix::errno::Errno::EROFS), "{what}");
    refused("create", File::create(at("new")).map(drop));
    refused("create over", File::create(at("large")).map(drop));
    refused(
        "open to write",
        OpenOptions::new().write(true).open(at("large")).map(drop),
    );
    refused(
        "open to append",
        OpenOptions::new().append(true).open(at("one")).map(drop),
    );
    refused(
        "truncate",
        nix::unistd::truncate(&at("large"), 0).map_err(io::Error::from),
    );
    refused("mkdir", fs::create_dir(at("d/new")));
    refused("rmdir", fs::remove_dir(at("nothing in here")));
    refused("unlink", fs::remove_file(at("one")));
    refused("rename", fs::rename(at("one"), at("two")));
    refused("link", fs::hard_link(at("one"), at("two")));
    refused("symlink", symlink("one", at("two")));
    refused(
        "chmod",
        fs::set_permissions(at("one"), fs::Permissions::from_mode(0o777)),
    );
    let id = (me().uid.into(), me().gid.into());
    nix_refused("chown", nix::unistd::chown(&at("one"), Some(id.0), Some(id.1)));
    let fifo = nix::sys::stat::Mode::S_IRWXU;
    nix_refused("mkfifo", nix::unistd::mkfifo(&at("fifo"), fifo));
    let now = nix::sys::time::TimeSpec::UTIME_NOW;
    let flags = nix::sys::stat::UtimensatFlags::FollowSymlink;
    nix_refused(
        "utimes",
        nix::sys::stat::utimensat(nix::fcntl::AT_FDCWD, &at("one"), &now, &now, flags),
    );
    let (path, name) = (c_path(&at("one")), c"user.grid.key");
    // SAFETY: NUL-terminated strings and a value of the length given, all alive during the calls.
    let set = unsafe { libc::setxattr(path.as_ptr(), name.as_ptr(), b"x".as_ptr().cast(), 1, 0) };
    refused(
        "setxattr",
        if set == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        },
    );
    // SAFETY: as above.
    let removed = unsafe { libc::removexattr(path.as_ptr(), name.as_ptr()) };
    refused(
        "removexattr",
        if removed == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        },
    );
    nix_refused(
        "access",
        nix::unistd::access(&at("one"), nix::unistd::AccessFlags::W_OK),
    );
    assert_eq!(inventory(&mount.point()), before);
    assert_eq!(inventory(&mount.source()), before);
}

fn c_path(path: &Path) -> std::ffi::CString {
    std::ffi::CString::new(path.as_os_str().as_bytes()).unwrap()
}

fn getxattr(path: &Path, name: &str) -> io::Result<String> {
    let (path, name) = (c_path(path), std::ffi::CString::new(name).unwrap());
    let mut value = [0u8; 256];
    // SAFETY: two NUL-terminated strings and room of the length given, alive during the call.
    let len = unsafe {
        libc::getxattr(
            path.as_ptr(),
            name.as_ptr(),
            value.as_mut_ptr().cast(),
            value.len(),
        )
    };
    let len = usize::try_from(len).map_err(|_| io::Error::last_os_error())?;
    Ok(String::from_utf8_lossy(&value[..len]).into_owned())
}

fn mapped(file: &File) -> memmap2::Mmap {
    // SAFETY: files of the mount never change.
    unsafe { memmap2::Mmap::map(file) }.unwrap()
}

fn every_way_of_reading_agrees(mount: &Mount) {
    let native = fs::read(mount.source().join("large")).unwrap();
    let path = mount.point().join("large");
    for from in [From::Misses, From::Hits] {
        mount.published.content.answer_from(from);
        let file = File::open(&path).unwrap();
        assert_eq!(mapped(&file)[..], native[..]);
        drop(file);
        let direct = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECT)
            .open(&path)
            .unwrap();
        let mut aligned = vec![0u8; (3 << 20) + 4096];
        let start = aligned.as_ptr().align_offset(4096);
        for offset in [0u64, 4096, 1 << 20, 4 << 20] {
            let len = direct
                .read_at(&mut aligned[start..start + (3 << 20)], offset)
                .unwrap();
            let end = (offset as usize + (3 << 20)).min(native.len());
            assert_eq!(
                aligned[start..start + len],
                native[offset as usize..offset as usize + len]
            );
            assert_eq!(offset as usize + len, end);
        }
    }
    thread::scope(|scope| {
        for seed in 0..8u64 {
            let (native, path) = (&native, &path);
            scope.spawn(move || {
                for round in 0..50 {
                    let dice = support::noise(seed * 1000 + round, 16);
                    let number = |at: usize| u64::from_le_bytes(dice[at..at + 8].try_into().unwrap());
                    let offset = number(0) % (native.len() as u64 + 1000);
                    let mut buf = vec![0; (number(8) % 300_000) as usize];
                    let len = File::open(path).unwrap().read_at(&mut buf, offset).unwrap();
                    let from = (offset as usize).min(native.len());
                    let to = (from + buf.len()).min(native.len());
                    assert_eq!(buf[..len], native[from..to]);
                }
            });
        }
    });
}

fn the_whole_of_it(wish: IoModeWish, mode: IoMode, way: Way) {
    let mount = Mount::sample(wish);
    assert_eq!((mount.mounted.io_mode().mode, mount.mounted.way()), (mode, way));
    equals_the_source(&mount);
    every_way_of_reading_agrees(&mount);
    everything_that_writes_is_refused(&mount);
    let line = fuse::mounts()
        .unwrap()
        .into_iter()
        .find(|line| line.mount_point == mount.point())
        .unwrap();
    assert_eq!(
        (line.kind.as_str(), line.source.to_str()),
        ("fuse.grid-mount", Some(REFERENCE))
    );
    let own = format!("user_id={},group_id={}", me().uid, me().gid);
    assert!(
        line.options.starts_with("ro,") && line.options.contains(&own),
        "{}",
        line.options
    );
    let statistics = nix::sys::statvfs::statvfs(&mount.point()).unwrap();
    let expected = nix::sys::statvfs::FsFlags::ST_RDONLY
        | nix::sys::statvfs::FsFlags::ST_NOSUID
        | nix::sys::statvfs::FsFlags::ST_NODEV;
    assert!(statistics.flags().contains(expected), "{:?}", statistics.flags());
    let bytes: u64 = mount.published.fs(me()).totals().bytes;
    assert_eq!(
        statistics.blocks() * statistics.fragment_size(),
        bytes.next_multiple_of(4096)
    );
    assert_eq!(statistics.files(), inventory(&mount.source()).len() as u64);
    assert_eq!(
        getxattr(&mount.point().join("large"), "user.grid.reference").unwrap(),
        REFERENCE
    );
    assert_eq!(
        getxattr(&mount.point().join("large"), "user.grid.cached").unwrap(),
        "100%"
    );
    let none = getxattr(&mount.point().join("large"), "user.other").unwrap_err();
    assert_eq!(none.raw_os_error(), Some(libc::ENODATA));
    assert_eq!(mount.mounted.counters().failures(), 0);
    assert_eq!(mount.mounted.counters().get(Operation::Modify), 0);
    mount.mounted.unmount(false).unwrap();
    assert_eq!(mount.ended(), Ended::Unmounted);
    assert!(!mount.is_visible());
    assert_eq!(fs::read_dir(mount.point()).unwrap().count(), 0);
}

#[test]
fn as_root_without_opens() {
    if can_mount_as_root() {
        the_whole_of_it(IoModeWish::NoOpen, IoMode::NoOpen, Way::Kernel);
    }
}

#[test]
fn as_root_in_passthrough() {
    if can_mount_as_root() {
        the_whole_of_it(IoModeWish::Passthrough, IoMode::Passthrough, Way::Kernel);
    }
}

#[test]
fn as_an_ordinary_user_without_opens() {
    if can_mount() && has_fusermount() && !left_to_an_ordinary_user("as_an_ordinary_user_without_opens") {
        the_whole_of_it(IoModeWish::Auto, IoMode::NoOpen, Way::Fusermount);
    }
}

#[test]
fn as_an_ordinary_user_who_asks_for_passthrough() {
    if can_mount()
        && has_fusermount()
        && !left_to_an_ordinary_user("as_an_ordinary_user_who_asks_for_passthrough")
    {
        the_whole_of_it(IoModeWish::Passthrough, IoMode::KeepCache, Way::Fusermount);
    }
}

#[test]
fn a_second_look_asks_nothing() {
    if !can_mount_as_root() {
        return;
    }
    let mount = Mount::sample(IoModeWish::NoOpen);
    let find = || {
        let output = Command::new("find")
            .arg(mount.point())
            .arg("-ls")
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8_lossy(&output.stdout).lines().count()
    };
    let entries = find();
    assert_eq!(entries, inventory(&mount.source()).len());
    for absent in ["nothing", "d/nothing"] {
        assert_eq!(
            fs::metadata(mount.point().join(absent)).unwrap_err().kind(),
            io::ErrorKind::NotFound
        );
    }
    fs::read(mount.point().join("large")).unwrap();
    fs::read(mount.point().join("link")).unwrap();
    let before = mount.requests();
    assert_eq!(find(), entries);
    for absent in ["nothing", "d/nothing"] {
        assert_eq!(
            fs::metadata(mount.point().join(absent)).unwrap_err().kind(),
            io::ErrorKind::NotFound
        );
    }
    fs::read(mount.point().join("large")).unwrap();
    fs::read(mount.point().join("link")).unwrap();
    assert_eq!(mount.requests(), before);
}

#[test]
fn a_directory_of_fifty_thousand_lists_whole() {
    if !can_mount_as_root() {
        return;
    }
    const MANY: u32 = 50_000;
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().join("store");
    fs::create_dir(&store).unwrap();
    File::create(store.join("object-0"))
        .unwrap()
        .set_len(MANY.into())
        .unwrap();
    let mut builder = TreeBuilder::new(&store, 64 << 20).unwrap();
    let object = Object {
        key: "k".into(),
        size: MANY.into(),
        pin: grid_mount::origin::Pin::Content,
        digest: None,
    };
    let object = builder.add_object(object, None).unwrap();
    for number in 0..MANY {
        let content = Some(tree::Content {
            object,
            offset: number.into(),
        });
        let name = format!("many/file-{number:06}");
        builder
            .add_file(name.as_bytes(), 0o644, Timestamp::default(), 1, content, None)
            .unwrap();
    }
    let published = Published::finish(builder, &store);
    let mount = Mount::of(dir, published, |_| {});
    for with_attributes in [false, true] {
        let mut names: Vec<_> = fs::read_dir(mount.point().join("many"))
            .unwrap()
            .map(|entry| {
                let entry = entry.unwrap();
                if with_attributes {
                    assert_eq!(entry.metadata().unwrap().len(), 1);
                }
                entry.file_name().into_string().unwrap()
            })
            .collect();
        names.sort_unstable();
        assert_eq!(names.len(), MANY as usize);
        assert!(
            names
                .iter()
                .enumerate()
                .all(|(number, name)| *name == format!("file-{number:06}"))
        );
    }
}

#[test]
fn what_is_in_use_stays_and_says_who() {
    if !can_mount_as_root() {
        return;
    }
    let mount = Mount::sample(IoModeWish::Auto);
    let mut held = File::open(mount.point().join("d/small")).unwrap();
    let error = mount.mounted.unmount(false).unwrap_err();
    let UnmountError::Busy { holders, .. } = &error else {
        panic!("{error}")
    };
    assert_eq!(holders.len(), 1, "{error}");
    assert_eq!(holders[0].pid, std::process::id());
    assert!(error.to_string().contains("d/small"), "{error}");
    let map = mapped(&held);
    let mut bytes = vec![];
    held.read_to_end(&mut bytes).unwrap();
    drop(held);
    let error = mount.mounted.unmount(false).unwrap_err();
    assert!(error.to_string().contains("mapped"), "{error}");
    // Lazily it goes at once, and the mapping goes on.
    mount.mounted.unmount(true).unwrap();
    assert!(!mount.is_visible());
    assert!(!mount.mounted.has_ended());
    assert_eq!(map[..], bytes[..]);
    drop(map);
    assert_eq!(mount.ended(), Ended::Unmounted);
    // There is nothing left to unmount, which is fine.
    mount.mounted.unmount(false).unwrap();
}

#[test]
fn an_unmount_by_somebody_else_ends_the_session() {
    if !can_mount_as_root() {
        return;
    }
    let mount = Mount::sample(IoModeWish::Auto);
    assert!(
        Command::new("umount")
            .arg(mount.point())
            .status()
            .unwrap()
            .success()
    );
    assert_eq!(mount.ended(), Ended::Unmounted);
}

#[test]
fn a_mount_goes_with_its_owner() {
    if !can_mount_as_root() {
        return;
    }
    let Mount { mounted, dir, .. } = Mount::sample(IoModeWish::Auto);
    let point = dir.path().join("mnt");
    assert!(fs::read_dir(&point).unwrap().count() > 0);
    drop(mounted);
    assert_eq!(fs::read_dir(&point).unwrap().count(), 0);
}

#[test]
fn a_read_that_fails_is_eio_and_is_remembered() {
    if !can_mount_as_root() {
        return;
    }
    for wish in [IoModeWish::NoOpen, IoModeWish::Passthrough] {
        let mount = Mount::sample(wish);
        mount
            .published
            .content
            .seals
            .store(false, std::sync::atomic::Ordering::Relaxed);
        mount.published.content.answer_from(From::Nowhere);
        let error = fs::read(mount.point().join("d/small")).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EIO));
        let failures = mount.mounted.counters().recent_failures();
        assert!(
            failures
                .iter()
                .all(|text| text.contains("d/small: the test says so")),
            "{failures:?}"
        );
        assert!(!failures.is_empty());
        // Nothing of the failure is kept.
        mount.published.content.answer_from(From::Both);
        assert_eq!(
            fs::read(mount.point().join("d/small")).unwrap(),
            fs::read(mount.source().join("d/small")).unwrap()
        );
    }
}

#[test]
fn passthrough_asks_nothing_and_switches_only_when_closed() {
    if !can_mount_as_root() {
        return;
    }
    use std::sync::atomic::Ordering::Relaxed;
    let mount = Mount::sample(IoModeWish::Passthrough);
    let (path, native) = (
        mount.point().join("large"),
        fs::read(mount.source().join("large")).unwrap(),
    );
    let reads = || {
        let counters = mount.mounted.counters();
        counters.get(Operation::ReadHit) + counters.get(Operation::ReadMiss)
    };
    // Complete: read by the kernel itself, however often it is opened.
    let first = File::open(&path).unwrap();
    assert_eq!(fs::read(&path).unwrap(), native);
    assert_eq!(reads(), 0);
    // No longer to be had (evicted, say), but open: every further open goes the same way.
    mount.published.content.seals.store(false, Relaxed);
    assert_eq!(fs::read(&path).unwrap(), native);
    assert_eq!(reads(), 0);
    // A mapping is of the backing file itself: it outlives the close, and holds nothing open here.
    let map = mapped(&first);
    drop(first);
    assert_eq!((reads(), map[..] == native[..]), (0, true));
    // Closed, once the kernel has told so: from here through the page cache, even when it is complete again.
    let released = std::time::Instant::now();
    while mount.mounted.counters().get(Operation::Release) < mount.mounted.counters().get(Operation::Open) {
        assert!(released.elapsed() < DEADLINE);
        thread::yield_now();
    }
    let cached = File::open(&path).unwrap();
    let mut bytes = vec![];
    (&cached).read_to_end(&mut bytes).unwrap();
    assert!(bytes == native && reads() > 0);
    mount.published.content.seals.store(true, Relaxed);
    assert_eq!(fs::read(&path).unwrap(), native);
    drop(cached);
    assert!(map[..] == native[..]);
}

#[test]
fn passthrough_survives_many_openers_while_files_come_and_go() {
    if !can_mount_as_root() {
        return;
    }
    use std::sync::atomic::Ordering::Relaxed;
    let mount = Mount::sample(IoModeWish::Passthrough);
    let files = ["large", "d/at", "d/e/block", "d/e/f/more"].map(|name| {
        (
            mount.point().join(name),
            fs::read(mount.source().join(name)).unwrap(),
        )
    });
    thread::scope(|scope| {
        for reader in 0..8usize {
            let (files, content) = (&files, &mount.published.content);
            scope.spawn(move || {
                let mut maps = vec![];
                for round in 0..150 {
                    let (path, native) = &files[(reader + round) % files.len()];
                    content.seals.store(round % 3 != 0, Relaxed);
                    let file = File::open(path).unwrap();
                    if round % 2 == 0 {
                        maps.push((mapped(&file), native));
                    }
                    let mut tail = vec![0; 1000];
                    file.read_exact_at(&mut tail, native.len() as u64 - 1000).unwrap();
                    assert_eq!(tail, native[native.len() - 1000..]);
                    drop(file);
                    if maps.len() > 5 {
                        let (map, native) = maps.remove(0);
                        assert_eq!(map[map.len() / 2..], native[map.len() / 2..]);
                    }
                }
            });
        }
    });
    assert_eq!(mount.mounted.counters().failures(), 0);
    mount.mounted.unmount(false).unwrap();
}

#[test]
fn a_mount_point_that_will_not_do_is_refused_before_anything_happens() {
    if !can_mount() {
        return;
    }
    let mount = Mount::sample(IoModeWish::Auto);
    let other = |path: PathBuf| {
        let options = MountOptions::new(path, REFERENCE, me());
        fuse::mount(mount.published.fs(me()), options, mount.runtime.handle())
            .map(drop)
            .unwrap_err()
    };
    assert!(matches!(
        other(mount.dir.path().join("absent")),
        MountError::NoMountPoint { .. }
    ));
    assert!(matches!(
        other(mount.source().join("one")),
        MountError::NotADirectory { .. }
    ));
    assert!(matches!(other(mount.source()), MountError::NotEmpty { .. }));
    assert!(matches!(other(mount.point()), MountError::NotEmpty { .. }));
}

#[test]
fn an_ordinary_user_is_told_why_not() {
    let test = "an_ordinary_user_is_told_why_not";
    if !can_mount() || !has_fusermount() || left_to_an_ordinary_user(test) {
        return;
    }
    let mount = Mount::sample(IoModeWish::Auto);
    let refusal = |point: &Path, share| {
        let mut options = MountOptions::new(point, REFERENCE, me());
        options.share = share;
        fuse::mount(mount.published.fs(me()), options, mount.runtime.handle())
            .map(drop)
            .unwrap_err()
    };
    if me().uid == NOBODY {
        // Not a directory of this user's.
        let foreign = fs::read_dir("/mnt").is_ok_and(|mut entries| entries.next().is_none());
        if foreign {
            let error = refusal(Path::new("/mnt"), false);
            assert!(matches!(error, MountError::NotOwned { .. }), "{error}");
        }
    }
    let empty = mount.dir.path().join("empty");
    fs::create_dir(&empty).unwrap();
    let conf = fs::read_to_string("/etc/fuse.conf").unwrap_or_default();
    if !conf.lines().any(|line| line.trim() == "user_allow_other") {
        let error = refusal(&empty, true);
        assert!(matches!(error, MountError::ShareNotAllowed), "{error}");
    }
    // In use, and by whom.
    let held = File::open(mount.point().join("one")).unwrap();
    let error = mount.mounted.unmount(false).unwrap_err();
    assert!(
        matches!(&error, UnmountError::Busy { holders, .. } if holders.len() == 1),
        "{error}"
    );
    drop(held);
    assert_eq!(fs::read_dir(&empty).unwrap().count(), 0);
}

#[test]
fn a_mount_is_its_owners_alone_unless_it_is_shared() {
    if !can_mount_as_root() {
        return;
    }
    for share in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        for name in ["source", "store"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        sample(&dir.path().join("source"));
        let published = Published::new(&dir.path().join("source"), &dir.path().join("store"));
        let mount = Mount::of(dir, published, |options| {
            options.owner = Owner {
                uid: NOBODY,
                gid: NOBODY,
            };
            options.share = share;
        });
        let cat = |uid: u32, name: &str| {
            let path = mount.point().join(name);
            Command::new("cat")
                .arg(path)
                .uid(uid)
                .gid(uid)
                .output()
                .unwrap()
                .status
                .success()
        };
        assert!(cat(NOBODY, "d/e/block"));
        // Nobody else, not even root; unless it is shared, and then as the modes say.
        assert_eq!(cat(NOBODY - 1, "d/e/block"), share);
        assert_eq!(fs::read(mount.point().join("d/e/block")).is_ok(), share);
        assert!(cat(NOBODY, "d/small"));
        assert!(!cat(NOBODY - 1, "d/small"));
    }
}
