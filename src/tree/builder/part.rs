//! Writing one part: hashed as it will be used, compressed as it will travel.

use std::{
    fs::File,
    io::{BufWriter, Write},
    path::{Path, PathBuf},
};

use super::scratch::{Scratch, ScratchReader};
use crate::{digest::Digest, tree::TreeError};

/// Level 3 compresses as fast as one disk writes; higher levels gain a few per cent here, since most of
/// what is left is times, offsets and ETags.
const COMPRESSION_LEVEL: i32 = 3;

/// One part of a built tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BuiltPart {
    /// The file as it goes on the wire.
    pub path: PathBuf,
    /// BLAKE3 of the part as used (uncompressed).
    pub digest: Digest,
    /// Bytes as used.
    pub size: u64,
    /// Bytes of the file.
    pub wire_size: u64,
}

pub(super) struct PartWriter {
    path: PathBuf,
    encoder: zstd::stream::write::Encoder<'static, BufWriter<File>>,
    hasher: blake3::Hasher,
    size: u64,
    announced: u64,
}

impl PartWriter {
    /// Starts a part of `size` bytes: announced to zstd, so that the frame tells its size and small
    /// parts get small windows.
    pub fn create(path: PathBuf, size: u64) -> Result<Self, TreeError> {
        let start = || {
            let file = BufWriter::new(File::create(&path)?);
            let mut encoder = zstd::stream::write::Encoder::new(file, COMPRESSION_LEVEL)?;
            encoder.set_pledged_src_size(Some(size))?;
            Ok(encoder)
        };
        let encoder = start().map_err(|source| TreeError::Io {
            path: path.clone(),
            source,
        })?;
        Ok(Self {
            path,
            encoder,
            hasher: blake3::Hasher::new(),
            size: 0,
            announced: size,
        })
    }

    pub fn write(&mut self, bytes: &[u8]) -> Result<(), TreeError> {
        self.hasher.update(bytes);
        self.size += bytes.len() as u64;
        self.encoder.write_all(bytes).map_err(|source| TreeError::Io {
            path: self.path.clone(),
            source,
        })
    }

    /// Zeros up to `offset`.
    pub fn pad_to(&mut self, offset: u64) -> Result<(), TreeError> {
        while self.size < offset {
            let zeros = [0; 64];
            let count = (offset - self.size).min(zeros.len() as u64) as usize;
            self.write(zeros.get(..count).unwrap_or_default())?;
        }
        Ok(())
    }

    /// All of a scratch file.
    pub fn append(&mut self, scratch: &mut Scratch) -> Result<(), TreeError> {
        let mut reader = scratch.reader()?;
        let mut chunk = vec![0; 128 << 10];
        let mut left = scratch.len();
        while left > 0 {
            let count = left.min(chunk.len() as u64) as usize;
            let bytes = chunk.get_mut(..count).unwrap_or_default();
            ScratchReader::read_exact(&mut reader, bytes)?;
            self.write(bytes)?;
            left -= count as u64;
        }
        Ok(())
    }

    pub fn finish(self) -> Result<BuiltPart, TreeError> {
        debug_assert_eq!(self.size, self.announced);
        let io = |source| TreeError::Io {
            path: self.path.clone(),
            source,
        };
        let mut file = self.encoder.finish().map_err(io)?;
        file.flush().map_err(io)?;
        let wire_size = file.get_ref().metadata().map_err(io)?.len();
        Ok(BuiltPart {
            digest: self.hasher.finalize().into(),
            size: self.size,
            wire_size,
            path: self.path,
        })
    }
}

/// Moves a file that needs no rewriting to its place as a part.
pub(super) fn part_as_is(
    mut scratch: Scratch,
    hasher: &blake3::Hasher,
    out: &Path,
) -> Result<BuiltPart, TreeError> {
    scratch.flush()?;
    let io = |source| TreeError::Io {
        path: out.to_owned(),
        source,
    };
    if std::fs::rename(scratch.path(), out).is_err() {
        // The scratch directory may lie on another file system.
        std::fs::copy(scratch.path(), out).map_err(io)?;
    }
    Ok(BuiltPart {
        path: out.to_owned(),
        digest: hasher.finalize().into(),
        size: scratch.len(),
        wire_size: scratch.len(),
    })
}
