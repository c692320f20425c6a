//! The immutable index of one version: a flat, memory-mapped file of fixed-size rows.
//!
//! Owns the format, lookups, attributes, listings and where each file's bytes are.
//! Must not know async, the network or FUSE. Bad bytes give an error, never a panic: opening checks the
//! header in constant time, and every accessor checks the rows it reads. Nothing here allocates per
//! entry, takes a lock or keeps state, so a tree is as cheap for a hundred readers as for one.

mod digests;
mod format;
mod mapped;
mod sums;
mod unpack;

pub mod builder;

use std::{
    fs::File,
    ops::Range,
    path::{Path, PathBuf},
};

use memmap2::Mmap;
use zerocopy::FromBytes;

use crate::{digest::Digest, pin::Pin};
use format::{Layout, ObjectRow, Row};
use mapped::RemovedOnFailure;

pub use digests::Digests;
pub use sums::SumFrame;
pub use unpack::unpack;

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

/// Where a part's bytes are.
enum Backing {
    Map(Mmap),
    Bytes(Vec<u8>),
}

impl Backing {
    fn map(path: &Path) -> Result<Self, TreeError> {
        let io = |source| TreeError::Io {
            path: path.to_owned(),
            source,
        };
        let file = File::open(path).map_err(io)?;
        // SAFETY: a mapping is unsound if somebody changes or truncates the file under it. A part is
        // sealed before it is opened: `unpack` writes it under another name, makes it read-only and
        // renames it, nothing in this project opens it for writing again, and dropping it is an unlink,
        // which leaves the mapped pages alone. It lies in a directory that only the agent may enter.
        // Should the disk fail under it, the kernel raises SIGBUS, which is not undefined behaviour; see
        // `mapped` for what comes of it.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        Ok(Self::Map(map))
    }

    fn bytes(&self) -> &[u8] {
        match self {
            Self::Map(map) => map,
            Self::Bytes(bytes) => bytes,
        }
    }
}

/// An open tree. Cheap to share between threads; nothing in it changes.
pub struct Tree {
    // Dropped in this order: nothing else may be mapped at these addresses before it is.
    _guard: Option<RemovedOnFailure>,
    part: Backing,
    layout: Layout,
}

/// `next_file` gives up after this many rows that are not files: it serves prefetching, which must
/// stay cheap, and rows that far apart are not neighbours.
const NEIGHBOUR_DISTANCE: u32 = 1024;

impl Tree {
    /// The root directory.
    pub const ROOT: RowNo = RowNo(0);

    /// Maps a rows file. Checks the header and section bounds only; each accessor checks its own row.
    pub fn open(rows: &Path) -> Result<Self, TreeError> {
        Self::new(Backing::map(rows)?, None)
    }

    /// As [`Tree::open`], of a file that can be had again: should the disk fail under it, the process
    /// dies, as it would otherwise, but the file is removed before, so that the next process does not die
    /// of it as well.
    pub fn open_replaceable(rows: &Path) -> Result<Self, TreeError> {
        let part = Backing::map(rows)?;
        let guard = RemovedOnFailure::new(part.bytes(), rows).map_err(|source| TreeError::Io {
            path: rows.to_owned(),
            source,
        })?;
        Self::new(part, Some(guard))
    }

    /// A tree in memory.
    pub fn from_bytes(rows: Vec<u8>) -> Result<Self, TreeError> {
        Self::new(Backing::Bytes(rows), None)
    }

    fn new(part: Backing, guard: Option<RemovedOnFailure>) -> Result<Self, TreeError> {
        let layout = Layout::read(part.bytes())?;
        let tree = Self {
            _guard: guard,
            part,
            layout,
        };
        match tree.entry(Self::ROOT)?.kind {
            EntryKind::Directory { .. } => Ok(tree),
            _ => Err(TreeError::Row {
                row: Self::ROOT,
                what: "the root is not a directory",
            }),
        }
    }

    pub fn totals(&self) -> Totals {
        self.layout.totals
    }

    pub fn row_count(&self) -> u32 {
        self.layout.row_count
    }

    pub fn object_count(&self) -> u32 {
        self.layout.object_count
    }

    /// The attributes of a row.
    pub fn entry(&self, row: RowNo) -> Result<Entry<'_>, TreeError> {
        let raw = self.row(row)?;
        let parent = RowNo(raw.parent.get());
        let name = self.name(row, raw)?;
        if row == Self::ROOT {
            if parent != row || !name.is_empty() {
                return Err(TreeError::Row {
                    row,
                    what: "the root has a parent or a name",
                });
            }
        } else if parent >= row {
            // Rows only ever point towards the root, so walking up ends.
            return Err(TreeError::Row {
                row,
                what: "its parent does not come before it",
            });
        } else if format::name_fault(name).is_some() {
            return Err(TreeError::Row {
                row,
                what: "its name is not a file name",
            });
        }
        let nanos = raw.modified_nanos.get();
        if nanos >= 1_000_000_000 {
            return Err(TreeError::Row {
                row,
                what: "its modification time has too many nanoseconds",
            });
        }
        let kind = match raw.mode.get() & format::TYPE_MASK {
            format::TYPE_DIRECTORY => {
                let (children, subdirectories) = self.children_of(row, raw)?;
                EntryKind::Directory {
                    children,
                    subdirectories,
                }
            }
            format::TYPE_FILE => EntryKind::File {
                size: raw.size.get(),
                content: self.content_of(row, raw)?,
            },
            format::TYPE_SYMLINK => EntryKind::Symlink {
                target: self.target_of(row, raw)?,
            },
            _ => {
                return Err(TreeError::Row {
                    row,
                    what: "it is of no known type",
                });
            }
        };
        Ok(Entry {
            row,
            parent,
            name,
            mode: raw.mode.get() & format::MODE_MASK,
            modified: Timestamp {
                seconds: raw.modified_seconds.get(),
                nanos,
            },
            kind,
        })
    }

    /// Binary search. `Ok(None)`: no such name. `NotADirectory` if `dir` is not one.
    pub fn lookup(&self, dir: RowNo, name: &[u8]) -> Result<Option<RowNo>, TreeError> {
        let raw = self.row(dir)?;
        if raw.mode.get() & format::TYPE_MASK != format::TYPE_DIRECTORY {
            return Err(TreeError::NotADirectory);
        }
        let (mut candidates, _) = self.children_of(dir, raw)?;
        while candidates.start < candidates.end {
            let middle = RowNo(candidates.start + (candidates.end - candidates.start) / 2);
            let raw = self.row(middle)?;
            if raw.parent.get() != dir.0 {
                return Err(TreeError::Row {
                    row: middle,
                    what: "its parent is another directory",
                });
            }
            match self.name(middle, raw)?.cmp(name) {
                std::cmp::Ordering::Less => candidates.start = middle.0 + 1,
                std::cmp::Ordering::Greater => candidates.end = middle.0,
                std::cmp::Ordering::Equal => return Ok(Some(middle)),
            }
        }
        Ok(None)
    }

    /// Walks a slash-separated path from the root; `b""` is the root. `Ok(None)`: no such path.
    /// Symlinks are not followed.
    pub fn find(&self, path: &[u8]) -> Result<Option<RowNo>, TreeError> {
        let mut row = Self::ROOT;
        if path.is_empty() {
            return Ok(Some(row));
        }
        for name in path.split(|byte| *byte == b'/') {
            row = match self.lookup(row, name) {
                Ok(Some(row)) => row,
                Ok(None) | Err(TreeError::NotADirectory) => return Ok(None),
                Err(error) => return Err(error),
            };
        }
        Ok(Some(row))
    }

    /// The path of a row from the root, slash-separated; `b""` for the root.
    pub fn path(&self, row: RowNo) -> Result<Vec<u8>, TreeError> {
        // Parents come before their children, so this ends; the length bound keeps a damaged tree
        // from making it long.
        let mut reversed: Vec<&[u8]> = Vec::new();
        let mut len = 0;
        let mut entry = self.entry(row)?;
        while entry.row != Self::ROOT {
            len += entry.name.len() + 1;
            if len > format::MAX_PATH + 1 {
                return Err(TreeError::Row {
                    row,
                    what: "its path is too long",
                });
            }
            reversed.push(entry.name);
            entry = self.entry(entry.parent)?;
        }
        reversed.reverse();
        Ok(reversed.join(&b'/'))
    }

    /// The next file after `row` in row order, which is where the neighbours of a bundled file lie:
    /// siblings first, then the files of the next directory as deep. `None` if none is near.
    pub fn next_file(&self, row: RowNo) -> Result<Option<RowNo>, TreeError> {
        let start = row.0.saturating_add(1);
        let end = start
            .saturating_add(NEIGHBOUR_DISTANCE)
            .min(self.layout.row_count);
        for next in (start..end).map(RowNo) {
            if self.row(next)?.mode.get() & format::TYPE_MASK == format::TYPE_FILE {
                return Ok(Some(next));
            }
        }
        Ok(None)
    }

    /// Where a file's bytes lie, checked against the size of the object; `None` for an empty file and
    /// for what is not a file.
    pub fn object_range(&self, row: RowNo) -> Result<Option<(ObjectNo, Range<u64>)>, TreeError> {
        let EntryKind::File {
            size,
            content: Some(content),
        } = self.entry(row)?.kind
        else {
            return Ok(None);
        };
        let object = self.object_row(content.object)?;
        let end = content
            .offset
            .checked_add(size)
            .filter(|end| *end <= object.size.get());
        let end = end.ok_or(TreeError::Row {
            row,
            what: "it reaches beyond the end of its object",
        })?;
        Ok(Some((content.object, content.offset..end)))
    }

    pub fn object(&self, object: ObjectNo) -> Result<Object, TreeError> {
        let row = self.object_row(object)?;
        let keys = self.section(&self.layout.keys);
        let text = |start: u64, len: u64| {
            let range = usize::try_from(start).ok()?..usize::try_from(start.checked_add(len)?).ok()?;
            std::str::from_utf8(keys.get(range)?).ok().map(str::to_owned)
        };
        let (key_offset, key_len) = (row.key_offset.get(), u64::from(row.key_len.get()));
        let key = text(key_offset, key_len).ok_or(TreeError::Object {
            object,
            what: "its key is damaged",
        })?;
        // The key lies within the section, so this cannot overflow.
        let pin = text(key_offset + key_len, row.pin_len.get().into());
        let pin = match (row.pin_kind, pin) {
            (format::PIN_CONTENT, Some(text)) if text.is_empty() => Pin::Content,
            (format::PIN_ETAG, Some(text)) => Pin::ETag(text),
            (format::PIN_VERSION_ID, Some(text)) => Pin::VersionId(text),
            _ => {
                return Err(TreeError::Object {
                    object,
                    what: "its pin is damaged",
                });
            }
        };
        let digest = match row.has_digest {
            0 => None,
            1 => {
                let digests = self
                    .section(&self.layout.object_digests)
                    .as_chunks::<{ format::DIGEST_LEN }>()
                    .0;
                let digest = digests.get(object.0 as usize);
                Some(*digest.ok_or(TreeError::Object {
                    object,
                    what: "its digest is missing",
                })?)
            }
            _ => {
                return Err(TreeError::Object {
                    object,
                    what: "it has neither a digest nor none",
                });
            }
        };
        Ok(Object {
            key,
            size: row.size.get(),
            pin,
            digest: digest.map(Digest::from_bytes),
        })
    }

    /// How many files come before `row`: the index of a file's digest.
    fn file_ordinal(&self, row: RowNo) -> Result<u64, TreeError> {
        let rank = row.0 / format::ROWS_PER_RANK;
        let ranks = self.section(&self.layout.ranks).as_chunks::<4>().0;
        let rank_value = ranks.get(rank as usize).ok_or(TreeError::NoSuchRow(row))?;
        let mut ordinal = u64::from(u32::from_le_bytes(*rank_value));
        for earlier in (rank * format::ROWS_PER_RANK..row.0).map(RowNo) {
            ordinal += u64::from(self.row(earlier)?.mode.get() & format::TYPE_MASK == format::TYPE_FILE);
        }
        Ok(ordinal)
    }

    fn layout(&self) -> &Layout {
        &self.layout
    }

    /// `Layout::read` proved that the range lies within the part; an empty slice is only what a
    /// mistake there would give.
    fn section(&self, range: &Range<usize>) -> &[u8] {
        self.part.bytes().get(range.clone()).unwrap_or_default()
    }

    fn row(&self, row: RowNo) -> Result<&Row, TreeError> {
        record(self.section(&self.layout.rows), row.0).ok_or(TreeError::NoSuchRow(row))
    }

    fn object_row(&self, object: ObjectNo) -> Result<&ObjectRow, TreeError> {
        record(self.section(&self.layout.objects), object.0).ok_or(TreeError::NoSuchObject(object))
    }

    fn name(&self, row: RowNo, raw: &Row) -> Result<&[u8], TreeError> {
        self.names_slice(raw.name_offset.get(), raw.name_len.get().into())
            .ok_or(TreeError::Row {
                row,
                what: "its name lies beyond the end",
            })
    }

    fn names_slice(&self, start: u64, len: u64) -> Option<&[u8]> {
        let range = usize::try_from(start).ok()?..usize::try_from(start.checked_add(len)?).ok()?;
        self.section(&self.layout.names).get(range)
    }

    fn children_of(&self, row: RowNo, raw: &Row) -> Result<(Range<u32>, u32), TreeError> {
        let (first, counts) = (raw.link.get(), raw.size.get());
        let (count, subdirectories) = (counts as u32, (counts >> 32) as u32);
        if count == 0 && subdirectories == 0 {
            return Ok((0..0, 0));
        }
        let end = first
            .checked_add(count)
            .filter(|end| *end <= self.layout.row_count);
        match end {
            Some(end) if first > row.0 && subdirectories <= count => Ok((first..end, subdirectories)),
            _ => Err(TreeError::Row {
                row,
                what: "its children lie elsewhere",
            }),
        }
    }

    fn content_of(&self, row: RowNo, raw: &Row) -> Result<Option<Content>, TreeError> {
        let (object, offset, size) = (raw.link.get(), raw.offset.get(), raw.size.get());
        if size == 0 && object == format::NO_OBJECT {
            return Ok(None);
        }
        if size == 0 || object >= self.layout.object_count || offset.checked_add(size).is_none() {
            return Err(TreeError::Row {
                row,
                what: "its bytes lie in no object",
            });
        }
        Ok(Some(Content {
            object: ObjectNo(object),
            offset,
        }))
    }

    fn target_of(&self, row: RowNo, raw: &Row) -> Result<&[u8], TreeError> {
        let len = u64::from(raw.link.get());
        let start = raw.name_offset.get().saturating_add(raw.name_len.get().into());
        self.names_slice(start, len)
            .filter(|target| (1..=format::MAX_TARGET).contains(&target.len()) && !target.contains(&0))
            .ok_or(TreeError::Row {
                row,
                what: "its target is damaged",
            })
    }
}

/// Record `index` of a table.
fn record<T: FromBytes + zerocopy::KnownLayout + zerocopy::Immutable + zerocopy::Unaligned>(
    table: &[u8],
    index: u32,
) -> Option<&T> {
    let start = (index as usize).checked_mul(size_of::<T>())?;
    T::ref_from_bytes(table.get(start..start.checked_add(size_of::<T>())?)?).ok()
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TreeError {
    #[error("not a directory")]
    NotADirectory,
    #[error("the tree has no row {}", .0.0)]
    NoSuchRow(RowNo),
    #[error("the tree has no object {}", .0.0)]
    NoSuchObject(ObjectNo),
    #[error("the tree is damaged: {what}")]
    Header { what: &'static str },
    #[error("the tree is damaged at row {}: {what}", row.0)]
    Row { row: RowNo, what: &'static str },
    #[error("the tree is damaged at object {}: {what}", object.0)]
    Object { object: ObjectNo, what: &'static str },
    #[error("the tree has format {version}, which this version of grid-mount does not know; a newer one may")]
    UnknownFormat { version: u32 },
    #[error(
        "the tree uses features ({flags:#x}) that this version of grid-mount does not know; a newer one may"
    )]
    UnknownFeature { flags: u64 },
    #[error("a part of the tree has the digest {actual}, not {expected}")]
    WrongDigest { expected: Digest, actual: Digest },
    #[error("a part of the tree has more than the {size} bytes announced")]
    TooLong { size: u64 },
    #[error("a part of the tree has {missing} bytes less than the {size} announced")]
    TooShort { size: u64, missing: u64 },
    #[error("a frame of sums is shorter than its blocks need")]
    ShortFrame,
    #[error("a part of the tree cannot be unpacked")]
    Unpack(#[source] std::io::Error),
    #[error("{}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("a scratch file gave back something else than was written to it")]
    Scratch,
    #[error("{path:?} cannot be a path in a tree: {why}")]
    BadPath { path: String, why: &'static str },
    #[error("{path:?} was added twice: {what}")]
    Conflict { path: String, what: &'static str },
    #[error("{path:?} cannot be added: {why}")]
    BadEntry { path: String, why: &'static str },
    #[error("object {key:?} cannot be added: {why}")]
    BadObject { key: String, why: &'static str },
    #[error("a tree holds at most {limit} {what}")]
    TooMany { what: &'static str, limit: u64 },
}
