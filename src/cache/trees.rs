//! Tree parts: sealed files that are not made of blocks, under their digest.

use std::{
    collections::{HashMap, HashSet},
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use parking_lot::Mutex;

use super::{CacheError, ObjectId, Purpose, Shared, VerifyPolicy, disk, policy::Unit, recovery};
use crate::digest::Digest;

#[derive(Default)]
pub struct Trees {
    uses: Mutex<HashMap<Digest, Use>>,
    /// Counted into the space. As many as there are mounts, about.
    met: Mutex<HashSet<ObjectId>>,
    /// Known to be what their names say, in this run; with [`VerifyPolicy::Always`] only.
    checked: Mutex<HashSet<Digest>>,
}

impl Trees {
    /// True once for each: the caller counts it.
    pub fn first_met(&self, id: &ObjectId) -> bool {
        self.met.lock().insert(*id)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Use {
    Held(usize),
    /// Being unlinked: absent for whoever asks.
    Going,
}

/// A tree part that is not evicted while this lives.
pub struct TreeHandle {
    digest: Digest,
    path: PathBuf,
    shared: Arc<Shared>,
}

impl TreeHandle {
    pub fn digest(&self) -> &Digest {
        &self.digest
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for TreeHandle {
    fn drop(&mut self) {
        let mut uses = self.shared.trees.uses.lock();
        match uses.get_mut(&self.digest) {
            Some(Use::Held(count)) if *count > 1 => *count -= 1,
            _ => {
                uses.remove(&self.digest);
            }
        }
    }
}

impl Shared {
    pub(super) fn tree_path(&self, digest: &Digest) -> PathBuf {
        self.config.dir.join("trees").join(digest.to_string())
    }

    fn tree_unit(digest: &Digest) -> Unit {
        Unit::tree(ObjectId(*digest.as_bytes()))
    }

    /// Counts one more user; false while the part is being unlinked.
    fn take_tree(self: &Arc<Self>, digest: &Digest) -> Option<TreeHandle> {
        let mut uses = self.trees.uses.lock();
        match uses.entry(*digest).or_insert(Use::Held(0)) {
            Use::Held(count) => *count += 1,
            Use::Going => return None,
        }
        drop(uses);
        Some(TreeHandle {
            digest: *digest,
            path: self.tree_path(digest),
            shared: self.clone(),
        })
    }

    pub(super) fn hold_tree(self: &Arc<Self>, digest: &Digest) -> Option<TreeHandle> {
        if self.refuses() {
            return None;
        }
        let handle = self.take_tree(digest)?;
        let len = fs::symlink_metadata(&handle.path)
            .ok()
            .filter(fs::Metadata::is_file)?
            .len();
        if self.config.verify == VerifyPolicy::Always && !self.is_sound(&handle) {
            self.counters.damaged();
            drop(handle);
            self.evict_tree(digest);
            return None;
        }
        self.referenced(Self::tree_unit(digest), len);
        Some(handle)
    }

    /// Whether it is what its name says: looked at once in each run.
    fn is_sound(&self, handle: &TreeHandle) -> bool {
        if self.trees.checked.lock().contains(handle.digest()) {
            return true;
        }
        let mut hasher = blake3::Hasher::new();
        let read = fs::File::open(handle.path()).and_then(|file| hasher.update_reader(file).map(drop));
        let sound = read.is_ok() && Digest::from(hasher.finalize()) == *handle.digest();
        if sound {
            self.trees.checked.lock().insert(*handle.digest());
        } else {
            tracing::warn!(path = %handle.path().display(), "a cached tree is damaged and will be fetched again");
        }
        sound
    }

    pub(super) fn adopt_tree(
        self: &Arc<Self>,
        digest: &Digest,
        from: &Path,
    ) -> Result<TreeHandle, CacheError> {
        let context = |source| CacheError::io("adopting a tree", source);
        if let Some(handle) = self.hold_tree(digest) {
            disk::unlink(from).map_err(context)?;
            return Ok(handle);
        }
        let handle = self.take_tree(digest).ok_or(CacheError::Busy)?;
        let file = fs::File::open(from).map_err(context)?;
        let bytes = disk::allocated(&file).map_err(context)?;
        self.admit(bytes)?;
        // It is not looked at again at the next mount, so it must be what it is on the disk, too.
        file.sync_all().map_err(context)?;
        fs::rename(from, &handle.path).map_err(context)?;
        disk::sync_parent(&handle.path).map_err(context)?;
        if self.trees.first_met(&ObjectId(*digest.as_bytes())) {
            self.space.recount(0, bytes);
        }
        self.arrived(Self::tree_unit(digest), bytes, Purpose::Reader);
        Ok(handle)
    }

    /// False when somebody holds it.
    pub(super) fn evict_tree(&self, digest: &Digest) -> bool {
        {
            let mut uses = self.trees.uses.lock();
            if uses.contains_key(digest) {
                return false;
            }
            uses.insert(*digest, Use::Going);
        }
        let path = self.tree_path(digest);
        let bytes = fs::File::open(&path)
            .and_then(|file| disk::allocated(&file))
            .unwrap_or(0);
        match disk::unlink(&path) {
            Ok(()) => {
                self.trees.checked.lock().remove(digest);
                if self.trees.met.lock().remove(&ObjectId(*digest.as_bytes())) {
                    self.space.give_back(bytes);
                }
                self.policy.lock().remove(&Self::tree_unit(digest));
            }
            Err(error) => self.trouble("removing a tree", &error),
        }
        self.trees.uses.lock().remove(digest);
        true
    }

    pub(super) fn trees_on_disk(&self) -> Vec<Digest> {
        if self.refuses() {
            return Vec::new();
        }
        recovery::names(&self.config.dir.join("trees"))
            .iter()
            .filter_map(|name| name.parse().ok())
            .collect()
    }
}
