//! Messages with a descriptor, over a socket that keeps them apart.

use std::{
    io::{IoSlice, IoSliceMut},
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use nix::{
    cmsg_space,
    sys::{
        socket::{
            AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr,
            recvmsg, sendmsg, setsockopt, socketpair, sockopt,
        },
        time::TimeVal,
    },
};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{Held, KeeperError, system};

/// More than a socket takes by default.
const MAX_MESSAGE: usize = 256 << 10;
/// The other side answers from memory.
const DEADLINE: TimeVal = TimeVal::new(5, 0);

#[derive(Serialize, Deserialize)]
pub(super) enum ToKeeper {
    Keep { name: String, memo: String },
    Release { name: String },
    Serving,
}

#[derive(Serialize, Deserialize)]
pub(super) enum ToChild {
    Held { name: String, memo: String },
    AllHeld,
    Done,
    Refused(String),
}

/// Both ends; no send or receive on them takes for ever.
pub(super) fn pair() -> Result<(OwnedFd, OwnedFd), KeeperError> {
    let pair = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )
    .map_err(system("making a socket"))?;
    for end in [&pair.0, &pair.1] {
        setsockopt(end, sockopt::ReceiveTimeout, &DEADLINE).map_err(system("setting up a socket"))?;
        setsockopt(end, sockopt::SendTimeout, &DEADLINE).map_err(system("setting up a socket"))?;
    }
    Ok(pair)
}

pub(super) fn send(
    socket: BorrowedFd<'_>,
    message: &impl Serialize,
    descriptor: Option<BorrowedFd<'_>>,
) -> Result<(), KeeperError> {
    let text = serde_json::to_vec(message)?;
    let descriptors: Vec<RawFd> = descriptor.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&descriptors)];
    let control: &[ControlMessage<'_>] = if descriptors.is_empty() { &[] } else { &rights };
    sendmsg::<UnixAddr>(
        socket.as_raw_fd(),
        &[IoSlice::new(&text)],
        control,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )
    .map_err(system("sending"))?;
    Ok(())
}

pub(super) fn receive<M: DeserializeOwned>(
    socket: BorrowedFd<'_>,
) -> Result<(M, Option<OwnedFd>), KeeperError> {
    let mut text = vec![0; MAX_MESSAGE];
    let mut space = cmsg_space!(RawFd);
    let (length, descriptor) = {
        let mut room = [IoSliceMut::new(&mut text)];
        let received = recvmsg::<UnixAddr>(
            socket.as_raw_fd(),
            &mut room,
            Some(&mut space),
            MsgFlags::MSG_CMSG_CLOEXEC,
        )
        .map_err(system("receiving"))?;
        let mut descriptor = None;
        for control in received.cmsgs().map_err(system("receiving"))? {
            if let ControlMessageOwned::ScmRights(numbers) = control {
                for number in numbers {
                    // SAFETY: the kernel installed this number for us with this message; it is taken
                    // into ownership once, here. All are, so that a surplus one is closed.
                    descriptor = Some(unsafe { OwnedFd::from_raw_fd(number) });
                }
            }
        }
        (received.bytes, descriptor)
    };
    if length == 0 {
        return Err(KeeperError::Gone);
    }
    Ok((serde_json::from_slice(&text[..length])?, descriptor))
}

/// A child's end.
pub struct Link {
    /// `None` after a failure: an answer that comes too late would be taken for the next one. The lock
    /// is what keeps question and answer together; both have a deadline.
    socket: Mutex<Option<OwnedFd>>,
}

impl Link {
    /// Takes what is held for this child. Blocking, as everything here.
    pub fn new(socket: OwnedFd) -> Result<(Self, Vec<Held>), KeeperError> {
        use std::os::fd::AsFd;
        let mut all = Vec::new();
        loop {
            match receive::<ToChild>(socket.as_fd())? {
                (ToChild::Held { name, memo }, Some(descriptor)) => all.push(Held {
                    name,
                    memo,
                    descriptor,
                }),
                (ToChild::AllHeld, _) => break,
                _ => return Err(KeeperError::Gone),
            }
        }
        let link = Self {
            socket: Mutex::new(Some(socket)),
        };
        Ok((link, all))
    }

    /// Returns when a duplicate of the descriptor is safe.
    pub fn keep(&self, name: &str, memo: &str, descriptor: BorrowedFd<'_>) -> Result<(), KeeperError> {
        let message = ToKeeper::Keep {
            name: name.to_owned(),
            memo: memo.to_owned(),
        };
        self.ask(&message, Some(descriptor))
    }

    pub fn release(&self, name: &str) -> Result<(), KeeperError> {
        let name = name.to_owned();
        self.ask(&ToKeeper::Release { name }, None)
    }

    /// This child serves: it was worth starting.
    pub fn serving(&self) -> Result<(), KeeperError> {
        self.ask(&ToKeeper::Serving, None)
    }

    fn ask(&self, message: &ToKeeper, descriptor: Option<BorrowedFd<'_>>) -> Result<(), KeeperError> {
        use std::os::fd::AsFd;
        let mut slot = self.socket.lock();
        let socket = slot.as_ref().ok_or(KeeperError::Gone)?;
        let answer = send(socket.as_fd(), message, descriptor)
            .and_then(|()| receive::<ToChild>(socket.as_fd()).map(|(answer, _)| answer));
        match answer {
            Ok(ToChild::Done) => Ok(()),
            Ok(ToChild::Refused(why)) => Err(KeeperError::Refused(why)),
            Ok(_) => {
                *slot = None;
                Err(KeeperError::Gone)
            }
            Err(error) => {
                *slot = None;
                Err(error)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Write, os::fd::AsFd};

    use super::*;

    #[test]
    fn a_descriptor_travels_with_its_name() {
        let (ours, theirs) = pair().unwrap();
        let (reader, writer) = nix::unistd::pipe().unwrap();
        send(ours.as_fd(), &ToChild::AllHeld, None).unwrap();
        let (link, held) = Link::new(theirs).unwrap();
        assert!(held.is_empty());
        send(ours.as_fd(), &ToChild::Done, None).unwrap();
        link.keep("one", "secret", writer.as_fd()).unwrap();
        drop(writer);
        let (message, descriptor) = receive::<ToKeeper>(ours.as_fd()).unwrap();
        assert!(
            matches!(message, ToKeeper::Keep { name, memo } if (name.as_str(), memo.as_str()) == ("one", "secret"))
        );
        std::fs::File::from(descriptor.unwrap()).write_all(b"x").unwrap();
        let mut byte = [0];
        nix::unistd::read(&reader, &mut byte).unwrap();
        assert_eq!(byte, *b"x");
        drop(ours);
        assert!(link.serving().is_err());
        assert!(matches!(link.release("one"), Err(KeeperError::Gone)));
    }
}
