//! From a local directory, or a prefix that already exists, to a published version.
//!
//! Owns walking and listing the source, reading and hashing, bundles, what an unchanged file refers
//! to, and the order of it all: objects, then the tree, then – last – the record, so that a version
//! is visible only when it is whole. Must not know FUSE. Prints nothing: whoever asks hears of it
//! through [`Progress`] and [`Report`].

mod assemble;
mod bundle;
mod content;
mod directory;
mod keys;
mod listing;
mod parts;
mod prefix;
mod previous;
mod sort;
mod spool;
mod upload;
mod walk;

use std::{
    io,
    path::{Path, PathBuf},
};

use serde::Serialize;

use crate::{
    catalog::{CatalogError, Record},
    origin::{OriginError, Pin},
    reference::VersionNumber,
    tree::TreeError,
};

pub use directory::publish_directory;
pub use keys::{SkipReason, Skipped, SkippedFor};
pub use prefix::register;

/// What one publish or register may take, and how it goes about it.
#[derive(Clone, Debug)]
pub struct PublishOptions {
    pub message: String,
    /// Compare files with the previous version by digest, not by size and modification time.
    pub checksum: bool,
    /// Files read and hashed, or ranges listed, at the same time.
    pub threads: usize,
    /// A directory for temporary files, about 200 bytes per entry. Emptied again, also on failure.
    pub scratch: PathBuf,
    /// What the tree's builder and the sorting of keys may hold in memory, each.
    pub memory_limit: usize,
}

impl PublishOptions {
    pub fn new(scratch: impl Into<PathBuf>) -> Self {
        let cores = std::thread::available_parallelism().map_or(4, std::num::NonZero::get);
        Self {
            message: String::new(),
            checksum: false,
            threads: (cores * 2).clamp(4, 32),
            scratch: scratch.into(),
            memory_limit: 128 << 20,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// Walking the directory or listing the prefix: totals grow.
    Discover,
    /// Reading, hashing and uploading (`publish` only).
    Upload,
    /// Building and uploading the tree.
    Tree,
    /// Writing the record: from here on the version may be visible.
    Record,
}

/// Told what happens, from several threads, often: must be quick. Every method may be left out.
pub trait Progress: Send + Sync {
    fn phase(&self, phase: Phase) {
        let _ = phase;
    }
    /// The totals have grown.
    fn discovered(&self, files: u64, bytes: u64) {
        let _ = (files, bytes);
    }
    /// So much more of the totals is settled: uploaded, or found to be there already. All calls
    /// together come to the totals (unless files change meanwhile).
    fn settled(&self, files: u64, bytes: u64) {
        let _ = (files, bytes);
    }
    /// So much more was handed to the store.
    fn sent(&self, bytes: u64) {
        let _ = bytes;
    }
}

/// Nobody listens.
impl Progress for () {}

/// What was done.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// The version that unchanged files refer to.
    pub previous: Option<VersionNumber>,
    /// Files taken over from the previous version.
    pub unchanged_files: u64,
    pub unchanged_bytes: u64,
    /// Files with the same bytes as another file of this version.
    pub duplicate_files: u64,
    pub duplicate_bytes: u64,
    /// Objects uploaded now, bundles included; trees and the record are not counted.
    pub uploaded_objects: u64,
    pub uploaded_bytes: u64,
    /// Objects that an interrupted publish, or anybody else's, had already brought there.
    pub present_objects: u64,
    pub present_bytes: u64,
    /// Bundles of the previous version whose remaining files were bundled anew.
    pub repacked_bundles: u64,
    /// Files with more than one name in the source: each became a file of its own.
    pub hard_linked_files: u64,
    pub skipped: Skipped,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Published {
    pub record: Record,
    pub report: Report,
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PublishError {
    #[error("{} is not a directory; publish takes a directory", .path.display())]
    NotADirectory { path: PathBuf },
    #[error("{} holds {what} ({}), which would change while it is published", .path.display(), .inner.display())]
    Contains {
        path: PathBuf,
        inner: PathBuf,
        what: &'static str,
    },
    #[error("{count} of the source cannot be read: {}; nothing was published", list(.paths, *.count))]
    Unreadable {
        paths: Vec<PathBuf>,
        count: u64,
        source: io::Error,
    },
    #[error("{} changed twice while it was read; publish when nobody writes to it", .path.display())]
    Changed { path: PathBuf },
    #[error("{key} has neither an ETag nor a version id, so nothing would notice if it changed")]
    CannotPin { key: String },
    #[error("there is nothing below {url}; check the prefix (keys are matched up to a slash)")]
    NothingThere { url: String },
    #[error("the listing of {url} gave {key} twice or out of order")]
    BadListing { url: String, key: String },
    #[error("temporary files in {} cannot be written or read", .path.display())]
    Scratch { path: PathBuf, source: io::Error },
    #[error("uploading or reading objects failed")]
    Origin(#[from] OriginError),
    #[error("the catalog failed")]
    Catalog(#[from] CatalogError),
    #[error("the tree failed")]
    Tree(#[from] TreeError),
    /// A thread of this process panicked or was cancelled.
    #[error("a task of the publisher ended early")]
    Task(#[from] tokio::task::JoinError),
    #[error("the publisher's tree thread ended early")]
    Assembler,
}

impl PublishError {
    fn unreadable(path: &Path, source: io::Error) -> Self {
        Self::Unreadable {
            paths: vec![path.to_owned()],
            count: 1,
            source,
        }
    }

    fn scratch(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Scratch { path, source }
    }
}

fn list(paths: &[PathBuf], count: u64) -> String {
    let mut text = paths
        .iter()
        .map(|path| path.display().to_string())
        .collect::<Vec<_>>()
        .join(", ");
    if count > paths.len() as u64 {
        text.push_str(", …");
    }
    text
}

/// How a listed object is pinned: the version id where there is one.
fn pin_of(version_id: Option<String>, etag: Option<String>) -> Option<Pin> {
    version_id.map(Pin::VersionId).or(etag.map(Pin::ETag))
}
