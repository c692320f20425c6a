//! Counters of one fetcher, and of all that belong together.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering::Relaxed},
};

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
    /// Blocks cached past the page cache.
    pub fills_direct: u64,
    /// Blocks not cached: the disk was slower than the network, or failed.
    pub fills_dropped: u64,
    pub fills_failed: u64,
    pub errors: u64,
    /// All readers' waiting, in nanoseconds.
    pub wait_nanos: u64,
    /// What the last failed read died of, with its key.
    pub last_error: Option<String>,
    /// When that was.
    pub last_error_at: Option<jiff::Timestamp>,
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
    pub fills_direct: AtomicU64,
    pub fills_dropped: AtomicU64,
    pub fills_failed: AtomicU64,
    pub errors: AtomicU64,
    pub wait_nanos: AtomicU64,
    last_error: Mutex<Option<(jiff::Timestamp, String)>>,
}

/// The accounts that an agent's fetching is split into: nothing that was counted is lost when one is closed.
#[derive(Debug, Default)]
pub(super) struct Accounts {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    open: Vec<Arc<Tally>>,
    /// What the closed ones had counted.
    closed: FetchStats,
}

impl Accounts {
    pub fn open(&self) -> Arc<Tally> {
        let tally = Arc::new(Tally::default());
        self.state.lock().open.push(Arc::clone(&tally));
        tally
    }

    /// Must be called when nobody counts in it any more.
    pub fn close(&self, tally: &Arc<Tally>) {
        let mut state = self.state.lock();
        state.open.retain(|open| !Arc::ptr_eq(open, tally));
        state.closed.add(tally.read());
    }

    /// Everything that was ever counted in them.
    pub fn read(&self) -> FetchStats {
        let state = self.state.lock();
        let mut sum = state.closed.clone();
        state.open.iter().for_each(|tally| sum.add(tally.read()));
        sum
    }
}

impl FetchStats {
    pub(super) fn add(&mut self, other: Self) {
        self.hits += other.hits;
        self.misses += other.misses;
        self.cache_bytes += other.cache_bytes;
        self.origin_bytes += other.origin_bytes;
        self.gets += other.gets;
        self.retries += other.retries;
        self.hedges += other.hedges;
        self.slow_downs += other.slow_downs;
        self.readahead_blocks += other.readahead_blocks;
        self.readahead_used += other.readahead_used;
        self.corrupt_blocks += other.corrupt_blocks;
        self.fills_direct += other.fills_direct;
        self.fills_dropped += other.fills_dropped;
        self.fills_failed += other.fills_failed;
        self.errors += other.errors;
        self.wait_nanos += other.wait_nanos;
        if other.last_error_at > self.last_error_at {
            self.last_error_at = other.last_error_at;
            self.last_error = other.last_error;
        }
    }
}

impl Tally {
    pub fn failed(&self, key: &str, error: &FetchError) {
        self.errors.fetch_add(1, Relaxed);
        tracing::warn!(key, %error, "a read failed");
        *self.last_error.lock() = Some((jiff::Timestamp::now(), format!("{key}: {error}")));
    }

    pub fn read(&self) -> FetchStats {
        let get = |counter: &AtomicU64| counter.load(Relaxed);
        let (last_error_at, last_error) = self.last_error.lock().clone().unzip();
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
            fills_direct: get(&self.fills_direct),
            fills_dropped: get(&self.fills_dropped),
            fills_failed: get(&self.fills_failed),
            errors: get(&self.errors),
            wait_nanos: get(&self.wait_nanos),
            last_error,
            last_error_at,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_was_counted_is_lost_when_an_account_is_closed() {
        let accounts = Accounts::default();
        let (one, two) = (accounts.open(), accounts.open());
        one.gets.fetch_add(3, Relaxed);
        two.gets.fetch_add(4, Relaxed);
        one.failed("early", &FetchError::Stopped);
        two.failed("late", &FetchError::Stopped);
        let before = accounts.read();
        assert_eq!((before.gets, before.errors), (7, 2));
        accounts.close(&two);
        let after = accounts.read();
        assert_eq!(after, before);
        assert!(after.last_error.is_some_and(|error| error.starts_with("late")));
        assert_eq!(one.read().gets, 3);
    }
}
