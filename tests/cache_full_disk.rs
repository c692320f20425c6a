//! A disk that others fill: the kernel's own ENOSPC, on a small file system of its own.

#[path = "support/sandbox.rs"]
mod sandbox;

use std::{
    fs::{self, File},
    io::Write as _,
    path::Path,
    time::{Duration, Instant},
};

use grid_mount::{
    block::{BLOCK_SIZE, BlockNo},
    cache::{Cache, CacheConfig, ObjectId, Purpose, VerifyPolicy},
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

fn truth(block: u64) -> Vec<u8> {
    let mut bytes = vec![0; BLOCK_SIZE as usize];
    let mut hasher = blake3::Hasher::new();
    hasher.update(&block.to_le_bytes());
    hasher.finalize_xof().fill(&mut bytes);
    bytes
}

#[test]
fn a_disk_that_fills_up_costs_hits_but_never_truth_and_is_used_again() {
    let disk = match SmallDisk::mounted() {
        Ok(disk) => disk,
        Err(error) => return sandbox::skip("a full disk", &format!("no tmpfs can be mounted: {error}")),
    };
    let cache = Cache::open(CacheConfig {
        dir: disk.path().join("cache"),
        max_bytes: 64 << 20,
        min_free: 0,
        verify: VerifyPolicy::EarlierBoot,
    })
    .unwrap();
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
    (0..40).for_each(|block| drop(right(block)));
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
    (0..60).for_each(|block| drop(right(block)));
}
