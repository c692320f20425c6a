//! Misses: from (object, range) to bytes, through the cache, from the origin.
//!
//! Owns single-flight, coalescing, priorities, readahead, retries and the memory budget.
//! Must not know FUSE or trees.

mod error;
mod flight;
mod streams;

use std::{
    collections::HashMap,
    num::NonZeroUsize,
    ops::Range,
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};
use lru::LruCache;
use parking_lot::Mutex;
use tokio::sync::{Semaphore, watch};

use self::flight::Run;
pub use self::{error::FetchError, streams::Streams};
use crate::{
    block::{BLOCK_SIZE, BLOCKS_PER_EXTENT, BlockNo, blocks_covering},
    cache::{Cache, CachedObject, ObjectId, Purpose},
    digest::{BlockSum, Digest},
    origin::{Pin, Store},
};

/// The bounds of one agent's fetching.
#[derive(Clone, Debug)]
pub struct FetchConfig {
    /// Requests under way, all origins together.
    pub connections: usize,
    /// Bytes in flight and not yet handed over, all readers together.
    pub memory_limit: u64,
    /// No reader waits longer than this for one request.
    pub read_deadline: Duration,
    /// Largest readahead window of one stream, bytes.
    pub max_readahead: u64,
}

impl Default for FetchConfig {
    fn default() -> Self {
        Self {
            connections: 64,
            memory_limit: 512 << 20,
            read_deadline: Duration::from_secs(60),
            max_readahead: 64 << 20,
        }
    }
}

/// What must be known of an object to fetch it.
pub struct Source {
    pub store: Store,
    pub key: String,
    pub pin: Pin,
    pub size: u64,
    pub digest: Option<Digest>,
    /// The sum of each block, where the data was published: looked up when a block arrives.
    pub sums: Option<Arc<dyn BlockSums>>,
}

/// The sums of one object's blocks; may itself have to be fetched.
#[async_trait::async_trait]
pub trait BlockSums: Send + Sync {
    async fn sums(&self, blocks: Range<u64>) -> Result<Vec<BlockSum>, FetchError>;
}

/// Who wants a block: the lower never holds the higher back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Priority {
    Waited,
    Readahead,
}

/// A block on its way.
#[derive(Clone, Debug)]
enum Block {
    Pending,
    Ready(Bytes),
    Failed(FetchError),
}

/// One open object: its source, its cached blocks, its fetches in flight.
pub struct FetchObject {
    id: ObjectId,
    source: Source,
    cached: Option<Arc<CachedObject>>,
    /// Blocks on their way, until they are in the cache or have failed.
    flights: Mutex<HashMap<u64, watch::Receiver<Block>>>,
}

impl FetchObject {
    /// How many bytes of `range` lie in blocks that the cache holds.
    pub fn cached_bytes(&self, range: Range<u64>) -> u64 {
        let Some(cached) = &self.cached else { return 0 };
        let absent: u64 = cached
            .missing(blocks_covering(&range))
            .into_iter()
            .map(|block| {
                let bytes = block.byte_range(self.source.size);
                bytes.end.min(range.end).saturating_sub(bytes.start.max(range.start))
            })
            .sum();
        (range.end - range.start).saturating_sub(absent)
    }

    /// The object's place in the cache.
    pub fn cached(&self) -> Option<&Arc<CachedObject>> {
        self.cached.as_ref()
    }

    pub fn size(&self) -> u64 {
        self.source.size
    }
}

/// Counters since the start, for `status` and metrics.
#[derive(Clone, Debug, Default)]
pub struct FetchStats {
    pub bytes_from_cache: u64,
    pub bytes_from_origin: u64,
    pub gets: u64,
    pub retries: u64,
    pub hits: u64,
    pub misses: u64,
    pub readahead_blocks: u64,
    pub fills_dropped: u64,
    pub last_error: Option<String>,
}

#[derive(Default)]
struct Tally {
    bytes_from_cache: AtomicU64,
    bytes_from_origin: AtomicU64,
    gets: AtomicU64,
    retries: AtomicU64,
    hits: AtomicU64,
    misses: AtomicU64,
    readahead_blocks: AtomicU64,
    fills_dropped: AtomicU64,
    last_error: Mutex<Option<String>>,
}

pub struct Fetcher {
    config: FetchConfig,
    cache: Option<Arc<Cache>>,
    runtime: tokio::runtime::Handle,
    objects: Mutex<HashMap<ObjectId, Weak<FetchObject>>>,
    /// One permit per request under way; readahead may have three in four of them.
    connections: Semaphore,
    background: Semaphore,
    /// One permit per block in flight; readahead may have half of them.
    memory: Arc<Semaphore>,
    background_memory: Arc<Semaphore>,
    /// Blocks on their way to the cache's disk: when it is slower than the network, caching gives way.
    fills: Arc<Semaphore>,
    /// Blocks that the cache did not take, for the reads that follow at once.
    recent: Mutex<LruCache<(ObjectId, u64), Bytes>>,
    tally: Tally,
}

/// Blocks (32 MiB) that may wait for the disk, and that are kept when the disk does not take them.
const FILLS: usize = 256;
const RECENT: NonZeroUsize = NonZeroUsize::new(256).unwrap();
/// A block that is evicted between its arrival and its use is fetched again, so often.
const PASSES: usize = 4;

/// Where a wanted block is.
enum Place {
    Cached,
    Here(Bytes),
    OnItsWay(watch::Receiver<Block>),
}

impl Fetcher {
    pub fn new(config: FetchConfig, cache: Option<Arc<Cache>>, runtime: tokio::runtime::Handle) -> Arc<Self> {
        let blocks = usize::try_from(config.memory_limit / BLOCK_SIZE).unwrap_or(usize::MAX);
        let blocks = blocks.clamp(2 * BLOCKS_PER_EXTENT as usize, Semaphore::MAX_PERMITS);
        let connections = config.connections.max(4);
        Arc::new(Self {
            cache,
            runtime,
            objects: Mutex::default(),
            connections: Semaphore::new(connections),
            background: Semaphore::new(connections * 3 / 4),
            memory: Arc::new(Semaphore::new(blocks)),
            background_memory: Arc::new(Semaphore::new(blocks / 2)),
            fills: Arc::new(Semaphore::new(FILLS)),
            recent: Mutex::new(LruCache::new(RECENT)),
            tally: Tally::default(),
            config,
        })
    }

    /// The object, shared with whoever else has it open.
    pub fn open(self: &Arc<Self>, domain: &str, source: Source) -> Arc<FetchObject> {
        let pin = match &source.pin {
            Pin::Content => String::new(),
            Pin::ETag(tag) => format!("etag {tag}"),
            Pin::VersionId(id) => format!("version {id}"),
        };
        let id = ObjectId::derive(domain, source.store.canonical(), &source.key, &pin, source.size, source.digest.as_ref());
        let mut objects = self.objects.lock();
        if let Some(object) = objects.get(&id).and_then(Weak::upgrade) {
            return object;
        }
        // The dead go when they would make the table grow.
        if objects.len() == objects.capacity() {
            objects.retain(|_, object| object.strong_count() > 0);
        }
        let cached = self.cache.as_ref().map(|cache| cache.object(id, source.size));
        let object = Arc::new(FetchObject { id, source, cached, flights: Mutex::default() });
        objects.insert(id, Arc::downgrade(&object));
        object
    }

    pub fn stats(&self) -> FetchStats {
        let tally = &self.tally;
        FetchStats {
            bytes_from_cache: tally.bytes_from_cache.load(Relaxed),
            bytes_from_origin: tally.bytes_from_origin.load(Relaxed),
            gets: tally.gets.load(Relaxed),
            retries: tally.retries.load(Relaxed),
            hits: tally.hits.load(Relaxed),
            misses: tally.misses.load(Relaxed),
            readahead_blocks: tally.readahead_blocks.load(Relaxed),
            fills_dropped: tally.fills_dropped.load(Relaxed),
            last_error: tally.last_error.lock().clone(),
        }
    }

    /// The hit path: appends `range` to `buf` if every byte is in the cache, else leaves it as it was.
    pub fn read_cached(&self, object: &FetchObject, range: Range<u64>, buf: &mut Vec<u8>) -> bool {
        let Some(cached) = &object.cached else { return false };
        let before = buf.len();
        let Ok(length) = usize::try_from(range.end.saturating_sub(range.start)) else { return false };
        buf.resize(before + length, 0);
        // A cache that cannot be read is one that has nothing.
        if cached.read(range.start, &mut buf[before..], Purpose::Reader).unwrap_or(false) {
            self.tally.hits.fetch_add(1, Relaxed);
            self.tally.bytes_from_cache.fetch_add(length as u64, Relaxed);
            return true;
        }
        buf.truncate(before);
        false
    }

    /// The miss path. Ends within the read deadline.
    pub async fn read(self: &Arc<Self>, object: &Arc<FetchObject>, range: Range<u64>) -> Result<Bytes, FetchError> {
        self.tally.misses.fetch_add(1, Relaxed);
        let deadline = self.config.read_deadline;
        let result = match tokio::time::timeout(deadline, self.gather(object, range)).await {
            Ok(result) => result,
            Err(_) => Err(FetchError::Deadline { key: object.source.key.clone(), after: deadline }),
        };
        if let Err(error) = &result {
            *self.tally.last_error.lock() = Some(error.in_words());
        }
        result
    }

    async fn gather(self: &Arc<Self>, object: &Arc<FetchObject>, range: Range<u64>) -> Result<Bytes, FetchError> {
        let range = range.start.min(object.source.size)..range.end.min(object.source.size);
        let mut bytes = BytesMut::with_capacity((range.end - range.start) as usize);
        for _ in 0..PASSES {
            let from = range.start + bytes.len() as u64;
            if from >= range.end {
                break;
            }
            let places = self.claim(object, blocks_covering(&(from..range.end)), Priority::Waited);
            for (number, place) in places {
                let block = BlockNo(number).byte_range(object.source.size);
                let wanted = block.start.max(range.start)..block.end.min(range.end);
                let data = match place {
                    Place::Here(data) => data,
                    Place::OnItsWay(mut receiver) => {
                        let done = receiver.wait_for(|block| !matches!(block, Block::Pending)).await;
                        match done.map(|block| block.clone()) {
                            Ok(Block::Ready(data)) => data,
                            Ok(Block::Failed(error)) => return Err(error),
                            Ok(Block::Pending) | Err(_) => return Err(FetchError::Ended),
                        }
                    }
                    Place::Cached => {
                        let mut part = vec![0; (wanted.end - wanted.start) as usize];
                        if !self.read_block(object, wanted.start, &mut part) {
                            // Evicted or found damaged meanwhile: the next pass fetches it.
                            break;
                        }
                        bytes.extend_from_slice(&part);
                        continue;
                    }
                };
                let (start, end) = (wanted.start - block.start, wanted.end - block.start);
                let Some(part) = data.get(start as usize..end as usize) else { return Err(FetchError::Ended) };
                bytes.extend_from_slice(part);
            }
        }
        if (bytes.len() as u64) < range.end - range.start {
            return Err(FetchError::CacheThrash { key: object.source.key.clone() });
        }
        Ok(bytes.freeze())
    }

    fn read_block(&self, object: &FetchObject, offset: u64, part: &mut [u8]) -> bool {
        let Some(cached) = &object.cached else { return false };
        let read = cached.read(offset, part, Purpose::Reader).unwrap_or(false);
        if read {
            self.tally.bytes_from_cache.fetch_add(part.len() as u64, Relaxed);
        }
        read
    }

    /// Where each of `blocks` is; what is nowhere is set on its way, adjacent blocks in one request.
    /// Readahead stops where the memory for it does.
    fn claim(
        self: &Arc<Self>,
        object: &Arc<FetchObject>,
        blocks: Range<u64>,
        priority: Priority,
    ) -> Vec<(u64, Place)> {
        let mut places = Vec::with_capacity((blocks.end - blocks.start) as usize);
        let mut runs: Vec<Run> = Vec::new();
        // Outside the lock: what may have to read a sidecar.
        if let Some(cached) = &object.cached {
            let _ = cached.missing(blocks.clone());
        }
        let mut flights = object.flights.lock();
        for number in blocks {
            if let Some(receiver) = flights.get(&number) {
                places.push((number, Place::OnItsWay(receiver.clone())));
                continue;
            }
            if object.cached.as_ref().is_some_and(|cached| cached.missing(number..number + 1).is_empty()) {
                places.push((number, Place::Cached));
                continue;
            }
            if let Some(bytes) = self.recent.lock().get(&(object.id, number)) {
                places.push((number, Place::Here(bytes.clone())));
                continue;
            }
            let mut permit = None;
            if priority == Priority::Readahead {
                permit = Arc::clone(&self.background_memory).try_acquire_owned().ok();
                if permit.is_none() {
                    break;
                }
                self.tally.readahead_blocks.fetch_add(1, Relaxed);
            }
            let (sender, receiver) = watch::channel(Block::Pending);
            flights.insert(number, receiver.clone());
            places.push((number, Place::OnItsWay(receiver)));
            match runs.last_mut() {
                Some(run) if run.takes(number) => run.push(sender, permit),
                _ => runs.push(Run::new(number, sender, permit)),
            }
        }
        drop(flights);
        for run in runs {
            let flight = run.fly(Arc::clone(self), Arc::clone(object), priority);
            self.runtime.spawn(flight);
        }
        places
    }

    /// Told of every read (hit or miss), so that it may fetch ahead, within `window`: the file's bytes
    /// within the object.
    pub fn advise(
        self: &Arc<Self>,
        object: &Arc<FetchObject>,
        streams: &Streams,
        range: Range<u64>,
        window: Range<u64>,
    ) {
        if let Some(ahead) = streams.next(&range, &window, self.config.max_readahead) {
            self.claim(object, blocks_covering(&ahead), Priority::Readahead);
        }
    }

    /// A block has arrived and is sound: it goes to the cache, and its flight ends once it is there.
    fn land(self: &Arc<Self>, object: &Arc<FetchObject>, number: u64, bytes: Bytes, priority: Priority) {
        let Some(cached) = object.cached.clone() else {
            self.keep(object, number, bytes);
            return;
        };
        let Ok(permit) = Arc::clone(&self.fills).try_acquire_owned() else {
            self.tally.fills_dropped.fetch_add(1, Relaxed);
            self.keep(object, number, bytes);
            return;
        };
        let (fetcher, object) = (Arc::clone(self), Arc::clone(object));
        self.runtime.spawn_blocking(move || {
            let purpose = match priority {
                Priority::Waited => Purpose::Reader,
                Priority::Readahead => Purpose::Readahead,
            };
            if cached.fill(BlockNo(number), &bytes, purpose).is_err() {
                // The cache counts and tells; the reader has its bytes.
                fetcher.keep(&object, number, bytes);
            } else {
                object.flights.lock().remove(&number);
            }
            drop(permit);
        });
    }

    fn keep(&self, object: &FetchObject, number: u64, bytes: Bytes) {
        self.recent.lock().put((object.id, number), bytes);
        object.flights.lock().remove(&number);
    }

    fn took(&self, bytes: usize) {
        self.tally.bytes_from_origin.fetch_add(bytes as u64, Relaxed);
    }

    fn give_up_at(&self) -> Instant {
        Instant::now() + self.config.read_deadline
    }
}
