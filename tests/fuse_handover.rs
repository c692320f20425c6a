//! Agents killed under their readers: the next one goes on, nothing fails, no byte is wrong.
//!
//! The agent is this binary run again; this process keeps the descriptor, as systemd or a parent would.

#[path = "support/sandbox.rs"]
mod sandbox;
#[path = "support/kernel.rs"]
mod support;

use std::{
    fs::{self, File, OpenOptions},
    io::{IoSlice, IoSliceMut, Read, Write},
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::{
            fs::{FileExt, OpenOptionsExt},
            net::UnixStream,
        },
    },
    path::{Path, PathBuf},
    process::{Child, Command},
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use grid_mount::{
    fuse::{self, Ended, IoMode, IoModeWish, MountOptions},
    handover::MountState,
};
use nix::{
    mount::{MntFlags, umount2},
    sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, sendmsg},
};
use support::{Published, REFERENCE, can_mount_as_root, me, noise};
use tokio::runtime::Runtime;

const LARGE: usize = 96 << 20;
const SMALL: usize = 200 << 10;
const KILLS: u32 = 6;
const DEADLINE: Duration = Duration::from_secs(120);

/// Everything lies at fixed names in one directory.
#[derive(Clone)]
struct Places(PathBuf);

impl Places {
    fn source(&self) -> PathBuf {
        self.0.join("source")
    }
    fn store(&self) -> PathBuf {
        self.0.join("store")
    }
    fn point(&self) -> PathBuf {
        self.0.join("mnt")
    }
    fn state(&self) -> PathBuf {
        self.0.join("state.json")
    }
    fn open_table(&self) -> PathBuf {
        self.0.join("open")
    }
}

fn send_descriptor(socket: &UnixStream, descriptor: RawFd) {
    let descriptors = [descriptor];
    let message = [ControlMessage::ScmRights(&descriptors)];
    sendmsg::<UnixAddr>(
        socket.as_raw_fd(),
        &[IoSlice::new(b"d")],
        &message,
        MsgFlags::empty(),
        None,
    )
    .unwrap();
}

fn receive_descriptor(socket: &UnixStream) -> OwnedFd {
    let mut byte = [0];
    let mut iov = [IoSliceMut::new(&mut byte)];
    let mut space = nix::cmsg_space!(RawFd);
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<UnixAddr>(socket.as_raw_fd(), &mut iov, Some(&mut space), flags).unwrap();
    for control in message.cmsgs().unwrap() {
        if let ControlMessageOwned::ScmRights(descriptors) = control {
            // SAFETY: installed for us by the kernel with this message.
            return unsafe { OwnedFd::from_raw_fd(descriptors[0]) };
        }
    }
    panic!("the agent sent no descriptor");
}

/// Not a test of its own: what the agent's process runs.
#[test]
fn agent_process() {
    let Some(dir) = std::env::var_os("GRID_TEST_AGENT") else {
        return;
    };
    let places = Places(dir.into());
    let socket = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned().unwrap());
    let runtime = Runtime::new().unwrap();
    let published = Published::open(&places.store());
    let mounted = if places.state().exists() {
        let state = MountState::read(&places.state()).unwrap();
        let connection = receive_descriptor(&socket);
        let known = (state.handshake.clone(), state.device, state.way);
        fuse::resume(
            published.fs(state.owner),
            state.options(),
            connection,
            known,
            runtime.handle(),
        )
        .unwrap()
    } else {
        let mut options = MountOptions::new(places.point(), REFERENCE, me());
        options.io_mode = match std::env::var("GRID_TEST_MODE").unwrap().as_str() {
            "passthrough" => IoModeWish::Passthrough,
            _ => IoModeWish::NoOpen,
        };
        options.open_table = Some(places.open_table());
        let mounted = fuse::mount(published.fs(me()), options, runtime.handle()).unwrap();
        MountState::of(&mounted).write(&places.state()).unwrap();
        send_descriptor(&socket, mounted.descriptor().as_raw_fd());
        mounted
    };
    (&socket).write_all(b"r").unwrap();
    assert_eq!(runtime.block_on(mounted.wait()), Ended::Unmounted);
}

struct Agent {
    process: Child,
    socket: UnixStream,
}

impl Agent {
    fn start(places: &Places, mode: &str) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(DEADLINE)).unwrap();
        let process = Command::new(std::env::current_exe().unwrap())
            .args(["agent_process", "--exact", "--nocapture", "--test-threads=1"])
            .env("GRID_TEST_AGENT", &places.0)
            .env("GRID_TEST_MODE", mode)
            .stdin(OwnedFd::from(theirs))
            .spawn()
            .unwrap();
        Self {
            process,
            socket: ours,
        }
    }

    fn wait_until_ready(&self) {
        let mut byte = [0];
        (&self.socket).read_exact(&mut byte).expect("the agent serves");
    }

    fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

/// Whatever happens, nobody is left waiting in the kernel.
struct Abort(PathBuf);

impl Drop for Abort {
    fn drop(&mut self) {
        umount2(&self.0, MntFlags::MNT_FORCE).ok();
        umount2(&self.0, MntFlags::MNT_DETACH).ok();
    }
}

/// What the readers have done so far, and the longest that one of them waited.
#[derive(Default)]
struct Progress {
    rounds: Vec<AtomicU64>,
    longest: Mutex<Duration>,
    stop: AtomicBool,
}

impl Progress {
    fn read(&self, reader: usize, mut round: impl FnMut(u64)) {
        let mut number = 0;
        while !self.stop.load(Relaxed) {
            let begun = Instant::now();
            round(number);
            number += 1;
            self.rounds[reader].store(number, Relaxed);
            let mut longest = self.longest.lock().unwrap();
            *longest = (*longest).max(begun.elapsed());
        }
    }
}

fn dice(seed: u64) -> impl FnMut(u64) -> u64 {
    let mut state = seed;
    move |below| {
        state += 1;
        u64::from_le_bytes(noise(state, 8).try_into().unwrap()) % below
    }
}

fn readers_never_notice(mode: &str) {
    let dir = tempfile::tempdir().unwrap();
    let places = Places(dir.path().to_owned());
    for made in [places.source(), places.store(), places.point()] {
        fs::create_dir(made).unwrap();
    }
    let large = noise(1, LARGE);
    fs::write(places.source().join("large"), &large).unwrap();
    // Whole objects, which may go in passthrough, and bundled ones, which may not.
    let small: Vec<Vec<u8>> = (0..40)
        .map(|n| noise(n, if n % 2 == 0 { SMALL } else { 20_000 }))
        .collect();
    for (number, bytes) in small.iter().enumerate() {
        fs::write(places.source().join(format!("small-{number}")), bytes).unwrap();
    }
    Published::new(&places.source(), &places.store());
    let sha256 = |path: &Path| {
        let output = Command::new("sha256sum").arg(path).output().unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        output.stdout[..64].to_vec()
    };
    let expected = sha256(&places.source().join("large"));

    let mut agent = Agent::start(&places, mode);
    let abort = Abort(places.point());
    let descriptor = receive_descriptor(&agent.socket);
    agent.wait_until_ready();
    let point = places.point();
    let at = |name: &str| point.join(name);
    let held = File::open(at("large")).unwrap();
    let held_small = File::open(at("small-0")).unwrap();
    let forget_pages = |file: &File| {
        let advice = nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED;
        nix::fcntl::posix_fadvise(file, 0, 0, advice).unwrap();
    };

    const READERS: usize = 8;
    let progress = Progress {
        rounds: (0..READERS).map(|_| AtomicU64::new(0)).collect(),
        ..Progress::default()
    };
    thread::scope(|scope| {
        let (progress, held, at, large, small) = (&progress, &held, &at, &large, &small);
        // Stops the readers also if an assertion below fails, and ends what they wait for.
        struct Stop<'a>(&'a Progress, PathBuf);
        impl Drop for Stop<'_> {
            fn drop(&mut self) {
                self.0.stop.store(true, Relaxed);
                if thread::panicking() {
                    drop(Abort(self.1.clone()));
                }
            }
        }
        let stop = Stop(progress, places.point());
        // Whole, by another program.
        scope.spawn(|| {
            progress.read(0, |_| {
                forget_pages(held);
                assert_eq!(sha256(&at("large")), expected);
            })
        });
        for reader in 1..4 {
            // Past the page cache: nothing hides a request that got lost.
            scope.spawn(move || {
                let mut dice = dice(reader as u64 * 1_000_000);
                let direct = OpenOptions::new()
                    .read(true)
                    .custom_flags(libc::O_DIRECT)
                    .open(at("large"))
                    .unwrap();
                let mut buf = vec![0u8; (512 << 10) + 4096];
                let start = buf.as_ptr().align_offset(4096);
                progress.read(reader, |_| {
                    let offset = dice((LARGE - (512 << 10)) as u64) & !4095;
                    let buf = &mut buf[start..start + (512 << 10)];
                    direct.read_exact_at(buf, offset).unwrap();
                    assert!(*buf == large[offset as usize..][..512 << 10]);
                });
            });
        }
        // Through a file that was opened before the first agent died.
        scope.spawn(move || {
            let mut dice = dice(4_000_000);
            progress.read(4, |_| {
                forget_pages(held);
                let offset = dice((LARGE - 70_000) as u64);
                let mut buf = vec![0; 70_000];
                held.read_exact_at(&mut buf, offset).unwrap();
                assert!(buf == large[offset as usize..][..70_000]);
            });
        });
        // Opened anew each time, some also held open for a while.
        scope.spawn(move || {
            let mut dice = dice(5_000_000);
            let mut kept = Vec::new();
            progress.read(5, |_| {
                let number = dice(small.len() as u64) as usize;
                let mut file = File::open(at(&format!("small-{number}"))).unwrap();
                let mut bytes = vec![];
                file.read_to_end(&mut bytes).unwrap();
                assert!(bytes == small[number]);
                forget_pages(&file);
                kept.push(file);
                if kept.len() > 12 {
                    kept.remove(dice(12) as usize);
                }
            });
        });
        // Names and attributes that no cache knows.
        scope.spawn(move || {
            progress.read(6, |round| {
                let error = fs::metadata(at(&format!("absent-{round}"))).unwrap_err();
                assert_eq!(error.kind(), std::io::ErrorKind::NotFound);
                assert!(nix::sys::statvfs::statvfs(&at("")).is_ok());
            });
        });
        // Mapped, faulted in page by page.
        scope.spawn(move || {
            let mut dice = dice(7_000_000);
            progress.read(7, |_| {
                let file = File::open(at("small-2")).unwrap();
                // SAFETY: files of the mount never change.
                let map = unsafe { memmap2::Mmap::map(&file) }.unwrap();
                for _ in 0..20 {
                    let offset = dice(SMALL as u64) as usize;
                    assert_eq!(map[offset], small[2][offset]);
                }
                drop(map);
                forget_pages(&file);
            });
        });

        let begun = Instant::now();
        for _ in 0..KILLS {
            // Every reader but the slow first one gets somewhere under each agent.
            let before: Vec<u64> = progress
                .rounds
                .iter()
                .map(|rounds| rounds.load(Relaxed))
                .collect();
            while progress
                .rounds
                .iter()
                .zip(&before)
                .skip(1)
                .any(|(now, before)| now.load(Relaxed) < before + 3)
            {
                assert!(
                    begun.elapsed() < DEADLINE,
                    "{:?} after {before:?}",
                    progress.rounds
                );
                thread::sleep(Duration::from_millis(1));
            }
            agent.kill();
            agent = Agent::start(&places, mode);
            send_descriptor(&agent.socket, descriptor.as_raw_fd());
            agent.wait_until_ready();
        }
        drop(stop);
    });
    println!(
        "{mode}: {KILLS} kills, rounds {:?}, the longest round took {:?}",
        progress.rounds,
        progress.longest.lock().unwrap()
    );
    let mut first = vec![0; SMALL];
    held_small.read_exact_at(&mut first, 0).unwrap();
    assert!(first == small[0]);
    drop((held, held_small));
    assert_eq!(sha256(&at("large")), expected);
    // A common unmount ends the agent and takes nothing by force.
    fuse::unmount_at(&point, false).unwrap();
    drop(descriptor);
    assert!(agent.process.wait().unwrap().success());
    drop(abort);
    assert_eq!(fs::read_dir(&point).unwrap().count(), 0);
}

/// Before Linux 6.9 the kernel cannot send requests again.
fn can_resend() -> bool {
    let release = nix::sys::utsname::uname()
        .unwrap()
        .release()
        .to_string_lossy()
        .into_owned();
    let mut numbers = release.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version < (6, 9) {
        sandbox::skip(
            "resuming a mount",
            &format!("Linux {release} cannot resend requests"),
        );
    }
    version >= (6, 9)
}

#[test]
fn readers_never_notice_without_opens() {
    if can_mount_as_root() && can_resend() {
        readers_never_notice("no-open");
    }
}

#[test]
fn readers_never_notice_in_passthrough() {
    if can_mount_as_root() && can_resend() {
        readers_never_notice("passthrough");
    }
}

#[test]
fn a_resumed_mount_keeps_its_mode() {
    if !can_mount_as_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let places = Places(dir.path().to_owned());
    for made in [places.source(), places.store(), places.point()] {
        fs::create_dir(made).unwrap();
    }
    fs::write(places.source().join("one"), "1").unwrap();
    Published::new(&places.source(), &places.store());
    let mut agent = Agent::start(&places, "passthrough");
    let _abort = Abort(places.point());
    let descriptor = receive_descriptor(&agent.socket);
    agent.wait_until_ready();
    agent.kill();
    let state = MountState::read(&places.state()).unwrap();
    assert_eq!(state.handshake.io_mode.mode, IoMode::Passthrough);
    let runtime = Runtime::new().unwrap();
    let mut options = state.options();
    options.io_mode = IoModeWish::NoOpen;
    let known = (state.handshake.clone(), state.device, state.way);
    let published = Published::open(&places.store());
    let mounted = fuse::resume(
        published.fs(state.owner),
        options,
        descriptor,
        known,
        runtime.handle(),
    )
    .unwrap();
    assert_eq!(MountState::of(&mounted), state);
    assert_eq!(fs::read(places.point().join("one")).unwrap(), b"1");
    mounted.unmount(false).unwrap();
    let ended = runtime.block_on(async { tokio::time::timeout(DEADLINE, mounted.wait()).await });
    assert_eq!(ended.unwrap(), Ended::Unmounted);
}
