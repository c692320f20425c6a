//! `file://` stores: a directory whose files are objects.
//!
//! Done here rather than with `object_store`'s own local store, which hides names like `a#1`, cannot say
//! that a root is missing, streams in 8 KiB pieces and follows symlinks out of its root: an agent that runs
//! as root must not be led out of a listed directory by a link in it.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    os::{
        fd::OwnedFd,
        unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _},
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use nix::{
    errno::Errno,
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2},
};

use super::{ObjectInfo, PutOutcome};

#[derive(Debug, Clone)]
pub(super) struct LocalStore {
    root: Arc<Path>,
}

/// Names that no listing shows: files that are being written.
const STAGED: &str = ".grid-mount-tmp-";

pub(super) struct OpenFile {
    pub file: File,
    pub info: ObjectInfo,
}

impl LocalStore {
    pub fn new(root: PathBuf) -> Self {
        Self { root: root.into() }
    }

    pub fn root_exists(&self) -> bool {
        self.root.is_dir()
    }

    fn path(&self, key: &str) -> PathBuf {
        self.root.join(key)
    }

    /// Opens for reading, never leaving the root: not by `..`, not by a symlink.
    pub fn open(&self, key: &str) -> io::Result<OpenFile> {
        let root = File::open(&self.root)?;
        let how = OpenHow::new()
            .flags(OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)
            .resolve(ResolveFlag::RESOLVE_BENEATH);
        let fd: OwnedFd = loop {
            match openat2(&root, key, how) {
                Ok(fd) => break fd,
                // EAGAIN: something was renamed while the path was walked.
                Err(Errno::EINTR | Errno::EAGAIN) => {}
                Err(error) => return Err(error.into()),
            }
        };
        let file = File::from(fd);
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::ErrorKind::NotFound.into());
        }
        Ok(OpenFile {
            info: info(key.to_owned(), &metadata),
            file,
        })
    }

    /// Stages the bytes beside their place, so that no reader ever sees half a file.
    fn stage(&self, key: &str) -> io::Result<(File, PathBuf, PathBuf)> {
        let path = self.path(key);
        let dir = path.parent().unwrap_or(&self.root).to_owned();
        create_dirs(&dir)?;
        let staged = dir.join(format!("{STAGED}{:016x}", rand::random::<u64>()));
        let file = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o644)
            .open(&staged)?;
        Ok((file, staged, path))
    }

    pub fn put(&self, key: &str, bytes: &[u8]) -> io::Result<()> {
        let mut upload = self.upload(key)?;
        upload.write(bytes)?;
        upload.finish()
    }

    /// Durable when it returns: records are few, and a version must not vanish with the power.
    pub fn put_if_absent(&self, key: &str, bytes: &[u8]) -> io::Result<PutOutcome> {
        let (mut file, staged, path) = self.stage(key)?;
        let linked = (|| {
            file.write_all(bytes)?;
            file.sync_all()?;
            // A hard link, unlike a rename, never replaces.
            match fs::hard_link(&staged, &path) {
                Ok(()) => Ok(PutOutcome::Created),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(PutOutcome::AlreadyExists),
                Err(error) => Err(error),
            }
        })();
        let _ = fs::remove_file(&staged);
        let outcome = linked?;
        if let Some(dir) = path.parent() {
            File::open(dir)?.sync_all()?;
        }
        Ok(outcome)
    }

    pub fn upload(&self, key: &str) -> io::Result<Upload> {
        let (file, staged, path) = self.stage(key)?;
        Ok(Upload {
            file,
            staged: Some(staged),
            path,
        })
    }

    pub fn delete(&self, key: &str) -> io::Result<()> {
        fs::remove_file(self.path(key))
    }

    /// One directory below `prefix`, sorted as whole keys sort: (files, directories with a trailing slash).
    pub fn level(&self, prefix: &str) -> io::Result<Vec<Listed>> {
        let dir = self.path(prefix);
        let entries = match fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound && self.root_exists() => {
                return Ok(Vec::new());
            }
            Err(error) => return Err(error),
        };
        let mut listed = Vec::new();
        for entry in entries {
            let entry = entry?;
            let name = match entry.file_name().into_string() {
                Ok(name) => name,
                Err(name) => {
                    return Err(io::Error::other(format!(
                        "the name {:?} in {} is not UTF-8 and cannot be a key",
                        name,
                        dir.display()
                    )));
                }
            };
            if name.starts_with(STAGED) {
                continue;
            }
            let key = format!("{prefix}{name}");
            // `open` decides what a symlink leads to, and refuses what leads out; links to directories
            // are not descended into, so no walk can loop.
            let file_type = entry.file_type()?;
            if file_type.is_dir() {
                listed.push(Listed::Directory(key + "/"));
            } else if file_type.is_symlink() {
                if let Ok(open) = self.open(&key) {
                    listed.push(Listed::Object(open.info));
                }
            } else if file_type.is_file() {
                match entry.metadata() {
                    Ok(metadata) => listed.push(Listed::Object(info(key, &metadata))),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    Err(error) => return Err(error),
                }
            }
        }
        listed.sort_unstable_by(|a, b| a.key().cmp(b.key()));
        Ok(listed)
    }
}

#[derive(Debug)]
pub(super) enum Listed {
    Object(ObjectInfo),
    /// With its trailing slash.
    Directory(String),
}

impl Listed {
    pub fn key(&self) -> &str {
        match self {
            Self::Object(info) => &info.key,
            Self::Directory(key) => key,
        }
    }
}

/// A file being written; gone without a trace unless finished.
pub(super) struct Upload {
    file: File,
    staged: Option<PathBuf>,
    path: PathBuf,
}

impl Upload {
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)
    }

    /// Synced before it is renamed: a record that names this object may be durable a moment later.
    pub fn finish(mut self) -> io::Result<()> {
        self.file.sync_data()?;
        if let Some(staged) = &self.staged {
            fs::rename(staged, &self.path)?;
        }
        self.staged = None;
        Ok(())
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        if let Some(staged) = &self.staged {
            let _ = fs::remove_file(staged);
        }
    }
}

fn create_dirs(dir: &Path) -> io::Result<()> {
    if dir.is_dir() {
        return Ok(());
    }
    if let Some(parent) = dir.parent() {
        create_dirs(parent)?;
        match fs::create_dir(dir) {
            Ok(()) => File::open(parent)?.sync_all(),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            Err(error) => Err(error),
        }
    } else {
        Ok(())
    }
}

fn info(key: String, metadata: &fs::Metadata) -> ObjectInfo {
    let nanos = u32::try_from(metadata.mtime_nsec()).unwrap_or(0);
    ObjectInfo {
        key,
        size: metadata.len(),
        etag: Some(format!(
            "\"{:x}-{:x}.{nanos:x}-{:x}\"",
            metadata.ino(),
            metadata.mtime(),
            metadata.len()
        )),
        version_id: None,
        modified: (metadata.mtime(), nanos),
    }
}

/// Up to `length` bytes from `offset`; fewer only at the end of the file.
pub(super) fn read_at(file: &File, offset: u64, length: usize) -> io::Result<Bytes> {
    let mut buffer = vec![0; length];
    let mut filled = 0;
    while filled < length {
        match file.read_at(&mut buffer[filled..], offset + filled as u64) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    buffer.truncate(filled);
    Ok(buffer.into())
}
