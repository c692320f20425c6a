//! Bringing a version into the cache ahead of its readers, at the lowest priority.
//!
//! Nothing is noted down: what is in the cache already is passed over, so an interrupted warm-up is
//! taken up again by asking for it again.

use std::{ffi::OsStr, ops::Range, os::unix::ffi::OsStrExt as _, path::Path, sync::Arc, time::Duration};

use futures::{StreamExt as _, TryStreamExt as _, stream};
use globset::{GlobBuilder, GlobSet, GlobSetBuilder};
use tokio::{sync::Semaphore, sync::watch, time::Instant};

use super::{
    Agent, AgentError, UnderWay,
    access::Caller,
    control::{WarmProgress, WarmRequest},
    snapshot::Snapshot,
    stored::blocking,
};
use crate::{
    block::{BLOCK_SIZE, EXTENT_SIZE, blocks_covering},
    fetch::Priority,
    tree::{EntryKind, ObjectNo, RowNo, Tree, TreeError},
};

/// Blocks on their way to the cache: fewer than its queue holds, since what does not fit is dropped.
const BLOCKS_IN_FLIGHT: usize = 192;
/// Requests at once, each up to an extent: small objects are latency, not bandwidth.
const PIECES_IN_FLIGHT: usize = 48;
/// What has arrived is written within this, or the cache does not take it.
const KEEP_PATIENCE: Duration = Duration::from_secs(10);
const ASK_AGAIN: Duration = Duration::from_secs(1);
const KEEP_LOOK: Duration = Duration::from_millis(2);

/// What is to be brought, in the order of the tree, neighbours joined.
#[derive(Debug, Default, PartialEq, Eq)]
struct Plan {
    files: u64,
    ranges: Vec<(ObjectNo, Range<u64>)>,
}

impl Plan {
    fn new(tree: &Tree, include: Option<&GlobSet>) -> Result<Self, TreeError> {
        let mut plan = Self::default();
        for row in (0..tree.row_count()).map(RowNo) {
            if !matches!(tree.entry(row)?.kind, EntryKind::File { .. }) {
                continue;
            }
            if let Some(include) = include {
                let path = tree.path(row)?;
                let path = Path::new(OsStr::from_bytes(&path));
                if !include.is_match(path.strip_prefix("/").unwrap_or(path)) {
                    continue;
                }
            }
            plan.files += 1;
            if let Some((object, range)) = tree.object_range(row)?.filter(|(_, range)| !range.is_empty()) {
                plan.add(object, range);
            }
        }
        plan.join();
        Ok(plan)
    }

    /// Files of a bundle follow each other in the tree, too: joined at once, they take no memory.
    fn add(&mut self, object: ObjectNo, range: Range<u64>) {
        match self.ranges.last_mut() {
            Some((last, covered))
                if *last == object
                    && covered.end.next_multiple_of(BLOCK_SIZE) >= range.start
                    && covered.start <= range.start =>
            {
                covered.end = covered.end.max(range.end);
            }
            _ => self.ranges.push((object, range)),
        }
    }

    fn join(&mut self) {
        let mut ranges = std::mem::take(&mut self.ranges);
        ranges.sort_unstable_by_key(|(object, range)| (object.0, range.start));
        for (object, range) in ranges {
            self.add(object, range);
        }
    }

    fn bytes(&self) -> u64 {
        self.ranges.iter().map(|(_, range)| range.end - range.start).sum()
    }

    /// Pieces that each lie within an extent.
    fn pieces(&self) -> impl Iterator<Item = (ObjectNo, Range<u64>)> + '_ {
        self.ranges.iter().flat_map(|(object, range)| {
            let mut at = range.start;
            std::iter::from_fn(move || {
                let start = at;
                at = range.end.min((start / EXTENT_SIZE + 1) * EXTENT_SIZE);
                (start < range.end).then_some((*object, start..at))
            })
        })
    }
}

fn include(patterns: &[String]) -> Result<Option<GlobSet>, AgentError> {
    if patterns.is_empty() {
        return Ok(None);
    }
    let mut set = GlobSetBuilder::new();
    for pattern in patterns {
        let glob = GlobBuilder::new(pattern.trim_start_matches('/'))
            .literal_separator(true)
            .build()
            .map_err(|error| AgentError::Pattern {
                pattern: pattern.clone(),
                reason: error.kind().to_string(),
            })?;
        set.add(glob);
    }
    let set = set.build().map_err(|error| AgentError::Pattern {
        pattern: patterns.join(" "),
        reason: error.to_string(),
    })?;
    Ok(Some(set))
}

impl Agent {
    /// Brings what the request names into the cache. Dropping the future ends it.
    pub async fn warm(
        self: &Arc<Self>,
        caller: &Caller,
        request: WarmRequest,
        progress: watch::Sender<WarmProgress>,
    ) -> Result<WarmProgress, AgentError> {
        let _under_way = UnderWay::begin(self)?;
        let requested = &request.version.reference;
        let globs = include(&request.include)?;
        let damaged = |source| AgentError::Tree {
            requested: requested.clone(),
            source,
        };
        let snapshot = Arc::new(self.snapshot(caller, &request.version).await?);
        let tree = Arc::clone(&snapshot.tree);
        let plan = blocking(move || Plan::new(&tree, globs.as_ref()))
            .await
            .map_err(damaged)?;
        if plan.files == 0 && !request.include.is_empty() {
            return Err(AgentError::NothingMatches {
                requested: requested.clone(),
                patterns: request.include.join(" "),
            });
        }
        let needed = plan.bytes();
        if needed > self.cache_config.max_bytes {
            return Err(AgentError::TooLarge {
                requested: requested.clone(),
                needed,
                limit: self.cache_config.max_bytes,
            });
        }
        progress.send_modify(|progress| {
            progress.reference = Some(snapshot.resolved.reference());
            progress.files = plan.files;
            progress.bytes_total = needed;
        });
        let room = Semaphore::new(BLOCKS_IN_FLIGHT);
        stream::iter(plan.pieces())
            .map(Ok)
            .try_for_each_concurrent(PIECES_IN_FLIGHT, |(number, range)| {
                self.warm_piece(requested, &snapshot, number, range, &room, &progress)
            })
            .await?;
        let done = progress.borrow().clone();
        Ok(done)
    }

    async fn warm_piece(
        &self,
        requested: &str,
        snapshot: &Snapshot,
        number: ObjectNo,
        range: Range<u64>,
        room: &Semaphore,
        progress: &watch::Sender<WarmProgress>,
    ) -> Result<(), AgentError> {
        let blocks = blocks_covering(&range);
        // An extent's worth at most, so it fits; the semaphore is never closed.
        let permits = u32::try_from(blocks.end - blocks.start).unwrap_or(u32::MAX);
        let _room = room
            .acquire_many(permits)
            .await
            .map_err(|_| AgentError::Stopping)?;
        let object = snapshot
            .object(&self.fetcher, number)
            .map_err(|source| AgentError::Tree {
                requested: requested.to_owned(),
                source,
            })?;
        let count = range.end - range.start;
        let Some(cached) = object.cached().map(Arc::clone) else {
            return Err(AgentError::NotKept {
                reason: "there is no cache".into(),
            });
        };
        let is_there = {
            let (cached, range) = (Arc::clone(&cached), range.clone());
            blocking(move || cached.presence(&range)).await
        };
        if is_there {
            progress.send_modify(|progress| {
                progress.bytes += count;
                progress.bytes_before += count;
            });
            return Ok(());
        }
        // Asked again for what was dropped on the way to the disk because others filled the queue.
        let until = Instant::now() + KEEP_PATIENCE;
        loop {
            self.fetcher
                .warm(&object, range.clone(), Priority::WarmUp)
                .await
                .map_err(|source| AgentError::Warm {
                    requested: requested.to_owned(),
                    source,
                })?;
            let again = Instant::now() + ASK_AGAIN;
            while Instant::now() < again {
                if cached.presence(&range) {
                    progress.send_modify(|progress| progress.bytes += count);
                    return Ok(());
                }
                tokio::time::sleep(KEEP_LOOK).await;
            }
            let degraded = self.cache.stats().degraded;
            if degraded.is_some() || Instant::now() > until {
                return Err(AgentError::NotKept {
                    reason: degraded.unwrap_or_else(|| "everything in it is in use".into()),
                });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_joined_and_pieces_stay_within_extents() {
        let mut plan = Plan::default();
        plan.add(ObjectNo(1), 0..1000);
        plan.add(ObjectNo(1), 4096..5000);
        plan.add(ObjectNo(0), EXTENT_SIZE - 10..2 * EXTENT_SIZE + 10);
        plan.add(ObjectNo(1), 5000..6000);
        plan.join();
        assert_eq!(
            plan.ranges,
            [
                (ObjectNo(0), EXTENT_SIZE - 10..2 * EXTENT_SIZE + 10),
                (ObjectNo(1), 0..6000)
            ]
        );
        let pieces: Vec<_> = plan.pieces().map(|(_, range)| range).collect();
        assert_eq!(
            pieces,
            [
                EXTENT_SIZE - 10..EXTENT_SIZE,
                EXTENT_SIZE..2 * EXTENT_SIZE,
                2 * EXTENT_SIZE..2 * EXTENT_SIZE + 10,
                0..6000
            ]
        );
        assert_eq!(plan.bytes(), EXTENT_SIZE + 20 + 6000);
    }

    #[test]
    fn patterns_speak_of_whole_paths() {
        let set = include(&["train/*.tar".into(), "/val/**".into()])
            .unwrap()
            .unwrap();
        assert!(set.is_match("train/0.tar") && set.is_match("val/a/b"));
        assert!(!set.is_match("train/a/0.tar") && !set.is_match("0.tar"));
        assert!(include(&["a[".into()]).is_err());
    }
}
