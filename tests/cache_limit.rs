//! The limit of a cache under a whole mount – readers, readahead and a warm-up – as the file system sees it.

#[path = "support/sandbox.rs"]
mod sandbox;

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use nix::{sys::signal::kill, unistd::Pid};
use sandbox::{Sandbox, skip};

const MIB: u64 = 1 << 20;
const LIMIT: u64 = 24 * MIB;
const FILE: u64 = 20 * MIB;
const FILES: u64 = 4;
/// Threads that write to the cache, an extent each.
const OVER: u64 = 2 * 8 * MIB;

fn noise(seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; FILE as usize];
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    hasher.finalize_xof().fill(&mut bytes);
    bytes
}

/// Blocks allocated to what lies in the cache directory, whatever it is.
fn allocated(cache: &Path) -> u64 {
    walkdir::WalkDir::new(cache)
        .into_iter()
        .filter_map(|entry| entry.ok()?.metadata().ok())
        .filter(|metadata| metadata.is_file())
        .map(|metadata| metadata.blocks() * 512)
        .sum()
}

#[test]
fn it_holds_under_load_and_a_smaller_one_shrinks_the_cache() {
    if !Path::new("/dev/fuse").exists() {
        return skip("a cache's limit", "there is no /dev/fuse");
    }
    let sandbox = Sandbox::new().env("GRID_MOUNT_CACHE_SIZE", &LIMIT.to_string());
    let source = sandbox.path("source");
    fs::create_dir(&source).unwrap();
    for n in 0..FILES {
        fs::write(source.join(n.to_string()), noise(n)).unwrap();
    }
    sandbox.ok(&["publish", source.to_str().unwrap(), "data"]);
    let point = sandbox.path("mnt/point");
    let mount = |sandbox: &Sandbox| {
        // Each is read again and again, so the kernel is not to keep what it has read.
        let mode = ["--io-mode", "no-open"];
        sandbox.ok(&[&["data", point.to_str().unwrap()], &mode[..]].concat());
    };
    mount(&sandbox);
    let cache = sandbox.path("cache/grid");
    let done = AtomicBool::new(false);
    let most = thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let mut most = 0;
            while !done.load(Ordering::Relaxed) {
                most = most.max(allocated(&cache));
                thread::sleep(Duration::from_millis(1));
            }
            most
        });
        let readers: Vec<_> = (0..FILES)
            .map(|reader| {
                let point = &point;
                scope.spawn(move || {
                    for round in 0..3 {
                        let n = (reader + round) % FILES;
                        let path = point.join(n.to_string());
                        assert!(fs::read(&path).unwrap() == noise(n), "{n} is wrong");
                        let file = fs::File::open(path).unwrap();
                        let advice = nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED;
                        nix::fcntl::posix_fadvise(&file, 0, 0, advice).unwrap();
                    }
                })
            })
            .collect();
        // Whether it finds what it brought afterwards is not for this test.
        let warm = sandbox
            .grid(&["warm", "data", "--include", "1"])
            .output()
            .unwrap();
        let readers: Vec<_> = readers.into_iter().map(thread::ScopedJoinHandle::join).collect();
        done.store(true, Ordering::Relaxed);
        assert!(readers.iter().all(Result::is_ok), "{}", sandbox::told(&warm));
        watcher.join().unwrap()
    });
    println!("at most {most} of {LIMIT} bytes");
    assert!(most <= LIMIT + OVER, "{most} bytes allocated, {LIMIT} allowed");
    assert!(most >= LIMIT / 2, "the cache was hardly used: {most}");

    let agent = sandbox.agent_pid().unwrap();
    let begun = Instant::now();
    let waits = |what: &str| {
        assert!(begun.elapsed() < Duration::from_secs(60), "{what}");
        thread::sleep(Duration::from_millis(2));
    };
    sandbox.ok(&["unmount", "--all"]);
    while kill(Pid::from_raw(agent), None).is_ok() {
        waits("the agent stays");
    }
    let left = allocated(&cache);
    let smaller = LIMIT / 3;
    assert!(left > smaller, "{left} left");
    let sandbox = sandbox.env("GRID_MOUNT_CACHE_SIZE", &smaller.to_string());
    mount(&sandbox);
    // Nobody reads: it shrinks by itself.
    while allocated(&cache) > smaller {
        waits("the cache stays larger than its limit");
    }
    sandbox.ok(&["unmount", "--all"]);
}
