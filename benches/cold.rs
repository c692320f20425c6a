//! Cold reads through a real mount, of an agent in a process of its own, beside plain parallel ranged GETs of the
//! same origin in the same run:
//!
//!     cargo bench --bench cold [-- large|random|bundled|registered]… [--connections 64] [--mib 2048] [--files 20000]
//!
//! The origin speaks S3 in this process, shaped to 20 ms to the first byte and 90 MB/s per connection. Every reading
//! has a mount of its own, with an empty cache. Readers are threads of this process, too.

#[path = "../tests/support/s3_origin.rs"]
mod s3_origin;
#[path = "../tests/support/sandbox.rs"]
mod sandbox;

use std::{
    error::Error,
    fs::{self, File},
    io::{Read as _, Write as _},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    time::{Duration, Instant},
};

use futures::{StreamExt as _, TryStreamExt as _, stream};
use grid_mount::origin::{Deadlines, Pin, Store};
use s3_origin::{S3Origin, Shape};
use sandbox::Sandbox;

type Failure = Box<dyn Error + Send + Sync>;

const SHAPE: Shape = Shape {
    first_byte: Duration::from_millis(20),
    rate: 90_000_000,
    straggler_every: 0,
    straggle: Duration::ZERO,
    write: Duration::ZERO,
};
const SMALL_FILE: usize = 100 << 10;
const FILES_PER_DIRECTORY: usize = 100;
const READERS: usize = 8;
const TIME_PER_RANDOM: Duration = Duration::from_secs(5);

struct Bench {
    runtime: tokio::runtime::Runtime,
    origin: S3Origin,
    store: Store,
    sandbox: Sandbox,
    connections: usize,
    large: u64,
    files: usize,
}

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if !arguments.iter().any(|argument| argument == "--bench") {
        // `cargo test --all-targets` starts benchmarks too, to see that they start.
        return Ok(());
    }
    let option = |name: &str, default: usize| -> Result<usize, Failure> {
        let at = arguments.iter().position(|argument| argument == name);
        let value = at.and_then(|at| arguments.get(at + 1));
        Ok(value.map_or(Ok(default), |value| value.parse())?)
    };
    let known = ["large", "random", "bundled", "registered"];
    let mut chosen: Vec<&str> = arguments.iter().map(String::as_str).collect();
    chosen.retain(|argument| known.contains(argument));
    if chosen.is_empty() {
        chosen = known.to_vec();
    }
    let connections = option("--connections", 64)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let origin = runtime.block_on(S3Origin::start(Shape::default()));
    let store = {
        let _inside = runtime.enter();
        let settings = origin.settings().into_iter().collect();
        Store::open(&"s3://bucket".parse()?, &settings, &Deadlines::data())?
    };
    let settings = origin.settings();
    let sandbox = settings
        .iter()
        .fold(Sandbox::new(), |sandbox, (name, value)| sandbox.env(name, value));
    let catalog = format!("file://{}", sandbox.path("data/catalog").display());
    let bench = Bench {
        runtime,
        origin,
        store,
        sandbox: sandbox
            .env("GRID_MOUNT_CATALOG", &catalog)
            .env("GRID_MOUNT_CONNECTIONS", &connections.to_string()),
        connections,
        large: (option("--mib", 2048)? as u64) << 20,
        files: option("--files", 20_000)?,
    };
    bench.origin.put_uniform("large/data", bench.large);
    bench.sandbox.ok(&["register", "s3://bucket/large", "large"]);
    for name in chosen {
        match name {
            "large" => bench.sequential()?,
            "random" => [1, 16]
                .into_iter()
                .try_for_each(|readers| bench.random(readers))?,
            "bundled" => bench.bundled()?,
            _ => bench.registered()?,
        }
    }
    Ok(())
}

impl Bench {
    /// A mount with nothing cached, at this point.
    fn mount(&self, arguments: &[&str]) -> Result<PathBuf, Failure> {
        let point = self.sandbox.path("mnt/point");
        self.sandbox
            .ok(&[arguments, &[point.to_str().ok_or("a path")?]].concat());
        self.sandbox.ok(&["cache", "evict"]);
        // Memory that nobody used lately is slow on a virtual machine: its host has to find it first.
        let mut file = tempfile::tempfile_in(self.sandbox.path("tmp"))?;
        for _ in 0..(3 * self.large) >> 20 {
            file.write_all(&[1; 1 << 20])?;
        }
        drop(file);
        self.origin.shape(SHAPE);
        Ok(point)
    }

    fn unmount(&self) {
        self.sandbox.ok(&["unmount", "--all"]);
        self.origin.shape(Shape::default());
    }

    /// GETs of an extent each over all connections, in MB/s.
    fn ceiling(&self) -> Result<f64, Failure> {
        self.origin.shape(SHAPE);
        let pieces = (0..self.large).step_by(8 << 20);
        let get = |at: u64| async move {
            let range = at..(at + (8 << 20)).min(self.large);
            let body = self.store.get_range("large/data", &Pin::Content, range).await?;
            body.try_for_each(|_| async { Ok(()) }).await?;
            Ok::<_, Failure>(())
        };
        let mut took = Duration::MAX;
        // The first time, connections are made.
        for _ in 0..2 {
            let began = Instant::now();
            self.runtime.block_on(
                stream::iter(pieces.clone())
                    .map(get)
                    .buffer_unordered(self.connections)
                    .try_for_each(|()| async { Ok(()) }),
            )?;
            took = took.min(began.elapsed());
        }
        self.origin.shape(Shape::default());
        Ok(self.large as f64 / 1e6 / took.as_secs_f64())
    }

    fn sent(&self) -> (u64, u64) {
        let counts = self.origin.counts();
        (counts.gets.load(Relaxed), counts.body_bytes.load(Relaxed))
    }

    fn sequential(&self) -> Result<(), Failure> {
        let ceiling = self.ceiling()?;
        let point = self.mount(&["large"])?;
        let path = point.join("data");
        let before = self.sent();
        let (rate, first) = read_through(&path, self.large)?;
        let (gets, sent) = (self.sent().0 - before.0, self.sent().1 - before.1);
        // Each time closed and opened again: the kernel may choose another way of reading.
        let (second, third) = (
            read_through(&path, self.large)?.0,
            read_through(&path, self.large)?.0,
        );
        let again = self.sent().1 - before.1 - sent;
        self.unmount();
        println!(
            "sequential, {} MiB, {} connections: {rate:.0} MB/s of {ceiling:.0} ({:.2}); first bytes {:.1} ms; {gets} GETs, {:.3} bytes fetched per byte read; a second time {second:.0} MB/s ({} MiB fetched), a third {third:.0}",
            self.large >> 20,
            self.connections,
            rate / ceiling,
            first.as_secs_f64() * 1e3,
            sent as f64 / self.large as f64,
            again >> 20,
        );
        Ok(())
    }

    fn random(&self, readers: usize) -> Result<(), Failure> {
        let point = self.mount(&["large"])?;
        let file = File::open(point.join("data"))?;
        let pages = self.large / 4096;
        let (before, began) = (self.sent(), Instant::now());
        let read = |reader: usize| -> Result<Vec<Duration>, Failure> {
            let seed = blake3::hash(&reader.to_le_bytes());
            let seed = seed
                .as_bytes()
                .first_chunk()
                .map_or(1, |bytes| u64::from_le_bytes(*bytes));
            let (mut times, mut state) = (Vec::new(), seed);
            while began.elapsed() < TIME_PER_RANDOM {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                let started = Instant::now();
                file.read_exact_at(&mut [0; 4096], (state >> 20) % pages * 4096)?;
                times.push(started.elapsed());
            }
            Ok(times)
        };
        let mut times: Vec<Duration> = in_threads(readers, read)?.concat();
        times.sort_unstable();
        let rate = times.len() as f64 / began.elapsed().as_secs_f64();
        let (gets, sent) = (self.sent().0 - before.0, self.sent().1 - before.1);
        drop(file);
        self.unmount();
        let percentile = |of: usize| times[times.len() * of / 100].as_secs_f64() * 1e3;
        println!(
            "random 4 KiB, {readers} readers: {rate:.0} reads/s; p50 {:.1} ms, p99 {:.1} ms; {:.2} GETs and {:.0} KiB a read",
            percentile(50),
            percentile(99),
            gets as f64 / times.len() as f64,
            sent as f64 / times.len() as f64 / 1024.0,
        );
        Ok(())
    }

    fn bundled(&self) -> Result<(), Failure> {
        let native = self.sandbox.path("native");
        for file in 0..self.files {
            let path = native.join(path_of(file));
            if file % FILES_PER_DIRECTORY == 0 {
                fs::create_dir_all(path.parent().ok_or("no parent")?)?;
            }
            let mut bytes = vec![0; SMALL_FILE];
            blake3::Hasher::new()
                .update(&file.to_le_bytes())
                .finalize_xof()
                .fill(&mut bytes);
            fs::write(path, bytes)?;
        }
        let catalog = self
            .sandbox
            .grid(&["publish", &native.to_string_lossy(), "bundled"]);
        let mut publish = catalog;
        let done = publish
            .env("GRID_MOUNT_CATALOG", "s3://bucket/catalog")
            .output()?;
        if !done.status.success() {
            return Err(sandbox::told(&done).into());
        }
        fs::remove_dir_all(native)?;
        self.small_files("bundled", Some("s3://bucket/catalog"))
    }

    fn registered(&self) -> Result<(), Failure> {
        for file in 0..self.files {
            let key = format!("small/{}", path_of(file).display());
            self.origin.put_uniform(&key, SMALL_FILE as u64);
        }
        self.sandbox.ok(&["register", "s3://bucket/small", "registered"]);
        self.small_files("registered", None)
    }

    /// Every file once, in a random order.
    fn small_files(&self, name: &str, catalog: Option<&str>) -> Result<(), Failure> {
        let ceiling = self.ceiling()?;
        let mut paths: Vec<PathBuf> = (0..self.files).map(path_of).collect();
        paths.sort_by_key(|path| *blake3::hash(path.as_os_str().as_encoded_bytes()).as_bytes());
        let point = match catalog {
            None => self.mount(&[name])?,
            Some(catalog) => self.mount(&["--catalog", catalog, name])?,
        };
        let next = AtomicUsize::new(0);
        let (before, began) = (self.sent(), Instant::now());
        let read = |_| -> Result<(u64, Vec<Duration>), Failure> {
            let (mut buffer, mut bytes, mut times) = (vec![0; 2 * SMALL_FILE], 0, Vec::new());
            while let Some(path) = paths.get(next.fetch_add(1, Relaxed)) {
                let started = Instant::now();
                let mut file = File::open(point.join(path))?;
                loop {
                    match file.read(&mut buffer)? {
                        0 => break,
                        length => bytes += length as u64,
                    }
                }
                times.push(started.elapsed());
            }
            Ok((bytes, times))
        };
        let done = in_threads(READERS, read)?;
        let took = began.elapsed().as_secs_f64();
        let bytes: u64 = done.iter().map(|(bytes, _)| bytes).sum();
        let mut times: Vec<Duration> = done.into_iter().flat_map(|(_, times)| times).collect();
        times.sort_unstable();
        let (gets, sent) = (self.sent().0 - before.0, self.sent().1 - before.1);
        self.unmount();
        let rate = bytes as f64 / 1e6 / took;
        let percentile = |of: usize| times[times.len() * of / 100].as_secs_f64() * 1e3;
        println!(
            "{} files of {} KiB, {name}, {READERS} readers, {} connections: {:.0} files/s, {rate:.0} MB/s of {ceiling:.0} ({:.2}); a file p50 {:.1} ms, p99 {:.1} ms; {gets} GETs, {:.2} bytes fetched per byte read",
            self.files,
            SMALL_FILE >> 10,
            self.connections,
            self.files as f64 / took,
            rate / ceiling,
            percentile(50),
            percentile(99),
            sent as f64 / bytes as f64,
        );
        Ok(())
    }
}

/// A file of `size` bytes from beginning to end: MB/s, and the time to the first bytes.
fn read_through(path: &Path, size: u64) -> Result<(f64, Duration), Failure> {
    let mut file = File::open(path)?;
    let began = Instant::now();
    let (mut buffer, mut bytes, mut first) = (vec![0; 256 << 10], 0, None);
    loop {
        let length = file.read(&mut buffer)?;
        first.get_or_insert_with(|| began.elapsed());
        bytes += length as u64;
        if length == 0 {
            break;
        }
    }
    if bytes != size {
        return Err(format!("{bytes} bytes of {size}").into());
    }
    Ok((
        bytes as f64 / 1e6 / began.elapsed().as_secs_f64(),
        first.unwrap_or_default(),
    ))
}

fn path_of(file: usize) -> PathBuf {
    Path::new(&format!("{:04}", file / FILES_PER_DIRECTORY)).join(format!("{file:06}.bin"))
}

fn in_threads<T: Send>(
    threads: usize,
    work: impl Fn(usize) -> Result<T, Failure> + Sync,
) -> Result<Vec<T>, Failure> {
    std::thread::scope(|scope| {
        let running: Vec<_> = (0..threads)
            .map(|thread| {
                let work = &work;
                scope.spawn(move || work(thread))
            })
            .collect();
        running
            .into_iter()
            .map(|thread| thread.join().map_err(|_| "a reader panicked")?)
            .collect()
    })
}
