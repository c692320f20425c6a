//! Cold reads through `fetch`, beside plain parallel ranged GETs of the same store in the same run.
//!
//!     cargo bench --bench fetch [-- --small] [--only sequential|random|bundled|registered] [--connections N]
//!         [--endpoint URL]
//!
//! The origin is in this process, shaped to 20 ms to the first byte and 90 MB/s per connection. The kernel's side
//! of a mount takes no part: what is measured is the fetcher, with an agent's default memory limit, and its cache
//! on the disk of the temporary directory. Without `--connections`, several numbers of them are tried.
//!
//! With `--endpoint`, the origin is an S3 server of yours that is shaped likewise and asks for no signature, whose
//! bucket `bucket` has the objects `big` (2 GiB), `small` (100 KiB) and, for bundles, `of 655/0` to `of 655/30` (each of
//! 655 times 100 KiB, the last of 350 times). It is for `--only sequential` and `--only bundled`.

#[path = "../tests/support/processor.rs"]
mod processor;
#[path = "../tests/support/s3_origin.rs"]
mod s3_origin;

use std::{
    io::Write as _,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use futures::{StreamExt as _, TryStreamExt as _, stream};
use grid_mount::{
    block::BLOCK_SIZE,
    cache::{Cache, CacheConfig, VerifyPolicy},
    config::default_memory_limit,
    fetch::{FetchConfig, FetchObject, Fetcher, Priority, Source, Streams},
    fs::{
        content::Content,
        fetched::{Fetched, Sources, bring},
    },
    origin::{Deadlines, Pin, Store},
    prefetch_policy::PrefetchPolicy,
    profile::Recorder,
    tree::{Ino, ObjectNo, TreeError},
};
use s3_origin::{S3Origin, Shape};

/// Tried where no number is given; the last is what an agent has by default.
const CONNECTIONS: [usize; 3] = [16, 32, 64];
const SHAPE: Shape = Shape {
    first_byte: Duration::from_millis(20),
    rate: 90_000_000,
    straggler_every: 0,
    straggle: Duration::ZERO,
    write: Duration::ZERO,
};

type Failure = Box<dyn std::error::Error + Send + Sync>;

fn argument(name: &str) -> Option<String> {
    std::env::args().skip_while(|argument| argument != name).nth(1)
}

fn connections() -> Vec<usize> {
    match argument("--connections").and_then(|count| count.parse().ok()) {
        Some(count) => vec![count],
        None => CONNECTIONS.to_vec(),
    }
}

/// An agent's by default, on this machine.
fn memory_limit() -> u64 {
    let named = argument("--memory-mib").and_then(|mebibytes| mebibytes.parse::<u64>().ok());
    let machine = nix::sys::sysinfo::sysinfo().ok().map(|info| info.ram_total());
    named.map_or_else(|| default_memory_limit(machine), |mebibytes| mebibytes << 20)
}

fn config(connections: usize) -> FetchConfig {
    FetchConfig {
        connections,
        memory_limit: memory_limit(),
        read_deadline: Duration::from_secs(30),
    }
}

struct Bench {
    /// `None`: elsewhere.
    origin: Option<S3Origin>,
    store: Store,
    size: u64,
    connections: usize,
}

impl Bench {
    fn fetcher(&self, cache: Option<Arc<Cache>>) -> (Arc<Fetcher>, Arc<FetchObject>) {
        let fetcher = Fetcher::new(config(self.connections), cache, tokio::runtime::Handle::current());
        let object = self.open(&fetcher, "big", self.size);
        (fetcher, object)
    }

    /// Plain GETs of an extent each over all connections, in MB/s, and processor seconds. What is measured next
    /// finds these connections.
    async fn ceiling(&self) -> Result<(f64, f64), Failure> {
        stream::iter(0..self.connections as u64)
            .map(|n| self.plain("big", n << 20..(n + 1) << 20))
            .buffer_unordered(self.connections)
            .try_for_each(|_| async { Ok(()) })
            .await?;
        use_memory(self.size / 2)?;
        let used = processor::seconds();
        let began = Instant::now();
        stream::iter((0..self.size).step_by(8 << 20))
            .map(|at| self.plain("big", at..(at + (8 << 20)).min(self.size)))
            .buffer_unordered(self.connections)
            .try_for_each(|_| async { Ok(()) })
            .await?;
        Ok((mb(self.size, began.elapsed()), processor::seconds() - used))
    }

    fn open(&self, fetcher: &Arc<Fetcher>, key: &str, size: u64) -> Arc<FetchObject> {
        let source = Source {
            store: self.store.clone(),
            key: key.into(),
            pin: Pin::Content,
            size,
            sums: None,
        };
        fetcher.open("bench", source)
    }

    async fn plain(&self, key: &str, range: std::ops::Range<u64>) -> Result<u64, Failure> {
        let body = self.store.get_range(key, &Pin::Content, range).await?;
        Ok(body
            .try_fold(0, |sum, bytes| async move { Ok(sum + bytes.len() as u64) })
            .await?)
    }

    /// GETs and bytes that an origin of this process has answered; of one elsewhere, what the fetcher counted.
    fn moved(&self, fetcher: &Fetcher) -> (u64, u64) {
        match &self.origin {
            Some(origin) => (
                origin.counts().gets.load(Relaxed),
                origin.counts().body_bytes.load(Relaxed),
            ),
            None => {
                let stats = fetcher.stats();
                (stats.gets, stats.origin_bytes)
            }
        }
    }

    fn has(&self, key: &str, size: u64) {
        if let Some(origin) = &self.origin {
            origin.put_uniform(key, size);
        }
    }

    fn shape(&self, shape: Shape) -> Result<(), Failure> {
        let origin = self.origin.as_ref().ok_or("shapes an origin of its own only")?;
        origin.shape(shape);
        Ok(())
    }
}

async fn read(
    fetcher: &Arc<Fetcher>,
    object: &Arc<FetchObject>,
    range: std::ops::Range<u64>,
    buffer: &mut Vec<u8>,
) -> Result<u64, Failure> {
    // The buffer is the caller's and used again, as the kernel's side does.
    if fetcher.read_cached(object, range.clone(), buffer).is_some() {
        return Ok(buffer.len() as u64);
    }
    Ok(fetcher.read(object, range).await?.len() as u64)
}

fn mb(bytes: u64, took: Duration) -> f64 {
    bytes as f64 / 1e6 / took.as_secs_f64()
}

fn ms(took: Duration) -> f64 {
    took.as_secs_f64() * 1e3
}

fn percentile(times: &mut [Duration], of: usize) -> f64 {
    times.sort_unstable();
    ms(times[(times.len() * of / 100).min(times.len() - 1)])
}

fn cache(dir: &std::path::Path) -> Result<Arc<Cache>, Failure> {
    Ok(Cache::open(CacheConfig {
        dir: dir.to_owned(),
        max_bytes: 8 << 30,
        min_free: 0,
        verify: VerifyPolicy::EarlierBoot,
    })?)
}

/// One of several tries, whose best counts, as the best of the ceilings beside them does: on a machine with others on
/// it, and memory that has to be found first, the rest is chance.
struct Round {
    got: f64,
    ceiling: f64,
    first: f64,
    rest: String,
}

const ROUNDS: usize = 3;

fn print_best(label: &str, rounds: &[Round]) {
    let ceiling = rounds.iter().map(|round| round.ceiling).fold(0.0, f64::max);
    let first = rounds.iter().map(|round| round.first).fold(f64::MAX, f64::min);
    let all: Vec<_> = rounds
        .iter()
        .map(|round| format!("{:.2}", round.got / ceiling))
        .collect();
    if let Some(best) = rounds.iter().max_by(|one, other| one.got.total_cmp(&other.got)) {
        println!(
            "{label}: {:.0} MB/s of {ceiling:.0} ({:.2}; rounds {}); first bytes {first:.1} ms; {}",
            best.got,
            best.got / ceiling,
            all.join(", "),
            best.rest
        );
    }
}

/// Memory that nobody has used yet, or for a moment, is slow on a virtual machine: its host has to find it first. So what
/// is measured, and what it is compared with, each begin with memory that the page cache used just before: so much as
/// they need, since from some size on the disk would be busy with it.
fn use_memory(bytes: u64) -> Result<(), Failure> {
    let mut file = tempfile::tempfile()?;
    let some = vec![1; 1 << 20];
    for _ in 0..bytes >> 20 {
        file.write_all(&some)?;
    }
    Ok(())
}

/// `readers` at once, each of its own part of one object, as of a file.
async fn sequential(bench: &Bench, with_cache: bool, readers: u64) -> Result<(), Failure> {
    let mut rounds = Vec::new();
    for _ in 0..ROUNDS {
        let (ceiling, plain_cpu) = bench.ceiling().await?;
        let one = Instant::now();
        bench.plain("big", 0..BLOCK_SIZE).await?;
        let one = one.elapsed();

        use_memory(bench.size / 2)?;
        let dir = tempfile::tempdir()?;
        let (fetcher, object) = bench.fetcher(with_cache.then(|| cache(dir.path())).transpose()?);
        let streams = Arc::new(Streams::default());
        let (before, used, began) = (bench.moved(&fetcher), processor::seconds(), Instant::now());
        let size = bench.size;
        let parts = (0..readers).map(|reader| {
            let (fetcher, object, streams) =
                (Arc::clone(&fetcher), Arc::clone(&object), Arc::clone(&streams));
            let part = reader * size / readers..(reader + 1) * size / readers;
            tokio::spawn(async move {
                let (mut first, mut buffer) = (None, Vec::new());
                for at in part.clone().step_by(BLOCK_SIZE as usize) {
                    let range = at..at + BLOCK_SIZE;
                    fetcher.advise(&object, &streams, range.clone(), part.clone());
                    read(&fetcher, &object, range, &mut buffer).await?;
                    first.get_or_insert_with(|| began.elapsed());
                }
                Ok::<_, Failure>(first.unwrap_or_default())
            })
        });
        let mut first = Duration::MAX;
        for part in futures::future::join_all(parts).await {
            first = first.min(part??);
        }
        let (took, used) = (began.elapsed(), processor::seconds() - used);
        let (after, stats) = (bench.moved(&fetcher), fetcher.stats());
        rounds.push(Round {
            got: mb(size, took),
            ceiling,
            first: ms(first),
            rest: format!(
                "one plain GET {:.1} ms; {} GETs ({} hedges, {} retries), {:.3} bytes fetched per byte read; {} blocks not cached, {} cached past the page cache; {used:.2} CPU seconds, plain {plain_cpu:.2}",
                ms(one),
                after.0 - before.0,
                stats.hedges,
                stats.retries,
                (after.1 - before.1) as f64 / size as f64,
                stats.fills_dropped,
                stats.fills_direct,
            ),
        });
    }
    let label = format!(
        "sequential, {} MiB, {readers} reader(s), {} connections, {}",
        bench.size >> 20,
        bench.connections,
        if with_cache { "cache on disk" } else { "no cache" },
    );
    print_best(&label, &rounds);
    Ok(())
}

async fn random(bench: &Bench, readers: usize, reads: u64, warm: bool, label: &str) -> Result<(), Failure> {
    let place = |n: u64| (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 16) % (bench.size - 4096) / 4096 * 4096;
    let mut plain: Vec<Duration> = stream::iter(0..reads)
        .map(|n| async move {
            let block = place(n) / BLOCK_SIZE * BLOCK_SIZE;
            let began = Instant::now();
            bench
                .plain("big", block..(block + BLOCK_SIZE).min(bench.size))
                .await?;
            Ok::<_, Failure>(began.elapsed())
        })
        .buffer_unordered(readers)
        .try_collect()
        .await?;
    let (fetcher, object) = bench.fetcher(None);
    let warming = warm.then(|| {
        let (fetcher, other) = (Arc::clone(&fetcher), bench.open(&fetcher, "other", bench.size));
        tokio::spawn(async move { fetcher.warm(&other, 0..u64::MAX, Priority::WarmUp).await })
    });
    let streams = Streams::default();
    let before = bench.moved(&fetcher);
    let mut times: Vec<Duration> = stream::iter(0..reads)
        .map(|n| {
            let (fetcher, object, streams) = (&fetcher, &object, &streams);
            async move {
                let at = place(n + reads);
                let began = Instant::now();
                fetcher.advise(object, streams, at..at + 4096, 0..bench.size);
                read(fetcher, object, at..at + 4096, &mut Vec::new()).await?;
                Ok::<_, Failure>(began.elapsed())
            }
        })
        .buffer_unordered(readers)
        .try_collect()
        .await?;
    let after = bench.moved(&fetcher);
    if let Some(warming) = warming {
        warming.abort();
    }
    println!(
        "random 4 KiB, {readers} readers{label}: p50 {:.1} ms, p99 {:.1} ms; plain GET of a block p50 {:.1} ms, p99 {:.1} ms; {:.2} GETs a read, {} hedges",
        percentile(&mut times, 50),
        percentile(&mut times, 99),
        percentile(&mut plain, 50),
        percentile(&mut plain, 99),
        (after.0 - before.0) as f64 / reads as f64,
        fetcher.stats().hedges
    );
    Ok(())
}

/// Files of 100 KiB in directories of 100: in objects of up to 64 MiB, each from a 4 KiB boundary, which is what
/// publishing makes of them; or one object each, as registered.
#[derive(Clone)]
struct Files {
    store: Store,
    files: u64,
    in_an_object: u64,
}

const FILE: u64 = 100 << 10;
const IN_A_BUNDLE: u64 = (64 << 20) / FILE;

impl Files {
    fn place(&self, file: u64) -> (ObjectNo, std::ops::Range<u64>) {
        let start = file % self.in_an_object * FILE;
        (ObjectNo((file / self.in_an_object) as u32), start..start + FILE)
    }
}

impl Sources for Files {
    fn source(&self, object: ObjectNo) -> Result<Source, TreeError> {
        let files = (self.files - u64::from(object.0) * self.in_an_object).min(self.in_an_object);
        Ok(Source {
            store: self.store.clone(),
            key: format!("of {}/{}", self.in_an_object, object.0),
            pin: Pin::Content,
            size: files * FILE,
            sums: None,
        })
    }

    fn total_bytes(&self) -> u64 {
        self.files * FILE
    }

    fn files(&self) -> Box<dyn Iterator<Item = (ObjectNo, std::ops::Range<u64>)> + Send + '_> {
        Box::new((0..self.files).map(|file| self.place(file)))
    }
}

/// What brings the files before they are read.
#[derive(Clone, Copy, PartialEq)]
enum Ahead {
    Prefetch(PrefetchPolicy),
    /// A profile of the same order, and no other prefetching.
    Profile,
}

async fn small_files(bench: &Bench, files: u64, in_an_object: u64, ahead: Ahead) -> Result<(), Failure> {
    let policy = match ahead {
        Ahead::Prefetch(policy) => policy,
        Ahead::Profile => PrefetchPolicy::None,
    };
    let sources = Files {
        store: bench.store.clone(),
        files,
        in_an_object,
    };
    for number in 0..files.div_ceil(in_an_object) {
        let source = sources.source(ObjectNo(number as u32))?;
        bench.has(&source.key, source.size);
    }
    bench.has("small", FILE);
    let began = Instant::now();
    let some = files / 10;
    stream::iter(0..some)
        .map(|_| bench.plain("small", 0..FILE))
        .buffer_unordered(8)
        .try_for_each(|_| async { Ok(()) })
        .await?;
    let serial = some as f64 / began.elapsed().as_secs_f64();
    let recorder = Recorder::default();
    let mut order: Vec<u64> = (0..files).collect();
    order.sort_by_key(|n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 7);
    let places: Vec<_> = order.iter().map(|&file| (file, sources.place(file))).collect();
    if ahead == Ahead::Profile {
        places
            .iter()
            .for_each(|(_, (object, range))| recorder.wanted(*object, range));
    }
    let places = Arc::new(places);
    let mut rounds = Vec::new();
    for _ in 0..ROUNDS {
        let (ceiling, plain_cpu) = bench.ceiling().await?;
        use_memory(bench.size * 2)?;
        let dir = tempfile::tempdir()?;
        let fetcher = Fetcher::new(
            config(bench.connections),
            Some(cache(dir.path())?),
            tokio::runtime::Handle::current(),
        );
        let profile = recorder.profile();
        let (before, used) = (bench.moved(&fetcher), processor::seconds());
        let began = Instant::now();
        let runtime = tokio::runtime::Handle::current();
        let following = {
            let (fetcher, sources) = (Arc::clone(&fetcher), sources.clone());
            tokio::spawn(async move {
                let open = |number| Ok(fetcher.open("bench", sources.source(number)?));
                bring(&fetcher, profile.ranges(), open).await;
            })
        };
        let content = Arc::new(Fetched::new(
            Arc::clone(&fetcher),
            sources.clone(),
            "bench".into(),
            policy,
            &runtime,
        ));
        let readers = (0..8).map(|reader| {
            let (content, places) = (Arc::clone(&content), Arc::clone(&places));
            tokio::spawn(async move {
                let (mut buffer, mut times) = (Vec::new(), Vec::new());
                for (file, (object, range)) in places.iter().skip(reader).step_by(8) {
                    let began = Instant::now();
                    let there = content.read_cached(*object, range.clone(), &mut buffer);
                    content.advise(Ino(*file), *object, range.clone(), range.clone());
                    if !there {
                        content.read(*object, range.clone()).await?;
                    }
                    times.push(began.elapsed());
                }
                Ok::<_, Failure>(times)
            })
        });
        let mut times = Vec::new();
        for done in futures::future::join_all(readers).await {
            times.extend(done??);
        }
        let took = began.elapsed();
        let used = processor::seconds() - used;
        drop(content);
        following.abort();
        let (after, stats) = (bench.moved(&fetcher), fetcher.stats());
        let rate = files as f64 / took.as_secs_f64();
        rounds.push(Round {
        got: mb(files * FILE, took),
        ceiling,
        first: percentile(&mut times, 0),
        rest: format!(
            "{rate:.0} files/s, {:.1} x 8 readers with one GET at a time ({serial:.0}); a file p50 {:.1} ms, p99 {:.1} ms; {} GETs, {:.2} bytes fetched per byte read, {} blocks not cached; {used:.2} CPU seconds, plain {plain_cpu:.2}",
            rate / serial,
            percentile(&mut times, 50),
            percentile(&mut times, 99),
            after.0 - before.0,
            (after.1 - before.1) as f64 / (files * FILE) as f64,
            stats.fills_dropped
        ),
    });
    }
    let kind = if in_an_object == 1 {
        "one object each"
    } else {
        "in bundles"
    };
    let ahead = match ahead {
        Ahead::Prefetch(policy) => format!("--prefetch {policy}"),
        Ahead::Profile => "a profile and no prefetch".to_owned(),
    };
    let label = format!(
        "{files} files of 100 KiB, {kind}, {} connections, 8 readers, shuffled, {ahead}, cache on disk",
        bench.connections
    );
    print_best(&label, &rounds);
    Ok(())
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Result<(), Failure> {
    let small = std::env::args().any(|argument| argument == "--small");
    let size: u64 = if small { 256 << 20 } else { 2 << 30 };
    let (origin, settings) = match argument("--endpoint") {
        Some(endpoint) => (None, s3_origin::settings(&endpoint)),
        None => {
            let origin = S3Origin::start(SHAPE).await;
            let settings = origin.settings();
            (Some(origin), settings)
        }
    };
    let settings = settings.into_iter().collect();
    let store = Store::open(&"s3://bucket".parse()?, &settings, &Deadlines::data())?;
    let connections = connections();
    let mut bench = Bench {
        origin,
        store,
        size,
        connections: connections.last().copied().unwrap_or(1),
    };
    bench.has("big", size);
    bench.has("other", size);
    let only = argument("--only");
    let wanted = |name: &str| only.as_deref().is_none_or(|only| only == name);
    if wanted("sequential") {
        for connections in &connections {
            bench.connections = *connections;
            for readers in [1, 8] {
                for with_cache in [false, true] {
                    sequential(&bench, with_cache, readers).await?;
                }
            }
        }
    }
    if wanted("random") {
        let reads = if small { 600 } else { 3000 };
        random(&bench, 1, if small { 60 } else { 200 }, false, "").await?;
        random(&bench, 16, reads, false, "").await?;
        random(&bench, 16, reads, true, ", while another version is warmed").await?;
        bench.shape(Shape {
            straggler_every: 50,
            straggle: Duration::from_secs(1),
            ..SHAPE
        })?;
        random(&bench, 16, reads, false, ", 2 % stragglers of 1 s").await?;
        bench.shape(SHAPE)?;
    }
    let files = if small { 2000 } else { 20_000 };
    for (in_an_object, name) in [(IN_A_BUNDLE, "bundled"), (1, "registered")] {
        if !wanted(name) {
            continue;
        }
        // A request for each file: all connections are what it takes.
        let tried = if in_an_object == 1 {
            connections.len() - 1
        } else {
            0
        };
        for connections in &connections[tried..] {
            bench.connections = *connections;
            for policy in [PrefetchPolicy::Auto, PrefetchPolicy::All] {
                small_files(&bench, files, in_an_object, Ahead::Prefetch(policy)).await?;
            }
            small_files(&bench, files, in_an_object, Ahead::Profile).await?;
        }
    }
    Ok(())
}
