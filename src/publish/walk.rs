//! Walks a local directory in parallel and yields it in directory order.
//!
//! Directory order: a directory, then what it holds apart from directories (by name, as bytes),
//! then its directories (by name), each in full. Directories are listed ahead of the reader by a
//! bounded number of threads, so memory is bounded by the largest directories, not by the tree.

use std::{
    ffi::OsStr,
    fs::Metadata,
    io,
    os::unix::{
        ffi::{OsStrExt, OsStringExt},
        fs::{FileTypeExt, MetadataExt},
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use tokio::task::{JoinError, JoinHandle};

use super::content::{Stamp, permissions};

/// One entry of the source. Paths are relative to the walked directory, `""` is itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Found {
    pub path: Vec<u8>,
    pub stamp: Stamp,
    pub kind: FoundKind,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum FoundKind {
    Directory,
    File {
        /// Has further names somewhere in its file system.
        hard_linked: bool,
    },
    Symlink {
        target: Vec<u8>,
    },
    /// A socket, FIFO or device: nothing that a data set can hold.
    Special,
}

/// What one directory held.
#[derive(Debug, Default)]
pub(super) struct Listing {
    /// The directory itself first (the root only, others come with their parent), then its
    /// entries that are not directories.
    pub entries: Vec<Found>,
    /// What could not be read, and why.
    pub unreadable: Vec<(PathBuf, io::Error)>,
    directories: Vec<Found>,
}

enum Pending {
    Waiting(Found),
    Started(Found, JoinHandle<Listing>),
}

pub(super) struct Walk {
    root: Arc<Path>,
    /// The next directory to yield is last.
    stack: Vec<Pending>,
    threads: usize,
}

/// The place of an entry in the local file system.
pub(super) fn local_path(root: &Path, path: &[u8]) -> PathBuf {
    if path.is_empty() {
        root.to_owned()
    } else {
        root.join(OsStr::from_bytes(path))
    }
}

impl Walk {
    pub fn new(root: &Path, meta: &Metadata, threads: usize) -> Self {
        let found = Found {
            path: Vec::new(),
            stamp: Stamp::of(meta),
            kind: FoundKind::Directory,
        };
        Self {
            root: root.into(),
            stack: vec![Pending::Waiting(found)],
            threads: threads.max(1),
        }
    }

    /// The next directory with its entries.
    pub async fn next(&mut self) -> Result<Option<Listing>, JoinError> {
        self.start_ahead();
        let Some(Pending::Started(found, listing)) = self.stack.pop() else {
            return Ok(None);
        };
        let mut listing = listing.await?;
        listing.entries.insert(0, found);
        let directories = std::mem::take(&mut listing.directories);
        self.stack
            .extend(directories.into_iter().rev().map(Pending::Waiting));
        Ok(Some(listing))
    }

    /// Lists the directories that will be wanted next, as many as there are threads.
    fn start_ahead(&mut self) {
        for pending in self.stack.iter_mut().rev().take(self.threads) {
            if let Pending::Waiting(found) = pending {
                let (root, path) = (self.root.clone(), found.path.clone());
                let task = tokio::task::spawn_blocking(move || list(&root, &path));
                *pending = Pending::Started(found.clone(), task);
            }
        }
    }
}

fn list(root: &Path, path: &[u8]) -> Listing {
    let mut listing = Listing::default();
    let directory = local_path(root, path);
    let entries = match std::fs::read_dir(&directory) {
        Ok(entries) => entries,
        Err(error) => {
            listing.unreadable.push((directory, error));
            return listing;
        }
    };
    for entry in entries {
        let found = entry.and_then(|entry| {
            let meta = entry.metadata()?;
            Ok((entry, meta))
        });
        let (entry, meta) = match found {
            Ok(found) => found,
            // Removed since the directory was read: as if the walk had come a moment later.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => {
                listing.unreadable.push((directory.clone(), error));
                continue;
            }
        };
        let name = entry.file_name();
        let mut full = Vec::with_capacity(path.len() + 1 + name.len());
        full.extend_from_slice(path);
        if !path.is_empty() {
            full.push(b'/');
        }
        full.extend_from_slice(name.as_bytes());
        let file_type = meta.file_type();
        let kind = if file_type.is_dir() {
            FoundKind::Directory
        } else if file_type.is_symlink() {
            match std::fs::read_link(entry.path()) {
                Ok(target) => FoundKind::Symlink {
                    target: target.into_os_string().into_vec(),
                },
                Err(error) => {
                    listing.unreadable.push((entry.path(), error));
                    continue;
                }
            }
        } else if file_type.is_socket()
            || file_type.is_fifo()
            || file_type.is_block_device()
            || file_type.is_char_device()
        {
            FoundKind::Special
        } else {
            FoundKind::File {
                hard_linked: meta.nlink() > 1,
            }
        };
        debug_assert_eq!(Stamp::of(&meta).mode, permissions(&meta));
        let found = Found {
            path: full,
            stamp: Stamp::of(&meta),
            kind,
        };
        if found.kind == FoundKind::Directory {
            listing.directories.push(found);
        } else {
            listing.entries.push(found);
        }
    }
    // Whole paths compare as names do: they differ after the directory only.
    listing.entries.sort_unstable_by(|a, b| a.path.cmp(&b.path));
    listing.directories.sort_unstable_by(|a, b| a.path.cmp(&b.path));
    listing
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn walk(root: &Path, threads: usize) -> Vec<Found> {
        let mut walk = Walk::new(root, &std::fs::metadata(root).unwrap(), threads);
        let mut found = Vec::new();
        while let Some(listing) = walk.next().await.unwrap() {
            assert!(listing.unreadable.is_empty());
            found.extend(listing.entries);
        }
        found
    }

    #[tokio::test]
    async fn the_order_is_the_directory_order_whatever_the_number_of_threads() {
        let dir = tempfile::tempdir().unwrap();
        for path in ["b/x/1", "b/x/0", "b/a", "a/z/q", "a/y/q", "c", "b-"] {
            let path = dir.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, b"").unwrap();
        }
        std::os::unix::fs::symlink("nowhere", dir.path().join("a/link")).unwrap();
        let odd = OsStr::from_bytes(b"not\xffutf8");
        std::fs::write(dir.path().join(odd), b"").unwrap();
        let found = walk(dir.path(), 1).await;
        let paths: Vec<_> = found.iter().map(|found| found.path.as_slice()).collect();
        let expected: [&[u8]; 14] = [
            b"",
            b"b-",
            b"c",
            b"not\xffutf8",
            b"a",
            b"a/link",
            b"a/y",
            b"a/y/q",
            b"a/z",
            b"a/z/q",
            b"b",
            b"b/a",
            b"b/x",
            b"b/x/0",
        ];
        assert_eq!(paths[..14], expected);
        assert_eq!(paths.len(), 15);
        for threads in [2, 8] {
            assert_eq!(walk(dir.path(), threads).await, found);
        }
    }

    #[tokio::test]
    async fn a_socket_a_fifo_and_a_hard_link_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(dir.path().join("s")).unwrap();
        nix::unistd::mkfifo(&dir.path().join("p"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        std::fs::write(dir.path().join("f"), b"1").unwrap();
        std::fs::hard_link(dir.path().join("f"), dir.path().join("g")).unwrap();
        let kinds: Vec<_> = walk(dir.path(), 1)
            .await
            .into_iter()
            .map(|found| found.kind)
            .collect();
        let linked = FoundKind::File { hard_linked: true };
        assert_eq!(
            kinds,
            [
                FoundKind::Directory,
                linked.clone(),
                linked,
                FoundKind::Special,
                FoundKind::Special
            ]
        );
    }
}
