//! Files that only grow while a tree is built, and are then read back from the start.

use std::{
    fs::File,
    io::{BufReader, BufWriter, Read, Write},
    path::{Path, PathBuf},
};

use crate::tree::TreeError;

const BUFFER: usize = 128 << 10;

pub(super) struct Scratch {
    path: PathBuf,
    file: BufWriter<File>,
    len: u64,
}

impl Scratch {
    pub fn create(dir: &Path, name: &str) -> Result<Self, TreeError> {
        let path = dir.join(name);
        let file = File::create(&path).map_err(|source| TreeError::Io {
            path: path.clone(),
            source,
        })?;
        Ok(Self {
            path,
            file: BufWriter::with_capacity(BUFFER, file),
            len: 0,
        })
    }

    pub fn write(&mut self, bytes: &[u8]) -> Result<(), TreeError> {
        self.file.write_all(bytes).map_err(|source| TreeError::Io {
            path: self.path.clone(),
            source,
        })?;
        self.len += bytes.len() as u64;
        Ok(())
    }

    pub fn len(&self) -> u64 {
        self.len
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn flush(&mut self) -> Result<(), TreeError> {
        self.file.flush().map_err(|source| TreeError::Io {
            path: self.path.clone(),
            source,
        })
    }

    /// Reads what was flushed, from the start; what is flushed later can be read later.
    pub fn reader(&mut self) -> Result<ScratchReader, TreeError> {
        self.flush()?;
        let file = File::open(&self.path).map_err(|source| TreeError::Io {
            path: self.path.clone(),
            source,
        })?;
        Ok(ScratchReader {
            path: self.path.clone(),
            file: BufReader::with_capacity(BUFFER, file),
        })
    }
}

pub(super) struct ScratchReader {
    path: PathBuf,
    file: BufReader<File>,
}

impl ScratchReader {
    pub fn read_exact(&mut self, bytes: &mut [u8]) -> Result<(), TreeError> {
        self.file.read_exact(bytes).map_err(|source| TreeError::Io {
            path: self.path.clone(),
            source,
        })
    }
}
