//! How far apart the uses of a block are: how large a cache would have to be.
//!
//! The distance of a reuse is the number of other blocks used since the last use of the same one; a cache of
//! that many blocks would still have had it. Kept for a sample of the blocks, chosen by a hash of their
//! place and of a fixed size, whatever the data set's size (after SHARDS, Waldspurger et al., FAST 2015).
//! Only what reaches the agent is seen: not what the kernel answers from its page cache or by passthrough.

use std::{
    collections::{BinaryHeap, HashMap},
    ops::Range,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

use parking_lot::Mutex;

use crate::{
    block::{BLOCK_SIZE, blocks_covering},
    tree::ObjectNo,
};

/// Blocks in the sample.
const SAMPLE: usize = 4096;
/// Positions in time before the sample is renumbered.
const SLOTS: usize = 4 * SAMPLE;
/// A reuse distance of up to 2^40 blocks, in quarters of a power of two.
const BUCKETS: usize = 160;
/// The suggested size holds so much of what was used again.
const ENOUGH: f64 = 0.95;
/// `u64::MAX` as the whole space of hashes.
const ALL_HASHES: f64 = 18_446_744_073_709_551_616.0;

pub(super) struct Reuse {
    /// Blocks with a smaller hash are in the sample.
    threshold: AtomicU64,
    sample: Mutex<Sample>,
}

/// What was seen so far.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Seen {
    /// Bytes of different blocks that were used: exact while they fit the sample, an estimate beyond.
    pub distinct_bytes: u64,
    /// Holds nearly all of what was used again; `None` if nothing was.
    pub suggested_bytes: Option<u64>,
}

#[derive(Default)]
struct Sample {
    /// By hash, when it was used last.
    last: HashMap<u64, usize>,
    /// The same hashes, the largest first: it leaves when there are too many.
    largest: BinaryHeap<u64>,
    /// A mark at each time that is some block's last use.
    marks: Marks,
    now: usize,
    distances: Vec<f64>,
}

impl Default for Reuse {
    fn default() -> Self {
        Self {
            threshold: AtomicU64::new(u64::MAX),
            sample: Mutex::default(),
        }
    }
}

impl Reuse {
    /// The blocks that cover `range` of the object are used, in this order.
    pub fn used(&self, object: ObjectNo, range: &Range<u64>) {
        for block in blocks_covering(range) {
            let hash = hash(object, block);
            if hash < self.threshold.load(Relaxed) {
                let mut sample = self.sample.lock();
                if let Some(threshold) = sample.used(hash, self.threshold.load(Relaxed)) {
                    self.threshold.store(threshold, Relaxed);
                }
            }
        }
    }

    pub fn seen(&self) -> Seen {
        let sample = self.sample.lock();
        let rate = rate(self.threshold.load(Relaxed));
        let distinct = sample.last.len() as f64 / rate;
        let bytes = |blocks: f64| (blocks * BLOCK_SIZE as f64).round() as u64;
        let distinct_bytes = bytes(distinct);
        let all: f64 = sample.distances.iter().sum();
        let mut held = 0.0;
        let enough = sample.distances.iter().position(|weight| {
            held += weight;
            held >= all * ENOUGH
        });
        Seen {
            distinct_bytes,
            suggested_bytes: enough
                .filter(|_| all > 0.0)
                // The upper end of its bucket; more than everything is never needed.
                .map(|bucket| bytes(((bucket + 1) as f64 / 4.0).exp2().ceil()).min(distinct_bytes)),
        }
    }
}

impl Sample {
    /// The threshold from now on, when it changes.
    fn used(&mut self, hash: u64, threshold: u64) -> Option<u64> {
        if hash >= threshold {
            return None;
        }
        if self.now + 1 >= SLOTS {
            self.renumber();
        }
        self.now += 1;
        match self.last.insert(hash, self.now) {
            Some(before) => {
                let between = self.marks.up_to(self.now) - self.marks.up_to(before);
                self.marks.add(before, -1);
                self.marks.add(self.now, 1);
                // Used twice in a row: part of one use.
                if between > 0 {
                    let distance = f64::from(between) / rate(threshold);
                    let bucket = ((distance.log2() * 4.0) as usize).min(BUCKETS - 1);
                    self.distances.resize(BUCKETS, 0.0);
                    self.distances[bucket] += 1.0 / rate(threshold);
                }
                None
            }
            None => {
                self.marks.add(self.now, 1);
                self.largest.push(hash);
                if self.last.len() <= SAMPLE {
                    return None;
                }
                let largest = self.largest.pop()?;
                if let Some(time) = self.last.remove(&largest) {
                    self.marks.add(time, -1);
                }
                Some(largest)
            }
        }
    }

    fn renumber(&mut self) {
        let mut order: Vec<(usize, u64)> = self.last.iter().map(|(hash, time)| (*time, *hash)).collect();
        order.sort_unstable();
        self.marks = Marks::default();
        self.now = 0;
        for (_, hash) in order {
            self.now += 1;
            self.last.insert(hash, self.now);
            self.marks.add(self.now, 1);
        }
    }
}

/// Counts of marks with sums of prefixes (a Fenwick tree), over the times 1 to [`SLOTS`] − 1.
#[derive(Default)]
struct Marks(Vec<i32>);

impl Marks {
    fn add(&mut self, mut time: usize, change: i32) {
        self.0.resize(SLOTS, 0);
        while time < SLOTS {
            self.0[time] += change;
            time += time & time.wrapping_neg();
        }
    }

    fn up_to(&self, mut time: usize) -> i32 {
        let mut sum = 0;
        while time > 0 {
            sum += self.0.get(time).copied().unwrap_or(0);
            time &= time - 1;
        }
        sum
    }
}

fn rate(threshold: u64) -> f64 {
    if threshold == u64::MAX {
        1.0
    } else {
        (threshold as f64 / ALL_HASHES).max(f64::MIN_POSITIVE)
    }
}

/// SplitMix64's last step: neighbours get hashes that have nothing in common.
fn hash(object: ObjectNo, block: u64) -> u64 {
    let mut z = (u64::from(object.0) << 40)
        .wrapping_add(block)
        .wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use rand::{RngExt as _, SeedableRng as _, rngs::StdRng, seq::SliceRandom as _};

    use super::*;

    fn touch(reuse: &Reuse, block: u64) {
        let start = block * BLOCK_SIZE;
        reuse.used(ObjectNo((block / 100) as u32), &(start..start + BLOCK_SIZE));
    }

    fn close(found: u64, blocks: u64, tolerance: f64) {
        let found = found as f64 / BLOCK_SIZE as f64;
        let off = (found / blocks as f64 - 1.0).abs();
        assert!(off <= tolerance, "{found} blocks, expected about {blocks}");
    }

    #[test]
    fn what_is_read_once_needs_no_cache() {
        let reuse = Reuse::default();
        (0..50_000).for_each(|block| {
            touch(&reuse, block);
            // In pieces: still one use.
            touch(&reuse, block);
        });
        let seen = reuse.seen();
        assert_eq!(seen.suggested_bytes, None);
        close(seen.distinct_bytes, 50_000, 0.05);
    }

    /// Epochs in new random orders: the mean distance is about half of all, some are nearly all.
    #[test]
    fn epochs_over_more_than_the_sample_suggest_about_the_data_set() {
        let mut random = StdRng::seed_from_u64(1);
        let reuse = Reuse::default();
        let mut order: Vec<u64> = (0..40_000).collect();
        for _ in 0..4 {
            order.shuffle(&mut random);
            order.iter().for_each(|block| touch(&reuse, *block));
        }
        let seen = reuse.seen();
        close(seen.distinct_bytes, 40_000, 0.05);
        close(seen.suggested_bytes.unwrap(), 40_000, 0.15);
        assert!(reuse.sample.lock().last.len() <= SAMPLE);
    }

    /// Against the plain definition, on a working set much smaller than what is streamed past once.
    #[test]
    fn a_working_set_is_told_from_a_stream() {
        let mut random = StdRng::seed_from_u64(2);
        let reuse = Reuse::default();
        let mut exact: Vec<u64> = Vec::new();
        let mut stack: Vec<u64> = Vec::new();
        for step in 0..30_000_u64 {
            // Nine of ten from 1,000 blocks, the rest never again.
            let block = match random.random_range(0..10) {
                0 => 100_000 + step,
                _ => random.random_range(0..1_000),
            };
            touch(&reuse, block);
            if let Some(at) = stack.iter().rposition(|other| *other == block) {
                let distance = (stack.len() - at) as u64;
                if distance > 1 {
                    exact.push(distance);
                }
                stack.remove(at);
            }
            stack.push(block);
        }
        exact.sort_unstable();
        let enough = exact[exact.len() * 95 / 100];
        close(reuse.seen().suggested_bytes.unwrap(), enough, 0.3);
    }
}
