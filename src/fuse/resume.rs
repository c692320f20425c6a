//! Going on with a mount whose agent is gone.
//!
//! The kernel says INIT once per connection, and fuser insists on hearing it. So it hears it from us, on
//! a socket, with the values of the first time; then the connection takes the socket's place. Requests
//! that the dead agent had read and not answered are sent again by the kernel when it is told to.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
};

use fuser::InitFlags;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

use super::Handshake;

const FUSE_INIT: u32 = 26;
const FUSE_NOTIFY_RESEND: i32 = 7;

/// The socket that a session shakes hands on, and the end that must stay open until it has.
pub(super) struct Rehearsal {
    pub session: OwnedFd,
    pub kernel: OwnedFd,
}

/// A socket with the INIT of the first time in it.
pub(super) fn rehearse(handshake: &Handshake) -> io::Result<Rehearsal> {
    let (session, kernel) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )?;
    nix::unistd::write(&kernel, &init_request(handshake))?;
    Ok(Rehearsal { session, kernel })
}

fn init_request(handshake: &Handshake) -> Vec<u8> {
    const HEADER: u32 = 40;
    const INIT: u32 = 64;
    let flags = handshake.capabilities | InitFlags::FUSE_INIT_EXT.bits();
    let words = [
        // fuse_in_header: length, opcode, unique (8 bytes), node (8 bytes), uid, gid, pid, padding.
        [HEADER + INIT, FUSE_INIT, 1, 0, 0, 0, 0, 0, 0, 0],
        // fuse_init_in: version, readahead, flags, and eleven words that are not used.
        [
            handshake.kernel_major,
            handshake.kernel_minor,
            handshake.max_readahead,
            flags as u32,
            (flags >> 32) as u32,
            0,
            0,
            0,
            0,
            0,
        ],
    ];
    let mut request: Vec<u8> = words
        .as_flattened()
        .iter()
        .flat_map(|word| word.to_ne_bytes())
        .collect();
    request.resize((HEADER + INIT) as usize, 0);
    request
}

/// Puts the connection where the session's socket was. From then on the session speaks with the kernel.
pub(super) fn take_over(session: BorrowedFd<'_>, connection: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: both are open. The number stays owned by the session, which nobody reads from yet; only
    // what is behind it changes, from a socket to /dev/fuse, both of which are read and written alike.
    let result = unsafe { libc::dup3(connection.as_raw_fd(), session.as_raw_fd(), libc::O_CLOEXEC) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Has the kernel send again what was read and not answered. Before Linux 6.9 it cannot: those requests
/// then wait for an answer that nobody owes them any more, so the caller should know.
pub(super) fn resend(connection: BorrowedFd<'_>) -> io::Result<()> {
    let mut notification = [0u8; 16];
    notification[..4].copy_from_slice(&16u32.to_ne_bytes());
    notification[4..8].copy_from_slice(&FUSE_NOTIFY_RESEND.to_ne_bytes());
    nix::unistd::write(connection, &notification)?;
    Ok(())
}
