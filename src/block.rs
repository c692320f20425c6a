//! The geometry of cached data: blocks of 128 KiB, extents of 64 blocks.
//!
//! Owns the arithmetic between byte ranges, blocks and extents. Knows nothing of where they lie.

use std::ops::Range;

/// 128 KiB: the smallest thing fetched, checksummed and marked present. Equal to the kernel's
/// default readahead, so that one readahead request is one block.
pub const BLOCK_SIZE: u64 = 128 << 10;
/// Blocks in an extent: presence in an extent is one `u64`.
pub const BLOCKS_PER_EXTENT: u64 = 64;
/// 8 MiB: the largest GET and the unit of eviction.
pub const EXTENT_SIZE: u64 = BLOCK_SIZE * BLOCKS_PER_EXTENT;

/// The index of a block within its object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockNo(pub u64);

/// The index of an extent within its object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ExtentNo(pub u64);

impl BlockNo {
    /// The block that holds the byte at `offset`.
    pub fn containing(offset: u64) -> Self {
        Self(offset / BLOCK_SIZE)
    }

    pub fn extent(self) -> ExtentNo {
        ExtentNo(self.0 / BLOCKS_PER_EXTENT)
    }

    /// The bytes of this block in an object of `object_size` bytes (the last one is short;
    /// one past the end is empty).
    pub fn byte_range(self, object_size: u64) -> Range<u64> {
        let start = self.0.saturating_mul(BLOCK_SIZE).min(object_size);
        start..start.saturating_add(BLOCK_SIZE).min(object_size)
    }
}

impl ExtentNo {
    /// The bytes of this extent in an object of `object_size` bytes.
    pub fn byte_range(self, object_size: u64) -> Range<u64> {
        let start = self.0.saturating_mul(EXTENT_SIZE).min(object_size);
        start..start.saturating_add(EXTENT_SIZE).min(object_size)
    }
}

/// How many blocks an object of `size` bytes has.
pub fn block_count(size: u64) -> u64 {
    size.div_ceil(BLOCK_SIZE)
}

/// The block numbers that cover a byte range; empty for an empty range.
pub fn blocks_covering(range: &Range<u64>) -> Range<u64> {
    if range.is_empty() {
        return 0..0;
    }
    range.start / BLOCK_SIZE..range.end.div_ceil(BLOCK_SIZE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_clip_at_the_end_of_the_object() {
        assert_eq!(BlockNo(1).byte_range(BLOCK_SIZE + 5), BLOCK_SIZE..BLOCK_SIZE + 5);
        assert!(BlockNo(7).byte_range(10).is_empty());
        assert!(BlockNo(u64::MAX).byte_range(10).is_empty());
        assert_eq!(block_count(0), 0);
        assert_eq!(block_count(BLOCK_SIZE), 1);
        assert_eq!(blocks_covering(&(BLOCK_SIZE - 1..BLOCK_SIZE + 1)), 0..2);
        assert_eq!(blocks_covering(&(9..9)), 0..0);
    }
}
