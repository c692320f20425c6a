//! The parent of a user's own agent: a process so small that it does not fail, which keeps what the
//! agent must not lose by dying.
//!
//! Owns the child's life (starting it again, with back-off, and giving up after a bounded time) and the
//! conversation over which descriptors come and go. Must not know what a descriptor is of, nor what a
//! memo says. The memos hold credentials: they stay in memory and are never shown.
//!
//! The child's standard input is one end of a socket pair that keeps messages apart. To the keeper:
//! keep this descriptor under a name, let a name go, I am serving. To a new child: everything that is
//! held, then that this was all. Whatever the keeper is asked it answers, so that the child knows when a
//! descriptor is safe.

mod wire;

use std::{
    collections::BTreeMap,
    ffi::OsString,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::process::CommandExt,
    },
    path::PathBuf,
    process::{Child, Command, ExitStatus},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        signal::{SigSet, Signal, kill},
        signalfd::{SfdFlags, SignalFd},
    },
    unistd::Pid,
};

pub use self::wire::Link;
use self::wire::{ToChild, ToKeeper};

/// Descriptors of one child; more is a mistake of the child.
const MAX_HELD: usize = 4096;

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeeperError {
    #[error("{doing}")]
    System {
        doing: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("a message that is none of ours")]
    Message(#[from] serde_json::Error),
    #[error("the keeper refused: {0}")]
    Refused(String),
    #[error("the keeper is gone")]
    Gone,
}

fn system(doing: &'static str) -> impl Fn(Errno) -> KeeperError {
    move |errno| KeeperError::System {
        doing,
        source: errno.into(),
    }
}

/// One descriptor, its name, and what has to be known besides.
pub struct Held {
    pub name: String,
    pub memo: String,
    pub descriptor: OwnedFd,
}

/// How long a child that does not live is tried again.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// A child that has served for this long was a good one.
    pub good_life: Duration,
    /// No child takes longer than this before it serves.
    pub start: Duration,
    /// Children in a row that never served.
    pub failed_starts: u32,
    /// Children in a row that served and died early.
    pub short_lives: u32,
    /// From the last moment of service.
    pub without_service: Duration,
    /// From a request to stop to the use of force.
    pub stop: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            good_life: Duration::from_secs(1),
            start: Duration::from_secs(30),
            failed_starts: 6,
            short_lives: 12,
            without_service: Duration::from_secs(60),
            stop: Duration::from_secs(60),
        }
    }
}

/// What to run.
#[derive(Debug)]
pub struct Plan {
    pub program: PathBuf,
    pub arguments: Vec<OsString>,
    /// For the first child only.
    pub first: Vec<OsString>,
    pub limits: Limits,
}

/// Why the keeper is done. By then every descriptor is closed.
#[derive(Debug, PartialEq, Eq)]
pub enum End {
    /// The child has ended by itself, well, or badly with nothing held.
    Ended { well: bool },
    /// A signal asked for it.
    Stopped,
    /// The children do not live.
    GaveUp { why: String },
}

/// How often children died early, and what follows from it.
#[derive(Debug, Default)]
struct Streak {
    failed_starts: u32,
    short_lives: u32,
}

impl Streak {
    /// A child has died; `served` is how long it had served, if it ever did.
    fn died(&mut self, served: Option<Duration>, limits: &Limits) {
        match served {
            None => self.failed_starts += 1,
            Some(served) => {
                self.failed_starts = 0;
                self.short_lives = if served >= limits.good_life {
                    0
                } else {
                    self.short_lives + 1
                };
            }
        }
    }

    fn too_long(&self, without_service: Duration, limits: &Limits) -> Option<String> {
        if self.failed_starts >= limits.failed_starts {
            Some(format!("it did not start {} times in a row", self.failed_starts))
        } else if self.short_lives >= limits.short_lives {
            Some(format!("it died early {} times in a row", self.short_lives))
        } else if without_service >= limits.without_service {
            Some(format!("it has not served for {} s", without_service.as_secs()))
        } else {
            None
        }
    }

    /// The first is started again at once: whoever reads is waiting.
    fn pause(&self) -> Duration {
        match self.failed_starts + self.short_lives {
            0 | 1 => Duration::ZERO,
            deaths => Duration::from_millis(50 << (deaths - 2).min(6)),
        }
    }
}

/// Runs the child, and again when it dies badly while something is held, until it ends or cannot live.
/// `started` is called once the first child runs. Must be called by a process of one thread.
pub fn keep(plan: &Plan, started: impl FnOnce()) -> Result<End, KeeperError> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT] {
        signals.add(signal);
    }
    signals.thread_block().map_err(system("blocking signals"))?;
    let signals = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .map_err(system("reading signals"))?;
    Keeper {
        plan,
        signals,
        held: BTreeMap::new(),
        stopping: None,
    }
    .run(started)
}

struct Keeper<'a> {
    plan: &'a Plan,
    signals: SignalFd,
    held: BTreeMap<String, Held>,
    /// Since when.
    stopping: Option<Instant>,
}

/// One child's life.
struct Life {
    child: Child,
    /// Gone when the child has closed its end.
    socket: Option<OwnedFd>,
    begun: Instant,
    serving: Option<Instant>,
}

impl Keeper<'_> {
    fn run(mut self, started: impl FnOnce()) -> Result<End, KeeperError> {
        let mut started = Some(started);
        let mut streak = Streak::default();
        let mut last_service = Instant::now();
        loop {
            let ended = match self.start(started.is_some()) {
                Ok(mut life) => {
                    if let Some(started) = started.take() {
                        started();
                    }
                    let status = self.live(&mut life)?;
                    if life.serving.is_some() {
                        last_service = Instant::now();
                    }
                    streak.died(life.serving.map(|since| since.elapsed()), &self.plan.limits);
                    Some(status)
                }
                Err(error) if started.is_some() => return Err(error),
                // Perhaps the program is just being replaced.
                Err(error) => {
                    tracing::warn!(%error, "the agent cannot be started");
                    streak.died(None, &self.plan.limits);
                    None
                }
            };
            if self.stopping.is_some() {
                return Ok(End::Stopped);
            }
            if let Some(status) = ended {
                if status.success() || self.held.is_empty() {
                    return Ok(End::Ended {
                        well: status.success(),
                    });
                }
                tracing::warn!(%status, held = self.held.len(), "the agent died; starting it again");
            }
            if let Some(why) = streak.too_long(last_service.elapsed(), &self.plan.limits) {
                return Ok(End::GaveUp { why });
            }
            self.rest(streak.pause())?;
            if self.stopping.is_some() {
                return Ok(End::Stopped);
            }
        }
    }

    fn start(&self, first: bool) -> Result<Life, KeeperError> {
        let (ours, theirs) = wire::pair()?;
        let mut command = Command::new(&self.plan.program);
        command.args(&self.plan.arguments);
        if first {
            command.args(&self.plan.first);
        }
        command.stdin(theirs);
        // SAFETY: between fork and exec only pthread_sigmask is called, which is async-signal-safe.
        unsafe {
            command.pre_exec(|| {
                SigSet::empty().thread_set_mask()?;
                Ok(())
            });
        }
        let child = command.spawn().map_err(|source| KeeperError::System {
            doing: "starting the agent",
            source,
        })?;
        drop(command);
        let life = Life {
            child,
            socket: Some(ours),
            begun: Instant::now(),
            serving: None,
        };
        // A child that dies meanwhile is noticed below, by its death.
        if let Some(socket) = &life.socket
            && let Err(error) = self.hand_over(socket)
        {
            tracing::warn!(%error, "the new agent did not take what is held");
        }
        Ok(life)
    }

    fn hand_over(&self, socket: &OwnedFd) -> Result<(), KeeperError> {
        for held in self.held.values() {
            let message = ToChild::Held {
                name: held.name.clone(),
                memo: held.memo.clone(),
            };
            wire::send(socket.as_fd(), &message, Some(held.descriptor.as_fd()))?;
        }
        wire::send(socket.as_fd(), &ToChild::AllHeld, None)
    }

    /// Serves the child until it is dead.
    fn live(&mut self, life: &mut Life) -> Result<ExitStatus, KeeperError> {
        let limits = self.plan.limits;
        let mut told = false;
        loop {
            if self.stopping.is_some() && !std::mem::replace(&mut told, true) {
                signal(&life.child, Signal::SIGTERM);
            }
            let deadline = match (self.stopping, life.serving) {
                (Some(since), _) => Some(since + limits.stop),
                (None, None) => Some(life.begun + limits.start),
                (None, Some(_)) => None,
            };
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                signal(&life.child, Signal::SIGKILL);
            }
            let (signalled, readable) = self.wait(life.socket.as_ref(), deadline)?;
            if readable {
                self.hear(life);
            }
            if signalled {
                self.take_signals();
            }
            let status = life.child.try_wait().map_err(|source| KeeperError::System {
                doing: "waiting for the agent",
                source,
            })?;
            if let Some(status) = status {
                // What it said last counts: a descriptor may be in it.
                while life.socket.is_some() && self.wait(life.socket.as_ref(), Some(Instant::now()))?.1 {
                    self.hear(life);
                }
                return Ok(status);
            }
        }
    }

    fn rest(&mut self, pause: Duration) -> Result<(), KeeperError> {
        let until = Instant::now() + pause;
        while self.stopping.is_none() && Instant::now() < until {
            if self.wait(None, Some(until))?.0 {
                self.take_signals();
            }
        }
        Ok(())
    }

    /// Whether there are signals, and whether there is a message (or its end).
    fn wait(&self, socket: Option<&OwnedFd>, deadline: Option<Instant>) -> Result<(bool, bool), KeeperError> {
        let timeout = match deadline {
            None => PollTimeout::NONE,
            // One more, or the last millisecond is spent spinning.
            Some(deadline) => {
                let left = deadline.saturating_duration_since(Instant::now());
                let millis = left.as_millis() + u128::from(!left.is_zero());
                PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX)
            }
        };
        let mut watched = vec![PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)];
        watched.extend(socket.map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN)));
        match poll(&mut watched, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(system("waiting")(errno)),
        }
        let any = |at: usize| watched.get(at).and_then(PollFd::any).unwrap_or(false);
        Ok((any(0), any(1)))
    }

    fn take_signals(&mut self) {
        while let Ok(Some(info)) = self.signals.read_signal() {
            if info.ssi_signo != Signal::SIGCHLD as u32 {
                self.stopping.get_or_insert_with(Instant::now);
            }
        }
    }

    /// One message of the child's.
    fn hear(&mut self, life: &mut Life) {
        let Some(socket) = &life.socket else { return };
        let answer = match wire::receive::<ToKeeper>(socket.as_fd()) {
            Ok((ToKeeper::Keep { name, memo }, Some(descriptor))) => {
                if self.held.len() >= MAX_HELD && !self.held.contains_key(&name) {
                    ToChild::Refused(format!("{MAX_HELD} descriptors are held already"))
                } else {
                    let held = Held {
                        name: name.clone(),
                        memo,
                        descriptor,
                    };
                    self.held.insert(name, held);
                    ToChild::Done
                }
            }
            Ok((ToKeeper::Keep { .. }, None)) => ToChild::Refused("no descriptor came with it".into()),
            Ok((ToKeeper::Release { name }, _)) => {
                self.held.remove(&name);
                ToChild::Done
            }
            Ok((ToKeeper::Serving, _)) => {
                life.serving.get_or_insert_with(Instant::now);
                ToChild::Done
            }
            Err(KeeperError::Message(error)) => ToChild::Refused(error.to_string()),
            Err(_) => {
                life.socket = None;
                return;
            }
        };
        if wire::send(socket.as_fd(), &answer, None).is_err() {
            // It will be told apart from a living one by its death.
            tracing::debug!("the agent did not wait for an answer");
        }
    }
}

fn signal(child: &Child, signal: Signal) {
    // The child has not been waited for, so the number is still its own.
    if let Ok(pid) = i32::try_from(child.id()) {
        let _ = kill(Pid::from_raw(pid), signal);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good_lives_are_forgiven_and_bad_ones_bounded() {
        let limits = Limits::default();
        let long = Some(limits.good_life);
        let mut streak = Streak::default();
        for _ in 0..1000 {
            streak.died(long, &limits);
            assert_eq!(streak.pause(), Duration::ZERO);
            assert_eq!(streak.too_long(Duration::ZERO, &limits), None);
        }
        for served in [None, Some(Duration::ZERO)] {
            let mut streak = Streak::default();
            let mut waited = Duration::ZERO;
            let mut deaths = 0;
            while streak.too_long(Duration::ZERO, &limits).is_none() {
                waited += streak.pause();
                streak.died(served, &limits);
                deaths += 1;
            }
            assert!(deaths <= limits.short_lives.max(limits.failed_starts));
            assert!(waited < Duration::from_secs(30), "{waited:?}");
        }
        assert!(
            Streak::default()
                .too_long(limits.without_service, &limits)
                .is_some()
        );
    }
}
