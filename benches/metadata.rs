//! What metadata costs through a real mount, beside the same tree on the native file system:
//! `cargo bench --bench metadata -- [million|wide|ten-million|register|register-flat]… [options]` (default: the
//! first two).
//!
//! Builds a tree as a registered bucket would give it (one object with an ETag per file; the objects
//! themselves do not exist, since nothing reads a byte), publishes it in a `file://` catalog of its own,
//! and mounts it with the real binary. Each figure called "first" is of a mount made just before; natively,
//! of a directory whose cached inodes and names the kernel was told to drop (root only). The native files
//! are empty. Ten million are made natively only when that is asked for.
//!
//! | option | |
//! | --- | --- |
//! | `--rows NAME,…` | only these of `first-ls`, `ls`, `ls-l`, `find`, `find-ls`, `find-newer`, `stat`, `memory`, `memory-ls` |
//! | `--native` | makes the native copy of ten million, too |
//! | `--native=DIR` | makes it in DIR, or takes what an earlier run made there, and leaves it there |
//! | `--files N` | so many files instead, as many in each directory as before: to try the benchmark itself |
//!
//! `register` and `register-flat` run the real command on a bucket of ten million keys, in 10,000 directories
//! or in one, and watch its memory; the bucket is in this process, and only lists.

#[path = "metadata/bucket.rs"]
mod bucket;

use std::{
    error::Error,
    fs,
    io::Write,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use bucket::{Bucket, Keys};
use grid_mount::{
    catalog::{self, Draft, OriginLocation, TreePart, TreeParts},
    origin::{Deadlines, Pin, StoreSettings, StoreUrl},
    tree::{
        Content, Object, Timestamp,
        builder::{BuiltPart, BuiltTree, DEFAULT_MEMORY_LIMIT, TreeBuilder},
    },
};

type Failure = Box<dyn Error>;

/// Random paths that are asked for.
const STATS: u64 = 100_000;
/// How often `find` is repeated to see whether the agent grows.
const REPEATS: usize = 3;
const ROWS: [&str; 9] = [
    "first-ls",
    "ls",
    "ls-l",
    "find",
    "find-ls",
    "find-newer",
    "stat",
    "memory",
    "memory-ls",
];

/// What of a shape is measured, and beside what.
#[derive(Default)]
struct Choice {
    /// Empty: all.
    rows: Vec<String>,
    native: bool,
    native_dir: Option<PathBuf>,
    files: Option<u64>,
}

impl Choice {
    fn has(&self, row: &str) -> bool {
        self.rows.is_empty() || self.rows.iter().any(|chosen| chosen == row)
    }

    /// The names of what is to be measured, and how.
    fn parse(arguments: &[String]) -> Result<(Vec<&str>, Self), Failure> {
        let (mut names, mut choice) = (Vec::new(), Self::default());
        let mut arguments = arguments.iter().map(String::as_str);
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().ok_or(format!("{argument} needs a value"));
            match argument {
                // What cargo adds.
                "--bench" => {}
                "--native" => choice.native = true,
                "--rows" => choice.rows = value()?.split(',').map(str::to_owned).collect(),
                "--files" => choice.files = Some(value()?.parse()?),
                _ => match argument.strip_prefix("--native=") {
                    Some(dir) => {
                        choice.native = true;
                        choice.native_dir = Some(std::path::absolute(dir)?);
                    }
                    None if argument.starts_with('-') => return Err(format!("no option {argument}").into()),
                    None => names.push(argument),
                },
            }
        }
        match choice.rows.iter().find(|row| !ROWS.contains(&row.as_str())) {
            Some(row) => Err(format!("no row {row}; there are {}", ROWS.join(", ")).into()),
            None => Ok((names, choice)),
        }
    }
}

#[derive(Clone, Copy)]
struct Shape {
    name: &'static str,
    files: u64,
    directories: u64,
    /// Whether it is made natively without being asked for.
    native: bool,
}

const SHAPES: [Shape; 3] = [
    Shape {
        name: "million",
        files: 1_000_000,
        directories: 1_000,
        native: true,
    },
    Shape {
        name: "wide",
        files: 50_000,
        directories: 1,
        native: true,
    },
    Shape {
        name: "ten-million",
        files: 10_000_000,
        directories: 10_000,
        native: false,
    },
];

impl Shape {
    /// As large as `files`, in directories as large as before.
    fn with(self, files: Option<u64>) -> Self {
        let Some(files) = files.map(|files| files.max(1)) else {
            return self;
        };
        let directories = match self.directories {
            1 => 1,
            directories => files.div_ceil(self.files / directories),
        };
        Self {
            files: files.next_multiple_of(directories),
            directories,
            ..self
        }
    }

    fn directory(&self, number: u64) -> String {
        format!("n{number:08}")
    }

    fn file(&self, index: u64) -> String {
        let each = self.files / self.directories;
        let directory = index / each;
        format!(
            "{}/n{directory:08}_{:06}.JPEG",
            self.directory(directory),
            index % each
        )
    }

    /// A path chosen by `step`, the same in every run.
    fn some_file(&self, step: u64) -> String {
        let noise = blake3::hash(&step.to_le_bytes());
        let random = noise
            .as_bytes()
            .first_chunk()
            .map_or(0, |bytes| u64::from_le_bytes(*bytes));
        self.file(random % self.files)
    }
}

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if !arguments.iter().any(|argument| argument == "--bench") {
        // `cargo test --all-targets` starts benchmarks too, to see that they start.
        return Ok(());
    }
    let (mut names, choice) = Choice::parse(&arguments)?;
    if names.is_empty() {
        names = vec!["million", "wide"];
    }
    for name in names {
        if let Some(layout) = name.strip_prefix("register") {
            register(layout == "-flat")?;
            continue;
        }
        let shape = SHAPES
            .iter()
            .find(|shape| shape.name == name)
            .ok_or("no such shape")?;
        measure(&shape.with(choice.files), &choice)?;
    }
    Ok(())
}

fn measure(shape: &Shape, choice: &Choice) -> Result<(), Failure> {
    let world = World::new()?;
    println!(
        "{}: {} files in {} directories",
        shape.name, shape.files, shape.directories
    );
    let built = build(shape, &world.below("scratch"))?;
    println!(
        "  tree             {:.1} MiB on the wire, {:.1} MiB mapped",
        built.rows.wire_size as f64 / MIB,
        built.rows.size as f64 / MIB
    );
    publish(built, &world)?;
    fs::remove_dir_all(world.below("scratch"))?;

    if choice.has("first-ls") {
        world.time_to_first_ls("without the tree in the cache")?;
        world.unmount()?;
        world.time_to_first_ls("with the tree in the cache")?;
        world.unmount()?;
    }

    let native = (shape.native || choice.native)
        .then(|| choice.native_dir.clone().unwrap_or_else(|| world.below("native")));
    if let Some(native) = &native {
        make_natively(shape, native)?;
    }
    compare(shape, choice, &world, native.as_deref())?;
    if choice.has("memory") {
        world.memory_after(&["find", "."])?;
    }
    if choice.has("memory-ls") {
        world.memory_after(&["find", ".", "-ls"])?;
    }
    Ok(())
}

/// A line for each of the rows that were chosen.
fn compare(shape: &Shape, choice: &Choice, world: &World, native: Option<&Path>) -> Result<(), Failure> {
    println!(
        "  {:<22} {:>10} {:>10} {:>10} {:>10} {:>7} {:>7} {:>10} {:>10}",
        "", "first", "second", "native 1st", "native 2nd", "1st/1st", "2nd/2nd", "asked 1st", "asked 2nd"
    );
    let directory = shape.directory(0);
    let newer = shape.file(0);
    let listing: &[(&str, &str, &[&str])] = &[
        ("ls", "ls -U (a directory)", &["ls", "-U", &directory]),
        ("ls-l", "ls -l (a directory)", &["ls", "-l", &directory]),
        ("find", "find", &["find", "."]),
        ("find-ls", "find -ls", &["find", ".", "-ls"]),
        ("find-newer", "find -newer", &["find", ".", "-newer", &newer]),
    ];
    for (row, name, command) in listing {
        if choice.has(row) {
            world.compare(name, native, |root| run(command, root))?;
        }
    }
    if choice.has("stat") {
        let paths: Vec<String> = (0..STATS).map(|step| shape.some_file(step)).collect();
        world.compare("stat of 100,000 paths", native, |root| {
            for path in &paths {
                fs::symlink_metadata(root.join(path))?;
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// Registers ten million keys and tells what that took.
fn register(flat: bool) -> Result<(), Failure> {
    let world = World::new()?;
    let [.., shape] = &SHAPES;
    let key: Keys = match flat {
        true => Box::new(|number| format!("data/image_{number:09}.JPEG")),
        false => Box::new(|number| format!("data/{}", shape.file(number))),
    };
    let bucket = Bucket::start(shape.files, key)?;
    let start = Instant::now();
    let mut child = world
        .command(&["register", "s3://bucket/data", "listed", "--json"])
        .env("AWS_ENDPOINT_URL", bucket.endpoint())
        .env("AWS_ACCESS_KEY_ID", "none")
        .env("AWS_SECRET_ACCESS_KEY", "none")
        .env("AWS_REGION", "us-east-1")
        .env("TMPDIR", world.below("scratch"))
        .stdout(Stdio::from(fs::File::create(world.below("registered"))?))
        .spawn()?;
    // The kernel keeps the peaks; what comes in the last moments before the end may be missed.
    let (mut peak, mut resident) = (0.0, 0.0);
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        let pid = i64::from(child.id());
        peak = process_memory(pid, "VmHWM:").unwrap_or(peak);
        resident = process_memory(pid, "RssAnon:").map_or(resident, |now| now.max(resident));
        std::thread::sleep(Duration::from_millis(20));
    };
    if !status.success() {
        return Err(format!("register: {status}").into());
    }
    let took = start.elapsed().as_secs_f64();
    let told: serde_json::Value = serde_json::from_slice(&fs::read(world.below("registered"))?)?;
    let files = told["record"]["totals"]["files"].as_u64();
    if files != Some(shape.files) {
        return Err(format!("{files:?} files were registered").into());
    }
    println!(
        "register, {} keys {}: {took:.1} s, {} pages of {} ranges asked for, peak memory {peak:.1} MiB (VmHWM), {resident:.1} MiB \
         beside mapped pages",
        shape.files,
        if flat {
            "below one prefix"
        } else {
            "in 10,000 directories"
        },
        bucket.pages_asked(),
        bucket.ranges_begun(),
    );
    Ok(())
}

const MIB: f64 = (1 << 20) as f64;

fn build(shape: &Shape, dir: &Path) -> Result<BuiltTree, Failure> {
    let mut builder = TreeBuilder::new(dir, DEFAULT_MEMORY_LIMIT)?;
    for index in 0..shape.files {
        let path = shape.file(index);
        let noise = blake3::hash(&index.to_le_bytes());
        let random = u64::from_le_bytes(*noise.as_bytes().first_chunk().ok_or("a short hash")?);
        let size = 50_000 + random % 100_000;
        let etag = format!("\"{}\"", noise.to_hex().get(..32).unwrap_or_default());
        let object = Object {
            key: path.clone(),
            size,
            pin: Pin::ETag(etag),
            digest: None,
        };
        let object = builder.add_object(object, None)?;
        let modified = Timestamp {
            seconds: 1_700_000_000 + (random % 10_000_000) as i64,
            nanos: (random >> 34) as u32 % 1_000_000_000,
        };
        builder.add_file(
            path.as_bytes(),
            0o644,
            modified,
            size,
            Some(Content { object, offset: 0 }),
            None,
        )?;
    }
    Ok(builder.finish(dir)?)
}

/// As publishing ends: the tree, then the record.
fn publish(built: BuiltTree, world: &World) -> Result<(), Failure> {
    let url: StoreUrl = world.url("catalog").parse()?;
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(async {
        let catalog = catalog::open(&url, &StoreSettings::default(), &Deadlines::control())?;
        let BuiltPart {
            path,
            digest,
            size,
            wire_size,
        } = built.rows;
        let key = format!("trees/{digest}.rows.zst");
        catalog.store().put(&key, fs::read(path)?.into()).await?;
        let draft = Draft {
            name: serde_json::from_value("me:metadata".into())?,
            tree: TreeParts {
                rows: TreePart {
                    digest,
                    key,
                    size,
                    wire_size,
                },
                digests: None,
                sums: None,
            },
            origin: OriginLocation::Url(world.url("origin").parse()?),
            message: String::new(),
            totals: built.totals,
        };
        catalog.publish(draft).await?;
        Ok(())
    })
}

fn make_natively(shape: &Shape, root: &Path) -> Result<(), Failure> {
    // Written last, and beside it, so that a copy that was not finished is not taken for one.
    let made = root.with_extension("made");
    let of = format!("{} files in {} directories", shape.files, shape.directories);
    if fs::read_to_string(&made).is_ok_and(|there| there == of) {
        println!("  native copy      of an earlier run");
        return Ok(());
    }
    let start = Instant::now();
    fs::create_dir_all(root)?;
    if fs::read_dir(root)?.next().is_some() {
        return Err(format!("{} is not empty", root.display()).into());
    }
    for directory in 0..shape.directories {
        fs::create_dir(root.join(shape.directory(directory)))?;
    }
    for index in 0..shape.files {
        fs::File::create(root.join(shape.file(index)))?;
    }
    // Later figures must not pay for writing this back.
    if !Command::new("sync").arg("-f").arg(root).status()?.success() {
        return Err("sync failed".into());
    }
    fs::write(made, of)?;
    println!(
        "  native copy      made in {:.1} s",
        start.elapsed().as_secs_f64()
    );
    Ok(())
}

/// True when the kernel's cached inodes and names are gone; only root may ask for that.
fn forget_natively() -> bool {
    fs::OpenOptions::new()
        .write(true)
        .open("/proc/sys/vm/drop_caches")
        .and_then(|mut file| file.write_all(b"2"))
        .is_ok()
}

fn run(command: &[&str], root: &Path) -> Result<(), Failure> {
    let [program, arguments @ ..] = command else {
        return Err("no command".into());
    };
    // Into a file, as some programs do less when they write to /dev/null.
    let status = Command::new(program)
        .args(arguments)
        .current_dir(root)
        .env("LC_ALL", "C")
        .stdout(Stdio::from(tempfile::tempfile()?))
        .status()?;
    if !status.success() {
        return Err(format!("{command:?}: {status}").into());
    }
    Ok(())
}

fn timed(work: impl FnOnce() -> Result<(), Failure>) -> Result<Duration, Failure> {
    let start = Instant::now();
    work()?;
    Ok(start.elapsed())
}

/// In MiB.
fn process_memory(pid: i64, field: &str) -> Result<f64, Failure> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let kib = status.lines().find_map(|line| line.strip_prefix(field));
    let kib = kib
        .and_then(|rest| rest.split_whitespace().next())
        .ok_or("no such field in /proc")?;
    Ok(kib.parse::<f64>()? / 1024.0)
}

/// A home, a catalog, a cache and an agent of its own; gone when dropped.
struct World {
    dir: tempfile::TempDir,
}

impl World {
    fn new() -> Result<Self, Failure> {
        let dir = tempfile::Builder::new()
            .prefix("grid-mount-metadata-")
            .tempdir()?;
        for name in ["run", "mnt", "scratch", "origin", "catalog"] {
            fs::DirBuilder::new().mode(0o700).create(dir.path().join(name))?;
        }
        Ok(Self { dir })
    }

    fn below(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn url(&self, name: &str) -> String {
        format!("file://{}", self.below(name).display())
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_grid-mount"));
        command
            .args(arguments)
            .env("XDG_RUNTIME_DIR", self.below("run"))
            .env("XDG_CONFIG_HOME", self.below("config"))
            .env("GRID_MOUNT_SOCKET", "")
            .env("GRID_MOUNT_CATALOG", self.url("catalog"))
            .env("GRID_MOUNT_CACHE_DIR", self.below("cache"))
            .env("GRID_MOUNT_CACHE_SIZE", "8GiB")
            .env("GRID_MOUNT_CACHE_MIN_FREE", "0")
            .env("GRID_MOUNT_USER", "me");
        command
    }

    fn grid(&self, arguments: &[&str]) -> Result<String, Failure> {
        let output = self.command(arguments).output()?;
        if !output.status.success() {
            return Err(format!(
                "grid-mount {arguments:?}: {}",
                String::from_utf8_lossy(&output.stderr)
            )
            .into());
        }
        Ok(String::from_utf8(output.stdout)?)
    }

    fn mount(&self) -> Result<(), Failure> {
        self.grid(&["metadata/1", &self.below("mnt").to_string_lossy()])
            .map(drop)
    }

    fn unmount(&self) -> Result<(), Failure> {
        self.grid(&["unmount", "--all"]).map(drop)
    }

    fn time_to_first_ls(&self, which: &str) -> Result<(), Failure> {
        let mounted = timed(|| self.mount())?;
        let listed = timed(|| run(&["ls"], &self.below("mnt")))?;
        println!(
            "  mount to first ls {:.3} s {which} (mount {:.3} s, ls {:.3} s)",
            (mounted + listed).as_secs_f64(),
            mounted.as_secs_f64(),
            listed.as_secs_f64()
        );
        Ok(())
    }

    /// Requests that the kernel has sent to the agent, by operation.
    fn asked(&self) -> Result<u64, Failure> {
        let status: serde_json::Value = serde_json::from_str(&self.grid(&["status", "--json"])?)?;
        let requests = status["mounts"][0]["requests"]
            .as_object()
            .ok_or("no requests in the status")?;
        Ok(requests
            .iter()
            .filter(|(operation, _)| *operation != "statfs")
            .filter_map(|(_, count)| count.as_u64())
            .sum())
    }

    /// In MiB.
    fn agent_memory(&self) -> Result<String, Failure> {
        let status: serde_json::Value = serde_json::from_str(&self.grid(&["status", "--json"])?)?;
        let pid = status["agent"]["pid"].as_i64().ok_or("no agent in the status")?;
        Ok(format!("{:.1}", process_memory(pid, "RssAnon:")?))
    }

    /// Whether the agent grows with what is asked of it.
    fn memory_after(&self, command: &[&str]) -> Result<(), Failure> {
        self.mount()?;
        let when_mounted = self.agent_memory()?;
        let mut after = Vec::new();
        for _ in 0..REPEATS {
            run(command, &self.below("mnt"))?;
            after.push(self.agent_memory()?);
        }
        self.unmount()?;
        println!(
            "  agent, beside mapped pages (RssAnon): {when_mounted} MiB when mounted, then after each `{}`: {} MiB",
            command.join(" "),
            after.join(", ")
        );
        Ok(())
    }

    /// One line: on a new mount, again, and natively.
    fn compare(
        &self,
        name: &str,
        native: Option<&Path>,
        work: impl Fn(&Path) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let mount = self.below("mnt");
        self.mount()?;
        let first = timed(|| work(&mount))?;
        let asked_first = self.asked()?;
        let second = timed(|| work(&mount))?;
        let asked_second = self.asked()? - asked_first;
        self.unmount()?;
        let mut line = format!(
            "  {name:<22} {:>10} {:>10}",
            milliseconds(first),
            milliseconds(second)
        );
        match native {
            None => line.push_str(&format!(" {:>10} {:>10} {:>7} {:>7}", "-", "-", "-", "-")),
            Some(native) => {
                let forgotten = forget_natively();
                let native_first = timed(|| work(native))?;
                let native_second = timed(|| work(native))?;
                let (shown, ratio) = match forgotten {
                    true => (
                        milliseconds(native_first),
                        format!("{:.2}", first.as_secs_f64() / native_first.as_secs_f64()),
                    ),
                    false => ("-".into(), "-".into()),
                };
                line.push_str(&format!(
                    " {shown:>10} {:>10} {ratio:>7} {:>7.2}",
                    milliseconds(native_second),
                    second.as_secs_f64() / native_second.as_secs_f64()
                ));
            }
        }
        println!("{line} {asked_first:>10} {asked_second:>10}");
        Ok(())
    }
}

fn milliseconds(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1e3)
}

impl Drop for World {
    fn drop(&mut self) {
        // Also after a failure: nothing stays mounted. The agent ends with its last mount.
        self.grid(&["unmount", "--all", "--lazy"]).ok();
    }
}
