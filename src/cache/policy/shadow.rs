//! Caches of names only, each of which always does the same with what arrives: how the policy learns which
//! way serves the present readers best.

use super::{Listed, Unit, listed};

/// Where what arrives is put.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Insertion {
    /// At the hot end: LRU.
    Hot,
    /// At the cold end, but for one in [`SELDOM`]: of data read over and over, what fits stays.
    Cold,
    /// At the cold end what is known to come back late, at the hot end everything else: of two jobs, one
    /// that comes back soon and one that does not, each gets what is good for it.
    Remembering,
}

pub const INSERTIONS: [Insertion; 3] = [Insertion::Hot, Insertion::Cold, Insertion::Remembering];

/// One arrival in so many goes to the hot end even when the others go to the cold end.
const SELDOM: u32 = 32;

impl Insertion {
    /// `clock` counts references; `len` units are in the cache; `departed`: when the unit was last
    /// referenced before it went.
    pub fn is_hot(self, arrivals: u32, clock: u32, len: usize, departed: Option<u32>) -> bool {
        // Half the cache's length: of shuffled epochs over twice as much, 3 % come back as soon.
        let soon = |at: u32| (clock.wrapping_sub(at) as usize) < len / 2;
        match self {
            Self::Hot => true,
            Self::Cold => arrivals.is_multiple_of(SELDOM),
            Self::Remembering => arrivals.is_multiple_of(SELDOM) || departed.is_none_or(soon),
        }
    }
}

/// When units that went were last referenced. Eight bytes each, placed by the hash of their names: a
/// collision forgets or misplaces a unit, which costs a little order.
#[derive(Default)]
pub struct Departed {
    slots: Vec<(u32, u32)>,
}

/// So many units are remembered for each that is in the cache, and so many in all at most: data several
/// times the size of the cache is what coming back late is about.
const REMEMBERED: usize = 4;
const REMEMBERED_MOST: usize = 1 << 21;

impl Departed {
    fn place(&self, unit: &Unit) -> (usize, u32) {
        let spread = unit.spread();
        let spread = spread ^ spread >> 32;
        let name = (spread >> 32) as u32 | 1;
        (spread as usize & (self.slots.len() - 1), name)
    }

    /// `len`: units in the cache.
    pub fn put(&mut self, unit: &Unit, at: u32, len: usize) {
        let wanted = (REMEMBERED * len).next_power_of_two().clamp(64, REMEMBERED_MOST);
        if self.slots.len() < wanted {
            // What was there is forgotten: this happens while a cache grows, when little has gone.
            self.slots = vec![(0, 0); wanted];
        }
        let (place, name) = self.place(unit);
        self.slots[place] = (name, at);
    }

    pub fn get(&self, unit: &Unit) -> Option<u32> {
        if self.slots.is_empty() {
            return None;
        }
        let (place, name) = self.place(unit);
        let (found, at) = self.slots[place];
        (found == name).then_some(at)
    }
}

/// Units in a shadow, at most.
const MOST: usize = 1 << 14;
/// The score forgets at this rate, in sampled references.
pub const MEMORY: i64 = 512;
/// What one hit scores.
pub const HIT: i64 = 1024;

/// A cache of names only, over a sample of the units.
pub struct Shadow {
    pub insertion: Insertion,
    /// Hits, forgetting.
    pub score: i64,
    /// With each unit its bytes and the clock at its last reference.
    list: Listed<(u64, u32)>,
    used: u64,
    capacity: u64,
    arrivals: u32,
    clock: u32,
    departed: Departed,
}

impl Shadow {
    pub fn new(capacity: u64, insertion: Insertion) -> Self {
        Self {
            insertion,
            score: 0,
            list: listed(),
            used: 0,
            capacity,
            arrivals: 0,
            clock: 1,
            departed: Departed::default(),
        }
    }

    pub fn reference(&mut self, unit: Unit, bytes: u64) {
        let hit = self.touch(unit, bytes);
        self.score += HIT * i64::from(hit) - self.score / MEMORY;
    }

    fn touch(&mut self, unit: Unit, bytes: u64) -> bool {
        self.clock = self.clock.wrapping_add(1);
        if let Some((_, at)) = self.list.get_mut(&unit) {
            *at = self.clock;
            return true;
        }
        if bytes > self.capacity {
            return false;
        }
        while self.used + bytes > self.capacity || self.list.len() >= MOST {
            let Some((gone, (bytes, at))) = self.list.pop_lru() else {
                break;
            };
            self.used -= bytes;
            self.departed.put(&gone, at, self.list.len());
        }
        self.used += bytes;
        self.arrivals = self.arrivals.wrapping_add(1);
        let departed = self.departed.get(&unit);
        let hot = self
            .insertion
            .is_hot(self.arrivals, self.clock, self.list.len(), departed);
        self.list.put(unit, (bytes, self.clock));
        if !hot {
            self.list.demote(&unit);
        }
        false
    }
}
