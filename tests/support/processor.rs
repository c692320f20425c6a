//! What a benchmark's own process has cost so far.

use nix::sys::resource::{UsageWho, getrusage};

/// Processor seconds of all threads of this process, the kernel's work for them included.
pub fn seconds() -> f64 {
    getrusage(UsageWho::RUSAGE_SELF).map_or(0.0, |usage| {
        [usage.user_time(), usage.system_time()]
            .iter()
            .map(|time| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6)
            .sum()
    })
}
