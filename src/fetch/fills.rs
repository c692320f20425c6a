//! Blocks on their way to the cache's disk.
//!
//! Owns the queue and the threads that write. Readers never wait for the disk: what the queue has no room
//! for is not cached. Only what nobody waits for (a warm-up, a small file's neighbours) waits for room, so
//! that it does not fetch what would not be kept.

use std::{
    iter,
    ops::Range,
    sync::{
        Arc,
        atomic::Ordering::Relaxed,
        mpsc::{SyncSender, TrySendError, sync_channel},
    },
    time::{Duration, Instant},
};

use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore};

use super::{pace::Pace, recent::Recent, stats::Tally};
use crate::{
    block::BlockNo,
    cache::{CacheError, CachedObject, Purpose, WriteMode},
};

const THREADS: usize = 2;
/// What a thread takes off its queue at a time, to find neighbours in it; it never waits for more.
const BATCH: usize = 64;
/// Blocks that are written together, neighbours: a reader of what lies among them is not held up, and the room they
/// take is soon free.
pub(super) const RUN_MOST: u64 = 16;
/// Runs that are worth a write of their own past the page cache: half a mebibyte.
const DIRECT_LEAST: u64 = 4;
/// A disk that takes nothing for so long is not waited for.
const PATIENCE: Duration = Duration::from_secs(5);

/// Neighbouring blocks that have arrived, at most [`RUN_MOST`].
pub(super) struct Fill {
    pub object: Arc<CachedObject>,
    pub blocks: Range<u64>,
    pub purpose: Purpose,
    /// Fetched ahead of a stream, whose reader takes them from memory.
    pub streamed: bool,
}

impl Fill {
    /// At most [`RUN_MOST`].
    fn count(&self) -> u32 {
        (self.blocks.end - self.blocks.start) as u32
    }
}

struct Queued {
    fill: Fill,
    _room: OwnedSemaphorePermit,
    _patient: Option<OwnedSemaphorePermit>,
}

#[derive(Clone)]
pub(super) struct Fills {
    /// One for each thread; an object's blocks all go to the same: two writers of one file would only wait
    /// for each other's lock, and spin meanwhile. Not so two that write past the page cache.
    queues: Arc<[SyncSender<Queued>]>,
    /// A permit for each block; each queue has as many places, so that sending never blocks.
    room: Arc<Semaphore>,
    pace: Arc<Pace>,
    /// For those among them that could wait for room: the rest is for what readers wait for.
    patient: Arc<Semaphore>,
    recent: Arc<Recent>,
    tally: Arc<Tally>,
}

impl Queued {
    fn follows(&self, last: &Self) -> bool {
        let (fill, last) = (&self.fill, &last.fill);
        Arc::ptr_eq(&fill.object, &last.object)
            && fill.blocks.start == last.blocks.end
            && (fill.purpose, fill.streamed) == (last.purpose, last.streamed)
    }
}

/// What was queued, neighbours together. The pieces of a GET arrive among those of others.
fn in_runs(queued: impl Iterator<Item = Queued>) -> impl Iterator<Item = Vec<Queued>> {
    let mut rest: Vec<Queued> = queued.collect();
    rest.sort_by_key(|queued| (queued.fill.object.id().0, queued.fill.blocks.start));
    let mut rest = rest.into_iter().peekable();
    iter::from_fn(move || {
        let mut run = vec![rest.next()?];
        let most = run[0].fill.blocks.start + RUN_MOST;
        while let Some(next) =
            rest.next_if(|next| next.fill.blocks.end <= most && next.follows(&run[run.len() - 1]))
        {
            run.push(next);
        }
        Some(run)
    })
}

fn blocks_of(run: &[Queued]) -> u64 {
    run.iter().map(|queued| u64::from(queued.fill.count())).sum()
}

impl Fills {
    /// With `places` for blocks that wait to be written. `None`: no thread could be started, and nothing is
    /// cached.
    pub fn start(tally: &Arc<Tally>, recent: &Arc<Recent>, places: usize) -> Option<Self> {
        let (kept, counts) = (Arc::clone(recent), Arc::clone(tally));
        Self::writing(tally, recent, places, move |run, mode| {
            let Some(Queued { fill, .. }) = run.first() else {
                return Ok(0);
            };
            let mut direct = 0;
            // The bytes are counted where they are kept, not a second time here. Those that had to go meanwhile
            // are not cached.
            let blocks = fill.blocks.start..fill.blocks.start + blocks_of(run);
            let there = kept.those_of(fill.object.id(), blocks.clone());
            let found: u64 = there.iter().map(|(_, bytes)| bytes.len() as u64).sum();
            counts
                .fills_dropped
                .fetch_add(blocks.end - blocks.start - found, Relaxed);
            for (first, bytes) in there {
                let blocks: Vec<&[u8]> = bytes.iter().map(|bytes| &bytes[..]).collect();
                let (object, range) = (fill.object.id(), first..first + blocks.len() as u64);
                match fill.object.fill_run(BlockNo(first), &blocks, fill.purpose, mode) {
                    Ok(0) => kept.written(object, range, WriteMode::Buffered),
                    Ok(past) => {
                        direct += past;
                        counts.fills_direct.fetch_add(past, Relaxed);
                        kept.written(object, range, WriteMode::Direct);
                    }
                    Err(error) => {
                        if fill.streamed {
                            kept.lost(object, range);
                        }
                        return Err(error);
                    }
                }
            }
            Ok(direct)
        })
    }

    /// The threads end when this, which holds the only senders, is gone.
    fn writing(
        tally: &Arc<Tally>,
        recent: &Arc<Recent>,
        places: usize,
        write: impl Fn(&[Queued], WriteMode) -> Result<u64, CacheError> + Send + Sync + 'static,
    ) -> Option<Self> {
        let write = Arc::new(write);
        let room = Arc::new(Semaphore::new(places));
        let pace = Arc::new(Pace::new(places, RUN_MOST as usize));
        let queues = (0..THREADS).map_while(|_| {
            let (queue, fills) = sync_channel::<Queued>(places);
            let (write, tally) = (Arc::clone(&write), Arc::clone(tally));
            let (room, pace) = (Arc::clone(&room), Arc::clone(&pace));
            let work = move || {
                while let Ok(first) = fills.recv() {
                    for run in in_runs(iter::once(first).chain(fills.try_iter()).take(BATCH)) {
                        let blocks = blocks_of(&run);
                        let mode = match run[0].fill.streamed && blocks >= DIRECT_LEAST {
                            true => pace.mode(blocks, room.available_permits(), Instant::now()),
                            false => WriteMode::Buffered,
                        };
                        match write(&run, mode) {
                            Ok(direct) if mode == WriteMode::Direct => {
                                pace.was_direct(direct > 0, Instant::now())
                            }
                            Ok(_) => {}
                            Err(_) => drop(tally.fills_failed.fetch_add(blocks, Relaxed)),
                        }
                    }
                }
            };
            let thread = std::thread::Builder::new().name("cache-fill".to_owned());
            thread.spawn(work).ok().map(|_| queue)
        });
        let queues: Arc<[_]> = queues.collect();
        (!queues.is_empty()).then(|| Self {
            queues,
            room,
            pace,
            patient: Arc::new(Semaphore::new(places / 4 * 3)),
            recent: Arc::clone(recent),
            tally: Arc::clone(tally),
        })
    }

    /// Whether the disk keeps up with what arrives.
    pub fn keep_up(&self) -> bool {
        self.pace.keeps_up(self.room.available_permits())
    }

    /// Queues the blocks if there is room at once.
    pub fn offer(&self, fill: Fill) {
        match Arc::clone(&self.room).try_acquire_many_owned(fill.count()) {
            Ok(room) => self.send(fill, room, None),
            Err(_) => self.dropped(&fill),
        }
    }

    /// Queues the blocks as soon as there is room.
    pub async fn bring(&self, fill: Fill) {
        let room = async {
            let patient = Arc::clone(&self.patient).acquire_many_owned(fill.count());
            let patient = patient.await?;
            let room = Arc::clone(&self.room).acquire_many_owned(fill.count());
            Ok::<_, AcquireError>((room.await?, patient))
        };
        match tokio::time::timeout(PATIENCE, room).await {
            Ok(Ok((room, patient))) => self.send(fill, room, Some(patient)),
            _ => self.dropped(&fill),
        }
    }

    fn send(&self, fill: Fill, room: OwnedSemaphorePermit, patient: Option<OwnedSemaphorePermit>) {
        let turn = match fill.streamed && self.pace.is_direct() {
            true => (fill.blocks.start / RUN_MOST) as usize,
            false => 0,
        };
        let queue = &self.queues[(usize::from(fill.object.id().0[2]) + turn) % self.queues.len()];
        let queued = Queued {
            fill,
            _room: room,
            _patient: patient,
        };
        if let Err(TrySendError::Full(queued) | TrySendError::Disconnected(queued)) = queue.try_send(queued) {
            self.dropped(&queued.fill);
        }
    }

    fn dropped(&self, fill: &Fill) {
        let blocks = u64::from(fill.count());
        self.tally.fills_dropped.fetch_add(blocks, Relaxed);
        if fill.streamed {
            self.recent.lost(fill.object.id(), fill.blocks.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, time::Instant};

    use bytes::Bytes;
    use parking_lot::Mutex;

    use super::{super::recent::Beside, *};
    use crate::{
        block::BLOCK_SIZE,
        cache::{Cache, CacheConfig, ObjectId, VerifyPolicy},
    };

    const QUEUE: usize = 256;
    const RECENT: usize = 16;

    /// A disk that takes a block only when told to.
    struct Shim {
        fills: Fills,
        tally: Arc<Tally>,
        take: mpsc::Sender<()>,
        recent: Arc<Recent>,
        object: Arc<CachedObject>,
        _dir: tempfile::TempDir,
    }

    impl Shim {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let cache = Cache::open(CacheConfig {
                dir: dir.path().to_owned(),
                max_bytes: 1 << 30,
                min_free: 0,
                verify: VerifyPolicy::EarlierBoot,
            })
            .unwrap();
            let id = ObjectId::derive("team", "store", "key", "content", 1 << 30, None);
            let tally = Arc::new(Tally::default());
            let (take, taken) = mpsc::channel();
            let taken = Mutex::new(taken);
            let recent = Arc::new(Recent::new(RECENT, Beside::Cache));
            let fills = Fills::writing(&tally, &recent, QUEUE, move |_, _| {
                let _ = taken.lock().recv();
                Ok(0)
            });
            Self {
                fills: fills.unwrap(),
                tally,
                take,
                recent,
                object: cache.object(id, 1 << 30),
                _dir: dir,
            }
        }

        fn fill(&self, block: u64) -> Fill {
            Fill {
                object: Arc::clone(&self.object),
                blocks: block..block + 1,
                purpose: Purpose::Reader,
                streamed: false,
            }
        }

        fn dropped(&self) -> u64 {
            self.tally.fills_dropped.load(Relaxed)
        }
    }

    #[test]
    fn a_disk_that_takes_nothing_holds_no_reader_up() {
        let shim = Shim::new();
        let began = Instant::now();
        for block in 0..10_000 {
            shim.fills.offer(shim.fill(block));
        }
        assert!(began.elapsed() < PATIENCE, "offering waited");
        // What the threads have in hand holds its room, too.
        assert_eq!(shim.dropped(), 10_000 - QUEUE as u64);
        assert!(!shim.fills.keep_up());
    }

    #[test]
    fn what_a_stream_finds_no_room_for_is_not_kept_after_it_was_read() {
        let shim = Shim::new();
        let object = shim.object.id();
        let mut reserved = shim.recent.reserve(2);
        for block in [0, 1] {
            reserved.arrived(object, block, Bytes::from_static(b"x"));
            shim.recent.read(object, block);
        }
        (0..QUEUE as u64 + 1).for_each(|block| shim.fills.offer(shim.fill(2 + block)));
        let streamed = Fill {
            streamed: true,
            ..shim.fill(1)
        };
        shim.fills.offer(streamed);
        // The older one still hopes to be cached.
        let _room = shim.recent.reserve(RECENT - 1);
        let there = [0, 1].map(|block| shim.recent.get(object, block).is_some());
        assert_eq!(there, [true, false]);
    }

    #[test]
    fn what_had_to_go_before_its_turn_is_not_cached_and_counted() {
        let shim = Shim::new();
        let recent = Arc::new(Recent::new(16, Beside::Cache));
        let (object, mut reserved) = (shim.object.id(), recent.reserve(8));
        for block in [0, 1, 3] {
            reserved.arrived(object, block, Bytes::from(vec![7; BLOCK_SIZE as usize]));
        }
        let fills = Fills::start(&shim.tally, &recent, 16).unwrap();
        for block in 0..5 {
            fills.offer(shim.fill(block));
        }
        while fills.room.available_permits() < 16 {
            std::thread::yield_now();
        }
        let cached = (0..5).filter(|block| shim.object.missing(*block..*block + 1).is_empty());
        assert_eq!(Vec::from_iter(cached), [0, 1, 3]);
        assert_eq!(shim.dropped(), 2);
    }

    #[test]
    fn what_waits_is_written_in_runs_of_neighbours() {
        let shim = Shim::new();
        let (told, runs) = mpsc::channel();
        let (take, taken) = mpsc::channel::<()>();
        let taken = Mutex::new(taken);
        let fills = Fills::writing(&shim.tally, &shim.recent, QUEUE, move |run, mode| {
            assert_eq!(mode, WriteMode::Buffered);
            let blocks: Vec<u64> = run.iter().flat_map(|queued| queued.fill.blocks.clone()).collect();
            told.send(blocks).unwrap();
            let _ = taken.lock().recv();
            Err(CacheError::Full)
        })
        .unwrap();
        fills.offer(shim.fill(500));
        assert_eq!(runs.recv().unwrap(), [500]);
        // Meanwhile the pieces of two GETs arrive in turn, and one block for another reason.
        for n in 0..20 {
            fills.offer(shim.fill(n));
            fills.offer(shim.fill(100 + n));
        }
        fills.offer(Fill {
            purpose: Purpose::WarmUp,
            ..shim.fill(120)
        });
        drop(take);
        let next = || runs.recv().unwrap();
        assert_eq!(next(), Vec::from_iter(0..16));
        assert_eq!(next(), Vec::from_iter(16..20));
        assert_eq!(next(), Vec::from_iter(100..116));
        assert_eq!(next(), Vec::from_iter(116..120));
        assert_eq!(next(), [120]);
        drop(fills);
        assert!(runs.recv().is_err(), "the threads have ended");
        assert_eq!(shim.tally.fills_failed.load(Relaxed), 42);
    }

    #[test]
    fn runs_that_come_whole_are_written_whole_and_counted_by_the_block() {
        let shim = Shim::new();
        let several = |blocks| Fill {
            blocks,
            ..shim.fill(0)
        };
        for blocks in [16..32, 0..16, 40..44, 32..40, 44..52, 52..54] {
            shim.fills.offer(several(blocks));
        }
        assert_eq!(shim.fills.room.available_permits(), QUEUE - 54);
        let queued = [16..32, 0..16, 40..44, 32..40, 44..52, 52..54].map(|blocks| Queued {
            fill: several(blocks),
            _room: Arc::clone(&shim.fills.room).try_acquire_owned().unwrap(),
            _patient: None,
        });
        let runs = in_runs(queued.into_iter());
        let blocks = runs.map(|run| run[0].fill.blocks.start..run[run.len() - 1].fill.blocks.end);
        assert_eq!(Vec::from_iter(blocks), [0..16, 16..32, 32..44, 44..54]);
        // What there is no room for is not cached in part.
        for n in 0..QUEUE as u64 / 16 {
            shim.fills.offer(several(n * 16..(n + 1) * 16));
        }
        assert_eq!(shim.dropped(), 4 * 16);
    }

    #[tokio::test]
    async fn what_nobody_waits_for_waits_for_the_disk() {
        let shim = Shim::new();
        for block in 0..QUEUE as u64 / 4 * 3 {
            shim.fills.bring(shim.fill(block)).await;
        }
        let mut more = Box::pin(shim.fills.bring(shim.fill(999)));
        assert!(
            futures::FutureExt::now_or_never(more.as_mut()).is_none(),
            "there was no room"
        );
        // What somebody waited for still finds a place.
        shim.fills.offer(shim.fill(1000));
        shim.take.send(()).unwrap();
        more.await;
        assert_eq!(shim.dropped(), 0);
    }
}
