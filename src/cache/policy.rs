//! Which unit to give up next. Pure: no files, no clock, no locks.

use std::hash::{BuildHasherDefault, Hash, Hasher};

use lru::LruCache;

use super::{ObjectId, Purpose};
use crate::block::{EXTENT_SIZE, ExtentNo};

/// What is evicted at once.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Unit {
    pub id: ObjectId,
    part: u32,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Part {
    Extent(ExtentNo),
    /// A sealed object: never punched, so it goes as a whole.
    Object,
    /// A sealed tree part; the id is its digest.
    Tree,
}

impl Unit {
    const OBJECT: u32 = u32::MAX;
    const TREE: u32 = u32::MAX - 1;

    pub fn extent(id: ObjectId, extent: ExtentNo) -> Self {
        // `CachedObject` refuses objects with more extents than fit.
        Self {
            id,
            part: u32::try_from(extent.0).unwrap_or(Self::TREE - 1),
        }
    }

    pub fn object(id: ObjectId) -> Self {
        Self {
            id,
            part: Self::OBJECT,
        }
    }

    pub fn tree(id: ObjectId) -> Self {
        Self { id, part: Self::TREE }
    }

    pub fn part(&self) -> Part {
        match self.part {
            Self::OBJECT => Part::Object,
            Self::TREE => Part::Tree,
            extent => Part::Extent(ExtentNo(extent.into())),
        }
    }

    pub fn encode(&self) -> [u8; 36] {
        let mut bytes = [0; 36];
        bytes[..32].copy_from_slice(&self.id.0);
        bytes[32..].copy_from_slice(&self.part.to_le_bytes());
        bytes
    }

    pub fn decode(bytes: &[u8; 36]) -> Self {
        let mut id = [0; 32];
        id.copy_from_slice(&bytes[..32]);
        Self {
            id: ObjectId(id),
            part: u32::from_le_bytes([bytes[32], bytes[33], bytes[34], bytes[35]]),
        }
    }

    /// Spread evenly: ids are BLAKE3 output.
    fn spread(&self) -> u64 {
        let id = &self.id.0;
        let word = u64::from_le_bytes([id[0], id[1], id[2], id[3], id[4], id[5], id[6], id[7]]);
        (word ^ u64::from(self.part)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }
}

impl Hash for Unit {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.spread());
    }
}

/// Passes a unit's own spread through.
#[derive(Clone, Copy, Default)]
pub struct Spread(u64);

impl Hasher for Spread {
    fn write(&mut self, _: &[u8]) {}
    fn write_u64(&mut self, word: u64) {
        self.0 = word ^ word >> 32;
    }
    fn finish(&self) -> u64 {
        self.0
    }
}

/// What is remembered of a unit.
#[derive(Clone, Copy, Default)]
struct Seen {
    /// A reader has asked for it. What readahead put there has not been referenced yet, and its first
    /// reference is no reuse.
    referenced: bool,
}

type Listed<V> = LruCache<Unit, V, BuildHasherDefault<Spread>>;

fn listed<V>() -> Listed<V> {
    Listed::unbounded_with_hasher(BuildHasherDefault::default())
}

/// One arrival in so many goes to the hot end even when the others go to the cold end.
const SELDOM: u32 = 32;

/// A cache of names only, over a sample of the units, that always does the same.
struct Shadow {
    list: Listed<u64>,
    used: u64,
    capacity: u64,
    cold: bool,
    arrivals: u32,
}

impl Shadow {
    fn new(capacity: u64, cold: bool) -> Self {
        Self {
            list: listed(),
            used: 0,
            capacity,
            cold,
            arrivals: 0,
        }
    }

    /// Whether it was a hit.
    fn reference(&mut self, unit: Unit, bytes: u64) -> bool {
        if self.list.promote(&unit) {
            return true;
        }
        if bytes > self.capacity {
            return false;
        }
        while self.used + bytes > self.capacity || self.list.len() >= SHADOW_MOST {
            match self.list.pop_lru() {
                Some((_, gone)) => self.used -= gone,
                None => break,
            }
        }
        self.used += bytes;
        self.list.put(unit, bytes);
        self.arrivals = self.arrivals.wrapping_add(1);
        if self.cold && !self.arrivals.is_multiple_of(SELDOM) {
            self.list.demote(&unit);
        }
        false
    }
}

/// Units in a shadow, at most.
const SHADOW_MOST: usize = 1 << 14;
/// The shadows are as large as the cache up to this many extents, and sampled beyond.
const SHADOW_EXTENTS: u64 = 1024;
/// The score forgets at this rate, in sampled references.
const MEMORY: i64 = 512;
/// A lead of about 1 % of the recent references decides.
const LEAD: i64 = 5 * 1024;

/// LRU with adaptive insertion (after DIP, Qureshi et al., ISCA 2007).
///
/// A unit that arrives spends a short time in the *window*, where it is neither reused nor given up:
/// the many touches of the pass that brought it are one reference. Leaving it, it goes to the hot or
/// to the cold end of the list, as the better of two shadow caches does.
pub struct Policy {
    list: Listed<Seen>,
    window: Listed<Seen>,
    /// The units of the passes under way: a further touch of these is the same reference.
    recent: Listed<()>,
    lru: Shadow,
    cold: Shadow,
    /// One unit in so many is sampled.
    sampling: u64,
    /// The lead of the LRU shadow, in hits, times 1024, forgetting.
    score: i64,
    insert_cold: bool,
    arrivals: u32,
    clock: u32,
}

impl Policy {
    pub fn new(capacity: u64) -> Self {
        let sampling = (capacity / EXTENT_SIZE / SHADOW_EXTENTS)
            .next_power_of_two()
            .min(256);
        Self {
            list: listed(),
            window: listed(),
            recent: listed(),
            lru: Shadow::new(capacity / sampling, false),
            cold: Shadow::new(capacity / sampling, true),
            sampling,
            score: 0,
            // Without evidence: cold, since an epoch over more data than fits is what LRU is worst at.
            insert_cold: true,
            arrivals: 0,
            clock: 1,
        }
    }

    /// How many units the window and the recent passes span.
    fn span(&self) -> usize {
        (self.len() / 64).clamp(4, 1024)
    }

    /// The first block of `unit` arrived.
    pub fn insert(&mut self, unit: Unit, _bytes: u64, purpose: Purpose) {
        if self.contains(&unit) {
            return;
        }
        let referenced = purpose == Purpose::Reader || self.recent.contains(&unit);
        self.window.put(unit, Seen { referenced });
        while self.window.len() > self.span() {
            let Some((unit, seen)) = self.window.pop_lru() else {
                break;
            };
            self.list.put(unit, seen);
            self.arrivals = self.arrivals.wrapping_add(1);
            if self.insert_cold && !self.arrivals.is_multiple_of(SELDOM) {
                self.list.demote(&unit);
            }
        }
    }

    /// A reader asked for bytes of `unit`, present or not.
    pub fn reference(&mut self, unit: Unit, bytes: u64) {
        if self.recent.promote(&unit) {
            return;
        }
        self.recent.put(unit, ());
        while self.recent.len() > self.span() {
            self.recent.pop_lru();
        }
        self.clock = self.clock.wrapping_add(1).max(1);
        if (unit.spread() >> 40).is_multiple_of(self.sampling) {
            let lead =
                i64::from(self.lru.reference(unit, bytes)) - i64::from(self.cold.reference(unit, bytes));
            self.score += 1024 * lead - self.score / MEMORY;
            if self.score.abs() > LEAD {
                self.insert_cold = self.score < 0;
            }
        }
        if let Some(seen) = self.window.peek_mut(&unit) {
            seen.referenced = true;
        } else if let Some(seen) = self.list.peek_mut(&unit) {
            // The first reference to what readahead brought is no reuse.
            if std::mem::replace(&mut seen.referenced, true) {
                self.list.promote(&unit);
            }
        }
    }

    /// A unit known from an earlier run: it becomes the coldest. Restore hottest first.
    pub fn restore(&mut self, unit: Unit) {
        if !self.contains(&unit) {
            self.list.put(unit, Seen { referenced: true });
            self.list.demote(&unit);
        }
    }

    pub fn remove(&mut self, unit: &Unit) {
        self.list.pop(unit);
        self.window.pop(unit);
    }

    /// Takes the coldest unit off the list.
    pub fn victim(&mut self) -> Option<Unit> {
        self.list
            .pop_lru()
            .or_else(|| self.window.pop_lru())
            .map(|(unit, _)| unit)
    }

    /// The victim could not be evicted now (somebody reads it).
    pub fn keep(&mut self, unit: Unit) {
        self.list.put(unit, Seen { referenced: true });
    }

    pub fn contains(&self, unit: &Unit) -> bool {
        self.list.contains(unit) || self.window.contains(unit)
    }

    /// Advances when a touch of the same unit would be another reference.
    pub fn clock(&self) -> u32 {
        self.clock
    }

    pub fn len(&self) -> usize {
        self.list.len() + self.window.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Hottest first.
    pub fn order(&self) -> impl Iterator<Item = Unit> + '_ {
        self.window.iter().chain(self.list.iter()).map(|(unit, _)| *unit)
    }
}

#[cfg(test)]
mod tests;
