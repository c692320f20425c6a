//! What the kernel asked of a mount, counted, and the last things that went wrong.

use std::{
    collections::VecDeque,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

use parking_lot::Mutex;

/// How many failures are remembered for `status`.
const FAILURES_KEPT: usize = 16;

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
    /// Answered with "not implemented", after which the kernel does not ask again.
    Declined "declined",
    /// Attempts to modify that came past the kernel's own check.
    Modify "modify",
}

/// Counted since the mount was made or resumed by this process.
#[derive(Debug, Default)]
pub struct Counters {
    requests: [AtomicU64; Operation::ALL.len()],
    bytes_read: AtomicU64,
    failures: AtomicU64,
    recent: Mutex<VecDeque<String>>,
}

impl Counters {
    pub(super) fn count(&self, operation: Operation) {
        self.requests[operation as usize].fetch_add(1, Relaxed);
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
