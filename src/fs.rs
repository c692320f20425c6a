//! The file system's meaning: what a lookup, an attribute, a listing or a read of one snapshot answers.
//!
//! Owns the mapping from inodes to rows and from (inode, offset) to (object, range), link counts,
//! `statfs`, and the `user.grid.*` extended attributes. Plain Rust values and typed errors, testable
//! without a kernel. Must not know `fuser`: numbers become wire formats in [`crate::fuse`].
//!
//! A version never changes, so there is no handle, no inode table and nothing to forget: an inode is
//! its row number + 1, a directory cookie is a position, and every answer depends on the tree alone.

use std::{fs::File, ops::Range, sync::Arc};

use bytes::Bytes;

use crate::tree::{self, EntryKind, Ino, ObjectNo, RowNo, Timestamp, Tree, TreeError};

pub mod content;
pub mod fetched;
pub mod prefetch;
mod xattrs;

pub use content::{Content, ReadError};

/// What the kernel is told is the best size of a read: one block.
pub const IO_SIZE: u32 = crate::block::BLOCK_SIZE as u32;
/// The longest name a directory entry can have.
pub const NAME_MAX: usize = 255;
/// The unit of `statfs`. One number for both of its fields, because programs multiply by either.
pub const STATFS_UNIT: u32 = 4096;

/// A resolved reference, pinned: what a mount serves.
#[derive(Clone)]
pub struct Snapshot {
    /// As printed: `alice:imagenet/3`.
    pub reference: String,
    pub tree: Arc<Tree>,
    pub content: Arc<dyn Content>,
}

/// Whom every file of a mount belongs to: the user who asked for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Owner {
    pub uid: u32,
    pub gid: u32,
}

/// Who else may read a mount.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Share {
    /// Nobody: not even root.
    #[default]
    None,
    /// The owner's group.
    Group,
    All,
}

impl Share {
    /// What the owner may read, those may whom it is shared with, and nobody else; nobody may write.
    fn mode(self, mode: u16) -> u16 {
        let owner = mode & 0o500;
        match self {
            Self::None => mode,
            Self::Group => owner | owner >> 3,
            Self::All => owner | owner >> 3 | owner >> 6,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Directory,
    File,
    Symlink,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attributes {
    pub ino: Ino,
    pub kind: Kind,
    /// Permission bits as published (07777).
    pub mode: u16,
    pub size: u64,
    /// In units of 512 bytes.
    pub blocks: u64,
    pub links: u32,
    pub modified: Timestamp,
    pub owner: Owner,
}

/// One entry of a listing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listed<'tree> {
    pub name: &'tree [u8],
    /// Where the listing goes on after this entry.
    pub next: u64,
    pub attributes: Attributes,
}

/// Whether a listing wants another entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Room {
    Left,
    /// The entry just offered did not fit.
    Full,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Statistics {
    /// Of [`STATFS_UNIT`] bytes.
    pub blocks: u64,
    pub entries: u64,
}

/// Bytes of a file as they lie in an object.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    object: ObjectNo,
    range: Range<u64>,
    /// All of the file's bytes within the object.
    file: Range<u64>,
}

#[derive(Debug, thiserror::Error)]
pub enum FsError {
    #[error("no inode {0} in this version")]
    NoSuchInode(u64),
    #[error("not a directory")]
    NotADirectory,
    #[error("a directory has no bytes to read")]
    IsADirectory,
    #[error("a symbolic link has no bytes to read")]
    NotAFile,
    #[error("not a symbolic link")]
    NotASymlink,
    #[error("a name of {0} bytes; {NAME_MAX} are possible")]
    NameTooLong(usize),
    #[error("no such extended attribute")]
    NoSuchAttribute,
    #[error("extended attributes of this kind do not exist here")]
    UnsupportedAttribute,
    #[error("the tree of this version is damaged")]
    Tree(#[source] TreeError),
    #[error("reading {path}")]
    Read {
        path: String,
        #[source]
        source: ReadError,
    },
}

/// One snapshot as a file system.
#[derive(Clone)]
pub struct GridFs {
    snapshot: Snapshot,
    owner: Owner,
    share: Share,
}

impl GridFs {
    pub fn new(snapshot: Snapshot, owner: Owner) -> Self {
        Self {
            snapshot,
            owner,
            share: Share::None,
        }
    }

    /// With modes for whom it is shared with.
    pub fn shared(self, share: Share) -> Self {
        Self { share, ..self }
    }

    pub fn reference(&self) -> &str {
        &self.snapshot.reference
    }

    pub fn owner(&self) -> Owner {
        self.owner
    }

    pub fn totals(&self) -> tree::Totals {
        self.tree().totals()
    }

    fn tree(&self) -> &Tree {
        &self.snapshot.tree
    }

    fn row(&self, ino: Ino) -> Result<RowNo, FsError> {
        ino.0
            .checked_sub(1)
            .and_then(|row| u32::try_from(row).ok())
            .filter(|row| *row < self.tree().row_count())
            .map(RowNo)
            .ok_or(FsError::NoSuchInode(ino.0))
    }

    fn entry(&self, ino: Ino) -> Result<tree::Entry<'_>, FsError> {
        self.tree().entry(self.row(ino)?).map_err(FsError::Tree)
    }

    /// `Ok(None)` says that the name does not exist, now and for ever; a failure is never said that way.
    pub fn lookup(&self, parent: Ino, name: &[u8]) -> Result<Option<Attributes>, FsError> {
        if name.len() > NAME_MAX {
            return Err(FsError::NameTooLong(name.len()));
        }
        match self.tree().lookup(self.row(parent)?, name) {
            Ok(Some(row)) => {
                let entry = self.tree().entry(row).map_err(FsError::Tree)?;
                Ok(Some(self.attributes_of(&entry)))
            }
            Ok(None) => Ok(None),
            Err(TreeError::NotADirectory) => Err(FsError::NotADirectory),
            Err(error) => Err(FsError::Tree(error)),
        }
    }

    pub fn attributes(&self, ino: Ino) -> Result<Attributes, FsError> {
        Ok(self.attributes_of(&self.entry(ino)?))
    }

    fn attributes_of(&self, entry: &tree::Entry<'_>) -> Attributes {
        let (kind, size, links) = match &entry.kind {
            // A directory is linked from its parent, from itself and from each directory in it.
            EntryKind::Directory { subdirectories, .. } => (
                Kind::Directory,
                u64::from(STATFS_UNIT),
                subdirectories.saturating_add(2),
            ),
            EntryKind::File { size, .. } => (Kind::File, *size, 1),
            EntryKind::Symlink { target } => (Kind::Symlink, target.len() as u64, 1),
        };
        Attributes {
            ino: Ino(u64::from(entry.row.0) + 1),
            kind,
            mode: self.share.mode(entry.mode),
            size,
            blocks: if kind == Kind::Symlink {
                0
            } else {
                size.div_ceil(512)
            },
            links,
            modified: entry.modified,
            owner: self.owner,
        }
    }

    pub fn readlink(&self, ino: Ino) -> Result<&[u8], FsError> {
        match self.entry(ino)?.kind {
            EntryKind::Symlink { target } => Ok(target),
            EntryKind::Directory { .. } | EntryKind::File { .. } => Err(FsError::NotASymlink),
        }
    }

    /// Offers the entries of a directory from position `from` on, `.` and `..` first, until `offer`
    /// has no room left. A position past the end lists nothing.
    pub fn list<'fs>(
        &'fs self,
        dir: Ino,
        from: u64,
        mut offer: impl FnMut(Listed<'fs>) -> Room,
    ) -> Result<(), FsError> {
        let entry = self.entry(dir)?;
        let EntryKind::Directory { children, .. } = &entry.kind else {
            return Err(FsError::NotADirectory);
        };
        if from == 0 {
            let attributes = self.attributes_of(&entry);
            if offer(Listed {
                name: b".",
                next: 1,
                attributes,
            }) == Room::Full
            {
                return Ok(());
            }
        }
        if from <= 1 {
            let parent = self.tree().entry(entry.parent).map_err(FsError::Tree)?;
            let attributes = self.attributes_of(&parent);
            if offer(Listed {
                name: b"..",
                next: 2,
                attributes,
            }) == Room::Full
            {
                return Ok(());
            }
        }
        let skipped = u32::try_from(from.saturating_sub(2)).unwrap_or(u32::MAX);
        let first = children.start.saturating_add(skipped);
        for row in first..children.end {
            let child = self.tree().entry(RowNo(row)).map_err(FsError::Tree)?;
            let listed = Listed {
                name: child.name,
                next: u64::from(row - children.start) + 3,
                attributes: self.attributes_of(&child),
            };
            if offer(listed) == Room::Full {
                break;
            }
        }
        Ok(())
    }

    pub fn statistics(&self) -> Statistics {
        let totals = self.totals();
        Statistics {
            blocks: totals.bytes.div_ceil(u64::from(STATFS_UNIT)),
            entries: u64::from(self.tree().row_count()),
        }
    }

    /// Where the asked bytes lie, clipped to the end of the file; `None` if there are none.
    fn place(&self, ino: Ino, offset: u64, length: u64) -> Result<Option<Place>, FsError> {
        let row = self.row(ino)?;
        let entry = self.tree().entry(row).map_err(FsError::Tree)?;
        match entry.kind {
            EntryKind::File { .. } => {}
            EntryKind::Directory { .. } => return Err(FsError::IsADirectory),
            EntryKind::Symlink { .. } => return Err(FsError::NotAFile),
        }
        let Some((object, file)) = self.tree().object_range(row).map_err(FsError::Tree)? else {
            return Ok(None);
        };
        let size = file.end - file.start;
        let end = offset.saturating_add(length).min(size);
        Ok((offset < end).then(|| Place {
            object,
            range: file.start + offset..file.start + end,
            file,
        }))
    }

    /// The hit path: true when `buf` now holds the answer (empty at the end of the file). Never waits
    /// for the network and starts no task.
    pub fn read_cached(
        &self,
        ino: Ino,
        offset: u64,
        length: u64,
        buf: &mut Vec<u8>,
    ) -> Result<bool, FsError> {
        let Some(place) = self.place(ino, offset, length)? else {
            buf.clear();
            return Ok(true);
        };
        let content = &self.snapshot.content;
        let wanted = place.range.end - place.range.start;
        if !content.read_cached(place.object, place.range.clone(), buf) || buf.len() as u64 != wanted {
            return Ok(false);
        }
        content.advise(ino, place.object, place.range, place.file);
        Ok(true)
    }

    /// The miss path. What it waits for has a deadline of its own in [`Content::read`].
    pub async fn read(&self, ino: Ino, offset: u64, length: u64) -> Result<Bytes, FsError> {
        let Some(place) = self.place(ino, offset, length)? else {
            return Ok(Bytes::new());
        };
        let content = &self.snapshot.content;
        // Joined in this order, so that the request somebody waits for is known before what follows it.
        let (bytes, ()) = futures::future::join(content.read(place.object, place.range.clone()), async {
            content.advise(ino, place.object, place.range.clone(), place.file.clone());
        })
        .await;
        let failed = |source| FsError::Read {
            path: self.path_for_people(ino),
            source,
        };
        let bytes = bytes.map_err(failed)?;
        let wanted = place.range.end - place.range.start;
        if bytes.len() as u64 != wanted {
            return Err(failed(ReadError::Length {
                wanted,
                got: bytes.len() as u64,
            }));
        }
        Ok(bytes)
    }

    /// The object behind a file that is all of it, if the object is complete and sealed: what may be
    /// handed to the kernel, which knows no offset within a backing file.
    pub fn sealed(&self, ino: Ino) -> Result<Option<Arc<File>>, FsError> {
        let Some(place) = self.place(ino, 0, u64::MAX)? else {
            return Ok(None);
        };
        let object = self.tree().object(place.object).map_err(FsError::Tree)?;
        if place.file != (0..object.size) {
            return Ok(None);
        }
        Ok(self.snapshot.content.seal(place.object))
    }

    /// For messages: never fails, never multi-line.
    pub fn path_for_people(&self, ino: Ino) -> String {
        match self.row(ino).map(|row| self.tree().path(row)) {
            Ok(Ok(path)) => path.escape_ascii().to_string(),
            Ok(Err(_)) | Err(_) => format!("inode {}", ino.0),
        }
    }
}

#[cfg(test)]
mod tests;
