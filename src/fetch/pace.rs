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
/// What a trial showed holds for so many times what may wait to be written.
const HOLDS_FOR: u64 = 32;

#[derive(Debug)]
pub(super) struct Pace {
    /// Blocks that may wait to be written.
    places: usize,
    phase: Mutex<Phase>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Phase {
    /// The disk takes what arrives.
    KeepsUp,
    /// More arrives than the disk takes: how much it takes shows, since it is never idle.
    Behind(Watched),
    /// Through the page cache, to see how much that takes. `direct`: blocks a second, past it.
    Trial { direct: f64, buffered: Watched },
    /// Through the page cache, so many blocks more.
    Detour { left: u64 },
    /// Past it, so many blocks more, though not all of them find room.
    Overrun { left: u64 },
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Watched {
    since: Instant,
    blocks: u64,
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

impl Pace {
    pub fn new(places: usize) -> Self {
        Self {
            places,
            phase: Mutex::new(Phase::KeepsUp),
        }
    }

    /// Whether the disk takes what arrives, while there is `room` for more to wait.
    pub fn keeps_up(&self, room: usize) -> bool {
        room >= self.places / 2
    }

    pub fn is_direct(&self) -> bool {
        self.phase.lock().mode() == WriteMode::Direct
    }

    /// How to write so many blocks of a stream now, while there is `room` for more to wait.
    pub fn mode(&self, blocks: u64, room: usize, now: Instant) -> WriteMode {
        let mut phase = self.phase.lock();
        let next = self.next(*phase, room, now);
        if next != *phase {
            tracing::debug!(?next, room, "the cache's disk");
        }
        *phase = next.with(blocks);
        phase.mode()
    }

    fn next(&self, phase: Phase, room: usize, now: Instant) -> Phase {
        let holds_for = self.places as u64 * HOLDS_FOR;
        match phase {
            Phase::KeepsUp if !self.keeps_up(room) => Phase::Behind(Watched::from(now)),
            Phase::Behind(_) if self.keeps_up(room) => Phase::KeepsUp,
            Phase::Behind(direct) if direct.blocks >= WATCHED && room < self.places / 8 => Phase::Trial {
                direct: direct.rate(now),
                buffered: Watched::from(now),
            },
            Phase::Trial { direct, buffered } if buffered.blocks >= TRIAL => {
                match self.keeps_up(room) || buffered.rate(now) > direct {
                    true => Phase::Detour { left: holds_for },
                    false => Phase::Overrun { left: holds_for },
                }
            }
            Phase::Detour { left: 0 } | Phase::Overrun { left: 0 } => Phase::KeepsUp,
            same => same,
        }
    }
}

impl Phase {
    fn mode(self) -> WriteMode {
        match self {
            Self::KeepsUp | Self::Behind(_) | Self::Overrun { .. } => WriteMode::Direct,
            Self::Trial { .. } | Self::Detour { .. } => WriteMode::Buffered,
        }
    }

    /// After so many blocks more.
    fn with(mut self, more: u64) -> Self {
        match &mut self {
            Self::KeepsUp => {}
            Self::Behind(watched)
            | Self::Trial {
                buffered: watched, ..
            } => watched.blocks += more,
            Self::Detour { left } | Self::Overrun { left } => *left = left.saturating_sub(more),
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLACES: usize = 1024;
    const RUN: u64 = 16;

    /// Blocks a second: what arrives, what the disk takes, what the page cache takes.
    struct Host {
        arrives: f64,
        disk: f64,
        page_cache: f64,
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
                        WriteMode::Buffered => (self.page_cache, &mut outcome.buffered),
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
        };
        let outcome = host.stream(&Pace::new(PLACES), 200_000);
        assert_eq!((outcome.buffered, outcome.dropped), (0.0, 0.0));
    }

    #[test]
    fn a_slow_disk_gets_almost_all_through_a_page_cache_that_is_fast() {
        let host = Host {
            arrives: 8_000.0,
            disk: 1_000.0,
            page_cache: 40_000.0,
        };
        let outcome = host.stream(&Pace::new(PLACES), 200_000);
        assert!(outcome.share(outcome.buffered) > 0.97, "{outcome:?}");
        assert!(outcome.share(outcome.dropped) < 0.01, "{outcome:?}");
    }

    #[test]
    fn a_page_cache_that_is_slower_than_the_disk_is_tried_and_left_alone() {
        let host = Host {
            arrives: 30_000.0,
            disk: 16_000.0,
            page_cache: 8_000.0,
        };
        let outcome = host.stream(&Pace::new(PLACES), 30_000);
        assert_eq!(outcome.buffered, TRIAL as f64, "{outcome:?}");
        // Tried again when much has been written since.
        let outcome = host.stream(&Pace::new(PLACES), 4 * HOLDS_FOR * PLACES as u64);
        assert_eq!(outcome.buffered, 3.0 * TRIAL as f64, "{outcome:?}");
    }

    #[test]
    fn who_fell_behind_by_chance_goes_on_past_the_page_cache() {
        let pace = Pace::new(PLACES);
        let now = Instant::now();
        let room = [PLACES, PLACES / 2 - 1, PLACES / 4, PLACES / 2, PLACES];
        for room in room {
            assert_eq!(pace.mode(RUN, room, now), WriteMode::Direct);
        }
        assert_eq!(*pace.phase.lock(), Phase::KeepsUp);
        // Nor does a burst tell anything of the disk, until it has taken some of it.
        for n in 0..WATCHED / RUN + 2 {
            let mode = pace.mode(RUN, if n == 0 { PLACES / 4 } else { 0 }, now);
            assert_eq!(mode == WriteMode::Direct, n * RUN < WATCHED, "{n}");
        }
    }
}
