mod direct;

use std::{
    collections::HashMap,
    os::unix::fs::{FileExt, MetadataExt},
    time::Duration,
};

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::block::{BLOCK_SIZE, BLOCKS_PER_EXTENT, EXTENT_SIZE, block_count};

const BOOT: BootId = BootId([1; 16]);
const LATER_BOOT: BootId = BootId([2; 16]);

fn config(dir: &TempDir, max_bytes: u64) -> CacheConfig {
    CacheConfig {
        dir: dir.path().join("cache"),
        max_bytes,
        min_free: 0,
        verify: VerifyPolicy::EarlierBoot,
    }
}

fn open(dir: &TempDir, max_bytes: u64, boot: BootId) -> Arc<Cache> {
    let cache = Cache::open_in_boot(config(dir, max_bytes), boot).unwrap();
    assert!(cache.wait_scanned(Duration::from_secs(60)));
    cache
}

fn id(n: u8) -> ObjectId {
    ObjectId::derive("team", "s3://bucket", &format!("key{n}"), "etag", 1, None)
}

/// What the origin would say: every block of every object differs.
fn truth(n: u8, block: BlockNo, size: u64) -> Vec<u8> {
    let range = block.byte_range(size);
    let mut bytes = vec![0; (range.end - range.start) as usize];
    let mut hasher = blake3::Hasher::new();
    hasher.update(&[n]).update(&block.0.to_le_bytes());
    hasher.finalize_xof().fill(&mut bytes);
    bytes
}

fn fill(cache: &Arc<Cache>, n: u8, size: u64, block: u64) -> Result<(), CacheError> {
    let block = BlockNo(block);
    cache
        .object(id(n), size)
        .fill(block, &truth(n, block, size), Purpose::Reader)
}

/// As many blocks as there are, up to `count`; every other run past the page cache.
fn fill_run(cache: &Arc<Cache>, n: u8, size: u64, first: u64, count: u64) -> Result<(), CacheError> {
    let mode = match first.is_multiple_of(2) {
        true => WriteMode::Direct,
        false => WriteMode::Buffered,
    };
    fill_run_as(cache, n, size, first, count, mode).map(drop)
}

fn fill_run_as(
    cache: &Arc<Cache>,
    n: u8,
    size: u64,
    first: u64,
    count: u64,
    mode: WriteMode,
) -> Result<u64, CacheError> {
    const PAGE: usize = 4096;
    let blocks = first..(first + count).min(block_count(size));
    let mut memory = vec![0; PAGE];
    blocks.for_each(|block| memory.extend(truth(n, BlockNo(block), size)));
    // Bytes that may be written past the page cache begin where a page does.
    let len = memory.len() - PAGE;
    let start = memory.as_ptr().align_offset(PAGE);
    memory.copy_within(PAGE.., start);
    let parts: Vec<&[u8]> = memory[start..start + len].chunks(BLOCK_SIZE as usize).collect();
    cache
        .object(id(n), size)
        .fill_run(BlockNo(first), &parts, Purpose::Reader, mode)
}

/// What the file system says of the objects, once it has placed them.
fn on_disk(dir: &TempDir) -> u64 {
    let objects = dir.path().join("cache/objects");
    walkdir::WalkDir::new(&objects)
        .into_iter()
        .filter(|_| objects.exists())
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.file_type().is_file())
        .map(|entry| {
            let file = std::fs::File::open(entry.path()).unwrap();
            file.sync_all().unwrap();
            file.metadata().unwrap().blocks() * 512
        })
        .sum()
}

fn holds(cache: &Arc<Cache>, n: u8, size: u64, block: u64) -> bool {
    let range = BlockNo(block).byte_range(size);
    let mut buf = vec![0; (range.end - range.start) as usize];
    let hit = cache
        .object(id(n), size)
        .read(range.start, &mut buf, Purpose::Reader)
        .unwrap();
    assert!(
        !hit || buf == truth(n, BlockNo(block), size),
        "wrong bytes in block {block} of {n}"
    );
    hit
}

#[test]
fn ids_differ_in_every_part() {
    let base = ObjectId::derive("a", "b", "c", "d", 1, None);
    let digest = Digest::of(b"");
    for other in [
        ObjectId::derive("ab", "", "c", "d", 1, None),
        ObjectId::derive("a", "bc", "", "d", 1, None),
        ObjectId::derive("a", "b", "c", "d", 2, None),
        ObjectId::derive("a", "b", "c", "d", 1, Some(&digest)),
    ] {
        assert_ne!(base, other);
    }
}

#[test]
fn what_was_filled_is_read_now_and_after_a_restart() {
    let dir = TempDir::new().unwrap();
    let (small, large) = (300_000, 2 * EXTENT_SIZE + 77);
    for boot in [BOOT, BOOT, LATER_BOOT] {
        let before = on_disk(&dir);
        let cache = open(&dir, 1 << 30, boot);
        assert_eq!(cache.stats().allocated_bytes, before);
        for (n, size) in [(1, small), (2, large)] {
            let last = block_count(size) - 1;
            if !holds(&cache, n, size, last) {
                assert_eq!(cache.stats().objects, u64::from(n) - 1);
                fill(&cache, n, size, last).unwrap();
                assert!(holds(&cache, n, size, last));
                assert!(!holds(&cache, n, size, 0));
            }
            let object = cache.object(id(n), size);
            assert_eq!(object.missing(0..u64::MAX).len() as u64, last);
            assert_eq!(object.present_bytes(), size - last * BLOCK_SIZE);
        }
        assert_eq!(cache.stats().objects, 2);
    }
}

#[test]
fn one_agent_per_directory() {
    let dir = TempDir::new().unwrap();
    let cache = open(&dir, 1 << 30, BOOT);
    let error = Cache::open(config(&dir, 1)).err().unwrap();
    assert!(
        matches!(error, CacheError::Locked { pid, .. } if pid == std::process::id()),
        "{error}"
    );
    drop(cache);
    open(&dir, 1 << 30, BOOT);
}

#[test]
fn the_limit_holds_and_a_smaller_one_shrinks_the_cache() {
    let dir = TempDir::new().unwrap();
    let size = 6 * EXTENT_SIZE;
    let cache = open(&dir, 3 * EXTENT_SIZE, BOOT);
    for n in 0..2 {
        for block in 0..block_count(size) {
            fill(&cache, n, size, block).unwrap();
            assert!(cache.stats().allocated_bytes <= 4 * EXTENT_SIZE);
        }
    }
    assert!(cache.stats().evictions > 0);
    let before = cache.stats().allocated_bytes;
    assert!(before > EXTENT_SIZE);
    drop(cache);
    let cache = open(&dir, EXTENT_SIZE / 2, BOOT);
    fill(&cache, 9, 10, 0).unwrap();
    assert!(cache.stats().allocated_bytes <= EXTENT_SIZE / 2);
    assert!(holds(&cache, 9, 10, 0));
}

/// The file system is not asked after every block: what that hides is bounded. Tried in memory, since a file
/// system that places blocks late counts them twice or not at all while it does, and ext4 places 8 MiB at once.
#[test]
fn the_total_follows_the_disk() {
    let dir = TempDir::new_in("/dev/shm").unwrap();
    let size = 20 * EXTENT_SIZE + 5000;
    let cache = open(&dir, 1 << 30, BOOT);
    let object = cache.object(id(1), size);
    let mut lengths = [1, 16, 3, 40, 1, 7].into_iter().cycle();
    let mut first = 0;
    while first < block_count(size) {
        let count = lengths.next().unwrap();
        fill_run(&cache, 1, size, first, count).unwrap();
        let (told, disk) = (cache.stats().allocated_bytes, on_disk(&dir));
        // A page of the sidecar.
        assert!(told + 4096 >= disk, "{told} told, {disk} on the disk");
        assert!(told <= disk, "{told} told, {disk} on the disk");
        // Now and then it is there already.
        first += count - count / 8;
    }
    drop(object);
    assert_eq!(cache.stats().allocated_bytes, on_disk(&dir));
    assert!((0..block_count(size)).all(|block| holds(&cache, 1, size, block)));
    cache.evict_all();
    assert_eq!(cache.stats().allocated_bytes, 0);
}

#[test]
fn a_run_of_wrong_lengths_is_refused_whole() {
    let dir = TempDir::new().unwrap();
    let size = 3 * BLOCK_SIZE + 10;
    let cache = open(&dir, 1 << 30, BOOT);
    let (whole, short) = (truth(1, BlockNo(2), size), truth(1, BlockNo(3), size));
    let fill = |parts: &[&[u8]]| {
        cache
            .object(id(1), size)
            .fill_run(BlockNo(2), parts, Purpose::Reader, WriteMode::Buffered)
    };
    for wrong in [
        &[&whole[..], &whole[..]][..],
        &[&short, &short],
        &[&whole, &short, &short],
    ] {
        assert!(matches!(fill(wrong), Err(CacheError::WrongLength { .. })));
        assert_eq!(cache.object(id(1), size).present_bytes(), 0);
    }
    fill(&[&whole, &short]).unwrap();
    assert!(holds(&cache, 1, size, 2) && holds(&cache, 1, size, 3));
    fill(&[]).unwrap();
}

#[test]
fn an_object_whose_making_was_cut_short_is_made_anew_and_is_no_damage() {
    for (bytes, damaged) in [(&b""[..], 0), (b"x", 1)] {
        let dir = TempDir::new().unwrap();
        let cache = open(&dir, 1 << 30, BOOT);
        let (data, _) = cache.shared.paths(&id(1));
        std::fs::create_dir_all(data.parent().unwrap()).unwrap();
        std::fs::write(&data, bytes).unwrap();
        // Once it is on the disk, it takes room there.
        File::open(&data).unwrap().sync_all().unwrap();
        fill(&cache, 1, 1000, 0).unwrap();
        assert!(holds(&cache, 1, 1000, 0));
        assert_eq!(cache.stats().verify_failures, damaged);
    }
}

#[test]
fn sealed_objects_are_complete_exact_and_go_only_whole() {
    let dir = TempDir::new().unwrap();
    let size = 2 * EXTENT_SIZE + 5;
    let cache = open(&dir, 1 << 30, BOOT);
    let object = cache.object(id(1), size);
    for block in 0..block_count(size) {
        assert!(object.seal().is_none());
        fill(&cache, 1, size, block).unwrap();
    }
    assert!(object.is_complete() && !object.sealed());
    let file = object.seal().unwrap();
    assert!(object.sealed());
    assert_eq!(file.metadata().unwrap().len(), size);
    assert!(file.write_at(b"x", 0).is_err(), "the descriptor cannot write");
    assert_eq!(
        object.evict_whole().unwrap(),
        object::Evicted::Busy,
        "the kernel holds it"
    );
    assert_eq!(
        object.evict_extent(crate::block::ExtentNo(0)).unwrap(),
        object::Evicted::Busy
    );
    // Pushed out while held: the descriptor reads on.
    assert!(cache.evict(&id(1)));
    assert!(!holds(&cache, 1, size, 0));
    let mut buf = vec![0; 5];
    file.read_exact_at(&mut buf, 2 * EXTENT_SIZE).unwrap();
    assert_eq!(buf, truth(1, BlockNo(128), size));
    // And it is sealed still in a later run.
    for block in 0..block_count(size) {
        fill(&cache, 1, size, block).unwrap();
    }
    assert!(object.seal().is_some());
    drop((object, file, cache));
    let cache = open(&dir, 1 << 30, BOOT);
    assert!(cache.object(id(1), size).sealed());
    assert!(cache.object(id(1), size).seal().is_some());
}

/// Every file of the cache but the lock.
fn files(dir: &TempDir) -> Vec<PathBuf> {
    walkdir::WalkDir::new(dir.path().join("cache"))
        .sort_by_file_name()
        .into_iter()
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.file_type().is_file() && entry.file_name() != "lock")
        // A journal in which nothing is.
        .filter(|entry| entry.metadata().unwrap().len() > 0)
        .map(|entry| entry.into_path())
        .collect()
}

fn damage(path: &Path, at: u64, flip: u8) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ flip], at).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Any op sequence, restarts and reboots included: a read gives the truth or says absent; what
    /// was filled and had no reason to go is there.
    #[test]
    fn agrees_with_a_model(
        ops in prop::collection::vec((0u8..12, 0u8..3, 0u64..130), 1..60), max in 4u64..40
    ) {
        let dir = TempDir::new().unwrap();
        let max = max << 20;
        let sizes = [100_000, EXTENT_SIZE, 2 * EXTENT_SIZE + 1000];
        let mut boot = BOOT;
        let mut cache = open(&dir, max, boot);
        // Whether a block must be there, as long as nothing is evicted; what is not among them must not.
        let mut model: HashMap<(u8, u64), bool> = HashMap::new();
        for (op, n, block) in ops {
            let size = sizes[usize::from(n)];
            let block = block % block_count(size);
            match op {
                0..=5 => {
                    let count = (block % 4 + 1).min(block_count(size) - block);
                    let stored = fill_run(&cache, n, size, block, count).is_ok();
                    for block in block..block + count {
                        *model.entry((n, block)).or_default() |= stored;
                    }
                }
                6..=8 => {
                    let hit = holds(&cache, n, size, block);
                    prop_assert!(!hit || model.contains_key(&(n, block)));
                    let must = model.get(&(n, block)) == Some(&true) && cache.stats().evictions == 0;
                    prop_assert!(hit || !must);
                }
                9 => { cache.evict(&id(n)); model.retain(|key, _| key.0 != n); }
                10 => { cache.object(id(n), size).seal(); }
                _ => {
                    drop(cache);
                    if block.is_multiple_of(2) { boot.0[0] += 1; }
                    cache = open(&dir, max, boot);
                    model.retain(|(n, block), must| {
                        *must = holds(&cache, *n, sizes[usize::from(*n)], *block);
                        *must
                    });
                }
            }
            prop_assert!(cache.stats().allocated_bytes <= max + EXTENT_SIZE);
            prop_assert_eq!(cache.stats().verify_failures, 0);
        }
    }

    /// Any byte of any file, and of any attribute: the truth or absent. With every block checked, or after a
    /// power cut.
    #[test]
    fn a_damaged_byte_is_never_served(
        always: bool, at: prop::sample::Index, which: prop::sample::Index, flip in 1u8..
    ) {
        let dir = TempDir::new().unwrap();
        let sizes = [(1, 1000), (2, 300_000), (3, EXTENT_SIZE + 200_000)];
        let cache = open(&dir, 1 << 30, BOOT);
        for (n, size) in sizes {
            fill_run(&cache, n, size, 0, block_count(size)).unwrap();
        }
        cache.object(id(3), sizes[2].1).seal().unwrap();
        let attributes = [1, 2].map(|n| cache.shared.paths(&id(n)).0);
        if always { drop(cache) } else { power_cut(&dir, cache) }
        let files = files(&dir);
        let which = which.index(files.len() + attributes.len());
        if let Some(path) = files.get(which) {
            let len = path.metadata().unwrap().len();
            damage(path, at.index(len as usize) as u64, flip);
        } else {
            let file = File::open(&attributes[which - files.len()]).unwrap();
            if let Some(mut value) = disk::attribute(&file, sidecar::ATTRIBUTE_MOST).unwrap() {
                let at = at.index(value.len());
                value[at] ^= flip;
                disk::set_attribute(&file, &value).unwrap();
            }
        }
        let mut config = config(&dir, 1 << 30);
        config.verify = if always { VerifyPolicy::Always } else { VerifyPolicy::EarlierBoot };
        let cache = Cache::open_in_boot(config, if always { BOOT } else { LATER_BOOT }).unwrap();
        for (n, size) in sizes {
            if let Some(file) = cache.object(id(n), size).seal() {
                whole(&file, n, size);
            }
            for block in 0..block_count(size) { holds(&cache, n, size, block); }
        }
    }
}

/// What a descriptor that the kernel is handed says.
fn whole(file: &File, n: u8, size: u64) {
    assert_eq!(file.metadata().unwrap().len(), size);
    let mut bytes = vec![0; size as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    let wanted: Vec<u8> = (0..block_count(size))
        .flat_map(|block| truth(n, BlockNo(block), size))
        .collect();
    assert!(bytes == wanted, "object {n} was handed out wrong");
}

/// Closes the cache, but leaves the record of epochs as it was before: what a power cut leaves of it.
fn power_cut(dir: &TempDir, cache: Arc<Cache>) {
    let epochs = ["epochs.a", "epochs.b"]
        .map(|name| dir.path().join("cache").join(name))
        .map(|path| (path.clone(), std::fs::read(path).unwrap()));
    drop(cache);
    for (path, bytes) in epochs {
        std::fs::write(path, bytes).unwrap();
    }
}

#[test]
fn blocks_of_an_earlier_boot_are_checked_unless_settled() {
    for settle in [false, true] {
        let dir = TempDir::new().unwrap();
        let cache = open(&dir, 1 << 30, BOOT);
        let size = EXTENT_SIZE + 9;
        fill(&cache, 1, size, 3).unwrap();
        if settle {
            cache.settle().unwrap();
        }
        let (data, _) = cache.shared.paths(&id(1));
        power_cut(&dir, cache);
        damage(&data, 3 * BLOCK_SIZE + 5, 1);
        let cache = open(&dir, 1 << 30, LATER_BOOT);
        let mut buf = vec![0; BLOCK_SIZE as usize];
        let hit = cache
            .object(id(1), size)
            .read(3 * BLOCK_SIZE, &mut buf, Purpose::Reader)
            .unwrap();
        // Settled blocks are trusted: this damage is what `Always` is for.
        assert_eq!(hit, settle);
        assert_eq!(cache.stats().verify_failures, u64::from(!settle));
        assert_eq!(
            cache.scrub(|_| ControlFlow::Continue(())).damaged,
            u64::from(settle)
        );
    }
}

#[test]
fn what_a_power_cut_may_have_torn_is_checked_before_it_is_sealed() {
    let size = EXTENT_SIZE + 9;
    for (verify, reboots) in [(VerifyPolicy::EarlierBoot, true), (VerifyPolicy::Always, false)] {
        for sealed_before in [false, true] {
            let dir = TempDir::new().unwrap();
            let cache = open(&dir, 1 << 30, BOOT);
            fill_run(&cache, 1, size, 0, block_count(size)).unwrap();
            if sealed_before {
                cache.object(id(1), size).seal().unwrap();
            }
            let (data, _) = cache.shared.paths(&id(1));
            power_cut(&dir, cache);
            damage(&data, 64 * BLOCK_SIZE + 3, 1);
            let boot = if reboots { LATER_BOOT } else { BOOT };
            let config = CacheConfig {
                verify,
                ..config(&dir, 1 << 30)
            };
            let cache = Cache::open_in_boot(config, boot).unwrap();
            let object = cache.object(id(1), size);
            assert!(object.seal().is_none(), "{verify:?}, {sealed_before}");
            assert_eq!(cache.stats().verify_failures, 1);
            fill_run(&cache, 1, size, 0, block_count(size)).unwrap();
            whole(&object.seal().unwrap(), 1, size);
        }
    }
}

#[test]
fn a_vanished_directory_degrades_to_misses() {
    let dir = TempDir::new().unwrap();
    let cache = open(&dir, 1 << 30, BOOT);
    std::fs::remove_dir_all(dir.path().join("cache")).unwrap();
    assert!(fill(&cache, 1, 1000, 0).is_err());
    assert!(!holds(&cache, 1, 1000, 0));
    assert!(cache.stats().degraded.is_some());
    assert_eq!(cache.stats().fill_errors, 1);
}

#[test]
fn a_directory_that_cannot_be_used_from_the_start_degrades_to_misses() {
    let dir = TempDir::new().unwrap();
    let open = || Cache::open_or_read_through(config(&dir, 1 << 30));
    // A usable one is used, and by one agent only.
    let cache = open().unwrap();
    fill(&cache, 1, 1000, 0).unwrap();
    assert!(matches!(open(), Err(CacheError::Locked { .. })));
    drop(cache);
    let place = dir.path().join("cache");
    std::fs::remove_dir_all(&place).unwrap();
    std::fs::write(&place, "in its place").unwrap();
    let cache = open().unwrap();
    assert!(matches!(fill(&cache, 1, 1000, 0), Err(CacheError::Resting)));
    assert!(!holds(&cache, 1, 1000, 0));
    assert!(cache.tree_staging(&Digest::of(b"tree")).is_none());
    assert_eq!(
        (cache.evict_all(), cache.scrub(|_| ControlFlow::Continue(()))),
        (0, ScrubProgress::default())
    );
    let stats = cache.stats();
    assert!(stats.scanned);
    let why = stats.degraded.unwrap();
    assert!(
        why.contains(place.to_str().unwrap()) && why.contains("exists"),
        "{why}"
    );
    drop(cache);
    assert_eq!(std::fs::read(&place).unwrap(), b"in its place");
}

/// The files `order` and `order.log` as they are now, put back when the agent has closed the cache: what a
/// kill leaves.
fn killed(dir: &TempDir, cache: Arc<Cache>) {
    let left: Vec<_> = ["order", "order.log"]
        .iter()
        .map(|name| dir.path().join("cache").join(name))
        .map(|path| (path.clone(), std::fs::read(path).unwrap_or_default()))
        .collect();
    drop(cache);
    left.iter()
        .for_each(|(path, bytes)| std::fs::write(path, bytes).unwrap());
}

#[test]
fn the_order_survives_a_kill_up_to_the_last_move_that_was_noted() {
    let dir = TempDir::new().unwrap();
    let order = |cache: &Arc<Cache>| cache.shared.policy.lock().order().collect::<Vec<_>>();
    let cache = open(&dir, 1 << 30, BOOT);
    (1..9).for_each(|n| fill(&cache, n, 1000, 0).unwrap());
    let mut journal = order::save(&cache.shared).unwrap();
    (9..12).for_each(|n| fill(&cache, n, 1000, 0).unwrap());
    cache.evict(&id(3));
    assert!(journal.append(&cache.shared).unwrap());
    let noted = order(&cache);
    assert_eq!(noted.len(), 11);
    let log = dir.path().join("cache/order.log");
    let len = log.metadata().unwrap().len();
    fill(&cache, 20, 1000, 0).unwrap();
    assert!(journal.append(&cache.shared).unwrap());
    killed(&dir, cache);
    // The next record is torn: what it spoke of is found by the scan, and is the coldest.
    let torn = File::options().write(true).open(&log).unwrap();
    torn.set_len(len + 20).unwrap();
    let cache = open(&dir, 1 << 30, BOOT);
    let mut found = order(&cache);
    assert_eq!(found.pop(), Some(Unit::extent(id(20), crate::block::ExtentNo(0))));
    // The window was told as the hottest; which of them were there first is kept.
    assert_eq!(found.len(), noted.len());
    assert!(noted.iter().all(|unit| found.contains(unit)));
    // A journal of another snapshot is not believed.
    let old = std::fs::read(&log).unwrap();
    drop(cache);
    std::fs::write(&log, old).unwrap();
    let (units, _) = order::saved(&dir.path().join("cache")).unwrap();
    assert_eq!(units.len(), 12);
}

#[test]
fn a_full_disk_degrades_to_misses() {
    let dir = TempDir::new().unwrap();
    let mut config = config(&dir, 1 << 30);
    config.min_free = u64::MAX / 2;
    let cache = Cache::open_in_boot(config, BOOT).unwrap();
    assert!(matches!(fill(&cache, 1, 1000, 0), Err(CacheError::DiskFull)));
    assert!(cache.stats().degraded.is_some());
}

#[test]
fn what_a_dead_agent_was_staging_goes_and_what_this_one_stages_stays() {
    let dir = TempDir::new().unwrap();
    let digest = Digest::of(b"tree");
    let cache = open(&dir, 1 << 30, BOOT);
    let staged = cache.tree_staging(&digest).unwrap();
    std::fs::write(&staged, b"half").unwrap();
    let unpacking = staged.with_file_name(".unpack-x");
    std::fs::write(&unpacking, b"half").unwrap();
    drop(cache);
    let cache = open(&dir, 1 << 30, BOOT);
    assert!(!staged.exists() && !unpacking.exists());
    let staged = cache.tree_staging(&digest).unwrap();
    std::fs::write(&staged, b"tree").unwrap();
    assert!(cache.adopt_tree(&digest, &staged).is_ok());
    drop(cache);
    assert!(open(&dir, 1 << 30, BOOT).tree(&digest).is_some());
}

#[test]
fn trees_are_adopted_counted_and_kept_while_held() {
    let dir = TempDir::new().unwrap();
    let cache = open(&dir, 1 << 30, BOOT);
    let digest = Digest::of(b"rows");
    assert!(cache.tree(&digest).is_none());
    let from = cache.dir().join("incoming");
    std::fs::write(&from, b"rows").unwrap();
    let handle = cache.adopt_tree(&digest, &from).unwrap();
    assert_eq!(std::fs::read(handle.path()).unwrap(), b"rows");
    assert_eq!(cache.stats().allocated_bytes, 4096);
    assert_eq!(cache.evict_all(), 0);
    drop(handle);
    drop(cache);
    let cache = open(&dir, 1 << 30, LATER_BOOT);
    assert!(cache.tree(&digest).is_some());
    assert_eq!(cache.evict_all(), 1);
    assert!(cache.tree(&digest).is_none());
    assert_eq!(cache.stats().allocated_bytes, 0);
}

#[test]
fn readers_fillers_and_eviction_together_never_serve_a_wrong_byte() {
    let dir = TempDir::new().unwrap();
    let size = 4 * EXTENT_SIZE;
    let cache = open(&dir, 2 * EXTENT_SIZE, BOOT);
    std::thread::scope(|scope| {
        for worker in 0..4u64 {
            let cache = &cache;
            scope.spawn(move || {
                for step in 0..400u64 {
                    let n = (step % 2) as u8;
                    let block = (step * 37 + worker * 11) % block_count(size);
                    if !holds(cache, n, size, block) {
                        let _ = fill(cache, n, size, block);
                    }
                    if step % 50 == 49 && worker == 0 {
                        cache.evict(&id(n));
                    }
                }
            });
        }
    });
    assert!(cache.stats().allocated_bytes <= 2 * EXTENT_SIZE + 4 * EXTENT_SIZE);
}

/// A power cut: of the pages and attributes that no sync covered any may be as they were, in any combination.
#[test]
fn a_power_cut_costs_blocks_but_never_truth() {
    use rand::{RngExt, SeedableRng, rngs::StdRng};
    let sizes = [300_000, 4 * EXTENT_SIZE, 2 * EXTENT_SIZE + 1000];
    let mut changes = 0;
    for seed in 0..12 {
        let mut rng = StdRng::seed_from_u64(seed);
        let dir = TempDir::new().unwrap();
        let cache = open(&dir, 3 * EXTENT_SIZE, BOOT);
        disk::undo::start(cache.dir());
        for _ in 0..150 {
            let n = rng.random_range(0..3u8);
            let size = sizes[usize::from(n)];
            let block = rng.random_range(0..block_count(size));
            match rng.random_range(0..40) {
                0 => cache.settle().unwrap(),
                1 => {
                    // Complete and sealed: what is handed out again after the cut must be whole.
                    let _ = fill_run(&cache, n, size, 0, block_count(size));
                    cache.object(id(n), size).seal();
                }
                2..6 => drop(
                    cache
                        .object(id(n), size)
                        .evict_extent(BlockNo(block).extent())
                        .unwrap(),
                ),
                _ => drop(fill_run(&cache, n, size, block, rng.random_range(1..20))),
            }
        }
        let lost = disk::undo::stop();
        changes += lost.len();
        power_cut(&dir, cache);
        lost.iter()
            .rev()
            .filter(|_| rng.random_bool(0.5))
            .for_each(disk::undo::Change::undo);
        let cache = open(&dir, 3 * EXTENT_SIZE, LATER_BOOT);
        for n in 0..3u8 {
            let size = sizes[usize::from(n)];
            if let Some(file) = cache.object(id(n), size).seal() {
                whole(&file, n, size);
            }
            for block in 0..block_count(size) {
                holds(&cache, n, size, block);
            }
        }
    }
    assert!(changes > 10_000, "hardly anything was lost: {changes}");
}
