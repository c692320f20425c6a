//! One run of neighbouring blocks on its way: requests, retries, hedges, and delivery block by block.

use std::{
    collections::VecDeque,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::{StreamExt as _, stream::BoxStream};
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, watch};

use super::{
    Arrival, FetchError, FetchObject, Fetcher,
    pool::{Priority, Urgency},
    recent::Reserved,
};
use crate::{
    block::BlockNo,
    cache::Purpose,
    digest::BlockSum,
    histogram::{Distribution, Histogram},
    origin::OriginError,
};

/// Requests of one job, the first included, that may fail without delivering anything.
const TRIES: u32 = 6;
const FIRST_PAUSE: Duration = Duration::from_millis(40);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

pub(super) struct Job {
    pub fetcher: Arc<Fetcher>,
    pub object: Arc<FetchObject>,
    pub first: u64,
    /// One for each block from `first` on.
    pub waiters: Vec<watch::Sender<Option<Arrival>>>,
    pub urgency: Arc<Urgency>,
    pub purpose: Purpose,
    /// Ahead of a stream.
    pub streamed: bool,
    /// Waits for the cache's disk, as long as no reader waits for this.
    pub patient: bool,
    /// The shares of the budget that the undelivered blocks hold.
    pub memory: Option<OwnedSemaphorePermit>,
    pub low_memory: Option<OwnedSemaphorePermit>,
    pub reserved: Option<Reserved>,
    pub delivered: usize,
    /// Those of the delivered that the cache was given, or that it was not to have.
    pub filled: usize,
}

impl Job {
    /// Those it brings.
    pub fn blocks(&self) -> std::ops::Range<u64> {
        self.first..self.first + self.waiters.len() as u64
    }

    pub async fn run(mut self) {
        let started = Instant::now();
        let result = self.fetch().await;
        tracing::debug!(took = ?started.elapsed(), failed = result.is_err(), "ended");
        // Those who wait for what failed are told at once: no wait for the disk before that.
        self.patient &= result.is_ok();
        self.fill().await;
        if let Err(error) = result {
            if self.urgency.get() != Priority::Waited {
                tracing::debug!(key = self.object.source.key, %error, "fetching ahead failed");
            }
            self.fail(&error);
        }
    }

    async fn fetch(&mut self) -> Result<(), FetchError> {
        let fetcher = Arc::clone(&self.fetcher);
        let blocks = u32::try_from(self.waiters.len()).unwrap_or(u32::MAX);
        self.low_memory = match self.urgency.get() {
            Priority::Waited => None,
            _ => tokio::select! {
                permit = Arc::clone(&fetcher.low_memory).acquire_many_owned(blocks) => {
                    Some(permit.map_err(|_| FetchError::Stopped)?)
                }
                // Somebody waits for it now: it no longer counts among the low.
                () = self.urgency.raised() => None,
            },
        };
        let memory = Arc::clone(&fetcher.memory).acquire_many_owned(blocks).await;
        self.memory = Some(memory.map_err(|_| FetchError::Stopped)?);
        self.reserved = Some(fetcher.recent.reserve(self.waiters.len()));
        fetcher.tally.misses.fetch_add(u64::from(blocks), Relaxed);
        let mut fruitless = 0;
        let mut corrupt = None;
        // Queueing has no deadline here: readers have their own, and warm-up may wait as long as it takes.
        let limit = fetcher.config.read_deadline;
        let mut progress = None;
        loop {
            let before = self.delivered;
            let permit = self.object.pool.acquire(&self.urgency).await;
            let since = *progress.get_or_insert_with(Instant::now);
            let left = limit.saturating_sub(since.elapsed());
            let Ok(outcome) = tokio::time::timeout(left, self.request()).await else {
                if self.delivered == before {
                    return Err(FetchError::Deadline(limit));
                }
                // Slow, but alive: what is still missing is asked for again.
                progress = None;
                continue;
            };
            drop(permit);
            if self.delivered > before {
                fruitless = 0;
                progress = None;
            }
            match outcome {
                Ok(()) => {
                    self.object.pool.all_is_well();
                    return Ok(());
                }
                Err(Stop::Corrupt(block)) => {
                    fetcher.tally.corrupt_blocks.fetch_add(1, Relaxed);
                    if corrupt.replace(block) == Some(block) {
                        return Err(FetchError::Corrupt {
                            key: self.object.source.key.clone(),
                            block,
                        });
                    }
                }
                Err(Stop::Fetch(error)) => return Err(error),
                Err(Stop::Origin(error)) => {
                    fruitless += 1;
                    if !error.is_retryable() || fruitless >= TRIES {
                        return Err(FetchError::Origin(Arc::new(error)));
                    }
                    tracing::debug!(
                        key = self.object.source.key,
                        error = error.chain(),
                        fruitless,
                        "trying again"
                    );
                    if matches!(error, OriginError::Throttled { .. }) {
                        fetcher.tally.slow_downs.fetch_add(1, Relaxed);
                        self.object.pool.slow_down();
                    }
                    let pause = (FIRST_PAUSE * 2u32.pow(fruitless.min(8))).min(LONGEST_PAUSE);
                    tokio::time::sleep(pause.mul_f64(rand::random_range(0.25..1.0))).await;
                }
            }
            fetcher.tally.retries.fetch_add(1, Relaxed);
        }
    }

    /// One GET of what is still missing.
    async fn request(&mut self) -> Result<(), Stop> {
        let source = &self.object.source;
        let from = self.first + self.delivered as u64;
        let until = self.first + self.waiters.len() as u64;
        let range =
            BlockNo(from).byte_range(source.size).start..BlockNo(until - 1).byte_range(source.size).end;
        let sums = match &source.sums {
            None => None,
            Some(sums) => {
                // While the bytes are on their way.
                let (sums, body) = tokio::join!(sums.sums(from..until), self.open(range.clone()));
                let sums = sums.map_err(Stop::Fetch)?;
                if sums.len() as u64 != until - from {
                    return Err(Stop::Fetch(FetchError::Sums {
                        key: source.key.clone(),
                        reason: format!("{} sums for {} blocks", sums.len(), until - from),
                    }));
                }
                return self.receive(body.map_err(Stop::Origin)?, Some(sums)).await;
            }
        };
        let body = self.open(range).await.map_err(Stop::Origin)?;
        self.receive(body, sums).await
    }

    async fn receive(
        &mut self,
        mut body: BoxStream<'static, Result<Bytes, OriginError>>,
        sums: Option<Vec<BlockSum>>,
    ) -> Result<(), Stop> {
        let start = self.delivered;
        let mut buffer = None;
        while let Some(chunk) = body.next().await {
            let mut chunk = chunk.map_err(Stop::Origin)?;
            self.fetcher
                .tally
                .origin_bytes
                .fetch_add(chunk.len() as u64, Relaxed);
            while !chunk.is_empty() && self.delivered < self.waiters.len() {
                let block = self.first + self.delivered as u64;
                let range = BlockNo(block).byte_range(self.object.source.size);
                let length = usize::try_from(range.end - range.start).unwrap_or(0);
                let mut filling = buffer.take().unwrap_or_else(|| self.fetcher.buffers.take());
                filling.take_from(&mut chunk, length);
                if filling.len() < length {
                    buffer = Some(filling);
                } else {
                    let bytes = filling.freeze();
                    if let Some(sums) = &sums
                        && BlockSum::of(&bytes) != sums[self.delivered - start]
                    {
                        return Err(Stop::Corrupt(block));
                    }
                    self.deliver(block, bytes).await;
                }
            }
        }
        if self.delivered < self.waiters.len() {
            Err(Stop::Fetch(FetchError::Stopped))
        } else {
            Ok(())
        }
    }

    async fn deliver(&mut self, block: u64, bytes: Bytes) {
        // In this order a block is never in neither place (see `start_absent`).
        if let Some(reserved) = &mut self.reserved {
            reserved.arrived(self.object.id, block, bytes.clone());
        }
        self.object.flights.lock().remove(&block);
        self.waiters[self.delivered].send_replace(Some(Ok(bytes)));
        self.delivered += 1;
        for share in [&mut self.memory, &mut self.low_memory].into_iter().flatten() {
            drop(share.split(1));
        }
        // Written together, neighbours cost half as much as by themselves, and fewer threads are woken.
        if (block + 1).is_multiple_of(self.fetcher.fill_run) {
            self.fill().await;
        }
    }

    /// Gives the cache what was delivered since the last time.
    async fn fill(&mut self) {
        let blocks = self.first + self.filled as u64..self.first + self.delivered as u64;
        self.filled = self.delivered;
        if blocks.is_empty() {
            return;
        }
        // Somebody who waited has what he waited for, unless it is among what is still to come.
        let waited = self.patient && self.urgency.get() == Priority::Waited && {
            let flights = self.object.flights.lock();
            (blocks.end..self.blocks().end)
                .any(|block| flights.get(&block).is_some_and(|flight| flight.waited))
        };
        let patient = self.patient && !waited;
        self.fetcher
            .fill(&self.object, blocks, self.purpose, self.streamed, patient)
            .await;
    }

    fn fail(&mut self, error: &FetchError) {
        let mut flights = self.object.flights.lock();
        for at in self.delivered..self.waiters.len() {
            flights.remove(&(self.first + at as u64));
        }
        drop(flights);
        for waiter in &self.waiters[self.delivered..] {
            waiter.send_replace(Some(Err(error.clone())));
        }
        self.delivered = self.waiters.len();
    }

    /// Sends the request, and a second one when the first is slow to answer: the faster wins.
    async fn open(
        &self,
        range: std::ops::Range<u64>,
    ) -> Result<BoxStream<'static, Result<Bytes, OriginError>>, OriginError> {
        let source = &self.object.source;
        let latency = &self.fetcher.latency;
        let started = Instant::now();
        let send = || {
            self.fetcher.tally.gets.fetch_add(1, Relaxed);
            latency.sent();
            Box::pin(source.store.get_range(&source.key, &source.pin, range.clone()))
        };
        let mut first = send();
        let patience = if self.urgency.get() == Priority::WarmUp {
            None
        } else {
            latency.patience()
        };
        let opened = match patience {
            None => first.await,
            Some(patience) => match tokio::time::timeout(patience, &mut first).await {
                Ok(opened) => opened,
                Err(_) if latency.may_hedge() => {
                    self.fetcher.tally.hedges.fetch_add(1, Relaxed);
                    let second = send();
                    match futures::future::select(first, second).await {
                        futures::future::Either::Left((Err(_), other))
                        | futures::future::Either::Right((Err(_), other)) => other.await,
                        futures::future::Either::Left((opened, _))
                        | futures::future::Either::Right((opened, _)) => opened,
                    }
                }
                Err(_) => first.await,
            },
        };
        tracing::debug!(took = ?started.elapsed(), failed = opened.is_err(), ?range, "GET");
        if opened.is_ok() {
            latency.answered(started.elapsed());
        }
        opened
    }
}

impl Drop for Job {
    /// A job that is dropped (the runtime goes down) must not leave blocks marked as coming.
    fn drop(&mut self) {
        if self.delivered < self.waiters.len() {
            self.fail(&FetchError::Stopped);
        }
    }
}

enum Stop {
    Origin(OriginError),
    Fetch(FetchError),
    Corrupt(u64),
}

/// How long answers take, and how many second requests that justifies.
#[derive(Default)]
pub(super) struct Latency {
    state: Mutex<Answers>,
    times: Histogram,
}

#[derive(Default)]
struct Answers {
    recent: VecDeque<Duration>,
    patience: Option<Duration>,
    since_sorted: usize,
    /// Second requests allowed; each request earns a twentieth.
    allowance: f64,
}

const REMEMBERED: usize = 256;
const BEFORE_HEDGING: usize = 32;

impl Latency {
    fn sent(&self) {
        let mut answers = self.state.lock();
        answers.allowance = (answers.allowance + 0.05).min(8.0);
    }

    pub fn times(&self) -> Distribution {
        self.times.read()
    }

    fn answered(&self, took: Duration) {
        self.times.observe(took);
        let mut answers = self.state.lock();
        if answers.recent.len() == REMEMBERED {
            answers.recent.pop_front();
        }
        answers.recent.push_back(took);
        answers.since_sorted += 1;
        if answers.recent.len() >= BEFORE_HEDGING && answers.since_sorted >= BEFORE_HEDGING {
            answers.since_sorted = 0;
            let mut sorted: Vec<_> = answers.recent.iter().copied().collect();
            sorted.sort_unstable();
            // Not the 99th percentile: with two stragglers in a hundred that would be a straggler itself.
            let late = sorted[sorted.len() * 95 / 100];
            let usual = sorted[sorted.len() / 2];
            answers.patience = Some(
                (late.min(usual * 4))
                    .max(usual * 3 / 2)
                    .max(Duration::from_millis(10)),
            );
        }
    }

    fn patience(&self) -> Option<Duration> {
        self.state.lock().patience
    }

    fn may_hedge(&self) -> bool {
        let mut answers = self.state.lock();
        let allowed = answers.allowance >= 1.0;
        if allowed {
            answers.allowance -= 1.0;
        }
        allowed
    }
}
