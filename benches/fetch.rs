//! Cold reads through `fetch`, beside plain parallel ranged GETs of the same store in the same run.
//!
//!     cargo bench --bench fetch [-- --small]
//!
//! The origin is in this process, shaped to 20 ms to the first byte and 90 MB/s per connection. No kernel
//! and no disk cache take part: what is measured is the fetcher.

#[path = "../tests/support/s3_origin.rs"]
mod s3_origin;

use std::{
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use grid_mount::{
    block::BLOCK_SIZE,
    fetch::{FetchConfig, FetchObject, Fetcher, Priority, Source, Streams},
    origin::{Deadlines, Pin, Store},
};
use s3_origin::{S3Origin, Shape};

const CONNECTIONS: usize = 32;
const SHAPE: Shape = Shape {
    first_byte: Duration::from_millis(20),
    rate: 90_000_000,
    straggler_every: 0,
    straggle: Duration::ZERO,
    write: Duration::ZERO,
};

type Failure = Box<dyn std::error::Error + Send + Sync>;

struct Bench {
    origin: S3Origin,
    store: Store,
    size: u64,
}

impl Bench {
    fn fetcher(&self) -> (Arc<Fetcher>, Arc<FetchObject>) {
        let config = FetchConfig {
            connections: CONNECTIONS,
            memory_limit: 1 << 30,
            read_deadline: Duration::from_secs(30),
            max_readahead: 256 << 20,
        };
        let fetcher = Fetcher::new(config, None, tokio::runtime::Handle::current());
        let object = self.open(&fetcher, "big", self.size);
        (fetcher, object)
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

    fn moved(&self) -> (u64, u64) {
        (
            self.origin.counts().gets.load(Relaxed),
            self.origin.counts().body_bytes.load(Relaxed),
        )
    }
}

async fn read(
    fetcher: &Arc<Fetcher>,
    object: &Arc<FetchObject>,
    range: std::ops::Range<u64>,
) -> Result<u64, Failure> {
    let mut buffer = Vec::new();
    if fetcher.read_cached(object, range.clone(), &mut buffer).is_some() {
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

async fn sequential(bench: &Bench) -> Result<(), Failure> {
    let began = Instant::now();
    stream::iter((0..bench.size).step_by(8 << 20))
        .map(|at| bench.plain("big", at..(at + (8 << 20)).min(bench.size)))
        .buffer_unordered(CONNECTIONS)
        .try_for_each(|_| async { Ok(()) })
        .await?;
    let ceiling = mb(bench.size, began.elapsed());
    let one = Instant::now();
    bench.plain("big", 0..BLOCK_SIZE).await?;
    let one = one.elapsed();

    let (fetcher, object) = bench.fetcher();
    let streams = Streams::default();
    let before = bench.moved();
    let (began, mut first) = (Instant::now(), None);
    for at in (0..bench.size).step_by(BLOCK_SIZE as usize) {
        let range = at..at + BLOCK_SIZE;
        fetcher.advise(&object, &streams, range.clone(), 0..bench.size);
        read(&fetcher, &object, range).await?;
        first.get_or_insert_with(|| began.elapsed());
    }
    let got = mb(bench.size, began.elapsed());
    let after = bench.moved();
    println!(
        "sequential, {} MiB: {got:.0} MB/s of {ceiling:.0} ({:.2}); first bytes {:.1} ms, one plain GET {:.1} ms; {} GETs, {:.3} bytes fetched per byte read",
        bench.size >> 20,
        got / ceiling,
        ms(first.unwrap_or_default()),
        ms(one),
        after.0 - before.0,
        (after.1 - before.1) as f64 / bench.size as f64
    );
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
    let (fetcher, object) = bench.fetcher();
    let warming = warm.then(|| {
        let (fetcher, other) = (Arc::clone(&fetcher), bench.open(&fetcher, "other", bench.size));
        tokio::spawn(async move { fetcher.warm(&other, 0..u64::MAX, Priority::WarmUp).await })
    });
    let streams = Streams::default();
    let before = bench.moved();
    let mut times: Vec<Duration> = stream::iter(0..reads)
        .map(|n| {
            let (fetcher, object, streams) = (&fetcher, &object, &streams);
            async move {
                let at = place(n + reads);
                let began = Instant::now();
                fetcher.advise(object, streams, at..at + 4096, 0..bench.size);
                read(fetcher, object, at..at + 4096).await?;
                Ok::<_, Failure>(began.elapsed())
            }
        })
        .buffer_unordered(readers)
        .try_collect()
        .await?;
    let after = bench.moved();
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

async fn small_files(bench: &Bench, files: u64) -> Result<(), Failure> {
    const FILE: u64 = 100 << 10;
    let one = bench.origin.put("small", vec![7; FILE as usize]);
    drop(one);
    let began = Instant::now();
    let some = files / 10;
    stream::iter(0..some)
        .map(|_| bench.plain("small", 0..FILE))
        .buffer_unordered(8)
        .try_for_each(|_| async { Ok(()) })
        .await?;
    let serial = some as f64 / began.elapsed().as_secs_f64();
    // Bundled: files lie in 64 MiB objects; readers come in shuffled order while everything is warmed.
    let (fetcher, object) = bench.fetcher();
    let slot = (FILE.div_ceil(4096)) * 4096;
    let files = files.min(bench.size / slot);
    let mut order: Vec<u64> = (0..files).collect();
    order.sort_by_key(|n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 7);
    let before = bench.moved();
    let began = Instant::now();
    let (warm_fetcher, warm_object) = (Arc::clone(&fetcher), Arc::clone(&object));
    let warming = tokio::spawn(async move {
        warm_fetcher
            .warm(&warm_object, 0..files * slot, Priority::Readahead)
            .await
    });
    let (reader, object) = (&fetcher, &object);
    stream::iter(order)
        .map(|n| async move { read(reader, object, n * slot..n * slot + FILE).await })
        .buffer_unordered(8)
        .try_for_each(|_| async { Ok(()) })
        .await?;
    let took = began.elapsed();
    warming.abort();
    let after = bench.moved();
    println!(
        "{files} files of 100 KiB in bundles, 8 readers, shuffled: {:.0} files/s, {:.0} MB/s; one GET per file, 8 at a time: {serial:.0} files/s; {:.2} bytes fetched per byte read",
        files as f64 / took.as_secs_f64(),
        mb(files * FILE, took),
        (after.1 - before.1) as f64 / (files * FILE) as f64
    );
    Ok(())
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Result<(), Failure> {
    let small = std::env::args().any(|argument| argument == "--small");
    let size: u64 = if small { 256 << 20 } else { 2 << 30 };
    let origin = S3Origin::start(SHAPE).await;
    let data = Bytes::from(vec![0x5a; size as usize]);
    origin.put("big", data.clone());
    origin.put("other", data);
    let settings = origin.settings().into_iter().collect();
    let store = Store::open(&"s3://bucket".parse()?, &settings, &Deadlines::data())?;
    let bench = Bench { origin, store, size };
    sequential(&bench).await?;
    random(&bench, 1, if small { 60 } else { 200 }, false, "").await?;
    random(&bench, 16, if small { 600 } else { 3000 }, false, "").await?;
    random(
        &bench,
        16,
        if small { 600 } else { 3000 },
        true,
        ", while another version is warmed",
    )
    .await?;
    bench.origin.shape(Shape {
        straggler_every: 50,
        straggle: Duration::from_secs(1),
        ..SHAPE
    });
    random(
        &bench,
        16,
        if small { 600 } else { 3000 },
        false,
        ", 2 % stragglers of 1 s",
    )
    .await?;
    bench.origin.shape(SHAPE);
    small_files(&bench, if small { 2000 } else { 20_000 }).await
}
