//! The order in which the blocks of a version were first wanted.
//!
//! Owns recording it, its bytes, and their checks. A profile speaks of objects by their number in the tree and
//! of blocks by theirs: no names, no users, no times. Must not know stores, mounts or fetching.
//!
//! ```text
//! "gm-prof" 1 | BLAKE3 of the tree's rows, 32 | units, u32 | their bytes, zstd | BLAKE3 of all before, 32
//! ```
//!
//! A unit is eight neighbouring blocks (1 MiB) of an object, with one bit for each that was wanted. Each is
//! written as the difference of its object and of its number to the unit before (zigzag, LEB128) and a byte of
//! bits. What does not check out is no profile: it is advice, and nobody is worse off without it.

use std::{
    collections::{HashMap, hash_map::Entry},
    ops::Range,
};

use parking_lot::Mutex;

use crate::{
    block::{BLOCK_SIZE, EXTENT_SIZE, blocks_covering},
    digest::Digest,
    tree::ObjectNo,
};

/// The last byte is the version of the format.
const MAGIC: [u8; 8] = *b"gm-prof\x01";
const HEADER: usize = MAGIC.len() + 32 + 4;
const DIGEST: usize = 32;
const UNIT_BLOCKS: u64 = 8;
/// Units that are fetched together: an extent.
const UNITS_TOGETHER: u64 = EXTENT_SIZE / BLOCK_SIZE / UNIT_BLOCKS;
/// So many units come in smaller parts, sooner.
const AT_FIRST: usize = 64;
const UNITS_AT_FIRST: u64 = UNITS_TOGETHER / 2;
/// What is recorded, and believed: a quarter of a tebibyte where everything is read.
const MOST_UNITS: usize = 1 << 18;
/// Two differences of up to ten bytes, and the bits.
const LONGEST_UNIT: usize = 21;
/// Nothing larger is a profile.
pub const MOST_BYTES: u64 = 8 << 20;
/// Even a small tree's profile may have this.
const LEAST_LIMIT: u64 = 4 << 10;
const COMPRESSION_LEVEL: i32 = 9;

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProfileError {
    #[error("it is no profile, or one of another program version")]
    Format,
    #[error("it is damaged")]
    Damaged,
    #[error("it belongs to another tree")]
    OtherTree,
    #[error("it cannot be compressed")]
    Compress(#[source] std::io::Error),
}

/// Some of eight neighbouring blocks of one object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Unit {
    object: ObjectNo,
    number: u64,
    /// The lowest bit is the first block.
    blocks: u8,
}

/// Notes down what is wanted, each block once.
#[derive(Debug, Default)]
pub struct Recorder {
    recording: Mutex<Recording>,
}

#[derive(Debug, Default)]
struct Recording {
    units: Vec<Unit>,
    places: HashMap<(ObjectNo, u64), usize>,
}

impl Recorder {
    /// A reader wants `range` of the object.
    pub fn wanted(&self, object: ObjectNo, range: &Range<u64>) {
        let blocks = blocks_covering(range);
        let mut recording = self.recording.lock();
        let Recording { units, places } = &mut *recording;
        let mut at = blocks.start;
        while at < blocks.end {
            let number = at / UNIT_BLOCKS;
            let end = blocks.end.min((number + 1) * UNIT_BLOCKS);
            let bits = (at..end).fold(0u8, |bits, block| bits | 1 << (block % UNIT_BLOCKS));
            match places.entry((object, number)) {
                Entry::Occupied(place) => units[*place.get()].blocks |= bits,
                Entry::Vacant(place) if units.len() < MOST_UNITS => {
                    place.insert(units.len());
                    units.push(Unit {
                        object,
                        number,
                        blocks: bits,
                    });
                }
                Entry::Vacant(_) => {}
            }
            at = end;
        }
    }

    /// What was recorded so far.
    pub fn profile(&self) -> Profile {
        Profile {
            units: self.recording.lock().units.clone(),
        }
    }
}

/// What is wanted first, and then, and then.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Profile {
    units: Vec<Unit>,
}

impl Profile {
    pub fn is_empty(&self) -> bool {
        self.units.is_empty()
    }

    /// How many blocks it names.
    pub fn blocks(&self) -> u64 {
        self.units
            .iter()
            .map(|unit| u64::from(unit.blocks.count_ones()))
            .sum()
    }

    /// Runs of wanted blocks, as byte ranges of their objects, in order: but what is wanted near to something
    /// comes along with it, wherever it stands itself. A request for each unit would cost a round trip for a
    /// mebibyte; this brings forward what comes later by half an extent at a time, and once a reader has what
    /// to begin with, by a whole one.
    pub fn ranges(&self) -> impl Iterator<Item = (ObjectNo, Range<u64>)> + Send {
        let mut places = HashMap::new();
        // An object, the first unit of some neighbours, and a bit for each of their blocks.
        let mut together: Vec<(ObjectNo, u64, u64)> = Vec::new();
        for (at, unit) in self.units.iter().enumerate() {
            let half = unit.number - unit.number % UNITS_AT_FIRST;
            let whole = unit.number - unit.number % UNITS_TOGETHER;
            let known = [(half, UNITS_AT_FIRST), (whole, UNITS_TOGETHER)]
                .into_iter()
                .find_map(|(first, count)| places.get(&(unit.object, first, count)));
            let place = match known {
                Some(place) => *place,
                None => {
                    let (first, count) = match at < AT_FIRST {
                        true => (half, UNITS_AT_FIRST),
                        false => (whole, UNITS_TOGETHER),
                    };
                    together.push((unit.object, first, 0));
                    places.insert((unit.object, first, count), together.len() - 1);
                    together.len() - 1
                }
            };
            let (_, first, blocks) = &mut together[place];
            *blocks |= u64::from(unit.blocks) << ((unit.number - *first) * UNIT_BLOCKS);
        }
        together.into_iter().flat_map(|(object, first, blocks)| {
            let mut bit = 0;
            std::iter::from_fn(move || {
                bit += (blocks.checked_shr(bit)?).trailing_zeros();
                let run = blocks.checked_shr(bit)?.trailing_ones();
                let start = (first * UNIT_BLOCKS + u64::from(bit)) * BLOCK_SIZE;
                bit += run;
                (run > 0).then(|| (object, start..start + u64::from(run) * BLOCK_SIZE))
            })
        })
    }

    /// Its bytes for the tree of this digest and size. Under a hundredth of the tree (or 4 KiB): what was wanted
    /// last is left out if need be, since it is what a reader is least in a hurry for.
    pub fn encode(&self, tree: &Digest, tree_size: u64) -> Result<Vec<u8>, ProfileError> {
        let limit = usize::try_from((tree_size / 100).clamp(LEAST_LIMIT, MOST_BYTES)).unwrap_or(usize::MAX);
        let mut count = self.units.len();
        loop {
            let bytes = encode(&self.units[..count], tree)?;
            if bytes.len() <= limit || count == 0 {
                return Ok(bytes);
            }
            // Always less than before.
            count = (count as f64 * (limit as f64 / bytes.len() as f64) * 0.98) as usize;
        }
    }

    pub fn decode(bytes: &[u8], tree: &Digest) -> Result<Self, ProfileError> {
        let checked = bytes.split_last_chunk::<DIGEST>().ok_or(ProfileError::Format)?;
        let (content, digest) = checked;
        if !content.starts_with(&MAGIC) || content.len() < HEADER {
            return Err(ProfileError::Format);
        }
        if Digest::of(content).as_bytes() != digest {
            return Err(ProfileError::Damaged);
        }
        let (header, packed) = content.split_at(HEADER);
        if header[MAGIC.len()..].get(..32) != Some(&tree.as_bytes()[..]) {
            return Err(ProfileError::OtherTree);
        }
        let count = header
            .last_chunk::<4>()
            .map_or(usize::MAX, |count| u32::from_le_bytes(*count) as usize);
        if count > MOST_UNITS {
            return Err(ProfileError::Damaged);
        }
        let packed =
            zstd::bulk::decompress(packed, count * LONGEST_UNIT).map_err(|_| ProfileError::Damaged)?;
        unpack(&packed, count).ok_or(ProfileError::Damaged)
    }
}

fn encode(units: &[Unit], tree: &Digest) -> Result<Vec<u8>, ProfileError> {
    let mut packed = Vec::new();
    let (mut object, mut number) = (0, 0);
    for unit in units {
        let (this, place) = (i64::from(unit.object.0), unit.number as i64);
        put(&mut packed, this.wrapping_sub(object));
        put(&mut packed, place.wrapping_sub(number));
        packed.push(unit.blocks);
        (object, number) = (this, place);
    }
    let mut bytes = MAGIC.to_vec();
    bytes.extend_from_slice(tree.as_bytes());
    bytes.extend_from_slice(&u32::try_from(units.len()).unwrap_or(u32::MAX).to_le_bytes());
    bytes.extend(zstd::bulk::compress(&packed, COMPRESSION_LEVEL).map_err(ProfileError::Compress)?);
    let digest = Digest::of(&bytes);
    bytes.extend_from_slice(digest.as_bytes());
    Ok(bytes)
}

/// `None` unless these are the bytes of exactly `count` units.
fn unpack(mut packed: &[u8], count: usize) -> Option<Profile> {
    let mut units = Vec::with_capacity(count);
    let (mut object, mut number) = (0i64, 0i64);
    for _ in 0..count {
        object = object.wrapping_add(take(&mut packed)?);
        number = number.wrapping_add(take(&mut packed)?);
        let (&blocks, rest) = packed.split_first()?;
        packed = rest;
        units.push(Unit {
            object: ObjectNo(u32::try_from(object).ok()?),
            // Far below where byte offsets would overflow.
            number: u64::try_from(number).ok().filter(|number| *number < 1 << 40)?,
            blocks,
        });
    }
    packed.is_empty().then_some(Profile { units })
}

fn put(bytes: &mut Vec<u8>, number: i64) {
    let mut left = (number << 1 ^ number >> 63) as u64;
    while left >= 0x80 {
        bytes.push(left as u8 | 0x80);
        left >>= 7;
    }
    bytes.push(left as u8);
}

fn take(bytes: &mut &[u8]) -> Option<i64> {
    let mut number = 0u64;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        number |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some((number >> 1) as i64 ^ -((number & 1) as i64));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TREE: Digest = Digest::from_bytes([7; 32]);

    fn recorded(reads: &[(u32, u64, u64)]) -> Profile {
        let recorder = Recorder::default();
        for (object, start, length) in reads {
            recorder.wanted(ObjectNo(*object), &(*start..start + length));
        }
        recorder.profile()
    }

    #[test]
    fn the_order_is_that_of_the_first_wish() {
        let far = 900 * UNIT_BLOCKS * BLOCK_SIZE;
        let profile = recorded(&[(3, far, 1), (0, 0, 1), (3, far, 5), (3, far + 2 * BLOCK_SIZE, 1)]);
        let ranges: Vec<_> = profile.ranges().collect();
        assert_eq!(
            ranges,
            [
                (ObjectNo(3), far..far + BLOCK_SIZE),
                (ObjectNo(3), far + 2 * BLOCK_SIZE..far + 3 * BLOCK_SIZE),
                (ObjectNo(0), 0..BLOCK_SIZE)
            ]
        );
        assert_eq!(profile.blocks(), 3);
    }

    #[test]
    fn what_is_wanted_later_comes_in_larger_parts() {
        let extents = 2 * AT_FIRST as u64;
        // One unit of each extent, and then all others.
        let mut reads: Vec<_> = (0..extents)
            .map(|n| (1, n * EXTENT_SIZE, EXTENT_SIZE / 8))
            .collect();
        reads.extend((0..extents).map(|n| (1, n * EXTENT_SIZE, EXTENT_SIZE)));
        let lengths: Vec<u64> = recorded(&reads)
            .ranges()
            .map(|(_, range)| range.end - range.start)
            .collect();
        let (first, rest) = lengths.split_at(AT_FIRST);
        assert!(first.iter().all(|length| *length == EXTENT_SIZE / 2));
        let (whole, halves) = rest.split_at(AT_FIRST);
        assert!(whole.iter().all(|length| *length == EXTENT_SIZE));
        assert!(halves.len() == AT_FIRST && halves.iter().all(|length| *length == EXTENT_SIZE / 2));
    }

    #[test]
    fn it_stays_below_its_share_of_the_tree_and_keeps_the_beginning() {
        let reads: Vec<_> = (0..50_000u64)
            .map(|n| ((n * 7919 % 50_000) as u32, n * n % 977 * (1 << 20), 1))
            .collect();
        let profile = recorded(&reads);
        let tree_size = 5 << 20;
        let bytes = profile.encode(&TREE, tree_size).unwrap();
        assert!(bytes.len() as u64 <= tree_size / 100, "{} bytes", bytes.len());
        let kept = Profile::decode(&bytes, &TREE).unwrap();
        assert!(kept.units.len() > 5_000, "{} units", kept.units.len());
        assert_eq!(kept.units, profile.units[..kept.units.len()]);
    }

    #[test]
    fn another_trees_profile_is_refused() {
        let bytes = recorded(&[(1, 2, 3)]).encode(&TREE, 0).unwrap();
        let other = Digest::from_bytes([8; 32]);
        assert!(matches!(
            Profile::decode(&bytes, &other),
            Err(ProfileError::OtherTree)
        ));
    }

    #[test]
    fn a_bomb_does_not_go_off() {
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(TREE.as_bytes());
        bytes.extend_from_slice(&3u32.to_le_bytes());
        bytes.extend(zstd::bulk::compress(&vec![0; 64 << 20], 1).unwrap());
        let digest = Digest::of(&bytes);
        bytes.extend_from_slice(digest.as_bytes());
        assert!(matches!(
            Profile::decode(&bytes, &TREE),
            Err(ProfileError::Damaged)
        ));
    }

    proptest! {
        #[test]
        fn what_was_recorded_comes_back(reads in prop::collection::vec((any::<u32>(), 0u64..1 << 50, 1u64..4 << 20), 0..200)) {
            let profile = recorded(&reads);
            let bytes = encode(&profile.units, &TREE).unwrap();
            prop_assert_eq!(Profile::decode(&bytes, &TREE).unwrap(), profile.clone());
            // Every read block is named, once, and nothing else.
            let mut named: Vec<_> = profile.ranges().flat_map(|(o, r)| blocks_covering(&r).map(move |b| (o.0, b))).collect();
            let mut wanted: Vec<_> = reads.iter().flat_map(|(o, s, l)| blocks_covering(&(*s..s + l)).map(move |b| (*o, b))).collect();
            named.sort_unstable();
            wanted.sort_unstable();
            wanted.dedup();
            prop_assert_eq!(named, wanted);
        }

        #[test]
        fn no_flipped_bit_goes_unnoticed(at in any::<prop::sample::Index>(), bit in 0u32..8) {
            let mut bytes = recorded(&[(1, 2, 3), (9, 1 << 40, 1 << 22)]).encode(&TREE, 0).unwrap();
            let at = at.index(bytes.len());
            bytes[at] ^= 1u8 << bit;
            prop_assert!(Profile::decode(&bytes, &TREE).is_err());
        }

        #[test]
        fn no_bytes_break_it(bytes in prop::collection::vec(any::<u8>(), 0..300), count in 0usize..50) {
            let _ = Profile::decode(&bytes, &TREE);
            let _ = unpack(&bytes, count);
        }
    }
}
