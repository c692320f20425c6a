//! The LRU order on the disk, so that a restart knows what is cold.
//!
//! Owns `order`, a snapshot replaced as a whole, and `order.log`, the moves since. Neither is synced with
//! what it speaks of, and neither needs to be: a unit that is not there is evicted in no time, and one
//! that is missing is found by the scan.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    path::Path,
};

use super::{
    Shared,
    checksum::{self, crc32c},
    disk,
    policy::{Learned, Move, Unit, moved},
};

const MAGIC: &[u8; 8] = b"GMorder2";
const UNIT_LEN: usize = 36;
/// Unit, move, CRC32C.
const RECORD_LEN: usize = UNIT_LEN + 5;
/// Magic, allocated total, count of units, seed of the journal's checksums, what was learned, CRC32C.
const HEADER_LEN: usize = 32 + Learned::LEN + 4;
/// Then the snapshot is taken anew: 100,000 moves.
const JOURNAL_MOST: u64 = 4 << 20;

struct Header {
    total: u64,
    count: usize,
    /// A journal belongs to the snapshot whose seed its checksums begin with, and to no other.
    seed: u64,
    learned: Learned,
}

impl Header {
    fn encode(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(self.total.to_le_bytes());
        bytes.extend((self.count as u64).to_le_bytes());
        bytes.extend(self.seed.to_le_bytes());
        bytes.extend(self.learned.encode());
        let sum = crc32c(&bytes);
        bytes.extend(sum.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let (body, sum) = bytes.get(..HEADER_LEN)?.split_last_chunk::<4>()?;
        let rest = body.strip_prefix(MAGIC)?;
        if crc32c(body) != u32::from_le_bytes(*sum) {
            return None;
        }
        let (total, rest) = rest.split_first_chunk::<8>()?;
        let (count, rest) = rest.split_first_chunk::<8>()?;
        let (seed, learned) = rest.split_first_chunk::<8>()?;
        Some(Self {
            total: u64::from_le_bytes(*total),
            count: usize::try_from(u64::from_le_bytes(*count)).ok()?,
            seed: u64::from_le_bytes(*seed),
            learned: Learned::decode(learned.try_into().ok()?),
        })
    }
}

/// The allocated bytes at the last save; 0 when unknown.
pub fn last_total(dir: &Path) -> u64 {
    let mut header = [0; HEADER_LEN];
    match File::open(dir.join("order")).and_then(|mut file| file.read_exact(&mut header)) {
        Ok(()) => Header::decode(&header).map_or(0, |header| header.total),
        Err(_) => 0,
    }
}

/// The moves since a snapshot, appended without a sync.
pub struct Journal {
    file: File,
    seed: u64,
    len: u64,
}

fn record_sum(seed: u64, body: &[u8]) -> u32 {
    checksum::seeded(&seed.to_le_bytes(), body)
}

impl Journal {
    /// Writes what moved meanwhile. False when it is time for a new snapshot.
    pub fn append(&mut self, shared: &Shared) -> io::Result<bool> {
        shared.hear();
        let Some(moves) = shared.policy.lock().take_moves() else {
            return Ok(false);
        };
        let mut bytes = Vec::with_capacity(moves.len() * RECORD_LEN);
        for (unit, to) in moves {
            let start = bytes.len();
            bytes.extend(unit.encode());
            bytes.push(to.encode());
            let sum = record_sum(self.seed, &bytes[start..]);
            bytes.extend(sum.to_le_bytes());
        }
        self.file.write_all(&bytes)?;
        self.len += bytes.len() as u64;
        Ok(self.len < JOURNAL_MOST)
    }
}

/// Takes a snapshot, and begins its journal.
pub fn save(shared: &Shared) -> io::Result<Journal> {
    shared.hear();
    let (units, learned) = {
        let mut policy = shared.policy.lock();
        policy.forget_moves();
        (policy.order().collect::<Vec<Unit>>(), policy.learned())
    };
    let header = Header {
        total: shared.space.used(),
        count: units.len(),
        seed: rand::random(),
        learned,
    };
    let mut bytes = header.encode();
    bytes.reserve(units.len() * UNIT_LEN + 4);
    units.iter().for_each(|unit| bytes.extend(unit.encode()));
    let sum = crc32c(&bytes[HEADER_LEN..]);
    bytes.extend(sum.to_le_bytes());
    disk::replace(&shared.config.dir.join("order"), &bytes)?;
    // The old one speaks of the snapshot before: should we die here, it is not believed.
    Ok(Journal {
        file: disk::create(&shared.config.dir.join("order.log"), 0)?,
        seed: header.seed,
        len: 0,
    })
}

/// The order as it was last known, hottest first, and what was learned; `None` when the snapshot is absent
/// or damaged.
pub fn saved(dir: &Path) -> Option<(Vec<Unit>, Learned)> {
    let bytes = fs::read(dir.join("order")).ok()?;
    let read = (|| {
        let header = Header::decode(&bytes)?;
        let (units, sum) = bytes.get(HEADER_LEN..)?.split_last_chunk::<4>()?;
        if Some(units.len()) != header.count.checked_mul(UNIT_LEN)
            || crc32c(units) != u32::from_le_bytes(*sum)
        {
            return None;
        }
        let units: Option<Vec<Unit>> = units.chunks_exact(UNIT_LEN).map(unit).collect();
        Some((units?, header))
    })();
    let Some((units, header)) = read else {
        tracing::warn!("the saved order of the cache is damaged: eviction starts without it");
        return None;
    };
    // Without the journal the order is a little older.
    let journal = fs::read(dir.join("order.log")).unwrap_or_default();
    // What was being written when the agent died ends it.
    let moves = journal.chunks_exact(RECORD_LEN).map_while(|record| {
        let (body, sum) = record.split_last_chunk::<4>()?;
        let sound = record_sum(header.seed, body) == u32::from_le_bytes(*sum);
        let (to, name) = body.split_last()?;
        Some((unit(name)?, Move::decode(*to)?)).filter(|_| sound)
    });
    Some((moved(units, moves), header.learned))
}

fn unit(bytes: &[u8]) -> Option<Unit> {
    Some(Unit::decode(bytes.try_into().ok()?))
}
