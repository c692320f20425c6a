//! Whether the blocks of streams are written past the page cache.
//!
//! That is cheap, but at the disk's pace. A disk that falls behind is given what comes next through the page cache,
//! which takes bursts – if it turns out to take blocks faster than the disk does: where memory is slow to come by, or
//! much is to be written already, it does not, and would only cost the readers processor time. Owns that decision;
//! knows nothing of the queue but how full it is.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::cache::WriteMode;

/// Blocks after which the disk's pace is known: 8 MiB.
const WATCHED: u64 = 64;
/// The same for the page cache, which may take a little from anybody: 32 MiB.
const TRIAL: u64 = 256;
/// What a trial showed holds for so many times what may wait to be written, …
const HOLDS_FOR: u64 = 32;
/// … and for so long.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(60);
/// What was watched across such a pause tells nothing.
const PAUSE: Duration = Duration::from_millis(500);
/// After so many runs in a row that were to go past the page cache and did not, the file system knows no such thing.
const REFUSALS: u32 = 16;

#[derive(Debug)]
pub(super) struct Pace {
    /// Blocks that may wait to be written.
    places: usize,
    /// Less room than this is none.
    little: usize,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    phase: Phase,
    last: Option<Instant>,
    refused: u32,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Phase {
    /// The disk takes what arrives.
    KeepsUp,
    /// More arrives than the disk takes: how much it takes shows, since it is never idle.
    Behind(Watched),
    /// Through the page cache, to see how much that takes. `direct`: blocks a second, past it.
    Trial { direct: f64, buffered: Watched },
    /// Through the page cache, so many blocks more, as long as it takes more than `direct`.
    Detour {
        direct: f64,
        buffered: Watched,
        held: Held,
    },
    /// Past it, so many blocks more, though not all of them find room.
    Overrun(Held),
    /// Through the page cache, since then: nothing went past it.
    Refused(Instant),
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Watched {
    since: Instant,
    blocks: u64,
}

/// How long a decision still holds.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Held {
    since: Instant,
    left: u64,
}

impl Watched {
    fn from(since: Instant) -> Self {
        Self { since, blocks: 0 }
    }

    /// Blocks a second.
    fn rate(&self, now: Instant) -> f64 {
        let took = now.saturating_duration_since(self.since);
        self.blocks as f64 / took.max(Duration::from_nanos(1)).as_secs_f64()
    }
}

impl Held {
    fn is_over(&self, now: Instant) -> bool {
        self.left == 0 || now.saturating_duration_since(self.since) > FORGOTTEN_AFTER
    }
}

impl Pace {
    /// `least`: blocks that come at once.
    pub fn new(places: usize, least: usize) -> Self {
        Self {
            places,
            little: (places / 8).max(least),
            state: Mutex::new(State {
                phase: Phase::KeepsUp,
                last: None,
                refused: 0,
            }),
        }
    }

    /// Whether the disk takes what arrives, while there is `room` for more to wait.
    pub fn keeps_up(&self, room: usize) -> bool {
        room >= self.places / 2
    }

    pub fn is_direct(&self) -> bool {
        self.state.lock().phase.mode() == WriteMode::Direct
    }

    /// How to write so many blocks of a stream now, while there is `room` for more to wait.
    pub fn mode(&self, blocks: u64, room: usize, now: Instant) -> WriteMode {
        let mut state = self.state.lock();
        let before = state.phase;
        let idle = state
            .last
            .replace(now)
            .map(|last| now.saturating_duration_since(last));
        let phase = match before {
            Phase::Behind(_) | Phase::Trial { .. } if idle > Some(PAUSE) => Phase::KeepsUp,
            same => self.next(same, room, now),
        };
        state.phase = phase.with(blocks);
        drop(state);
        if std::mem::discriminant(&phase) != std::mem::discriminant(&before) {
            tracing::debug!(?phase, room, "the cache's disk");
        }
        phase.mode()
    }

    /// Whether what was to be written past the page cache was.
    pub fn was_direct(&self, was: bool, now: Instant) {
        let mut state = self.state.lock();
        state.refused = if was { 0 } else { state.refused + 1 };
        if state.refused >= REFUSALS {
            state.refused = 0;
            state.phase = Phase::Refused(now);
        }
    }

    fn next(&self, phase: Phase, room: usize, now: Instant) -> Phase {
        let held = Held {
            since: now,
            left: self.places as u64 * HOLDS_FOR,
        };
        let is_behind = room < self.little;
        match phase {
            Phase::KeepsUp if !self.keeps_up(room) => Phase::Behind(Watched::from(now)),
            Phase::Behind(_) if self.keeps_up(room) => Phase::KeepsUp,
            Phase::Behind(direct) if direct.blocks >= WATCHED && is_behind => Phase::Trial {
                direct: direct.rate(now),
                buffered: Watched::from(now),
            },
            Phase::Detour { held, .. } | Phase::Overrun(held) if held.is_over(now) => Phase::KeepsUp,
            Phase::Refused(since) if now.saturating_duration_since(since) > FORGOTTEN_AFTER => Phase::KeepsUp,
            Phase::Trial { direct, buffered } if buffered.blocks >= TRIAL => {
                match self.keeps_up(room) || buffered.rate(now) > direct {
                    true => Phase::Detour {
                        direct,
                        buffered: Watched::from(now),
                        held,
                    },
                    false => Phase::Overrun(held),
                }
            }
            // The page cache may be full by now, too.
            Phase::Detour {
                direct,
                buffered,
                held: still,
            } if buffered.blocks >= TRIAL => match is_behind && buffered.rate(now) <= direct {
                true => Phase::Overrun(held),
                false => Phase::Detour {
                    direct,
                    buffered: Watched::from(now),
                    held: still,
                },
            },
            same => same,
        }
    }
}

impl Phase {
    fn mode(self) -> WriteMode {
        match self {
            Self::KeepsUp | Self::Behind(_) | Self::Overrun(_) => WriteMode::Direct,
            Self::Trial { .. } | Self::Detour { .. } | Self::Refused(_) => WriteMode::Buffered,
        }
    }

    /// After so many blocks more.
    fn with(mut self, more: u64) -> Self {
        if let Self::Behind(watched)
        | Self::Trial {
            buffered: watched, ..
        }
        | Self::Detour {
            buffered: watched, ..
        } = &mut self
        {
            watched.blocks += more;
        }
        if let Self::Detour { held, .. } | Self::Overrun(held) = &mut self {
            held.left = held.left.saturating_sub(more);
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLACES: usize = 1024;
    const RUN: u64 = 16;

    /// Blocks a second: what arrives, what the disk takes, what the page cache takes, up to `burst` blocks of it.
    struct Host {
        arrives: f64,
        disk: f64,
        page_cache: f64,
        burst: f64,
    }

    #[derive(Debug, Default)]
    struct Outcome {
        direct: f64,
        buffered: f64,
        dropped: f64,
    }

    impl Outcome {
        fn share(&self, of: f64) -> f64 {
            of / (self.direct + self.buffered + self.dropped)
        }
    }

    impl Host {
        /// So many blocks of a stream, on a clock of its own.
        fn stream(&self, pace: &Pace, blocks: u64) -> Outcome {
            let (start, mut clock, mut arrived, mut queued) = (Instant::now(), 0.0, 0.0, 0.0_f64);
            let mut outcome = Outcome::default();
            while arrived < blocks as f64 || queued >= RUN as f64 {
                let mut took = RUN as f64 / self.arrives;
                if queued >= RUN as f64 {
                    let now = start + Duration::from_secs_f64(clock);
                    let (rate, written) = match pace.mode(RUN, PLACES - queued as usize, now) {
                        WriteMode::Direct => (self.disk, &mut outcome.direct),
                        WriteMode::Buffered if outcome.buffered < self.burst => {
                            (self.page_cache, &mut outcome.buffered)
                        }
                        WriteMode::Buffered => (self.disk * 0.9, &mut outcome.buffered),
                    };
                    *written += RUN as f64;
                    queued -= RUN as f64;
                    took = RUN as f64 / rate;
                }
                clock += took;
                let more = (took * self.arrives).min(blocks as f64 - arrived);
                arrived += more;
                let room = PLACES as f64 - queued;
                outcome.dropped += (more - room).max(0.0);
                queued += more.min(room);
            }
            outcome
        }
    }

    #[test]
    fn a_disk_that_keeps_up_is_written_past_the_page_cache() {
        let host = Host {
            arrives: 8_000.0,
            disk: 9_000.0,
            page_cache: 40_000.0,
            burst: f64::MAX,
        };
        let outcome = host.stream(&Pace::new(PLACES, RUN as usize), 200_000);
        assert_eq!((outcome.buffered, outcome.dropped), (0.0, 0.0));
    }

    #[test]
    fn a_slow_disk_gets_almost_all_through_a_page_cache_that_is_fast() {
        let host = Host {
            arrives: 8_000.0,
            disk: 1_000.0,
            page_cache: 40_000.0,
            burst: f64::MAX,
        };
        let outcome = host.stream(&Pace::new(PLACES, RUN as usize), 200_000);
        assert!(outcome.share(outcome.buffered) > 0.97, "{outcome:?}");
        assert!(outcome.share(outcome.dropped) < 0.01, "{outcome:?}");
    }

    #[test]
    fn a_page_cache_that_is_slower_than_the_disk_is_tried_and_left_alone() {
        let host = Host {
            arrives: 30_000.0,
            disk: 16_000.0,
            page_cache: 8_000.0,
            burst: f64::MAX,
        };
        let outcome = host.stream(&Pace::new(PLACES, RUN as usize), 30_000);
        assert_eq!(outcome.buffered, TRIAL as f64, "{outcome:?}");
        // Tried again when much has been written since.
        let outcome = host.stream(&Pace::new(PLACES, RUN as usize), 4 * HOLDS_FOR * PLACES as u64);
        assert_eq!(outcome.buffered, 3.0 * TRIAL as f64, "{outcome:?}");
    }

    #[test]
    fn a_page_cache_that_is_full_is_left_alone_from_then_on() {
        let host = Host {
            arrives: 8_000.0,
            disk: 1_000.0,
            page_cache: 40_000.0,
            burst: 20_000.0,
        };
        let outcome = host.stream(&Pace::new(PLACES, RUN as usize), 200_000);
        assert!(outcome.buffered >= host.burst, "{outcome:?}");
        assert!(outcome.buffered <= host.burst + 2.0 * TRIAL as f64, "{outcome:?}");
    }

    #[test]
    fn a_pause_in_a_trial_is_not_the_page_caches() {
        let pace = Pace::new(PLACES, RUN as usize);
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        pace.mode(RUN, PLACES / 4, at(0));
        for n in 0..WATCHED / RUN {
            pace.mode(RUN, 0, at(n));
        }
        assert_eq!(pace.mode(RUN, 0, at(10)), WriteMode::Buffered);
        for _ in 0..TRIAL / RUN {
            pace.mode(RUN, 0, at(10_000));
        }
        let phase = pace.state.lock().phase;
        assert!(!matches!(phase, Phase::Overrun(_)), "{phase:?}");
    }

    #[test]
    fn what_was_decided_is_forgotten_after_a_while() {
        let pace = Pace::new(PLACES, RUN as usize);
        let now = Instant::now();
        pace.state.lock().phase = Phase::Overrun(Held {
            since: now,
            left: 1 << 30,
        });
        pace.mode(RUN, PLACES, now + FORGOTTEN_AFTER / 2);
        assert_ne!(pace.state.lock().phase, Phase::KeepsUp);
        pace.mode(RUN, PLACES, now + FORGOTTEN_AFTER * 2);
        assert_eq!(pace.state.lock().phase, Phase::KeepsUp);
    }

    #[test]
    fn a_file_system_that_does_not_write_past_the_page_cache_is_seldom_asked() {
        let pace = Pace::new(PLACES, RUN as usize);
        let now = Instant::now();
        (0..REFUSALS - 1).for_each(|_| pace.was_direct(false, now));
        pace.was_direct(true, now);
        (0..REFUSALS - 1).for_each(|_| pace.was_direct(false, now));
        assert!(pace.is_direct());
        pace.was_direct(false, now);
        assert!(!pace.is_direct());
        assert_eq!(pace.mode(RUN, PLACES, now), WriteMode::Buffered);
        // It was perhaps that all was there already.
        let later = now + FORGOTTEN_AFTER * 2;
        assert_eq!(pace.mode(RUN, PLACES, later), WriteMode::Direct);
    }

    #[test]
    fn who_fell_behind_by_chance_goes_on_past_the_page_cache() {
        let pace = Pace::new(PLACES, RUN as usize);
        let now = Instant::now();
        let room = [PLACES, PLACES / 2 - 1, PLACES / 4, PLACES / 2, PLACES];
        for room in room {
            assert_eq!(pace.mode(RUN, room, now), WriteMode::Direct);
        }
        assert_eq!(pace.state.lock().phase, Phase::KeepsUp);
        // Nor does a burst tell anything of the disk, until it has taken some of it.
        for n in 0..WATCHED / RUN + 2 {
            let mode = pace.mode(RUN, if n == 0 { PLACES / 4 } else { 0 }, now);
            assert_eq!(mode == WriteMode::Direct, n * RUN < WATCHED, "{n}");
        }
    }
}
