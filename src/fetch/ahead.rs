//! Fetching what nobody waits for yet.
//!
//! Owns what a read, a small file or a warm-up makes worth fetching, and in what pieces. The guess at what comes
//! next is [`super::readahead`]'s.

use std::{
    ops::Range,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Instant,
};

use futures::{StreamExt as _, TryStreamExt as _, stream};

use super::{
    FetchError, FetchObject, Fetcher, MOST_UNREAD, Started, Streams, fills::Fills, pool::Priority, readahead,
};
use crate::{
    block::{BLOCK_SIZE, BLOCKS_PER_EXTENT, block_count, blocks_covering},
    cache::Purpose,
};

/// Extents of one warm-up in flight.
const WARM_AT_ONCE: usize = 24;

/// What blocks are fetched for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ahead {
    /// Somebody waits for them.
    No,
    /// A stream will come to them; `piece`: blocks of one GET.
    Stream {
        piece: u64,
    },
    /// They lie beside a small file, or a profile or the mount's own warm-up names them: worth it only if the
    /// cache keeps them. So with a warm-up for nobody in particular.
    Neighbours,
    WarmUp,
}

impl Ahead {
    pub fn of(priority: Priority) -> Self {
        match priority {
            Priority::Waited => Self::No,
            Priority::Readahead => Self::Neighbours,
            Priority::WarmUp => Self::WarmUp,
        }
    }

    pub fn priority(self) -> Priority {
        match self {
            Self::No => Priority::Waited,
            Self::Stream { .. } | Self::Neighbours => Priority::Readahead,
            Self::WarmUp => Priority::WarmUp,
        }
    }
}

impl Fetcher {
    /// Told of every read (hit or miss), so that it may fetch ahead. `window` limits it to the file's
    /// bytes within the object.
    pub fn advise(
        self: &Arc<Self>,
        object: &Arc<FetchObject>,
        streams: &Streams,
        range: Range<u64>,
        window: Range<u64>,
    ) {
        let bounds = object.clip(&window);
        let now = Instant::now();
        let readers = self.readers.count(now);
        let advice = streams.advise(&range, &bounds, self.largest_window / readers);
        if let Some(stream) = advice.stream {
            match range.end < bounds.end {
                true => self.readers.saw(stream, now),
                // Whoever reads one file after the other is one reader.
                false => self.readers.ended(stream),
            }
        }
        let (window, connections) = (advice.window * readers, self.config.connections as u64);
        for ahead in advice.ahead {
            let left = bounds.end.saturating_sub(ahead.start).saturating_mul(readers);
            let piece = readahead::even_piece(window / BLOCK_SIZE, connections, left / BLOCK_SIZE);
            let wanted: Vec<u64> = blocks_covering(&ahead).collect();
            self.fetch_ahead(object, &wanted, Ahead::Stream { piece });
        }
    }

    /// Told that a small file, `file` of the object, is wanted where many others are: it and its neighbours
    /// in the same extent are fetched, the file first. Nothing happens while there is much to fetch already,
    /// or more arrives than the cache's disk takes: neighbours that are not kept would be fetched twice.
    pub fn advise_neighbours(self: &Arc<Self>, object: &Arc<FetchObject>, file: Range<u64>) {
        let own = blocks_covering(&object.clip(&file));
        let extent = own.start / BLOCKS_PER_EXTENT;
        let end = ((extent + 1) * BLOCKS_PER_EXTENT).min(block_count(object.source.size));
        let disk_keeps_up = self.fills.as_ref().is_some_and(Fills::keep_up);
        if self.low_memory.available_permits() < BLOCKS_PER_EXTENT as usize
            || own.is_empty()
            || !disk_keeps_up
        {
            return;
        }
        let neighbours: Vec<u64> = (extent * BLOCKS_PER_EXTENT..end)
            .filter(|block| !own.contains(block))
            .collect();
        let own: Vec<u64> = own.collect();
        self.start(object, &own, Ahead::No);
        self.fetch_ahead(object, &neighbours, Ahead::Neighbours);
    }

    fn fetch_ahead(self: &Arc<Self>, object: &Arc<FetchObject>, wanted: &[u64], ahead: Ahead) {
        let started = self.start(object, wanted, ahead);
        let mut unread = object.unread.lock();
        for (block, started) in started {
            if matches!(started, Started::Coming(_)) && unread.len() < MOST_UNREAD && unread.insert(block) {
                self.tally.readahead_blocks.fetch_add(1, Relaxed);
            }
        }
    }

    /// Brings a range into the cache, at a priority; ends when it is there (or recently was).
    pub async fn warm(
        self: &Arc<Self>,
        object: &Arc<FetchObject>,
        range: Range<u64>,
        priority: Priority,
    ) -> Result<(), FetchError> {
        let blocks = blocks_covering(&object.clip(&range));
        let extents = blocks.start / BLOCKS_PER_EXTENT..blocks.end.div_ceil(BLOCKS_PER_EXTENT);
        stream::iter(extents)
            .map(|extent| {
                let start = (extent * BLOCKS_PER_EXTENT).max(blocks.start);
                let end = ((extent + 1) * BLOCKS_PER_EXTENT).min(blocks.end);
                async move {
                    let wanted: Vec<u64> = (start..end).collect();
                    for (block, started) in self.start(object, &wanted, Ahead::of(priority)) {
                        match started {
                            Started::Coming(mut done) => {
                                let arrived = done
                                    .wait_for(Option::is_some)
                                    .await
                                    .map_err(|_| FetchError::Stopped)?;
                                arrived.clone().ok_or(FetchError::Stopped)??;
                            }
                            // Here, but not in the cache: evicted since, or there was no room in the queue.
                            Started::Here(_) => {
                                self.fill(object, block..block + 1, Purpose::WarmUp, false, true)
                                    .await;
                            }
                        }
                    }
                    Ok(())
                }
            })
            .buffer_unordered(WARM_AT_ONCE)
            .try_for_each(|()| async { Ok(()) })
            .await
    }
}
