//! The content of a snapshot as it comes through the fetcher.

use std::{
    fs::File,
    num::NonZeroUsize,
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt as _, stream};
use lru::LruCache;
use parking_lot::Mutex;

use super::{
    content::{Content, ReadError},
    prefetch::{self, Breadth, Width},
};
use crate::{
    block::{BLOCK_SIZE, blocks_covering},
    causes::in_one_line,
    fetch::{FetchObject, Fetcher, Priority, Source, Streams},
    prefetch_policy::PrefetchPolicy,
    tree::{Ino, ObjectNo, TreeError},
};

/// Objects kept open between reads, each with three descriptors at most; and inodes whose streams are known.
const OPEN_OBJECTS: NonZeroUsize = NonZeroUsize::new(256).unwrap();
const KNOWN_INODES: NonZeroUsize = NonZeroUsize::new(4096).unwrap();
/// Bundles that are followed as one stream each.
const KNOWN_BUNDLES: NonZeroUsize = NonZeroUsize::new(64).unwrap();
/// A file up to this size that shares its object is one of many.
const SMALL: u64 = 1 << 20;
/// A warm-up asks for pieces of up to this size, at least so many at once, and enough for all connections: of
/// small objects, each a request, few enough to keep an order.
const WARM_PIECE: u64 = 64 << 20;
const WARM_AT_ONCE: usize = 48;
/// A version that did not fit the cache is not measured again for so long.
const MEASURE_AGAIN: Duration = Duration::from_secs(10);

/// Says where the objects of one tree are.
pub trait Sources: Send + Sync {
    fn source(&self, object: ObjectNo) -> Result<Source, TreeError>;

    /// Bytes of all files.
    fn total_bytes(&self) -> u64;

    /// Where every file's bytes are, in tree order.
    fn files(&self) -> Box<dyn Iterator<Item = (ObjectNo, Range<u64>)> + Send + '_>;
}

/// Objects of one tree, read through the cache and fetched when they are not there.
pub struct Fetched<S: Sources + 'static> {
    shared: Arc<Shared<S>>,
    policy: PrefetchPolicy,
    runtime: tokio::runtime::Handle,
    streams: Mutex<LruCache<Ino, Arc<Streams>>>,
    bundles: Mutex<LruCache<ObjectNo, Arc<Streams>>>,
    judgement: Mutex<Judgement>,
}

/// What is known of how this mount is read.
#[derive(Default)]
struct Judgement {
    breadth: Breadth,
    /// When the cache's room was last measured, and whether the version fitted.
    fits: Option<(Instant, bool)>,
    warming: Option<tokio::task::AbortHandle>,
}

/// What reading and warming up both need.
struct Shared<S> {
    fetcher: Arc<Fetcher>,
    sources: S,
    /// Who may share cached bytes: see the cache's object identity.
    domain: String,
    open: Mutex<LruCache<ObjectNo, Arc<FetchObject>>>,
}

impl<S: Sources> Shared<S> {
    fn object(&self, number: ObjectNo) -> Result<Arc<FetchObject>, TreeError> {
        if let Some(object) = self.open.lock().get(&number) {
            return Ok(Arc::clone(object));
        }
        // Two readers may both come here: the fetcher gives both the same object.
        let object = self.fetcher.open(&self.domain, self.sources.source(number)?);
        let evicted = self.open.lock().push(number, Arc::clone(&object));
        // Closing files is not for the lock.
        drop(evicted);
        Ok(object)
    }

    /// Brings everything into the cache that it has room for, in tree order.
    async fn warm(&self) {
        let pieces = prefetch::joined(self.sources.files(), BLOCK_SIZE, WARM_PIECE);
        // Not through `open`: what is warmed must not push out what is being read.
        let open = |number| Ok(self.fetcher.open(&self.domain, self.sources.source(number)?));
        bring(&self.fetcher, pieces, open).await;
        tracing::info!("the version is warmed up");
    }
}

/// Brings ranges of a mount's objects into the cache, in their order, until one does not fit: it would push
/// out what its readers have not come to yet.
pub async fn bring(
    fetcher: &Arc<Fetcher>,
    ranges: impl Iterator<Item = (ObjectNo, Range<u64>)> + Send,
    open: impl Fn(ObjectNo) -> Result<Arc<FetchObject>, TreeError> + Send + Sync,
) {
    let mut room = fetcher.cache_room();
    let fitting = ranges.take_while(|(_, range)| {
        let length = range.end - range.start;
        let fits = length <= room;
        room = room.saturating_sub(length);
        fits
    });
    let open = &open;
    let at_once = WARM_AT_ONCE.max(fetcher.connections() * 5 / 4);
    stream::iter(fitting)
        .for_each_concurrent(at_once, |(number, range)| async move {
            let Ok(object) = open(number) else { return };
            // This mount's own readers will want it: that is readahead, however far. A warm-up for nobody in
            // particular keeps to a small share while readers wait.
            if let Err(error) = fetcher.warm(&object, range, Priority::Readahead).await {
                tracing::debug!(error = in_one_line(&error), "fetching ahead failed in places");
            }
        })
        .await;
}

impl<S: Sources + 'static> Fetched<S> {
    /// Must be called, and dropped, where `runtime` lives.
    pub fn new(
        fetcher: Arc<Fetcher>,
        sources: S,
        domain: String,
        policy: PrefetchPolicy,
        runtime: &tokio::runtime::Handle,
    ) -> Self {
        let fetched = Self {
            shared: Arc::new(Shared {
                fetcher,
                sources,
                domain,
                open: Mutex::new(LruCache::new(OPEN_OBJECTS)),
            }),
            policy,
            runtime: runtime.clone(),
            streams: Mutex::new(LruCache::new(KNOWN_INODES)),
            bundles: Mutex::new(LruCache::new(KNOWN_BUNDLES)),
            judgement: Mutex::default(),
        };
        if policy == PrefetchPolicy::All {
            fetched.start_warming(&mut fetched.judgement.lock());
        }
        fetched
    }

    fn start_warming(&self, judgement: &mut Judgement) {
        if judgement.warming.is_none() {
            let shared = Arc::clone(&self.shared);
            let warming = self.runtime.spawn(async move { shared.warm().await });
            judgement.warming = Some(warming.abort_handle());
        }
    }

    /// Whether a file read for the first time makes its neighbours worth having; starts the warm-up of
    /// everything when there have been many.
    fn neighbours_are_wanted(&self, ino: Ino) -> bool {
        if self.policy == PrefetchPolicy::None {
            return false;
        }
        let now = Instant::now();
        let measured = {
            let mut judgement = self.judgement.lock();
            match judgement.breadth.read(ino, now) {
                None | Some(Width::Narrow) => return false,
                Some(width) => {
                    let known = judgement
                        .fits
                        .filter(|(at, fits)| *fits || at.elapsed() < MEASURE_AGAIN);
                    if let Some((_, fits)) = known {
                        if fits && width == Width::Wide {
                            self.start_warming(&mut judgement);
                        }
                        return fits;
                    }
                    self.shared.sources.total_bytes()
                }
            }
        };
        // What does not fit would be evicted before its reader comes. The cache is asked without the lock.
        let fits = measured <= self.shared.fetcher.cache_room();
        self.judgement.lock().fits = Some((now, fits));
        fits
    }
}

impl<S: Sources + 'static> Drop for Fetched<S> {
    fn drop(&mut self) {
        if let Some(warming) = self.judgement.lock().warming.take() {
            warming.abort();
        }
    }
}

#[async_trait]
impl<S: Sources + 'static> Content for Fetched<S> {
    fn read_cached(&self, object: ObjectNo, range: Range<u64>, buf: &mut Vec<u8>) -> bool {
        let fetcher = &self.shared.fetcher;
        self.shared
            .object(object)
            .is_ok_and(|object| fetcher.read_cached(&object, range, buf).is_some())
    }

    async fn read(&self, object: ObjectNo, range: Range<u64>) -> Result<Bytes, ReadError> {
        let object = self.shared.object(object)?;
        Ok(self.shared.fetcher.read(&object, range).await?)
    }

    fn advise(&self, ino: Ino, number: ObjectNo, range: Range<u64>, file: Range<u64>) {
        let Ok(object) = self.shared.object(number) else {
            return;
        };
        let fetcher = &self.shared.fetcher;
        if self.neighbours_are_wanted(ino) && file.end - file.start <= SMALL {
            fetcher.advise_neighbours(&object, file.clone());
        }
        let length = file.end - file.start;
        if length < object.size() && length <= SMALL {
            // Files that are read in the order in which they were bundled are one stream.
            let streams = Arc::clone(self.bundles.lock().get_or_insert(number, Arc::default));
            fetcher.advise(&object, &streams, range, 0..object.size());
        } else {
            let streams = Arc::clone(self.streams.lock().get_or_insert(ino, Arc::default));
            fetcher.advise(&object, &streams, range, file);
        }
    }

    fn cached_bytes(&self, object: ObjectNo, range: Range<u64>) -> u64 {
        let Ok(object) = self.shared.object(object) else {
            return 0;
        };
        let Some(cached) = object.cached() else { return 0 };
        let absent = cached.missing(blocks_covering(&range)).into_iter().map(|block| {
            let bytes = block.byte_range(object.size());
            bytes
                .end
                .min(range.end)
                .saturating_sub(bytes.start.max(range.start))
        });
        (range.end - range.start).saturating_sub(absent.sum())
    }

    fn seal(&self, object: ObjectNo) -> Option<Arc<File>> {
        self.shared.object(object).ok()?.cached()?.seal()
    }
}
