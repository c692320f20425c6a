//! A throw-away world for one test: its own home, runtime directory, catalog and cache, as root or as an
//! ordinary user. Dropping it ends its agent and leaves no mount, also when the test failed.

#![allow(dead_code, reason = "each test file uses its own part of it")]

use std::{
    ffi::OsStr,
    fs,
    os::unix::fs::{PermissionsExt, chown},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

/// Debian's `nobody`.
pub const ORDINARY_UID: u32 = 65534;

pub struct Sandbox {
    dir: tempfile::TempDir,
    uid: u32,
    extra: Vec<(String, String)>,
}

impl Sandbox {
    /// As whoever runs the tests.
    pub fn new() -> Self {
        Self::owned_by(nix::unistd::geteuid().as_raw())
    }

    /// As an ordinary user; `None` (with the reason printed) where this is not run by root.
    pub fn ordinary() -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            skip("an ordinary user beside root", "the tests do not run as root");
            return None;
        }
        let open_to_all =
            fs::metadata("/dev/fuse").is_ok_and(|fuse| fuse.permissions().mode() & 0o006 == 0o006);
        if !open_to_all {
            skip(
                "an ordinary user's mount",
                "/dev/fuse is not open to everybody (udev: chmod 0666 /dev/fuse)",
            );
            return None;
        }
        Some(Self::owned_by(ORDINARY_UID))
    }

    fn owned_by(uid: u32) -> Self {
        let dir = tempfile::Builder::new()
            .prefix("grid-mount-test-")
            .tempdir()
            .unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let sandbox = Self {
            dir,
            uid,
            extra: Vec::new(),
        };
        for sub in ["home", "run", "data", "cache", "mnt", "tmp"] {
            let path = sandbox.path(sub);
            fs::create_dir(&path).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).unwrap();
            chown(&path, Some(uid), Some(uid)).unwrap();
        }
        sandbox
    }

    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.extra.push((name.into(), value.into()));
        self
    }

    pub fn path(&self, below: &str) -> PathBuf {
        self.dir.path().join(below)
    }

    pub fn uid(&self) -> u32 {
        self.uid
    }

    /// Any program, as this sandbox's user and with its environment.
    pub fn program(&self, program: impl AsRef<OsStr>) -> Command {
        let root = nix::unistd::geteuid().is_root();
        let mut command = if root && self.uid != 0 {
            let mut command = Command::new("/usr/bin/setpriv");
            command
                .arg(format!("--reuid={}", self.uid))
                .arg(format!("--regid={}", self.uid))
                .args(["--clear-groups", "--inh-caps=-all", "--"])
                .arg(program);
            command
        } else {
            Command::new(program)
        };
        // An ordinary user cannot use what lies in root's home.
        let path = match self.uid {
            0 => std::env::var_os("PATH").unwrap_or_default(),
            _ => "/usr/local/bin:/usr/bin:/bin".into(),
        };
        command
            .env_clear()
            .env("PATH", path)
            .env("HOME", self.path("home"))
            .env("TMPDIR", self.path("tmp"))
            .env("XDG_RUNTIME_DIR", self.path("run"))
            .env("XDG_DATA_HOME", self.path("data"))
            .env("GRID_MOUNT_USER", "alice")
            .env("GRID_MOUNT_CACHE_DIR", self.path("cache/grid"))
            .env("GRID_MOUNT_CACHE_SIZE", "8GiB")
            .env("GRID_MOUNT_CACHE_MIN_FREE", "100MiB")
            .envs(self.extra.iter().map(|(name, value)| (name, value)))
            .current_dir(self.dir.path())
            .stdin(Stdio::null());
        command
    }

    pub fn grid(&self, arguments: &[&str]) -> Command {
        let mut command = self.program(env!("CARGO_BIN_EXE_grid-mount"));
        command.args(arguments);
        command
    }

    /// Runs it and expects success; returns standard output.
    pub fn ok(&self, arguments: &[&str]) -> String {
        let output = self.grid(arguments).output().unwrap();
        assert!(
            output.status.success(),
            "grid-mount {arguments:?}: {}",
            told(&output)
        );
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs it and expects exit status `code`; returns standard error.
    pub fn fails(&self, code: i32, arguments: &[&str]) -> String {
        let output = self.grid(arguments).output().unwrap();
        assert_eq!(
            output.status.code(),
            Some(code),
            "grid-mount {arguments:?}: {}",
            told(&output)
        );
        String::from_utf8(output.stderr).unwrap()
    }

    pub fn status(&self) -> serde_json::Value {
        serde_json::from_str(&self.ok(&["status", "--json"])).unwrap()
    }

    /// The process id of the running agent.
    pub fn agent_pid(&self) -> Option<i32> {
        self.status()["agent"]["pid"].as_i64().map(|pid| pid as i32)
    }

    /// Mount points of this sandbox that the kernel knows.
    pub fn mounts(&self) -> Vec<PathBuf> {
        mounts_below(self.dir.path())
    }
}

/// The parent of a process: of an agent started on demand, its keeper.
pub fn parent(pid: i32) -> Option<i32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("PPid:"))?;
    line.trim().parse().ok()
}

pub fn mounts_below(dir: &Path) -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/self/mounts").unwrap();
    table
        .lines()
        .filter_map(|line| line.split(' ').nth(1))
        .map(|path| PathBuf::from(path.replace("\\040", " ")))
        .filter(|path| path.starts_with(dir))
        .collect()
}

pub fn told(output: &Output) -> String {
    format!(
        "{}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// Says why a test does not run; where nothing may be skipped (tests/run, CI), fails.
pub fn skip(what: &str, why: &str) {
    let strict = std::env::var_os("GRID_MOUNT_TEST_STRICT").is_some() || std::env::var_os("CI").is_some();
    assert!(!strict, "{what} cannot be tested: {why}");
    eprintln!("SKIPPED: {what}: {why}");
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        let agent = self.grid(&["status", "--json"]).output().ok().and_then(|output| {
            let status: serde_json::Value = serde_json::from_slice(&output.stdout).ok()?;
            status["agent"]["pid"].as_i64()
        });
        let _ = self.grid(&["unmount", "--all", "--lazy"]).output();
        for mount in self.mounts() {
            let _ = nix::mount::umount2(&mount, nix::mount::MntFlags::MNT_DETACH);
        }
        if let Some(pid) = agent {
            // It ends by itself with its last mount; one that does not must not outlive the test, nor its
            // keeper, which was started by the same program.
            let program = |pid: i32| fs::read_link(format!("/proc/{pid}/exe")).ok();
            let keeper = parent(pid as i32).filter(|keeper| program(*keeper) == program(pid as i32));
            let pid = nix::unistd::Pid::from_raw(pid as i32);
            for _ in 0..100 {
                if nix::sys::signal::kill(pid, None).is_err() {
                    return;
                }
                std::thread::sleep(std::time::Duration::from_millis(50));
            }
            for pid in keeper.map(nix::unistd::Pid::from_raw).into_iter().chain([pid]) {
                let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
            }
        }
    }
}
