//! Which unit to give up next. Pure: no files, no clock, no locks.

use std::hash::{BuildHasherDefault, Hash, Hasher};

use lru::LruCache;

use super::{ObjectId, Purpose};
use crate::block::ExtentNo;

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
        Self { id, part: u32::try_from(extent.0).unwrap_or(Self::TREE - 1) }
    }

    pub fn object(id: ObjectId) -> Self {
        Self { id, part: Self::OBJECT }
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
        Self { id: ObjectId(id), part: u32::from_le_bytes([bytes[32], bytes[33], bytes[34], bytes[35]]) }
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

type Listed = LruCache<Unit, (), BuildHasherDefault<Spread>>;

pub struct Policy {
    list: Listed,
    clock: u32,
}

impl Policy {
    pub fn new(_capacity: u64) -> Self {
        Self { list: Listed::unbounded_with_hasher(BuildHasherDefault::default()), clock: 1 }
    }

    /// The first block of `unit` arrived.
    pub fn insert(&mut self, unit: Unit, _bytes: u64, _purpose: Purpose) {
        self.list.put(unit, ());
    }

    /// A reader asked for bytes of `unit`, present or not.
    pub fn reference(&mut self, unit: Unit, _bytes: u64) {
        self.clock = self.clock.wrapping_add(1).max(1);
        self.list.promote(&unit);
    }

    /// A unit known from an earlier run: it becomes the coldest. Restore hottest first.
    pub fn restore(&mut self, unit: Unit) {
        if !self.list.contains(&unit) {
            self.list.put(unit, ());
            self.list.demote(&unit);
        }
    }

    pub fn remove(&mut self, unit: &Unit) {
        self.list.pop(unit);
    }

    /// Takes the coldest unit off the list.
    pub fn victim(&mut self) -> Option<Unit> {
        self.list.pop_lru().map(|(unit, ())| unit)
    }

    /// The victim could not be evicted now (somebody reads it).
    pub fn keep(&mut self, unit: Unit) {
        self.list.put(unit, ());
    }

    pub fn contains(&self, unit: &Unit) -> bool {
        self.list.contains(unit)
    }

    /// Advances when a touch of the same unit would be another reference.
    pub fn clock(&self) -> u32 {
        self.clock
    }

    pub fn len(&self) -> usize {
        self.list.len()
    }

    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Hottest first.
    pub fn order(&self) -> impl Iterator<Item = Unit> + '_ {
        self.list.iter().map(|(unit, ())| *unit)
    }
}
