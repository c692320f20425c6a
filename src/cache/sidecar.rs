//! Where the slots of one object lie: in a file beside its data, or, for objects of one extent, in
//! an extended attribute of the data file itself (no second inode).
//!
//! Owns the placement. The encoding is [`super::slot`]'s.

use std::{fs::File, io, os::unix::fs::FileExt};

use parking_lot::Mutex;

use super::{
    ObjectId, disk,
    slot::{ABSENT, HEADER_LEN, Header, SLOT_LEN},
};
use crate::block::{BLOCKS_PER_EXTENT, BlockNo, ExtentNo, block_count};

/// The largest attribute: the header and one extent of slots.
pub const ATTRIBUTE_MOST: usize = HEADER_LEN + SLOT_LEN * BLOCKS_PER_EXTENT as usize;

pub enum Sidecar {
    File(File),
    /// The whole value, rewritten with every change. The lock is held across the system call so
    /// that an older value cannot overwrite a newer one; only fillers of this one object wait.
    Attribute(Mutex<Vec<u8>>),
}

/// The length of the sidecar file of an object of `size` bytes.
pub fn file_len(size: u64) -> u64 {
    HEADER_LEN as u64 + SLOT_LEN as u64 * block_count(size)
}

fn slot_at(block: u64) -> u64 {
    HEADER_LEN as u64 + SLOT_LEN as u64 * block
}

impl Sidecar {
    /// The raw slots of one extent, absent ones (also past the end of the object) as zero.
    pub fn slots(&self, extent: ExtentNo, size: u64) -> io::Result<[u64; BLOCKS_PER_EXTENT as usize]> {
        let mut words = [ABSENT; BLOCKS_PER_EXTENT as usize];
        let first = extent.0 * BLOCKS_PER_EXTENT;
        let count = block_count(size).saturating_sub(first).min(BLOCKS_PER_EXTENT) as usize;
        let mut bytes = [0; SLOT_LEN * BLOCKS_PER_EXTENT as usize];
        let bytes = &mut bytes[..SLOT_LEN * count];
        match self {
            Self::File(file) => file.read_exact_at(bytes, slot_at(first))?,
            Self::Attribute(value) => match value.lock().get(HEADER_LEN..HEADER_LEN + bytes.len()) {
                Some(have) => bytes.copy_from_slice(have),
                None => return Err(io::ErrorKind::UnexpectedEof.into()),
            },
        }
        for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(SLOT_LEN)) {
            *word = bytes.try_into().map_or(ABSENT, u64::from_le_bytes);
        }
        Ok(words)
    }

    pub fn set_slot(&self, data: &File, block: BlockNo, word: u64) -> io::Result<()> {
        self.set_slots(data, block, &[word])
    }

    /// Of neighbouring blocks of one extent, in one write.
    pub fn set_slots(&self, data: &File, first: BlockNo, words: &[u64]) -> io::Result<()> {
        let mut bytes = [0; SLOT_LEN * BLOCKS_PER_EXTENT as usize];
        let Some(bytes) = bytes.get_mut(..SLOT_LEN * words.len()) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        for (place, word) in bytes.chunks_exact_mut(SLOT_LEN).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        self.write(data, slot_at(first.0), bytes)
    }

    pub fn clear(&self, data: &File, extent: ExtentNo, size: u64) -> io::Result<()> {
        let first = extent.0 * BLOCKS_PER_EXTENT;
        let count = block_count(size).saturating_sub(first).min(BLOCKS_PER_EXTENT) as usize;
        self.write(
            data,
            slot_at(first),
            &[0; SLOT_LEN * BLOCKS_PER_EXTENT as usize][..SLOT_LEN * count],
        )
    }

    pub fn set_header(&self, data: &File, id: &ObjectId, header: Header) -> io::Result<()> {
        self.write(data, 0, &header.encode(id))
    }

    pub fn sync(&self, data: &File) -> io::Result<()> {
        match self {
            Self::File(file) => disk::sync_data(file),
            // An attribute is the inode's: fdatasync need not write it.
            Self::Attribute(_) => disk::sync_all(data),
        }
    }

    fn write(&self, data: &File, offset: u64, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::File(file) => disk::write_at(file, bytes, offset),
            Self::Attribute(value) => {
                let mut value = value.lock();
                let at = offset as usize;
                let Some(place) = value.get_mut(at..at + bytes.len()) else {
                    return Err(io::ErrorKind::InvalidInput.into());
                };
                place.copy_from_slice(bytes);
                disk::set_attribute(data, &value)
            }
        }
    }
}
