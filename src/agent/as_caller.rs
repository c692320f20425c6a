//! Doing a piece of work as a caller would do it: in the caller's mount namespace, below the caller's root,
//! with the caller's ids and none of root's rights over files.
//!
//! A thread of its own does it, since namespace and ids of files are a thread's. It ends afterwards, so
//! nothing of the caller's is left on any other thread.

use std::{
    collections::BTreeMap,
    ffi::CStr,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
        mpsc,
    },
    time::Duration,
};

use nix::{
    errno::Errno,
    fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, open, openat, openat2, readlinkat},
    sched::{CloneFlags, setns, unshare},
    sys::stat::{Mode, fstat, fstatat},
    unistd::{Gid, Uid, fchdir, setfsgid, setfsuid},
};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

/// A caller's file system may never answer: then the work is given up.
const DEADLINE: Duration = Duration::from_secs(20);
/// Pieces of work of one user at a time, given up ones among them.
const MAX_PER_USER: usize = 32;

static AT_WORK: Mutex<BTreeMap<u32, usize>> = Mutex::new(BTreeMap::new());

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AsCallerError {
    #[error("the process that asked has gone")]
    Gone,
    #[error("the process that asked cannot be seen from here (another pid namespace)")]
    Unseen,
    #[error("its mount namespace has no process any more")]
    NoProcess,
    #[error("the caller's view of files cannot be taken while {doing}")]
    View {
        doing: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("the caller's file system did not answer within {} s", DEADLINE.as_secs())]
    Late,
    #[error("this user has {MAX_PER_USER} such requests under way")]
    TooMany,
}

/// With whose rights files are used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    pub uid: u32,
    pub gid: u32,
    /// Supplementary ones.
    pub groups: Vec<u32>,
}

/// A mount namespace, by the number that the kernel gives it. Does not keep it alive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct NamespaceId(u64);

impl NamespaceId {
    pub fn own() -> io::Result<Self> {
        let here = open(
            "/proc/self/ns/mnt",
            OFlag::O_RDONLY | OFlag::O_CLOEXEC,
            Mode::empty(),
        )?;
        Self::of(here.as_fd())
    }

    fn of(namespace: BorrowedFd<'_>) -> io::Result<Self> {
        Ok(Self(fstat(namespace)?.st_ino))
    }
}

/// From where work is done. Keeps the namespace alive: not to be kept.
#[derive(Debug)]
pub struct View {
    identity: Identity,
    id: NamespaceId,
    /// `None`: this process's own.
    namespace: Option<OwnedFd>,
    /// `None`: the namespace's.
    root: Option<OwnedFd>,
}

fn doing(doing: &'static str) -> impl Fn(Errno) -> AsCallerError {
    move |errno| AsCallerError::View {
        doing,
        source: errno.into(),
    }
}

impl View {
    /// What the process `pid` sees, which `pidfd` stands for.
    pub fn of_process(identity: Identity, pid: i32, pidfd: BorrowedFd<'_>) -> Result<Self, AsCallerError> {
        let gone = |errno| match errno {
            Errno::ENOENT | Errno::ESRCH => AsCallerError::Gone,
            errno => doing("looking at the process that asked")(errno),
        };
        let directory = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let process = open(&*format!("/proc/{pid}"), directory, Mode::empty()).map_err(gone)?;
        let read = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let namespace = openat(&process, "ns/mnt", read, Mode::empty()).map_err(gone)?;
        let root = openat(&process, "root", directory, Mode::empty()).map_err(gone)?;
        let status = openat(&process, "status", read, Mode::empty()).map_err(gone)?;
        let status = io::read_to_string(std::fs::File::from(status)).map_err(|_| AsCallerError::Gone)?;
        // Only now: as long as it lives its number is its own, so what was opened is of this process.
        if !is_alive(pidfd) || effective_uid(&status) != Some(identity.uid) {
            return Err(AsCallerError::Gone);
        }
        let id = NamespaceId::of(namespace.as_fd()).map_err(view_error("naming its mount namespace"))?;
        let own = NamespaceId::own().map_err(view_error("naming the own mount namespace"))?;
        Ok(Self {
            identity,
            id,
            namespace: (id != own).then_some(namespace),
            root: Some(root),
        })
    }

    /// Of a namespace that was seen before, from its root.
    pub fn of_namespace(identity: Identity, id: NamespaceId) -> Result<Self, AsCallerError> {
        let own = NamespaceId::own().map_err(view_error("naming the own mount namespace"))?;
        let namespace = match id == own {
            true => None,
            false => Some(find(id).ok_or(AsCallerError::NoProcess)?.0),
        };
        Ok(Self {
            identity,
            id,
            namespace,
            root: None,
        })
    }

    /// Of this process's own namespace.
    pub fn of_own_namespace(identity: Identity) -> Result<Self, AsCallerError> {
        let own = NamespaceId::own().map_err(view_error("naming the own mount namespace"))?;
        Self::of_namespace(identity, own)
    }

    pub fn id(&self) -> NamespaceId {
        self.id
    }

    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Does `work`; blocking, for as long as the deadline at most.
    pub fn work<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Inside) -> T + Send + 'static,
    ) -> Result<T, AsCallerError> {
        let place = Place::take(self.identity.uid)?;
        let view = Arc::clone(self);
        let commit = Arc::new(AtomicU8::new(OPEN));
        let (sender, receiver) = mpsc::sync_channel(1);
        let inside_commit = Arc::clone(&commit);
        std::thread::Builder::new()
            .name("grid-as-caller".into())
            .spawn(move || {
                let _place = place;
                let result = view.enter(inside_commit).map(|inside| work(&inside));
                // Nobody waits any more: what was made is taken back by being dropped.
                let _ = sender.send(result);
            })
            .map_err(view_error("starting a thread"))?;
        match receiver.recv_timeout(DEADLINE) {
            Ok(result) => result,
            Err(mpsc::RecvTimeoutError::Disconnected) => Err(AsCallerError::Late),
            Err(mpsc::RecvTimeoutError::Timeout) => {
                let given_up = commit
                    .compare_exchange(OPEN, GIVEN_UP, Ordering::SeqCst, Ordering::SeqCst)
                    .is_ok();
                match given_up {
                    true => Err(AsCallerError::Late),
                    // What cannot be taken back asks no file system any more, so this comes at once.
                    false => receiver
                        .recv_timeout(DEADLINE)
                        .unwrap_or(Err(AsCallerError::Late)),
                }
            }
        }
    }

    /// Makes the calling thread, which must be a new one, see as the caller does.
    fn enter(&self, commit: Arc<AtomicU8>) -> Result<Inside, AsCallerError> {
        unshare(CloneFlags::CLONE_FS).map_err(doing("leaving the other threads' root"))?;
        let directory = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        // Before the namespace changes: there may be no /proc there.
        let descriptors =
            open("/proc/self/fd", directory, Mode::empty()).map_err(doing("opening /proc/self/fd"))?;
        if let Some(namespace) = &self.namespace {
            setns(namespace, CloneFlags::CLONE_NEWNS).map_err(doing("entering its mount namespace"))?;
        }
        nix::sys::stat::umask(Mode::from_bits_truncate(0o022));
        let root = match &self.root {
            Some(root) => root.try_clone().map_err(view_error("opening its root"))?,
            None => open("/", directory, Mode::empty()).map_err(doing("opening its root"))?,
        };
        become_user(&self.identity).map_err(view_error("taking its ids"))?;
        Ok(Inside {
            root,
            descriptors,
            commit,
        })
    }
}

fn view_error(doing: &'static str) -> impl Fn(io::Error) -> AsCallerError {
    move |source| AsCallerError::View { doing, source }
}

/// Takes the ids for files of the calling thread; with them root's rights over files go.
fn become_user(identity: &Identity) -> io::Result<()> {
    // Not glibc's function, which changes every thread of the process.
    // SAFETY: a pointer to as many group ids as said, alive during the call.
    let set = unsafe { libc_setgroups(identity.groups.len(), identity.groups.as_ptr()) };
    if set != 0 {
        return Err(io::Error::last_os_error());
    }
    let (uid, gid) = (Uid::from_raw(identity.uid), Gid::from_raw(identity.gid));
    setfsgid(gid);
    setfsuid(uid);
    // These two do not say whether they worked; asked with an id that nobody has, they say what is.
    let nobody = u32::MAX;
    if setfsgid(Gid::from_raw(nobody)) != gid || setfsuid(Uid::from_raw(nobody)) != uid {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    Ok(())
}

/// # Safety
/// `groups` must point to `count` ids.
unsafe fn libc_setgroups(count: usize, groups: *const u32) -> libc::c_long {
    // SAFETY: the caller's promise.
    unsafe { libc::syscall(libc::SYS_setgroups, count, groups) }
}

fn is_alive(pidfd: BorrowedFd<'_>) -> bool {
    let none = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: signal 0 is never delivered; no siginfo, no flags.
    let sent = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), 0, none, 0) };
    sent == 0
}

/// The second number of the line `Uid:`: real, effective, saved, of files.
fn effective_uid(status: &str) -> Option<u32> {
    let line = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    line.split_ascii_whitespace().nth(1)?.parse().ok()
}

/// A namespace that some process is in, and that process's directory in `/proc`.
pub fn find(id: NamespaceId) -> Option<(OwnedFd, PathBuf)> {
    let processes = std::fs::read_dir("/proc").ok()?;
    processes
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| {
            let name = path.file_name().and_then(|name| name.to_str());
            name.is_some_and(|name| name.bytes().all(|byte| byte.is_ascii_digit()))
        })
        .find_map(|path| {
            let read = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
            let namespace = open(&path.join("ns/mnt"), read, Mode::empty()).ok()?;
            (NamespaceId::of(namespace.as_fd()).ok()? == id).then_some((namespace, path))
        })
}

/// One of a user's pieces of work under way.
struct Place(u32);

impl Place {
    fn take(uid: u32) -> Result<Self, AsCallerError> {
        let mut at_work = AT_WORK.lock();
        let count = at_work.entry(uid).or_default();
        if *count >= MAX_PER_USER {
            return Err(AsCallerError::TooMany);
        }
        *count += 1;
        Ok(Self(uid))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut at_work = AT_WORK.lock();
        if let Some(count) = at_work.get_mut(&self.0) {
            *count -= 1;
            if *count == 0 {
                at_work.remove(&self.0);
            }
        }
    }
}

const OPEN: u8 = 0;
const COMMITTED: u8 = 1;
const GIVEN_UP: u8 = 2;

/// What a piece of work has: it runs on a thread that sees as the caller does.
pub struct Inside {
    root: OwnedFd,
    /// This process's `/proc/self/fd`.
    descriptors: OwnedFd,
    commit: Arc<AtomicU8>,
}

impl Inside {
    pub fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// One directory below another; never through a symbolic link.
    pub fn directory(&self, parent: BorrowedFd<'_>, name: &Path) -> nix::Result<OwnedFd> {
        let how = OpenHow::new()
            .flags(OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_BENEATH);
        loop {
            match openat2(parent, name, how) {
                Err(Errno::EINTR | Errno::EAGAIN) => {}
                other => return other,
            }
        }
    }

    /// Where an open directory is, from the namespace's root.
    pub fn path_of(&self, dir: BorrowedFd<'_>) -> nix::Result<PathBuf> {
        readlinkat(&self.descriptors, &*dir.as_raw_fd().to_string()).map(PathBuf::from)
    }

    /// From here on nothing can be taken back; false if nobody wants it any more.
    pub fn commit(&self) -> bool {
        self.commit
            .compare_exchange(OPEN, COMMITTED, Ordering::SeqCst, Ordering::SeqCst)
            .is_ok()
    }

    /// Makes an open directory the working directory of this thread.
    pub fn stand_in(&self, parent: BorrowedFd<'_>) -> nix::Result<()> {
        fchdir(parent)
    }

    pub fn remove(&self, parent: BorrowedFd<'_>, name: &CStr) -> nix::Result<()> {
        nix::unistd::unlinkat(parent, name, nix::unistd::UnlinkatFlags::RemoveDir)
    }

    /// Who owns an open directory.
    pub fn owner_of(&self, dir: BorrowedFd<'_>) -> nix::Result<u32> {
        fstatat(dir, "", AtFlags::AT_EMPTY_PATH).map(|stat| stat.st_uid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(uid: u32) -> Option<Arc<View>> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("SKIPPED: another user's view: the tests do not run as root");
            return None;
        }
        let identity = Identity {
            uid,
            gid: uid,
            groups: vec![uid],
        };
        let own = NamespaceId::own().unwrap();
        Some(Arc::new(View::of_namespace(identity, own).unwrap()))
    }

    #[test]
    fn work_is_done_with_the_callers_rights_and_nobody_else_is_changed() {
        let Some(view) = view(4711) else { return };
        let dir = tempfile::tempdir().unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o700);
        std::fs::set_permissions(dir.path(), mode).unwrap();
        let path = dir.path().strip_prefix("/").unwrap().join(".");
        let refused = view
            .work(move |inside| inside.directory(inside.root(), &path).map(drop))
            .unwrap();
        assert_eq!(refused, Err(Errno::EACCES));
        std::fs::read_dir(dir.path()).unwrap();
        let (uid, groups) = view
            .work(|_| {
                let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
                let line = |name| {
                    let found = status.lines().find(|line| line.starts_with(name)).unwrap();
                    found.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
                };
                (line("Uid:"), line("Groups:"))
            })
            .unwrap();
        assert_eq!(uid, ["Uid:", "0", "0", "0", "4711"]);
        assert_eq!(groups, ["Groups:", "4711"]);
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        assert!(status.contains("Uid:\t0\t0\t0\t0"), "{status}");
    }

    #[test]
    fn one_user_cannot_take_every_thread() {
        let Some(view) = view(4712) else { return };
        let gate = Arc::new(std::sync::Barrier::new(MAX_PER_USER + 1));
        let workers: Vec<_> = (0..MAX_PER_USER)
            .map(|_| {
                let (view, gate) = (Arc::clone(&view), Arc::clone(&gate));
                std::thread::spawn(move || {
                    view.work(move |_| {
                        gate.wait();
                        gate.wait();
                    })
                })
            })
            .collect();
        gate.wait();
        assert!(matches!(view.work(|_| ()), Err(AsCallerError::TooMany)));
        gate.wait();
        for worker in workers {
            worker.join().unwrap().unwrap();
        }
        view.work(|_| ()).unwrap();
    }
}
