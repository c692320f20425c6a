//! The blocks that arrived last, in memory.
//!
//! Bridges the time between a block's arrival and its being in the cache, and stands in for a cache that is
//! absent, full or broken, so that sequential readers do not fetch a block twice. In order of arrival: were blocks kept for being read,
//! those fetched ahead would go before their reader comes.

use bytes::Bytes;
use lru::LruCache;
use parking_lot::Mutex;

use crate::{block::BLOCK_SIZE, cache::ObjectId};

pub(super) struct Recent {
    blocks: Mutex<LruCache<(ObjectId, u64), Bytes>>,
}

impl Recent {
    pub fn new(bytes: u64) -> Self {
        let blocks = usize::try_from(bytes / BLOCK_SIZE).unwrap_or(usize::MAX);
        let capacity = std::num::NonZeroUsize::new(blocks).unwrap_or(std::num::NonZeroUsize::MIN);
        Self {
            blocks: Mutex::new(LruCache::new(capacity)),
        }
    }

    pub fn insert(&self, object: ObjectId, block: u64, bytes: Bytes) {
        // What falls out is dropped after the lock.
        let _old = self.blocks.lock().push((object, block), bytes);
    }

    pub fn get(&self, object: ObjectId, block: u64) -> Option<Bytes> {
        self.blocks.lock().peek(&(object, block)).cloned()
    }
}
