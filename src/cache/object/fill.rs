//! Storing blocks: data, then slots, then presence in memory, so that what is present is whole.

use std::ops::Range;

use super::{CachedObject, Files, LARGEST, mask};
use crate::{
    block::{BLOCK_SIZE, BLOCKS_PER_EXTENT, BlockNo},
    cache::{CacheError, Purpose, checksum::crc32c, disk, extent::Extent, policy::Unit, slot::Slot},
};

/// How bytes get to the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteMode {
    /// Through the page cache: it takes bursts that the disk does not, and who reads the bytes soon finds them there.
    Buffered,
    /// Past it, where the file system and the place of the bytes allow: it costs the processor less, much less where
    /// memory is slow to come by, and leaves the page cache to others. At the disk's pace, and read from the disk.
    Direct,
}

impl CachedObject {
    /// Stores one whole block. Never blocks on eviction of other blocks longer than it must; errors mean
    /// "not cached" and are for counting, never for failing a read.
    pub fn fill(&self, block: BlockNo, bytes: &[u8], purpose: Purpose) -> Result<(), CacheError> {
        self.fill_run(block, &[bytes], purpose, WriteMode::Buffered)
            .map(drop)
    }

    /// Stores whole neighbouring blocks, `first` and those after it, with fewer system calls than one by one.
    /// After an error any of them may have been stored. How many were written past the page cache.
    pub fn fill_run(
        &self,
        first: BlockNo,
        blocks: &[&[u8]],
        purpose: Purpose,
        mode: WriteMode,
    ) -> Result<u64, CacheError> {
        for (block, bytes) in (first.0..).map(BlockNo).zip(blocks) {
            let range = block.byte_range(self.size);
            if range.is_empty() || range.end - range.start != bytes.len() as u64 {
                return Err(CacheError::WrongLength {
                    block,
                    len: bytes.len(),
                });
            }
        }
        if self.size > LARGEST {
            return Err(CacheError::TooLarge { size: self.size });
        }
        let (mut first, mut rest, mut direct) = (first, blocks, 0);
        // All that a small cache holds is not to go for one run.
        let most = (self.shared.config.max_bytes / 8 / BLOCK_SIZE).clamp(1, BLOCKS_PER_EXTENT);
        while !rest.is_empty() {
            let count = most.min(BLOCKS_PER_EXTENT - first.0 % BLOCKS_PER_EXTENT);
            let (part, after) = rest.split_at(rest.len().min(count as usize));
            let outcome = self.fill_extent(first, part, purpose, mode);
            let concerned = match outcome {
                Ok(_) => part.len(),
                Err(_) => rest.len(),
            };
            self.shared.filled(&outcome, concerned);
            direct += outcome?;
            rest = after;
            first = BlockNo(first.0 + part.len() as u64);
        }
        Ok(direct)
    }

    /// Blocks of one extent.
    fn fill_extent(
        &self,
        first: BlockNo,
        blocks: &[&[u8]],
        purpose: Purpose,
        mode: WriteMode,
    ) -> Result<u64, CacheError> {
        let number = first.extent();
        let range = self.bytes_of(first, blocks.len());
        self.shared.admit(range.end - range.start)?;
        let files = self.files_or_create()?;
        let extent = files.extent(number);
        let Some(_pin) = extent.pin() else {
            return Err(CacheError::Busy);
        };
        if !self.load(&files, extent, number) {
            return Err(CacheError::Busy);
        }
        if files.sealed.is_set() {
            return Ok(0);
        }
        let claim = extent.claim(mask(&range));
        let mut direct = 0;
        for run in runs(claim.blocks) {
            let from = (u64::from(run.start) - first.0 % BLOCKS_PER_EXTENT) as usize;
            let part = &blocks[from..from + run.len()];
            direct += self.store(
                &files,
                extent,
                BlockNo(first.0 + from as u64),
                part,
                purpose,
                mode,
            )?;
        }
        Ok(direct)
    }

    /// Absent blocks of a pinned extent, claimed.
    fn store(
        &self,
        files: &Files,
        extent: &Extent,
        first: BlockNo,
        blocks: &[&[u8]],
        purpose: Purpose,
        mode: WriteMode,
    ) -> Result<u64, CacheError> {
        let range = self.bytes_of(first, blocks.len());
        let written = self.write(files, first, blocks, mode);
        let before = match written {
            Ok(_) => {
                files.wrote(range.end - range.start);
                extent.publish(mask(&range))
            }
            Err(_) => {
                // Part of it may lie there: it is counted, and below made known, so that it can be evicted.
                files.count();
                extent.present()
            }
        };
        if before == 0 {
            let number = first.extent();
            self.shared
                .arrived(Unit::extent(self.id, number), self.extent_bytes(number), purpose);
        }
        written
    }

    fn write(
        &self,
        files: &Files,
        first: BlockNo,
        blocks: &[&[u8]],
        mode: WriteMode,
    ) -> Result<u64, CacheError> {
        let context = |error| CacheError::io("writing a block", error);
        let mut words = [0; BLOCKS_PER_EXTENT as usize];
        let words = &mut words[..blocks.len()];
        let range = self.bytes_of(first, blocks.len());
        if blocks.len() > 1 && self.shared.abilities.reserve {
            // What this could not do, the write will tell of.
            let _ = disk::reserve(&files.data, range.clone());
        }
        for (word, bytes) in words.iter_mut().zip(blocks) {
            *word = u64::from(crc32c(bytes));
        }
        let direct = match mode {
            WriteMode::Direct => files.direct(),
            WriteMode::Buffered => None,
        };
        let past = disk::write_parts_at(&files.data, direct, blocks, range.start).map_err(context)?;
        // Held for as short as can be: an epoch ends when nobody holds it.
        let writing = self.shared.epochs.write();
        for (word, block) in words.iter_mut().zip((first.0..).map(BlockNo)) {
            let slot = Slot {
                sum: *word as u32,
                epoch: writing.epoch,
            };
            *word = slot.encode(&self.id, block);
        }
        files
            .sidecar
            .set_slots(&files.data, first, words)
            .map_err(context)?;
        Ok(past as u64)
    }

    fn bytes_of(&self, first: BlockNo, count: usize) -> Range<u64> {
        let last = BlockNo(first.0 + (count as u64).saturating_sub(1));
        first.byte_range(self.size).start..last.byte_range(self.size).end
    }
}

/// The runs of ones in a word, lowest first.
fn runs(mut word: u64) -> impl Iterator<Item = Range<u32>> {
    std::iter::from_fn(move || {
        let start = word.trailing_zeros();
        let end = start + word.checked_shr(start)?.trailing_ones();
        word &= u64::MAX.checked_shl(end).unwrap_or(0);
        Some(start..end)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_the_ones_in_order() {
        let told = |word| runs(word).collect::<Vec<_>>();
        assert_eq!(told(0), []);
        assert_eq!(told(u64::MAX), Vec::from_iter(std::iter::once(0..64)));
        assert_eq!(told(0b1101_1000), [3..5, 6..8]);
        assert_eq!(told(1 << 63 | 1), [0..1, 63..64]);
    }
}
