//! The bytes of a sidecar: a small checked header, then one 8-byte slot per block.
//!
//! Owns the encoding. Knows nothing of files. Damage to any one byte here is always noticed: the
//! header carries a CRC32C, every slot a CRC-16 (which finds every burst of up to 16 bits) seeded
//! with the object and the block, so that a slot cannot be believed at another position.

use super::checksum;
use crate::{block::BlockNo, cache::ObjectId};

/// Bytes of the header at the start of a sidecar.
pub const HEADER_LEN: usize = 32;
pub const SLOT_LEN: usize = 8;
const MAGIC: u32 = u32::from_le_bytes(*b"GMc1");
const SEALED: u32 = 1;

/// What a sidecar says of the whole object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub size: u64,
    /// The inode of the data file this sidecar describes: a sidecar that outlived its data file (a
    /// power cut between two unlinks) must not vouch for a new, empty one.
    pub inode: u64,
    pub sealed: bool,
}

impl Header {
    pub fn encode(&self, id: &ObjectId) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[4..8].copy_from_slice(&u32::from(self.sealed).to_le_bytes());
        bytes[8..16].copy_from_slice(&self.size.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.inode.to_le_bytes());
        let sum = Self::sum(id, &bytes);
        bytes[24..28].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    /// `None` for anything but a sound header of this very object.
    pub fn decode(id: &ObjectId, bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; HEADER_LEN] = bytes.get(..HEADER_LEN)?.try_into().ok()?;
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        let sound =
            word(0) == MAGIC && word(4) <= SEALED && word(28) == 0 && word(24) == Self::sum(id, bytes);
        sound.then(|| Self {
            size: long(8),
            inode: long(16),
            sealed: word(4) == SEALED,
        })
    }

    fn sum(id: &ObjectId, bytes: &[u8; HEADER_LEN]) -> u32 {
        checksum::seeded(&id.0, &bytes[..24])
    }
}

/// The number of a span of time in which blocks were written; see [`super::epochs`]. Never 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch(pub u16);

/// One block's presence: 0 in a sidecar says absent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// CRC32C of the block's bytes.
    pub sum: u32,
    pub epoch: Epoch,
}

pub const ABSENT: u64 = 0;

impl Slot {
    pub fn encode(self, id: &ObjectId, block: BlockNo) -> u64 {
        let body = u64::from(self.sum) | u64::from(self.epoch.0) << 32;
        body | u64::from(check(id, block, body)) << 48
    }

    pub fn decode(id: &ObjectId, block: BlockNo, word: u64) -> Option<Self> {
        let body = word & 0xffff_ffff_ffff;
        let epoch = (word >> 32) as u16;
        // An epoch of 0 and a check of 0 are never written, so no single damaged byte of an absent
        // slot makes it present.
        let sound = epoch != 0 && (word >> 48) as u16 == check(id, block, body);
        sound.then_some(Self {
            sum: word as u32,
            epoch: Epoch(epoch),
        })
    }
}

/// CRC-16/CCITT of the six body bytes, seeded with where they belong; never 0.
fn check(id: &ObjectId, block: BlockNo, body: u64) -> u16 {
    let seed = u64::from_le_bytes([
        id.0[8], id.0[9], id.0[10], id.0[11], id.0[12], id.0[13], id.0[14], id.0[15],
    ]);
    let seed = (seed ^ block.0).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut crc = (seed >> 48) as u16;
    for shift in (0..6).map(|byte| byte * 8) {
        let index = (crc >> 8) as u8 ^ (body >> shift) as u8;
        crc = (crc << 8) ^ TABLE[usize::from(index)];
    }
    if crc == 0 { 0xffff } else { crc }
}

const TABLE: [u16; 256] = {
    let mut table = [0; 256];
    let mut index = 0;
    while index < 256 {
        let mut crc = (index as u16) << 8;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 0x8000 != 0 {
                crc << 1 ^ 0x1021
            } else {
                crc << 1
            };
            bit += 1;
        }
        table[index] = crc;
        index += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn crc16_is_the_published_one() {
        let crc = b"123456789".iter().fold(0u16, |crc, byte| {
            (crc << 8) ^ TABLE[usize::from((crc >> 8) as u8 ^ byte)]
        });
        assert_eq!(crc, 0x31c3, "CRC-16/XMODEM check value");
    }

    proptest! {
        #[test]
        fn slots_round_trip_and_any_damaged_byte_is_seen(
            id: [u8; 32], block in 0u64..1 << 40, sum: u32, epoch in 1u16.., at in 0u32..8, flip in 1u8..
        ) {
            let (id, block) = (ObjectId(id), BlockNo(block));
            let slot = Slot { sum, epoch: Epoch(epoch) };
            let word = slot.encode(&id, block);
            prop_assert_eq!(Slot::decode(&id, block, word), Some(slot));
            let damage = u64::from(flip) << (8 * at);
            prop_assert_eq!(Slot::decode(&id, block, word ^ damage), None);
            prop_assert_eq!(Slot::decode(&id, block, damage), None);
        }

        #[test]
        fn headers_round_trip_and_any_damaged_byte_is_seen(
            id: [u8; 32], size: u64, inode: u64, sealed: bool, at in 0usize..HEADER_LEN, flip in 1u8..
        ) {
            let id = ObjectId(id);
            let header = Header { size, inode, sealed };
            let mut bytes = header.encode(&id);
            prop_assert_eq!(Header::decode(&id, &bytes), Some(header));
            bytes[at] ^= flip;
            prop_assert_eq!(Header::decode(&id, &bytes), None);
        }
    }
}
