//! What reading costs through a real mount whose cache is warm, beside the same bytes on the native file
//! system: `cargo bench --bench reads -- [passthrough|small|no-open|ordinary]… [--mib 1024] [--files 20000]
//! [--rounds 5]` (default: all four, as far as this user can mount that way).
//!
//! Publishes into a catalog of its own, mounts with the real binary, warms the cache, and then reads by turns
//! natively and through the mount, with a program of its own as the reader. "cold" is with the pages of both
//! dropped (of the mount, the cache's and the native files alone: `posix_fadvise`), "hot" with all pages in
//! memory. Figures are medians of the rounds; the ratio is the median of the rounds' ratios, since a shared
//! machine changes more between rounds than within one. Beside them the processor time of the agent.

#[path = "../tests/support/sandbox.rs"]
mod sandbox;

use std::{
    error::Error,
    fs::{self, File},
    io::{BufWriter, Read, Write},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};

use nix::fcntl::{PosixFadviseAdvice::POSIX_FADV_DONTNEED, posix_fadvise};
use sandbox::Sandbox;

type Failure = Box<dyn Error + Send + Sync>;

const SMALL_FILE: usize = 100 << 10;
const FILES_PER_DIRECTORY: usize = 1000;
/// One `read(2)` of a sequential reader, as `cp` and `cat` do it.
const SEQUENTIAL_READ: usize = 256 << 10;
/// No reading takes longer than this; what was read until then counts.
const TIME_PER_READING: Duration = Duration::from_secs(4);
const TIME_PER_RANDOM: Duration = Duration::from_millis(1500);

struct Plan {
    large: u64,
    files: usize,
    rounds: usize,
}

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|first| first == "--reader") {
        return reader(&arguments[1..]);
    }
    if !arguments.iter().any(|argument| argument == "--bench") {
        // `cargo test --all-targets` starts benchmarks too, to see that they start.
        return Ok(());
    }
    let option = |name: &str, default: usize| -> Result<usize, Failure> {
        let at = arguments.iter().position(|argument| argument == name);
        let value = at.and_then(|at| arguments.get(at + 1));
        Ok(value.map_or(Ok(default), |value| value.parse())?)
    };
    let plan = Plan {
        large: (option("--mib", 1024)? as u64) << 20,
        files: option("--files", 20_000)?.next_multiple_of(FILES_PER_DIRECTORY),
        rounds: option("--rounds", 5)?,
    };
    let known = ["passthrough", "small", "no-open", "ordinary"];
    let mut chosen: Vec<&str> = arguments.iter().map(String::as_str).collect();
    chosen.retain(|argument| known.contains(argument));
    if chosen.is_empty() {
        chosen = known.to_vec();
    }
    for name in chosen {
        match name {
            "small" => small(&plan)?,
            "ordinary" => match Sandbox::ordinary() {
                Some(sandbox) => large(&plan, sandbox, "passthrough")?,
                None => println!("ordinary user: not measured"),
            },
            mode => large(&plan, Sandbox::new(), mode)?,
        }
    }
    Ok(())
}

/// A published directory, mounted with all of it in the cache.
struct World {
    sandbox: Sandbox,
    native: PathBuf,
    mount: PathBuf,
    agent: i64,
}

impl World {
    fn new(
        sandbox: Sandbox,
        mode: &str,
        make: impl FnOnce(&Path) -> Result<(), Failure>,
    ) -> Result<Self, Failure> {
        let native = sandbox.path("native");
        fs::create_dir(&native)?;
        make(&native)?;
        sandbox.ok(&["publish", &native.to_string_lossy(), "data"]);
        let mount = sandbox.path("mnt/point");
        let mut world = Self {
            sandbox,
            native,
            mount,
            agent: 0,
        };
        world.mount(mode)?;
        world.sandbox.ok(&["warm", "data"]);
        let status = world.sandbox.status();
        println!(
            "  mode {} ({}), uid {}, cache {} MiB",
            status["mounts"][0]["io_mode"].as_str().unwrap_or("?"),
            status["mounts"][0]["io_mode_reason"].as_str().unwrap_or("?"),
            world.sandbox.uid(),
            status["agent"]["cache_used"].as_u64().unwrap_or(0) >> 20,
        );
        Ok(world)
    }

    fn mount(&mut self, mode: &str) -> Result<(), Failure> {
        let point = self.mount.to_string_lossy();
        self.sandbox
            .ok(&["data", &point, "--io-mode", mode, "--prefetch", "none"]);
        self.agent = self.sandbox.status()["agent"]["pid"]
            .as_i64()
            .ok_or("no agent in the status")?;
        Ok(())
    }

    /// Clock ticks that the agent has had a processor for.
    fn agent_ticks(&self) -> Result<u64, Failure> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.agent))?;
        let after = stat.rsplit_once(')').ok_or("no stat")?.1;
        let fields: Vec<&str> = after.split_whitespace().collect();
        Ok(fields[11].parse::<u64>()? + fields[12].parse::<u64>()?)
    }

    /// Drops the pages of the native files and of the cache; a mount's own are the reader's to drop.
    fn forget_pages(&self) -> Result<(), Failure> {
        for dir in [&self.native, &self.sandbox.path("cache")] {
            for entry in walkdir::WalkDir::new(dir) {
                let entry = entry?;
                if entry.file_type().is_file() {
                    posix_fadvise(&File::open(entry.path())?, 0, 0, POSIX_FADV_DONTNEED)?;
                }
            }
        }
        Ok(())
    }

    /// Runs a reader natively and then through the mount, once.
    fn round(&self, reading: &Reading) -> Result<Round, Failure> {
        let native = self.read(&self.native, reading)?;
        let before = self.agent_ticks()?;
        let mount = self.read(&self.mount, reading)?;
        let ticks = self.agent_ticks()? - before;
        let per_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.ok_or("no clock")?;
        Ok(Round {
            native: native.rate(),
            mount: mount.rate(),
            agent: ticks as f64 / per_second as f64 / (mount.bytes as f64 / (1u64 << 30) as f64),
        })
    }

    fn read(&self, root: &Path, reading: &Reading) -> Result<Done, Failure> {
        let me = std::env::current_exe()?;
        let output = self
            .sandbox
            .program(me)
            .args(["--reader", reading.kind, &reading.threads.to_string()])
            .arg(if reading.cold { "cold" } else { "hot" })
            .arg(root)
            .output()?;
        let said = String::from_utf8(output.stdout)?;
        if !output.status.success() {
            return Err(sandbox_error(&output.stderr));
        }
        let mut numbers = said.split_whitespace().map(str::parse::<f64>);
        let mut next = || -> Result<f64, Failure> { Ok(numbers.next().ok_or("a reader said nothing")??) };
        Ok(Done {
            bytes: next()? as u64,
            units: next()?,
            seconds: next()?,
        })
    }

    fn compare(&self, plan: &Plan, reading: &Reading) -> Result<(), Failure> {
        let mut rounds = Vec::new();
        for _ in 0..plan.rounds {
            if reading.cold {
                self.forget_pages()?;
            }
            rounds.push(self.round(reading)?);
        }
        print(reading, &rounds);
        Ok(())
    }
}

fn sandbox_error(text: &[u8]) -> Failure {
    String::from_utf8_lossy(text).into_owned().into()
}

fn print(reading: &Reading, rounds: &[Round]) {
    let median = |of: &dyn Fn(&Round) -> f64| {
        let mut values: Vec<f64> = rounds.iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    let best = |of: &dyn Fn(&Round) -> f64| rounds.iter().map(of).fold(0.0, f64::max);
    println!(
        "  {:<34} mount {:>9.0} native {:>9.0} {:<8} ratio {:>5.2} (best of each {:>5.2}; agent {:.3} s/GiB)",
        format!(
            "{} {}, {} thread{}",
            if reading.cold { "cold" } else { "hot" },
            reading.kind,
            reading.threads,
            if reading.threads == 1 { "" } else { "s" }
        ),
        median(&|round| round.mount),
        median(&|round| round.native),
        reading.unit(),
        median(&|round| round.mount / round.native),
        best(&|round| round.mount) / best(&|round| round.native),
        median(&|round| round.agent),
    );
}

struct Round {
    native: f64,
    mount: f64,
    /// Seconds of processor time per GiB.
    agent: f64,
}

struct Reading {
    kind: &'static str,
    threads: usize,
    cold: bool,
}

impl Reading {
    fn unit(&self) -> &'static str {
        match self.kind {
            "sequential" => "MB/s",
            "files" => "files/s",
            _ => "reads/s",
        }
    }
}

struct Done {
    bytes: u64,
    units: f64,
    seconds: f64,
}

impl Done {
    fn rate(&self) -> f64 {
        self.units / self.seconds
    }
}

fn write_noise(path: &Path, length: u64, seed: u64) -> Result<(), Failure> {
    let mut noise = blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof();
    // What a careful program writes; world-readable for an ordinary user's reader.
    let file = fs::OpenOptions::new()
        .create(true)
        .truncate(true)
        .write(true)
        .mode(0o644)
        .open(path)?;
    let mut file = BufWriter::with_capacity(1 << 20, file);
    let mut left = length;
    let mut piece = vec![0; 1 << 20];
    while left > 0 {
        let now = left.min(piece.len() as u64) as usize;
        noise.fill(&mut piece[..now]);
        file.write_all(&piece[..now])?;
        left -= now as u64;
    }
    // Pages that are not on the disk yet cannot be dropped.
    file.into_inner()?.sync_all()?;
    Ok(())
}

fn large(plan: &Plan, sandbox: Sandbox, mode: &str) -> Result<(), Failure> {
    println!("one file of {} MiB:", plan.large >> 20);
    let world = World::new(sandbox, mode, |native| {
        write_noise(&native.join("large"), plan.large, 1)
    })?;
    // The cache writes without syncing, and dirty pages are not dropped.
    nix::unistd::sync();
    let reading = |kind, threads, cold| Reading { kind, threads, cold };
    world.compare(plan, &reading("sequential", 1, true))?;
    world.compare(plan, &reading("random", 1, true))?;
    world.compare(plan, &reading("random", 16, true))?;
    // All of it into memory.
    for root in [&world.native, &world.mount] {
        world.read(root, &reading("whole", 1, false))?;
    }
    world.compare(plan, &reading("sequential", 1, false))?;
    world.compare(plan, &reading("random", 1, false))?;
    world.compare(plan, &reading("random", 16, false))?;
    Ok(())
}

fn small(plan: &Plan) -> Result<(), Failure> {
    println!("{} files of {} KiB:", plan.files, SMALL_FILE >> 10);
    let mut world = World::new(Sandbox::new(), "no-open", |native| {
        for number in 0..plan.files {
            let dir = native.join(format!("{:03}", number / FILES_PER_DIRECTORY));
            if number % FILES_PER_DIRECTORY == 0 {
                fs::create_dir(&dir)?;
            }
            let mut bytes = vec![0; SMALL_FILE];
            blake3::Hasher::new()
                .update(&number.to_le_bytes())
                .finalize_xof()
                .fill(&mut bytes);
            fs::write(dir.join(format!("{number:06}.bin")), bytes)?;
        }
        Ok(())
    })?;
    nix::unistd::sync();
    for threads in [1, 8] {
        let reading = |cold| Reading {
            kind: "files",
            threads,
            cold,
        };
        let (mut first, mut hot) = (Vec::new(), Vec::new());
        for _ in 0..plan.rounds {
            // A new mount: no name, no attribute and no page of it is known.
            world.sandbox.ok(&["unmount", "--all"]);
            world.mount("no-open")?;
            world.forget_pages()?;
            // Natively: names and attributes.
            fs::write("/proc/sys/vm/drop_caches", "2").ok();
            first.push(world.round(&reading(true))?);
            hot.push(world.round(&reading(false))?);
        }
        print(&reading(true), &first);
        print(&reading(false), &hot);
    }
    Ok(())
}

/// The other program: reads below a directory and says how many bytes and units in how many seconds.
fn reader(arguments: &[String]) -> Result<(), Failure> {
    let [kind, threads, temperature, root] = arguments else {
        return Err("kind, threads, temperature and root".into());
    };
    let (threads, root) = (threads.parse::<usize>()?, Path::new(root));
    let done = match kind.as_str() {
        "files" => read_files(root, threads)?,
        kind => {
            let file = File::open(root.join("large"))?;
            if temperature == "cold" {
                posix_fadvise(&file, 0, 0, POSIX_FADV_DONTNEED)?;
            }
            match kind {
                "random" => read_random(&file, threads)?,
                "whole" => read_sequential(file, Duration::MAX)?,
                _ => read_sequential(file, TIME_PER_READING)?,
            }
        }
    };
    println!("{} {} {}", done.bytes, done.units, done.seconds);
    Ok(())
}

fn read_sequential(mut file: File, limit: Duration) -> Result<Done, Failure> {
    let mut buffer = vec![0; SEQUENTIAL_READ];
    let (began, mut bytes) = (Instant::now(), 0);
    while began.elapsed() < limit {
        match file.read(&mut buffer)? {
            0 => break,
            length => bytes += length as u64,
        }
    }
    Ok(Done {
        bytes,
        units: bytes as f64 / 1e6,
        seconds: began.elapsed().as_secs_f64(),
    })
}

fn read_random(file: &File, threads: usize) -> Result<Done, Failure> {
    let pages = file.metadata()?.len() / 4096;
    let reads = AtomicU64::new(0);
    let began = Instant::now();
    thread::scope(|scope| {
        let (reads, began) = (&reads, &began);
        let running: Vec<_> = (0..threads as u64)
            .map(|thread| {
                scope.spawn(move || -> Result<(), Failure> {
                    let mut state = began.elapsed().as_nanos() as u64 ^ (thread << 48);
                    let mut buffer = [0; 4096];
                    while began.elapsed() < TIME_PER_RANDOM {
                        for _ in 0..8 {
                            state = state
                                .wrapping_mul(6_364_136_223_846_793_005)
                                .wrapping_add(1_442_695_040_888_963_407);
                            file.read_exact_at(&mut buffer, (state >> 20) % pages * 4096)?;
                        }
                        reads.fetch_add(8, Relaxed);
                    }
                    Ok(())
                })
            })
            .collect();
        running.into_iter().try_for_each(|thread| match thread.join() {
            Ok(result) => result,
            Err(_) => Err("a reader panicked".into()),
        })
    })?;
    let reads = reads.into_inner();
    Ok(Done {
        bytes: reads * 4096,
        units: reads as f64,
        seconds: began.elapsed().as_secs_f64(),
    })
}

/// Every file once, in a random order that is the same in every run.
fn read_files(root: &Path, threads: usize) -> Result<Done, Failure> {
    let mut number = 0;
    let mut paths = Vec::new();
    // The names are known: listing them is not what is measured.
    while let Some(dir) = Some(root.join(format!("{:03}", number / FILES_PER_DIRECTORY)))
        && (number % FILES_PER_DIRECTORY != 0 || dir.exists())
    {
        paths.push(dir.join(format!("{number:06}.bin")));
        number += 1;
    }
    paths.sort_by_key(|path| {
        *blake3::hash(path.file_name().map_or(&[], |name| name.as_encoded_bytes())).as_bytes()
    });
    let next = AtomicUsize::new(0);
    let bytes = AtomicU64::new(0);
    let began = Instant::now();
    thread::scope(|scope| {
        let (paths, next, bytes) = (&paths, &next, &bytes);
        let running: Vec<_> = (0..threads)
            .map(|_| {
                scope.spawn(move || -> Result<(), Failure> {
                    let mut buffer = vec![0; 2 * SMALL_FILE];
                    while let Some(path) = paths.get(next.fetch_add(1, Relaxed)) {
                        let mut file = File::open(path)?;
                        loop {
                            match file.read(&mut buffer)? {
                                0 => break,
                                length => bytes.fetch_add(length as u64, Relaxed),
                            };
                        }
                    }
                    Ok(())
                })
            })
            .collect();
        running.into_iter().try_for_each(|thread| match thread.join() {
            Ok(result) => result,
            Err(_) => Err("a reader panicked".into()),
        })
    })?;
    Ok(Done {
        bytes: bytes.into_inner(),
        units: paths.len() as f64,
        seconds: began.elapsed().as_secs_f64(),
    })
}
