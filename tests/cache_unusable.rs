//! A cache directory that cannot be used – from the start, or from some moment on – and one whose files were
//! tampered with: readers see the right bytes, and `status` says what is wrong.

#[path = "support/sandbox.rs"]
mod sandbox;

use std::{
    fs,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use sandbox::{Sandbox, skip, told};

const DEADLINE: Duration = Duration::from_secs(60);

fn sandboxes() -> impl Iterator<Item = Sandbox> {
    if !Path::new("/dev/fuse").exists() {
        skip("a cache that cannot be used", "there is no /dev/fuse");
        return [None, None].into_iter().flatten();
    }
    [Some(Sandbox::new()), Sandbox::ordinary()].into_iter().flatten()
}

/// A large file, some small ones and a directory; `seed` makes them differ.
fn published(sandbox: &Sandbox, name: &str, seed: u64) -> PathBuf {
    let source = sandbox.path(&format!("source-{name}"));
    fs::create_dir_all(source.join("dir")).unwrap();
    let mut rng = StdRng::seed_from_u64(seed);
    let mut write = |path: &str, len: usize| {
        let bytes: Vec<u8> = (0..len).map(|_| rng.random()).collect();
        fs::write(source.join(path), bytes).unwrap();
    };
    write("large", 9 << 20);
    (0..20).for_each(|n| write(&format!("dir/{n}"), 1000 * n));
    sandbox.ok(&["publish", source.to_str().unwrap(), name]);
    source
}

/// As the sandbox's user: nobody else may look into the mount.
fn same(sandbox: &Sandbox, source: &Path, mount: &Path) {
    let output = sandbox
        .program("diff")
        .arg("-r")
        .args([source, mount])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", told(&output));
}

fn degraded(sandbox: &Sandbox) -> Option<String> {
    sandbox.status()["agent"]["cache_degraded"]
        .as_str()
        .map(str::to_owned)
}

/// Unmounts everything, and waits until the agent and its keeper have gone.
fn run_ends(sandbox: &Sandbox) {
    let agent = sandbox.agent_pid().unwrap();
    let keeper = sandbox::parent(agent).unwrap();
    sandbox.ok(&["unmount", "--all"]);
    let begun = Instant::now();
    while [agent, keeper]
        .iter()
        .any(|pid| kill(Pid::from_raw(*pid), None).is_ok())
    {
        assert!(begun.elapsed() < DEADLINE, "the agent stays");
        std::thread::yield_now();
    }
}

fn drop_pages(mount: &Path) {
    for path in ["large", "dir/19"] {
        let file = fs::File::open(mount.join(path)).unwrap();
        let advice = nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED;
        nix::fcntl::posix_fadvise(&file, 0, 0, advice).unwrap();
    }
}

#[test]
fn from_the_start() {
    for sandbox in sandboxes() {
        let source = published(&sandbox, "data", 1);
        // In the cache's place lies a file.
        let cache = sandbox.path("cache/grid");
        let _ = fs::remove_dir_all(&cache);
        fs::write(&cache, "").unwrap();
        let point = sandbox.path("mnt/point");
        sandbox.ok(&["data", point.to_str().unwrap()]);
        let cause = degraded(&sandbox).unwrap();
        assert!(cause.contains(cache.to_str().unwrap()), "{cause}");
        same(&sandbox, &source, &point);
        // The next agent is no better off.
        let first = sandbox.agent_pid().unwrap();
        kill(Pid::from_raw(first), Signal::SIGKILL).unwrap();
        // What the kernel keeps would be read without any.
        let begun = Instant::now();
        while sandbox.agent_pid().is_none_or(|pid| pid == first) {
            assert!(begun.elapsed() < DEADLINE, "no agent again");
            std::thread::yield_now();
        }
        same(&sandbox, &source, &point);
        let told = sandbox.ok(&["cache", "status"]);
        assert!(told.contains(&cause), "{told}");
        run_ends(&sandbox);
        // Said once by each.
        let log = fs::read_to_string(sandbox.path("run/grid-mount/agent.log")).unwrap();
        assert_eq!(log.matches("the cache is not storing").count(), 2, "{log}");
        let left: Vec<_> = walkdir::WalkDir::new(sandbox.path("tmp"))
            .min_depth(1)
            .into_iter()
            .collect();
        assert!(left.is_empty(), "{left:?}");
        assert_eq!(fs::read(&cache).unwrap(), b"");
    }
}

#[test]
fn vanished_under_way() {
    for sandbox in sandboxes() {
        let one = published(&sandbox, "one", 1);
        let other = published(&sandbox, "other", 2);
        let point = |name: &str| sandbox.path("mnt").join(name);
        let mount = |data: &str, at: &str| sandbox.ok(&[data, point(at).to_str().unwrap()]);
        mount("one", "first");
        same(&sandbox, &one, &point("first"));
        fs::remove_dir_all(sandbox.path("cache/grid")).unwrap();
        // A version that is in use, and one that has to be fetched.
        mount("one", "again");
        mount("other", "other");
        same(&sandbox, &one, &point("first"));
        same(&sandbox, &one, &point("again"));
        same(&sandbox, &other, &point("other"));
        assert!(degraded(&sandbox).is_some());
        run_ends(&sandbox);
        assert!(sandbox.mounts().is_empty());
        let left: Vec<_> = walkdir::WalkDir::new(sandbox.path("tmp"))
            .min_depth(1)
            .into_iter()
            .collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

/// A tmpfs on a directory until it is dropped.
struct Disk(PathBuf);

impl Disk {
    fn over(dir: PathBuf, flags: MsFlags) -> nix::Result<Self> {
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | flags;
        mount(Some("tmpfs"), &dir, Some("tmpfs"), flags, Some("size=64m"))?;
        Ok(Self(dir))
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

#[test]
fn read_only_for_a_while() {
    let sandbox = Sandbox::new();
    let one = published(&sandbox, "one", 1);
    let other = published(&sandbox, "other", 2);
    let point = |name: &str| sandbox.path("mnt").join(name);
    let mount = |data: &str, at: &str| sandbox.ok(&[data, point(at).to_str().unwrap()]);
    mount("one", "one");
    same(&sandbox, &one, &point("one"));
    // What is open stays so, as on a disk that the kernel makes read-only under us.
    let over = |sub: &str| Disk::over(sandbox.path("cache/grid").join(sub), MsFlags::MS_RDONLY);
    let disks = match (over("objects"), over("trees")) {
        (Ok(objects), Ok(trees)) => [objects, trees],
        (Err(error), _) | (_, Err(error)) => {
            return skip(
                "a read-only cache directory",
                &format!("no tmpfs can be mounted: {error}"),
            );
        }
    };
    mount("other", "other");
    same(&sandbox, &other, &point("other"));
    drop_pages(&point("one"));
    same(&sandbox, &one, &point("one"));
    let cause = degraded(&sandbox).unwrap();
    assert!(cause.contains("Read-only"), "{cause}");
    drop(disks);
    // What is fetched from now on is kept again, once the cache has rested.
    let begun = Instant::now();
    for seed in 3.. {
        let name = format!("data{seed}");
        let source = published(&sandbox, &name, seed);
        mount(&name, &name);
        same(&sandbox, &source, &point(&name));
        if degraded(&sandbox).is_none() {
            break;
        }
        assert!(
            begun.elapsed() < DEADLINE,
            "the cache stays degraded: {:?}",
            degraded(&sandbox)
        );
    }
    run_ends(&sandbox);
    // From the start, too.
    let _disk = Disk::over(sandbox.path("cache/grid"), MsFlags::MS_RDONLY).unwrap();
    mount("one", "one");
    same(&sandbox, &one, &point("one"));
    let cause = degraded(&sandbox).unwrap();
    assert!(cause.contains("Read-only"), "{cause}");
    sandbox.ok(&["unmount", "--all"]);
}

fn cache_files(dir: &Path) -> Vec<PathBuf> {
    walkdir::WalkDir::new(dir)
        .sort_by_file_name()
        .into_iter()
        .map(|entry| entry.unwrap())
        // With both copies of the epochs damaged a cache starts empty, and nothing would be tried.
        .filter(|entry| {
            entry.file_type().is_file() && !["lock", "epochs.b"].iter().any(|name| entry.file_name() == *name)
        })
        .map(|entry| entry.into_path())
        .collect()
}

#[test]
fn a_byte_of_every_file_flipped_between_two_runs_is_never_seen() {
    for sandbox in sandboxes() {
        let sandbox = sandbox.env("GRID_MOUNT_CACHE_VERIFY", "always");
        let source = published(&sandbox, "data", 3);
        let point = sandbox.path("mnt/point");
        let mut rng = StdRng::seed_from_u64(7);
        let mut kinds = 0;
        for mode in ["passthrough", "no-open", "passthrough", "no-open"] {
            for round in 0..3 {
                sandbox.ok(&["data", point.to_str().unwrap(), "--io-mode", mode]);
                same(&sandbox, &source, &point);
                // Once more: what is complete by now may be sealed.
                same(&sandbox, &source, &point);
                run_ends(&sandbox);
                let files = cache_files(&sandbox.path("cache/grid"));
                for path in &files {
                    let file = fs::File::options().read(true).write(true).open(path);
                    let file = file.or_else(|_| fs::File::open(path)).unwrap();
                    let len = file.metadata().unwrap().len();
                    // Whole trees would be fetched each time: every other round.
                    let tree = path.parent().unwrap().ends_with("trees");
                    if len == 0 || (tree && round == 1) {
                        continue;
                    }
                    let mut byte = [0];
                    let at = rng.random_range(0..len);
                    file.read_exact_at(&mut byte, at).unwrap();
                    file.write_all_at(&[byte[0] ^ rng.random_range(1..=255u8)], at)
                        .unwrap();
                    kinds |= if tree { 1 } else { 2 };
                }
            }
        }
        assert_eq!(kinds, 3, "a tree and data were there to be damaged");
    }
}
