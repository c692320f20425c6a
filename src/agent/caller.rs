//! Who is calling: what the kernel says of the other end of the control socket.

use std::{
    fmt, io,
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
    sync::Arc,
};

use nix::{fcntl::OFlag, sys::stat::Mode};
use tokio::net::UnixStream;

use super::as_caller::{self, AsCallerError, Identity, View};
use crate::fs::Owner;

/// Whoever is at the other end of the control socket, as the kernel tells it.
#[derive(Debug)]
pub struct Caller {
    pub identity: Identity,
    process: Process,
}

#[derive(Debug)]
enum Process {
    /// Sees what this process sees.
    Here,
    Peer(i32, OwnedFd),
    /// Of a pid namespace that this process's does not contain.
    Unseen,
}

impl Caller {
    /// This process, on its own account.
    pub fn this_process() -> Arc<Self> {
        Arc::new(Self {
            identity: Identity {
                uid: nix::unistd::geteuid().as_raw(),
                gid: nix::unistd::getegid().as_raw(),
                groups: Vec::new(),
            },
            process: Process::Here,
        })
    }

    /// Whose a mount is that an agent before this one made in this process's namespace.
    pub fn remembered(identity: Identity) -> Arc<Self> {
        Arc::new(Self {
            identity,
            process: Process::Here,
        })
    }

    /// The other end of a connection, as it was when it connected.
    pub fn of(stream: &UnixStream) -> io::Result<Arc<Self>> {
        let peer = stream.peer_cred()?;
        let pid = peer.pid().unwrap_or_default();
        let process = match pid {
            0 => Process::Unseen,
            pid => Process::Peer(pid, pidfd_of(stream, pid)?),
        };
        Ok(Arc::new(Self {
            identity: Identity {
                uid: peer.uid(),
                gid: peer.gid(),
                groups: groups_of(stream)?,
            },
            process,
        }))
    }

    pub fn uid(&self) -> u32 {
        self.identity.uid
    }

    pub fn owner(&self) -> Owner {
        Owner {
            uid: self.identity.uid,
            gid: self.identity.gid,
        }
    }

    /// Of whom only the ids are known.
    #[cfg(test)]
    pub(super) fn unseen(identity: Identity) -> Self {
        Self {
            identity,
            process: Process::Unseen,
        }
    }

    /// How it sees files.
    pub fn view(&self) -> Result<Arc<View>, AsCallerError> {
        let identity = self.identity.clone();
        let view = match &self.process {
            Process::Peer(pid, pidfd) => View::of_process(identity, *pid, pidfd.as_fd())?,
            Process::Here => View::of_own_namespace(identity)?,
            Process::Unseen => return Err(AsCallerError::Unseen),
        };
        Ok(Arc::new(view))
    }

    /// What one of the caller's open descriptors is of, without walking there.
    pub fn descriptor(&self, number: u32) -> io::Result<OwnedFd> {
        let Process::Peer(pid, pidfd) = &self.process else {
            return Err(io::ErrorKind::NotFound.into());
        };
        let descriptor = nix::fcntl::open(
            &*format!("/proc/{pid}/fd/{number}"),
            OFlag::O_PATH | OFlag::O_CLOEXEC,
            Mode::empty(),
        )?;
        // As long as it lives its number is its own.
        match as_caller::is_alive(pidfd.as_fd()) {
            true => Ok(descriptor),
            false => Err(io::ErrorKind::NotFound.into()),
        }
    }

    pub(super) fn is_in(&self, group: u32) -> bool {
        self.identity.gid == group || self.identity.groups.contains(&group)
    }
}

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "uid {}", self.uid())
    }
}

fn pidfd_of(stream: &UnixStream, pid: i32) -> io::Result<OwnedFd> {
    let mut fd: libc::c_int = -1;
    let mut length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: room for one int and its length, both alive during the call.
    let asked = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERPIDFD,
            (&raw mut fd).cast(),
            &raw mut length,
        )
    };
    if asked != 0 {
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::ENOPROTOOPT) {
            return Err(error);
        }
        // Before Linux 6.5. The number could be another process's by now; its user is compared later.
        // SAFETY: only numbers.
        let opened = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        fd = i32::try_from(opened).map_err(io::Error::other)?;
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    // SAFETY: the kernel made this descriptor just now, for nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn groups_of(stream: &UnixStream) -> io::Result<Vec<u32>> {
    let mut groups = vec![0u32; 64];
    loop {
        let mut length = libc::socklen_t::try_from(size_of_val(&groups[..])).map_err(io::Error::other)?;
        // SAFETY: room for as many bytes as said, alive during the call.
        let asked = unsafe {
            libc::getsockopt(
                stream.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut length,
            )
        };
        let count = length as usize / size_of::<u32>();
        if asked == 0 {
            groups.truncate(count);
            return Ok(groups);
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::ERANGE) || count <= groups.len() {
            return Err(error);
        }
        groups.resize(count, 0);
    }
}
