//! Blocks of immutable objects on the local disk.
//!
//! Owns presence, checksums, LRU and admission, space, recovery. Must not know the network or FUSE.

use std::{ops::Range, path::PathBuf, sync::Arc};

use crate::block::BlockNo;

/// The identity of a cached object: a hash of (authorization domain, canonical endpoint and prefix,
/// key, version id or ETag, size, digest). Made with [`ObjectId::derive`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ObjectId(pub [u8; 32]);

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

pub struct Cache {}

/// An object of the cache, held: as long as this lives its file is open and not unlinked under a reader.
pub struct CachedObject {}

#[allow(unused_variables)]
impl Cache {
    /// Opens (or creates) the cache directory; takes its lock; never waits for a scan.
    pub fn open(config: CacheConfig) -> Result<Arc<Self>, CacheError> {
        todo!()
    }
    /// A handle on an object, present or not. Cheap when it is already held.
    pub fn object(self: &Arc<Self>, id: ObjectId, size: u64) -> Arc<CachedObject> {
        todo!()
    }
}

#[allow(unused_variables)]
impl CachedObject {
    pub fn size(&self) -> u64 {
        todo!()
    }
    /// Copies `offset..offset + buf.len()` into `buf` if every block is present and sound; `Ok(false)` if
    /// any is absent (or was found damaged: then it is absent from now on).
    pub fn read(&self, offset: u64, buf: &mut [u8], purpose: Purpose) -> Result<bool, CacheError> {
        todo!()
    }
    /// The absent blocks among `blocks` (block numbers of this object).
    pub fn missing(&self, blocks: Range<u64>) -> Vec<BlockNo> {
        todo!()
    }
    /// Stores one whole block. Never blocks on eviction of other blocks longer than it must; errors mean
    /// "not cached" and are for counting, never for failing a read.
    pub fn fill(&self, block: BlockNo, bytes: &[u8], purpose: Purpose) -> Result<(), CacheError> {
        todo!()
    }
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CacheError {
    #[error("{dir} is in use by another agent (pid {pid})")]
    Locked { dir: PathBuf, pid: u32 },
}
