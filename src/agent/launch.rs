//! A user's own agent: where its socket is, that there is only one, and starting it on demand.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read, Write},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::{
            fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt},
            process::CommandExt,
        },
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use nix::{
    fcntl::{Flock, FlockArg},
    unistd::Uid,
};

/// The system's agent.
pub const SYSTEM_SOCKET: &str = "/run/grid-mount/agent.sock";

/// A new agent opens a cache and binds a socket; more than this means that it hangs.
const START_DEADLINE: Duration = Duration::from_secs(20);

#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    #[error(
        "{dir} cannot be used for the agent's socket: {reason}; set XDG_RUNTIME_DIR to a directory of your own"
    )]
    RuntimeDir { dir: PathBuf, reason: String },
    #[error("{dir} is no place for a socket that every user connects to: {reason}")]
    SharedDir { dir: PathBuf, reason: String },
    #[error("{path} cannot be opened")]
    Open {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("an agent already serves {socket}")]
    AlreadyRunning { socket: PathBuf },
    #[error("the agent could not be started")]
    Spawn(#[source] io::Error),
    /// The agent's own words.
    #[error("the agent did not start: {message} (its log: {log})")]
    Failed { message: String, log: PathBuf },
    #[error("the agent was not ready after {} s; its log: {log}", after.as_secs())]
    NotReady { after: Duration, log: PathBuf },
}

/// Where an agent of this user keeps its socket, its lock and its log.
#[derive(Clone, Debug)]
pub struct RuntimeDir {
    dir: PathBuf,
}

impl RuntimeDir {
    /// `$XDG_RUNTIME_DIR/grid-mount`, else `/run/user/UID/grid-mount`, else `/tmp/grid-mount-UID`.
    /// Created with mode 0700; one that belongs to somebody else or that others can enter is refused,
    /// since whoever owns it could answer in our agent's place.
    pub fn of_user(xdg_runtime_dir: Option<&Path>) -> Result<Self, LaunchError> {
        let uid = Uid::effective();
        let per_user = PathBuf::from(format!("/run/user/{uid}"));
        let dir = match xdg_runtime_dir {
            Some(dir) if dir.is_absolute() => dir.join("grid-mount"),
            _ if per_user.is_dir() => per_user.join("grid-mount"),
            _ => PathBuf::from(format!("/tmp/grid-mount-{uid}")),
        };
        let refuse = |reason: String| LaunchError::RuntimeDir {
            dir: dir.clone(),
            reason,
        };
        match DirBuilder::new().mode(0o700).recursive(false).create(&dir) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(refuse(error.to_string())),
        }
        let metadata = fs::symlink_metadata(&dir).map_err(|error| refuse(error.to_string()))?;
        if !metadata.is_dir() || metadata.uid() != uid.as_raw() {
            return Err(refuse("it is not a directory of yours".into()));
        }
        if metadata.permissions().mode() & 0o077 != 0 {
            return Err(refuse("others may enter it".into()));
        }
        Ok(Self { dir })
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.join("agent.sock")
    }

    pub fn log(&self) -> PathBuf {
        self.dir.join("agent.log")
    }
}

/// Makes the directory of a socket that everybody may connect to, where it is missing.
///
/// # Errors
/// Where others could put another socket in its place: all above it must be root's, and writable by others
/// only if sticky.
pub fn shared_dir(socket: &Path) -> Result<(), LaunchError> {
    let dir = socket.parent().unwrap_or(Path::new("/"));
    let refuse = |dir: &Path, reason: String| LaunchError::SharedDir {
        dir: dir.to_owned(),
        reason,
    };
    if !socket.is_absolute() {
        return Err(refuse(dir, "it is not an absolute path".into()));
    }
    match DirBuilder::new().mode(0o755).create(dir) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(refuse(dir, error.to_string())),
    }
    let real = fs::canonicalize(dir).map_err(|error| refuse(dir, error.to_string()))?;
    for above in real.ancestors() {
        let metadata = fs::symlink_metadata(above).map_err(|error| refuse(above, error.to_string()))?;
        let mode = metadata.permissions().mode();
        if metadata.uid() != 0 {
            return Err(refuse(above, "it is not root's".into()));
        }
        // In a sticky directory nobody else can rename or remove what is root's; but in the socket's own,
        // others could take its name before it is bound.
        if mode & 0o022 != 0 && (mode & 0o1000 == 0 || above == real) {
            return Err(refuse(above, "others may write to it".into()));
        }
    }
    Ok(())
}

/// A file that one process at a time has locked; it goes when the lock does.
#[derive(Debug)]
struct LockFile {
    path: PathBuf,
    _lock: Flock<File>,
}

impl LockFile {
    /// `None` when another process holds it.
    fn acquire(path: PathBuf) -> Result<Option<Self>, LaunchError> {
        loop {
            let open = |source| LaunchError::Open {
                path: path.clone(),
                source,
            };
            let file = OpenOptions::new()
                .create(true)
                .truncate(false)
                .write(true)
                .mode(0o600)
                .open(&path)
                .map_err(open)?;
            let Ok(lock) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else {
                return Ok(None);
            };
            // Whoever held it last may have removed the file that was opened here.
            let ours = lock.metadata().map_err(open)?;
            match fs::symlink_metadata(&path) {
                Ok(there) if (there.dev(), there.ino()) == (ours.dev(), ours.ino()) => {
                    return Ok(Some(Self { path, _lock: lock }));
                }
                _ => {}
            }
        }
    }
}

impl Drop for LockFile {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %self.path.display(), %error, "a lock file stays behind");
        }
    }
}

/// Held for as long as anybody may come back to serve a socket: by its keeper, or by an agent without one.
#[derive(Debug)]
pub struct KeeperLock {
    _file: LockFile,
}

impl KeeperLock {
    /// # Errors
    /// `AlreadyRunning` when another one holds it.
    pub fn acquire(socket: &Path) -> Result<Self, LaunchError> {
        match LockFile::acquire(socket.with_extension("keeper"))? {
            Some(file) => Ok(Self { _file: file }),
            None => Err(LaunchError::AlreadyRunning {
                socket: socket.to_owned(),
            }),
        }
    }
}

/// Held by the one agent that serves a socket; the socket exists only while this does.
#[derive(Debug)]
pub struct SocketLock {
    socket: PathBuf,
    _lock: LockFile,
    _alone: Option<KeeperLock>,
}

impl SocketLock {
    /// For an agent without a keeper.
    ///
    /// # Errors
    /// `AlreadyRunning` when another one holds it.
    pub fn acquire(socket: &Path) -> Result<Self, LaunchError> {
        let alone = KeeperLock::acquire(socket)?;
        let mut lock = Self::acquire_kept(socket)?;
        lock._alone = Some(alone);
        Ok(lock)
    }

    /// For an agent whose keeper holds the other lock, and for that keeper when there is no agent.
    pub fn acquire_kept(socket: &Path) -> Result<Self, LaunchError> {
        match LockFile::acquire(socket.with_extension("lock"))? {
            Some(lock) => Ok(Self {
                socket: socket.to_owned(),
                _lock: lock,
                _alone: None,
            }),
            None => Err(LaunchError::AlreadyRunning {
                socket: socket.to_owned(),
            }),
        }
    }

    /// Binds the socket, in place of one that a dead agent left behind. With `everybody` all users may
    /// connect; what they may do is decided when they ask.
    pub fn bind(&self, everybody: bool) -> Result<std::os::unix::net::UnixListener, LaunchError> {
        let open = |source| LaunchError::Open {
            path: self.socket.clone(),
            source,
        };
        match fs::remove_file(&self.socket) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(open(error)),
        }
        let listener = std::os::unix::net::UnixListener::bind(&self.socket).map_err(open)?;
        let mode = if everybody { 0o666 } else { 0o600 };
        fs::set_permissions(&self.socket, fs::Permissions::from_mode(mode)).map_err(open)?;
        listener.set_nonblocking(true).map_err(open)?;
        Ok(listener)
    }
}

impl Drop for SocketLock {
    fn drop(&mut self) {
        // Before the lock goes: who connects from now on finds no socket and starts a new agent.
        if let Err(error) = fs::remove_file(&self.socket)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(socket = %self.socket.display(), %error, "the control socket stays behind");
        }
    }
}

/// Tells whoever started this agent that it is ready, or why it is not.
#[derive(Debug)]
pub struct Readiness(Option<File>);

impl Readiness {
    pub fn none() -> Self {
        Self(None)
    }

    /// # Safety
    /// `fd` must be open and owned by nobody else in this process: the descriptor that
    /// [`start`] named on this process's command line.
    pub unsafe fn from_raw(fd: RawFd) -> Self {
        // SAFETY: the caller's promise.
        let pipe = unsafe { OwnedFd::from_raw_fd(fd) };
        Self(Some(File::from(pipe)))
    }

    pub fn ready(&mut self) {
        self.tell("ready\n");
    }

    pub fn already_running(&mut self) {
        self.tell("running\n");
    }

    pub fn failed(&mut self, message: &str) {
        self.tell(message);
    }

    fn tell(&mut self, text: &str) {
        if let Some(mut pipe) = self.0.take() {
            // Whoever waited may be gone: then nobody needs to know.
            let _ = pipe.write_all(text.as_bytes());
        }
    }
}

/// Starts this program as the user's agent, under a keeper and detached from the terminal, and waits until
/// it answers.
///
/// `arguments` are those of the `agent` subcommand; the agent ends with its last mount.
pub fn start(runtime: &RuntimeDir, program: &Path, arguments: &[String]) -> Result<(), LaunchError> {
    let log_path = runtime.log();
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(&log_path)
        .map_err(|source| LaunchError::Open {
            path: log_path.clone(),
            source,
        })?;
    let log_again = log.try_clone().map_err(LaunchError::Spawn)?;
    let (reader, writer) = nix::unistd::pipe().map_err(|errno| LaunchError::Spawn(errno.into()))?;
    nix::fcntl::fcntl(
        &reader,
        nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC),
    )
    .map_err(|errno| LaunchError::Spawn(errno.into()))?;

    let mut command = Command::new(program);
    command
        .arg("agent")
        .arg("--keep")
        .arg("--on-demand")
        .arg("--socket")
        .arg(runtime.socket())
        .arg("--ready-fd")
        .arg(writer.as_raw_fd().to_string())
        .args(arguments)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(log_again);
    // SAFETY: setsid is async-signal-safe and touches no memory of the parent.
    unsafe {
        command.pre_exec(|| {
            nix::unistd::setsid()?;
            Ok(())
        });
    }
    let mut child = command.spawn().map_err(LaunchError::Spawn)?;
    drop(writer);
    let said = read_with_deadline(File::from(reader), START_DEADLINE);
    let said = match said {
        Some(said) => said,
        None => {
            // It is ours, it never became ready, and nobody else knows of it.
            // The group that setsid made: the keeper and its agent.
            if let Ok(group) = i32::try_from(child.id()) {
                let _ = nix::sys::signal::killpg(
                    nix::unistd::Pid::from_raw(group),
                    nix::sys::signal::Signal::SIGKILL,
                );
            }
            let _ = child.wait();
            return Err(LaunchError::NotReady {
                after: START_DEADLINE,
                log: log_path,
            });
        }
    };
    match said.as_str() {
        "ready\n" => Ok(()),
        // Somebody else's command started one at the same moment.
        "running\n" => {
            let _ = child.wait();
            Ok(())
        }
        message => {
            let _ = child.wait();
            let message = match message.trim() {
                "" => "it ended without a word".to_owned(),
                message => message.to_owned(),
            };
            Err(LaunchError::Failed {
                message,
                log: log_path,
            })
        }
    }
}

/// Everything written to `pipe` until it closes; `None` when that takes longer than `deadline`.
fn read_with_deadline(mut pipe: File, deadline: Duration) -> Option<String> {
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut text = String::new();
        let _ = pipe.read_to_string(&mut text);
        let _ = sender.send(text);
    });
    receiver.recv_timeout(deadline).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_agent_per_socket_and_the_socket_goes_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("agent.sock");
        let lock = SocketLock::acquire(&socket).unwrap();
        let listener = lock.bind(false).unwrap();
        assert!(matches!(
            SocketLock::acquire(&socket),
            Err(LaunchError::AlreadyRunning { .. })
        ));
        assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
        drop(listener);
        assert!(KeeperLock::acquire(&socket).is_err());
        drop(lock);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        SocketLock::acquire(&socket).unwrap();
    }

    #[test]
    fn a_runtime_directory_that_others_can_enter_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let runtime = RuntimeDir::of_user(Some(dir.path())).unwrap();
        assert_eq!(runtime.socket(), dir.path().join("grid-mount/agent.sock"));
        fs::set_permissions(dir.path().join("grid-mount"), fs::Permissions::from_mode(0o755)).unwrap();
        assert!(matches!(
            RuntimeDir::of_user(Some(dir.path())),
            Err(LaunchError::RuntimeDir { .. })
        ));
    }
}
