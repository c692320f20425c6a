//! Reading a source file's bytes so that what is published is one state of the file.
//!
//! A file that changes while it is read is read once more, and then it is an error: a version must
//! never hold bytes that the file never held.

use std::{
    fs::{File, Metadata, OpenOptions},
    io::{self, Read},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use bytes::Bytes;
use futures::stream::{self, BoxStream, StreamExt};

use super::PublishError;
use crate::{
    block::BLOCK_SIZE,
    digest::{BlockSum, Digest},
    tree::Timestamp,
};

/// How often a file that changes under the reader is read before that is an error.
const ATTEMPTS: u32 = 2;
/// What one read of a large file takes: whole blocks, so that sums need no carrying over.
const CHUNK: usize = 8 * BLOCK_SIZE as usize;

/// What tells one state of a file from another without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    pub size: u64,
    pub modified: Timestamp,
    pub changed: Timestamp,
    pub device: u64,
    pub inode: u64,
    pub mode: u16,
}

impl Stamp {
    pub fn of(meta: &Metadata) -> Self {
        Self {
            size: meta.size(),
            modified: timestamp(meta.mtime(), meta.mtime_nsec()),
            changed: timestamp(meta.ctime(), meta.ctime_nsec()),
            device: meta.dev(),
            inode: meta.ino(),
            mode: permissions(meta),
        }
    }

    /// The same bytes, as far as the file system tells: a changed mode or link count is no change
    /// of content, but a changed inode is.
    fn same_content(&self, other: &Self) -> bool {
        (self.size, self.modified, self.device, self.inode)
            == (other.size, other.modified, other.device, other.inode)
    }
}

fn timestamp(seconds: i64, nanos: i64) -> Timestamp {
    // The kernel keeps nanoseconds within one second.
    Timestamp {
        seconds,
        nanos: u32::try_from(nanos).unwrap_or(0),
    }
}

/// Permission bits only: 07777 fits in a `u16`.
pub(super) fn permissions(meta: &Metadata) -> u16 {
    (meta.mode() & 0o7777) as u16
}

/// The digest of a whole file and the sum of each of its blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Hashed {
    pub digest: Digest,
    pub sums: Vec<BlockSum>,
}

/// The sums of the blocks of bytes that are all in memory.
pub(super) fn block_sums(bytes: &[u8]) -> Vec<BlockSum> {
    bytes.chunks(BLOCK_SIZE as usize).map(BlockSum::of).collect()
}

/// Opens a regular file: never follows a symlink that took its place, never waits for a FIFO's
/// other end.
fn open(path: &Path) -> Result<File, PublishError> {
    let unreadable = |source| PublishError::unreadable(path, source);
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)
        .map_err(unreadable)?;
    if !file.metadata().map_err(unreadable)?.is_file() {
        return Err(PublishError::Changed {
            path: path.to_owned(),
        });
    }
    Ok(file)
}

/// Runs `read` over the file until the file was the same before and after.
pub(super) fn read_stable<T>(
    path: &Path,
    mut read: impl FnMut(&mut File, &Stamp) -> io::Result<T>,
) -> Result<(Stamp, T), PublishError> {
    let unreadable = |source| PublishError::unreadable(path, source);
    for _ in 0..ATTEMPTS {
        let mut file = open(path)?;
        let before = Stamp::of(&file.metadata().map_err(unreadable)?);
        let value = match read(&mut file, &before) {
            Ok(value) => Some(value),
            // Shorter than it said: it was cut while it was read.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => None,
            Err(error) => return Err(unreadable(error)),
        };
        let after = Stamp::of(&file.metadata().map_err(unreadable)?);
        if let Some(value) = value
            && before.same_content(&after)
        {
            return Ok((before, value));
        }
    }
    Err(PublishError::Changed {
        path: path.to_owned(),
    })
}

/// The bytes of a file below `limit` bytes; `None` if it has grown to that or beyond.
pub(super) fn read_small(path: &Path, limit: u64) -> Result<(Stamp, Option<Vec<u8>>), PublishError> {
    read_stable(path, |file, stamp| {
        if stamp.size >= limit {
            return Ok(None);
        }
        let mut bytes = vec![0; usize::try_from(stamp.size).map_err(io::Error::other)?];
        file.read_exact(&mut bytes)?;
        Ok(Some(bytes))
    })
}

/// Digest and sums of a file of any size.
pub(super) fn hash(path: &Path) -> Result<(Stamp, Hashed), PublishError> {
    let mut buffer = vec![0; CHUNK];
    read_stable(path, |file, stamp| {
        let mut hasher = blake3::Hasher::new();
        let mut sums = Vec::with_capacity(stamp.size.div_ceil(BLOCK_SIZE) as usize);
        let mut left = stamp.size;
        while left > 0 {
            let chunk = take(&mut buffer, left);
            file.read_exact(chunk)?;
            hasher.update(chunk);
            sums.extend(chunk.chunks(BLOCK_SIZE as usize).map(BlockSum::of));
            left -= chunk.len() as u64;
        }
        Ok(Hashed {
            digest: hasher.finalize().into(),
            sums,
        })
    })
}

fn take(buffer: &mut [u8], left: u64) -> &mut [u8] {
    let length = usize::try_from(left).map_or(buffer.len(), |left| left.min(buffer.len()));
    &mut buffer[..length]
}

/// A file's bytes as a stream that ends in an error when they are not those of the digest given, so
/// that an upload under that digest never completes with other bytes.
pub(super) struct FileStream {
    pub parts: BoxStream<'static, io::Result<Bytes>>,
    /// Set when the bytes were not those of the digest.
    pub changed: Arc<AtomicBool>,
}

pub(super) fn stream_file(path: PathBuf, size: u64, digest: Option<Digest>) -> FileStream {
    // Two chunks ahead of the upload: the disk and the network work at the same time.
    let (sender, receiver) = tokio::sync::mpsc::channel(2);
    let changed = Arc::new(AtomicBool::new(false));
    let flag = changed.clone();
    tokio::task::spawn_blocking(move || {
        let result = (|| {
            let mut file = open(&path).map_err(io::Error::other)?;
            let mut hasher = blake3::Hasher::new();
            let mut left = size;
            while left > 0 {
                let mut chunk = vec![0; CHUNK];
                let length = take(&mut chunk, left).len();
                chunk.truncate(length);
                file.read_exact(&mut chunk).inspect_err(|error| {
                    if error.kind() == io::ErrorKind::UnexpectedEof {
                        flag.store(true, Ordering::Release);
                    }
                })?;
                hasher.update(&chunk);
                left -= chunk.len() as u64;
                if left == 0 && digest.is_some_and(|digest| digest != hasher.finalize().into()) {
                    flag.store(true, Ordering::Release);
                    return Err(io::Error::other("the file changed between hashing and uploading"));
                }
                if sender.blocking_send(Ok(Bytes::from(chunk))).is_err() {
                    // The upload was given up: nobody reads any more.
                    return Ok(());
                }
            }
            Ok(())
        })();
        if let Err(error) = result {
            // No receiver: the upload has already failed for a reason of its own.
            let _ = sender.blocking_send(Err(error));
        }
    });
    let parts = stream::unfold(receiver, |mut receiver| async move {
        Some((receiver.recv().await?, receiver))
    })
    .boxed();
    FileStream { parts, changed }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_file_that_changes_once_is_read_again_and_twice_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        for (changes, ok) in [(0, true), (1, true), (2, false)] {
            std::fs::write(&path, b"first").unwrap();
            let mut left = changes;
            let result = read_stable(&path, |file, stamp| {
                let mut bytes = vec![0; stamp.size as usize];
                file.read_exact(&mut bytes)?;
                if left > 0 {
                    left -= 1;
                    OpenOptions::new().append(true).open(&path)?.write_all(b"!")?;
                }
                Ok(bytes)
            });
            match result {
                Ok((stamp, bytes)) => {
                    assert!(ok);
                    assert_eq!(stamp.size, bytes.len() as u64);
                    assert_eq!(bytes, std::fs::read(&path).unwrap());
                }
                Err(error) => {
                    assert!(!ok, "{error}");
                    assert!(matches!(error, PublishError::Changed { .. }));
                }
            }
        }
    }

    #[test]
    fn a_file_cut_while_it_is_read_is_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, vec![7; 100]).unwrap();
        let mut first = true;
        let (stamp, bytes) = read_stable(&path, |file, stamp| {
            if std::mem::take(&mut first) {
                OpenOptions::new().write(true).open(&path)?.set_len(10)?;
            }
            let mut bytes = vec![0; stamp.size as usize];
            file.read_exact(&mut bytes)?;
            Ok(bytes)
        })
        .unwrap();
        assert_eq!((stamp.size, bytes), (10, vec![7; 10]));
    }

    #[test]
    fn hashing_in_chunks_is_hashing_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        for size in [
            0,
            1,
            BLOCK_SIZE as usize,
            CHUNK - 1,
            CHUNK,
            CHUNK + 1,
            2 * CHUNK + 77,
        ] {
            let bytes: Vec<u8> = (0..size).map(|i| (i * 31 % 251) as u8).collect();
            std::fs::write(&path, &bytes).unwrap();
            let (_, hashed) = hash(&path).unwrap();
            assert_eq!(
                hashed,
                Hashed {
                    digest: Digest::of(&bytes),
                    sums: block_sums(&bytes)
                }
            );
        }
    }

    #[tokio::test]
    async fn a_stream_of_other_bytes_ends_in_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let bytes = vec![3; CHUNK + 5];
        std::fs::write(&path, &bytes).unwrap();
        let stream = stream_file(path.clone(), bytes.len() as u64, Some(Digest::of(&bytes)));
        let parts: Vec<_> = stream.parts.collect().await;
        assert_eq!(
            parts.into_iter().flat_map(Result::unwrap).collect::<Vec<u8>>(),
            bytes
        );
        let stream = stream_file(path, bytes.len() as u64, Some(Digest::of(b"other")));
        let parts: Vec<_> = stream.parts.collect().await;
        assert!(parts.last().unwrap().is_err());
        assert!(stream.changed.load(Ordering::Acquire));
    }

    #[test]
    fn a_fifo_or_a_symlink_in_place_of_a_file_is_not_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(matches!(hash(&path), Err(PublishError::Changed { .. })));
        let link = dir.path().join("link");
        std::os::unix::fs::symlink("/etc/passwd", &link).unwrap();
        assert!(hash(&link).is_err());
    }
}
