//! Where a file system's bytes come from.
//!
//! Owns the trait that [`super::GridFs`] reads through: by object of its own tree, so that it needs to
//! know neither keys nor stores.

use std::{fs::File, ops::Range, sync::Arc};

use async_trait::async_trait;
use bytes::Bytes;

use crate::{
    fetch::FetchError,
    tree::{Ino, ObjectNo, TreeError},
};

/// The bytes of one tree's objects.
#[async_trait]
pub trait Content: Send + Sync {
    /// Puts `range`, and nothing else, into `buf` if every byte is at hand. Never waits for the network.
    fn read_cached(&self, object: ObjectNo, range: Range<u64>, buf: &mut Vec<u8>) -> bool;
    /// Exactly `range`, from wherever it is, within a deadline.
    async fn read(&self, object: ObjectNo, range: Range<u64>) -> Result<Bytes, ReadError>;
    /// Told of every read through an inode; `file` is where the whole file lies in the object.
    fn advise(&self, ino: Ino, object: ObjectNo, range: Range<u64>, file: Range<u64>);
    /// How many bytes of `range` are on the local disk.
    fn cached_bytes(&self, object: ObjectNo, range: Range<u64>) -> u64;
    /// The object's cache file, if it is complete; from then on it is never modified again.
    fn seal(&self, object: ObjectNo) -> Option<Arc<File>>;
}

/// Why bytes could not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    #[error("{got} bytes arrived where {wanted} were asked for")]
    Length { wanted: u64, got: u64 },
    #[error(transparent)]
    Fetch(#[from] FetchError),
    #[error("the tree does not say where the bytes are")]
    Tree(#[from] TreeError),
    /// What another source of content says.
    #[error(transparent)]
    Other(Box<dyn std::error::Error + Send + Sync>),
}
