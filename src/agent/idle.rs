//! When a mount is unused, and so goes by itself.
//!
//! Nobody uses it if, for the whole time, the kernel had nothing to ask, nothing in it is open or
//! anybody's working directory, and, for a moment at the end, no path led into it: what the kernel
//! answers from its caches only that last look can tell.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    Mount,
    as_caller::Identity,
    mount_point::{Elsewhere, LeaveError},
};
use crate::fuse::{Leaving, Operation, Way};

/// How long no path may have led into it, at the end.
const GLANCE: Duration = Duration::from_secs(5);

/// A mount's clock.
#[derive(Debug)]
struct Clock {
    timeout: Duration,
    /// What the kernel had asked by then.
    requests: u64,
    since: Instant,
}

#[derive(Debug, PartialEq, Eq)]
enum Look {
    /// Used, or not unused for long enough.
    Wait(Duration),
    Due,
}

/// What came of an attempt to unmount it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Attempt {
    Gone,
    /// Somebody has something open in it.
    Busy,
    /// Marked; or, if it had been, looked at since.
    Marked,
    Failed,
}

impl Clock {
    fn new(timeout: Duration, now: Instant) -> Self {
        Self {
            timeout,
            requests: 0,
            since: now,
        }
    }

    fn look(&mut self, now: Instant, requests: u64) -> Look {
        if requests != self.requests {
            self.requests = requests;
            self.since = now;
        }
        let unused = now.saturating_duration_since(self.since);
        match self.timeout.checked_sub(unused) {
            None | Some(Duration::ZERO) => Look::Due,
            Some(left) => Look::Wait(left),
        }
    }

    /// How long to wait after an attempt; `None`: there is nothing to wait for.
    fn after(&mut self, now: Instant, attempt: Attempt) -> Option<Duration> {
        match attempt {
            Attempt::Gone => None,
            Attempt::Marked => Some(self.timeout.min(GLANCE)),
            Attempt::Busy | Attempt::Failed => {
                self.since = now;
                Some(self.timeout)
            }
        }
    }
}

/// Unmounts `mount` when it has not been used for `timeout`; ends with the mount.
pub(super) async fn watch(mount: Arc<Mount>, timeout: Duration) {
    let mut clock = Clock::new(timeout, Instant::now());
    let mut pause = timeout;
    loop {
        tokio::select! {
            _ = mount.mounted.wait() => return,
            () = tokio::time::sleep(pause) => {}
        }
        pause = match clock.look(Instant::now(), requests(&mount)) {
            Look::Wait(left) => left,
            Look::Due => {
                let trying = Arc::clone(&mount);
                let attempt = tokio::task::spawn_blocking(move || attempt(&trying)).await;
                match clock.after(Instant::now(), attempt.unwrap_or(Attempt::Failed)) {
                    Some(pause) => pause,
                    None => {
                        let mount_point = mount.info.mount_point.display();
                        tracing::info!(%mount_point, timeout = timeout.as_secs(), "unused: unmounting");
                        return;
                    }
                }
            }
        };
    }
}

/// What readers caused: `statfs` is mostly a monitor looking at every mount.
fn requests(mount: &Mount) -> u64 {
    let counters = mount.mounted.counters();
    Operation::ALL
        .iter()
        .filter(|operation| operation.name() != "statfs")
        .map(|operation| counters.get(*operation))
        .sum()
}

fn attempt(mount: &Mount) -> Attempt {
    let mounted = &mount.mounted;
    let here = || {
        let root = Identity {
            uid: 0,
            gid: 0,
            groups: Vec::new(),
        };
        Elsewhere::here(root, mounted.mount_point()).ok()
    };
    let place = match mounted.way() {
        Way::Kernel => mount.elsewhere.clone().or_else(here),
        // fusermount3 knows only whether it is busy.
        Way::Fusermount => None,
    };
    let Some(place) = place else {
        return match mounted.unmount(false) {
            Ok(()) => Attempt::Gone,
            Err(crate::fuse::UnmountError::Busy { .. }) => Attempt::Busy,
            Err(error) => failed(mount, &error),
        };
    };
    match place.unmount(mounted.device(), Leaving::Expired) {
        Ok(true) => Attempt::Gone,
        Ok(false) => Attempt::Marked,
        Err(LeaveError::Busy) => Attempt::Busy,
        Err(error) => failed(mount, &error),
    }
}

fn failed(mount: &Mount, error: &(dyn std::error::Error + 'static)) -> Attempt {
    let error = crate::causes::in_one_line(error);
    tracing::warn!(mount_point = %mount.info.mount_point.display(), error, "unused, but not unmounted");
    Attempt::Failed
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    #[test]
    fn use_puts_it_off() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut clock = Clock::new(MINUTE, start);
        assert_eq!(clock.look(at(59), 0), Look::Wait(Duration::from_secs(1)));
        assert_eq!(clock.look(at(60), 0), Look::Due);
        // A request in the last moment.
        assert_eq!(clock.look(at(60), 1), Look::Wait(MINUTE));
        assert_eq!(clock.look(at(119), 1), Look::Wait(Duration::from_secs(1)));
        assert_eq!(clock.look(at(120), 1), Look::Due);
        // Something is open: from then on it counts again.
        assert_eq!(clock.after(at(120), Attempt::Busy), Some(MINUTE));
        assert_eq!(clock.look(at(121), 1), Look::Wait(Duration::from_secs(59)));
        // Marked: looked at again soon, without waiting for the whole time.
        assert_eq!(clock.look(at(180), 1), Look::Due);
        assert_eq!(clock.after(at(180), Attempt::Marked), Some(GLANCE));
        assert_eq!(clock.look(at(185), 1), Look::Due);
        assert_eq!(clock.after(at(185), Attempt::Gone), None);
    }
}
