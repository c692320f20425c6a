//! Where a mount may go: the rules, and the directories made for it.
//!
//! A user's own agent goes by paths, with that user's rights. An agent that serves many users goes as each
//! caller would ([`View`]): what the caller could not have made is no mount point, and what is checked is
//! what is mounted on, an open directory, so that nothing can be put in its place in between.

use std::{
    ffi::CString,
    fs, io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Component, Path, PathBuf},
    sync::Arc,
};

use nix::{
    dir::Dir,
    errno::Errno,
    fcntl::OFlag,
    sys::{
        stat::{Mode, mkdirat},
        statfs::{CGROUP_SUPER_MAGIC, CGROUP2_SUPER_MAGIC, FsType, PROC_SUPER_MAGIC, fstatfs},
    },
};

use serde::{Deserialize, Serialize};

use super::as_caller::{self, AsCallerError, Identity, Inside, NamespaceId, View};
use crate::fuse::{self, DeviceNo, Leaving};

#[derive(Debug, thiserror::Error)]
pub enum MountPointError {
    #[error("{0} is not an absolute path")]
    Relative(PathBuf),
    #[error("{0} is a file, not a directory; name another mount point")]
    NotADirectory(PathBuf),
    #[error("{0} is not empty; name an empty or a new directory as mount point")]
    NotEmpty(PathBuf),
    #[error(
        "{0} is a mount whose agent is gone (\"Transport endpoint is not connected\"); `grid-mount unmount {0}` clears it"
    )]
    Stale(PathBuf),
    #[error("{path} cannot be used as a mount point")]
    Unusable {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{0} belongs to another user; mount on an empty directory of your own, or on a new one")]
    NotOwned(PathBuf),
    #[error("there is a symbolic link in {0}; name the directory that it stands for")]
    Symlink(PathBuf),
    #[error("{0} lies in a file system of the kernel's own; name a directory elsewhere")]
    KernelsOwn(PathBuf),
    #[error("{path} cannot be looked at as you")]
    AsCaller {
        path: PathBuf,
        #[source]
        source: AsCallerError,
    },
}

/// sysfs, debugfs, tracefs, securityfs, bpf, devpts, cgroup: what is mounted there changes what programs
/// believe of the kernel.
const KERNELS_OWN: [i64; 9] = [
    0x6265_6572,
    0x6462_6720,
    0x7472_6163,
    0x7363_6673,
    0xcafe_4a11,
    0x1cd1,
    PROC_SUPER_MAGIC.0,
    CGROUP_SUPER_MAGIC.0,
    CGROUP2_SUPER_MAGIC.0,
];

/// A directory of a caller's, open and checked. Directories that were made for it go with it, unless it
/// becomes a [`MountPoint`].
#[derive(Debug)]
pub struct Prepared {
    view: Arc<View>,
    /// As the caller named it.
    named: PathBuf,
    /// From the root of the namespace.
    place: PathBuf,
    dir: OwnedFd,
    created: Created,
}

/// Directories that were made with a caller's rights, outermost first, and the ones they are in.
#[derive(Debug)]
struct Created {
    view: Arc<View>,
    made: Vec<(OwnedFd, CString)>,
}

impl Drop for Created {
    fn drop(&mut self) {
        let made = std::mem::take(&mut self.made);
        if made.is_empty() {
            return;
        }
        // Whatever cannot be removed is in use by now.
        let _ = self.view.work(move |inside| {
            for (parent, name) in made.into_iter().rev() {
                if inside.remove(parent.as_fd(), &name).is_err() {
                    break;
                }
            }
        });
    }
}

impl Prepared {
    /// Opens or makes `path` as the caller whose view this is. Blocking.
    pub fn new(view: &Arc<View>, path: &Path) -> Result<Self, MountPointError> {
        let plain = |path: &Path| {
            path.components()
                .all(|part| matches!(part, Component::RootDir | Component::Normal(_)))
        };
        if !path.is_absolute() || !plain(path) {
            return Err(MountPointError::Relative(path.to_owned()));
        }
        let (for_work, named) = (Arc::clone(view), path.to_owned());
        view.work(move |inside| Self::open(for_work, inside, named))
            .map_err(|source| MountPointError::AsCaller {
                path: path.to_owned(),
                source,
            })?
    }

    fn open(view: Arc<View>, inside: &Inside, named: PathBuf) -> Result<Self, MountPointError> {
        let failed = |errno: Errno| match errno {
            Errno::ELOOP => MountPointError::Symlink(named.clone()),
            Errno::ENOTDIR => MountPointError::NotADirectory(named.clone()),
            Errno::ENOTCONN => MountPointError::Stale(named.clone()),
            errno => MountPointError::Unusable {
                path: named.clone(),
                source: errno.into(),
            },
        };
        let mut created = Created {
            view: Arc::clone(&view),
            made: Vec::new(),
        };
        let mut dir = inside
            .root()
            .try_clone_to_owned()
            .map_err(|source| MountPointError::Unusable {
                path: named.clone(),
                source,
            })?;
        for part in named.components() {
            let Component::Normal(name) = part else { continue };
            let next = match inside.directory(dir.as_fd(), Path::new(name)) {
                Err(Errno::ENOENT) => {
                    match mkdirat(&dir, name, Mode::from_bits_truncate(0o755)) {
                        Ok(()) => {
                            let parent = dir.try_clone().map_err(|error| failed(errno_of(&error)))?;
                            let name = CString::new(name.as_bytes()).map_err(|_| failed(Errno::EINVAL))?;
                            created.made.push((parent, name));
                        }
                        Err(Errno::EEXIST) => {}
                        Err(errno) => return Err(failed(errno)),
                    }
                    inside.directory(dir.as_fd(), Path::new(name))
                }
                other => other,
            };
            dir = next.map_err(failed)?;
        }
        let identity = view.identity();
        let kind = fstatfs(&dir).map_err(failed)?.filesystem_type();
        if is_kernels_own(kind) {
            return Err(MountPointError::KernelsOwn(named));
        }
        if identity.uid != 0 && inside.owner_of(dir.as_fd()).map_err(failed)? != identity.uid {
            return Err(MountPointError::NotOwned(named));
        }
        let read = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let mut entries = Dir::openat(&dir, ".", read, Mode::empty()).map_err(failed)?;
        for entry in entries.iter() {
            let entry = entry.map_err(failed)?;
            if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
                return Err(MountPointError::NotEmpty(named));
            }
        }
        let place = inside.path_of(dir.as_fd()).map_err(failed)?;
        Ok(Self {
            view,
            named,
            place,
            dir,
            created,
        })
    }

    pub fn place(&self) -> &Path {
        &self.place
    }

    pub fn namespace(&self) -> NamespaceId {
        self.view.id()
    }

    /// As a mount point, and what it takes to mount on it. What was made for it goes with the former.
    pub fn ready(mut self) -> (MountPoint, Target) {
        let made = std::mem::take(&mut self.created.made).len();
        let mut created: Vec<PathBuf> = self.place.ancestors().take(made).map(Path::to_owned).collect();
        created.reverse();
        let point = MountPoint {
            path: self.named,
            created,
            of: Some(Elsewhere {
                identity: self.view.identity().clone(),
                namespace: self.view.id(),
                place: self.place,
            }),
        };
        let target = Target {
            view: self.view,
            dir: self.dir,
        };
        (point, target)
    }
}

/// An open directory of a caller's, to be mounted on.
#[derive(Debug)]
pub struct Target {
    view: Arc<View>,
    dir: OwnedFd,
}

impl Target {
    /// Puts a detached mount there. Blocking.
    pub fn attach(&self, mount: BorrowedFd<'_>) -> io::Result<()> {
        let (mount, dir) = (mount.try_clone_to_owned()?, self.dir.try_clone()?);
        let attached = self.view.work(move |inside| match inside.commit() {
            true => fuse::attach_on(mount.as_fd(), dir.as_fd()),
            false => Err(io::ErrorKind::TimedOut.into()),
        });
        attached.map_err(io::Error::other)?
    }
}

fn errno_of(error: &io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

fn is_kernels_own(kind: FsType) -> bool {
    KERNELS_OWN.contains(&{ kind.0 })
}

/// Whose a mount point is, and in which namespace, where it is not simply this process's own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Elsewhere {
    pub identity: Identity,
    pub namespace: NamespaceId,
    /// From the root of the namespace.
    pub place: PathBuf,
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LeaveError {
    #[error("it is in use")]
    Busy,
    #[error(transparent)]
    AsCaller(#[from] AsCallerError),
    #[error("the kernel refused")]
    Kernel(#[source] io::Error),
}

impl Elsewhere {
    /// A mount of this process's user in its own namespace.
    pub fn here(identity: Identity, place: &Path) -> io::Result<Self> {
        Ok(Self {
            identity,
            namespace: NamespaceId::own()?,
            place: place.to_owned(),
        })
    }

    /// Takes the mount of `device` away from wherever it is in the namespace. No path of the caller's is
    /// walked with root's rights, and none through a symbolic link. `Ok(false)`: marked as unused.
    /// Blocking.
    pub fn unmount(&self, device: DeviceNo, leaving: Leaving) -> Result<bool, LeaveError> {
        let own = NamespaceId::own().map_err(LeaveError::Kernel)?;
        let seen_by = match self.namespace == own {
            true => PathBuf::from("/proc/self"),
            // Without a process the namespace has gone, and the mount with it.
            false => match as_caller::find(self.namespace) {
                Some((_, process)) => process,
                None => return Ok(true),
            },
        };
        let places: Vec<PathBuf> = fuse::mounts_of(&seen_by)
            .map_err(LeaveError::Kernel)?
            .into_iter()
            .filter(|mount| mount.device == device)
            .map(|mount| mount.mount_point)
            .collect();
        let mut gone = true;
        // The last one made first: it may have been bound to a second place below the first.
        for place in places.into_iter().rev() {
            gone &= match self.leave(&self.identity, &place, device, leaving) {
                // Where the caller cannot reach it, somebody else has bound it.
                Err(LeaveError::Kernel(error)) if error.raw_os_error() == Some(Errno::EACCES as i32) => {
                    let root = Identity {
                        uid: 0,
                        gid: 0,
                        groups: Vec::new(),
                    };
                    self.leave(&root, &place, device, leaving)?
                }
                left => left?,
            };
        }
        Ok(gone)
    }

    fn leave(
        &self,
        identity: &Identity,
        place: &Path,
        device: DeviceNo,
        leaving: Leaving,
    ) -> Result<bool, LeaveError> {
        let view = Arc::new(View::of_namespace(identity.clone(), self.namespace)?);
        let (Some(parent), Some(name)) = (place.parent(), place.file_name()) else {
            return Err(LeaveError::Kernel(io::ErrorKind::InvalidInput.into()));
        };
        let parent = below_root(parent);
        let name = CString::new(name.as_bytes()).map_err(|error| LeaveError::Kernel(error.into()))?;
        let left = view.work(move |inside| -> io::Result<bool> {
            let parent = inside.directory(inside.root(), &parent)?;
            inside.stand_in(parent.as_fd())?;
            match inside.commit() {
                true => fuse::unmount_beside(&name, device, leaving),
                false => Err(io::ErrorKind::TimedOut.into()),
            }
        })?;
        left.map_err(|error| match error.raw_os_error() {
            Some(libc::EBUSY) => LeaveError::Busy,
            _ => LeaveError::Kernel(error),
        })
    }

    /// Removes directories that were made for it, innermost first, as their owner.
    fn remove(&self, created: Vec<PathBuf>) {
        let Ok(view) = View::of_namespace(self.identity.clone(), self.namespace) else {
            return;
        };
        let _ = Arc::new(view).work(move |inside| {
            for dir in created.iter().rev() {
                let (Some(parent), Some(name)) = (dir.parent(), dir.file_name()) else {
                    break;
                };
                let Ok(parent) = inside.directory(inside.root(), &below_root(parent)) else {
                    break;
                };
                let removed = CString::new(name.as_bytes())
                    .is_ok_and(|name| inside.remove(parent.as_fd(), &name).is_ok());
                if !removed {
                    break;
                }
            }
        });
    }
}

/// Relative to the root; the root itself is `.`.
fn below_root(path: &Path) -> PathBuf {
    match path.strip_prefix("/") {
        Ok(rest) if !rest.as_os_str().is_empty() => rest.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// A directory ready to be mounted on. Directories that were made for it are removed again with it.
#[derive(Debug)]
pub struct MountPoint {
    path: PathBuf,
    /// What was created, outermost first.
    created: Vec<PathBuf>,
    /// Where an agent of many users put it; `None` for a user's own agent.
    of: Option<Elsewhere>,
}

impl MountPoint {
    /// Checks `path`, and creates it with its missing parents (mode 0755 less the umask).
    pub fn prepare(path: &Path) -> Result<Self, MountPointError> {
        if !path.is_absolute() || path.components().any(|part| part == Component::ParentDir) {
            return Err(MountPointError::Relative(path.to_owned()));
        }
        let unusable = |source| MountPointError::Unusable {
            path: path.to_owned(),
            source,
        };
        match fs::metadata(path) {
            Ok(metadata) if !metadata.is_dir() => Err(MountPointError::NotADirectory(path.to_owned())),
            Ok(_) => {
                if fs::read_dir(path).map_err(unusable)?.next().is_some() {
                    return Err(MountPointError::NotEmpty(path.to_owned()));
                }
                let path = fs::canonicalize(path).map_err(unusable)?;
                Ok(Self {
                    path,
                    created: Vec::new(),
                    of: None,
                })
            }
            Err(error) if error.raw_os_error() == Some(nix::libc::ENOTCONN) => {
                Err(MountPointError::Stale(path.to_owned()))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Self::create(path),
            Err(error) => Err(unusable(error)),
        }
    }

    /// One that another agent prepared.
    pub fn inherited(path: PathBuf, created: Vec<PathBuf>) -> Self {
        Self {
            path,
            created,
            of: None,
        }
    }

    /// As one of `elsewhere`.
    pub fn at(mut self, elsewhere: Option<Elsewhere>) -> Self {
        self.of = elsewhere;
        self
    }

    pub fn elsewhere(&self) -> Option<&Elsewhere> {
        self.of.as_ref()
    }

    /// What was made for it, outermost first.
    pub fn created(&self) -> &[PathBuf] {
        &self.created
    }

    /// Leaves to another agent what was made for it.
    pub fn leave(mut self) {
        self.created.clear();
    }

    fn create(path: &Path) -> Result<Self, MountPointError> {
        let mut missing: Vec<&Path> = path
            .ancestors()
            .take_while(|ancestor| fs::symlink_metadata(ancestor).is_err())
            .collect();
        missing.reverse();
        // From here on a failure removes what was made, by Drop.
        let mut made = Self {
            path: path.to_owned(),
            created: Vec::new(),
            of: None,
        };
        for dir in missing {
            match fs::create_dir(dir) {
                Ok(()) => made.created.push(dir.to_owned()),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(source) => {
                    return Err(MountPointError::Unusable {
                        path: dir.to_owned(),
                        source,
                    });
                }
            }
        }
        made.path = fs::canonicalize(path).map_err(|source| MountPointError::Unusable {
            path: path.to_owned(),
            source,
        })?;
        Ok(made)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for MountPoint {
    fn drop(&mut self) {
        if self.created.is_empty() {
            return;
        }
        if let Some(elsewhere) = &self.of {
            return elsewhere.remove(std::mem::take(&mut self.created));
        }
        for dir in self.created.iter().rev() {
            // Another mount may have moved in beside ours; then the directory stays.
            if fs::remove_dir(dir).is_err() {
                break;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_created_goes_and_what_was_there_stays() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("a/b/c");
        let point = MountPoint::prepare(&deep).unwrap();
        assert!(deep.is_dir());
        drop(point);
        assert!(!dir.path().join("a").exists());

        fs::create_dir_all(&deep).unwrap();
        drop(MountPoint::prepare(&deep).unwrap());
        assert!(deep.is_dir());
    }

    #[test]
    fn files_full_directories_and_relative_paths_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "x").unwrap();
        assert!(matches!(
            MountPoint::prepare(&file),
            Err(MountPointError::NotADirectory(_))
        ));
        assert!(matches!(
            MountPoint::prepare(dir.path()),
            Err(MountPointError::NotEmpty(_))
        ));
        assert!(matches!(
            MountPoint::prepare(Path::new("a")),
            Err(MountPointError::Relative(_))
        ));
        assert!(matches!(
            MountPoint::prepare(&file.join("below")),
            Err(MountPointError::Unusable { .. })
        ));
    }
}
