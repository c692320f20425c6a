//! Misses: from (object, range) to bytes, through the cache, from the origin.
//!
//! Owns single-flight, coalescing, priorities, readahead, warm-up, retries and the memory budget.
//! Must not know FUSE or trees.

use std::{ops::Range, sync::Arc};

use bytes::Bytes;

use crate::{
    cache::{Cache, CachedObject},
    digest::BlockSum,
    origin::{Pin, Store},
};

/// The bounds of one agent's fetching.
#[derive(Clone, Debug)]
pub struct FetchConfig {
    /// Connections per origin.
    pub connections: usize,
    /// Bytes in flight and not yet handed over, all readers together.
    pub memory_limit: u64,
    /// No reader waits longer than this for one request.
    pub read_deadline: std::time::Duration,
    /// Largest readahead window of one stream, bytes.
    pub max_readahead: u64,
}

/// What must be known of an object to fetch it.
pub struct Source {
    pub store: Store,
    pub key: String,
    pub pin: Pin,
    pub size: u64,
    /// The sum of each block, where the data was published: looked up when a block arrives.
    pub sums: Option<Arc<dyn BlockSums>>,
}

/// The sums of one object's blocks; may itself have to be fetched.
#[async_trait::async_trait]
pub trait BlockSums: Send + Sync {
    async fn sums(&self, blocks: Range<u64>) -> Result<Vec<BlockSum>, FetchError>;
}

/// One open object: its source, its cached blocks, its fetches in flight.
pub struct FetchObject {
    // source: Source, cached: Arc<CachedObject>, …
}

/// Readahead state of one inode: several streams.
pub struct Streams {}

pub struct Fetcher {}

#[allow(unused_variables)]
impl Fetcher {
    pub fn new(config: FetchConfig, cache: Option<Arc<Cache>>, runtime: tokio::runtime::Handle) -> Arc<Self> {
        todo!()
    }
    /// The object, shared with whoever else has it open (keyed by its cache identity within `domain`).
    pub fn open(self: &Arc<Self>, domain: &str, source: Source) -> Arc<FetchObject> {
        todo!()
    }
    /// The hit path: `Some` when every byte is in the cache. No await, no task, no lock held across I/O.
    pub fn read_cached(&self, object: &FetchObject, range: Range<u64>, buf: &mut Vec<u8>) -> Option<()> {
        todo!()
    }
    /// The miss path. Ends within `read_deadline`.
    pub async fn read(&self, object: &Arc<FetchObject>, range: Range<u64>) -> Result<Bytes, FetchError> {
        todo!()
    }
    /// Told of every read (hit or miss), so that it may fetch ahead. `window` limits it to the file's
    /// bytes within the object.
    pub fn advise(
        self: &Arc<Self>,
        object: &Arc<FetchObject>,
        streams: &Streams,
        range: Range<u64>,
        window: Range<u64>,
    ) {
        todo!()
    }
}

#[allow(dead_code)]
fn contract(_: Arc<CachedObject>) {}

/// Cloneable: one failed GET fails every reader that waited for it.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FetchError {
    #[error("no answer within {0:?}")]
    Deadline(std::time::Duration),
}
