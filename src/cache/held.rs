//! Which objects are held, by us or by the kernel.

use std::{
    collections::HashMap,
    fs::File,
    io,
    sync::{Arc, Weak},
};

use parking_lot::Mutex;

use super::{CachedObject, ObjectId};

const SHARDS: usize = 64;

/// One live handle per object. Entries go with their last handle.
pub struct Held {
    shards: [Mutex<HashMap<ObjectId, Weak<CachedObject>>>; SHARDS],
}

impl Default for Held {
    fn default() -> Self {
        Self {
            shards: std::array::from_fn(|_| Mutex::default()),
        }
    }
}

impl Held {
    fn shard(&self, id: &ObjectId) -> &Mutex<HashMap<ObjectId, Weak<CachedObject>>> {
        &self.shards[usize::from(id.0[1]) % SHARDS]
    }

    pub fn get(&self, id: &ObjectId) -> Option<Arc<CachedObject>> {
        self.shard(id).lock().get(id).and_then(Weak::upgrade)
    }

    pub fn object(&self, id: ObjectId, size: u64, new: impl FnOnce() -> CachedObject) -> Arc<CachedObject> {
        let mut shard = self.shard(&id).lock();
        // An id is made of the size too: another size is maintenance on a data file somebody cut, which
        // will be found unsound and unlinked.
        if let Some(object) = shard.get(&id).and_then(Weak::upgrade)
            && object.size() == size
        {
            return object;
        }
        let object = Arc::new(new());
        shard.insert(id, Arc::downgrade(&object));
        object
    }

    /// A handle was dropped; another may have been made meanwhile.
    pub fn forget(&self, id: &ObjectId) {
        let mut shard = self.shard(id).lock();
        if shard.get(id).is_some_and(|held| held.strong_count() == 0) {
            shard.remove(id);
        }
    }
}

/// Descriptors of sealed objects that somebody – the kernel, through passthrough – may hold.
#[derive(Default)]
pub struct HandedOut {
    /// By inode too: an object may have been unlinked, fetched and sealed again meanwhile.
    files: Mutex<HashMap<(ObjectId, u64), Handed>>,
}

struct Handed {
    file: Weak<File>,
    /// Bytes to give back when the last holder of an unlinked file lets go.
    owed: u64,
}

impl HandedOut {
    /// The one descriptor of this object. `open` is called without a lock held.
    pub fn get_or_open(
        &self,
        id: ObjectId,
        inode: u64,
        open: impl FnOnce() -> io::Result<File>,
    ) -> io::Result<Arc<File>> {
        if let Some(file) = self
            .files
            .lock()
            .get(&(id, inode))
            .and_then(|handed| handed.file.upgrade())
        {
            return Ok(file);
        }
        let fresh = Arc::new(open()?);
        let mut files = self.files.lock();
        if let Some(file) = files.get(&(id, inode)).and_then(|handed| handed.file.upgrade()) {
            return Ok(file);
        }
        files.insert(
            (id, inode),
            Handed {
                file: Arc::downgrade(&fresh),
                owed: 0,
            },
        );
        Ok(fresh)
    }

    pub fn contains(&self, id: &ObjectId, inode: u64) -> bool {
        self.files
            .lock()
            .get(&(*id, inode))
            .is_some_and(|handed| handed.file.strong_count() > 0)
    }

    /// The file was unlinked. False when nobody holds it: the caller gives the bytes back.
    pub fn owe(&self, id: &ObjectId, inode: u64, bytes: u64) -> bool {
        match self.files.lock().get_mut(&(*id, inode)) {
            Some(handed) if handed.file.strong_count() > 0 => {
                handed.owed = bytes;
                true
            }
            _ => false,
        }
    }

    /// Drops what nobody holds any more; the bytes that became free.
    pub fn tidy(&self) -> u64 {
        let mut free = 0;
        self.files.lock().retain(|_, handed| {
            let held = handed.file.strong_count() > 0;
            free += if held { 0 } else { handed.owed };
            held
        });
        free
    }
}
