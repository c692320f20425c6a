//! A user's agent killed under its readers, with the real program: its keeper starts it again, nothing
//! fails, no byte is wrong; and where it cannot be started again, nobody waits for ever.

#[path = "support/sandbox.rs"]
mod sandbox;

use std::{
    fs,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use sandbox::{Sandbox, parent, skip, told};

const BIG: usize = 64 << 20;
const KILLS: usize = 6;
const DEADLINE: Duration = Duration::from_secs(120);

fn sandboxes() -> Vec<Sandbox> {
    if !Path::new("/dev/fuse").exists() {
        skip("a keeper", "there is no /dev/fuse");
        return Vec::new();
    }
    [Some(Sandbox::new()), Sandbox::ordinary()]
        .into_iter()
        .flatten()
        .collect()
}

fn published(sandbox: &Sandbox) -> PathBuf {
    let source = sandbox.path("source");
    fs::create_dir_all(source.join("dir")).unwrap();
    let mut state = 1u64;
    let bytes: Vec<u8> = (0..BIG / 8)
        .flat_map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            state.to_le_bytes()
        })
        .collect();
    fs::write(source.join("big"), bytes).unwrap();
    for n in 0..300 {
        fs::write(source.join(format!("dir/{n}")), format!("{n}\n").repeat(n)).unwrap();
    }
    sandbox.ok(&["publish", source.to_str().unwrap(), "data"]);
    source
}

fn send(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).unwrap();
}

fn wait_for<T>(what: &str, mut done: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(value) = done() {
            return value;
        }
        assert!(begun.elapsed() < DEADLINE, "{what}");
        thread::sleep(Duration::from_millis(5));
    }
}

fn is_gone(pid: i32) -> Option<()> {
    kill(Pid::from_raw(pid), None).is_err().then_some(())
}

/// Nothing but the log.
fn runtime_is_clean(sandbox: &Sandbox) {
    let names = || -> Vec<_> {
        fs::read_dir(sandbox.path("run/grid-mount"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .filter(|name| name != "agent.log")
            .collect()
    };
    assert_eq!(names(), Vec::<std::ffi::OsString>::new());
}

fn run(sandbox: &Sandbox, program: &str, arguments: &[&str]) -> Vec<u8> {
    let output = sandbox.program(program).args(arguments).output().unwrap();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}",
        told(&output)
    );
    output.stdout
}

#[test]
fn readers_do_not_notice_that_their_agent_is_killed() {
    for sandbox in sandboxes() {
        let source = published(&sandbox);
        for mode in ["passthrough", "no-open"] {
            survive(&sandbox, &source, mode);
        }
    }
}

fn survive(sandbox: &Sandbox, source: &Path, mode: &str) {
    let mount = sandbox.path("mnt/point");
    sandbox.ok(&["data", mount.to_str().unwrap(), "--io-mode", mode]);
    let first = sandbox.agent_pid().unwrap();
    let keeper = parent(first).unwrap();
    let reference = fs::read(source.join("big")).unwrap();
    let sum = run(sandbox, "sha256sum", &[source.join("big").to_str().unwrap()])[..64].to_vec();
    let listed = |dir: &Path| {
        let mut lines: Vec<String> = String::from_utf8(run(
            sandbox,
            "find",
            &[dir.to_str().unwrap(), "-printf", "%P %s %m\\n"],
        ))
        .unwrap()
        .lines()
        .map(str::to_owned)
        .collect();
        lines.sort();
        lines
    };
    let expected: Vec<String> = listed(source)
        .into_iter()
        .filter(|line| !line.starts_with(' '))
        .collect();
    let big = mount.join("big");
    let stop = AtomicBool::new(false);
    let rounds: [AtomicU64; 3] = Default::default();
    let longest = AtomicU64::new(0);
    let repeat = |at: usize, round: &mut dyn FnMut(u64)| {
        while !stop.load(Relaxed) {
            let begun = Instant::now();
            round(rounds[at].fetch_add(1, Relaxed));
            if at == 2 {
                longest.fetch_max(begun.elapsed().as_millis() as u64, Relaxed);
            }
        }
    };
    thread::scope(|scope| {
        struct Stop<'a>(&'a AtomicBool);
        impl Drop for Stop<'_> {
            fn drop(&mut self) {
                self.0.store(true, Relaxed);
            }
        }
        let stopping = Stop(&stop);
        let repeat = &repeat;
        let (big, mount, sum, expected, reference, listed) =
            (&big, &mount, &sum, &expected, &reference, &listed);
        scope.spawn(move || {
            repeat(0, &mut |_| {
                assert_eq!(
                    &run(sandbox, "sha256sum", &[big.to_str().unwrap()])[..64],
                    &sum[..]
                );
            })
        });
        scope.spawn(move || {
            repeat(1, &mut |_| {
                let found: Vec<String> = listed(mount)
                    .into_iter()
                    .filter(|line| !line.starts_with(' '))
                    .collect();
                let names = |lines: &[String]| -> Vec<String> {
                    lines
                        .iter()
                        .map(|line| line.split(' ').next().unwrap().to_owned())
                        .collect()
                };
                assert_eq!(names(&found), names(expected));
            })
        });
        // Root reads an ordinary user's mount as little as anybody else: so by programs of that user.
        scope.spawn(move || {
            let own = sandbox.uid() == nix::unistd::geteuid().as_raw();
            let held = own.then(|| fs::File::open(big).unwrap());
            repeat(2, &mut |round| {
                let block = (round as usize * 7919) % (BIG >> 16);
                let wanted = &reference[block << 16..][..1 << 16];
                match &held {
                    Some(held) => {
                        let advice = nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED;
                        nix::fcntl::posix_fadvise(held, 0, 0, advice).unwrap();
                        let mut buf = vec![0; 1 << 16];
                        held.read_exact_at(&mut buf, (block << 16) as u64).unwrap();
                        assert!(buf == wanted);
                    }
                    None => {
                        let skip = format!("skip={block}");
                        let from = format!("if={}", big.display());
                        let got = run(
                            sandbox,
                            "dd",
                            &[&from, "bs=65536", "count=1", &skip, "iflag=direct", "status=none"],
                        );
                        assert!(got == wanted);
                    }
                }
            })
        });
        let mut pid = first;
        for _ in 0..KILLS {
            let before: Vec<u64> = rounds.iter().map(|rounds| rounds.load(Relaxed)).collect();
            wait_for("the readers stand still", || {
                rounds
                    .iter()
                    .zip(&before)
                    .all(|(now, before)| now.load(Relaxed) >= before + 2)
                    .then_some(())
            });
            send(pid, Signal::SIGKILL);
            pid = wait_for("no agent again", || sandbox.agent_pid().filter(|new| *new != pid));
            assert_eq!(parent(pid), Some(keeper));
        }
        drop(stopping);
    });
    println!(
        "uid {}, {mode}: {KILLS} kills, rounds {rounds:?}, the longest read took {} ms",
        sandbox.uid(),
        longest.load(Relaxed)
    );
    sandbox.ok(&["unmount", "--all"]);
    wait_for("the keeper outlives its agent", || is_gone(keeper));
    assert!(sandbox.mounts().is_empty());
    assert!(!mount.exists());
    runtime_is_clean(sandbox);
}

#[test]
fn a_signal_to_the_keeper_or_the_agent_ends_both() {
    for sandbox in sandboxes() {
        published(&sandbox);
        for to_keeper in [true, false] {
            let mount = sandbox.path("mnt/point");
            sandbox.ok(&["data", mount.to_str().unwrap()]);
            let agent = sandbox.agent_pid().unwrap();
            let keeper = parent(agent).unwrap();
            send(if to_keeper { keeper } else { agent }, Signal::SIGTERM);
            wait_for("the keeper stays", || is_gone(keeper));
            wait_for("the agent stays", || is_gone(agent));
            assert!(sandbox.mounts().is_empty());
            assert!(!mount.exists());
            runtime_is_clean(&sandbox);
        }
    }
}

#[test]
fn an_agent_that_cannot_start_again_leaves_an_error_and_nothing_else() {
    for sandbox in sandboxes() {
        published(&sandbox);
        let mount = sandbox.path("mnt/point");
        sandbox.ok(&["data", mount.to_str().unwrap()]);
        let agent = sandbox.agent_pid().unwrap();
        let keeper = parent(agent).unwrap();
        // Another agent takes the cache while none is there: the keeper sleeps meanwhile.
        let lock = fs::File::open(sandbox.path("cache/grid/lock")).unwrap();
        send(keeper, Signal::SIGSTOP);
        send(agent, Signal::SIGKILL);
        lock.lock().unwrap();
        send(keeper, Signal::SIGCONT);
        let begun = Instant::now();
        let mut reader = sandbox
            .program("cat")
            .arg(mount.join("big"))
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        assert!(!reader.wait().unwrap().success());
        assert!(begun.elapsed() < Duration::from_secs(60));
        println!("uid {}: an error after {:?}", sandbox.uid(), begun.elapsed());
        wait_for("the keeper stays", || is_gone(keeper));
        assert!(sandbox.mounts().is_empty());
        runtime_is_clean(&sandbox);
    }
}

#[test]
fn a_mount_that_lost_keeper_and_agent_is_cleared_and_made_again() {
    for sandbox in sandboxes() {
        published(&sandbox);
        let (one, two) = (sandbox.path("mnt/one"), sandbox.path("mnt/two"));
        sandbox.ok(&["data", one.to_str().unwrap()]);
        let agent = sandbox.agent_pid().unwrap();
        for pid in [parent(agent).unwrap(), agent] {
            send(pid, Signal::SIGKILL);
            wait_for("it stays", || is_gone(pid));
        }
        sandbox.ok(&["data", two.to_str().unwrap()]);
        assert_eq!(sandbox.mounts().len(), 2);
        run(&sandbox, "cat", &[one.join("dir/7").to_str().unwrap()]);
        sandbox.ok(&["unmount", "--all"]);
        assert!(!one.exists());
    }
}
