//! Mounting and unmounting as an ordinary user, through the set-uid `fusermount3`.

use std::{
    io::{self, IoSliceMut},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::{net::UnixStream, process::CommandExt},
    },
    path::Path,
    process::{Command, Output, Stdio},
};

use nix::{
    fcntl::{FcntlArg, FdFlag, fcntl},
    sys::socket::{ControlMessageOwned, MsgFlags, UnixAddr, recvmsg},
};

use super::{MountError, MountOptions, SUBTYPE, UnmountError, program_on_path};

const PROGRAM: &str = "fusermount3";

/// Mounts, and returns the connection with the kernel. The kernel's INIT waits in it.
pub(super) fn mount(options: &MountOptions) -> Result<OwnedFd, MountError> {
    // Said here, because what fusermount3 says of it does not name the remedy.
    if !Path::new("/dev/fuse").exists() {
        return Err(MountError::NoDevice);
    }
    let program = program_on_path(PROGRAM).ok_or(MountError::NoFusermount)?;
    let (ours, theirs) = UnixStream::pair().map_err(MountError::RunFusermount)?;
    let socket = theirs.as_raw_fd();
    let mut command = Command::new(program);
    command
        .arg("-o")
        .arg(option_list(options))
        .arg("--")
        .arg(&options.mount_point)
        .env("_FUSE_COMMFD", socket.to_string())
        // Its messages are matched below.
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    // SAFETY: between fork and exec only fcntl is called, which is async-signal-safe, on a descriptor
    // that stays open until the child has been started.
    unsafe {
        command.pre_exec(move || {
            let socket = std::os::fd::BorrowedFd::borrow_raw(socket);
            fcntl(socket, FcntlArg::F_SETFD(FdFlag::empty()))?;
            Ok(())
        });
    }
    let child = command.spawn().map_err(MountError::RunFusermount)?;
    drop(theirs);
    // fusermount3 sends the descriptor or exits; either way this ends.
    let received = receive(&ours);
    let output = child.wait_with_output().map_err(MountError::RunFusermount)?;
    match received {
        Ok(session) if output.status.success() => Ok(session),
        Ok(_) | Err(_) => Err(refusal(options, &output)),
    }
}

fn option_list(options: &MountOptions) -> String {
    // A comma would begin another option; fusermount3 wants commas and backslashes escaped.
    let source = options.reference.replace('\\', "\\\\").replace(',', "\\,");
    let mut list = format!("ro,nosuid,nodev,fsname={source},subtype={SUBTYPE}");
    if options.share {
        list.push_str(",allow_other,default_permissions");
    }
    list
}

fn said(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr);
    let lines: Vec<&str> = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    if lines.is_empty() {
        output.status.to_string()
    } else {
        lines.join("; ")
    }
}

fn refusal(options: &MountOptions, output: &Output) -> MountError {
    let said = said(output);
    let path = options.mount_point.clone();
    if said.contains("user_allow_other") {
        MountError::ShareNotAllowed
    } else if said.contains("failed to open /dev/fuse: Permission denied") {
        MountError::DeviceNotPermitted
    } else if said.contains("no write access to mountpoint") || said.contains("not owned by user") {
        MountError::NotOwned { path }
    } else {
        MountError::Fusermount { said }
    }
}

/// The descriptor that comes over the socket.
fn receive(socket: &UnixStream) -> io::Result<OwnedFd> {
    let mut byte = [0u8];
    let mut iov = [IoSliceMut::new(&mut byte)];
    let mut space = nix::cmsg_space!(RawFd);
    let message = loop {
        match recvmsg::<UnixAddr>(
            socket.as_raw_fd(),
            &mut iov,
            Some(&mut space),
            MsgFlags::MSG_CMSG_CLOEXEC,
        ) {
            Err(nix::errno::Errno::EINTR) => {}
            other => break other?,
        }
    };
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(descriptors) = control
            && let Some(&raw) = descriptors.first()
        {
            // SAFETY: the kernel installed this descriptor for us with this message; nobody else owns it.
            return Ok(unsafe { OwnedFd::from_raw_fd(raw) });
        }
    }
    Err(io::ErrorKind::UnexpectedEof.into())
}

pub(super) fn unmount(path: &Path, lazy: bool) -> Result<(), UnmountError> {
    let program = program_on_path(PROGRAM).ok_or(UnmountError::NoFusermount)?;
    let mut command = Command::new(program);
    command.arg("-u");
    if lazy {
        command.arg("-z");
    }
    let output = command
        .arg("--")
        .arg(path)
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output()
        .map_err(|source| UnmountError::Kernel {
            path: path.into(),
            source,
        })?;
    if output.status.success() {
        return Ok(());
    }
    Err(UnmountError::Fusermount {
        path: path.into(),
        said: said(&output),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fs::Owner;

    #[test]
    fn a_reference_cannot_smuggle_options_in() {
        let options = MountOptions::new("/m", r"a,suid\:x/1", Owner { uid: 1, gid: 1 });
        assert_eq!(
            option_list(&options),
            r"ro,nosuid,nodev,fsname=a\,suid\\:x/1,subtype=grid-mount"
        );
    }
}
