//! The immutable index of one version: a flat, memory-mapped file of fixed-size rows.
//!
//! Owns the format, lookups, attributes, listings and where each file's bytes are.
//! Must not know async, the network or FUSE. Bad bytes give an error, never a panic.

use std::{ops::Range, path::Path};

use crate::{digest::Digest, origin::Pin};

/// A row of the tree. Rows are in breadth-first order; a directory's children are contiguous and
/// sorted by name (bytes). Row 0 is the root.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RowNo(pub u32);

/// An inode number: row number + 1 (the root is 1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ino(pub u64);

/// An index into the tree's table of objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectNo(pub u32);

/// Seconds and nanoseconds since the epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Timestamp {
    pub seconds: i64,
    pub nanos: u32,
}

/// One row, read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry<'tree> {
    pub row: RowNo,
    pub parent: RowNo,
    pub name: &'tree [u8],
    /// Permission bits only (07777).
    pub mode: u16,
    pub modified: Timestamp,
    pub kind: EntryKind<'tree>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EntryKind<'tree> {
    Directory {
        children: Range<u32>,
        /// How many of the children are directories (for the link count).
        subdirectories: u32,
    },
    File {
        size: u64,
        /// `None` exactly for an empty file.
        content: Option<Content>,
    },
    Symlink {
        target: &'tree [u8],
    },
}

/// Where a file's bytes are: `size` bytes from `offset` of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Content {
    pub object: ObjectNo,
    pub offset: u64,
}

/// One immutable thing in the origin.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Object {
    pub key: String,
    pub size: u64,
    pub pin: Pin,
    /// Set for published data.
    pub digest: Option<Digest>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Totals {
    pub files: u64,
    pub directories: u64,
    pub symlinks: u64,
    /// Sum of file sizes.
    pub bytes: u64,
}

pub struct Tree {}

#[allow(unused_variables)]
impl Tree {
    /// Maps a rows file. Checks the header and section bounds only; each accessor checks its own row.
    pub fn open(rows: &Path) -> Result<Self, TreeError> {
        todo!()
    }
    pub fn totals(&self) -> Totals {
        todo!()
    }
    pub fn row_count(&self) -> u32 {
        todo!()
    }
    pub fn object_count(&self) -> u32 {
        todo!()
    }
    pub fn entry(&self, row: RowNo) -> Result<Entry<'_>, TreeError> {
        todo!()
    }
    /// Binary search. `Ok(None)`: no such name. `NotADirectory` if `dir` is not one.
    pub fn lookup(&self, dir: RowNo, name: &[u8]) -> Result<Option<RowNo>, TreeError> {
        todo!()
    }
    pub fn object(&self, object: ObjectNo) -> Result<Object, TreeError> {
        todo!()
    }
    /// The file rows whose bytes lie in `object`, in offset order, from the first at or after `offset`
    /// (for prefetching neighbours in a bundle). May be answered from rows in directory order.
    pub fn path(&self, row: RowNo) -> Result<Vec<u8>, TreeError> {
        todo!()
    }
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TreeError {
    #[error("not a directory")]
    NotADirectory,
}
