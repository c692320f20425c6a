//! A disk that others fill: the kernel's own ENOSPC, on a small file system of its own.

#[path = "support/sandbox.rs"]
mod sandbox;

use std::{
    fs::{self, File},
    io::Write as _,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use grid_mount::{
    block::{BLOCK_SIZE, BlockNo},
    cache::{Cache, CacheConfig, ObjectId, Purpose, VerifyPolicy, WriteMode},
};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mounted() -> nix::Result<Self> {
        let dir = tempfile::tempdir().unwrap();
        mount(
            Some("tmpfs"),
            dir.path(),
            Some("tmpfs"),
            MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
            Some("size=24m"),
        )?;
        Ok(Self(dir))
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = umount2(self.0.path(), MntFlags::MNT_DETACH);
    }
}

impl SmallDisk {
    /// One with a cache on it that leaves so much free; `None`, with the reason told, where there can be none.
    fn with_a_cache(min_free: u64) -> Option<(Self, Arc<Cache>)> {
        let disk = Self::mounted()
            .map_err(|error| sandbox::skip("a full disk", &format!("no tmpfs can be mounted: {error}")))
            .ok()?;
        let config = CacheConfig {
            dir: disk.path().join("cache"),
            max_bytes: 64 << 20,
            min_free,
            verify: VerifyPolicy::EarlierBoot,
        };
        Some((disk, Cache::open(config).unwrap()))
    }
}

fn truth(block: u64) -> Vec<u8> {
    let mut bytes = vec![0; BLOCK_SIZE as usize];
    let mut hasher = blake3::Hasher::new();
    hasher.update(&block.to_le_bytes());
    hasher.finalize_xof().fill(&mut bytes);
    bytes
}

#[test]
fn a_disk_that_fills_up_costs_hits_but_never_truth_and_is_used_again() {
    let Some((disk, cache)) = SmallDisk::with_a_cache(0) else {
        return;
    };
    let size = 1000 * BLOCK_SIZE;
    let object = cache.object(
        ObjectId::derive("team", "s3://b", "key", "etag", size, None),
        size,
    );
    let fill = |block: u64| object.fill(BlockNo(block), &truth(block), Purpose::Reader);
    let right = |block: u64| {
        let mut bytes = vec![0; BLOCK_SIZE as usize];
        let hit = object
            .read(block * BLOCK_SIZE, &mut bytes, Purpose::Reader)
            .unwrap();
        assert!(!hit || bytes == truth(block), "block {block} is wrong");
        hit
    };
    for block in 0..8 {
        fill(block).unwrap();
    }
    // Another program takes the rest, after the cache has looked how much there is.
    let filler = disk.path().join("filler");
    let mut file = File::create(&filler).unwrap();
    while file.write_all(&[1; 4096]).is_ok() {}
    let failed = (8..40).filter(|block| fill(*block).is_err()).count();
    assert!(failed > 0, "the disk was not full");
    assert!(cache.stats().degraded.is_some());
    for block in 0..40 {
        right(block);
    }
    drop(file);
    fs::remove_file(&filler).unwrap();
    // It rests for a moment, then stores again.
    let until = Instant::now() + Duration::from_secs(60);
    while fill(50).is_err() {
        assert!(Instant::now() < until, "the cache stays degraded");
        std::thread::yield_now();
    }
    assert!(right(50));
    assert_eq!(cache.stats().degraded, None);
    for block in 0..60 {
        right(block);
    }
}

fn allocated(disk: &SmallDisk) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    walkdir::WalkDir::new(disk.path().join("cache/objects"))
        .into_iter()
        .filter_map(|entry| entry.ok()?.metadata().ok())
        .filter(|metadata| metadata.is_file())
        .map(|metadata| metadata.blocks() * 512)
        .sum()
}

#[test]
fn the_cache_gives_way_to_another_program_that_fills_the_disk() {
    const MIN_FREE: u64 = 4 << 20;
    let Some((disk, cache)) = SmallDisk::with_a_cache(MIN_FREE) else {
        return;
    };
    let objects: Vec<_> = (0..14)
        .map(|n| {
            let id = ObjectId::derive("team", "s3://b", &n.to_string(), "etag", 1 << 20, None);
            cache.object(id, 1 << 20)
        })
        .collect();
    let blocks: Vec<_> = (0..8).map(truth).collect();
    let run: Vec<&[u8]> = blocks.iter().map(Vec::as_slice).collect();
    for object in &objects {
        object
            .fill_run(BlockNo(0), &run, Purpose::Reader, WriteMode::Buffered)
            .unwrap();
    }
    let before = allocated(&disk);
    assert!(before >= 14 << 20);
    // Of the 24 MiB, 10 are left: the other takes 9 of them, and nobody fills the cache any more.
    fs::write(disk.path().join("other"), vec![1; 9 << 20]).unwrap();
    let free = || {
        let stat = nix::sys::statvfs::statvfs(disk.path()).unwrap();
        stat.blocks_available() * stat.fragment_size()
    };
    let until = Instant::now() + Duration::from_secs(60);
    while free() < MIN_FREE {
        assert!(
            Instant::now() < until,
            "the cache keeps the disk full: {} left",
            free()
        );
        std::thread::yield_now();
    }
    // Not more than it must.
    assert!(
        allocated(&disk) >= 8 << 20,
        "{} of {before} kept",
        allocated(&disk)
    );
    for object in &objects {
        let mut bytes = vec![0; 1 << 20];
        assert!(!object.read(0, &mut bytes, Purpose::Reader).unwrap() || bytes == blocks.concat());
    }
}

/// What a run had written when the disk was full is counted, and goes when room is made.
#[test]
fn a_run_that_the_disk_cuts_short_is_not_there_and_not_forgotten() {
    let Some((disk, cache)) = SmallDisk::with_a_cache(0) else {
        return;
    };
    let size = 1000 * BLOCK_SIZE;
    let id = ObjectId::derive("team", "s3://b", "key", "etag", size, None);
    let object = cache.object(id, size);
    let fill = |first: u64| {
        let blocks: Vec<_> = (first..first + 16).map(truth).collect();
        let run: Vec<&[u8]> = blocks.iter().map(Vec::as_slice).collect();
        object.fill_run(BlockNo(first), &run, Purpose::Reader, WriteMode::Buffered)
    };
    // The cache looks how much there is now and then: so that it does not see the other coming.
    fill(0).unwrap();
    let free = {
        let stat = nix::sys::statvfs::statvfs(disk.path()).unwrap();
        stat.blocks_available() * stat.fragment_size()
    };
    fs::write(disk.path().join("other"), vec![1; free as usize - (1 << 20)]).unwrap();
    fill(64).unwrap_err();
    assert_eq!(object.missing(0..128), (16..128).map(BlockNo).collect::<Vec<_>>());
    let torn = allocated(&disk) - 16 * BLOCK_SIZE;
    assert!(torn >= 1 << 19, "nothing was written: {torn}");
    assert!(cache.stats().allocated_bytes >= allocated(&disk));
    assert_eq!(cache.stats().units, 2);
}
