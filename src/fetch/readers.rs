//! Who reads ahead at present, so that each has an equal part of what may be fetched ahead.
//!
//! Owns the count of streams. Without it, the first of several readers has asked for all there is room for before
//! the second comes, and what arrives for all of them together has no room either.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// One stream of one inode, told apart from all others of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct StreamId(pub u64);

/// A stream that was not read for so long leaves its part to others. Several readers on a slow link may each wait
/// for seconds.
const GONE_AFTER: Duration = Duration::from_secs(5);
/// More share the parts of so many.
const MOST: usize = 64;

/// The last streams that were read, the latest last.
#[derive(Debug, Default)]
pub(super) struct Readers {
    streams: Mutex<Vec<(StreamId, Instant)>>,
}

impl Readers {
    /// The stream was read.
    pub fn saw(&self, stream: StreamId, now: Instant) {
        let mut streams = self.streams.lock();
        streams.retain(|(other, at)| *other != stream && now.saturating_duration_since(*at) < GONE_AFTER);
        if streams.len() == MOST {
            streams.remove(0);
        }
        streams.push((stream, now));
    }

    /// It has come to its end.
    pub fn ended(&self, stream: StreamId) {
        self.streams.lock().retain(|(other, _)| *other != stream);
    }

    /// How many there are; 1 if there is none.
    pub fn count(&self, now: Instant) -> u64 {
        let streams = self.streams.lock();
        let count = streams
            .iter()
            .filter(|(_, at)| now.saturating_duration_since(*at) < GONE_AFTER);
        (count.count() as u64).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readers_count_while_they_read() {
        let (readers, start) = (Readers::default(), Instant::now());
        assert_eq!(readers.count(start), 1);
        for read in 0..10u32 {
            for stream in 0..3 {
                readers.saw(StreamId(stream), start + GONE_AFTER / 4 * read);
            }
        }
        let last = start + GONE_AFTER / 4 * 9;
        assert_eq!(readers.count(last), 3);
        readers.ended(StreamId(0));
        assert_eq!(readers.count(last), 2);
        readers.saw(StreamId(0), last);
        let later = last + GONE_AFTER / 2;
        readers.saw(StreamId(1), later);
        assert_eq!(readers.count(later), 3);
        assert_eq!(readers.count(last + GONE_AFTER), 1);
        for stream in 0..1000 {
            readers.saw(StreamId(stream), later);
        }
        assert_eq!(readers.count(later), MOST as u64);
    }
}
