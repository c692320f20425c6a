//! The blocks that arrived last, in memory, beside those on their way.
//!
//! Bridges the time between a block's arrival and its being in the cache, and stands in for a cache that is
//! absent, full or broken, so that sequential readers do not fetch a block twice. What was read and is in the cache
//! goes first, then what is in the cache (through the page cache, and then past it), then what was read and would not
//! be cached, then what will not be cached, then the rest, each in order of arrival: were blocks kept for being read, those fetched ahead would go before their reader comes. What is on its way
//! has its place here from the moment it is asked for, and other blocks go for it.

use std::{ops::Range, sync::Arc};

use bytes::Bytes;
use lru::LruCache;
use parking_lot::Mutex;

use crate::cache::{ObjectId, WriteMode};

/// 64 MiB.
const A_LITTLE_MOST: usize = 512;

type Key = (ObjectId, u64);

pub(super) struct Recent {
    /// Blocks, those on their way and those here.
    capacity: usize,
    beside: Beside,
    state: Mutex<State>,
}

/// What keeps blocks for longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Beside {
    Nothing,
    /// A cache that may have let go of a block before its reader comes: it is not much larger than this.
    SmallCache,
    Cache,
}

struct State {
    reserved: usize,
    /// Neither read nor in the cache.
    here: LruCache<Key, Bytes>,
    /// Not read, and the cache will not have them.
    lost: LruCache<Key, Bytes>,
    /// In the cache, and not read: of little use if the cache is large.
    written: LruCache<Key, Bytes>,
    /// In the cache, past the page cache, and not read: without these their reader would wait for the disk.
    direct: LruCache<Key, Bytes>,
    /// Read to their end, and not in the cache.
    read: LruCache<Key, Bytes>,
    /// Both, as far as there is a cache. Kept a little longer for those who follow closely.
    spent: LruCache<Key, Bytes>,
}

/// Room for blocks that are on their way.
pub(super) struct Reserved {
    recent: Arc<Recent>,
    blocks: usize,
}

impl Recent {
    pub fn new(blocks: usize, beside: Beside) -> Self {
        Self {
            capacity: blocks,
            beside,
            state: Mutex::new(State {
                reserved: 0,
                here: LruCache::unbounded(),
                lost: LruCache::unbounded(),
                written: LruCache::unbounded(),
                direct: LruCache::unbounded(),
                read: LruCache::unbounded(),
                spent: LruCache::unbounded(),
            }),
        }
    }

    /// How many blocks are kept though little speaks for it. Memory that is used again soon is still in the
    /// processor's caches.
    fn a_little(&self) -> usize {
        (self.capacity / 8).min(A_LITTLE_MOST)
    }

    /// Makes room. That no more is reserved than there is room for is the caller's to see to.
    pub fn reserve(self: &Arc<Self>, blocks: usize) -> Reserved {
        let _gone = {
            let mut state = self.state.lock();
            state.reserved += blocks;
            state.shrink(self.capacity)
        };
        Reserved {
            recent: Arc::clone(self),
            blocks,
        }
    }

    pub fn get(&self, object: ObjectId, block: u64) -> Option<Bytes> {
        self.state.lock().get(&(object, block))
    }

    /// Those of the blocks that are here, in runs of neighbours, each with its first.
    pub fn those_of(&self, object: ObjectId, blocks: Range<u64>) -> Vec<(u64, Vec<Bytes>)> {
        let state = self.state.lock();
        let mut runs: Vec<(u64, Vec<Bytes>)> = Vec::new();
        for block in blocks {
            match (state.get(&(object, block)), runs.last_mut()) {
                (Some(bytes), Some((first, run))) if *first + run.len() as u64 == block => run.push(bytes),
                (Some(bytes), _) => runs.push((block, vec![bytes])),
                (None, _) => {}
            }
        }
        runs
    }

    /// The cache has these. Those in no page cache are of use until they are read.
    pub fn written(&self, object: ObjectId, blocks: Range<u64>, mode: WriteMode) {
        let mut gone = Vec::new();
        let mut state = self.state.lock();
        for key in blocks.map(|block| (object, block)) {
            let unread = state.here.pop(&key).or_else(|| state.lost.pop(&key));
            if let Some(bytes) = unread {
                if mode == WriteMode::Direct {
                    gone.extend(state.direct.push(key, bytes));
                    continue;
                }
                gone.extend(state.written.push(key, bytes));
                if self.beside == Beside::Cache && state.written.len() > self.a_little() {
                    gone.extend(state.written.pop_lru());
                }
            } else if let Some(bytes) = state.read.pop(&key) {
                gone.extend(state.spend(key, bytes, self.a_little()));
            }
        }
        drop(state);
        drop(gone);
    }

    /// The cache does not take these, which a stream comes to, and then nobody else soon.
    pub fn lost(&self, object: ObjectId, blocks: Range<u64>) {
        let mut gone = Vec::new();
        let mut state = self.state.lock();
        for key in blocks.map(|block| (object, block)) {
            if let Some(bytes) = state.here.pop(&key) {
                gone.extend(state.lost.push(key, bytes));
            } else if let Some(bytes) = state.read.pop(&key) {
                gone.extend(state.spend(key, bytes, self.a_little()));
            }
        }
        drop(state);
        drop(gone);
    }

    /// Somebody read the block to its end.
    pub fn read(&self, object: ObjectId, block: u64) {
        let key = (object, block);
        let mut state = self.state.lock();
        let gone = if let Some(bytes) = state.take_for_reader(&key) {
            state.spend(key, bytes, self.a_little())
        } else if let Some(bytes) = state.here.pop(&key) {
            match self.beside {
                Beside::SmallCache | Beside::Cache => state.read.push(key, bytes),
                Beside::Nothing => state.spend(key, bytes, self.a_little()),
            }
        } else {
            None
        };
        drop(state);
        drop(gone);
    }
}

impl State {
    /// Takes a block that is kept for nobody but its reader.
    fn take_for_reader(&mut self, key: &Key) -> Option<Bytes> {
        let found = self.written.pop(key).or_else(|| self.direct.pop(key));
        found.or_else(|| self.lost.pop(key))
    }

    fn get(&self, key: &Key) -> Option<Bytes> {
        let found = [
            &self.here,
            &self.lost,
            &self.written,
            &self.direct,
            &self.read,
            &self.spent,
        ]
        .into_iter()
        .find_map(|blocks| blocks.peek(key));
        found.cloned()
    }

    /// What falls out is for dropping after the lock.
    fn shrink(&mut self, capacity: usize) -> Vec<(Key, Bytes)> {
        let room = capacity.saturating_sub(self.reserved);
        let mut gone = Vec::new();
        while self.kept() > room {
            let first = self.spent.pop_lru().or_else(|| self.written.pop_lru());
            let next = first.or_else(|| self.direct.pop_lru());
            let next = next.or_else(|| self.read.pop_lru());
            let next = next.or_else(|| self.lost.pop_lru());
            gone.extend(next.or_else(|| self.here.pop_lru()));
        }
        gone
    }

    /// What falls out is for dropping after the lock.
    fn spend(&mut self, key: Key, bytes: Bytes, most: usize) -> Option<(Key, Bytes)> {
        let before = self.spent.push(key, bytes);
        match self.spent.len() > most {
            true => self.spent.pop_lru(),
            false => before,
        }
    }

    fn kept(&self) -> usize {
        self.here.len()
            + self.lost.len()
            + self.written.len()
            + self.direct.len()
            + self.read.len()
            + self.spent.len()
    }
}

impl Reserved {
    /// One of the blocks has arrived.
    pub fn arrived(&mut self, object: ObjectId, block: u64, bytes: Bytes) {
        let _gone = {
            let mut state = self.recent.state.lock();
            let before = state.here.push((object, block), bytes);
            let kept = self.blocks.min(1);
            self.blocks -= kept;
            state.reserved -= kept;
            (state.shrink(self.recent.capacity), before)
        };
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        self.recent.state.lock().reserved -= self.blocks;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn object() -> ObjectId {
        ObjectId::derive("team", "store", "key", "content", 1 << 30, None)
    }

    fn count(recent: &Recent) -> usize {
        let state = recent.state.lock();
        state.reserved + state.kept()
    }

    #[test]
    fn what_is_of_least_use_goes_first() {
        let recent = Arc::new(Recent::new(8, Beside::SmallCache));
        let mut reserved = recent.reserve(6);
        for block in 0..6 {
            reserved.arrived(object(), block, Bytes::from(vec![block as u8]));
        }
        recent.written(object(), 5..6, WriteMode::Direct);
        recent.written(object(), 1..2, WriteMode::Buffered);
        recent.read(object(), 2);
        recent.read(object(), 3);
        recent.written(object(), 3..4, WriteMode::Buffered);
        let mut there: Vec<u64> = (0..6).collect();
        let mut room = vec![recent.reserve(2)];
        // Read and in the cache; in the cache, and the page cache, or not; read; and then in order of arrival.
        for next in [3, 1, 5, 2, 0, 4] {
            let found = there
                .iter()
                .filter(|block| recent.get(object(), **block).is_some());
            assert_eq!(found.count(), there.len());
            room.push(recent.reserve(1));
            assert!(recent.get(object(), next).is_none(), "{next} is still there");
            there.retain(|block| *block != next);
        }
    }

    #[test]
    fn what_the_cache_never_takes_is_kept_for_its_reader_and_no_longer() {
        let recent = Arc::new(Recent::new(64, Beside::Cache));
        let mut reserved = recent.reserve(64);
        for block in 0..64 {
            reserved.arrived(object(), block, Bytes::from_static(b"x"));
        }
        let there = |block: &u64| recent.get(object(), *block).is_some();
        recent.read(object(), 0);
        recent.lost(object(), 0..32);
        assert_eq!((0..64).filter(there).count(), 64);
        (1..64).for_each(|block| recent.read(object(), block));
        // A little of it.
        assert_eq!(Vec::from_iter((0..64).filter(there)), Vec::from_iter(24..64));
    }

    #[test]
    fn what_is_read_and_waits_for_the_cache_stays_as_long_as_there_is_room() {
        for (beside, kept) in [
            (Beside::Cache, 64),
            (Beside::SmallCache, 64),
            (Beside::Nothing, 8),
        ] {
            let recent = Arc::new(Recent::new(64, beside));
            let mut reserved = recent.reserve(64);
            for block in 0..64 {
                reserved.arrived(object(), block, Bytes::from_static(b"x"));
                recent.read(object(), block);
            }
            let there = (0..64).filter(|block| recent.get(object(), *block).is_some());
            assert_eq!(there.count(), kept);
        }
    }

    #[test]
    fn what_a_large_cache_has_in_the_page_cache_is_kept_a_little() {
        for (beside, mode, kept) in [
            (Beside::Cache, WriteMode::Buffered, 8),
            (Beside::Cache, WriteMode::Direct, 64),
            (Beside::SmallCache, WriteMode::Buffered, 64),
        ] {
            let recent = Arc::new(Recent::new(64, beside));
            let mut reserved = recent.reserve(64);
            for block in 0..64 {
                reserved.arrived(object(), block, Bytes::from_static(b"x"));
                recent.written(object(), block..block + 1, mode);
            }
            let there: Vec<u64> = (0..64)
                .filter(|block| recent.get(object(), *block).is_some())
                .collect();
            assert_eq!(there, Vec::from_iter(64 - kept..64));
        }
    }

    proptest! {
        #[test]
        fn no_more_is_kept_than_there_is_room_for(beside in 0usize..3, steps in prop::collection::vec((0u8..7, 0u64..32), 1..200)) {
            const ROOM: usize = 16;
            let recent = Arc::new(Recent::new(ROOM, [Beside::Nothing, Beside::SmallCache, Beside::Cache][beside]));
            let mut reserved: Vec<Reserved> = Vec::new();
            for (step, block) in steps {
                match step {
                    0 if reserved.iter().map(|r| r.blocks).sum::<usize>() + 4 <= ROOM => {
                        reserved.push(recent.reserve(4));
                    }
                    1 => if let Some(of) = reserved.iter_mut().find(|r| r.blocks > 0) {
                        of.arrived(object(), block, Bytes::from_static(b"x"));
                        prop_assert!(recent.get(object(), block).is_some());
                    },
                    2 => drop((!reserved.is_empty()).then(|| reserved.remove(0))),
                    3 => recent.read(object(), block),
                    4 => recent.written(object(), block..block + 3, WriteMode::Direct),
                    5 => recent.lost(object(), block..block + 3),
                    _ => recent.written(object(), block..block + 3, WriteMode::Buffered),
                }
                prop_assert!(count(&recent) <= ROOM);
            }
            reserved.clear();
            prop_assert_eq!(recent.state.lock().reserved, 0);
        }
    }
}
