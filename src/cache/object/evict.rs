//! Giving an object's extents, or all of it, back to the file system.

use std::{
    io,
    sync::{Arc, atomic::Ordering},
};

use super::{CachedObject, State};
use crate::{
    block::{BLOCKS_PER_EXTENT, BlockNo, EXTENT_SIZE, ExtentNo},
    cache::{disk, slot::Slot},
};

/// The outcome of an attempt to evict.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::cache) enum Evicted {
    Gone,
    /// Somebody reads or fills it.
    Busy,
}

impl CachedObject {
    /// Gives one extent back to the file system.
    pub(in crate::cache) fn evict_extent(&self, number: ExtentNo) -> io::Result<Evicted> {
        let Some(files) = self.files() else {
            return Ok(Evicted::Gone);
        };
        if self.size <= EXTENT_SIZE || files.sealed.is_set() || !self.shared.abilities.punch {
            drop(files);
            return self.evict_whole();
        }
        if number.0 >= self.size.div_ceil(EXTENT_SIZE) {
            return Ok(Evicted::Gone);
        }
        let extent = files.extent(number);
        if !extent.pin().is_some_and(|_pin| self.load(&files, extent, number)) {
            return Ok(Evicted::Busy);
        }
        let Some(taken) = extent.take(&files.sealed) else {
            return Ok(Evicted::Busy);
        };
        let outcome = (|| {
            let words = files.sidecar.slots(number, self.size)?;
            taken.clear();
            files.sidecar.clear(&files.data, number, self.size)?;
            // A power cut must not keep the hole and lose the cleared slots, or zeros would pass for
            // data. Blocks that would be checked after a power cut anyway need no sync.
            let durable = words.iter().enumerate().any(|(index, word)| {
                let block = BlockNo(number.0 * BLOCKS_PER_EXTENT + index as u64);
                Slot::decode(&self.id, block, *word)
                    .is_some_and(|slot| !self.shared.epochs.unsettled(slot.epoch))
            });
            if durable {
                files.sidecar.sync(&files.data)?;
            }
            disk::punch(&files.data, number.byte_range(self.size))?;
            Ok(Evicted::Gone)
        })();
        drop(taken);
        files.count();
        let empty = disk::allocated(&files.data).is_ok_and(|bytes| bytes == 0);
        drop(files);
        if empty {
            self.evict_whole()?;
        }
        outcome
    }

    /// Unlinks the object, unless somebody is reading it or the kernel holds it.
    pub(in crate::cache) fn evict_whole(&self) -> io::Result<Evicted> {
        let _turn = self.lifecycle.lock();
        {
            let mut state = self.state.write();
            match &*state {
                State::Unknown => {}
                State::Absent => return Ok(Evicted::Gone),
                // Users clone under the read lock: one means nobody has it.
                State::Open(files)
                    if Arc::strong_count(files) > 1 || self.shared.handed.contains(&self.id, files.inode) =>
                {
                    return Ok(Evicted::Busy);
                }
                State::Open(_) => {}
            }
            if matches!(*state, State::Open(_)) {
                let open = std::mem::replace(&mut *state, State::Absent);
                drop(state);
                return self.unlink(open);
            }
        }
        let open = match self.open_existing()? {
            Some(files) if self.shared.handed.contains(&self.id, files.inode) => {
                return Ok(Evicted::Busy);
            }
            Some(files) => State::Open(files),
            None => State::Absent,
        };
        *self.state.write() = State::Absent;
        self.unlink(open)
    }

    /// Unlinks the object at once; who still reads it reads on.
    pub(in crate::cache) fn discard(&self) {
        let _turn = self.lifecycle.lock();
        let mut open = std::mem::replace(&mut *self.state.write(), State::Absent);
        if matches!(open, State::Unknown) {
            // Opened to be counted out of the total; what cannot be opened is removed all the same.
            match self.open_existing() {
                Ok(Some(files)) => open = State::Open(files),
                Ok(None) => return,
                Err(error) => self.shared.trouble("opening a cached object", &error),
            }
        }
        if let Err(error) = self.unlink(open) {
            self.shared.trouble("removing a cached object", &error);
        }
    }

    /// The caller has the lifecycle lock and has made the state `Absent`.
    fn unlink(&self, open: State) -> io::Result<Evicted> {
        let (data_path, sidecar_path) = self.shared.paths(&self.id);
        // The sidecar goes first: alone it could vouch for a file made later.
        let outcome = disk::unlink(&sidecar_path).and_then(|()| disk::unlink(&data_path));
        match outcome {
            Ok(()) => {
                if let State::Open(files) = open {
                    files.unlinked.store(true, Ordering::Release);
                    self.shared.unlinked(&self.id);
                }
                Ok(Evicted::Gone)
            }
            Err(error) => {
                // Ask the disk again next time.
                *self.state.write() = State::Unknown;
                Err(error)
            }
        }
    }
}
