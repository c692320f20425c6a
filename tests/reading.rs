//! Reading through real mounts, with the origin's requests and bytes counted at the origin: little is
//! fetched for little, what was fetched is not fetched again, and under pressure every byte is right.

#[path = "support/s3_origin.rs"]
mod s3_origin;
#[path = "support/sandbox.rs"]
mod sandbox;

use std::{
    fs::{self, File, OpenOptions},
    io::Read,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
    sync::atomic::{
        AtomicU64,
        Ordering::{Relaxed, SeqCst},
    },
};

use s3_origin::{S3Origin, Shape};
use sandbox::{Sandbox, skip};

const MIB: u64 = 1 << 20;

fn fuse_is_here(what: &str) -> bool {
    let here = Path::new("/dev/fuse").exists();
    if !here {
        skip(what, "there is no /dev/fuse");
    }
    here
}

/// The origin, served by threads of its own.
struct Origin {
    s3: S3Origin,
    _runtime: tokio::runtime::Runtime,
}

impl Origin {
    fn start(shape: Shape) -> Self {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let s3 = runtime.block_on(S3Origin::start(shape));
        Self {
            s3,
            _runtime: runtime,
        }
    }

    /// A sandbox that knows the origin, with a catalog of its own beside it.
    fn sandbox(&self) -> Sandbox {
        let sandbox = self
            .s3
            .settings()
            .iter()
            .fold(Sandbox::new(), |sandbox, (name, value)| sandbox.env(name, value));
        let catalog = format!("file://{}", sandbox.path("data/catalog").display());
        sandbox.env("GRID_MOUNT_CATALOG", &catalog)
    }

    /// Bytes sent and objects asked for so far.
    fn sent(&self) -> (u64, u64) {
        let counts = self.s3.counts();
        (counts.body_bytes.load(Relaxed), counts.gets.load(Relaxed))
    }
}

/// Unmounts and waits for the agent to end: afterwards nothing more is fetched.
fn unmount_all(sandbox: &Sandbox) {
    let agent = sandbox.agent_pid();
    sandbox.ok(&["unmount", "--all"]);
    if let Some(pid) = agent {
        wait_for_the_end(pid);
    }
}

fn wait_for_the_end(pid: i32) {
    for _ in 0..800 {
        if nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), None).is_err() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(25));
    }
    panic!("process {pid} does not end");
}

/// Bytes that tell where they are: every eight say their own offset, and which file.
fn tell_tale(file: u64, range: std::ops::Range<u64>) -> Vec<u8> {
    let words = range.start / 8..range.end.div_ceil(8);
    let bytes: Vec<u8> = words
        .flat_map(|word| (word ^ (file + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15)).to_le_bytes())
        .collect();
    let skipped = (range.start % 8) as usize;
    bytes[skipped..skipped + (range.end - range.start) as usize].to_vec()
}

#[test]
fn one_byte_of_a_gibibyte_fetches_a_few_mebibytes() {
    if !fuse_is_here("reading one byte") {
        return;
    }
    let origin = Origin::start(Shape::default());
    let sandbox = origin.sandbox();
    // Zero pages: nothing is allocated for them until they are written to.
    origin.s3.put("data/big", vec![0; 1 << 30]);
    sandbox.ok(&["register", "s3://bucket/data", "big"]);
    let point = sandbox.path("mnt/point");
    for (at, most) in [(0, 4), (700 * MIB + 12_345, 4), ((1 << 30) - 1, 4)] {
        // A new host each time, so that nothing is in a cache.
        let _ = fs::remove_dir_all(sandbox.path("cache/grid"));
        let before = origin.sent();
        sandbox.ok(&["big", point.to_str().unwrap()]);
        let mut byte = [1];
        File::open(point.join("big"))
            .unwrap()
            .read_exact_at(&mut byte, at)
            .unwrap();
        assert_eq!(byte, [0]);
        // Also what was still being fetched ahead is counted.
        unmount_all(&sandbox);
        let after = origin.sent();
        let (bytes, gets) = (after.0 - before.0, after.1 - before.1);
        println!("byte {at}: {bytes} bytes in {gets} requests");
        assert!(
            bytes > 0 && bytes <= most * MIB,
            "{bytes} bytes were fetched for the byte at {at}"
        );
        assert!(gets <= 8, "{gets} requests were made for the byte at {at}");
    }
}

#[test]
fn one_byte_of_a_published_gibibyte_fetches_a_few_mebibytes() {
    if !fuse_is_here("reading one byte of published data") {
        return;
    }
    let origin = Origin::start(Shape::default());
    let sandbox = origin.sandbox().env("GRID_MOUNT_CATALOG", "s3://bucket/team");
    let source = sandbox.path("source");
    fs::create_dir(&source).unwrap();
    let big = File::create(source.join("big")).unwrap();
    big.set_len(1 << 30).unwrap();
    big.write_all_at(b"x", 700 * MIB).unwrap();
    sandbox.ok(&["publish", source.to_str().unwrap(), "big"]);
    let point = sandbox.path("mnt/point");
    let before = origin.sent();
    sandbox.ok(&["big", point.to_str().unwrap()]);
    let mut byte = [0];
    File::open(point.join("big"))
        .unwrap()
        .read_exact_at(&mut byte, 700 * MIB)
        .unwrap();
    assert_eq!(&byte, b"x");
    unmount_all(&sandbox);
    let after = origin.sent();
    // The record, the tree and the sums are in here too.
    let (bytes, gets) = (after.0 - before.0, after.1 - before.1);
    println!("{bytes} bytes in {gets} requests");
    assert!(bytes <= 4 * MIB, "{bytes} bytes were fetched for one");
}

#[test]
fn what_a_killed_agent_had_fetched_is_not_fetched_again() {
    const SIZE: u64 = 64 * MIB;
    if !fuse_is_here("killing an agent") {
        return;
    }
    let origin = Origin::start(Shape::default());
    // So that it is killed in the middle, however slow the machine.
    origin.s3.withhold(Some(40 * MIB));
    let sandbox = origin.sandbox().env("GRID_MOUNT_CONNECTIONS", "4");
    origin.s3.put("data/big", tell_tale(0, 0..SIZE));
    sandbox.ok(&["register", "s3://bucket/data", "big"]);
    let point = sandbox.path("mnt/point");
    sandbox.ok(&["big", point.to_str().unwrap()]);
    let pid = sandbox.agent_pid().unwrap();

    let read = AtomicU64::new(0);
    let done = std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut file = File::open(point.join("big")).unwrap();
            let mut piece = vec![0; MIB as usize];
            while let Ok(length @ 1..) = file.read(&mut piece) {
                let at = read.load(SeqCst);
                assert_eq!(piece[..length], tell_tale(0, at..at + length as u64), "at {at}");
                read.store(at + length as u64, SeqCst);
            }
        });
        while read.load(SeqCst) < 24 * MIB && !reader.is_finished() {
            std::thread::yield_now();
        }
        let done = read.load(SeqCst);
        let keeper = sandbox::parent(pid).unwrap();
        for pid in [keeper, pid] {
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL)
                .unwrap();
        }
        wait_for_the_end(pid);
        let _ = nix::mount::umount2(&point, nix::mount::MntFlags::MNT_DETACH);
        done
    });
    let sent = origin.sent().0;
    assert!(
        done >= 24 * MIB,
        "the agent was not killed in the middle, but after {sent} bytes"
    );

    // The same host, a new agent: what the reader had, and was written to the cache behind its back, is there.
    origin.s3.withhold(None);
    let ranges = origin.s3.ranges().len();
    sandbox.ok(&["big", point.to_str().unwrap()]);
    assert!(
        fs::read(point.join("big")).unwrap() == tell_tale(0, 0..SIZE),
        "bytes differ"
    );
    unmount_all(&sandbox);
    let again = origin.sent().0 - sent;
    println!("read {done}, sent {sent} before the kill and {again} after it, of {SIZE}");
    // A block is written to the cache a moment after its reader has it.
    let slack = 8 * MIB;
    assert!(
        again <= SIZE - done + slack,
        "{again} bytes were fetched again after {done} had been read"
    );
    let early: u64 = origin.s3.ranges()[ranges..]
        .iter()
        .map(|(_, start, length)| (start + length).min(done - slack).saturating_sub(*start))
        .sum();
    assert!(
        early <= MIB,
        "{early} bytes of what had been read long before were fetched again"
    );

    // And a third time, nothing at all.
    let before = origin.sent();
    sandbox.ok(&["big", point.to_str().unwrap()]);
    assert!(
        fs::read(point.join("big")).unwrap() == tell_tale(0, 0..SIZE),
        "bytes differ"
    );
    unmount_all(&sandbox);
    assert_eq!(origin.sent(), before);
}

#[test]
fn ten_thousand_random_reads_agree_with_a_cache_far_too_small() {
    const FILES: u64 = 24;
    const READS: u64 = 10_000;
    const THREADS: u64 = 32;
    const CACHE: u64 = 16 * MIB;
    // What arrived last is also held in memory: a quarter of this.
    const MEMORY: u64 = 16 * MIB;
    if !fuse_is_here("random reads") {
        return;
    }
    let origin = Origin::start(Shape::default());
    let sandbox = origin
        .sandbox()
        .env("GRID_MOUNT_CACHE_SIZE", &CACHE.to_string())
        .env("GRID_MOUNT_MEMORY_LIMIT", &MEMORY.to_string());
    // From one byte to 20 MiB, 128 MiB together, none of a round size.
    let sizes: Vec<u64> = (0..FILES)
        .map(|file| 1 + file * file * file * 1733 + file * 77)
        .collect();
    let data: u64 = sizes.iter().sum();
    for (file, size) in sizes.iter().enumerate() {
        origin.s3.put(
            &format!("data/d{}/{file}", file % 3),
            tell_tale(file as u64, 0..*size),
        );
    }
    sandbox.ok(&["register", "s3://bucket/data", "many"]);
    let point = sandbox.path("mnt/point");
    // In passthrough, O_DIRECT goes to the cache's own file system, whose alignment it then needs.
    sandbox.ok(&["many", point.to_str().unwrap(), "--io-mode", "no-open"]);

    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (point, sizes) = (&point, &sizes);
            scope.spawn(move || {
                // Half of the threads leave the kernel's own cache out.
                let flags = if thread % 2 == 0 { libc::O_DIRECT } else { 0 };
                let mut random = Random(thread + 1);
                for _ in 0..READS / THREADS + 1 {
                    let file = random.below(FILES);
                    let size = sizes[file as usize];
                    let start = random.below(size + 10);
                    let most = if random.below(8) == 0 { 300_000 } else { 5_000 };
                    let length = 1 + random.below(most);
                    let path = point.join(format!("d{}/{file}", file % 3));
                    let opened = OpenOptions::new()
                        .read(true)
                        .custom_flags(flags)
                        .open(&path)
                        .unwrap();
                    let mut bytes = vec![0; length as usize];
                    let got = read_all(&opened, &mut bytes, start);
                    let expected = start.min(size)..(start + length).min(size).max(start.min(size));
                    assert!(
                        bytes[..got] == tell_tale(file, expected.clone()),
                        "file {file} of {size} bytes, {length} at {start}: {got} bytes, not those"
                    );
                }
            });
        }
    });
    let status = sandbox.status();
    let agent = &status["agent"];
    let used = agent["cache_used"].as_u64().unwrap();
    println!(
        "{data} bytes of data, cache {used} of {CACHE}, {} bytes from the origin",
        agent["bytes_from_origin"]
    );
    assert!(data > 4 * CACHE);
    assert!(
        used <= CACHE,
        "the cache holds {used} bytes, its limit is {CACHE}"
    );
    assert_eq!(agent["cache_degraded"], serde_json::Value::Null);
    assert_eq!(agent["last_error"], serde_json::Value::Null);
    let from_origin = agent["bytes_from_origin"].as_u64().unwrap();
    assert!(
        from_origin > 2 * data,
        "the cache was not under pressure: {from_origin} bytes came from the origin"
    );
}

/// As much as there is, however short the single reads are.
fn read_all(file: &File, bytes: &mut [u8], start: u64) -> usize {
    let mut got = 0;
    while got < bytes.len() {
        match file.read_at(&mut bytes[got..], start + got as u64).unwrap() {
            0 => break,
            length => got += length,
        }
    }
    got
}

/// The same sequence in every run (SplitMix64).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % limit
    }
}
