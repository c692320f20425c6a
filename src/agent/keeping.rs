//! What the next agent needs to go on with a mount: written beside the socket before the mount is
//! announced, its descriptor and its credentials given to the keeper, removed with the mount.
//!
//! Credentials are never written: without a keeper they are gone with the agent.

use std::{
    fs::{self, DirBuilder},
    io::{self, Write},
    os::{
        fd::{BorrowedFd, OwnedFd},
        unix::fs::DirBuilderExt,
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use super::{
    control::MountRequest,
    mount_point::{Elsewhere, MountPoint},
    snapshot::Resolved,
    systemd::Manager,
};
use crate::{
    catalog::Record,
    fuse::{self, Mounted, SUBTYPE},
    handover::MountState,
    keeper::{Held, KeeperError, Link},
    origin::{StoreSettings, StoreUrl},
};

/// Raised when a field changes its meaning; new fields alone do not raise it.
const FORMAT: u32 = 1;

/// One mount as it is written down.
#[derive(Clone, Serialize, Deserialize)]
pub struct Remembered {
    pub format: u32,
    /// Without the settings that hold credentials.
    pub request: MountRequest,
    pub mount_point: PathBuf,
    /// What was created for it, outermost first.
    pub created: Vec<PathBuf>,
    pub since: jiff::Timestamp,
    pub record: Record,
    /// Where its tree lies: a control plane that is down need not be asked.
    #[serde(default)]
    pub tree_store: Option<StoreUrl>,
    /// Whose it is and where, of an agent of many users.
    #[serde(default)]
    pub elsewhere: Option<Elsewhere>,
    /// Absent while the mount is being made.
    #[serde(default)]
    pub state: Option<MountState>,
}

/// Who keeps descriptors while no agent runs. Every operation is blocking, with a deadline.
#[derive(Default)]
pub enum KeptBy {
    /// The parent of a user's own agent.
    Keeper(Link),
    /// The store of the system's service.
    Systemd(Arc<Manager>),
    /// Mounts end with this agent.
    #[default]
    Nobody,
}

impl KeptBy {
    /// The keeper at the other end of `socket`, and what it holds for this agent.
    pub fn keeper(socket: OwnedFd) -> Result<(Self, Vec<Held>), KeeperError> {
        let (link, held) = Link::new(socket)?;
        Ok((Self::Keeper(link), held))
    }

    /// Whether there is any use in writing down what the next agent would need beside the descriptor.
    fn outlives_this_agent(&self) -> bool {
        match self {
            Self::Keeper(_) | Self::Systemd(_) => true,
            Self::Nobody => false,
        }
    }

    /// When this returns, a duplicate of the descriptor is safe, with `memo`, which holds credentials: it
    /// must not be written to a disk.
    fn keep(&self, name: &str, memo: &str, descriptor: BorrowedFd<'_>) -> Result<(), KeeperError> {
        match self {
            Self::Keeper(link) => link.keep(name, memo, descriptor),
            Self::Systemd(manager) => manager.keep(name, memo, descriptor),
            Self::Nobody => Ok(()),
        }
    }

    fn let_go(&self, name: &str) -> Result<(), KeeperError> {
        match self {
            Self::Keeper(link) => link.release(name),
            Self::Systemd(manager) => manager.let_go(name),
            Self::Nobody => Ok(()),
        }
    }

    /// Everything that was held is resumed: this agent was worth starting.
    fn serving(&self) -> Result<(), KeeperError> {
        match self {
            Self::Keeper(link) => link.serving(),
            // It hears of this when the whole agent is ready.
            Self::Systemd(_) | Self::Nobody => Ok(()),
        }
    }
}

/// Where mounts are remembered, and who keeps their descriptors.
#[derive(Default)]
pub struct Keeping {
    /// `None`: nothing is remembered.
    dir: Option<PathBuf>,
    by: KeptBy,
}

impl Keeping {
    /// Beside `socket`. An agent that can remember nothing still serves.
    pub fn beside(socket: &Path, by: KeptBy) -> Self {
        let dir = dir_beside(socket);
        let dir = match DirBuilder::new().mode(0o700).create(&dir) {
            Ok(()) => Some(dir),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Some(dir),
            Err(error) => {
                tracing::warn!(dir = %dir.display(), %error, "mounts will not outlive this agent");
                None
            }
        };
        Self { dir, by }
    }

    /// Remembers that a mount is about to be made.
    pub(super) fn begin(
        self: &Arc<Self>,
        request: &MountRequest,
        point: &MountPoint,
        resolved: &Resolved,
    ) -> Option<Entry> {
        let dir = self.dir.as_ref()?;
        let mut request = request.clone();
        request.store_settings = StoreSettings::default();
        request.trigger = None;
        let entry = Entry {
            path: dir.join(format!("{:016x}.json", rand::random::<u64>())),
            remembered: Remembered {
                format: FORMAT,
                request,
                mount_point: point.path().to_owned(),
                created: point.created().to_vec(),
                since: jiff::Timestamp::now(),
                record: resolved.record.clone(),
                tree_store: Some(resolved.tree_store().url().clone()),
                elsewhere: point.elsewhere().cloned(),
                state: None,
            },
            keeping: Arc::clone(self),
            inherited: false,
        };
        match entry.write() {
            Ok(()) => Some(entry),
            Err(error) => {
                tracing::warn!(path = %entry.path.display(), %error, "this mount will not outlive this agent");
                None
            }
        }
    }

    /// What agents before this one left.
    pub(super) fn entries(self: &Arc<Self>) -> Vec<Entry> {
        let Some(dir) = &self.dir else {
            return Vec::new();
        };
        let files = fs::read_dir(dir).into_iter().flatten().flatten();
        let mut entries = Vec::new();
        for path in files.map(|file| file.path()) {
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            match read(&path) {
                Ok(remembered) => entries.push(Entry {
                    path,
                    remembered,
                    keeping: Arc::clone(self),
                    inherited: true,
                }),
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "a mount cannot be remembered");
                    remove(&path);
                }
            }
        }
        entries
    }

    /// One that could not be resumed, to be cleared.
    pub(super) fn remembered(self: &Arc<Self>, name: &str, remembered: Remembered) -> Option<Entry> {
        Some(Entry {
            path: self.dir.as_ref()?.join(format!("{name}.json")),
            remembered,
            keeping: Arc::clone(self),
            inherited: true,
        })
    }

    /// Tells the keeper that this agent was worth starting.
    pub(super) fn serving(&self) {
        if let Err(error) = self.by.serving() {
            tracing::warn!(%error, "no keeper any more: mounts will not outlive this agent");
        }
    }

    pub(super) fn release(&self, name: &str) {
        if let Err(error) = self.by.let_go(name) {
            tracing::debug!(%error, "nothing was released");
        }
    }
}

impl Drop for Keeping {
    fn drop(&mut self) {
        // Only if nothing is remembered any more.
        if let Some(dir) = &self.dir {
            let _ = fs::remove_dir(dir);
        }
    }
}

fn dir_beside(socket: &Path) -> PathBuf {
    socket.with_extension("mounts")
}

/// After the last agent has gone for good: unmounts what is dead, and removes what was remembered. The
/// caller holds the socket's lock. Blocking.
pub fn clear(socket: &Path) {
    let keeping = Arc::new(Keeping {
        dir: Some(dir_beside(socket)),
        by: KeptBy::Nobody,
    });
    for entry in keeping.entries() {
        entry.clear();
    }
}

fn read(path: &Path) -> io::Result<Remembered> {
    let remembered: Remembered = serde_json::from_slice(&fs::read(path)?).map_err(io::Error::other)?;
    if remembered.format == FORMAT {
        Ok(remembered)
    } else {
        Err(io::Error::other(format!(
            "its format is {}; this program reads {FORMAT}",
            remembered.format
        )))
    }
}

fn remove(path: &Path) {
    for file in [path, &path.with_extension("open")] {
        if let Err(error) = fs::remove_file(file)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %file.display(), %error, "stays behind");
        }
    }
}

/// One remembered mount. Dropping it forgets it: the mount has ended, or was never made.
pub struct Entry {
    path: PathBuf,
    pub remembered: Remembered,
    keeping: Arc<Keeping>,
    inherited: bool,
}

impl Entry {
    pub fn name(&self) -> String {
        let name = self.path.file_stem().unwrap_or_default();
        name.to_string_lossy().into_owned()
    }

    /// Where it is written down what is open, if another agent can make use of it.
    pub(super) fn open_table(&self) -> Option<PathBuf> {
        self.keeping
            .by
            .outlives_this_agent()
            .then(|| self.path.with_extension("open"))
    }

    /// The mount is made. When this returns it outlives this process, unless a warning says why not. Blocking.
    pub(super) fn made(&mut self, mounted: &Mounted, settings: &StoreSettings) {
        self.remembered.state = Some(MountState::of(mounted));
        let kept = || -> Result<(), Box<dyn std::error::Error>> {
            self.write()?;
            let memo = serde_json::to_string(settings)?;
            self.keeping.by.keep(&self.name(), &memo, mounted.descriptor())?;
            Ok(())
        };
        if let Err(error) = kept() {
            let error = crate::causes::in_one_line(&*error);
            tracing::warn!(error, "this mount will not outlive this agent");
        }
    }

    fn write(&self) -> io::Result<()> {
        let text = serde_json::to_vec_pretty(&self.remembered)?;
        let dir = self.path.parent().unwrap_or(Path::new("/"));
        // Mode 0600, as every file that this makes.
        let mut file = tempfile::NamedTempFile::new_in(dir)?;
        file.write_all(&text)?;
        file.persist(&self.path).map_err(|error| error.error)?;
        Ok(())
    }

    /// Unmounts it if it is there and nobody serves it; whether it was. Blocking.
    pub(super) fn clear(self) -> bool {
        let point = &self.remembered.mount_point;
        let kind = format!("fuse.{SUBTYPE}");
        let device = self.remembered.state.as_ref().map(|state| state.device);
        let there = fuse::mounts().is_ok_and(|mounts| {
            mounts.iter().any(|mount| {
                mount.mount_point == *point
                    && mount.kind == kind
                    && device.is_none_or(|device| device == mount.device)
            })
        });
        // The kernel may answer much from its caches, but never this.
        let dead = there
            && matches!(
                nix::sys::statvfs::statvfs(point),
                Err(Errno::ENOTCONN | Errno::ECONNABORTED)
            );
        if dead {
            match fuse::unmount_at(point, true) {
                Ok(()) => {
                    tracing::info!(mount_point = %point.display(), "cleared a mount whose agent is gone")
                }
                Err(error) => {
                    tracing::warn!(mount_point = %point.display(), %error, "a mount whose agent is gone stays");
                }
            }
        }
        if dead || !there {
            let made = MountPoint::inherited(point.clone(), self.remembered.created.clone());
            drop(made.at(self.remembered.elsewhere.clone()));
        }
        dead
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        if self.inherited || self.remembered.state.is_some() {
            self.keeping.release(&self.name());
        }
        remove(&self.path);
    }
}
