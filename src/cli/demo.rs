//! `grid-mount demo`: the whole job on a small real data set, in a world of its own.

use std::{
    env, fs, io,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use super::{CliError, args::DemoArgs, output};

/// Enough to see something, little enough to take seconds.
const DEMO_BYTES: u64 = 64 << 20;

pub fn demo(args: &DemoArgs) -> Result<(), CliError> {
    if !Path::new("/dev/fuse").exists() {
        return Err(CliError::Failed(
            "there is no /dev/fuse here; `modprobe fuse` as root makes it".into(),
        ));
    }
    if let Some(data) = args.data.as_ref().filter(|data| !data.is_dir()) {
        let message = format!("{} is not a directory", data.display());
        return Err(CliError::Failed(message.into()));
    }
    let dir = tempfile::Builder::new()
        .prefix("grid-mount-demo-")
        .tempdir()
        .map_err(CliError::failed)?;
    let world = World {
        dir: dir.path().to_owned(),
    };
    let result = world.play(args);
    if args.keep && result.is_ok() {
        let dir = dir.keep();
        output::print(&format!(
            "\nLeft mounted. When you have seen enough:\n  {} unmount --all && rm -r {}\n",
            world.spoken_command(),
            dir.display()
        ));
        return Ok(());
    }
    // Also after a failure: nothing stays mounted, nothing stays behind.
    let _ = world.grid(&["unmount", "--all", "--lazy"]);
    result
}

struct World {
    dir: PathBuf,
}

impl World {
    fn play(&self, args: &DemoArgs) -> Result<(), CliError> {
        let source = self.dir.join("source");
        for below in ["source", "run", "mnt"] {
            private_directory(&self.dir.join(below)).map_err(CliError::failed)?;
        }
        let from = match &args.data {
            Some(dir) => dir.clone(),
            None => real_data().ok_or_else(|| {
                CliError::Failed("no data set found to show; name one with --data DIR".into())
            })?,
        };
        let copied = copy_some(&from, &source).map_err(CliError::failed)?;
        output::print(&format!("# {} from {}\n", output::bytes(copied), from.display()));

        let source_text = source.to_string_lossy().into_owned();
        self.show(&["publish", &source_text, "sample", "--message", "the first"])?;
        let one = self.dir.join("mnt/1").to_string_lossy().into_owned();
        self.show(&["sample/1", &one])?;
        self.run_shown("ls", &["-l", &one])?;
        let largest = largest_file(&source).map_err(CliError::failed)?;
        let inside = Path::new(&one).join(&largest);
        let original = source.join(&largest);
        self.run_shown(
            "cmp",
            &[
                "--verbose",
                &inside.to_string_lossy(),
                &original.to_string_lossy(),
            ],
        )?;
        output::print("  (equal: read through the mount, fetched on the way)\n");
        self.show(&["status"])?;

        fs::write(source.join("NEW-IN-2"), "version 1 never sees this\n").map_err(CliError::failed)?;
        self.show(&["publish", &source_text, "sample", "--message", "the second"])?;
        let two = self.dir.join("mnt/2").to_string_lossy().into_owned();
        self.show(&["sample", &two])?;
        let listed = self.run("diff", &["-rq", &one, &two]).map_err(CliError::failed)?;
        output::print(&format!(
            "$ diff -rq {one} {two}\n{}",
            String::from_utf8_lossy(&listed.stdout)
        ));
        self.show(&["status"])?;
        if !args.keep {
            self.show(&["unmount", "--all"])?;
        }
        Ok(())
    }

    /// A command of ours, shown with what it prints; its failure is ours.
    fn show(&self, arguments: &[&str]) -> Result<(), CliError> {
        output::print(&format!("$ grid-mount {}\n", arguments.join(" ")));
        let done = self.grid(arguments).map_err(CliError::failed)?;
        told(&done)
    }

    fn run_shown(&self, program: &str, arguments: &[&str]) -> Result<(), CliError> {
        output::print(&format!("$ {program} {}\n", arguments.join(" ")));
        let done = self.run(program, arguments).map_err(CliError::failed)?;
        told(&done)
    }

    fn grid(&self, arguments: &[&str]) -> io::Result<Output> {
        self.run(&env::current_exe()?.to_string_lossy(), arguments)
    }

    fn run(&self, program: &str, arguments: &[&str]) -> io::Result<Output> {
        Command::new(program)
            .args(arguments)
            .envs(self.environment())
            .output()
    }

    /// A catalog, a cache and an agent that nobody else uses.
    fn environment(&self) -> Vec<(&'static str, String)> {
        let below = |name: &str| self.dir.join(name).to_string_lossy().into_owned();
        vec![
            ("XDG_RUNTIME_DIR", below("run")),
            ("XDG_CONFIG_HOME", below("config")),
            ("GRID_MOUNT_SOCKET", String::new()),
            ("GRID_MOUNT_CATALOG", format!("file://{}", below("catalog"))),
            ("GRID_MOUNT_CACHE_DIR", below("cache")),
            ("GRID_MOUNT_CACHE_SIZE", "1GiB".into()),
            ("GRID_MOUNT_CACHE_MIN_FREE", "0".into()),
            ("GRID_MOUNT_USER", "me".into()),
        ]
    }

    /// How the user reaches this world's agent.
    fn spoken_command(&self) -> String {
        let program =
            env::current_exe().map_or_else(|_| "grid-mount".into(), |path| path.display().to_string());
        format!("XDG_RUNTIME_DIR={} {program}", self.dir.join("run").display())
    }
}

fn told(done: &Output) -> Result<(), CliError> {
    output::print(&String::from_utf8_lossy(&done.stdout));
    let said = String::from_utf8_lossy(&done.stderr);
    if done.status.success() {
        said.lines()
            .for_each(|line| output::print(&format!("  {line}\n")));
        return Ok(());
    }
    let said = said.trim();
    Err(CliError::Failed(
        said.strip_prefix("grid-mount: ")
            .unwrap_or(said)
            .to_owned()
            .into(),
    ))
}

fn private_directory(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    fs::DirBuilder::new().mode(0o700).create(path)
}

/// What the toolchain ships, else what every system has.
fn real_data() -> Option<PathBuf> {
    let rustc = Command::new("rustc").args(["--print", "sysroot"]).output().ok();
    let sysroot = rustc
        .filter(|output| output.status.success())
        .map(|output| Path::new(String::from_utf8_lossy(&output.stdout).trim()).join("lib/rustlib"));
    sysroot
        .into_iter()
        .chain([PathBuf::from("/usr/share"), PathBuf::from("/usr/lib")])
        .find(|dir| dir.is_dir())
}

/// Copies files of `from`, with their directories, until there are [`DEMO_BYTES`].
fn copy_some(from: &Path, to: &Path) -> io::Result<u64> {
    let mut copied = 0;
    for entry in walkdir::WalkDir::new(from)
        .sort_by_file_name()
        .into_iter()
        .filter_map(Result::ok)
    {
        let Ok(below) = entry.path().strip_prefix(from) else {
            continue;
        };
        if entry.file_type().is_file() && copied < DEMO_BYTES {
            let target = to.join(below);
            if let Some(parent) = target.parent() {
                fs::create_dir_all(parent)?;
            }
            // A file that cannot be read is left out.
            copied += fs::copy(entry.path(), target).unwrap_or(0);
        }
    }
    Ok(copied)
}

fn largest_file(dir: &Path) -> io::Result<PathBuf> {
    walkdir::WalkDir::new(dir)
        .into_iter()
        .filter_map(Result::ok)
        .filter(|entry| entry.file_type().is_file())
        .max_by_key(|entry| entry.metadata().map_or(0, |metadata| metadata.len()))
        .and_then(|entry| entry.path().strip_prefix(dir).ok().map(Path::to_owned))
        .ok_or_else(|| io::Error::other("there is no file to read"))
}
