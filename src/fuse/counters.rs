//! What the kernel asked of a mount, counted and timed, the slowest of it, and the last things that went wrong.

use std::{
    collections::VecDeque,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use crate::{
    histogram::{Distribution, Histogram},
    tree::Ino,
};

/// How many failures are remembered for `status`, and how many slow reads.
const FAILURES_KEPT: usize = 16;
const SLOW_KEPT: usize = 8;

macro_rules! operations {
    ($($(#[$note:meta])* $variant:ident $name:literal),* $(,)?) => {
        /// The kinds of requests.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Operation { $($(#[$note])* $variant),* }

        impl Operation {
            pub const ALL: &[Operation] = &[$(Operation::$variant),*];

            pub fn name(self) -> &'static str {
                match self { $(Operation::$variant => $name),* }
            }
        }
    };
}

operations! {
    Lookup "lookup",
    GetAttr "getattr",
    ReadLink "readlink",
    Open "open",
    ReadHit "read-hit",
    ReadMiss "read-miss",
    Release "release",
    ReadDir "readdir",
    ReadDirPlus "readdirplus",
    StatFs "statfs",
    GetXattr "getxattr",
    ListXattr "listxattr",
    /// Answered with ENOSYS, after which the kernel does not ask again.
    Declined "declined",
    /// Attempts to modify that came past the kernel's own check.
    Modify "modify",
}

/// Counted since the mount was made or resumed by this process.
#[derive(Debug, Default)]
pub struct Counters {
    requests: [AtomicU64; Operation::ALL.len()],
    times: [Histogram; Operation::ALL.len()],
    bytes_read: AtomicU64,
    failures: AtomicU64,
    recent: Mutex<VecDeque<String>>,
    /// Longest first.
    slowest: Mutex<Vec<SlowRead>>,
    /// A read that was faster is none of `slowest`, in nanoseconds.
    slow_from: AtomicU64,
}

/// A read that somebody waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlowRead {
    pub took: Duration,
    pub ino: Ino,
    pub offset: u64,
    pub length: u64,
}

/// A request that is being answered; timed when this goes.
pub(super) struct Timed<'counters> {
    counters: &'counters Counters,
    operation: Operation,
    started: Instant,
}

impl Drop for Timed<'_> {
    fn drop(&mut self) {
        self.counters.took(self.operation, self.started.elapsed());
    }
}

impl Counters {
    pub(super) fn count(&self, operation: Operation) {
        self.requests[operation as usize].fetch_add(1, Relaxed);
    }

    /// Counts it, and times it until the guard goes.
    pub(super) fn time(&self, operation: Operation) -> Timed<'_> {
        self.count(operation);
        Timed {
            counters: self,
            operation,
            started: Instant::now(),
        }
    }

    pub(super) fn took(&self, operation: Operation, took: Duration) {
        self.times[operation as usize].observe(took);
    }

    /// A read that had to wait has been answered.
    pub(super) fn waited(&self, read: SlowRead) {
        self.took(Operation::ReadMiss, read.took);
        let nanos = |took: Duration| u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        if nanos(read.took) < self.slow_from.load(Relaxed) {
            return;
        }
        let mut slowest = self.slowest.lock();
        let at = slowest.partition_point(|other| other.took >= read.took);
        slowest.insert(at, read);
        slowest.truncate(SLOW_KEPT);
        if slowest.len() == SLOW_KEPT {
            self.slow_from
                .store(slowest.last().map_or(0, |read| nanos(read.took)), Relaxed);
        }
    }

    /// The reads that took longest, longest first.
    pub fn slowest(&self) -> Vec<SlowRead> {
        self.slowest.lock().clone()
    }

    /// How long requests of this kind took.
    pub fn times(&self, operation: Operation) -> Distribution {
        self.times[operation as usize].read()
    }

    pub(super) fn count_bytes(&self, bytes: usize) {
        self.bytes_read.fetch_add(bytes as u64, Relaxed);
    }

    pub(super) fn failed(&self, message: String) {
        self.failures.fetch_add(1, Relaxed);
        let mut recent = self.recent.lock();
        if recent.len() == FAILURES_KEPT {
            recent.pop_front();
        }
        recent.push_back(message);
    }

    pub fn get(&self, operation: Operation) -> u64 {
        self.requests[operation as usize].load(Relaxed)
    }

    pub fn total(&self) -> u64 {
        self.requests.iter().map(|count| count.load(Relaxed)).sum()
    }

    /// Bytes sent to the kernel; what it reads by itself (passthrough, page cache) is not among them.
    pub fn bytes_read(&self) -> u64 {
        self.bytes_read.load(Relaxed)
    }

    pub fn failures(&self) -> u64 {
        self.failures.load(Relaxed)
    }

    /// The last failures, oldest first.
    pub fn recent_failures(&self) -> Vec<String> {
        self.recent.lock().iter().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slowest_reads_are_kept_longest_first() {
        let counters = Counters::default();
        // 1..=100 in an order that is neither ascending nor descending.
        for step in 0..100_u64 {
            counters.waited(SlowRead {
                took: Duration::from_millis(step * 37 % 100 + 1),
                ino: Ino(step),
                offset: 0,
                length: 1,
            });
        }
        let kept: Vec<_> = counters
            .slowest()
            .iter()
            .map(|read| read.took.as_millis())
            .collect();
        assert_eq!(kept, [100, 99, 98, 97, 96, 95, 94, 93]);
        assert_eq!(counters.times(Operation::ReadMiss).count(), 100);
    }
}
