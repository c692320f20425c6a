//! Under systemd: what it gave this process, and what this process tells it.
//!
//! Owns the notification socket (readiness, watchdog, the store of descriptors), the descriptors that came
//! with the process, and what systemd is about to do with it. Must not know what a descriptor is of.
//!
//! A memo holds credentials, so it goes into the store as a memory file beside its descriptor: never to a
//! disk, and gone with the store.

use std::{
    env,
    fs::File,
    io::{self, IoSlice, Write},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        linux::net::SocketAddrExt,
        unix::{
            fs::FileExt,
            net::{SocketAddr, UnixDatagram, UnixListener},
        },
    },
    time::Duration,
};

use nix::{
    fcntl::{FcntlArg, FdFlag, OFlag, SealFlag, fcntl},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        memfd::{MFdFlags, memfd_create},
        socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg},
    },
};

use crate::keeper::{Held, KeeperError};

/// The name of the control socket among the descriptors: `FileDescriptorName=` of the socket unit.
const CONTROL: &str = "control";
const MOUNT: &str = "mount-";
const MEMO: &str = "memo-";
/// The first descriptor that systemd passes.
const FIRST: RawFd = 3;
/// systemd answers from its main loop; what takes longer hangs.
const DEADLINE: Duration = Duration::from_secs(10);
/// As much as a request may say.
const MAX_MEMO: usize = 256 << 10;

fn system(doing: &'static str) -> impl Fn(io::Error) -> KeeperError {
    move |source| KeeperError::System { doing, source }
}

/// What systemd gave this process at its start.
#[derive(Default)]
pub struct Given {
    /// The control socket, listening already.
    pub control: Option<UnixListener>,
    /// What agents before this one put into the store.
    pub held: Vec<Held>,
}

impl Given {
    /// Takes the descriptors that `LISTEN_FDS` speaks of.
    ///
    /// # Safety
    /// Must be called at most once, and nothing else in this process may take these numbers. They were open
    /// from the beginning, so nothing opened since has one of them.
    pub unsafe fn take() -> Self {
        let number = |name| env::var(name).ok().and_then(|text| text.parse::<u32>().ok());
        if number("LISTEN_PID") != Some(std::process::id()) {
            return Self::default();
        }
        let count = number("LISTEN_FDS").and_then(|count| RawFd::try_from(count).ok());
        let names = env::var("LISTEN_FDNAMES").unwrap_or_default();
        let mut names = names.split(':');
        let named = (FIRST..FIRST.saturating_add(count.unwrap_or(0))).map(|raw| {
            // SAFETY: systemd passed this number, and by the caller's promise nobody has taken it yet.
            let descriptor = unsafe { OwnedFd::from_raw_fd(raw) };
            (names.next().unwrap_or_default().to_owned(), descriptor)
        });
        Self::sorted(named.collect())
    }

    fn sorted(named: Vec<(String, OwnedFd)>) -> Self {
        let mut given = Self::default();
        let mut memos = Vec::new();
        for (name, descriptor) in named {
            if let Err(error) = fcntl(&descriptor, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)) {
                tracing::warn!(name, %error, "a descriptor of systemd's cannot be used");
            } else if name == CONTROL {
                given.control = Some(descriptor.into());
            } else if let Some(name) = name.strip_prefix(MOUNT) {
                given.held.push(Held {
                    name: name.to_owned(),
                    memo: String::new(),
                    descriptor,
                });
            } else if let Some(name) = name.strip_prefix(MEMO) {
                memos.push((name.to_owned(), read_memo(File::from(descriptor))));
            }
        }
        for (name, memo) in memos {
            let of = given.held.iter_mut().find(|held| held.name == name);
            match (of, memo) {
                (Some(held), Ok(memo)) => held.memo = memo,
                (Some(held), Err(error)) => {
                    tracing::warn!(name = held.name, %error, "the credentials of a mount are lost");
                }
                (None, _) => {}
            }
        }
        given
    }
}

fn read_memo(file: File) -> io::Result<String> {
    let length = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
    if length > MAX_MEMO {
        return Err(io::Error::other("it is too long"));
    }
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, 0)?;
    String::from_utf8(bytes).map_err(io::Error::other)
}

/// The manager that started this process.
#[derive(Debug)]
pub struct Manager {
    socket: UnixDatagram,
    /// How often it wants to hear that this process is well.
    pub watchdog: Option<Duration>,
}

impl Manager {
    /// `None` where nobody waits for notifications.
    pub fn of_this_process() -> io::Result<Option<Self>> {
        let Some(address) = env::var_os("NOTIFY_SOCKET").filter(|address| !address.is_empty()) else {
            return Ok(None);
        };
        let address = match address.as_encoded_bytes().strip_prefix(b"@") {
            Some(name) => SocketAddr::from_abstract_name(name)?,
            None => SocketAddr::from_pathname(&address)?,
        };
        let mut manager = Self::at(&address)?;
        let number = |name| env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
        let for_me = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
        manager.watchdog = number("WATCHDOG_USEC")
            .filter(|micros| for_me && *micros > 0)
            .map(Duration::from_micros);
        Ok(Some(manager))
    }

    fn at(address: &SocketAddr) -> io::Result<Self> {
        let socket = UnixDatagram::unbound()?;
        socket.connect_addr(address)?;
        socket.set_write_timeout(Some(DEADLINE))?;
        Ok(Self {
            socket,
            watchdog: None,
        })
    }

    /// Everything that was there before is there again, and the control socket answers.
    pub fn ready(&self, status: &str) -> Result<(), KeeperError> {
        self.say(&format!("READY=1\nSTATUS={status}"), None)
    }

    pub fn well(&self) -> Result<(), KeeperError> {
        self.say("WATCHDOG=1", None)
    }

    pub fn stopping(&self, status: &str) -> Result<(), KeeperError> {
        self.say(&format!("STOPPING=1\nSTATUS={status}"), None)
    }

    /// When this returns, the descriptor and what belongs to it are in the store.
    pub fn keep(&self, name: &str, memo: &str, descriptor: BorrowedFd<'_>) -> Result<(), KeeperError> {
        let memo = memory_file(memo).map_err(system("writing a memo"))?;
        // FDPOLL=0: otherwise a descriptor goes at once when it is unmounted, memo and all left behind.
        let store = |kind| format!("FDSTORE=1\nFDNAME={kind}{name}\nFDPOLL=0");
        self.say(&store(MEMO), Some(memo.as_fd()))?;
        self.say(&store(MOUNT), Some(descriptor))?;
        self.barrier()
    }

    pub fn let_go(&self, name: &str) -> Result<(), KeeperError> {
        self.say(&format!("FDSTOREREMOVE=1\nFDNAME={MOUNT}{name}"), None)?;
        self.say(&format!("FDSTOREREMOVE=1\nFDNAME={MEMO}{name}"), None)
    }

    /// Returns when systemd has read all that was said before: it closes the pipe that this sends.
    fn barrier(&self) -> Result<(), KeeperError> {
        let waiting = "waiting for systemd";
        let (ours, theirs) =
            nix::unistd::pipe2(OFlag::O_CLOEXEC).map_err(|errno| system(waiting)(errno.into()))?;
        self.say("BARRIER=1", Some(theirs.as_fd()))?;
        drop(theirs);
        let mut closed = [PollFd::new(ours.as_fd(), PollFlags::empty())];
        let timeout = PollTimeout::try_from(DEADLINE).unwrap_or(PollTimeout::MAX);
        match poll(&mut closed, timeout) {
            Ok(0) => Err(system(waiting)(io::ErrorKind::TimedOut.into())),
            Ok(_) => Ok(()),
            Err(errno) => Err(system(waiting)(errno.into())),
        }
    }

    fn say(&self, text: &str, descriptor: Option<BorrowedFd<'_>>) -> Result<(), KeeperError> {
        let descriptors: Vec<RawFd> = descriptor.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&descriptors)];
        let control: &[ControlMessage<'_>] = if descriptors.is_empty() { &[] } else { &rights };
        sendmsg::<UnixAddr>(
            self.socket.as_raw_fd(),
            &[IoSlice::new(text.as_bytes())],
            control,
            MsgFlags::MSG_NOSIGNAL,
            None,
        )
        .map_err(|errno| system("telling systemd")(errno.into()))?;
        Ok(())
    }
}

fn memory_file(text: &str) -> io::Result<OwnedFd> {
    let file = memfd_create(
        c"grid-mount-memo",
        MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING,
    )?;
    let mut file = File::from(file);
    file.write_all(text.as_bytes())?;
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_WRITE;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(file.into())
}

/// Why systemd ends this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// The unit is to be stopped: nobody serves its mounts any more.
    Stop,
    /// Another process takes over, or there is no job at all and `Restart=` brings one.
    GoOn,
}

/// What systemd is about to do with this process' unit. A stop and a restart send the same signal; what
/// tells them apart is the job that is queued.
pub async fn wish() -> Wish {
    match job().await {
        Ok(job) => wish_of(job.as_deref()),
        Err(error) => {
            // A mount that stays is dead when nobody comes, and is then cleared by the next agent; one that
            // goes is an error for whoever reads.
            tracing::warn!(%error, "systemd does not say whether this is a stop or a restart: mounts stay");
            Wish::GoOn
        }
    }
}

fn wish_of(job: Option<&str>) -> Wish {
    match job {
        Some("stop") => Wish::Stop,
        _ => Wish::GoOn,
    }
}

/// The type of the job queued for this process' unit.
async fn job() -> io::Result<Option<String>> {
    let unit = unit_of(&std::fs::read_to_string("/proc/self/cgroup")?)
        .ok_or_else(|| io::Error::other("this process belongs to no service"))?;
    let asking = tokio::process::Command::new("systemctl")
        .args(["list-jobs", "--no-legend", "--no-pager", "--plain", "--full"])
        .kill_on_drop(true)
        .output();
    let answer = tokio::time::timeout(DEADLINE, asking).await??;
    if !answer.status.success() {
        return Err(io::Error::other(
            String::from_utf8_lossy(&answer.stderr).trim().to_owned(),
        ));
    }
    Ok(job_of(&unit, &String::from_utf8_lossy(&answer.stdout)))
}

/// The service of a process, from its `/proc/…/cgroup`.
fn unit_of(cgroups: &str) -> Option<String> {
    let paths = cgroups.lines().filter_map(|line| {
        let (_, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        ["", "name=systemd"].contains(&controllers).then_some(path)
    });
    paths
        .flat_map(|path| path.split('/').rev())
        .find(|part| part.ends_with(".service"))
        .map(str::to_owned)
}

/// From lines of `JOB UNIT TYPE STATE`.
fn job_of(unit: &str, jobs: &str) -> Option<String> {
    jobs.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        let (_, of, kind) = (words.next()?, words.next()?, words.next()?);
        (of == unit).then(|| kind.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use super::*;

    /// Reads like systemd: one datagram, its descriptors.
    fn receive(socket: &UnixDatagram) -> (String, Vec<OwnedFd>) {
        use nix::sys::socket::{ControlMessageOwned, recvmsg};
        let mut text = vec![0; 4096];
        let mut space = nix::cmsg_space!([RawFd; 4]);
        let mut room = [io::IoSliceMut::new(&mut text)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let received = recvmsg::<UnixAddr>(socket.as_raw_fd(), &mut room, Some(&mut space), flags).unwrap();
        let mut descriptors = Vec::new();
        for control in received.cmsgs().unwrap() {
            if let ControlMessageOwned::ScmRights(numbers) = control {
                // SAFETY: installed for us by the kernel with this message.
                descriptors.extend(
                    numbers
                        .into_iter()
                        .map(|raw| unsafe { OwnedFd::from_raw_fd(raw) }),
                );
            }
        }
        let length = received.bytes;
        text.truncate(length);
        (String::from_utf8(text).unwrap(), descriptors)
    }

    #[test]
    fn what_is_kept_comes_back_with_its_memo_and_only_after_the_barrier() {
        let dir = tempfile::tempdir().unwrap();
        let systemd = UnixDatagram::bind(dir.path().join("notify")).unwrap();
        let address = SocketAddr::from_pathname(dir.path().join("notify")).unwrap();
        let manager = Manager::at(&address).unwrap();
        let (kept, other) = nix::unistd::pipe().unwrap();
        let store = std::thread::spawn(move || {
            let mut store = Vec::new();
            loop {
                let (text, mut descriptors) = receive(&systemd);
                if text == "BARRIER=1" {
                    assert_eq!(descriptors.len(), 1);
                    return store;
                }
                let name = text
                    .lines()
                    .find_map(|line| line.strip_prefix("FDNAME="))
                    .unwrap();
                assert!(text.starts_with("FDSTORE=1\n") && text.ends_with("FDPOLL=0"));
                store.push((name.to_owned(), descriptors.remove(0)));
            }
        });
        manager.keep("a", "{\"AWS\":\"secret\"}", kept.as_fd()).unwrap();
        let mut store = store.join().unwrap();
        assert_eq!(store.len(), 2);
        store.reverse();
        let given = Given::sorted(store);
        assert!(given.control.is_none());
        let [held] = &given.held[..] else {
            panic!("one was kept");
        };
        assert_eq!(
            (held.name.as_str(), held.memo.as_str()),
            ("a", "{\"AWS\":\"secret\"}")
        );
        nix::unistd::write(&other, b"x").unwrap();
        let mut byte = [0];
        assert_eq!(nix::unistd::read(&held.descriptor, &mut byte).unwrap(), 1);
    }

    #[test]
    fn a_stop_is_told_from_a_restart_by_the_queued_job() {
        let jobs = "12 grid-mount.service restart running\n 7 other.service stop waiting\n";
        assert_eq!(job_of("grid-mount.service", jobs).as_deref(), Some("restart"));
        assert_eq!(wish_of(job_of("grid-mount.service", jobs).as_deref()), Wish::GoOn);
        assert_eq!(wish_of(job_of("other.service", jobs).as_deref()), Wish::Stop);
        assert_eq!(wish_of(job_of("third.service", jobs).as_deref()), Wish::GoOn);
        assert_eq!(
            unit_of("0::/system.slice/grid-mount.service\n").as_deref(),
            Some("grid-mount.service")
        );
        assert_eq!(
            unit_of("4:cpu:/x.service\n1:name=systemd:/system.slice/a@b.service/sub\n").as_deref(),
            Some("a@b.service")
        );
        assert_eq!(unit_of("0::/user.slice/session-1.scope\n"), None);
    }
}
