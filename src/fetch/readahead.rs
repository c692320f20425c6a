//! Guessing what will be read next, from what was read.
//!
//! Owns the detection of streams: sequential, backward and strided, several at once on one inode. Knows
//! nothing of fetching: it turns reads into ranges worth having.

use std::{
    ops::Range,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

use parking_lot::Mutex;

use super::readers::StreamId;
use crate::block::{BLOCK_SIZE, EXTENT_SIZE};

/// Readahead state of one inode: several streams.
#[derive(Debug, Default)]
pub struct Streams {
    streams: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    streams: Vec<Stream>,
    /// No window grows beyond this, since streams here ended early before; `None`: none did.
    learned: Option<u64>,
}

/// More readers than this on one inode share their guesses.
const MOST_STREAMS: usize = 16;
/// How far from its expected place a read still belongs to a stream: readers skip small headers, …
const SLACK: u64 = 512 << 10;
/// … and the kernel sends the parts of its own readahead out of order: of two windows of what a mount's is raised
/// to (`fuse::MountOptions::readahead_kib`).
const KERNEL_READAHEAD: u64 = 8 << 20;
/// Only that asks for so much at once.
const KERNEL_REQUEST: u64 = 512 << 10;
/// So many reads in a row that each end where the one before began are going backward.
const BACKWARD: u32 = 3;
const FIRST_WINDOW: u64 = 2 << 20;
/// A first window that is proven grows by this factor, and the next to the largest: each step costs a round trip.
const GROWTH: u64 = 16;
/// A window is proven by reading this part of it. Not more: until then the connections have too little to do.
const PROOF: u64 = 4;
/// What was learned is forgotten when it has grown to this.
const MOST_LEARNED: u64 = 1 << 30;
/// A first read of this length at the start of a file comes from a sequential reader's kernel readahead;
/// random readers ask for less.
const TELLING_LENGTH: u64 = 64 << 10;

#[derive(Debug)]
struct Stream {
    id: StreamId,
    /// Where it was met first.
    start: u64,
    last: Range<u64>,
    /// The furthest byte read, in the stream's direction.
    front: u64,
    /// Bytes read between them.
    read: u64,
    /// How far ahead was asked for already, in the stream's direction.
    asked: u64,
    step: i64,
    /// Reads in a row that went backward though the stream does not.
    back: u32,
    confirmed: u32,
    window: u64,
    /// Reading on to here proves the window right.
    proof: u64,
}

/// What is worth fetching after a read.
#[derive(Debug, Default)]
pub(super) struct Advice {
    pub ahead: Vec<Range<u64>>,
    /// Bytes that the stream is kept ahead.
    pub window: u64,
    /// The stream, if the read belongs to one.
    pub stream: Option<StreamId>,
}

impl Stream {
    /// Skips more than it reads, and further than the kernel's readahead is ever out of order: the gaps are not
    /// wanted.
    fn is_sparse(&self) -> bool {
        let ran = self.front.abs_diff(self.start);
        ran > KERNEL_READAHEAD && self.read.saturating_mul(2) < ran
    }

    /// It goes on at `range`, and what lies between is not its.
    fn jump_to(&mut self, range: &Range<u64>) {
        self.start = range.start;
        self.front = range.end;
        self.read = range.end - range.start;
        self.last = range.clone();
    }

    /// A stream that is read no further, though much was fetched for it: how large a window would have done.
    fn teaches(&self, bounds: &Range<u64>) -> Option<u64> {
        let unused = self.asked.min(bounds.end).abs_diff(self.front);
        let wasteful = self.window > FIRST_WINDOW && unused > self.window / 2;
        let ran = self.front.abs_diff(self.start);
        (wasteful && self.step == 0).then(|| (ran / 2).next_power_of_two().max(FIRST_WINDOW))
    }
}

impl Streams {
    pub fn new() -> Self {
        Self::default()
    }

    /// What to fetch after a read of `range`, within `bounds`, where no window is above `largest`.
    pub(super) fn advise(&self, range: &Range<u64>, bounds: &Range<u64>, largest: u64) -> Advice {
        if range.is_empty() || largest < BLOCK_SIZE {
            return Advice::default();
        }
        let State { streams, learned } = &mut *self.streams.lock();
        let largest = largest.min(learned.unwrap_or(u64::MAX));
        let (ahead, at) = Self::follow(streams, range, bounds, largest);
        // The most recently used stream stands last; the first is the one to forget.
        let stream = streams.remove(at);
        let (window, ran) = (stream.window, stream.front.abs_diff(stream.start));
        let id = (window > 0).then_some(stream.id);
        streams.push(stream);
        if streams.len() > MOST_STREAMS {
            let forgotten = streams.remove(0);
            *learned = forgotten.teaches(bounds).or(*learned);
        }
        // This one goes further than those before it did.
        *learned = learned
            .map(|most| if ran > 2 * most { 2 * most } else { most })
            .filter(|most| *most < MOST_LEARNED);
        Advice {
            ahead,
            window,
            stream: id,
        }
    }

    fn follow(
        streams: &mut Vec<Stream>,
        range: &Range<u64>,
        bounds: &Range<u64>,
        largest: u64,
    ) -> (Vec<Range<u64>>, usize) {
        let clip = |wanted: Range<u64>| {
            let clipped = wanted.start.max(bounds.start)..wanted.end.min(bounds.end);
            if clipped.is_empty() {
                Vec::new()
            } else {
                vec![clipped]
            }
        };
        let length = range.end - range.start;
        let slack = match length {
            KERNEL_REQUEST.. => KERNEL_READAHEAD,
            _ => SLACK,
        };
        let follows_backward = |s: &Stream| range.end.abs_diff(s.last.start) <= BLOCK_SIZE;
        // Forward: the read starts where the stream stands, give or take.
        let forward = streams.iter().rposition(|s| {
            s.step >= 0
                && range.start.saturating_add(slack) >= s.front
                && range.start <= s.front.saturating_add(if s.is_sparse() { SLACK } else { slack })
                && !(s.back >= BACKWARD && follows_backward(s))
        });
        if let Some(at) = forward {
            let stream = &mut streams[at];
            let advanced = range.end > stream.front;
            stream.back = match follows_backward(stream) && !advanced {
                true => stream.back + 1,
                false => 0,
            };
            stream.front = stream.front.max(range.end);
            stream.read = stream.read.saturating_add(length);
            stream.last = range.clone();
            if !advanced || stream.is_sparse() {
                return (Vec::new(), at);
            }
            stream.confirmed += 1;
            stream.step = 0;
            if length < TELLING_LENGTH && stream.confirmed < 3 {
                // Two small reads near each other are a coincidence among random readers.
                return (Vec::new(), at);
            }
            stream.window = if stream.window == 0 {
                FIRST_WINDOW
            } else {
                stream.window
            };
            // Others may have come to share what there is.
            stream.window = stream.window.min(largest.max(FIRST_WINDOW));
            stream.asked = stream.asked.max(stream.front);
            if stream.front >= stream.proof && stream.proof > 0 {
                stream.window = match stream.window {
                    ..=FIRST_WINDOW => (stream.window * GROWTH).min(largest),
                    _ => largest,
                };
                stream.proof = 0;
            }
            // Topped up in large pieces: an extent, or half of a smaller window.
            let room = stream.window.saturating_sub(stream.asked - stream.front);
            if room < EXTENT_SIZE.min(stream.window / 2) {
                return (Vec::new(), at);
            }
            let from = stream.asked;
            let mut to = stream.front + stream.window;
            if stream.window >= 4 * EXTENT_SIZE {
                // Pieces end where extents end.
                to -= to % EXTENT_SIZE;
            }
            stream.asked = to.max(from);
            if stream.proof == 0 {
                stream.proof = stream.front + (stream.asked - stream.front) / PROOF;
            }
            return (clip(from..stream.asked), at);
        }
        // Backward: the read ends where the stream starts.
        let backward = streams.iter().rposition(|s| {
            s.step <= 0 && range.start < s.last.start && range.end + SLACK.min(BLOCK_SIZE) >= s.last.start
        });
        if let Some(at) = backward {
            let stream = &mut streams[at];
            if stream.step >= 0 {
                stream.asked = range.start;
                stream.step = -1;
                stream.window = 0;
            }
            stream.last = range.clone();
            stream.front = range.start;
            stream.confirmed += 1;
            if stream.confirmed < 2 {
                return (Vec::new(), at);
            }
            stream.window = if stream.window == 0 {
                FIRST_WINDOW
            } else {
                stream.window
            };
            stream.asked = stream.asked.min(range.start);
            if range.start - stream.asked > stream.window / 2 {
                return (Vec::new(), at);
            }
            let to = stream.asked;
            stream.asked = range.start.saturating_sub(stream.window);
            stream.window = (stream.window * GROWTH).min(largest);
            return (clip(stream.asked..to), at);
        }
        // Strided: the same jump as the last time, twice over.
        let jump = |s: &Stream| range.start as i64 - s.last.start as i64;
        if let Some(at) = streams
            .iter()
            .rposition(|s| s.step != 0 && s.step != -1 && s.step == jump(s))
        {
            let stream = &mut streams[at];
            stream.jump_to(range);
            stream.confirmed += 1;
            if stream.confirmed < 3 {
                return (Vec::new(), at);
            }
            // Blocks, not extents: a stride's gaps are not wanted.
            let depth = i64::from(stream.confirmed.min(16));
            let length = range.end - range.start;
            let ahead = (1..=depth)
                .take_while(|n| *n as u64 * length.max(BLOCK_SIZE) <= largest)
                .filter_map(|n| range.start.checked_add_signed(stream.step.checked_mul(n)?))
                .flat_map(|start| clip(start..start.saturating_add(length)))
                .collect();
            return (ahead, at);
        }
        // A lone read learns its stride from the next one: when it is the only one there is, or when many
        // are waiting for a second read, which is what skipping readers and random ones look like.
        let crowded = streams.len() == 1 || streams.len() >= MOST_STREAMS / 2;
        if crowded
            && let Some(at) = streams
                .iter()
                .rposition(|s| s.confirmed == 0 && s.step == 0 && jump(s).unsigned_abs() > SLACK)
        {
            let stream = &mut streams[at];
            stream.step = jump(stream);
            stream.jump_to(range);
            stream.confirmed = 1;
            stream.window = 0;
            return (Vec::new(), at);
        }
        let telling = range.start == bounds.start && range.end - range.start >= TELLING_LENGTH;
        let window = if telling { FIRST_WINDOW.min(largest) } else { 0 };
        static STREAMS: AtomicU64 = AtomicU64::new(0);
        streams.push(Stream {
            id: StreamId(STREAMS.fetch_add(1, Relaxed)),
            start: range.start,
            last: range.clone(),
            front: range.end,
            read: length,
            asked: range.end + window,
            step: 0,
            back: 0,
            confirmed: 0,
            window,
            proof: if telling { range.end + window / PROOF } else { 0 },
        });
        (
            if telling {
                clip(range.end..range.end + window)
            } else {
                Vec::new()
            },
            streams.len() - 1,
        )
    }
}

/// How many blocks each GET of a request for `blocks` takes, when spread over `spread` connections: at least
/// a mebibyte, at most an extent.
pub(super) fn piece_size(blocks: u64, spread: u64) -> u64 {
    blocks
        .div_ceil(spread.max(1))
        .clamp((1 << 20) / BLOCK_SIZE, EXTENT_SIZE / BLOCK_SIZE)
}

/// How many blocks each GET takes of a stream's window of `blocks` over `connections`, where `left` blocks of the
/// file are to come: half a mebibyte to an extent, which is a whole number of them. Small while the window is:
/// all connections have a part of it, and the next byte comes soon. Large pieces waste less of each connection on
/// waiting for first bytes; but the last ones are halves and quarters, so that connections end together.
pub(super) fn even_piece(blocks: u64, connections: u64, left: u64) -> u64 {
    const LARGEST: u64 = EXTENT_SIZE / BLOCK_SIZE;
    let most = (blocks / connections.max(1)).max(1);
    // The largest power of two that is not above.
    let even = (1 << most.ilog2()).clamp((512 << 10) / BLOCK_SIZE, LARGEST);
    let shared = connections * LARGEST;
    even.min(match left {
        _ if left <= shared / 8 => LARGEST / 4,
        _ if left <= shared / 2 => LARGEST / 2,
        _ => LARGEST,
    })
}

/// Cuts a run of blocks into pieces of up to `size`.
pub(super) fn pieces(blocks: Range<u64>, size: u64) -> impl Iterator<Item = Range<u64>> {
    let count = blocks.end.saturating_sub(blocks.start);
    (0..count.div_ceil(size)).map(move |n| {
        let start = blocks.start + n * size;
        start..(start + size).min(blocks.end)
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const WHOLE: Range<u64> = 0..1 << 40;
    const LARGEST: u64 = 64 << 20;

    fn asked(reads: impl IntoIterator<Item = Range<u64>>) -> u64 {
        let streams = Streams::new();
        reads
            .into_iter()
            .flat_map(|read| streams.advise(&read, &WHOLE, LARGEST).ahead)
            .map(|r| r.end - r.start)
            .sum()
    }

    #[test]
    fn sequential_readers_get_a_growing_window_without_gaps() {
        let streams = Streams::new();
        let mut covered = 0;
        let mut furthest = 0;
        for n in 0..4000u64 {
            let read = n * BLOCK_SIZE..(n + 1) * BLOCK_SIZE;
            for ahead in streams.advise(&read, &WHOLE, LARGEST).ahead {
                assert!(ahead.start <= covered.max(read.end), "a gap before {ahead:?}");
                covered = covered.max(ahead.end);
            }
            furthest = furthest.max(covered - read.end);
        }
        assert!((LARGEST / 2..=LARGEST).contains(&furthest), "{furthest}");
    }

    #[test]
    fn parts_of_the_kernels_readahead_out_of_order_are_one_stream() {
        let streams = Streams::new();
        let (mut covered, part) = (0, 1 << 20);
        for batch in 0..100u64 {
            // Eight at once, in whatever order threads come to them.
            for at in (0..8).map(|n| batch * 8 + (n * 3 + batch) % 8) {
                let read = at * part..(at + 1) * part;
                for ahead in streams.advise(&read, &WHOLE, LARGEST).ahead {
                    assert!(covered == 0 || ahead.start <= covered.max(read.end), "a gap");
                    covered = covered.max(ahead.end);
                }
            }
        }
        let streams = streams.streams.lock();
        assert_eq!(streams.streams.len(), 1);
        assert_eq!(streams.streams[0].window, LARGEST);
    }

    #[test]
    fn readers_that_take_turns_on_one_inode_are_followed_each() {
        // As far apart as each other: at first that looks like one reader who skips.
        const READERS: u64 = 8;
        let streams = Streams::new();
        let mut asked: Vec<Range<u64>> = Vec::new();
        let mut missed = 0;
        for n in 0..400u64 {
            for reader in 0..READERS {
                let start = (reader << 32) + n * BLOCK_SIZE;
                let read = start..start + BLOCK_SIZE;
                let there = asked.iter().any(|a| a.start <= read.start && read.end <= a.end);
                missed += u64::from(n >= 4 && !there);
                asked.extend(streams.advise(&read, &WHOLE, LARGEST).ahead);
            }
        }
        assert_eq!(missed, 0, "reads that nobody had foreseen");
        let ahead: u64 = asked.iter().map(|range| range.end - range.start).sum();
        assert!(
            ahead < READERS * (400 * BLOCK_SIZE + LARGEST) + (8 << 20),
            "{ahead} bytes"
        );
    }

    #[test]
    fn who_reads_one_mebibyte_of_eight_does_not_get_the_other_seven() {
        let reads = (0..200u64).map(|n| n * (8 << 20)..n * (8 << 20) + (1 << 20));
        let got = asked(reads);
        // What the stride foretells, again and again the same, and the guess at the beginning.
        assert!(got > 200 << 20, "the stride is not followed: {got}");
        let streams = Streams::new();
        let mut named = std::collections::HashSet::new();
        for read in (0..200u64).map(|n| n * (8 << 20)..n * (8 << 20) + (1 << 20)) {
            for ahead in streams.advise(&read, &WHOLE, LARGEST).ahead {
                named.extend(ahead.start / BLOCK_SIZE..ahead.end.div_ceil(BLOCK_SIZE));
            }
        }
        let different = named.len() as u64 * BLOCK_SIZE;
        assert!(different < (200 + 16 + 40) << 20, "{different} bytes for 200 MiB");
    }

    #[test]
    fn random_small_reads_ask_for_nothing() {
        // Far apart, never the same distance twice.
        let reads = (1..200u64).map(|n| {
            let start = (n * n * 7_919 % 10_007) * (64 << 20);
            start..start + 4096
        });
        assert_eq!(asked(reads), 0);
    }

    #[test]
    fn streams_that_end_early_make_windows_small_and_a_long_one_large_again() {
        // Each run of 6 MiB lies a gibibyte from the last, at an odd distance.
        let streams = Streams::new();
        let run = |n: u64, length: u64| {
            let start = n * (1 << 30) + n * n * (1 << 20);
            (0..length / BLOCK_SIZE)
                .map(|b| start + b * BLOCK_SIZE..start + (b + 1) * BLOCK_SIZE)
                .flat_map(|read| streams.advise(&read, &WHOLE, LARGEST).ahead)
                .map(|ahead| ahead.end - ahead.start)
                .sum::<u64>()
        };
        let first: u64 = (1..20).map(|n| run(n, 6 << 20)).sum();
        let later: u64 = (20..39).map(|n| run(n, 6 << 20)).sum();
        assert!(later < first * 3 / 4, "{first} bytes ahead, then {later}");
        run(40, 1 << 30);
        let streams = streams.streams.lock();
        assert_eq!(streams.streams.last().unwrap().window, LARGEST);
    }

    #[test]
    fn backward_and_strided_readers_are_followed() {
        let back = (0..100u64).map(|n| {
            let end = (1000 - n) * BLOCK_SIZE;
            end - BLOCK_SIZE..end
        });
        assert!(asked(back) >= 50 * BLOCK_SIZE);
        let back_in_large_reads = (0..100u64).map(|n| (99 - n) << 20..(100 - n) << 20);
        assert!(asked(back_in_large_reads) >= 50 << 20);
        let strided = (0..20u64).map(|n| n * (10 << 20)..n * (10 << 20) + 4096);
        let got = asked(strided);
        assert!(got > 0 && got < 20 * 16 * BLOCK_SIZE, "{got}");
    }

    proptest! {
        #[test]
        fn pieces_cover_exactly(start in 0u64..1000, count in 0u64..5000, connections in 1u64..64) {
            let mut at = start;
            for piece in pieces(start..start + count, piece_size(count, connections)) {
                prop_assert_eq!(piece.start, at);
                prop_assert!(piece.end - piece.start <= EXTENT_SIZE / BLOCK_SIZE && piece.end > piece.start);
                at = piece.end;
            }
            prop_assert_eq!(at, start + count);
        }

        #[test]
        fn advice_stays_within_bounds(reads in prop::collection::vec((0u64..1 << 30, 1u64..1 << 20), 1..100)) {
            let streams = Streams::new();
            let bounds = 1 << 20..1 << 29;
            for (start, length) in reads {
                for ahead in streams.advise(&(start..start + length), &bounds, LARGEST).ahead {
                    prop_assert!(ahead.start >= bounds.start && ahead.end <= bounds.end && !ahead.is_empty());
                }
            }
        }
    }
}
