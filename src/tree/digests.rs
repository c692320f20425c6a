//! The digests part: one BLAKE3 per file, in row order.
//!
//! Only publishing and verifying read it; a mount never fetches it.

use std::path::Path;

use zerocopy::FromBytes;

use super::{
    Backing, EntryKind, RowNo, Tree, TreeError,
    format::{DIGEST_LEN, DIGESTS_HEADER_LEN, DIGESTS_MAGIC, DigestsHeader, FORMAT_VERSION},
};
use crate::digest::Digest;

pub struct Digests {
    part: Backing,
}

impl Digests {
    /// Maps a digests part. Checks its header only.
    pub fn open(part: &Path) -> Result<Self, TreeError> {
        Self::new(Backing::map(part)?)
    }

    pub fn from_bytes(part: Vec<u8>) -> Result<Self, TreeError> {
        Self::new(Backing::Bytes(part))
    }

    fn new(part: Backing) -> Result<Self, TreeError> {
        let bytes = part.bytes();
        let (header, digests) = DigestsHeader::ref_from_prefix(bytes).map_err(|_| TreeError::Header {
            what: "too short for a header of digests",
        })?;
        if header.magic != DIGESTS_MAGIC {
            return Err(TreeError::Header {
                what: "it does not start with GRIDDGST",
            });
        }
        if header.version.get() != FORMAT_VERSION {
            return Err(TreeError::UnknownFormat {
                version: header.version.get(),
            });
        }
        if header.count.get().checked_mul(DIGEST_LEN as u64) != Some(digests.len() as u64) {
            return Err(TreeError::Header {
                what: "it holds more or fewer digests than its header says",
            });
        }
        Ok(Self { part })
    }

    pub fn count(&self) -> u64 {
        self.digests().len() as u64
    }

    /// The digest of a file; `None` for a directory or a symlink.
    pub fn of(&self, tree: &Tree, row: RowNo) -> Result<Option<Digest>, TreeError> {
        if !matches!(tree.entry(row)?.kind, EntryKind::File { .. }) {
            return Ok(None);
        }
        let ordinal = tree.file_ordinal(row)?;
        if self.count() != tree.totals().files {
            return Err(TreeError::Header {
                what: "these digests belong to another tree",
            });
        }
        let digest = self.digests().get(ordinal as usize).ok_or(TreeError::Row {
            row,
            what: "its digest is missing",
        })?;
        Ok(Some(Digest::from_bytes(*digest)))
    }

    fn digests(&self) -> &[[u8; DIGEST_LEN]] {
        self.part
            .bytes()
            .get(DIGESTS_HEADER_LEN..)
            .unwrap_or_default()
            .as_chunks()
            .0
    }
}
