//! The cache under SIGKILL: this test program runs itself as the victim.

use std::{
    env,
    io::{BufRead, BufReader},
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
};

use grid_mount::{
    block::{BLOCK_SIZE, BlockNo, block_count},
    cache::{Cache, CacheConfig, ObjectId, Purpose, VerifyPolicy, WriteMode},
};

const VICTIM: &str = "GRID_MOUNT_TEST_CACHE_VICTIM";
const PAGE: usize = 4096;
const SIZES: [u64; 4] = [1000, 300_000, 9 << 20, 33_000_000];

fn open(dir: &Path) -> Arc<Cache> {
    let config = CacheConfig {
        dir: dir.to_owned(),
        max_bytes: 24 << 20,
        min_free: 0,
        verify: VerifyPolicy::EarlierBoot,
    };
    Cache::open(config).unwrap()
}

fn id(n: usize) -> ObjectId {
    ObjectId::derive("team", "s3://bucket", &n.to_string(), "etag", SIZES[n], None)
}

fn truth(n: usize, block: BlockNo) -> Vec<u8> {
    let range = block.byte_range(SIZES[n]);
    let mut bytes = vec![0; (range.end - range.start) as usize];
    let mut hasher = blake3::Hasher::new();
    hasher.update(&[n as u8]).update(&block.0.to_le_bytes());
    hasher.finalize_xof().fill(&mut bytes);
    bytes
}

/// How many blocks are there; each is right.
fn verify(cache: &Arc<Cache>) -> u64 {
    let mut present = 0;
    for (n, size) in SIZES.into_iter().enumerate() {
        let object = cache.object(id(n), size);
        for block in (0..block_count(size)).map(BlockNo) {
            let wanted = truth(n, block);
            let mut bytes = vec![0xee; wanted.len()];
            if object
                .read(block.byte_range(size).start, &mut bytes, Purpose::WarmUp)
                .unwrap()
            {
                present += 1;
                assert!(bytes == wanted, "block {} of {n} is wrong", block.0);
            }
        }
    }
    present
}

/// Fills and evicts from three threads until killed.
fn victim(dir: &Path) {
    let cache = open(dir);
    std::thread::scope(|scope| {
        for worker in 0..3u64 {
            let cache = &cache;
            scope.spawn(move || {
                // Where a page begins: from there bytes may be written past the page cache.
                let mut memory = vec![0; BLOCK_SIZE as usize + PAGE];
                for step in 0u64.. {
                    let random = (step * 3 + worker).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33;
                    let n = (random % 4) as usize;
                    let object = cache.object(id(n), SIZES[n]);
                    let block = BlockNo(random / 4 % block_count(SIZES[n]));
                    let bytes = truth(n, block);
                    let start = memory.as_ptr().align_offset(PAGE);
                    let place = &mut memory[start..start + bytes.len()];
                    place.copy_from_slice(&bytes);
                    let mode = match step % 2 {
                        0 => WriteMode::Buffered,
                        _ => WriteMode::Direct,
                    };
                    // "Not cached" is a fair outcome here; wrong bytes are not.
                    let _ = object.fill_run(block, &[place], Purpose::Reader, mode);
                    if n < 2 {
                        object.seal();
                    }
                    if step == 20 {
                        println!("under load");
                    }
                }
            });
        }
    });
}

#[test]
fn killed_at_any_moment_the_cache_serves_only_the_truth() {
    if let Some(dir) = env::var_os(VICTIM) {
        victim(Path::new(&dir));
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut most = 0;
    for round in 0..12u64 {
        let mut child = Command::new(env::current_exe().unwrap())
            .args([
                "--exact",
                "killed_at_any_moment_the_cache_serves_only_the_truth",
                "--nocapture",
            ])
            .env(VICTIM, dir.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap().contains("under load")));
        // Where it is by then is up to the scheduler; the wait only spreads the moments.
        std::thread::sleep(std::time::Duration::from_millis(round * 13 % 80));
        child.kill().unwrap();
        child.wait().unwrap();
        let cache = open(dir.path());
        most = most.max(verify(&cache));
        assert_eq!(cache.stats().verify_failures, 0, "a kill alone damages nothing");
    }
    assert!(most > 20, "something was kept: {most}");
}

/// Not a benchmark: prints what the paths cost beside the bare system calls, for whoever looks.
#[test]
fn paths_beside_bare_system_calls() {
    use std::{os::unix::fs::FileExt, time::Instant};
    const SIZE: u64 = 64 << 20;
    const BLOCK: u64 = 128 << 10;
    let dir = tempfile::tempdir().unwrap();
    let config = CacheConfig {
        dir: dir.path().join("cache"),
        max_bytes: 1 << 30,
        min_free: 0,
        verify: VerifyPolicy::EarlierBoot,
    };
    let cache = Cache::open(config).unwrap();
    let id = ObjectId::derive("team", "s3://bucket", "bench", "etag", SIZE, None);
    let object = cache.object(id, SIZE);
    let block = vec![7u8; BLOCK as usize];
    let plain = std::fs::File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(dir.path().join("plain"))
        .unwrap();
    let start = Instant::now();
    (0..SIZE / BLOCK).for_each(|n| plain.write_all_at(&block, n * BLOCK).unwrap());
    let wrote = start.elapsed();
    let start = Instant::now();
    (0..SIZE / BLOCK).for_each(|n| object.fill(BlockNo(n), &block, Purpose::Reader).unwrap());
    println!(
        "fill: {:.2} of the rate of plain writes",
        wrote.as_secs_f64() / start.elapsed().as_secs_f64()
    );
    for len in [4096u64, BLOCK] {
        let mut buf = vec![0; len as usize];
        let offsets: Vec<u64> = (0..20_000u64)
            .map(|n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15) % (SIZE / len) * len)
            .collect();
        let start = Instant::now();
        offsets
            .iter()
            .for_each(|at| plain.read_exact_at(&mut buf, *at).unwrap());
        let bare = start.elapsed();
        let start = Instant::now();
        offsets
            .iter()
            .for_each(|at| assert!(object.read(*at, &mut buf, Purpose::Reader).unwrap()));
        println!(
            "hit, {len} bytes: {:.2} of pread's time ({bare:?})",
            start.elapsed().as_secs_f64() / bare.as_secs_f64()
        );
    }
}
