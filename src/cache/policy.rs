//! Which unit to give up next. Pure: no files, no clock, no locks.

mod shadow;
#[cfg(test)]
mod tests;

use std::hash::{BuildHasherDefault, Hash, Hasher};

use lru::LruCache;

use super::{ObjectId, Purpose};
use crate::block::{EXTENT_SIZE, ExtentNo};
use shadow::{Departed, HIT, INSERTIONS, Insertion, Shadow};

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
    /// The clock at its last reference.
    at: u32,
    /// A reader has asked for it. What readahead put there has not been referenced yet, and its first
    /// reference is no reuse.
    referenced: bool,
}

/// What became of a unit's place in the order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Move {
    Hot,
    Cold,
    Gone,
}

impl Move {
    pub fn encode(self) -> u8 {
        match self {
            Self::Hot => 1,
            Self::Cold => 2,
            Self::Gone => 3,
        }
    }

    pub fn decode(byte: u8) -> Option<Self> {
        [Self::Hot, Self::Cold, Self::Gone]
            .into_iter()
            .find(|to| to.encode() == byte)
    }
}

/// An order, hottest first, after some moves.
pub fn moved(order: Vec<Unit>, moves: impl Iterator<Item = (Unit, Move)>) -> Vec<Unit> {
    let mut moves = moves.peekable();
    if moves.peek().is_none() {
        return order;
    }
    let mut list: Listed<()> = listed();
    for unit in order.into_iter().rev() {
        list.put(unit, ());
    }
    for (unit, to) in moves {
        match to {
            Move::Hot => {
                list.put(unit, ());
            }
            Move::Cold => {
                list.put(unit, ());
                list.demote(&unit);
            }
            Move::Gone => {
                list.pop(&unit);
            }
        }
    }
    list.iter().map(|(unit, ())| *unit).collect()
}

/// Moves that may wait to be written down.
const MOVES_MOST: usize = 1 << 16;

/// The moves since somebody last took them. Bounded: too many, and all are lost, which is known.
#[derive(Default)]
struct Moves {
    list: Vec<(Unit, Move)>,
    lost: bool,
}

impl Moves {
    fn push(&mut self, unit: Unit, to: Move) {
        if self.list.len() == MOVES_MOST {
            *self = Self {
                lost: true,
                ..Self::default()
            };
        } else if !self.lost {
            self.list.push((unit, to));
        }
    }
}

/// What the shadow caches have found out, in few words.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Learned {
    insertion: Insertion,
    /// Of the shadows, in the order of [`INSERTIONS`].
    scores: [i64; 3],
}

impl Learned {
    pub const LEN: usize = 25;

    pub fn encode(&self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        let place = INSERTIONS.iter().position(|other| *other == self.insertion);
        bytes[0] = place.unwrap_or(0) as u8;
        for (score, place) in self.scores.iter().zip(bytes[1..].chunks_exact_mut(8)) {
            place.copy_from_slice(&score.to_le_bytes());
        }
        bytes
    }

    pub fn decode(bytes: &[u8; Self::LEN]) -> Self {
        let (first, scores) = (bytes[0], &bytes[1..]);
        let score = |at: usize| {
            let mut score = [0; 8];
            score.copy_from_slice(&scores[at * 8..at * 8 + 8]);
            // A full score forgets as much as a hit adds.
            i64::from_le_bytes(score).clamp(0, HIT * shadow::MEMORY)
        };
        Self {
            insertion: INSERTIONS
                .get(usize::from(first))
                .copied()
                .unwrap_or(Insertion::Cold),
            scores: std::array::from_fn(score),
        }
    }
}

type Listed<V> = LruCache<Unit, V, BuildHasherDefault<Spread>>;

fn listed<V>() -> Listed<V> {
    Listed::unbounded_with_hasher(BuildHasherDefault::default())
}

/// The shadows are as large as the cache up to this many extents, and sampled beyond.
const SHADOW_EXTENTS: u64 = 1024;
/// A lead of about 1 % of the recent references decides.
const LEAD: i64 = 5 * HIT;
/// Passes under way at once, at least, that are told apart from reuse.
const PASSES: usize = 128;

/// LRU with adaptive insertion (after DIP, Qureshi et al., ISCA 2007).
///
/// A unit that arrives spends a short time in the *window*, where it is neither reused nor given up:
/// the many touches of the pass that brought it are one reference. Leaving it, it goes to the hot or
/// to the cold end of the list, as the best of three shadow caches does.
pub struct Policy {
    list: Listed<Seen>,
    window: Listed<Seen>,
    /// The units of the passes under way, and the clock when each began: a further touch of these is
    /// the same reference.
    recent: Listed<u32>,
    /// How many units the window spans, at least.
    passes: usize,
    /// Arrivals since `passes` was last looked at, and those among them that came back too soon.
    placed: usize,
    returned: usize,
    shadows: [Shadow; 3],
    /// One unit in so many is sampled.
    sampling: u64,
    insertion: Insertion,
    departed: Departed,
    arrivals: u32,
    clock: u32,
    moves: Moves,
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
            passes: 0,
            placed: 0,
            returned: 0,
            shadows: INSERTIONS.map(|insertion| Shadow::new(capacity / sampling, insertion)),
            sampling,
            // Without evidence: cold, since an epoch over more data than fits is what LRU is worst at.
            insertion: Insertion::Cold,
            departed: Departed::default(),
            arrivals: 0,
            clock: 1,
            moves: Moves::default(),
        }
    }

    /// What became of whom since the last time; `None` when it was too much to remember. Where a unit is in the list is exactly told; what is in the window comes as hot.
    pub fn take_moves(&mut self) -> Option<Vec<(Unit, Move)>> {
        (!self.moves.lost).then(|| std::mem::take(&mut self.moves.list))
    }

    pub fn has_moved(&self) -> bool {
        self.moves.lost || !self.moves.list.is_empty()
    }

    /// Somebody has taken the order as a whole.
    pub fn forget_moves(&mut self) {
        self.moves = Moves::default();
    }

    pub fn learned(&self) -> Learned {
        Learned {
            insertion: self.insertion,
            scores: std::array::from_fn(|n| self.shadows[n].score),
        }
    }

    /// What an earlier run had learned: where this one begins.
    pub fn recall(&mut self, learned: Learned) {
        self.insertion = learned.insertion;
        for (shadow, score) in self.shadows.iter_mut().zip(learned.scores) {
            shadow.score = score;
        }
    }

    /// How many units the window spans: a small part of the cache, and more while as many are being read
    /// at once.
    fn window_span(&self) -> usize {
        let few = (self.len() / 64).clamp(4, 1024);
        self.passes.clamp(few, (self.len() / 8).max(few))
    }

    /// How many units the passes under way span. Longer than the window: names alone cost no room, and
    /// many readers at once must not look like reuse.
    fn recent_span(&self) -> usize {
        (self.len() / 8).min(PASSES).max(self.window_span())
    }

    /// `unit` comes back: if it went during the pass that now asks for it again, the window was too short
    /// for all the passes under way.
    fn widen(&mut self, unit: &Unit) {
        let pass = self.recent.peek(unit).copied();
        self.returned += usize::from(pass.is_some() && pass == self.departed.get(unit));
        self.placed += 1;
        if self.placed == 64 {
            // One by chance says nothing: at the border of two shuffled epochs it happens.
            self.passes = match self.returned {
                0..4 => self.passes.saturating_sub(1),
                _ => (self.window_span() * 3 / 2).min(1 << 16),
            };
            (self.placed, self.returned) = (0, 0);
        }
    }

    /// The first block of `unit` arrived.
    pub fn insert(&mut self, unit: Unit, bytes: u64, purpose: Purpose) {
        if purpose == Purpose::Reader {
            // Of an object that was not there nobody has reported the touch.
            self.reference(unit, bytes);
        }
        if self.contains(&unit) {
            return;
        }
        self.widen(&unit);
        let began = self.recent.peek(&unit).copied();
        let seen = Seen {
            at: began.unwrap_or(self.clock),
            referenced: began.is_some(),
        };
        self.moves.push(unit, Move::Hot);
        self.window.put(unit, seen);
        while self.window.len() > self.window_span() {
            let Some((unit, seen)) = self.window.pop_lru() else {
                break;
            };
            self.place(unit, seen);
        }
    }

    /// Out of the window, into the list.
    fn place(&mut self, unit: Unit, seen: Seen) {
        self.arrivals = self.arrivals.wrapping_add(1);
        let hot = self
            .insertion
            .is_hot(self.arrivals, seen.at, self.len(), self.departed.get(&unit));
        self.list.put(unit, seen);
        if !hot {
            self.list.demote(&unit);
        }
        self.moves.push(unit, if hot { Move::Hot } else { Move::Cold });
    }

    /// A reader asked for bytes of `unit`, present or not.
    pub fn reference(&mut self, unit: Unit, bytes: u64) {
        if self.recent.promote(&unit) {
            return;
        }
        self.clock = self.clock.wrapping_add(1).max(1);
        let clock = self.clock;
        self.recent.put(unit, clock);
        while self.recent.len() > self.recent_span() {
            self.recent.pop_lru();
        }
        self.learn(unit, bytes);
        if let Some(seen) = self.window.peek_mut(&unit) {
            seen.referenced = true;
            seen.at = clock;
        } else if let Some(seen) = self.list.peek_mut(&unit) {
            seen.at = clock;
            // The first reference to what readahead brought is no reuse.
            if std::mem::replace(&mut seen.referenced, true) {
                self.list.promote(&unit);
                self.moves.push(unit, Move::Hot);
            }
        }
    }

    /// Shows the shadows a reference. They know extents only: an object may be sealed here and not
    /// there.
    fn learn(&mut self, unit: Unit, bytes: u64) {
        let extents = match unit.part() {
            Part::Object => bytes.div_ceil(EXTENT_SIZE),
            _ => 0,
        };
        let object = (0..extents).map(|number| {
            let len = (bytes - number * EXTENT_SIZE).min(EXTENT_SIZE);
            (Unit::extent(unit.id, ExtentNo(number)), len)
        });
        let whole = (extents == 0).then_some((unit, bytes));
        for (unit, bytes) in whole.into_iter().chain(object) {
            if (unit.spread() >> 40).is_multiple_of(self.sampling) {
                self.shadows
                    .iter_mut()
                    .for_each(|shadow| shadow.reference(unit, bytes));
            }
        }
        self.choose();
    }

    fn choose(&mut self) {
        let of = |insertion| {
            self.shadows
                .iter()
                .find(|shadow| shadow.insertion == insertion)
                .map_or(0, |shadow| shadow.score)
        };
        let best = self.shadows.iter().max_by_key(|shadow| shadow.score);
        if let Some(best) = best
            && best.score > of(self.insertion) + LEAD
        {
            self.insertion = best.insertion;
        }
    }

    /// A unit known from an earlier run: it becomes the coldest. Restore hottest first.
    pub fn restore(&mut self, unit: Unit) {
        if !self.contains(&unit) {
            let seen = Seen {
                at: self.clock,
                referenced: true,
            };
            self.list.put(unit, seen);
            self.list.demote(&unit);
        }
    }

    /// `extents` become one unit: an object that was read is sealed because it is opened again.
    pub fn seal(&mut self, unit: Unit, extents: impl Iterator<Item = Unit>) {
        let mut proven = false;
        for extent in extents {
            proven |= self.list.peek(&extent).is_some_and(|seen| seen.referenced);
            self.remove(&extent);
        }
        // In one of the two only.
        self.remove(&unit);
        let seen = Seen {
            at: self.clock,
            referenced: true,
        };
        self.moves.push(unit, Move::Hot);
        if proven {
            self.list.put(unit, seen);
        } else {
            self.window.put(unit, seen);
        }
    }

    pub fn remove(&mut self, unit: &Unit) {
        if self.list.pop(unit).is_some() | self.window.pop(unit).is_some() {
            self.moves.push(*unit, Move::Gone);
        }
    }

    /// Takes the coldest unit off the list.
    pub fn victim(&mut self) -> Option<Unit> {
        let (unit, seen) = self.list.pop_lru().or_else(|| self.window.pop_lru())?;
        self.departed.put(&unit, seen.at, self.len());
        self.moves.push(unit, Move::Gone);
        Some(unit)
    }

    /// The victim could not be evicted now (somebody reads it).
    pub fn keep(&mut self, unit: Unit) {
        let seen = Seen {
            at: self.clock,
            referenced: true,
        };
        self.list.put(unit, seen);
        self.moves.push(unit, Move::Hot);
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
