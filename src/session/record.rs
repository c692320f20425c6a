//! What became of a session's datastores: a JSON file that jobs read, and that the next command goes on from.

use std::{
    fs::{self, File, OpenOptions, Permissions},
    io::{self, Write},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::spec::Wanted;
use crate::{agent::control::MountInfo, prefetch_policy::PrefetchPolicy, reference::PinnedReference};

/// Raised when a field changes its meaning; new fields alone do not raise it.
pub const FORMAT: u32 = 1;
/// The lock is held while a file is written, never while something is mounted.
const LOCK_DEADLINE: Duration = Duration::from_secs(20);
const LOCK_PAUSE: Duration = Duration::from_millis(20);

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    pub format: u32,
    pub started: jiff::Timestamp,
    pub root: PathBuf,
    /// The link to the root that was made.
    pub link: Option<PathBuf>,
    pub datastores: Vec<Datastore>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Standing {
    Mounted,
    /// It failed, is not required, and is tried again.
    Waiting,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Datastore {
    /// As the spec has it.
    pub requested: String,
    pub path: PathBuf,
    pub required: bool,
    #[serde(default)]
    pub prefetch: Option<PrefetchPolicy>,
    #[serde(default)]
    pub subdir: Option<PathBuf>,
    pub standing: Standing,
    /// What it resolved to.
    pub reference: Option<PinnedReference>,
    /// Where the whole version is; differs from `path` where only a subdirectory is to be seen.
    pub mount_point: Option<PathBuf>,
    pub files: Option<u64>,
    pub bytes: Option<u64>,
    pub mounted_at: Option<jiff::Timestamp>,
    /// Why it is waiting.
    pub error: Option<String>,
}

impl Datastore {
    pub fn mounted(wanted: &Wanted, info: &MountInfo) -> Self {
        Self {
            standing: Standing::Mounted,
            reference: Some(info.reference.clone()),
            mount_point: Some(info.mount_point.clone()),
            files: Some(info.totals.files),
            bytes: Some(info.totals.bytes),
            mounted_at: Some(jiff::Timestamp::now()),
            error: None,
            ..Self::waiting(wanted, String::new())
        }
    }

    pub fn waiting(wanted: &Wanted, error: String) -> Self {
        Self {
            requested: wanted.reference.clone(),
            path: wanted.path.clone(),
            required: wanted.required,
            prefetch: wanted.prefetch,
            subdir: wanted.subdir.clone(),
            standing: Standing::Waiting,
            reference: None,
            mount_point: None,
            files: None,
            bytes: None,
            mounted_at: None,
            error: Some(error),
        }
    }

    pub fn wanted(&self) -> Wanted {
        Wanted {
            reference: self.requested.clone(),
            path: self.path.clone(),
            required: self.required,
            prefetch: self.prefetch,
            subdir: self.subdir.clone(),
        }
    }
}

/// Where the record is; one process at a time changes it.
#[derive(Clone, Debug)]
pub struct Place(PathBuf);

/// Held while the record is read and written again.
pub struct Locked<'place> {
    place: &'place Place,
    _lock: Flock<File>,
}

impl Place {
    pub fn new(path: PathBuf) -> Self {
        Self(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    /// `None` where there is no session.
    pub fn read(&self) -> io::Result<Option<Record>> {
        let text = match fs::read(&self.0) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let record: Record = serde_json::from_slice(&text).map_err(io::Error::other)?;
        match record.format {
            FORMAT => Ok(Some(record)),
            other => Err(io::Error::other(format!(
                "its format is {other}; this program reads {FORMAT}"
            ))),
        }
    }

    pub fn lock(&self) -> io::Result<Locked<'_>> {
        let lock = self.hold("lock", LOCK_DEADLINE)?.ok_or(io::ErrorKind::TimedOut)?;
        Ok(Locked {
            place: self,
            _lock: lock,
        })
    }

    /// One process at a time tries again what is waiting; `None` if another does, for as long as `patience`.
    pub fn hold_retrying(&self, patience: Duration) -> io::Result<Option<Flock<File>>> {
        self.hold("retrying", patience)
    }

    fn hold(&self, what: &str, patience: Duration) -> io::Result<Option<Flock<File>>> {
        let begun = Instant::now();
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(self.0.with_extension(what))?;
        loop {
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => return Ok(Some(lock)),
                Err((_, errno)) if errno != nix::errno::Errno::EWOULDBLOCK => return Err(errno.into()),
                Err(_) if begun.elapsed() >= patience => return Ok(None),
                Err((again, _)) => file = again,
            }
            std::thread::sleep(LOCK_PAUSE);
        }
    }
}

impl Locked<'_> {
    pub fn read(&self) -> io::Result<Option<Record>> {
        self.place.read()
    }

    /// Whole or not at all, and readable by everybody: there is no secret in it.
    pub fn write(&self, record: &Record) -> io::Result<()> {
        let path = &self.place.0;
        let mut file = tempfile::NamedTempFile::new_in(path.parent().unwrap_or(Path::new("/")))?;
        serde_json::to_writer_pretty(&mut file, record)?;
        file.write_all(b"\n")?;
        file.as_file().set_permissions(Permissions::from_mode(0o644))?;
        file.persist(path).map_err(|error| error.error)?;
        Ok(())
    }

    pub fn remove(&self) -> io::Result<()> {
        fs::remove_file(&self.place.0)
    }
}
