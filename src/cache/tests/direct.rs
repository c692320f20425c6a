//! Writing past the page cache, and reading from memory what lies in none.

use super::*;

/// How many pages of the object the page cache has.
fn resident(cache: &Arc<Cache>, n: u8, size: u64) -> usize {
    let file = File::open(cache.shared.paths(&id(n)).0).unwrap();
    let length = std::num::NonZeroUsize::new(size as usize).unwrap();
    let mut pages = vec![0u8; length.get().div_ceil(4096)];
    // SAFETY: a mapping of its own, of a file that stays as it is, which nobody looks into; `pages` has a place for
    // each of its pages.
    unsafe {
        use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
        let at = mmap(None, length, ProtFlags::PROT_READ, MapFlags::MAP_SHARED, &file, 0).unwrap();
        assert_eq!(libc::mincore(at.as_ptr(), length.get(), pages.as_mut_ptr()), 0);
        munmap(at, length.get()).unwrap();
    }
    pages.iter().filter(|page| **page & 1 == 1).count()
}

#[test]
fn what_goes_past_the_page_cache_is_not_in_it_and_is_read_all_the_same() {
    let dir = TempDir::new().unwrap();
    let cache = open(&dir, 1 << 30, BOOT);
    let pages = |blocks: u64| (blocks * BLOCK_SIZE / 4096) as usize;
    let size = EXTENT_SIZE + 3 * BLOCK_SIZE + 77;
    let fill = |first, count, mode| fill_run_as(&cache, 1, size, first, count, mode).unwrap();
    if !cache.shared.abilities.direct {
        let strict = std::env::var_os("GRID_MOUNT_TEST_STRICT").is_some();
        assert!(!strict, "{} must be on ext4", dir.path().display());
        eprintln!(
            "SKIPPED: writing past the page cache: {} is not on ext4",
            dir.path().display()
        );
        return;
    }
    assert_eq!(fill(0, 16, WriteMode::Direct), 16);
    assert_eq!(resident(&cache, 1, size), 0);
    assert_eq!(fill(16, 16, WriteMode::Buffered), 0);
    let buffered = resident(&cache, 1, size);
    assert!((1..=pages(16)).contains(&buffered), "{buffered} pages");
    // Across the end of an extent, and over blocks that are there already.
    assert_eq!(fill(30, 36, WriteMode::Direct), 34);
    assert!(resident(&cache, 1, size) <= buffered);
    // The last block is no whole number of pages; and then memory that does not begin with one.
    assert_eq!(fill(66, 9, WriteMode::Direct), 1);
    let bytes = [truth(1, BlockNo(65), size), vec![0]].concat();
    let object = cache.object(id(1), size);
    object.evict_extent(crate::block::ExtentNo(1)).unwrap();
    let odd = usize::from(bytes.as_ptr().addr().is_multiple_of(4096));
    let mut moved = vec![0; odd];
    moved.extend(&bytes[..BLOCK_SIZE as usize]);
    let part = &[&moved[odd..]];
    let direct = object.fill_run(BlockNo(65), part, Purpose::Reader, WriteMode::Direct);
    assert_eq!(direct.unwrap(), 0);
    assert_eq!(fill(0, 68, WriteMode::Direct), 2);
    assert!((0..block_count(size)).all(|block| holds(&cache, 1, size, block)));
    whole(&object.seal().unwrap(), 1, size);
}

#[test]
fn a_block_read_from_memory_counts_as_read() {
    let size = 100 * EXTENT_SIZE;
    let range = EXTENT_SIZE - 10..EXTENT_SIZE + 10;
    // How many references the policy sees.
    let references = |look: &dyn Fn(&CachedObject)| {
        let dir = TempDir::new().unwrap();
        let cache = open(&dir, 1 << 30, BOOT);
        let object = cache.object(id(1), size);
        // Many, so that the first two are not what was used last.
        for extent in 0..100 {
            let block = BlockNo(extent * BLOCKS_PER_EXTENT + if extent == 0 { 63 } else { 0 });
            let bytes = truth(1, block, size);
            object.fill(block, &bytes, Purpose::Readahead).unwrap();
        }
        let before = cache.shared.policy.lock().clock();
        look(&object);
        cache.shared.hear();
        cache.shared.policy.lock().clock() - before
    };
    let read = references(&|object| {
        assert!(object.read(range.start, &mut [0; 20], Purpose::Reader).unwrap());
    });
    assert_eq!(read, 2);
    assert_eq!(references(&|object| object.was_read(&range)), read);
}
