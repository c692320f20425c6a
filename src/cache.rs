//! Blocks of immutable objects on the local disk.
//!
//! Owns presence, checksums, LRU and admission, space, recovery. Must not know the network or FUSE.
//!
//! `docs/cache.md` describes the directory and what survives what. The order of locks: an object's
//! `lifecycle`, then its `state`; the policy's, the table's and the scan's locks are innermost, are
//! never across a system call; of these only `evicting` and the policy's are held together, in that order.

mod checksum;
mod disk;
mod epochs;
mod extent;
mod held;
mod object;
mod order;
pub mod policy;
mod recovery;
mod sidecar;
mod slot;
mod space;
mod sync;
#[cfg(test)]
mod tests;
mod trees;

use std::{
    fmt,
    fs::File,
    io::{self, Write},
    ops::ControlFlow,
    path::{Path, PathBuf},
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    thread::JoinHandle,
};

use parking_lot::{Condvar, Mutex};

use crate::{block::BlockNo, digest::Digest};
pub use epochs::BootId;
pub use object::{CachedObject, WriteMode};
pub use trees::TreeHandle;

use epochs::{Epochs, Found};
use held::{HandedOut, Held};
use policy::{Part, Policy, Unit};
use recovery::Scan;
use sidecar::Sidecar;
use space::{Counters, Space};
use trees::Trees;

/// The identity of a cached object: a hash of (authorization domain, canonical endpoint and prefix,
/// key, version id or ETag, size, digest). Made with [`ObjectId::derive`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ObjectId(pub [u8; 32]);

impl ObjectId {
    /// Every part carries its length, so that no two lists of parts hash alike.
    pub fn derive(
        domain: &str,
        store_canonical: &str,
        key: &str,
        pin_text: &str,
        size: u64,
        digest: Option<&Digest>,
    ) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("grid-mount 2026 cached object");
        for text in [domain, store_canonical, key, pin_text] {
            hasher.update(&(text.len() as u64).to_le_bytes());
            hasher.update(text.as_bytes());
        }
        hasher.update(&size.to_le_bytes());
        match digest {
            Some(digest) => hasher.update(&[1]).update(digest.as_bytes()),
            None => hasher.update(&[0]),
        };
        Self(hasher.finalize().into())
    }

    fn from_hex(text: &str) -> Option<Self> {
        text.parse::<Digest>().ok().map(|digest| Self(*digest.as_bytes()))
    }
}

impl fmt::Display for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Digest::from_bytes(self.0).fmt(f)
    }
}

#[derive(Clone, Debug)]
pub struct CacheConfig {
    pub dir: PathBuf,
    /// Allocated bytes, data and sidecars.
    pub max_bytes: u64,
    /// Free space to leave on the file system.
    pub min_free: u64,
    pub verify: VerifyPolicy,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VerifyPolicy {
    /// Blocks of an earlier boot that no durable mark covers are checked before use.
    EarlierBoot,
    /// Every block is checked on its first use in each run.
    Always,
}

/// Why a block is looked at: only `Reader` counts as a reference for the LRU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    Reader,
    Readahead,
    WarmUp,
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CacheError {
    #[error("{dir} is in use by another agent (pid {pid})")]
    Locked { dir: PathBuf, pid: u32 },
    #[error("cannot use {dir} as a cache")]
    Directory { dir: PathBuf, source: io::Error },
    #[error("the cache failed {doing}")]
    Io { doing: &'static str, source: io::Error },
    #[error("no room in the cache: everything in it is in use")]
    Full,
    #[error("the disk has less free space than is to be left")]
    DiskFull,
    #[error("the cache has failed and rests for a moment")]
    Resting,
    #[error("the extent is being evicted")]
    Busy,
    #[error("block {} does not have {len} bytes", block.0)]
    WrongLength { block: BlockNo, len: usize },
    #[error("an object of {size} bytes is too large to cache")]
    TooLarge { size: u64 },
    #[error("{len} bytes at {offset} are beyond the {size} of the object")]
    OutOfRange { offset: u64, len: u64, size: u64 },
}

impl CacheError {
    fn io(doing: &'static str, source: io::Error) -> Self {
        Self::Io { doing, source }
    }
}

/// What [`Cache::stats`] tells.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CacheStats {
    /// Allocated on the disk, unlinked but still held included. An estimate until `scanned`.
    pub allocated_bytes: u64,
    pub max_bytes: u64,
    /// Objects, partly evicted ones included. Lower than the truth until `scanned`.
    pub objects: u64,
    /// Units the policy knows: extents, sealed objects, trees.
    pub units: u64,
    pub hits: u64,
    pub misses: u64,
    pub evictions: u64,
    pub fill_errors: u64,
    /// Blocks and sidecars found damaged.
    pub verify_failures: u64,
    /// Whether what earlier runs left has been counted.
    pub scanned: bool,
    /// Why the cache is not storing blocks now.
    pub degraded: Option<String>,
}

/// How far a scrub has come, and its result at the end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScrubProgress {
    pub objects: u64,
    pub blocks: u64,
    pub damaged: u64,
}

/// What all handles share.
struct Shared {
    /// Itself: eviction makes handles.
    me: Weak<Shared>,
    config: CacheConfig,
    /// Why nothing is ever stored: the directory could not be used when the agent started.
    refusal: Option<String>,
    root: File,
    /// Held for as long as anything of the cache lives.
    _lock: Option<File>,
    abilities: disk::Abilities,
    epochs: Epochs,
    held: Held,
    handed: HandedOut,
    policy: Mutex<Policy>,
    /// The policy's clock, for readers: see `CachedObject::report`.
    clock: AtomicU32,
    news: space::News,
    space: Space,
    counters: Counters,
    scan: Mutex<Scan>,
    trees: Trees,
    stop: AtomicBool,
    alarm: (Mutex<bool>, Condvar),
    /// Evictions under way: who finds nothing to evict waits a moment for them.
    evicting: (Mutex<usize>, Condvar),
}

/// A cache directory, open.
struct Place {
    root: File,
    lock: Option<File>,
    abilities: disk::Abilities,
    epochs: Epochs,
}

pub struct Cache {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Cache {
    /// Opens (or creates) the cache directory; takes its lock; never waits for a scan.
    pub fn open(config: CacheConfig) -> Result<Arc<Self>, CacheError> {
        Self::open_in_boot(config, BootId::current())
    }

    /// As [`Cache::open`]; where the directory cannot be used, a cache that stores nothing and says why in
    /// its statistics. One that another agent uses is an error still: two would fetch everything twice.
    pub fn open_or_read_through(config: CacheConfig) -> Result<Arc<Self>, CacheError> {
        let error = match Self::open(config.clone()) {
            Err(error @ CacheError::Directory { .. }) => error,
            opened => return opened,
        };
        let reason = match std::error::Error::source(&error) {
            Some(cause) => format!("{error}: {cause}"),
            None => error.to_string(),
        };
        tracing::warn!(%reason, "the cache is not storing; reads go to the origin");
        let place = Place {
            root: File::open("/").map_err(|source| CacheError::Directory {
                dir: PathBuf::from("/"),
                source,
            })?,
            lock: None,
            abilities: disk::Abilities {
                punch: false,
                attributes: false,
                reserve: false,
                direct: false,
            },
            epochs: Epochs::unrecorded(BootId::current()),
        };
        Self::start(config, place, Some(reason))
    }

    /// As [`Cache::open`], telling which boot this is: tests play a reboot with it.
    pub fn open_in_boot(config: CacheConfig, boot: BootId) -> Result<Arc<Self>, CacheError> {
        let context = |source| CacheError::Directory {
            dir: config.dir.clone(),
            source,
        };
        disk::create_dir_all(&config.dir).map_err(context)?;
        let lock = take_lock(&config.dir)?;
        let abilities = disk::probe(&config.dir).map_err(context)?;
        if !abilities.punch {
            tracing::warn!(dir = %config.dir.display(), "this file system cannot punch holes: objects are evicted whole");
        }
        let (epochs, found) = Epochs::open(&config.dir, boot).map_err(context)?;
        match found {
            Found::Sound => {}
            Found::Nothing | Found::Damaged => recovery::set_aside(&config.dir).map_err(context)?,
        }
        for sub in ["objects", "trees"] {
            disk::create_dir(&config.dir.join(sub)).map_err(context)?;
        }
        // Before anybody can stage a tree, or it would be taken for a dead agent's.
        recovery::remove_staged(&config.dir.join("trees"));
        let place = Place {
            root: File::open(&config.dir).map_err(context)?,
            lock: Some(lock),
            abilities,
            epochs,
        };
        Self::start(config, place, None)
    }

    fn start(config: CacheConfig, place: Place, refusal: Option<String>) -> Result<Arc<Self>, CacheError> {
        let dir = config.dir.clone();
        let shared = Arc::new_cyclic(|me| Shared {
            me: me.clone(),
            policy: Mutex::new(Policy::new(config.max_bytes)),
            space: Space::new(match refusal {
                None => order::last_total(&config.dir),
                Some(_) => 0,
            }),
            trees: Trees::default(),
            root: place.root,
            _lock: place.lock,
            abilities: place.abilities,
            epochs: place.epochs,
            held: Held::default(),
            handed: HandedOut::default(),
            clock: AtomicU32::new(1),
            news: space::News::default(),
            counters: Counters::default(),
            scan: Mutex::new(match refusal {
                None => Scan::default(),
                Some(_) => Scan::needless(),
            }),
            refusal,
            stop: AtomicBool::new(false),
            alarm: (Mutex::new(false), Condvar::new()),
            evicting: (Mutex::new(0), Condvar::new()),
            config,
        });
        let spawn = |name: &str, work: fn(&Arc<Shared>)| {
            let shared = shared.clone();
            std::thread::Builder::new()
                .name(name.to_owned())
                .spawn(move || work(&shared))
                .map_err(|source| CacheError::Directory {
                    dir: dir.clone(),
                    source,
                })
        };
        let threads = match &shared.refusal {
            None => vec![
                spawn("cache-scan", recovery::run)?,
                spawn("cache-space", space::run)?,
            ],
            Some(_) => Vec::new(),
        };
        Ok(Arc::new(Self { shared, threads }))
    }

    pub fn dir(&self) -> &Path {
        &self.shared.config.dir
    }

    /// A handle on an object, present or not. Cheap when it is already held; never touches the disk.
    pub fn object(self: &Arc<Self>, id: ObjectId, size: u64) -> Arc<CachedObject> {
        self.shared.object(id, size)
    }

    pub fn stats(&self) -> CacheStats {
        self.shared.stats()
    }

    /// What `cache status` prints.
    pub fn usage(&self) -> CacheStats {
        self.stats()
    }

    /// Forgets one object. Who reads it reads on. False when nothing of it was cached.
    pub fn evict(&self, id: &ObjectId) -> bool {
        match self.shared.held_or_on_disk(id) {
            Some(object) if object.present_bytes() > 0 => {
                object.discard();
                true
            }
            _ => false,
        }
    }

    /// Forgets everything nobody holds as a tree; how many objects went.
    pub fn evict_all(&self) -> u64 {
        let mut gone = 0;
        for id in self.shared.ids() {
            if let Some(object) = self.shared.held_or_on_disk(&id) {
                object.discard();
                gone += 1;
            }
        }
        for digest in self.shared.trees_on_disk() {
            gone += u64::from(self.shared.evict_tree(&digest));
        }
        gone
    }

    /// Checks every cached block against its checksum; damaged ones are absent from then on. Stops
    /// when `progress` says so.
    pub fn scrub(&self, mut progress: impl FnMut(&ScrubProgress) -> ControlFlow<()>) -> ScrubProgress {
        let mut done = ScrubProgress::default();
        for id in self.shared.ids() {
            if let Some(object) = self.shared.held_or_on_disk(&id) {
                let (checked, damaged) = object.scrub();
                done.objects += 1;
                done.blocks += checked;
                done.damaged += damaged;
            }
            if progress(&done).is_break() {
                break;
            }
        }
        done
    }

    /// Where a tree part with this digest lies, if it does.
    pub fn tree_path(&self, digest: &Digest) -> PathBuf {
        self.shared.tree_path(digest)
    }

    /// The tree part, held: not evicted while the handle lives. `None` when it is not cached. With
    /// [`VerifyPolicy::Always`] the first call in each run reads the whole of it, and `None` is a damaged one too.
    pub fn tree(&self, digest: &Digest) -> Option<TreeHandle> {
        self.shared.hold_tree(digest)
    }

    /// Where a tree part may be put together before it is adopted; what a dead agent left there goes
    /// when the cache is opened. `None` for a cache that stores nothing.
    pub fn tree_staging(&self, digest: &Digest) -> Option<PathBuf> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        if self.shared.refuses() {
            return None;
        }
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!(".incoming-{digest}-{number}");
        Some(self.shared.config.dir.join("trees").join(name))
    }

    /// A tree part could not be put there: said in the log and in the statistics. That the cache rests after an
    /// earlier failure is no failure: it would rest for ever if it were.
    pub fn tree_not_kept(&self, why: &(dyn std::error::Error + 'static)) {
        if matches!(why.downcast_ref(), Some(CacheError::Resting)) {
            return;
        }
        self.shared.degrade(format!("failed keeping a tree: {why}"));
    }

    /// A part that turned out damaged: it goes, unless somebody else holds it.
    pub fn discard_tree(&self, handle: TreeHandle) {
        let digest = *handle.digest();
        drop(handle);
        self.shared.evict_tree(&digest);
    }

    /// Makes the finished, verified file at `from` (on the same file system) the tree part `digest`:
    /// durable before it can be seen.
    pub fn adopt_tree(&self, digest: &Digest, from: &Path) -> Result<TreeHandle, CacheError> {
        self.shared.adopt_tree(digest, from)
    }

    /// Makes everything stored so far survive a power cut unchecked. The background does it now and
    /// then; a clean shutdown does it too.
    pub fn settle(&self) -> Result<(), CacheError> {
        self.shared
            .settle()
            .map_err(|error| CacheError::io("syncing", error))
    }

    /// Waits until what earlier runs left has been counted; false after `patience`.
    pub fn wait_scanned(&self, patience: std::time::Duration) -> bool {
        let until = std::time::Instant::now() + patience;
        let (wake, changed) = &self.shared.alarm;
        let mut guard = wake.lock();
        while !self.shared.scan.lock().finished() {
            if changed.wait_until(&mut guard, until).timed_out() {
                return self.shared.scan.lock().finished();
            }
        }
        true
    }
}

impl Drop for Cache {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.wake();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a cache thread panicked");
            }
        }
        if self.shared.refuses() {
            return;
        }
        let saved = self
            .shared
            .settle()
            .and_then(|()| order::save(&self.shared).map(drop));
        if let Err(error) = saved {
            tracing::warn!(%error, "the cache could not be closed cleanly; nothing is lost but order");
        }
    }
}

fn take_lock(dir: &Path) -> Result<File, CacheError> {
    let context = |source| CacheError::Directory {
        dir: dir.to_owned(),
        source,
    };
    let path = dir.join("lock");
    let mut file = match disk::open_existing(&path).map_err(context)? {
        Some(file) => file,
        // Not truncated on the way: another agent may be creating it too.
        None => File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(context)?,
    };
    match file.try_lock() {
        Ok(()) => {
            file.set_len(0)
                .and_then(|()| writeln!(file, "{}", std::process::id()))
                .map_err(context)?;
            Ok(file)
        }
        Err(std::fs::TryLockError::WouldBlock) => {
            let pid = std::fs::read_to_string(&path)
                .unwrap_or_default()
                .trim()
                .parse()
                .unwrap_or(0);
            Err(CacheError::Locked {
                dir: dir.to_owned(),
                pid,
            })
        }
        Err(std::fs::TryLockError::Error(error)) => Err(context(error)),
    }
}

impl Shared {
    fn object(self: &Arc<Self>, id: ObjectId, size: u64) -> Arc<CachedObject> {
        self.held
            .object(id, size, || CachedObject::new(id, size, self.clone()))
    }

    /// Data file and sidecar.
    fn paths(&self, id: &ObjectId) -> (PathBuf, PathBuf) {
        let name = id.to_string();
        let data = self.config.dir.join("objects").join(&name[..2]).join(&name);
        let sidecar = data.with_extension("s");
        (data, sidecar)
    }

    /// Whether the directory is not to be looked at.
    fn refuses(&self) -> bool {
        self.refusal.is_some()
    }

    /// A handle for maintenance. Its size is that of the data file: a wrong one fails every check.
    fn held_or_on_disk(self: &Arc<Self>, id: &ObjectId) -> Option<Arc<CachedObject>> {
        if let Some(object) = self.held.get(id) {
            return Some(object);
        }
        let metadata = std::fs::symlink_metadata(self.paths(id).0).ok()?;
        Some(self.object(*id, metadata.len()))
    }

    /// Every object on the disk.
    fn ids(&self) -> Vec<ObjectId> {
        if self.refuses() {
            return Vec::new();
        }
        recovery::names(&self.config.dir.join("objects"))
            .into_iter()
            .flat_map(|fan| recovery::names(&self.config.dir.join("objects").join(fan)))
            .filter_map(|name| ObjectId::from_hex(&name))
            .collect()
    }

    fn counted(&self, data: &File, sidecar: &Sidecar) -> io::Result<u64> {
        let sidecar = match sidecar {
            Sidecar::File(file) => disk::allocated(file)?,
            Sidecar::Attribute(_) => 0,
        };
        Ok(disk::allocated(data)? + sidecar)
    }

    fn unlinked(&self, id: &ObjectId) {
        self.counters.objects.fetch_sub(1, Ordering::Relaxed);
        self.policy.lock().remove(&Unit::object(*id));
    }

    fn sealed(&self, id: ObjectId, size: u64) {
        let extents = 0..size.div_ceil(crate::block::EXTENT_SIZE);
        let extents = extents.map(|number| Unit::extent(id, crate::block::ExtentNo(number)));
        self.policy.lock().seal(Unit::object(id), extents);
    }

    fn evict_unit(self: &Arc<Self>, unit: Unit) -> io::Result<object::Evicted> {
        match unit.part() {
            Part::Tree => Ok(match self.evict_tree(&Digest::from_bytes(unit.id.0)) {
                true => object::Evicted::Gone,
                false => object::Evicted::Busy,
            }),
            part => match self.held_or_on_disk(&unit.id) {
                None => Ok(object::Evicted::Gone),
                Some(object) => match part {
                    Part::Extent(number) => object.evict_extent(number),
                    _ => object.evict_whole(),
                },
            },
        }
    }

    fn settle(&self) -> io::Result<()> {
        self.epochs
            .settle(|| disk::sync_all_files(&self.root))
            .map(|_| ())
    }
}
