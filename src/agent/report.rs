//! What a mount has done: for `status` while it lives, and for the report when it ends.

use std::{
    fs::File,
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;

use super::{
    Agent, Mount,
    access::Caller,
    control::{MountInfo, MountReport, SlowRequest, Traffic},
    reuse::Reuse,
    snapshot::Snapshot,
    stored::blocking,
};
use crate::{
    block::BLOCK_SIZE,
    fetch::Fetcher,
    fs::{
        Owner,
        content::{Content, ReadError},
    },
    fuse::{IoMode, Mounted, Operation},
    profile::Recorder,
    tree::{Ino, ObjectNo},
};

/// Asking the cache about every object of a large version takes seconds: so long, and then it is an estimate.
const CACHED_PATIENCE: Duration = Duration::from_millis(150);
/// `status --watch` asks more often than the answer changes.
const CACHED_AGAIN: Duration = Duration::from_secs(2);

/// The counters of one mount.
pub(super) struct Watch {
    fetcher: Arc<Fetcher>,
    reuse: Arc<Reuse>,
    owner: Owner,
    /// Of a mount that records a profile.
    recorder: Option<Arc<Recorder>>,
    /// When it was measured, and how much of the objects the cache has.
    cached: Mutex<Option<(Instant, f64)>>,
}

impl Watch {
    pub fn new(fetcher: &Fetcher, owner: Owner, recorded: bool) -> Self {
        Self {
            recorder: recorded.then(Arc::default),
            fetcher: fetcher.account(),
            reuse: Arc::default(),
            owner,
            cached: Mutex::default(),
        }
    }

    pub fn fetcher(&self) -> &Arc<Fetcher> {
        &self.fetcher
    }

    pub fn recorder(&self) -> Option<&Arc<Recorder>> {
        self.recorder.as_ref()
    }

    pub fn owner(&self) -> Owner {
        self.owner
    }

    /// The same content, seen being read.
    pub fn over(&self, content: Arc<dyn Content>) -> Arc<dyn Content> {
        Arc::new(Watched {
            content,
            reuse: Arc::clone(&self.reuse),
            recorder: self.recorder.clone(),
        })
    }

    pub fn traffic(&self, mounted: &Mounted) -> Traffic {
        let counters = mounted.counters();
        let fetch = self.fetcher.stats();
        let (hits, misses) = (
            counters.get(Operation::ReadHit),
            counters.get(Operation::ReadMiss),
        );
        let open_files = match mounted.io_mode().mode {
            // The kernel opens by itself.
            IoMode::NoOpen => None,
            IoMode::Passthrough | IoMode::KeepCache => Some(
                counters
                    .get(Operation::Open)
                    .saturating_sub(counters.get(Operation::Release)),
            ),
        };
        Traffic {
            open_files,
            bytes_read: counters.bytes_read(),
            bytes_from_cache: fetch.cache_bytes,
            bytes_from_origin: fetch.origin_bytes,
            hit_ratio: (hits + misses > 0).then(|| hits as f64 / (hits + misses) as f64),
            origin_requests: fetch.gets,
            retries: fetch.retries,
            waited_seconds: counters.times(Operation::ReadMiss).sum.as_secs_f64(),
            failures: counters.failures(),
            last_error: counters.recent_failures().pop().or(fetch.last_error),
        }
    }

    /// The share of the version's objects that is in the cache. Blocking.
    fn cached_share(&self, snapshot: &Snapshot) -> f64 {
        if let Some((at, share)) = *self.cached.lock()
            && at.elapsed() < CACHED_AGAIN
        {
            return share;
        }
        let objects = u64::from(snapshot.tree.object_count());
        // In steps that come everywhere: whatever part is seen in time is a fair sample.
        let step = fair_step(objects);
        let started = Instant::now();
        let (mut present, mut size) = (0, 0);
        for visit in 0..objects {
            let number = u32::try_from(visit.wrapping_mul(step) % objects).unwrap_or(0);
            if let Ok(object) = snapshot.object(&self.fetcher, ObjectNo(number)) {
                size += object.size();
                present += object.cached().map_or(0, |cached| cached.present_bytes());
            }
            if visit % 64 == 63 && started.elapsed() > CACHED_PATIENCE {
                break;
            }
        }
        let share = if size == 0 {
            1.0
        } else {
            present as f64 / size as f64
        };
        *self.cached.lock() = Some((Instant::now(), share));
        share
    }
}

/// Near the golden section of `count`, and without a common divisor with it.
fn fair_step(count: u64) -> u64 {
    let coprime = |step: u64| {
        let (mut a, mut b) = (step, count.max(1));
        while b > 0 {
            (a, b) = (b, a % b);
        }
        a == 1
    };
    let first = (count as f64 * 0.618) as u64;
    (first.max(1)..=count.max(1))
        .find(|step| coprime(*step))
        .unwrap_or(1)
}

struct Watched {
    content: Arc<dyn Content>,
    reuse: Arc<Reuse>,
    recorder: Option<Arc<Recorder>>,
}

impl Watched {
    fn used(&self, object: ObjectNo, range: &Range<u64>) {
        self.reuse.used(object, range);
        if let Some(recorder) = &self.recorder {
            recorder.wanted(object, range);
        }
    }
}

#[async_trait]
impl Content for Watched {
    fn read_cached(&self, object: ObjectNo, range: Range<u64>, buf: &mut Vec<u8>) -> bool {
        let used = range.clone();
        let read = self.content.read_cached(object, range, buf);
        if read {
            self.used(object, &used);
        }
        read
    }

    async fn read(&self, object: ObjectNo, range: Range<u64>) -> Result<Bytes, ReadError> {
        self.used(object, &range);
        self.content.read(object, range).await
    }

    fn advise(&self, ino: Ino, object: ObjectNo, range: Range<u64>, file: Range<u64>) {
        self.content.advise(ino, object, range, file);
    }

    fn cached_bytes(&self, object: ObjectNo, range: Range<u64>) -> u64 {
        self.content.cached_bytes(object, range)
    }

    fn seal(&self, object: ObjectNo) -> Option<Arc<File>> {
        self.content.seal(object)
    }
}

impl Mount {
    pub(super) fn report(&self) -> MountReport {
        let traffic = self.watch.traffic(&self.mounted);
        let fetch = self.watch.fetcher.stats();
        let unread = fetch.readahead_blocks.saturating_sub(fetch.readahead_used) * BLOCK_SIZE;
        let seen = self.watch.reuse.seen();
        let path = |ino: Ino| {
            let row = u32::try_from(ino.0.saturating_sub(1)).unwrap_or(u32::MAX);
            match self.snapshot.tree.path(crate::tree::RowNo(row)) {
                Ok(path) => path.escape_ascii().to_string(),
                Err(_) => format!("inode {}", ino.0),
            }
        };
        let slowest = self.mounted.counters().slowest();
        MountReport {
            seconds: jiff::Timestamp::now()
                .duration_since(self.info.since)
                .as_secs_f64()
                .max(0.0),
            bytes_read: traffic.bytes_read,
            bytes_from_cache: traffic.bytes_from_cache,
            bytes_from_origin: traffic.bytes_from_origin,
            bytes_used_of_fetched: traffic.bytes_from_origin.saturating_sub(unread),
            hit_ratio: traffic.hit_ratio,
            origin_requests: traffic.origin_requests,
            retries: traffic.retries,
            failures: traffic.failures,
            waited_seconds: traffic.waited_seconds,
            slowest: slowest
                .into_iter()
                .map(|read| SlowRequest {
                    path: path(read.ino),
                    offset: read.offset,
                    length: read.length,
                    seconds: read.took.as_secs_f64(),
                })
                .collect(),
            distinct_bytes: seen.distinct_bytes,
            suggested_cache_bytes: seen.suggested_bytes,
        }
    }

    /// The report in the log.
    pub(super) fn log_report(&self) {
        let report = self.report();
        let slowest = report
            .slowest
            .first()
            .map(|slow| format!("{} ({:.3} s)", slow.path, slow.seconds));
        tracing::info!(
            reference = %self.info.reference,
            bytes_read = report.bytes_read,
            bytes_fetched = report.bytes_from_origin,
            bytes_used_of_fetched = report.bytes_used_of_fetched,
            hit_ratio = report.hit_ratio,
            waited_seconds = report.waited_seconds,
            slowest,
            suggested_cache_bytes = report.suggested_cache_bytes,
            "report"
        );
    }

    fn info_in_full(&self) -> MountInfo {
        let share = self.watch.cached_share(&self.snapshot);
        let mut info = self.current_info();
        info.cached_percent = Some(share * 100.0);
        info
    }
}

impl Agent {
    /// The mounts that the caller may see, with how much of each is in the cache.
    pub async fn mounts_in_full(&self, caller: &Caller) -> Vec<MountInfo> {
        let mounts = self.seen_by(caller);
        blocking(move || mounts.iter().map(|mount| mount.info_in_full()).collect()).await
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn fair_steps_visit_everything_once() {
        for count in [1, 2, 3, 6, 64, 97, 1000] {
            let step = fair_step(count);
            let visited: BTreeSet<u64> = (0..count).map(|visit| visit * step % count).collect();
            assert_eq!(visited.len() as u64, count, "{count} by {step}");
        }
    }
}
