//! A file system on a mount point: the conversation with the kernel.
//!
//! Owns the only use of `fuser`: arguments and replies, I/O modes, kernel tuning, making and ending
//! mounts, and what has to be known to go on with a mount in another process. Must not know catalogs.

use std::{
    ffi::OsString,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
    thread,
};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::{runtime::Handle, sync::watch};

use crate::fs::{GridFs, Owner};

mod counters;
mod errno;
mod fusermount;
mod holders;
mod io_mode;
mod listing;
mod mountinfo;
mod mounting;
mod open_inodes;
mod open_table;
mod page;
mod resume;
mod server;

pub use counters::{Counters, Operation, SlowRead};
pub use holders::Holder;
pub use io_mode::{ChosenIoMode, IoMode, IoModeWish};
pub use mountinfo::{DeviceNo, MountLine, mounts, mounts_of};
pub use mounting::{Leaving, attach_on, unmount_beside};
pub use page::UNHEARD;
use server::{Opens, Server};

/// Each thread of each session has a buffer of 16 MiB, of which it touches little. Lets the allocator take
/// such a buffer from the kernel, as zero pages that cost nothing until they are touched, and give it back at
/// once: by default it would after a while take them from its heap, fill them with zeros, and keep them.
/// For the whole process.
pub fn keep_buffers_out_of_the_heap() {
    #[cfg(target_env = "gnu")]
    {
        const BUFFER: libc::c_int = 16 << 20;
        // Said together: naming the first alone would also end keeping smaller ones for the next use.
        for (parameter, value) in [(libc::M_MMAP_THRESHOLD, BUFFER), (libc::M_TRIM_THRESHOLD, BUFFER)] {
            // SAFETY: two numbers; takes the allocator's own lock.
            if unsafe { libc::mallopt(parameter, value) } == 0 {
                tracing::debug!(parameter, "the allocator stays as it is");
            }
        }
    }
}

/// What `df` and `mount` show as the type: `fuse.grid-mount`.
pub const SUBTYPE: &str = "grid-mount";

/// How a mount is to be.
#[derive(Clone, Debug)]
pub struct MountOptions {
    /// An empty directory.
    pub mount_point: PathBuf,
    /// What `df` and `mount` show as the source.
    pub reference: String,
    pub io_mode: IoModeWish,
    /// Readable by everybody as the modes say, not by the owner alone.
    pub share: bool,
    /// The user whose mount this is.
    pub owner: Owner,
    /// Threads that read requests; all on one descriptor.
    pub threads: usize,
    /// Readahead of the kernel in KiB, where this process may set it (root).
    pub readahead_kib: u32,
    /// Where to write down which inodes are open: what passthrough needs to be resumed. A file of this
    /// mount alone, on a memory file system; the caller removes it when the mount is gone.
    pub open_table: Option<PathBuf>,
}

impl MountOptions {
    pub fn new(mount_point: impl Into<PathBuf>, reference: impl Into<String>, owner: Owner) -> Self {
        Self {
            mount_point: mount_point.into(),
            reference: reference.into(),
            io_mode: IoModeWish::Auto,
            share: false,
            owner,
            threads: thread::available_parallelism().map_or(2, usize::from).clamp(2, 8),
            readahead_kib: 4096,
            open_table: None,
        }
    }
}

/// What was agreed with the kernel at INIT: it is said once per mount, so whoever resumes it needs it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Handshake {
    pub kernel_major: u32,
    pub kernel_minor: u32,
    /// `fuser::InitFlags` as the kernel offered them.
    pub capabilities: u64,
    pub max_readahead: u32,
    pub io_mode: ChosenIoMode,
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MountError {
    #[error("the mount point {path} does not exist")]
    NoMountPoint { path: PathBuf },
    #[error("the mount point {path} is not a directory")]
    NotADirectory { path: PathBuf },
    #[error("the mount point {path} is not empty; name an empty directory or one that does not exist yet")]
    NotEmpty { path: PathBuf },
    #[error("{path} is a mount whose server is gone; unmount it first: `umount -l {path}`")]
    Stale { path: PathBuf },
    #[error("the mount point {path} belongs to another user; mount on a directory of your own")]
    NotOwned { path: PathBuf },
    #[error("cannot look at the mount point {path}")]
    MountPoint {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "there is no /dev/fuse here; load the kernel's module (`modprobe fuse`), or give the container the device (`--device /dev/fuse`)"
    )]
    NoDevice,
    #[error(
        "/dev/fuse is closed to ordinary users here; ask the administrator to open it (`chmod 666 /dev/fuse`)"
    )]
    DeviceNotPermitted,
    #[error("this process may not open /dev/fuse")]
    Device(#[source] io::Error),
    #[error(
        "`fusermount3` is not on the PATH, and only root can mount without it; install it (Debian, Ubuntu, Fedora: package `fuse3`)"
    )]
    NoFusermount,
    #[error(
        "`--share` needs the line `user_allow_other` in /etc/fuse.conf when an ordinary user mounts; ask the administrator"
    )]
    ShareNotAllowed,
    #[error("fusermount3 refused: {said}")]
    Fusermount { said: String },
    #[error("fusermount3")]
    RunFusermount(#[source] io::Error),
    #[error("the kernel refused the mount while {doing}")]
    Kernel {
        doing: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("the first exchange with the kernel failed")]
    Handshake(#[source] io::Error),
    #[error("starting a thread")]
    Thread(#[source] io::Error),
    #[error("the table of open files {path}")]
    OpenTable {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the mount on {path} cannot be resumed")]
    Resume {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UnmountError {
    /// Somebody works in it.
    #[error("{path} is in use{}", held_by(.holders))]
    Busy { path: PathBuf, holders: Vec<Holder> },
    #[error("`fusermount3` is not on the PATH, and only root can unmount without it")]
    NoFusermount,
    #[error("fusermount3 could not unmount {path}: {said}")]
    Fusermount { path: PathBuf, said: String },
    #[error("cannot unmount {path}")]
    Kernel {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

fn held_by(holders: &[Holder]) -> String {
    const SHOWN: usize = 5;
    if holders.is_empty() {
        return " (by a process that this user may not look at)".into();
    }
    let mut text: Vec<String> = holders.iter().take(SHOWN).map(ToString::to_string).collect();
    if holders.len() > SHOWN {
        text.push(format!("{} more", holders.len() - SHOWN));
    }
    format!(" by {}", text.join(", "))
}

/// How the kernel was asked to make a mount, and so how it has to be ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// By system calls, as root.
    Kernel,
    /// Through the set-uid program.
    Fusermount,
}

/// A file system that is being served. Dropping it unmounts lazily; see [`Mounted::leave`].
#[derive(Debug)]
pub struct Mounted {
    options: MountOptions,
    way: Way,
    device: DeviceNo,
    descriptor: Arc<OwnedFd>,
    handshake: Handshake,
    counters: Arc<Counters>,
    ended: watch::Receiver<Option<Ended>>,
    left: bool,
}

/// Why nothing is served any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    Unmounted,
    /// The session broke; the mount may be there still, dead.
    Failed(String),
}

/// Mounts and serves `fs`. Returns when the mount answers. Blocking: forks, or makes system calls that
/// wait for the kernel.
pub fn mount(fs: GridFs, options: MountOptions, runtime: &Handle) -> Result<Mounted, MountError> {
    mounting::check_mount_point(&options.mount_point)?;
    let mount_point = options.mount_point.clone();
    match mounting::Detached::prepare(&options) {
        Ok(detached) => mount_detached(fs, options, detached, runtime, |mount| {
            mounting::attach(mount, &mount_point)
        }),
        // Not root, a container without CAP_SYS_ADMIN, or a kernel without these calls.
        Err(mounting::PrepareError::NotPermitted) => mount_by_fusermount(fs, options, runtime),
        Err(mounting::PrepareError::Failed(error)) => Err(error),
    }
}

/// As [`mount`] for root, but `attach` puts the detached mount where it is to be seen (say, in another
/// process's mount namespace). Nothing is visible before that, and everything is served by then.
pub fn mount_attached_by(
    fs: GridFs,
    options: MountOptions,
    runtime: &Handle,
    attach: impl FnOnce(BorrowedFd<'_>) -> io::Result<()>,
) -> Result<Mounted, MountError> {
    match mounting::Detached::prepare(&options) {
        Ok(detached) => mount_detached(fs, options, detached, runtime, attach),
        Err(mounting::PrepareError::NotPermitted) => Err(MountError::Kernel {
            doing: "opening its context",
            source: io::Error::from_raw_os_error(libc::EPERM),
        }),
        Err(mounting::PrepareError::Failed(error)) => Err(error),
    }
}

fn mount_detached(
    fs: GridFs,
    options: MountOptions,
    detached: mounting::Detached,
    runtime: &Handle,
    attach: impl FnOnce(BorrowedFd<'_>) -> io::Result<()>,
) -> Result<Mounted, MountError> {
    let mounting::Detached { session, mount } = detached;
    let mut mounted = begin(fs, options, Way::Kernel, session, runtime)?;
    // Until it is attached, closing the detached mount is what ends it.
    mounted.left = true;
    mounted.device = mountinfo::device_of(mount.as_fd()).map_err(|source| MountError::Kernel {
        doing: "asking for its device number",
        source,
    })?;
    mounting::raise_readahead(mounted.device, mounted.options.readahead_kib);
    attach(mount.as_fd()).map_err(|source| MountError::Kernel {
        doing: "attaching it",
        source,
    })?;
    mounted.left = false;
    Ok(mounted)
}

fn mount_by_fusermount(fs: GridFs, options: MountOptions, runtime: &Handle) -> Result<Mounted, MountError> {
    let session = fusermount::mount(&options)?;
    let mount_point = options.mount_point.clone();
    let served = begin(fs, options, Way::Fusermount, session, runtime).and_then(|mut mounted| {
        mounted.device = mountinfo::device_at(&mount_point).map_err(|source| MountError::Kernel {
            doing: "asking for its device number",
            source,
        })?;
        Ok(mounted)
    });
    if served.is_err() {
        fusermount::unmount(&mount_point, true).ok();
    }
    served
}

/// Goes on with a mount whose agent is gone: `connection` is a duplicate of its descriptor, `handshake`
/// what was agreed with the kernel. What waits in the kernel is answered from here on. The process that
/// served the mount before must be gone or have stopped reading. Blocking.
pub fn resume(
    fs: GridFs,
    options: MountOptions,
    connection: OwnedFd,
    (handshake, device, way): (Handshake, DeviceNo, Way),
    runtime: &Handle,
) -> Result<Mounted, MountError> {
    let failed = |source| MountError::Resume {
        path: options.mount_point.clone(),
        source,
    };
    let rehearsal = resume::rehearse(&handshake).map_err(failed)?;
    let resume::Rehearsal { session, kernel } = rehearsal;
    let connection = Arc::new(connection);
    let ready = shake_hands(
        fs,
        &options,
        session,
        connection.clone(),
        runtime,
        Some(handshake),
    )?;
    drop(kernel);
    resume::take_over(ready.session.as_fd(), connection.as_fd()).map_err(failed)?;
    if let Err(error) = resume::resend(connection.as_fd()) {
        tracing::warn!(%error, "this kernel cannot resend; requests that were under way are lost");
    }
    serve(options, way, device, connection, ready)
}

/// A session that has shaken hands and does not read yet.
struct Ready {
    session: fuser::Session<Server>,
    handshake: Handshake,
    counters: Arc<Counters>,
}

fn shake_hands(
    fs: GridFs,
    options: &MountOptions,
    session: OwnedFd,
    connection: Arc<OwnedFd>,
    runtime: &Handle,
    resumed: Option<Handshake>,
) -> Result<Ready, MountError> {
    let counters = Arc::new(Counters::default());
    let handshake = Arc::new(Mutex::new(None));
    let opens = match &options.open_table {
        None => Opens::default(),
        Some(path) => Opens::written_to(path).map_err(|source| MountError::OpenTable {
            path: path.clone(),
            source,
        })?,
    };
    let server = Server::new(
        (fs, connection),
        options.io_mode,
        opens,
        counters.clone(),
        runtime.clone(),
        resumed,
        handshake.clone(),
    );
    let mut config = fuser::Config::default();
    config.n_threads = Some(options.threads.max(1));
    // Each clone would have a queue of its own, whose requests die with it and cannot be resent.
    config.clone_fd = false;
    // The kernel enforces `user_id`; fuser would compare with the uid of this process.
    let session = fuser::Session::from_fd(server, session, fuser::SessionACL::All, config)
        .map_err(MountError::Handshake)?;
    let handshake = handshake.lock().clone();
    let handshake =
        handshake.ok_or_else(|| MountError::Handshake(io::Error::other("INIT was not answered")))?;
    Ok(Ready {
        session,
        handshake,
        counters,
    })
}

/// Starts the threads that serve a session.
fn serve(
    options: MountOptions,
    way: Way,
    device: DeviceNo,
    descriptor: Arc<OwnedFd>,
    ready: Ready,
) -> Result<Mounted, MountError> {
    let Ready {
        session,
        handshake,
        counters,
    } = ready;
    let (tell, ended) = watch::channel(None);
    thread::Builder::new()
        .name("grid-session".into())
        .spawn(move || {
            let end = match session.run() {
                Ok(()) => Ended::Unmounted,
                Err(error) => Ended::Failed(error.to_string()),
            };
            tell.send_replace(Some(end));
        })
        .map_err(MountError::Thread)?;
    Ok(Mounted {
        options,
        way,
        device,
        descriptor,
        handshake,
        counters,
        ended,
        left: false,
    })
}

/// Shakes hands on a new connection and starts the threads that serve it.
fn begin(
    fs: GridFs,
    options: MountOptions,
    way: Way,
    session: OwnedFd,
    runtime: &Handle,
) -> Result<Mounted, MountError> {
    let descriptor = Arc::new(session.try_clone().map_err(MountError::Handshake)?);
    let ready = shake_hands(fs, &options, session, descriptor.clone(), runtime, None)?;
    serve(options, way, DeviceNo::default(), descriptor, ready)
}

impl Mounted {
    pub fn options(&self) -> &MountOptions {
        &self.options
    }

    pub fn mount_point(&self) -> &Path {
        &self.options.mount_point
    }

    /// As in `/proc/self/mountinfo` and `/sys/class/bdi`.
    pub fn device(&self) -> DeviceNo {
        self.device
    }

    pub fn io_mode(&self) -> &ChosenIoMode {
        &self.handshake.io_mode
    }

    pub fn handshake(&self) -> &Handshake {
        &self.handshake
    }

    pub fn way(&self) -> Way {
        self.way
    }

    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// The connection with the kernel: as long as a duplicate of it is open somewhere, the mount lives.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }

    /// Ends when the mount is gone, whoever unmounted it.
    pub async fn wait(&self) -> Ended {
        let mut ended = self.ended.clone();
        match ended.wait_for(Option::is_some).await {
            Ok(end) => end.clone().unwrap_or(Ended::Unmounted),
            Err(_) => Ended::Failed("the session's thread panicked".into()),
        }
    }

    /// Who keeps it busy.
    pub fn holders(&self) -> Vec<Holder> {
        holders::holders(self.mount_point(), Some(self.device))
    }

    pub fn has_ended(&self) -> bool {
        self.ended.borrow().is_some()
    }

    /// Takes the mount away, wherever it is by now. `lazy` does it even while somebody works in it: it
    /// disappears from the tree of files, and is served until the last of them is done. Blocking.
    pub fn unmount(&self, lazy: bool) -> Result<(), UnmountError> {
        mounting::unmount(self.device, self.mount_point(), self.way, lazy)
    }

    /// Forgets the mount without unmounting it: another process has, or will get, its descriptor.
    pub fn leave(mut self) {
        self.left = true;
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if !self.left
            && !self.has_ended()
            && let Err(error) = self.unmount(true)
        {
            tracing::warn!(mount_point = %self.mount_point().display(), %error, "left mounted");
        }
    }
}

/// Unmounts a mount that no living [`Mounted`] stands for (one whose agent died). Blocking.
pub fn unmount_at(mount_point: &Path, lazy: bool) -> Result<(), UnmountError> {
    let way = if nix::unistd::geteuid().is_root() {
        Way::Kernel
    } else {
        Way::Fusermount
    };
    mounting::unmount_path(mount_point, None, way, lazy)
}

/// Where programs are looked for.
fn program_on_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_else(|| OsString::from("/usr/bin:/bin"));
    std::env::split_paths(&path)
        .map(|dir| dir.join(name))
        .find(|file| nix::unistd::access(file, nix::unistd::AccessFlags::X_OK).is_ok())
}
