//! The blocks that arrived last, in memory, beside those on their way.
//!
//! Bridges the time between a block's arrival and its being in the cache, and stands in for a cache that is
//! absent, full or broken, so that sequential readers do not fetch a block twice. Those go first that have
//! served: read to their end, or in the cache by now. Then in order of arrival: were blocks kept for being
//! read, those fetched ahead would go before their reader comes. What is on its way has its place here from
//! the moment it is asked for, and other blocks go for it.

use std::sync::Arc;

use bytes::Bytes;
use lru::LruCache;
use parking_lot::Mutex;

use crate::cache::ObjectId;

type Key = (ObjectId, u64);

pub(super) struct Recent {
    /// Blocks, those on their way and those here.
    capacity: usize,
    state: Mutex<State>,
}

struct State {
    reserved: usize,
    here: LruCache<Key, Bytes>,
    /// They have served. Kept a little longer for readers who looked into the cache just before, and for those
    /// who follow closely where there is no cache: a quarter of the capacity at most.
    served: LruCache<Key, Bytes>,
}

/// Room for blocks that are on their way.
pub(super) struct Reserved {
    recent: Arc<Recent>,
    blocks: usize,
}

impl Recent {
    pub fn new(blocks: usize) -> Self {
        Self {
            capacity: blocks,
            state: Mutex::new(State {
                reserved: 0,
                here: LruCache::unbounded(),
                served: LruCache::unbounded(),
            }),
        }
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
        let state = self.state.lock();
        let key = (object, block);
        state.here.peek(&key).or_else(|| state.served.peek(&key)).cloned()
    }

    /// The cache has the block, or somebody read it to its end.
    pub fn served(&self, object: ObjectId, block: u64) {
        let _gone = {
            let mut state = self.state.lock();
            let Some(bytes) = state.here.pop(&(object, block)) else {
                return;
            };
            let before = state.served.push((object, block), bytes);
            let too_many = state.served.len() > self.capacity / 4;
            (before, too_many.then(|| state.served.pop_lru()))
        };
    }
}

impl State {
    /// What falls out is for dropping after the lock.
    fn shrink(&mut self, capacity: usize) -> Vec<(Key, Bytes)> {
        let room = capacity.saturating_sub(self.reserved);
        let mut gone = Vec::new();
        while self.here.len() + self.served.len() > room {
            let oldest = self.served.pop_lru().or_else(|| self.here.pop_lru());
            gone.extend(oldest);
        }
        gone
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
        state.reserved + state.here.len() + state.served.len()
    }

    #[test]
    fn what_has_served_goes_first_and_what_arrived_first_goes_next() {
        let recent = Arc::new(Recent::new(4));
        let mut reserved = recent.reserve(4);
        for block in 0..4 {
            reserved.arrived(object(), block, Bytes::from(vec![block as u8]));
        }
        recent.served(object(), 2);
        assert!(recent.get(object(), 2).is_some(), "gone at once");
        let _one = recent.reserve(1);
        assert!(recent.get(object(), 2).is_none());
        let _two = recent.reserve(1);
        assert!(recent.get(object(), 0).is_none());
        assert_eq!(recent.get(object(), 1).as_deref(), Some(&[1][..]));
    }

    proptest! {
        #[test]
        fn no_more_is_kept_than_there_is_room_for(steps in prop::collection::vec((0u8..4, 0u64..32), 1..200)) {
            const ROOM: usize = 16;
            let recent = Arc::new(Recent::new(ROOM));
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
                    _ => recent.served(object(), block),
                }
                prop_assert!(count(&recent) <= ROOM);
            }
            reserved.clear();
            prop_assert_eq!(recent.state.lock().reserved, 0);
        }
    }
}
