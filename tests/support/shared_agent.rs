//! An agent of root's that serves many users, and users who call it: ids that nobody else has. Dropping it
//! ends the agent and leaves no mount.

#![allow(dead_code, reason = "each test file uses its own part of it")]

use std::{
    ffi::OsStr,
    fs,
    io::Read,
    os::unix::fs::{PermissionsExt, chown},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use crate::sandbox::{mounts_below, skip, told};

pub const DEADLINE: Duration = Duration::from_secs(60);

pub struct SharedAgent {
    dir: tempfile::TempDir,
    child: Option<Child>,
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
}

impl SharedAgent {
    /// With `rules` below its configuration's `[agent]`; `CATALOG` there is the catalog's URL. `None`, with
    /// the reason printed, where this machine cannot have one.
    pub fn start(rules: &str) -> Option<Self> {
        Self::start_with(rules, &[], &[])
    }

    pub fn start_with(rules: &str, arguments: &[&str], environment: &[(&str, &str)]) -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            skip("an agent of many users", "the tests do not run as root");
            return None;
        }
        if !Path::new("/dev/fuse").exists() {
            skip("an agent of many users", "there is no /dev/fuse");
            return None;
        }
        let dir = tempfile::Builder::new()
            .prefix("grid-mount-shared-")
            .tempdir()
            .unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        for sub in ["catalog", "home", "tmp"] {
            fs::create_dir(dir.path().join(sub)).unwrap();
            fs::set_permissions(dir.path().join(sub), fs::Permissions::from_mode(0o755)).unwrap();
        }
        let mut agent = Self {
            dir,
            child: None,
            arguments: arguments.iter().map(|text| (*text).to_owned()).collect(),
            environment: environment
                .iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
                .collect(),
        };
        agent.configure(rules);
        agent.launch();
        Some(agent)
    }

    pub fn configure(&self, rules: &str) {
        let rules = rules.replace("CATALOG", &self.catalog());
        fs::write(self.path("config.toml"), format!("[agent]\n{rules}\n")).unwrap();
    }

    pub fn launch(&mut self) {
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(self.path("agent.log"))
            .unwrap();
        let mut command = self.of_root(env!("CARGO_BIN_EXE_grid-mount"));
        command
            .args([
                "agent",
                "--cache-size",
                "4GiB",
                "--cache-min-free",
                "10MiB",
                "--config",
            ])
            .arg(self.path("config.toml"))
            .arg("--cache-dir")
            .arg(self.path("cache"))
            .args(&self.arguments)
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdout(Stdio::null())
            .stderr(log);
        self.child = Some(command.spawn().unwrap());
        self.wait_for("the agent", || {
            std::os::unix::net::UnixStream::connect(self.socket())
                .is_ok()
                .then_some(())
        });
    }

    pub fn path(&self, below: &str) -> PathBuf {
        self.dir.path().join(below)
    }

    pub fn socket(&self) -> PathBuf {
        self.path("run/agent.sock")
    }

    pub fn catalog(&self) -> String {
        format!("file://{}", self.path("catalog").display())
    }

    pub fn pid(&self) -> i32 {
        self.child.as_ref().unwrap().id() as i32
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.path("agent.log")).unwrap_or_default()
    }

    /// The user's home, made when first asked for.
    pub fn home(&self, uid: u32) -> PathBuf {
        let home = self.path(&format!("home/{uid}"));
        if !home.exists() {
            fs::create_dir(&home).unwrap();
            fs::set_permissions(&home, fs::Permissions::from_mode(0o700)).unwrap();
            chown(&home, Some(uid), Some(uid)).unwrap();
        }
        home
    }

    fn environment<'c>(&self, command: &'c mut Command, home: &Path) -> &'c mut Command {
        command
            .env_clear()
            .env("PATH", "/usr/local/bin:/usr/bin:/bin")
            .env("HOME", home)
            .env("TMPDIR", self.path("tmp"))
            .env("GRID_MOUNT_SOCKET", self.socket())
            .current_dir("/")
            .stdin(Stdio::null())
    }

    pub fn of_root(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        self.environment(&mut command, &self.path("home"));
        command
    }

    /// Any program as a user.
    pub fn of_user(&self, uid: u32, program: impl AsRef<OsStr>) -> Command {
        let home = self.home(uid);
        let mut command = Command::new("/usr/bin/setpriv");
        self.environment(&mut command, &home);
        command
            .env("GRID_MOUNT_CATALOG", self.catalog())
            .env("GRID_MOUNT_USER", format!("user{uid}"))
            .arg(format!("--reuid={uid}"))
            .arg(format!("--regid={uid}"))
            .args(["--clear-groups", "--inh-caps=-all", "--"])
            .arg(program);
        command
    }

    pub fn grid(&self, uid: u32, arguments: &[&str]) -> Command {
        let mut command = match uid {
            0 => self.of_root(env!("CARGO_BIN_EXE_grid-mount")),
            uid => self.of_user(uid, env!("CARGO_BIN_EXE_grid-mount")),
        };
        if uid == 0 {
            command
                .env("GRID_MOUNT_CATALOG", self.catalog())
                .env("GRID_MOUNT_USER", "root");
        }
        command.args(arguments);
        command
    }

    pub fn ok(&self, uid: u32, arguments: &[&str]) -> String {
        let output = self.grid(uid, arguments).output().unwrap();
        assert!(
            output.status.success(),
            "{uid}: grid-mount {arguments:?}: {}\n{}",
            told(&output),
            self.log()
        );
        String::from_utf8(output.stdout).unwrap()
    }

    /// Expects exit status 1; returns standard error.
    pub fn fails(&self, uid: u32, arguments: &[&str]) -> String {
        let output = self.grid(uid, arguments).output().unwrap();
        assert_eq!(
            output.status.code(),
            Some(1),
            "{uid}: grid-mount {arguments:?}: {}\n{}",
            told(&output),
            self.log()
        );
        String::from_utf8(output.stderr).unwrap()
    }

    pub fn status(&self, uid: u32) -> serde_json::Value {
        serde_json::from_str(&self.ok(uid, &["status", "--json"])).unwrap()
    }

    pub fn mount_points(&self, uid: u32) -> Vec<PathBuf> {
        let status = self.status(uid);
        let mounts = status["mounts"].as_array().unwrap();
        mounts
            .iter()
            .map(|mount| PathBuf::from(mount["mount_point"].as_str().unwrap()))
            .collect()
    }

    /// Publishes a small directory as `root:NAME`; returns it.
    pub fn publish(&self, name: &str, files: &[(&str, &str)]) -> PathBuf {
        let source = self.path(&format!("source-{name}"));
        for (file, text) in files {
            let path = source.join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        self.ok(0, &["publish", source.to_str().unwrap(), name]);
        source
    }

    pub fn wait_for<T>(&self, what: &str, mut done: impl FnMut() -> Option<T>) -> T {
        let begun = Instant::now();
        loop {
            if let Some(value) = done() {
                return value;
            }
            assert!(begun.elapsed() < DEADLINE, "{what}: {}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.pid()), signal).unwrap();
    }

    /// Asks it to end, and waits; its exit status.
    pub fn stop(&mut self) -> std::process::ExitStatus {
        self.signal(nix::sys::signal::Signal::SIGTERM);
        let mut child = self.child.take().unwrap();
        let begun = Instant::now();
        loop {
            if let Some(status) = child.try_wait().unwrap() {
                return status;
            }
            if begun.elapsed() > DEADLINE {
                let _ = child.kill();
                let _ = child.wait();
                panic!("it does not end: {}", self.log());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub fn mounts(&self) -> Vec<PathBuf> {
        mounts_below(self.dir.path())
    }
}

impl Drop for SharedAgent {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = nix::sys::signal::kill(
                nix::unistd::Pid::from_raw(child.id() as i32),
                nix::sys::signal::Signal::SIGTERM,
            );
            for _ in 0..200 {
                if child.try_wait().is_ok_and(|ended| ended.is_some()) {
                    break;
                }
                std::thread::sleep(Duration::from_millis(50));
            }
            let _ = child.kill();
            let _ = child.wait();
        }
        for mount in self.mounts() {
            let _ = nix::mount::umount2(&mount, nix::mount::MntFlags::MNT_DETACH);
        }
    }
}

/// What a program said, which has to succeed.
pub fn said(output: &Output) -> String {
    assert!(output.status.success(), "{}", told(output));
    String::from_utf8(output.stdout.clone()).unwrap()
}

pub fn read_to_end(mut from: impl Read) -> Vec<u8> {
    let mut bytes = Vec::new();
    let _ = from.read_to_end(&mut bytes);
    bytes
}
