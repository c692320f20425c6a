//! How much the cache takes, and making room.
//!
//! Owns the count of allocated bytes, the statistics, admission, the news that readers and fillers
//! leave for the policy, and the thread that keeps some room free ahead of the fillers.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use super::{CacheError, CacheStats, Purpose, Shared, disk, object::Evicted, order, policy::Unit};
use crate::block::EXTENT_SIZE;

#[derive(Default)]
pub struct Space {
    /// Of everything met so far.
    allocated: AtomicI64,
    /// Of what the scan has not come to yet: an estimate from the last run.
    unscanned: AtomicU64,
    /// Bytes that may still be written before the disk's free space is looked at again.
    credit: AtomicI64,
}

impl Space {
    pub fn new(last_total: u64) -> Self {
        Self {
            unscanned: AtomicU64::new(last_total),
            ..Self::default()
        }
    }

    pub fn recount(&self, before: u64, now: u64) {
        self.allocated
            .fetch_add(now as i64 - before as i64, Ordering::AcqRel);
    }

    pub fn give_back(&self, bytes: u64) {
        self.allocated.fetch_sub(bytes as i64, Ordering::AcqRel);
    }

    pub fn set_unscanned(&self, bytes: u64) {
        self.unscanned.store(bytes, Ordering::Release);
    }

    pub fn used(&self) -> u64 {
        let counted = self.allocated.load(Ordering::Acquire).max(0) as u64;
        counted + self.unscanned.load(Ordering::Acquire)
    }
}

const STRIPES: usize = 16;

/// Its own cache line per stripe: readers on different cores do not share one.
#[derive(Default)]
#[repr(align(128))]
struct Stripe {
    hits: AtomicU64,
    misses: AtomicU64,
}

#[derive(Default)]
pub struct Counters {
    stripes: [Stripe; STRIPES],
    evictions: AtomicU64,
    fills: AtomicU64,
    fill_errors: AtomicU64,
    verify_failures: AtomicU64,
    pub objects: AtomicI64,
    degraded: Mutex<Option<(String, Instant)>>,
}

fn stripe() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local!(static MINE: usize = NEXT.fetch_add(1, Ordering::Relaxed) % STRIPES);
    MINE.with(|mine| *mine)
}

impl Counters {
    pub fn read(&self, hit: bool) {
        let stripe = &self.stripes[stripe()];
        if hit { &stripe.hits } else { &stripe.misses }.fetch_add(1, Ordering::Relaxed);
    }

    pub fn damaged(&self) {
        self.verify_failures.fetch_add(1, Ordering::Relaxed);
    }
}

/// What happened since the policy last looked. Bounded: under pressure references are lost, which
/// costs nothing but a little order.
#[derive(Default)]
pub struct News {
    stripes: [Mutex<Vec<(Unit, u64, Event)>>; STRIPES],
}

#[derive(Clone, Copy)]
pub enum Event {
    Referenced,
}

const NEWS_MOST: usize = 512;
/// How long the cache leaves a failing disk alone.
const REST: Duration = Duration::from_secs(2);
const EVICTION_PATIENCE: Duration = Duration::from_millis(200);
const CREDIT: u64 = 16 << 20;
const SETTLE_EVERY: Duration = Duration::from_secs(60);
/// The order as a whole; the moves in between are written as often as [`JOURNAL_EVERY`].
const SAVE_EVERY: Duration = Duration::from_secs(120);
const JOURNAL_EVERY: Duration = Duration::from_secs(5);

impl Shared {
    pub(super) fn referenced(&self, unit: Unit, bytes: u64) {
        let mut news = self.news.stripes[stripe()].lock();
        if news.len() < NEWS_MOST {
            news.push((unit, bytes, Event::Referenced));
        }
        let full = news.len() == NEWS_MOST;
        drop(news);
        if full {
            self.wake();
        }
    }

    pub(super) fn arrived(&self, unit: Unit, bytes: u64, purpose: Purpose) {
        self.hear();
        self.policy.lock().insert(unit, bytes, purpose);
    }

    /// Tells the policy the news.
    pub(super) fn hear(&self) {
        for stripe in &self.news.stripes {
            let news = std::mem::take(&mut *stripe.lock());
            if news.is_empty() {
                continue;
            }
            let mut policy = self.policy.lock();
            for (unit, bytes, event) in news {
                match event {
                    Event::Referenced => policy.reference(unit, bytes),
                }
            }
            self.clock.store(policy.clock(), Ordering::Relaxed);
        }
    }

    pub(super) fn wake(&self) {
        let (wake, changed) = &self.alarm;
        *wake.lock() = true;
        changed.notify_all();
    }

    /// Room that the background keeps free, so that fillers seldom evict.
    fn headroom(&self) -> u64 {
        (self.config.max_bytes / 32).min(32 * EXTENT_SIZE)
    }

    /// Lets `bytes` be written, making room where there is none.
    pub(super) fn admit(&self, bytes: u64) -> Result<(), CacheError> {
        if self.resting() {
            return Err(CacheError::Resting);
        }
        let used = self.space.used();
        if used + bytes + self.headroom() / 2 > self.config.max_bytes {
            self.wake();
        }
        for _ in 0..64 {
            if self.space.used() + bytes <= self.config.max_bytes {
                break;
            }
            if !self.evict_one() {
                return Err(CacheError::Full);
            }
        }
        if self.space.used() + bytes > self.config.max_bytes {
            return Err(CacheError::Full);
        }
        if self.space.credit.fetch_sub(bytes as i64, Ordering::AcqRel) < bytes as i64 {
            self.renew_credit(bytes)?;
        }
        Ok(())
    }

    /// Looks at the disk itself: others write to it too.
    fn renew_credit(&self, bytes: u64) -> Result<(), CacheError> {
        for attempt in 0..8 {
            let (free, _) =
                disk::free_space(&self.root).map_err(|error| CacheError::io("looking at the disk", error))?;
            let spare = free.saturating_sub(self.config.min_free);
            if spare > bytes {
                self.space
                    .credit
                    .store(spare.min(CREDIT) as i64, Ordering::Release);
                return Ok(());
            }
            self.space.credit.store(0, Ordering::Release);
            if attempt == 0 {
                self.wake();
            }
            if !self.evict_one() {
                break;
            }
        }
        Err(CacheError::DiskFull)
    }

    /// Evicts the coldest unit that nobody uses, or waits for an eviction under way elsewhere; false
    /// when there is neither.
    pub(super) fn evict_one(&self) -> bool {
        self.hear();
        for _ in 0..32 {
            let (count, ended) = &self.evicting;
            let unit = {
                // Taken off the list and counted in one step, or a filler in between would see neither.
                let mut count = count.lock();
                let victim = self.policy.lock().victim();
                match victim {
                    Some(unit) => {
                        *count += 1;
                        unit
                    }
                    None if *count > 0 => {
                        return !ended.wait_for(&mut count, EVICTION_PATIENCE).timed_out();
                    }
                    None => return false,
                }
            };
            let outcome = self.me.upgrade().map(|shared| shared.evict_unit(unit));
            if !matches!(outcome, Some(Ok(Evicted::Gone))) {
                self.policy.lock().keep(unit);
            }
            *count.lock() -= 1;
            ended.notify_all();
            match outcome {
                None => return false,
                Some(Ok(Evicted::Gone)) => {
                    self.counters.evictions.fetch_add(1, Ordering::Relaxed);
                    return true;
                }
                Some(Ok(Evicted::Busy)) => {}
                Some(Err(error)) => {
                    self.trouble("evicting", &error);
                    return false;
                }
            }
        }
        false
    }

    fn resting(&self) -> bool {
        self.refuses()
            || self
                .counters
                .degraded
                .lock()
                .as_ref()
                .is_some_and(|(_, since)| since.elapsed() < REST)
    }

    /// The disk failed: said once, until it works again.
    pub(super) fn trouble(&self, doing: &'static str, error: &io::Error) {
        self.degrade(match error.kind() {
            io::ErrorKind::StorageFull => format!("the disk is full ({doing}: {error})"),
            _ => format!("failed {doing}: {error}"),
        });
    }

    pub(super) fn degrade(&self, reason: String) {
        if self.refuses() {
            return;
        }
        let mut degraded = self.counters.degraded.lock();
        if degraded.is_none() {
            tracing::warn!(dir = %self.config.dir.display(), %reason, "the cache is not storing; reads go to the origin");
        }
        *degraded = Some((reason, Instant::now()));
    }

    /// After every fill, of so many blocks.
    pub(super) fn filled(&self, outcome: &Result<u64, CacheError>, blocks: usize) {
        match outcome {
            Ok(_) => {
                self.counters.fills.fetch_add(blocks as u64, Ordering::Relaxed);
                if self.counters.degraded.lock().take().is_some() {
                    tracing::info!("the cache is storing again");
                }
            }
            Err(error) => {
                self.counters
                    .fill_errors
                    .fetch_add(blocks as u64, Ordering::Relaxed);
                match error {
                    CacheError::Io { doing, source } => self.trouble(doing, source),
                    CacheError::DiskFull => self.degrade(error.to_string()),
                    _ => {}
                }
            }
        }
    }

    pub(super) fn stats(&self) -> CacheStats {
        let sum = |of: fn(&Stripe) -> &AtomicU64| {
            self.counters
                .stripes
                .iter()
                .map(|stripe| of(stripe).load(Ordering::Relaxed))
                .sum()
        };
        CacheStats {
            allocated_bytes: self.space.used(),
            max_bytes: self.config.max_bytes,
            objects: self.counters.objects.load(Ordering::Relaxed).max(0) as u64,
            units: self.policy.lock().len() as u64,
            hits: sum(|stripe| &stripe.hits),
            misses: sum(|stripe| &stripe.misses),
            evictions: self.counters.evictions.load(Ordering::Relaxed),
            fill_errors: self.counters.fill_errors.load(Ordering::Relaxed),
            verify_failures: self.counters.verify_failures.load(Ordering::Relaxed),
            scanned: self.scan.lock().finished(),
            degraded: self.refusal.clone().or_else(|| {
                let degraded = self.counters.degraded.lock();
                degraded.as_ref().map(|(reason, _)| reason.clone())
            }),
        }
    }
}

/// The background thread: news, room, durable marks, the saved order.
pub(super) fn run(shared: &Arc<Shared>) {
    let (mut settled, mut saved, mut noted) = (Instant::now(), Instant::now(), Instant::now());
    let mut journal: Option<order::Journal> = None;
    let mut written = 0;
    loop {
        {
            let (wake, changed) = &shared.alarm;
            let mut awake = wake.lock();
            if !*awake {
                changed.wait_for(&mut awake, Duration::from_millis(500));
            }
            *awake = false;
        }
        if shared.stop.load(Ordering::Acquire) {
            return;
        }
        shared.hear();
        shared.space.give_back(shared.handed.tidy());
        while shared.space.used() + shared.headroom() > shared.config.max_bytes
            || disk::free_space(&shared.root).is_ok_and(|(free, _)| free < shared.config.min_free)
        {
            if shared.stop.load(Ordering::Acquire) || !shared.evict_one() {
                break;
            }
        }
        let fills = shared.counters.fills.load(Ordering::Relaxed);
        if settled.elapsed() > SETTLE_EVERY && fills != written {
            settled = Instant::now();
            written = fills;
            if let Err(error) = shared.settle() {
                shared.trouble("syncing", &error);
            }
        }
        if noted.elapsed() < JOURNAL_EVERY || !shared.policy.lock().has_moved() {
            continue;
        }
        noted = Instant::now();
        if let Some(open) = &mut journal
            && saved.elapsed() < SAVE_EVERY
        {
            match open.append(shared) {
                Ok(true) => continue,
                Ok(false) => {}
                Err(error) => shared.trouble("noting the order", &error),
            }
        }
        // Before the scan has ended, what the last run left says more than what is known.
        if shared.scan.lock().finished() {
            saved = Instant::now();
            journal = match order::save(shared) {
                Ok(journal) => Some(journal),
                Err(error) => {
                    shared.trouble("saving the order", &error);
                    None
                }
            };
        }
    }
}
