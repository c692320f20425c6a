//! Making a mount by system calls, and taking one away.
//!
//! A mount is made detached: `fsopen`, `fsmount`, INIT, threads, and only then `move_mount`. A crash on
//! the way leaves nothing visible.

use std::{
    ffi::{CStr, CString},
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
};

use nix::mount::{MntFlags, umount2};

use super::{
    DeviceNo, MountError, MountOptions, SUBTYPE, UnmountError, Way, fusermount, holders::holders, mountinfo,
};

/// The directory the mount will cover.
pub(super) fn check_mount_point(path: &Path) -> Result<(), MountError> {
    let failed = |source: io::Error| match source.raw_os_error() {
        Some(libc::ENOENT) => MountError::NoMountPoint { path: path.into() },
        Some(libc::ENOTCONN) => MountError::Stale { path: path.into() },
        Some(libc::ENOTDIR) => MountError::NotADirectory { path: path.into() },
        _ => MountError::MountPoint {
            path: path.into(),
            source,
        },
    };
    if !std::fs::metadata(path).map_err(failed)?.is_dir() {
        return Err(MountError::NotADirectory { path: path.into() });
    }
    if std::fs::read_dir(path).map_err(failed)?.next().is_some() {
        return Err(MountError::NotEmpty { path: path.into() });
    }
    Ok(())
}

/// A mount that nobody can see yet.
pub(super) struct Detached {
    /// The connection with the kernel.
    pub session: OwnedFd,
    pub mount: OwnedFd,
}

pub(super) enum PrepareError {
    /// Another way of mounting may work.
    NotPermitted,
    Failed(MountError),
}

impl Detached {
    pub(super) fn prepare(options: &MountOptions) -> Result<Self, PrepareError> {
        let doing = |doing| {
            move |source: io::Error| match source.raw_os_error() {
                Some(libc::EPERM | libc::ENOSYS) => PrepareError::NotPermitted,
                _ => PrepareError::Failed(MountError::Kernel { doing, source }),
            }
        };
        let context = open_context().map_err(doing("opening its context"))?;
        let session: OwnedFd = match File::options().read(true).write(true).open("/dev/fuse") {
            Ok(file) => file.into(),
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::ENOENT | libc::ENODEV | libc::ENXIO)
                ) =>
            {
                return Err(PrepareError::Failed(MountError::NoDevice));
            }
            Err(error) => return Err(PrepareError::Failed(MountError::Device(error))),
        };
        let set = |key: &str, value: &str| configure(context.as_fd(), key, Some(value));
        let set_all = || -> io::Result<()> {
            set("source", &options.reference)?;
            set("subtype", SUBTYPE)?;
            set("fd", &session.as_raw_fd().to_string())?;
            set("rootmode", "40755")?;
            set("user_id", &options.owner.uid.to_string())?;
            set("group_id", &options.owner.gid.to_string())?;
            // Of the file system, not only of this mount: or the kernel keeps access times.
            configure(context.as_fd(), "ro", None)?;
            if options.share {
                configure(context.as_fd(), "allow_other", None)?;
                configure(context.as_fd(), "default_permissions", None)?;
            }
            Ok(())
        };
        set_all().map_err(doing("taking its options"))?;
        create(context.as_fd()).map_err(doing("making the file system"))?;
        let mount = mount_detached(context.as_fd()).map_err(doing("making the mount"))?;
        Ok(Self { session, mount })
    }
}

fn result(value: libc::c_long) -> io::Result<libc::c_long> {
    if value < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(value)
    }
}

fn descriptor(value: libc::c_long) -> io::Result<OwnedFd> {
    let raw = i32::try_from(result(value)?).map_err(io::Error::other)?;
    // SAFETY: the system call returned this descriptor just now, so it is open and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

const FSOPEN_CLOEXEC: u32 = 1;
const FSMOUNT_CLOEXEC: u32 = 1;
const FSCONFIG_SET_FLAG: u32 = 0;
const FSCONFIG_SET_STRING: u32 = 1;
const FSCONFIG_CMD_CREATE: u32 = 6;
const MOUNT_ATTR_RDONLY: u64 = 0x1;
const MOUNT_ATTR_NOSUID: u64 = 0x2;
const MOUNT_ATTR_NODEV: u64 = 0x4;
const MOVE_MOUNT_F_EMPTY_PATH: u32 = 0x4;
const MOVE_MOUNT_T_EMPTY_PATH: u32 = 0x40;

fn open_context() -> io::Result<OwnedFd> {
    // SAFETY: a NUL-terminated string and a flag; the kernel keeps neither.
    descriptor(unsafe { libc::syscall(libc::SYS_fsopen, c"fuse".as_ptr(), FSOPEN_CLOEXEC) })
}

/// Sets a value, or a flag if there is none.
fn configure(context: BorrowedFd<'_>, key: &str, value: Option<&str>) -> io::Result<()> {
    let key = CString::new(key)?;
    let value = value.map(CString::new).transpose()?;
    let (command, value) = match &value {
        Some(value) => (FSCONFIG_SET_STRING, value.as_ptr()),
        None => (FSCONFIG_SET_FLAG, std::ptr::null()),
    };
    // SAFETY: `key` and `value` are NUL-terminated strings (or null for a flag) that live through the call.
    result(unsafe {
        libc::syscall(
            libc::SYS_fsconfig,
            context.as_raw_fd(),
            command,
            key.as_ptr(),
            value,
            0,
        )
    })
    .map(drop)
}

fn create(context: BorrowedFd<'_>) -> io::Result<()> {
    let none = std::ptr::null::<libc::c_char>();
    // SAFETY: this command takes neither key nor value.
    result(unsafe {
        libc::syscall(
            libc::SYS_fsconfig,
            context.as_raw_fd(),
            FSCONFIG_CMD_CREATE,
            none,
            none,
            0,
        )
    })
    .map(drop)
}

fn mount_detached(context: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let attributes = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV;
    // SAFETY: only numbers.
    descriptor(unsafe {
        libc::syscall(
            libc::SYS_fsmount,
            context.as_raw_fd(),
            FSMOUNT_CLOEXEC,
            attributes,
        )
    })
}

/// Puts a detached mount on a path of this process's namespace.
pub(super) fn attach(mount: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let empty: &CStr = c"";
    // SAFETY: two NUL-terminated strings that live through the call.
    result(unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            mount.as_raw_fd(),
            empty.as_ptr(),
            libc::AT_FDCWD,
            path.as_ptr(),
            MOVE_MOUNT_F_EMPTY_PATH,
        )
    })
    .map(drop)
}

/// Puts a detached mount on an open directory, wherever that is by now; it must be in the mount namespace
/// of the calling thread.
pub fn attach_on(mount: BorrowedFd<'_>, dir: BorrowedFd<'_>) -> io::Result<()> {
    let empty: &CStr = c"";
    // SAFETY: an empty, NUL-terminated string that lives through the call.
    result(unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            mount.as_raw_fd(),
            empty.as_ptr(),
            dir.as_raw_fd(),
            empty.as_ptr(),
            MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH,
        )
    })
    .map(drop)
}

/// How a mount is to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leaving {
    /// Not while somebody works in it.
    Unused,
    /// Now from the tree of files, and in full with its last user.
    Detached,
    /// Marks it; the second time, if nobody has as much as looked at it since, unmounts it.
    Expired,
}

impl Leaving {
    fn flags(self) -> MntFlags {
        MntFlags::UMOUNT_NOFOLLOW
            | match self {
                Self::Unused => MntFlags::empty(),
                Self::Detached => MntFlags::MNT_DETACH,
                Self::Expired => MntFlags::MNT_EXPIRE,
            }
    }
}

/// Takes away the mount of `device` that lies on `name` in the working directory of the calling thread. No
/// path is walked, so nobody can put another mount in its way. `Ok(false)`: marked, not unmounted.
pub fn unmount_beside(name: &CStr, device: DeviceNo, leaving: Leaving) -> io::Result<bool> {
    let name = Path::new(std::ffi::OsStr::from_bytes(name.to_bytes()));
    // Looking would be use, and take the mark away.
    if leaving != Leaving::Expired && mountinfo::device_at(name)? != device {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    match umount2(name, leaving.flags()) {
        Ok(()) => Ok(true),
        Err(nix::errno::Errno::EAGAIN) if leaving == Leaving::Expired => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// The kernel offers 128 KiB whatever it is asked at INIT; root can raise it afterwards. Without that
/// the mount is slower, not wrong.
pub(super) fn raise_readahead(device: DeviceNo, kib: u32) {
    let path = format!("/sys/class/bdi/{device}/read_ahead_kb");
    if let Err(error) = std::fs::write(&path, kib.to_string()) {
        tracing::debug!(%path, %error, "readahead stays as the kernel chose it");
    }
}

/// Takes the mount of `device` away from wherever it is in this namespace; nothing to do if it is
/// nowhere. `usual` is where it was put.
pub(super) fn unmount(device: DeviceNo, usual: &Path, way: Way, lazy: bool) -> Result<(), UnmountError> {
    let mounts = mountinfo::mounts().map_err(|source| UnmountError::Kernel {
        path: usual.into(),
        source,
    })?;
    let paths: Vec<PathBuf> = mounts
        .into_iter()
        .filter(|mount| mount.device == device)
        .map(|mount| mount.mount_point)
        .collect();
    // The last one made first, in case it was bound to a second place below the first.
    paths
        .iter()
        .rev()
        .try_for_each(|path| unmount_path(path, Some(device), way, lazy))
}

pub(super) fn unmount_path(
    path: &Path,
    device: Option<DeviceNo>,
    way: Way,
    lazy: bool,
) -> Result<(), UnmountError> {
    let busy = || UnmountError::Busy {
        path: path.into(),
        holders: holders(path, device),
    };
    match way {
        Way::Kernel => {
            let leaving = match lazy {
                true => Leaving::Detached,
                false => Leaving::Unused,
            };
            // The directory stays open while the path by way of it is used.
            let (_above, path_now) = without_links(path).map_err(|source| UnmountError::Kernel {
                path: path.into(),
                source,
            })?;
            match umount2(&path_now, leaving.flags()) {
                Ok(()) => Ok(()),
                Err(nix::errno::Errno::EBUSY) => Err(busy()),
                Err(error) => Err(UnmountError::Kernel {
                    path: path.into(),
                    source: error.into(),
                }),
            }
        }
        Way::Fusermount => match fusermount::unmount(path, lazy) {
            Err(UnmountError::Fusermount { said, .. }) if said.contains("busy") => Err(busy()),
            other => other,
        },
    }
}

/// The directory that a mount lies in, open, and the mount's path by way of it: nobody who may rename
/// something above can lead root elsewhere with a symbolic link. Nothing looks at the mount itself.
fn without_links(path: &Path) -> io::Result<(Option<OwnedFd>, PathBuf)> {
    use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, openat2};
    let (Some(above), Some(name)) = (path.parent(), path.file_name()) else {
        return Ok((None, path.to_owned()));
    };
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_NO_SYMLINKS);
    let above = openat2(AT_FDCWD, above, how)?;
    let path = PathBuf::from(format!("/proc/self/fd/{}", above.as_raw_fd())).join(name);
    Ok((Some(above), path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_point_is_an_empty_directory() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::create_dir(path("empty")).unwrap();
        std::fs::write(path("file"), "").unwrap();
        assert!(check_mount_point(&path("empty")).is_ok());
        assert!(matches!(
            check_mount_point(&path("absent")),
            Err(MountError::NoMountPoint { .. })
        ));
        assert!(matches!(
            check_mount_point(&path("file")),
            Err(MountError::NotADirectory { .. })
        ));
        assert!(matches!(
            check_mount_point(&path("file/below")),
            Err(MountError::NotADirectory { .. })
        ));
        assert!(matches!(
            check_mount_point(dir.path()),
            Err(MountError::NotEmpty { .. })
        ));
    }
}
