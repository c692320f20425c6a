//! The block cache beside bare system calls on the same bytes in the same run.
//!
//!     cargo bench --bench cache [-- hit|fill|many|large] [--objects N] [--dir DIR]
//!
//! Ratios are medians over rounds that alternate between the two, since other programs use the machine too.
//! `many` makes N small objects (1,000,000 unless told; 4 KiB of disk each) and opens the cache in a fresh process.

#[path = "../tests/support/processor.rs"]
mod processor;

use std::{
    env,
    fs::File,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use grid_mount::{
    block::{BLOCK_SIZE, BLOCKS_PER_EXTENT, BlockNo, EXTENT_SIZE},
    cache::{Cache, CacheConfig, CachedObject, ObjectId, Purpose, VerifyPolicy, WriteMode},
};

const OPENED: &str = "GRID_MOUNT_BENCH_OPEN";
const SIZE: u64 = 512 << 20;
const ROUNDS: usize = 9;
/// Small objects are of this many bytes.
const SMALL: u64 = 1000;

type Failure = Box<dyn std::error::Error>;

fn config(dir: &Path) -> CacheConfig {
    CacheConfig {
        dir: dir.join("cache"),
        max_bytes: 64 << 40,
        min_free: 0,
        verify: VerifyPolicy::EarlierBoot,
    }
}

fn id(name: &str, n: u64) -> ObjectId {
    ObjectId::derive("team", "s3://bucket", &format!("{name}/{n}"), "etag", SIZE, None)
}

fn noise(len: u64) -> Vec<u8> {
    let mut bytes = vec![0; len as usize];
    blake3::Hasher::new().finalize_xof().fill(&mut bytes);
    bytes
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Reads `offsets` from every thread; seconds.
fn timed(threads: usize, offsets: &[Vec<u64>], len: u64, read: impl Fn(u64, &mut [u8]) + Sync) -> f64 {
    let start = Instant::now();
    std::thread::scope(|scope| {
        for offsets in offsets.iter().take(threads) {
            let read = &read;
            scope.spawn(move || {
                let mut buf = vec![0; len as usize];
                offsets.iter().for_each(|at| read(*at, &mut buf));
            });
        }
    });
    start.elapsed().as_secs_f64()
}

fn hit(dir: &Path) -> Result<(), Failure> {
    let cache = Cache::open(config(dir))?;
    let object = cache.object(id("hit", 0), SIZE);
    let plain = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(dir.join("plain"))?;
    let block = noise(BLOCK_SIZE);
    for n in 0..SIZE / BLOCK_SIZE {
        object.fill(BlockNo(n), &block, Purpose::Reader)?;
        plain.write_all_at(&block, n * BLOCK_SIZE)?;
    }
    println!(
        "hit path, time beside pread's, {} MiB in the page cache:",
        SIZE >> 20
    );
    for (len, random, count) in [
        (4096, true, 40_000),
        (4096, false, 40_000),
        (BLOCK_SIZE, true, 4096),
        (BLOCK_SIZE, false, 4096),
    ] {
        for threads in [1, 8] {
            let offsets: Vec<Vec<u64>> = (0..threads as u64)
                .map(|thread| {
                    let at = |n: u64| match random {
                        true => (n * 8 + thread).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 16,
                        false => n + thread * 1000,
                    };
                    let each = count / threads as u64;
                    (0..each).map(|n| at(n) % (SIZE / len) * len).collect()
                })
                .collect();
            let mut times = Vec::new();
            let mut ratios = Vec::new();
            for _ in 0..ROUNDS {
                let bare = timed(threads, &offsets, len, |at, buf| {
                    plain.read_exact_at(buf, at).expect("the plain file is whole");
                });
                let ours = timed(threads, &offsets, len, |at, buf| {
                    assert!(matches!(object.read(at, buf, Purpose::Reader), Ok(true)));
                });
                times.push(bare / count as f64);
                ratios.push(ours / bare);
            }
            println!(
                "  {:>3} KiB {:<10} {threads} threads  {:.2} x (pread {:.2} us)",
                len >> 10,
                if random { "random" } else { "sequential" },
                median(ratios),
                median(times) * 1e6
            );
        }
    }
    Ok(())
}

/// One block at a time, and in runs of neighbours as the agent's threads write what waits for them.
fn fill(dir: &Path) -> Result<(), Failure> {
    const RUN: usize = 16;
    const BLOCKS: usize = (256 << 20) / BLOCK_SIZE as usize;
    let cache = Cache::open(config(dir))?;
    // From where a page begins, so that it can be written past the page cache.
    let memory = noise(BLOCK_SIZE + 4096);
    let block = &memory[memory.as_ptr().align_offset(4096)..][..BLOCK_SIZE as usize];
    let run = vec![block; RUN];
    let long = noise(RUN as u64 * BLOCK_SIZE);
    let path = dir.join("plain");
    let plain = |bytes: &[u8]| -> Result<f64, Failure> {
        let file = File::create(&path)?;
        let start = Instant::now();
        for at in (0..BLOCKS as u64 * BLOCK_SIZE).step_by(bytes.len()) {
            file.write_all_at(bytes, at)?;
        }
        let seconds = start.elapsed().as_secs_f64();
        drop(file);
        std::fs::remove_file(&path)?;
        Ok(seconds)
    };
    let mut as_asked = true;
    // Seconds, and those of a processor.
    let mut ours = |name: &str, round: u64, run: &[&[u8]], mode: WriteMode| -> Result<(f64, f64), Failure> {
        let object = cache.object(id(name, round), BLOCKS as u64 * BLOCK_SIZE);
        let (start, used) = (Instant::now(), processor::seconds());
        for first in (0..BLOCKS as u64).step_by(run.len()) {
            let direct = object.fill_run(BlockNo(first), run, Purpose::Reader, mode)?;
            as_asked &= direct
                == if mode == WriteMode::Direct {
                    run.len() as u64
                } else {
                    0
                };
        }
        let took = (start.elapsed().as_secs_f64(), processor::seconds() - used);
        drop(object);
        cache.evict_all();
        Ok(took)
    };
    let (mut one, mut runs, mut longer) = (Vec::new(), Vec::new(), Vec::new());
    let (mut direct, mut processor_direct) = (Vec::new(), Vec::new());
    let mut rates = Vec::new();
    for round in 0..ROUNDS as u64 {
        let bare = plain(block)?;
        one.push(bare / ours("one", round, &run[..1], WriteMode::Buffered)?.0);
        let (seconds, used) = ours("run", round, &run, WriteMode::Buffered)?;
        let past = ours("direct", round, &run, WriteMode::Direct)?;
        direct.push(BLOCKS as f64 * BLOCK_SIZE as f64 / past.0 / 1e6);
        processor_direct.push(past.1 / used);
        runs.push(bare / seconds);
        longer.push(plain(&long)? / seconds);
        rates.push(BLOCKS as f64 * BLOCK_SIZE as f64 / seconds / 1e6);
    }
    println!("fill path, rate beside that of plain sequential writes of 128 KiB:");
    println!("  one block at a time  {:.2}", median(one));
    println!(
        "  runs of {RUN} blocks    {:.2}; {:.2} of plain writes of as much at a time ({:.0} MB/s)",
        median(runs),
        median(longer),
        median(rates)
    );
    match as_asked {
        true => println!(
            "  the same past the page cache: {:.0} MB/s, {:.2} of the processor time",
            median(direct),
            median(processor_direct)
        ),
        false => println!("  past the page cache: not on this file system"),
    }
    Ok(())
}

/// Resident bytes of this process.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.unwrap_or(0) << 10
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// In a fresh process: a cache that an earlier one left.
fn opened(dir: &Path) -> Result<(), Failure> {
    let (kind, dir) = (env::var(OPENED)?, dir);
    let before = resident();
    let start = Instant::now();
    let cache = Cache::open(config(dir))?;
    let (object, len) = match kind.as_str() {
        "large" => (cache.object(id("large", 0), 1 << 40), BLOCK_SIZE),
        _ => (cache.object(id("small", 7), SMALL), SMALL),
    };
    let mut buf = vec![0; len as usize];
    assert!(object.read(0, &mut buf, Purpose::Reader)?, "it was cached");
    let first = start.elapsed();
    if !cache.wait_scanned(Duration::from_secs(600)) {
        return Err("the scan takes too long".into());
    }
    let scanned = start.elapsed();
    let stats = cache.stats();
    println!(
        "  first read served after {:.1} ms; {} units known after {:.1} s; {:.1} MiB resident more",
        first.as_secs_f64() * 1e3,
        stats.units,
        scanned.as_secs_f64(),
        mib(resident() - before)
    );
    Ok(())
}

fn open_again(dir: &Path, kind: &str) -> Result<(), Failure> {
    let done = Command::new(env::current_exe()?)
        .args(["--dir".as_ref(), dir.as_os_str()])
        .env(OPENED, kind)
        .status()?;
    match done.success() {
        true => Ok(()),
        false => Err("the fresh process failed".into()),
    }
}

fn many(dir: &Path, objects: u64) -> Result<(), Failure> {
    println!("{objects} small objects:");
    let cache = Cache::open(config(dir))?;
    let bytes = noise(SMALL);
    let before = resident();
    let start = Instant::now();
    std::thread::scope(|scope| {
        for worker in 0..4 {
            let (cache, bytes) = (&cache, &bytes);
            scope.spawn(move || {
                for n in (worker..objects).step_by(4) {
                    let object: Arc<CachedObject> = cache.object(id("small", n), SMALL);
                    object
                        .fill(BlockNo(0), bytes, Purpose::Reader)
                        .expect("the disk has room for the benchmark");
                }
            });
        }
    });
    println!(
        "  filled at {:.0} objects/s; {:.1} MiB resident more",
        objects as f64 / start.elapsed().as_secs_f64(),
        mib(resident() - before)
    );
    drop(cache);
    open_again(dir, "small")
}

/// One block per extent stands for the extent: memory goes by extents.
fn large(dir: &Path) -> Result<(), Failure> {
    const EXTENTS: u64 = (1 << 37) / EXTENT_SIZE;
    println!("1 object of 1 TiB, {EXTENTS} extents (128 GiB) of it cached:");
    let cache = Cache::open(config(dir))?;
    let object = cache.object(id("large", 0), 1 << 40);
    let block = noise(BLOCK_SIZE);
    let before = resident();
    for extent in 0..EXTENTS {
        object.fill(BlockNo(extent * BLOCKS_PER_EXTENT), &block, Purpose::Reader)?;
    }
    println!(
        "  {:.1} MiB resident more per TiB",
        8.0 * mib(resident() - before)
    );
    drop((object, cache));
    open_again(dir, "large")
}

fn main() -> Result<(), Failure> {
    let mut args = env::args().skip(1);
    let (mut wanted, mut objects, mut parent) = (Vec::new(), 1_000_000, None);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--objects" => objects = args.next().ok_or("--objects needs a number")?.parse()?,
            "--dir" => parent = Some(PathBuf::from(args.next().ok_or("--dir needs a directory")?)),
            // Cargo's own.
            "--bench" => {}
            name => wanted.push(name.to_owned()),
        }
    }
    if let (Ok(_), Some(dir)) = (env::var(OPENED), &parent) {
        return opened(dir);
    }
    let run = |name: &str| wanted.is_empty() || wanted.iter().any(|wanted| wanted == name);
    let fresh = || match &parent {
        Some(dir) => tempfile::tempdir_in(dir),
        None => tempfile::tempdir(),
    };
    if run("hit") {
        hit(fresh()?.path())?;
    }
    if run("fill") {
        fill(fresh()?.path())?;
    }
    if run("many") {
        many(fresh()?.path(), objects)?;
    }
    if run("large") {
        large(fresh()?.path())?;
    }
    Ok(())
}
