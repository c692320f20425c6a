//! The open files of one object, and what they take of the disk.

use std::{
    fs::File,
    sync::{Arc, OnceLock, atomic::AtomicBool},
};

use parking_lot::Mutex;

use crate::{
    block::{BLOCK_SIZE, EXTENT_SIZE, ExtentNo},
    cache::{
        ObjectId, Shared,
        disk::{self, DirectFile},
        extent::{Extent, Seal},
        sidecar::Sidecar,
        slot::Header,
    },
};

/// Extents come to memory in chunks, when first touched.
const CHUNK: usize = 64;
/// After so many whole blocks the file system is asked how much they take.
const UNCOUNTED_MOST: u64 = 16;

/// Dropped when the last user of an unlinked object is done.
pub struct Files {
    pub id: ObjectId,
    pub data: File,
    /// Opened when first written to; `None`: it cannot be.
    direct: OnceLock<Option<DirectFile>>,
    pub sidecar: Sidecar,
    pub inode: u64,
    pub sealed: Seal,
    pub loading: Mutex<()>,
    pub unlinked: AtomicBool,
    extents: Box<[OnceLock<Box<[Extent; CHUNK]>>]>,
    taken: Mutex<Taken>,
    shared: Arc<Shared>,
}

/// What this object has in the cache's total.
#[derive(Default)]
struct Taken {
    bytes: u64,
    /// Whole blocks since the file system was asked.
    uncounted: u64,
}

impl Drop for Files {
    fn drop(&mut self) {
        if *self.unlinked.get_mut() {
            let bytes = self.taken.get_mut().bytes;
            if !self.shared.handed.owe(&self.id, self.inode, bytes) {
                self.shared.space.give_back(bytes);
            }
        } else if self.taken.get_mut().uncounted > 0 {
            // Whoever opens the object again takes what the file system says for what is in the total.
            self.count();
        }
    }
}

impl Files {
    pub fn new(
        id: ObjectId,
        size: u64,
        data: File,
        sidecar: Sidecar,
        header: Header,
        shared: &Arc<Shared>,
    ) -> Self {
        let chunks = (size.div_ceil(EXTENT_SIZE) as usize).div_ceil(CHUNK);
        Self {
            id,
            data,
            direct: OnceLock::new(),
            sidecar,
            inode: header.inode,
            sealed: Seal::new(header.sealed),
            loading: Mutex::new(()),
            unlinked: AtomicBool::new(false),
            extents: (0..chunks).map(|_| OnceLock::new()).collect(),
            taken: Mutex::default(),
            shared: Arc::clone(shared),
        }
    }

    pub fn extent(&self, number: ExtentNo) -> &Extent {
        let at = number.0 as usize;
        let chunk =
            self.extents[at / CHUNK].get_or_init(|| Box::new(std::array::from_fn(|_| Extent::default())));
        &chunk[at % CHUNK]
    }

    /// The data, for writing past the page cache.
    pub fn direct(&self) -> Option<&DirectFile> {
        let open = || {
            self.shared
                .abilities
                .direct
                .then(|| disk::reopen_directly(&self.data).ok())
        };
        self.direct.get_or_init(|| open().flatten()).as_ref()
    }

    /// Brings the cache's total up to what the file system says of this object.
    pub fn count(&self) {
        let mut taken = self.taken.lock();
        // An error leaves the last count, which is the best there is.
        if let Ok(bytes) = self.shared.counted(&self.data, &self.sidecar) {
            self.shared.space.recount(taken.bytes, bytes);
            *taken = Taken { bytes, uncounted: 0 };
        }
    }

    /// The total knows what the file system says of this object already.
    pub fn is_counted(&self, bytes: u64) {
        self.taken.lock().bytes = bytes;
    }

    /// Blocks were written where none were, `bytes` in all. A whole one takes its own length wherever the
    /// file system's unit divides it, so it is believed to; asking would cost as much as its checksum. What
    /// else became allocated – a page of the sidecar, maps of the file system – shows at the next count.
    pub fn wrote(&self, bytes: u64) {
        let mut taken = self.taken.lock();
        let blocks = bytes.div_ceil(BLOCK_SIZE);
        if !bytes.is_multiple_of(BLOCK_SIZE) || taken.uncounted + blocks > UNCOUNTED_MOST {
            drop(taken);
            return self.count();
        }
        taken.uncounted += blocks;
        taken.bytes += bytes;
        self.shared.space.recount(0, bytes);
    }
}
