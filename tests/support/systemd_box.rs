//! A real systemd in a throw-away container, with this program installed by its own install step.
//!
//! `boot-systemd`, beside this file, makes it. Dropping it ends it.

#![allow(dead_code, reason = "each test file uses its own part of it")]

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

pub const DEADLINE: Duration = Duration::from_secs(60);
const PROGRAM: &str = "tests/support/boot-systemd";

pub struct SystemdBox {
    dir: tempfile::TempDir,
    program: PathBuf,
}

/// Why a test does not run; where nothing may be skipped (tests/run, CI), a failure.
fn skip(why: &str) {
    let strict = env::var_os("GRID_MOUNT_TEST_STRICT").is_some() || env::var_os("CI").is_some();
    assert!(!strict, "systemd cannot be tested: {why}");
    eprintln!("SKIPPED: systemd: {why}");
}

fn program() -> Option<PathBuf> {
    if !nix::unistd::geteuid().is_root() {
        skip("the tests do not run as root");
        return None;
    }
    Some(Path::new(env!("CARGO_MANIFEST_DIR")).join(PROGRAM))
}

impl SystemdBox {
    /// Booted, with the program installed, `/etc/grid-mount/config.toml` written and a catalog at
    /// `/srv/catalog`. `None`, with the reason printed, where there is none.
    pub fn boot() -> Option<Self> {
        let program = program()?;
        let dir = tempfile::Builder::new()
            .prefix("grid-mount-box-")
            .tempdir()
            .unwrap();
        let this = Self { dir, program };
        let up = this.control("up").output().unwrap();
        assert!(up.status.success(), "the box does not boot: {}", told(&up));
        this.install(Path::new(env!("CARGO_BIN_EXE_grid-mount")));
        this.write(
            "/etc/grid-mount/config.toml",
            "catalog = \"file:///srv/catalog\"\nuser = \"alice\"\ncache_size = \"1GiB\"\ncache_min_free = \"1MiB\"\n",
        );
        this.ok("systemctl daemon-reload && systemd-tmpfiles --create grid-mount.conf");
        Some(this)
    }

    /// With the project's own install step.
    pub fn install(&self, binary: &Path) {
        let install = Path::new(env!("CARGO_MANIFEST_DIR")).join("systemd/install");
        let output = Command::new(install)
            .env("DESTDIR", self.root())
            .env("BINARY", binary)
            .output()
            .unwrap();
        assert!(output.status.success(), "systemd/install: {}", told(&output));
    }

    fn control(&self, command: &str) -> Command {
        let mut control = Command::new(&self.program);
        control
            .arg(command)
            .arg(self.dir.path())
            .env("BOOT_SYSTEMD_TIMEOUT", "60")
            .stdin(Stdio::null());
        control
    }

    /// Its root directory, as this process sees it.
    pub fn root(&self) -> PathBuf {
        fs::read_link(self.dir.path().join("root")).unwrap()
    }

    /// A path of its, as this process sees it.
    pub fn path(&self, inside: &str) -> PathBuf {
        self.root().join(inside.trim_start_matches('/'))
    }

    pub fn write(&self, inside: &str, text: &str) {
        let path = self.path(inside);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    pub fn read(&self, inside: &str) -> String {
        fs::read_to_string(self.path(inside)).unwrap_or_else(|error| panic!("{inside}: {error}"))
    }

    /// A shell command inside, as root.
    pub fn run(&self, script: &str) -> Output {
        self.control("exec")
            .args(["--", "/bin/bash", "-c", script])
            .output()
            .unwrap()
    }

    /// Expects success; returns standard output.
    pub fn ok(&self, script: &str) -> String {
        let output = self.run(script);
        if !output.status.success() {
            panic!("{script}: {}\n{}", told(&output), self.journal());
        }
        String::from_utf8(output.stdout).unwrap()
    }

    /// Expects failure; returns standard error.
    pub fn fails(&self, script: &str) -> String {
        let output = self.run(script);
        assert!(!output.status.success(), "{script}: {}", told(&output));
        String::from_utf8(output.stderr).unwrap()
    }

    pub fn journal(&self) -> String {
        let output = self.run("journalctl --no-pager --output=short-monotonic -u 'grid-mount*' -n 200");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// A property of a unit.
    pub fn property(&self, unit: &str, name: &str) -> String {
        let text = self.ok(&format!("systemctl show --value --property={name} '{unit}'"));
        text.trim().to_owned()
    }

    /// The agent's process, by the number it has inside.
    pub fn agent(&self) -> i32 {
        self.property("grid-mount.service", "MainPID").parse().unwrap()
    }

    pub fn mounts(&self) -> Vec<PathBuf> {
        let table = self.ok("cat /proc/self/mounts");
        table
            .lines()
            .map(|line| line.split(' ').collect::<Vec<_>>())
            .filter(|fields| fields[2] == "fuse.grid-mount")
            .map(|fields| PathBuf::from(fields[1]))
            .collect()
    }

    /// Shuts it down as one would a host; what the box says of that.
    pub fn power_off(&self) -> String {
        told(&self.control("down").output().unwrap())
    }

    pub fn wait_for<T>(&self, what: &str, mut done: impl FnMut() -> Option<T>) -> T {
        let begun = Instant::now();
        loop {
            if let Some(value) = done() {
                return value;
            }
            if begun.elapsed() > DEADLINE {
                panic!("{what}: not in time\n{}", self.journal());
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for SystemdBox {
    fn drop(&mut self) {
        if thread::panicking() && self.dir.path().join("root").exists() {
            eprintln!("{}", self.journal());
        }
        match self.control("down").output() {
            Ok(output) if output.status.success() => {}
            Ok(output) => eprintln!("the box does not go down: {}", told(&output)),
            Err(error) => eprintln!("the box does not go down: {error}"),
        }
    }
}

pub fn told(output: &Output) -> String {
    format!(
        "{}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// Bytes that cannot be had by guessing, the same for the same seed.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed;
    (0..length.div_ceil(8))
        .flat_map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            state.to_le_bytes()
        })
        .take(length)
        .collect()
}
