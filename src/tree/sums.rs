//! Frames of the sums part: which bytes to fetch for some blocks, and how to trust them.
//!
//! The sums part of a 10 TB version is 1.3 GB, so nobody fetches it whole: the rows part holds the
//! digest of every 64 KiB frame of it, and a frame is verified alone. Must not know how bytes come.

use std::ops::Range;

use super::{
    ObjectNo, Tree, TreeError,
    format::{DIGEST_LEN, SUMS_PER_FRAME},
};
use crate::{
    block::block_count,
    digest::{BlockSum, Digest},
};

/// One frame of the sums part, and which of its sums were asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SumFrame {
    /// The frame's number: a cache of verified frames can be keyed by it.
    pub number: u64,
    /// Bytes of the sums part.
    pub range: Range<u64>,
    /// BLAKE3 of those bytes.
    pub digest: Digest,
    /// The blocks of the object, among those asked for, whose sums lie in this frame.
    pub blocks: Range<u64>,
    /// Where in the frame the sum of `blocks.start` lies, counted in sums.
    first: usize,
}

impl SumFrame {
    /// The sums of [`SumFrame::blocks`], from the frame's bytes as they arrived: verifies, then picks.
    pub fn sums(&self, bytes: &[u8]) -> Result<Vec<BlockSum>, TreeError> {
        let actual = Digest::of(bytes);
        if actual != self.digest {
            return Err(TreeError::WrongDigest {
                expected: self.digest,
                actual,
            });
        }
        self.pick(bytes)
    }

    /// The same for bytes that were verified before.
    pub fn pick(&self, bytes: &[u8]) -> Result<Vec<BlockSum>, TreeError> {
        let (sums, _) = bytes.as_chunks::<{ BlockSum::LEN }>();
        let count = usize::try_from(self.blocks.end.saturating_sub(self.blocks.start)).unwrap_or(usize::MAX);
        let picked = sums
            .get(self.first..)
            .and_then(|sums| sums.get(..count))
            .ok_or(TreeError::ShortFrame)?;
        Ok(picked.iter().map(|sum| BlockSum::from_bytes(*sum)).collect())
    }
}

impl Tree {
    /// Whether the version has a sum for every block (published data), or none (registered data).
    pub fn has_sums(&self) -> bool {
        self.layout().has_sums
    }

    /// Bytes of the sums part.
    pub fn sums_len(&self) -> u64 {
        self.layout().sum_count.saturating_mul(BlockSum::LEN as u64)
    }

    /// The frames that hold the sums of `blocks` of `object`, in order; blocks past the object's end
    /// are left out. Empty for a tree without sums.
    pub fn sum_frames(&self, object: ObjectNo, blocks: Range<u64>) -> Result<Vec<SumFrame>, TreeError> {
        let row = self.object_row(object)?;
        let layout = self.layout();
        let object_blocks = block_count(row.size.get());
        if !layout.has_sums {
            return Ok(Vec::new());
        }
        let bad = TreeError::Object {
            object,
            what: "its sums lie beyond the end",
        };
        let first_sum = row.first_sum.get();
        if first_sum
            .checked_add(object_blocks)
            .is_none_or(|end| end > layout.sum_count)
        {
            return Err(bad);
        }
        let (start, end) = (blocks.start.min(object_blocks), blocks.end.min(object_blocks));
        let mut frames = Vec::new();
        let mut block = start;
        while block < end {
            // No sum here can overflow: `first_sum + object_blocks` was checked above.
            let sum = first_sum + block;
            let number = sum / SUMS_PER_FRAME;
            let frame_sums = number * SUMS_PER_FRAME..((number + 1) * SUMS_PER_FRAME).min(layout.sum_count);
            let next = (frame_sums.end - first_sum).min(end);
            frames.push(SumFrame {
                number,
                range: frame_sums.start * BlockSum::LEN as u64..frame_sums.end * BlockSum::LEN as u64,
                digest: self.frame_digest(number)?,
                blocks: block..next,
                first: (sum - frame_sums.start) as usize,
            });
            block = next;
        }
        Ok(frames)
    }

    fn frame_digest(&self, number: u64) -> Result<Digest, TreeError> {
        usize::try_from(number)
            .ok()
            .and_then(|number| {
                self.section(&self.layout().sum_frames)
                    .as_chunks::<DIGEST_LEN>()
                    .0
                    .get(number)
            })
            .map(|digest| Digest::from_bytes(*digest))
            .ok_or(TreeError::Header {
                what: "a frame's digest is missing",
            })
    }
}
