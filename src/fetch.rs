//! Misses: from (object, range) to bytes, through the cache, from the origin.
//!
//! Owns single-flight, coalescing, priorities, readahead, warm-up, retries and the memory budget.
//! Must not know FUSE or trees.

mod ahead;
mod buffers;
mod error;
mod fills;
mod job;
mod pace;
mod pool;
mod readahead;
mod readers;
mod recent;
mod stats;

use std::{
    collections::{HashMap, HashSet},
    ops::Range,
    sync::{
        Arc, Weak,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::{Semaphore, watch};
use tracing::Instrument as _;

use self::{
    ahead::Ahead,
    buffers::Buffers,
    fills::{Fill, Fills},
    job::Job,
    pool::{Pool, Urgency},
    readers::Readers,
    recent::{Beside, Recent},
    stats::{Accounts, Tally},
};
pub use self::{error::FetchError, pool::Priority, readahead::Streams, stats::FetchStats};
use crate::{
    block::{BLOCK_SIZE, BLOCKS_PER_EXTENT, BlockNo, EXTENT_SIZE, block_count, blocks_covering},
    cache::{Cache, CachedObject, ObjectId, Purpose},
    digest::BlockSum,
    histogram::Distribution,
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
    pub read_deadline: Duration,
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
    id: ObjectId,
    source: Source,
    cached: Option<Arc<CachedObject>>,
    pool: Arc<Pool>,
    /// Blocks on their way. Bounded by what the memory budget lets in flight and by the queued readahead.
    flights: Mutex<HashMap<u64, Flight>>,
    /// Some of its blocks were fetched ahead of a stream, and may be in the cache and in no page cache: its readers
    /// look for them in memory first, until so many looks in a row were in vain.
    streamed: AtomicU32,
    /// Blocks that readahead brought and nobody has read yet.
    unread: Mutex<HashSet<u64>>,
    tally: Arc<Tally>,
}

struct Flight {
    done: watch::Receiver<Option<Arrival>>,
    urgency: Arc<Urgency>,
    /// A reader waits for this very block, or did.
    waited: bool,
}

type Arrival = Result<Bytes, FetchError>;

/// More unread blocks than this per object are not accounted for.
const MOST_UNREAD: usize = 1 << 16;

/// See [`FetchObject`]: looking costs a lock that all readers share.
const LOOKS: u32 = 256;

pub struct Fetcher {
    config: FetchConfig,
    cache: Option<Arc<Cache>>,
    runtime: tokio::runtime::Handle,
    objects: Arc<Mutex<HashMap<ObjectId, Weak<FetchObject>>>>,
    pools: Arc<Mutex<HashMap<String, Arc<Pool>>>>,
    /// Bytes of requests in flight, in blocks.
    memory: Arc<Semaphore>,
    /// How much `memory` was at first.
    memory_blocks: usize,
    /// The part of it that readahead and warm-up may hold together.
    low_memory: Arc<Semaphore>,
    /// Without room to keep it, what is fetched ahead would be fetched twice: less than what `recent` holds.
    largest_window: u64,
    readers: Arc<Readers>,
    recent: Arc<Recent>,
    fills: Option<Fills>,
    /// Neighbouring blocks that are handed to the cache together.
    fill_run: u64,
    buffers: Arc<Buffers>,
    tally: Arc<Tally>,
    accounts: Arc<Accounts>,
    /// This is one of `accounts`, not the fetcher they were all split off from.
    is_account: bool,
    latency: Arc<job::Latency>,
}

impl Fetcher {
    pub fn new(config: FetchConfig, cache: Option<Arc<Cache>>, runtime: tokio::runtime::Handle) -> Arc<Self> {
        // The memory holds what is on its way and what arrived. Two thirds may be on its way, most of them with
        // nobody waiting; a quarter waits for the cache's disk, and has a place even then.
        let limit = usize::try_from(config.memory_limit / BLOCK_SIZE).unwrap_or(usize::MAX);
        let blocks = limit.clamp(3 * BLOCKS_PER_EXTENT as usize, Semaphore::MAX_PERMITS);
        let places = (blocks / 4).clamp(BLOCKS_PER_EXTENT as usize, 1 << 14);
        let beside = match &cache {
            None => Beside::Nothing,
            Some(cache) if cache.usage().max_bytes / 4 < config.memory_limit => Beside::SmallCache,
            Some(_) => Beside::Cache,
        };
        let recent = Arc::new(Recent::new(blocks, beside));
        let in_flight = (blocks / 3 * 2).max(2 * BLOCKS_PER_EXTENT as usize);
        let ahead = in_flight / 8 * 7;
        let tally = Arc::new(Tally::default());
        let fills = cache.as_ref().and_then(|_| Fills::start(&tally, &recent, places));
        let connections = config.connections.max(1) as u64;
        Arc::new(Self {
            // Of more than an extent for each connection, and the next one, nobody has anything.
            largest_window: (ahead as u64 * BLOCK_SIZE).min(connections * 2 * EXTENT_SIZE),
            readers: Arc::default(),
            recent,
            config,
            cache,
            runtime,
            objects: Arc::default(),
            pools: Arc::default(),
            memory: Arc::new(Semaphore::new(in_flight)),
            memory_blocks: in_flight,
            low_memory: Arc::new(Semaphore::new(ahead)),
            fills,
            // What all connections gather for it is at most a quarter of what is kept.
            fill_run: (blocks as u64 / connections / 4).clamp(1, fills::RUN_MOST),
            buffers: Arc::default(),
            tally,
            accounts: Arc::default(),
            is_account: false,
            latency: Arc::default(),
        })
    }

    /// The same fetcher (objects, fetches in flight, memory, connections) with counters of its own, for one
    /// mount. What two mounts want at once is counted where it was wanted first; [`Fetcher::stats`] of the
    /// fetcher this was split off from tells of all together.
    pub fn account(&self) -> Arc<Self> {
        Arc::new(Self {
            config: self.config.clone(),
            cache: self.cache.clone(),
            runtime: self.runtime.clone(),
            objects: Arc::clone(&self.objects),
            pools: Arc::clone(&self.pools),
            memory: Arc::clone(&self.memory),
            memory_blocks: self.memory_blocks,
            low_memory: Arc::clone(&self.low_memory),
            largest_window: self.largest_window,
            readers: Arc::clone(&self.readers),
            recent: Arc::clone(&self.recent),
            fills: self.fills.clone(),
            fill_run: self.fill_run,
            buffers: Arc::clone(&self.buffers),
            tally: self.accounts.open(),
            accounts: Arc::clone(&self.accounts),
            is_account: true,
            latency: Arc::clone(&self.latency),
        })
    }

    /// The object, shared with whoever else has it open (keyed by its cache identity within `domain`).
    pub fn open(self: &Arc<Self>, domain: &str, source: Source) -> Arc<FetchObject> {
        let id = identity(domain, &source);
        let mut objects = self.objects.lock();
        if let Some(object) = objects.get(&id).and_then(Weak::upgrade) {
            return object;
        }
        if objects.len() >= 64 && objects.len() == objects.capacity() {
            objects.retain(|_, object| object.strong_count() > 0);
        }
        drop(objects);
        // The cache may touch the disk: not under the lock. Whoever comes second takes the first's.
        let cached = self.cache.as_ref().map(|cache| cache.object(id, source.size));
        let pool = Arc::clone(
            self.pools
                .lock()
                .entry(source.store.canonical().to_owned())
                .or_insert_with(|| Pool::new(self.config.connections)),
        );
        let object = Arc::new(FetchObject {
            id,
            source,
            cached,
            pool,
            flights: Mutex::default(),
            streamed: AtomicU32::new(0),
            unread: Mutex::default(),
            tally: Arc::clone(&self.tally),
        });
        let mut objects = self.objects.lock();
        if let Some(first) = objects.get(&id).and_then(Weak::upgrade) {
            return first;
        }
        objects.insert(id, Arc::downgrade(&object));
        object
    }

    /// The hit path: `Some` when every byte is in the cache (or has just arrived). No await, no task, no
    /// lock held across I/O. `buf` is replaced by exactly the bytes of `range` within the object.
    pub fn read_cached(&self, object: &FetchObject, range: Range<u64>, buf: &mut Vec<u8>) -> Option<()> {
        let range = object.clip(&range);
        let blocks = blocks_covering(&range);
        let Some(cached) = &object.cached else {
            self.read_recent(object, &range, buf)?;
            self.count_hit(object, &range, &blocks);
            return Some(());
        };
        let streamed = object.streamed.load(Relaxed);
        if streamed > 0 {
            if self.read_recent(object, &range, buf).is_some() {
                object.streamed.store(LOOKS, Relaxed);
                cached.was_read(&range);
                self.count_hit(object, &range, &blocks);
                return Some(());
            }
            object.streamed.store(streamed - 1, Relaxed);
        }
        // What was in it is overwritten: only what it grows by costs zeroing.
        buf.resize(usize::try_from(range.end - range.start).ok()?, 0);
        if !cached.read(range.start, buf, Purpose::Reader).unwrap_or(false) {
            self.read_recent(object, &range, buf)?;
        }
        self.count_hit(object, &range, &blocks);
        Some(())
    }

    /// `Some` when every byte is among those that have just arrived.
    fn read_recent(&self, object: &FetchObject, range: &Range<u64>, buf: &mut Vec<u8>) -> Option<()> {
        buf.clear();
        for block in blocks_covering(range) {
            let bytes = self.recent.get(object.id, block)?;
            buf.extend_from_slice(part_of(&bytes, block, range)?);
            self.note_if_read(object, block, range);
        }
        Some(())
    }

    /// The miss path. Ends within `read_deadline`.
    pub async fn read(
        self: &Arc<Self>,
        object: &Arc<FetchObject>,
        range: Range<u64>,
    ) -> Result<Bytes, FetchError> {
        let started = Instant::now();
        let deadline = self.config.read_deadline;
        let result = tokio::time::timeout(deadline, self.read_blocks(object, object.clip(&range)))
            .await
            .unwrap_or(Err(FetchError::Deadline(deadline)));
        self.tally.wait_nanos.fetch_add(
            u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX),
            Relaxed,
        );
        if let Err(error) = &result {
            self.tally.failed(&object.source.key, error);
        }
        result
    }

    async fn read_blocks(
        self: &Arc<Self>,
        object: &Arc<FetchObject>,
        range: Range<u64>,
    ) -> Result<Bytes, FetchError> {
        let blocks = blocks_covering(&range);
        let wanted: Vec<u64> = blocks.clone().collect();
        let mut arrivals = self.start(object, &wanted, Ahead::No);
        self.mark_read(object, &blocks);
        // One block is handed on as it is.
        let mut whole = Vec::new();
        if blocks.end - blocks.start > 1 {
            whole = self.buffers.answer();
            whole.reserve_exact(usize::try_from(range.end - range.start).unwrap_or(0));
        }
        for block in blocks.clone() {
            let bytes = match arrivals.remove(&block) {
                Some(Started::Here(bytes)) => bytes,
                Some(Started::Coming(mut done)) => {
                    let arrived = done
                        .wait_for(Option::is_some)
                        .await
                        .map_err(|_| FetchError::Stopped)?;
                    arrived.clone().ok_or(FetchError::Stopped)??
                }
                // In the cache, but perhaps in no page cache.
                None => match self.recent.get(object.id, block) {
                    Some(bytes) => bytes,
                    None => self.read_cached_block(object, block).await?,
                },
            };
            let part = part_range(bytes.len(), block, &range).ok_or(FetchError::Stopped)?;
            self.note_if_read(object, block, &range);
            if blocks.end - blocks.start == 1 {
                return Ok(bytes.slice(part));
            }
            whole.extend_from_slice(&bytes[part]);
        }
        Ok(self.buffers.freeze(whole))
    }

    /// A block that the cache said it has. If it cannot give it after all, it is fetched.
    async fn read_cached_block(
        self: &Arc<Self>,
        object: &Arc<FetchObject>,
        block: u64,
    ) -> Result<Bytes, FetchError> {
        if let Some(cached) = &object.cached {
            let (cached, range) = (Arc::clone(cached), BlockNo(block).byte_range(object.source.size));
            let read = self.runtime.spawn_blocking(move || {
                let mut bytes = vec![0; usize::try_from(range.end - range.start).unwrap_or(0)];
                matches!(cached.read(range.start, &mut bytes, Purpose::Reader), Ok(true)).then_some(bytes)
            });
            if let Ok(Some(bytes)) = read.await {
                self.tally.cache_bytes.fetch_add(bytes.len() as u64, Relaxed);
                return Ok(bytes.into());
            }
        }
        match self.start_absent(object, &[block], Ahead::No).remove(&block) {
            Some(Started::Here(bytes)) => Ok(bytes),
            Some(Started::Coming(mut done)) => {
                let arrived = done
                    .wait_for(Option::is_some)
                    .await
                    .map_err(|_| FetchError::Stopped)?;
                arrived.clone().ok_or(FetchError::Stopped)?
            }
            None => Err(FetchError::Stopped),
        }
    }

    /// Starts (or joins) the fetches of those `wanted` blocks (ascending) that the cache does not have.
    fn start(
        self: &Arc<Self>,
        object: &Arc<FetchObject>,
        wanted: &[u64],
        ahead: Ahead,
    ) -> HashMap<u64, Started> {
        let absent: Vec<u64> = match (&object.cached, wanted) {
            (Some(cached), [first, .., last] | [first @ last]) => {
                let missing = cached.missing(*first..*last + 1);
                missing
                    .into_iter()
                    .map(|block| block.0)
                    .filter(|block| wanted.binary_search(block).is_ok())
                    .collect()
            }
            _ => wanted.to_vec(),
        };
        self.start_absent(object, &absent, ahead)
    }

    fn start_absent(
        self: &Arc<Self>,
        object: &Arc<FetchObject>,
        absent: &[u64],
        ahead: Ahead,
    ) -> HashMap<u64, Started> {
        let priority = ahead.priority();
        let mut started = HashMap::with_capacity(absent.len());
        let mut jobs: Vec<Job> = Vec::new();
        {
            let mut flights = object.flights.lock();
            let mut new: Vec<u64> = Vec::new();
            for &block in absent {
                if let Some(flight) = flights.get_mut(&block) {
                    if priority == Priority::Waited {
                        flight.urgency.raise();
                        flight.waited = true;
                    }
                    started.insert(block, Started::Coming(flight.done.clone()));
                } else if let Some(bytes) = self.recent.get(object.id, block) {
                    // A block enters `recent` before it leaves `flights`: it is in one of them, or absent.
                    started.insert(block, Started::Here(bytes));
                } else {
                    new.push(block);
                }
            }
            let most = match ahead {
                // A waiting reader's request is spread over all connections.
                Ahead::No => self.piece(new.len() as u64),
                Ahead::Stream { piece } => piece,
                Ahead::Neighbours | Ahead::WarmUp => BLOCKS_PER_EXTENT,
            };
            let streamed = matches!(ahead, Ahead::Stream { .. });
            if streamed && !new.is_empty() {
                object.streamed.store(LOOKS, Relaxed);
            }
            for run in runs(&new) {
                for piece in readahead::pieces(run, most) {
                    let urgency = Arc::new(Urgency::new(priority));
                    let mut senders = Vec::new();
                    for block in piece.clone() {
                        let (sender, done) = watch::channel(None);
                        started.insert(block, Started::Coming(done.clone()));
                        flights.insert(
                            block,
                            Flight {
                                done,
                                urgency: Arc::clone(&urgency),
                                waited: priority == Priority::Waited,
                            },
                        );
                        senders.push(sender);
                    }
                    jobs.push(Job {
                        fetcher: Arc::clone(self),
                        object: Arc::clone(object),
                        first: piece.start,
                        waiters: senders,
                        urgency,
                        purpose: match priority {
                            Priority::Waited => Purpose::Reader,
                            Priority::Readahead => Purpose::Readahead,
                            Priority::WarmUp => Purpose::WarmUp,
                        },
                        streamed,
                        patient: matches!(ahead, Ahead::Neighbours | Ahead::WarmUp),
                        memory: None,
                        low_memory: None,
                        reserved: None,
                        delivered: 0,
                        filled: 0,
                    });
                }
            }
        }
        for job in jobs {
            // Within the span of the read that asked first: the log tells which requests a read waited for.
            let span =
                tracing::debug_span!("fetch", key = object.source.key, blocks = ?job.blocks(), ?priority);
            self.runtime.spawn(job.run().instrument(span));
        }
        started
    }

    fn piece(&self, blocks: u64) -> u64 {
        readahead::piece_size(blocks, self.config.connections as u64)
    }

    /// How many connections there are to each origin.
    pub fn connections(&self) -> usize {
        self.config.connections
    }

    /// How many bytes the cache can still take without evicting; 0 without a cache.
    pub fn cache_room(&self) -> u64 {
        self.cache.as_ref().map_or(0, |cache| {
            let usage = cache.usage();
            if usage.degraded.is_some() {
                return 0;
            }
            usage.max_bytes.saturating_sub(usage.allocated_bytes)
        })
    }

    pub fn stats(&self) -> FetchStats {
        let mut stats = self.tally.read();
        if !self.is_account {
            stats.add(self.accounts.read());
        }
        stats
    }

    /// How long origins take to begin an answer, all accounts together.
    pub fn answer_times(&self) -> Distribution {
        self.latency.times()
    }

    /// Bytes of memory that requests to origins hold now.
    pub fn memory_in_flight(&self) -> u64 {
        let free = self.memory.available_permits();
        self.memory_blocks.saturating_sub(free) as u64 * BLOCK_SIZE
    }

    fn count_hit(&self, object: &FetchObject, range: &Range<u64>, blocks: &Range<u64>) {
        self.tally.hits.fetch_add(1, Relaxed);
        self.tally.cache_bytes.fetch_add(range.end - range.start, Relaxed);
        self.mark_read(object, blocks);
    }

    /// A block that is read to its end is not waited for by this reader any more.
    fn note_if_read(&self, object: &FetchObject, block: u64, range: &Range<u64>) {
        if range.end >= BlockNo(block).byte_range(object.source.size).end {
            self.recent.read(object.id, block);
        }
    }

    fn mark_read(&self, object: &FetchObject, blocks: &Range<u64>) {
        let mut unread = object.unread.lock();
        if unread.is_empty() {
            return;
        }
        let used = blocks.clone().filter(|block| unread.remove(block)).count();
        self.tally.readahead_used.fetch_add(used as u64, Relaxed);
    }

    /// Hands arrived blocks to the cache; waits for the disk only if it is `patient`.
    async fn fill(
        &self,
        object: &FetchObject,
        blocks: Range<u64>,
        purpose: Purpose,
        streamed: bool,
        patient: bool,
    ) {
        let (Some(fills), Some(cached)) = (&self.fills, &object.cached) else {
            return;
        };
        let fill = Fill {
            object: Arc::clone(cached),
            blocks,
            purpose,
            streamed,
        };
        if patient {
            fills.bring(fill).await;
        } else {
            fills.offer(fill);
        }
    }
}

impl Drop for Fetcher {
    fn drop(&mut self) {
        if self.is_account {
            self.accounts.close(&self.tally);
        }
    }
}

enum Started {
    Here(Bytes),
    Coming(watch::Receiver<Option<Arrival>>),
}

impl Drop for FetchObject {
    fn drop(&mut self) {
        let unused = self.unread.lock().len();
        self.tally.readahead_unused.fetch_add(unused as u64, Relaxed);
    }
}

impl FetchObject {
    pub fn size(&self) -> u64 {
        self.source.size
    }

    pub fn id(&self) -> ObjectId {
        self.id
    }

    /// The cache's handle, when there is a cache.
    pub fn cached(&self) -> Option<&Arc<CachedObject>> {
        self.cached.as_ref()
    }

    fn clip(&self, range: &Range<u64>) -> Range<u64> {
        let end = range.end.min(self.source.size);
        range.start.min(end)..end
    }
}

/// Splits ascending block numbers into runs of neighbours that stay within an extent.
fn runs(blocks: &[u64]) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    for &block in blocks {
        match runs.last_mut() {
            Some(run) if run.end == block && run.start / BLOCKS_PER_EXTENT == block / BLOCKS_PER_EXTENT => {
                run.end += 1
            }
            _ => runs.push(block..block + 1),
        }
    }
    runs
}

/// Where the wanted `range` of the object lies within the bytes of `block`.
fn part_range(length: usize, block: u64, range: &Range<u64>) -> Option<Range<usize>> {
    let start = block * BLOCK_SIZE;
    let from = usize::try_from(range.start.saturating_sub(start)).ok()?;
    let to = usize::try_from(range.end.saturating_sub(start)).ok()?.min(length);
    (from <= to).then_some(from..to)
}

fn part_of<'b>(bytes: &'b Bytes, block: u64, range: &Range<u64>) -> Option<&'b [u8]> {
    bytes.get(part_range(bytes.len(), block, range)?)
}

/// Two objects share cached blocks exactly if all of this is equal.
fn identity(domain: &str, source: &Source) -> ObjectId {
    let pin = match &source.pin {
        Pin::Content => "content".to_owned(),
        Pin::ETag(etag) => format!("etag {etag}"),
        Pin::VersionId(version) => format!("version {version}"),
    };
    ObjectId::derive(
        domain,
        source.store.canonical(),
        &source.key,
        &pin,
        source.size,
        None,
    )
}

/// How many blocks an object has: for callers that warm whole objects.
pub fn blocks_of(object: &FetchObject) -> u64 {
    block_count(object.source.size)
}
