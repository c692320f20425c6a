//! Counters of one fetcher.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use parking_lot::Mutex;

use super::FetchError;

#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct FetchStats {
    /// Reads answered without the origin.
    pub hits: u64,
    /// Blocks asked of the origin.
    pub misses: u64,
    pub cache_bytes: u64,
    pub origin_bytes: u64,
    pub gets: u64,
    pub retries: u64,
    pub hedges: u64,
    pub slow_downs: u64,
    /// Blocks fetched ahead, and those of them that somebody read.
    pub readahead_blocks: u64,
    pub readahead_used: u64,
    /// Of those, blocks of objects that were closed before anybody read them.
    pub readahead_unused: u64,
    pub corrupt_blocks: u64,
    /// Blocks not cached: the disk was slower than the network, or failed.
    pub fills_dropped: u64,
    pub fills_failed: u64,
    pub errors: u64,
    /// All readers' waiting, in nanoseconds.
    pub wait_nanos: u64,
    /// What the last failed read died of, with its key.
    pub last_error: Option<String>,
}

#[derive(Debug, Default)]
pub(super) struct Tally {
    pub hits: AtomicU64,
    pub misses: AtomicU64,
    pub cache_bytes: AtomicU64,
    pub origin_bytes: AtomicU64,
    pub gets: AtomicU64,
    pub retries: AtomicU64,
    pub hedges: AtomicU64,
    pub slow_downs: AtomicU64,
    pub readahead_blocks: AtomicU64,
    pub readahead_used: AtomicU64,
    pub readahead_unused: AtomicU64,
    pub corrupt_blocks: AtomicU64,
    pub fills_dropped: AtomicU64,
    pub fills_failed: AtomicU64,
    pub errors: AtomicU64,
    pub wait_nanos: AtomicU64,
    last_error: Mutex<Option<String>>,
}

impl Tally {
    pub fn failed(&self, key: &str, error: &FetchError) {
        self.errors.fetch_add(1, Relaxed);
        tracing::warn!(key, %error, "a read failed");
        *self.last_error.lock() = Some(format!("{key}: {error}"));
    }

    pub fn read(&self) -> FetchStats {
        let get = |counter: &AtomicU64| counter.load(Relaxed);
        FetchStats {
            hits: get(&self.hits),
            misses: get(&self.misses),
            cache_bytes: get(&self.cache_bytes),
            origin_bytes: get(&self.origin_bytes),
            gets: get(&self.gets),
            retries: get(&self.retries),
            hedges: get(&self.hedges),
            slow_downs: get(&self.slow_downs),
            readahead_blocks: get(&self.readahead_blocks),
            readahead_used: get(&self.readahead_used),
            readahead_unused: get(&self.readahead_unused),
            corrupt_blocks: get(&self.corrupt_blocks),
            fills_dropped: get(&self.fills_dropped),
            fills_failed: get(&self.fills_failed),
            errors: get(&self.errors),
            wait_nanos: get(&self.wait_nanos),
            last_error: self.last_error.lock().clone(),
        }
    }
}
