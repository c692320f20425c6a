//! Which inodes are open, and how, where the next agent finds it.
//!
//! Backing files belong to the connection, not to the process: an inode that was open in passthrough
//! when its agent died must be opened with the same number by the next one. So the first open of an
//! inode is written down before it is answered, and crossed out after the last release. Only the death
//! of the process has to be survived (a mount does not survive the machine), so a write that the kernel
//! took is enough, and the file belongs on a memory file system (`/run`).

use std::{
    collections::HashMap,
    fs::File,
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
};

use super::open_inodes::{BackingNo, Way};
use crate::tree::Ino;

/// Inode, 8 bytes; backing number, 4; how, 4. Little-endian. All zero: free. 16 bytes at a multiple of
/// 16 lie in one page, so a write of them is taken whole or not at all.
const SLOT: usize = 16;
const CACHED: u32 = 1;
const PASSTHROUGH: u32 = 2;

#[derive(Debug)]
pub(super) struct OpenTable {
    file: File,
    slots: HashMap<Ino, u64>,
    free: Vec<u64>,
    end: u64,
}

impl OpenTable {
    /// Opens or creates the table; what is in it is open in the kernel.
    pub(super) fn open(path: &Path) -> io::Result<(Self, Vec<(Ino, Way)>)> {
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)?;
        let mut bytes = vec![0; usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?];
        file.read_exact_at(&mut bytes, 0)?;
        let mut table = Self {
            file,
            slots: HashMap::new(),
            free: Vec::new(),
            end: 0,
        };
        let mut open = Vec::new();
        for slot in bytes.as_chunks::<SLOT>().0 {
            match decode(slot) {
                Some((ino, way)) => {
                    table.slots.insert(ino, table.end);
                    open.push((ino, way));
                }
                None => table.free.push(table.end),
            }
            table.end += 1;
        }
        Ok((table, open))
    }

    pub(super) fn insert(&mut self, ino: Ino, way: Way) -> io::Result<()> {
        // Its own, if it could not be crossed out before.
        let slot = self
            .slots
            .get(&ino)
            .copied()
            .or_else(|| self.free.pop())
            .unwrap_or(self.end);
        if let Err(error) = self.file.write_all_at(&encode(ino, way), slot * SLOT as u64) {
            if slot < self.end && self.slots.get(&ino) != Some(&slot) {
                self.free.push(slot);
            }
            return Err(error);
        }
        self.end = self.end.max(slot + 1);
        self.slots.insert(ino, slot);
        Ok(())
    }

    /// What cannot be crossed out stays: the next agent then only keeps a way longer than needed.
    pub(super) fn remove(&mut self, ino: Ino) -> io::Result<()> {
        let Some(slot) = self.slots.get(&ino).copied() else {
            return Ok(());
        };
        self.file.write_all_at(&[0; SLOT], slot * SLOT as u64)?;
        self.slots.remove(&ino);
        self.free.push(slot);
        Ok(())
    }
}

fn encode(ino: Ino, way: Way) -> [u8; SLOT] {
    let (number, how) = match way {
        Way::Cached => (0, CACHED),
        Way::Passthrough(BackingNo(number)) => (number, PASSTHROUGH),
    };
    let mut slot = [0; SLOT];
    slot[..8].copy_from_slice(&ino.0.to_le_bytes());
    slot[8..12].copy_from_slice(&number.to_le_bytes());
    slot[12..].copy_from_slice(&how.to_le_bytes());
    slot
}

fn decode(slot: &[u8; SLOT]) -> Option<(Ino, Way)> {
    let value = u128::from_le_bytes(*slot);
    let (ino, number, how) = (value as u64, (value >> 64) as u32, (value >> 96) as u32);
    match how {
        CACHED => Some((Ino(ino), Way::Cached)),
        PASSTHROUGH => Some((Ino(ino), Way::Passthrough(BackingNo(number)))),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_next_agent_reads_what_is_open(steps in prop::collection::vec((1..9u64, any::<Option<u32>>(), 0..8u8), 0..100)) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("open");
            let (mut table, before) = OpenTable::open(&path).unwrap();
            prop_assert!(before.is_empty());
            let mut model: HashMap<Ino, Way> = HashMap::new();
            for (ino, number, what) in steps {
                let ino = Ino(ino);
                if what == 0 {
                    let (again, open) = OpenTable::open(&path).unwrap();
                    prop_assert_eq!(&open.into_iter().collect::<HashMap<_, _>>(), &model);
                    table = again;
                } else if model.remove(&ino).is_some() {
                    table.remove(ino).unwrap();
                } else {
                    let way = number.map_or(Way::Cached, |number| Way::Passthrough(BackingNo(number)));
                    table.insert(ino, way).unwrap();
                    model.insert(ino, way);
                }
            }
            let (_, open) = OpenTable::open(&path).unwrap();
            prop_assert_eq!(open.into_iter().collect::<HashMap<_, _>>(), model);
            // Slots are used again: never more of them than inodes.
            prop_assert!(std::fs::metadata(&path).unwrap().len() <= 8 * SLOT as u64);
        }
    }
}
