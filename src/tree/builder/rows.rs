//! From sorted paths to rows: numbers, parents and child ranges, in one pass with bounded memory.
//!
//! In breadth-first order the children of one directory follow the children of the directory before
//! it. So the directories of one depth, kept in a queue on disk, are met again in the same order by
//! their children at the next depth; and what is learnt about each (its range of children) comes out
//! in row order too, to be joined with the rows when the part is composed.

use std::path::Path;

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U16, U32},
};

use super::{
    node::{self, Attributes, Node, unreadable},
    scratch::{Scratch, ScratchReader},
    sort::Sorted,
};
use crate::{
    digest::Digest,
    tree::{
        Totals, TreeError,
        format::{self, Row},
    },
};

/// A directory's children, as they go into its row.
#[derive(Clone, Copy, Default, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct Children {
    pub first: U32,
    pub count: U32,
    pub subdirectories: U32,
}

/// The scratch files that the rows part is composed of.
pub(super) struct Rows {
    pub rows: Scratch,
    pub names: Scratch,
    pub ranks: Scratch,
    /// One [`Children`] for each directory, in row order.
    pub children: Scratch,
    pub digests: Scratch,
    pub row_count: u32,
    pub totals: Totals,
    /// Whether files come with digests; decided by the first that has any bytes.
    pub has_digests: Option<bool>,
    directories: Queue,
}

/// The directories whose children are still to come.
struct Queue {
    written: Scratch,
    reader: ScratchReader,
    pushed: u64,
    flushed: u64,
    popped: u64,
    /// The directory whose children are being met; `None` before the root.
    current: Option<u32>,
    path: Vec<u8>,
    children: Children,
}

impl Rows {
    /// Consumes the sorted records.
    pub fn place(mut sorted: Sorted, dir: &Path) -> Result<Self, TreeError> {
        let mut directories = Scratch::create(dir, "directories")?;
        let reader = directories.reader()?;
        let scratch = |name| Scratch::create(dir, name);
        let mut rows = Self {
            rows: scratch("rows")?,
            names: scratch("names")?,
            ranks: scratch("ranks")?,
            children: scratch("children")?,
            digests: scratch("digests")?,
            row_count: 0,
            totals: Totals::default(),
            has_digests: None,
            directories: Queue {
                written: directories,
                reader,
                pushed: 0,
                flushed: 0,
                popped: 0,
                current: None,
                path: Vec::new(),
                children: Children::default(),
            },
        };
        let mut node = Node::default();
        while let Some((key, record)) = sorted.next()? {
            if node.attributes.is_some() && node.key == key {
                node.merge(record)?;
            } else {
                rows.emit(&node)?;
                node.set(key, record)?;
            }
        }
        rows.emit(&node)?;
        rows.end()?;
        Ok(rows)
    }

    fn emit(&mut self, node: &Node) -> Result<(), TreeError> {
        let Some(attributes) = &node.attributes else {
            return Ok(());
        };
        let row = self.row_count;
        if row == u32::MAX {
            return Err(TreeError::TooMany {
                what: "entries",
                limit: u32::MAX.into(),
            });
        }
        let path = node::key_path(&node.key);
        let (parent_path, name) = node::split(path);
        let is_directory = matches!(attributes.kind, node::IMPLIED | node::DIRECTORY);
        let parent = match parent_path {
            Some(parent_path) => self.parent_row(parent_path)?,
            None => 0,
        };
        if parent_path.is_some() {
            let children = &mut self.directories.children;
            if children.count == 0 {
                children.first = row.into();
            }
            children.count += 1;
            children.subdirectories += u32::from(is_directory);
        }
        if row.is_multiple_of(format::ROWS_PER_RANK) {
            self.ranks.write(&(self.totals.files as u32).to_le_bytes())?;
        }
        let target = if attributes.kind == node::SYMLINK {
            node.tail.as_slice()
        } else {
            &[]
        };
        let (file_type, link, offset) = match attributes.kind {
            node::FILE => (format::TYPE_FILE, attributes.object, attributes.offset),
            node::SYMLINK => (format::TYPE_SYMLINK, (target.len() as u32).into(), 0.into()),
            _ => (format::TYPE_DIRECTORY, 0.into(), 0.into()),
        };
        let raw = Row {
            parent: parent.into(),
            // Checked when it was added.
            name_len: (name.len() as u16).into(),
            mode: (file_type | attributes.mode.get()).into(),
            name_offset: self.names.len().into(),
            modified_seconds: attributes.seconds,
            modified_nanos: attributes.nanos,
            link,
            size: attributes.size,
            offset,
        };
        self.rows.write(raw.as_bytes())?;
        self.names.write(name)?;
        self.names.write(target)?;
        self.row_count += 1;
        match attributes.kind {
            node::FILE => self.count_file(node, attributes)?,
            node::SYMLINK => self.totals.symlinks += 1,
            _ => {
                self.totals.directories += 1;
                self.directories.push(path, row)?;
            }
        }
        Ok(())
    }

    fn count_file(&mut self, node: &Node, attributes: &Attributes) -> Result<(), TreeError> {
        let bad = |why| TreeError::BadEntry {
            path: node::display_key(&node.key),
            why,
        };
        self.totals.files += 1;
        let bytes = self.totals.bytes.checked_add(attributes.size.get());
        self.totals.bytes = bytes.ok_or(TreeError::TooMany {
            what: "bytes",
            limit: u64::MAX,
        })?;
        let has_digest = attributes.has_digest == 1;
        if attributes.size != 0 && *self.has_digests.get_or_insert(has_digest) != has_digest {
            return Err(bad("either every file of a tree has a digest, or none"));
        }
        // An empty file fits either kind of tree: it may come without, and gets the digest of nothing.
        match self.has_digests {
            Some(false) => Ok(()),
            _ if has_digest => self.digests.write(&node.tail),
            _ => self.digests.write(Digest::of(b"").as_bytes()),
        }
    }

    /// The row of the directory at `path`, which precedes all that was not yet placed.
    fn parent_row(&mut self, path: &[u8]) -> Result<u32, TreeError> {
        loop {
            match self.directories.current {
                Some(row) if self.directories.path == path => return Ok(row),
                Some(_) => self.children.write(self.directories.children.as_bytes())?,
                None => {}
            }
            if !self.directories.pop()? {
                return Err(unreadable());
            }
        }
    }

    /// Writes the children of the directories that are left; of all but the first there are none.
    fn end(&mut self) -> Result<(), TreeError> {
        if self.directories.current.is_some() {
            self.children.write(self.directories.children.as_bytes())?;
        }
        for _ in self.directories.popped..self.directories.pushed {
            self.children.write(Children::default().as_bytes())?;
        }
        Ok(())
    }
}

impl Queue {
    fn push(&mut self, path: &[u8], row: u32) -> Result<(), TreeError> {
        self.written.write(U16::new(path.len() as u16).as_bytes())?;
        self.written.write(U32::new(row).as_bytes())?;
        self.written.write(path)?;
        self.pushed += 1;
        Ok(())
    }

    fn pop(&mut self) -> Result<bool, TreeError> {
        if self.popped == self.pushed {
            return Ok(false);
        }
        if self.popped == self.flushed {
            self.written.flush()?;
            self.flushed = self.pushed;
        }
        let (mut len, mut row) = (U16::new(0), U32::new(0));
        self.reader.read_exact(len.as_mut_bytes())?;
        self.reader.read_exact(row.as_mut_bytes())?;
        self.path.resize(len.get().into(), 0);
        self.reader.read_exact(&mut self.path)?;
        self.current = Some(row.get());
        self.children = Children::default();
        self.popped += 1;
        Ok(true)
    }
}
