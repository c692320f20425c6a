//! What the sort carries for each path: a key that sorts into row order, and the attributes.

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{I64, U16, U32, U64},
};

use crate::tree::{Timestamp, TreeError, format};

/// Depth (big-endian), then the path with NUL for its slashes. NUL sorts below every byte of a name, so
/// byte order is: depth first, then component by component – breadth-first order, siblings by name.
pub(super) fn write_key(key: &mut Vec<u8>, path: &[u8]) {
    key.clear();
    key.extend_from_slice(&depth(path).to_be_bytes());
    key.extend(path.iter().map(|byte| if *byte == b'/' { 0 } else { *byte }));
}

fn depth(path: &[u8]) -> u16 {
    if path.is_empty() {
        return 0;
    }
    // At most MAX_PATH bytes.
    path.iter().filter(|byte| **byte == b'/').count() as u16 + 1
}

/// The path in a key, still with NULs.
pub(super) fn key_path(key: &[u8]) -> &[u8] {
    key.get(2..).unwrap_or_default()
}

/// A path with NULs, split into its parent's (`None` for the root) and its name.
pub(super) fn split(path: &[u8]) -> (Option<&[u8]>, &[u8]) {
    if path.is_empty() {
        return (None, path);
    }
    let at = path.iter().rposition(|byte| *byte == 0);
    match at.and_then(|at| path.split_at_checked(at)) {
        Some((parent, name)) => (Some(parent), name.get(1..).unwrap_or_default()),
        None => (Some(&[]), path),
    }
}

/// A path with slashes, split likewise.
pub(super) fn parent(path: &[u8]) -> Option<&[u8]> {
    if path.is_empty() {
        return None;
    }
    let at = path.iter().rposition(|byte| *byte == b'/').unwrap_or(0);
    path.get(..at)
}

/// For messages: bytes that are not text are replaced.
pub(super) fn display(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}

/// The same for the path in a key.
pub(super) fn display_key(key: &[u8]) -> String {
    String::from_utf8_lossy(key_path(key)).replace('\0', "/")
}

/// A directory that nobody added, only something below it.
pub(super) const IMPLIED: u8 = 0;
pub(super) const DIRECTORY: u8 = 1;
pub(super) const FILE: u8 = 2;
pub(super) const SYMLINK: u8 = 3;

pub(super) const IMPLIED_MODE: u16 = 0o755;

#[derive(Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct Attributes {
    pub kind: u8,
    /// 1: the tail is the file's digest.
    pub has_digest: u8,
    pub mode: U16,
    pub nanos: U32,
    pub seconds: I64,
    pub size: U64,
    pub object: U32,
    pub offset: U64,
}

impl Attributes {
    pub fn new(kind: u8, mode: u16, modified: Timestamp) -> Self {
        Self {
            kind,
            has_digest: 0,
            mode: mode.into(),
            nanos: modified.nanos.into(),
            seconds: modified.seconds.into(),
            size: 0.into(),
            object: format::NO_OBJECT.into(),
            offset: 0.into(),
        }
    }

    pub fn modified(&self) -> Timestamp {
        Timestamp {
            seconds: self.seconds.get(),
            nanos: self.nanos.get(),
        }
    }
}

/// One path's record, made of all that was added for it.
#[derive(Default)]
pub(super) struct Node {
    pub key: Vec<u8>,
    /// `None` before the first record.
    pub attributes: Option<Attributes>,
    /// A file's digest or a symlink's target.
    pub tail: Vec<u8>,
}

impl Node {
    pub fn set(&mut self, key: &[u8], record: &[u8]) -> Result<(), TreeError> {
        let (attributes, tail) = decode(record)?;
        self.key.clear();
        self.key.extend_from_slice(key);
        self.tail.clear();
        self.tail.extend_from_slice(tail);
        self.attributes = Some(*attributes);
        Ok(())
    }

    /// Another record for the same path.
    pub fn merge(&mut self, record: &[u8]) -> Result<(), TreeError> {
        let (new, _) = decode(record)?;
        let Some(old) = &mut self.attributes else {
            return Err(unreadable());
        };
        match (old.kind, new.kind) {
            (IMPLIED, IMPLIED) => {
                if new.modified() > old.modified() {
                    *old = *new;
                }
            }
            (DIRECTORY, IMPLIED) => {}
            (IMPLIED, DIRECTORY) => *old = *new,
            (DIRECTORY, DIRECTORY) if old == new => {}
            (DIRECTORY, DIRECTORY) => return Err(self.conflict("as directories with different attributes")),
            (FILE | SYMLINK, IMPLIED | DIRECTORY) | (IMPLIED | DIRECTORY, FILE | SYMLINK) => {
                return Err(self.conflict("as a directory and as something else"));
            }
            // Even when the two agree: whoever adds a file twice has lost track.
            _ => return Err(self.conflict("as a file or symlink each time")),
        }
        Ok(())
    }

    fn conflict(&self, what: &'static str) -> TreeError {
        TreeError::Conflict {
            path: display_key(&self.key),
            what,
        }
    }
}

fn decode(record: &[u8]) -> Result<(&Attributes, &[u8]), TreeError> {
    Attributes::ref_from_prefix(record).map_err(|_| unreadable())
}

/// A scratch file gave back something else than was written to it.
pub(super) fn unreadable() -> TreeError {
    TreeError::Scratch
}
