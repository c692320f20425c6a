//! Which reads of one inode go on where another left off.

use std::ops::Range;

use parking_lot::Mutex;

use crate::block::{BLOCK_SIZE, EXTENT_SIZE};

/// Streams told apart on one inode; the one that was silent longest makes room.
const STREAMS: usize = 8;
/// A window begins with this, and doubles each time its stream goes on.
const FIRST_WINDOW: u64 = 4 * BLOCK_SIZE;
/// The kernel's own readahead sends requests a little out of order, and readers skip a little.
const SLACK: u64 = 8 * BLOCK_SIZE;

#[derive(Clone, Copy, Debug)]
struct Stream {
    /// Where the last read ended.
    next: u64,
    window: u64,
    /// Fetched ahead up to here.
    ahead: u64,
}

/// Readahead state of one inode.
#[derive(Debug, Default)]
pub struct Streams(Mutex<Vec<Stream>>);

impl Streams {
    /// What to fetch ahead of a reader that has just read `range` of `file`, both within one object.
    pub fn next(&self, range: &Range<u64>, file: &Range<u64>, max_window: u64) -> Option<Range<u64>> {
        let mut streams = self.0.lock();
        let found = streams
            .iter()
            .position(|stream| (stream.next.saturating_sub(SLACK)..=stream.next + SLACK).contains(&range.start));
        let mut stream = match found {
            Some(at) => {
                let mut stream = streams.remove(at);
                stream.window = (stream.window * 2).clamp(FIRST_WINDOW, max_window.max(FIRST_WINDOW));
                stream.next = stream.next.max(range.end);
                stream
            }
            // Who begins at the beginning probably goes on; who begins elsewhere has to show it.
            None if range.start == file.start => {
                Stream { next: range.end, window: FIRST_WINDOW, ahead: range.end }
            }
            None => Stream { next: range.end, window: 0, ahead: range.end },
        };
        let target = stream.next.saturating_add(stream.window).min(file.end);
        let from = stream.ahead.max(stream.next);
        // In pieces worth a request: when half of the window has been used up.
        let due = target.saturating_sub(from) >= (stream.window / 2).min(EXTENT_SIZE) || target == file.end;
        let ahead = (due && target > from).then(|| {
            stream.ahead = target;
            from..target
        });
        if streams.len() == STREAMS {
            streams.remove(0);
        }
        streams.push(stream);
        ahead
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: u64 = 64 << 20;
    const FILE: Range<u64> = 0..1 << 30;

    #[test]
    fn a_sequential_reader_is_run_ahead_of_and_nothing_twice() {
        let streams = Streams::default();
        let mut fetched = 0;
        for at in 0..2000u64 {
            let read = at * BLOCK_SIZE..(at + 1) * BLOCK_SIZE;
            if let Some(ahead) = streams.next(&read, &FILE, MAX) {
                assert!(ahead.start >= fetched && ahead.start >= read.end && ahead.end <= FILE.end);
                fetched = ahead.end;
            }
            assert!(fetched <= read.end + MAX);
        }
        assert!(fetched > 2000 * BLOCK_SIZE + MAX / 2);
    }

    #[test]
    fn random_reads_fetch_nothing_ahead() {
        let streams = Streams::default();
        for at in [700u64, 13, 5000, 90, 2222, 4100, 60, 7777] {
            assert_eq!(streams.next(&(at * (1 << 20) + 5..at * (1 << 20) + 9), &(0..1 << 40), MAX), None);
        }
    }

    #[test]
    fn interleaved_readers_are_told_apart() {
        let streams = Streams::default();
        let mut ahead = [0; 4];
        for step in 0..100u64 {
            for reader in 0..4u64 {
                let start = reader * (200 << 20) + step * BLOCK_SIZE;
                if let Some(range) = streams.next(&(start..start + BLOCK_SIZE), &FILE, MAX) {
                    ahead[reader as usize] = range.end - reader * (200 << 20);
                }
            }
        }
        assert!(ahead.iter().all(|ahead| *ahead > 100 * BLOCK_SIZE), "{ahead:?}");
    }
}
