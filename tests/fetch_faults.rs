//! Fetching from an S3-protocol origin: what each fault becomes, and how little is asked for.

#[path = "support/s3_origin.rs"]
mod s3_origin;
#[path = "support/sandbox.rs"]
mod sandbox;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use futures::{StreamExt as _, TryStreamExt as _, stream};
use grid_mount::{
    block::BLOCK_SIZE,
    cache::{Cache, CacheConfig, VerifyPolicy},
    digest::BlockSum,
    fetch::{BlockSums, FetchConfig, FetchError, FetchObject, Fetcher, Priority, Source, Streams},
    origin::{Borrowed, Deadlines, Keys, Lender, Lent, OriginError, Pin, PutOutcome, Secret, Store},
};
use s3_origin::{Fault, S3Origin, Shape};

fn bytes(size: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    })
    .flatten()
    .take(size)
    .collect()
}

fn store(origin: &S3Origin, deadlines: &Deadlines) -> Store {
    let settings = origin.settings().into_iter().collect();
    Store::open(&"s3://bucket/data".parse().unwrap(), &settings, deadlines).unwrap()
}

fn config() -> FetchConfig {
    FetchConfig {
        connections: 16,
        memory_limit: 128 << 20,
        read_deadline: Duration::from_secs(20),
    }
}

struct Set {
    origin: S3Origin,
    fetcher: Arc<Fetcher>,
    object: Arc<FetchObject>,
    data: Vec<u8>,
}

struct Sums(Vec<BlockSum>);

#[async_trait::async_trait]
impl BlockSums for Sums {
    async fn sums(&self, blocks: std::ops::Range<u64>) -> Result<Vec<BlockSum>, FetchError> {
        Ok(self.0[blocks.start as usize..blocks.end as usize].to_vec())
    }
}

async fn set(size: usize, config: FetchConfig, deadlines: Deadlines, with_sums: bool) -> Set {
    let origin = S3Origin::start(Shape::default()).await;
    let data = bytes(size);
    let etag = origin.put("data/key", data.clone());
    let fetcher = Fetcher::new(config, None, tokio::runtime::Handle::current());
    let sums = with_sums.then(|| {
        Arc::new(Sums(data.chunks(BLOCK_SIZE as usize).map(BlockSum::of).collect())) as Arc<dyn BlockSums>
    });
    let source = Source {
        store: store(&origin, &deadlines),
        key: "key".into(),
        pin: Pin::ETag(etag),
        size: size as u64,
        sums,
    };
    let object = fetcher.open("team", source);
    Set {
        origin,
        fetcher,
        object,
        data,
    }
}

#[tokio::test]
async fn each_fault_passes_or_ends_as_it_should() {
    // One fault, then health: reads succeed.
    for fault in [
        Fault::Status(500),
        Fault::Error(503, "SlowDown"),
        Fault::Reset,
        Fault::Truncated,
        Fault::Overlong,
        Fault::WrongRange,
        Fault::Flipped,
    ] {
        let set = set(3 * BLOCK_SIZE as usize + 77, config(), Deadlines::data(), true).await;
        set.origin.faults([fault]);
        let read = set.fetcher.read(&set.object, 100..set.data.len() as u64).await;
        assert_eq!(read.unwrap(), set.data[100..], "{fault:?}");
        assert!(set.fetcher.stats().retries >= 1, "{fault:?}");
    }
    // What does not pass is an error at once, once, and the next read tries anew.
    type Check = fn(&OriginError) -> bool;
    let lasting: [(Fault, Check); 5] = [
        (Fault::Error(403, "AccessDenied"), |e| {
            matches!(e, OriginError::Denied { .. })
        }),
        (Fault::Error(400, "ExpiredToken"), |e| {
            matches!(e, OriginError::Credentials { .. })
        }),
        (Fault::Error(404, "NoSuchKey"), |e| {
            matches!(e, OriginError::NotFound { .. })
        }),
        (Fault::Error(404, "NoSuchBucket"), |e| {
            matches!(e, OriginError::NoBucket { .. })
        }),
        (Fault::WrongETag, |e| matches!(e, OriginError::Changed { .. })),
    ];
    for (fault, check) in lasting {
        let set = set(BLOCK_SIZE as usize, config(), Deadlines::data(), false).await;
        set.origin.faults([fault]);
        let Err(FetchError::Origin(error)) = set.fetcher.read(&set.object, 0..10).await else {
            panic!("{fault:?}")
        };
        assert!(check(&error), "{fault:?}: {error:?}");
        assert!(error.to_string().contains("s3://bucket/data"), "{error}");
        assert_eq!(
            set.origin.counts().gets.load(Relaxed),
            1,
            "{fault:?} was tried again"
        );
        assert_eq!(
            set.fetcher.read(&set.object, 0..10).await.unwrap(),
            set.data[..10]
        );
    }
}

/// Lends `key 0`, `key 1`, … for an hour each.
#[derive(Default)]
struct Bank {
    lent: AtomicU64,
}

#[async_trait::async_trait]
impl Lender for Bank {
    async fn lend(&self) -> Result<Lent, Box<dyn std::error::Error + Send + Sync>> {
        // Long enough for every reader to come along meanwhile.
        tokio::time::sleep(Duration::from_millis(100)).await;
        let keys = Keys {
            id: format!("key{}", self.lent.fetch_add(1, Relaxed)),
            secret: Secret::new("hunter2"),
            token: None,
        };
        let expires_in = Some(Duration::from_secs(3600));
        Ok(Lent { keys, expires_in })
    }
}

#[tokio::test]
async fn refused_keys_are_renewed_once_for_all_readers() {
    for (status, code) in [
        (403, "InvalidAccessKeyId"),
        (400, "ExpiredToken"),
        (403, "AccessDenied"),
    ] {
        let origin = S3Origin::start(Shape::default()).await;
        let data = bytes(24 * BLOCK_SIZE as usize);
        origin.put("data/key", data.clone());
        let bank = Arc::new(Bank::default());
        let store = Store::open_with(
            &"s3://bucket/data".parse().unwrap(),
            &origin.settings().into_iter().collect(),
            &Deadlines::data(),
            Some(Arc::new(Borrowed::new(
                "s3://bucket/data",
                Arc::clone(&bank) as _,
            ))),
        )
        .unwrap();
        let fetcher = Fetcher::new(config(), None, tokio::runtime::Handle::current());
        let source = Source {
            store: store.clone(),
            key: "key".into(),
            pin: Pin::Content,
            size: data.len() as u64,
            sums: None,
        };
        let object = fetcher.open("team", source);
        origin.take_only("key0", status, code);
        assert_eq!(fetcher.read(&object, 0..10).await.unwrap(), data[..10]);
        assert_eq!((bank.lent.load(Relaxed), origin.refused()), (1, 0));

        // The keys in use are taken back: every reader is refused, one asks for others, all get their bytes.
        origin.take_only("key1", status, code);
        let reads = (1..12).map(|n| {
            let (fetcher, object, data) = (&fetcher, &object, &data);
            async move {
                let at = n * 2 * BLOCK_SIZE as usize;
                let range = at as u64..at as u64 + 100;
                assert_eq!(
                    fetcher.read(object, range).await.unwrap(),
                    data[at..at + 100],
                    "{code}"
                );
            }
        });
        futures::future::join_all(reads).await;
        assert_eq!(bank.lent.load(Relaxed), 2, "{code}: renewed more than once");
        assert!(origin.refused() >= 1);
        // Everything else a store is asked renews them, too.
        origin.take_only("key2", status, code);
        store.put("other", "x".into()).await.unwrap();
        origin.take_only("key3", status, code);
        let listed: Vec<_> = store.list("", None).try_collect().await.unwrap();
        assert_eq!(listed.len(), 2);
        assert_eq!(bank.lent.load(Relaxed), 4);

        // Nobody lends the right ones: refused once more, and then it is an error, not a storm of renewals.
        origin.take_only("nobody's", status, code);
        for _ in 0..5 {
            let error = store.get("key", 1 << 30).await.unwrap_err();
            let expected = match code {
                "AccessDenied" => matches!(error, OriginError::Denied { .. }),
                _ => matches!(
                    error,
                    OriginError::Credentials { .. } | OriginError::Denied { .. }
                ),
            };
            assert!(expected, "{error:?}");
        }
        let most = if code == "AccessDenied" { 5 } else { 9 };
        assert!(
            bank.lent.load(Relaxed) <= most,
            "{code}: {} times",
            bank.lent.load(Relaxed)
        );
    }
}

#[tokio::test]
async fn an_overwritten_object_is_an_error_never_other_bytes() {
    let set = set(BLOCK_SIZE as usize, config(), Deadlines::data(), false).await;
    set.origin.put("data/key", vec![0; BLOCK_SIZE as usize]);
    let error = set.fetcher.read(&set.object, 0..10).await.unwrap_err();
    assert!(
        error.to_string().contains("changed since it was published"),
        "{error}"
    );
}

#[tokio::test]
async fn bytes_that_stay_wrong_are_refused_after_one_more_fetch() {
    let set = set(BLOCK_SIZE as usize, config(), Deadlines::data(), true).await;
    set.origin.always(Some(Fault::Flipped));
    assert!(matches!(
        set.fetcher.read(&set.object, 0..10).await,
        Err(FetchError::Corrupt { block: 0, .. })
    ));
    assert_eq!(set.origin.counts().gets.load(Relaxed), 2);
}

#[tokio::test]
async fn a_stalled_origin_costs_the_deadline_and_no_more() {
    for fault in [Fault::Stall, Fault::StallInBody] {
        let config = FetchConfig {
            read_deadline: Duration::from_millis(300),
            ..config()
        };
        let set = set(BLOCK_SIZE as usize, config, Deadlines::data(), false).await;
        set.origin.always(Some(fault));
        let began = std::time::Instant::now();
        let error = set.fetcher.read(&set.object, 0..10).await.unwrap_err();
        assert!(matches!(error, FetchError::Deadline(_)), "{error:?}");
        assert!(began.elapsed() < Duration::from_secs(5));
        assert!(set.fetcher.stats().last_error.unwrap().contains("key"));
    }
    // Shorter deadlines of the client turn a stall into a retry.
    let deadlines = Deadlines {
        first_byte: Duration::from_millis(100),
        ..Deadlines::data()
    };
    let set = set(BLOCK_SIZE as usize, config(), deadlines, false).await;
    set.origin.faults([Fault::Stall]);
    assert_eq!(
        set.fetcher.read(&set.object, 0..10).await.unwrap(),
        set.data[..10]
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_readers_of_one_block_cause_one_get_of_one_block() {
    let set = set(64 << 20, config(), Deadlines::data(), false).await;
    set.origin.faults([Fault::Late(Duration::from_millis(50))]);
    let at = 33 * BLOCK_SIZE + 5;
    let reads = (0..100).map(|_| {
        let (fetcher, object) = (Arc::clone(&set.fetcher), Arc::clone(&set.object));
        tokio::spawn(async move { fetcher.read(&object, at..at + 4096).await })
    });
    for read in futures::future::join_all(reads).await {
        assert_eq!(read.unwrap().unwrap(), set.data[at as usize..at as usize + 4096]);
    }
    assert_eq!(
        set.origin.ranges(),
        [("data/key".to_owned(), 33 * BLOCK_SIZE, BLOCK_SIZE)]
    );
}

/// Reads `step` bytes after the other, and compares.
async fn read_through(fetcher: &Arc<Fetcher>, object: &Arc<FetchObject>, data: &[u8], step: u64) {
    let (streams, size, mut buffer) = (Streams::default(), data.len() as u64, Vec::new());
    for start in (0..size).step_by(step as usize) {
        let range = start..size.min(start + step);
        fetcher.advise(object, &streams, range.clone(), 0..size);
        if fetcher.read_cached(object, range.clone(), &mut buffer).is_none() {
            buffer = fetcher.read(object, range.clone()).await.unwrap().to_vec();
        }
        assert!(
            buffer == data[range.start as usize..range.end as usize],
            "{range:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sequential_reader_without_a_cache_fetches_nothing_twice() {
    let set = set(40 << 20, config(), Deadlines::data(), false).await;
    read_through(&set.fetcher, &set.object, &set.data, BLOCK_SIZE).await;
    assert_eq!(
        set.origin.counts().body_bytes.load(Relaxed),
        set.data.len() as u64
    );
    assert!(
        set.origin.counts().gets.load(Relaxed) < 64,
        "{}",
        set.origin.counts().gets.load(Relaxed)
    );
    let stats = set.fetcher.stats();
    assert_eq!(stats.readahead_blocks, stats.readahead_used, "{stats:?}");
}

/// Were each given what one alone may have, what arrives would push out what nobody has read yet: half as much again
/// is fetched then. Before all have come, and where some stand still for seconds, a little may be.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sequential_readers_of_many_files_fetch_little_twice_in_little_memory() {
    const READERS: u64 = 12;
    const PART: u64 = 16 << 20;
    let config = FetchConfig {
        memory_limit: 64 << 20,
        ..config()
    };
    let set = set((READERS * PART) as usize, config, Deadlines::data(), false).await;
    let streams = Vec::from_iter((0..READERS).map(|_| Streams::default()));
    let mut buffer = Vec::new();
    for at in (0..PART).step_by(BLOCK_SIZE as usize) {
        for (reader, streams) in (0..READERS).zip(&streams) {
            let file = reader * PART..(reader + 1) * PART;
            let range = file.start + at..file.start + at + BLOCK_SIZE;
            let Set { fetcher, object, .. } = &set;
            fetcher.advise(object, streams, range.clone(), file);
            if fetcher.read_cached(object, range.clone(), &mut buffer).is_none() {
                buffer = fetcher.read(object, range.clone()).await.unwrap().to_vec();
            }
            assert!(buffer == set.data[range.start as usize..range.end as usize]);
        }
    }
    let fetched = set.origin.counts().body_bytes.load(Relaxed);
    assert!(fetched <= READERS * PART * 11 / 10, "{fetched} bytes");
    let gets = set.origin.counts().gets.load(Relaxed);
    assert!(gets < 40 * READERS, "{gets} GETs");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_reads_agree_with_the_source_in_little_memory() {
    let config = FetchConfig {
        memory_limit: 4 << 20,
        ..config()
    };
    let set = set(24 << 20, config, Deadlines::data(), true).await;
    let size = set.data.len() as u64;
    let streams = Arc::new(Streams::default());
    let mut state = 7u64;
    let triples: Vec<_> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let start = (state >> 20) % size;
        start..start + 1 + (state >> 40) % (400 << 10)
    })
    .take(600)
    .collect();
    stream::iter(triples)
        .for_each_concurrent(32, |range| {
            let (fetcher, object, streams, data) = (&set.fetcher, &set.object, &streams, &set.data);
            async move {
                fetcher.advise(object, streams, range.clone(), 0..size);
                let mut buffer = Vec::new();
                if fetcher.read_cached(object, range.clone(), &mut buffer).is_none() {
                    buffer = fetcher.read(object, range.clone()).await.unwrap().to_vec();
                }
                let end = range.end.min(size) as usize;
                assert!(buffer == data[range.start as usize..end], "{range:?}");
            }
        })
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_passes_a_warm_up() {
    let set = set(
        64 << 20,
        FetchConfig {
            connections: 4,
            ..config()
        },
        Deadlines::data(),
        false,
    )
    .await;
    set.origin.shape(Shape {
        first_byte: Duration::from_millis(30),
        rate: 50 << 20,
        ..Shape::default()
    });
    let (fetcher, object) = (Arc::clone(&set.fetcher), Arc::clone(&set.object));
    let warm = tokio::spawn(async move { fetcher.warm(&object, 0..32 << 20, Priority::WarmUp).await });
    while set.origin.ranges().len() < 2 {
        tokio::task::yield_now().await;
    }
    let at = 60 << 20;
    assert_eq!(
        set.fetcher.read(&set.object, at..at + 10).await.unwrap(),
        set.data[at as usize..at as usize + 10]
    );
    assert!(!warm.is_finished(), "the reader waited for the warm-up");
    warm.await.unwrap().unwrap();
    let warmed: u64 = set
        .origin
        .ranges()
        .iter()
        .filter(|range| range.1 < 32 << 20)
        .map(|range| range.2)
        .sum();
    assert_eq!(warmed, 32 << 20);
}

#[tokio::test]
async fn slow_down_is_obeyed_and_survived() {
    let set = set(8 * BLOCK_SIZE as usize, config(), Deadlines::data(), false).await;
    set.origin.faults([
        Fault::Error(503, "SlowDown"),
        Fault::Error(503, "SlowDown"),
        Fault::Status(429),
    ]);
    assert_eq!(
        set.fetcher.read(&set.object, 0..10).await.unwrap(),
        set.data[..10]
    );
    assert_eq!(set.fetcher.stats().slow_downs, 3);
    set.origin.always(Some(Fault::Error(503, "SlowDown")));
    let error = set
        .fetcher
        .read(&set.object, 5 * BLOCK_SIZE..5 * BLOCK_SIZE + 1)
        .await
        .unwrap_err();
    assert!(
        matches!(&error, FetchError::Origin(e) if matches!(**e, OriginError::Throttled { .. })),
        "{error:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_store_round_trips_odd_keys_uploads_and_listings() {
    let origin = S3Origin::start(Shape::default()).await;
    let store = store(&origin, &Deadlines::data());
    let keys = [
        "a b", "a%20b", "a//b", "dir/", "ü/é", "x&y<z>", "a+b", "100%", "a/b/c",
    ];
    for key in keys {
        store.put(key, bytes::Bytes::from(key)).await.unwrap();
        assert_eq!(store.get(key, 100).await.unwrap().0, key, "{key}");
    }
    for n in 0..1500 {
        origin.put(&format!("data/many/{n:05}"), "x");
    }
    let mut expected: Vec<_> = keys
        .iter()
        .map(|key| (*key).to_owned())
        .chain((0..1500).map(|n| format!("many/{n:05}")))
        .collect();
    expected.sort_unstable();
    let listed: Vec<_> = store
        .list("", None)
        .map_ok(|info| info.key)
        .try_collect()
        .await
        .unwrap();
    assert_eq!(listed, expected);
    let after: Vec<_> = store
        .list("many/", Some("many/01400"))
        .map_ok(|info| info.key)
        .try_collect()
        .await
        .unwrap();
    assert_eq!(after.len(), 99);
    let level = store.list_level("").await.unwrap();
    assert_eq!(level.prefixes, ["a/", "dir/", "many/", "ü/"]);

    assert_eq!(
        store.put_if_absent("once", "1".into()).await.unwrap(),
        PutOutcome::Created
    );
    assert_eq!(
        store.put_if_absent("once", "2".into()).await.unwrap(),
        PutOutcome::AlreadyExists
    );
    let large = bytes(40 << 20);
    let parts: Vec<_> = large
        .chunks(3 << 20)
        .map(|part| Ok(bytes::Bytes::copy_from_slice(part)))
        .collect();
    store
        .put_stream("large", large.len() as u64, stream::iter(parts).boxed())
        .await
        .unwrap();
    assert_eq!(store.get("large", u64::MAX).await.unwrap().0, large);
    let short = stream::iter([Ok(bytes::Bytes::from_static(b"x"))]).boxed();
    assert!(store.put_stream("short", 20 << 20, short).await.is_err());
    assert!(matches!(
        store.head("short").await,
        Err(OriginError::NotFound { .. })
    ));
    store.delete("once").await.unwrap();
    assert!(matches!(
        store.get("once", 9).await,
        Err(OriginError::NotFound { .. })
    ));
    assert!(store.counters().requests > 20);

    let gone = store.clone();
    drop(origin);
    let refused = gone.head("a b").await.unwrap_err();
    assert!(
        matches!(
            refused,
            OriginError::Unreachable { .. } | OriginError::Transient { .. }
        ),
        "{refused:?}"
    );
}

fn cache(dir: &std::path::Path, max_bytes: u64) -> Arc<Cache> {
    let config = CacheConfig {
        dir: dir.to_owned(),
        max_bytes,
        min_free: 0,
        verify: VerifyPolicy::EarlierBoot,
    };
    Cache::open(config).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_read_is_not_fetched_again_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let origin = S3Origin::start(Shape::default()).await;
    let data = bytes(20 << 20);
    let etag = origin.put("data/key", data.clone());
    for run in 0..2 {
        let cache = cache(dir.path(), 1 << 30);
        let fetcher = Fetcher::new(config(), Some(cache), tokio::runtime::Handle::current());
        let source = Source {
            store: store(&origin, &Deadlines::data()),
            key: "key".into(),
            pin: Pin::ETag(etag.clone()),
            size: data.len() as u64,
            sums: None,
        };
        let object = fetcher.open("team", source);
        fetcher
            .warm(&object, 0..u64::MAX, Priority::WarmUp)
            .await
            .unwrap();
        let mut buffer = Vec::new();
        for start in (0..data.len() as u64).step_by(1 << 20) {
            let range = start..start + (1 << 20);
            if fetcher.read_cached(&object, range.clone(), &mut buffer).is_none() {
                buffer = fetcher.read(&object, range.clone()).await.unwrap().to_vec();
            }
            assert!(buffer == data[range.start as usize..range.end as usize]);
        }
        let blocks = data.len().div_ceil(BLOCK_SIZE as usize) as u64;
        let cached = object.cached().unwrap();
        // The fills are behind the reads: wait for them, bounded, before the "restart".
        let patience = std::time::Instant::now() + Duration::from_secs(10);
        while !cached.missing(0..blocks).is_empty() && std::time::Instant::now() < patience {
            tokio::task::yield_now().await;
        }
        assert_eq!(fetcher.stats().fills_failed, 0);
        assert_eq!(
            origin.counts().body_bytes.load(Relaxed),
            data.len() as u64,
            "run {run}"
        );
    }
}

/// And its reader does not wait for the disk: it takes them from memory.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_streams_blocks_are_cached_past_the_page_cache() {
    let dir = tempfile::tempdir().unwrap();
    // As a kernel's requests in a file that begins anywhere: parts of them are there before others.
    const STEP: u64 = (1 << 20) + 4096;
    let set = set((40 << 20) + 12_345, config(), Deadlines::data(), false).await;
    let (size, blocks) = (
        set.data.len() as u64,
        set.data.len().div_ceil(BLOCK_SIZE as usize) as u64,
    );
    let kind = nix::sys::statfs::statfs(dir.path()).unwrap().filesystem_type();
    let is_ext4 = kind == nix::sys::statfs::EXT4_SUPER_MAGIC;
    if !is_ext4 {
        sandbox::skip(
            "writing past the page cache",
            &format!("{} is not on ext4", dir.path().display()),
        );
    }
    for run in 0..2 {
        let cache = cache(dir.path(), 1 << 30);
        let config = FetchConfig {
            // So much may wait for the disk that it cannot fall behind.
            memory_limit: 1 << 30,
            ..config()
        };
        let fetcher = Fetcher::new(
            config,
            Some(Arc::clone(&cache)),
            tokio::runtime::Handle::current(),
        );
        let source = Source {
            store: store(&set.origin, &Deadlines::data()),
            key: "key".into(),
            pin: Pin::Content,
            size,
            sums: None,
        };
        let object = fetcher.open("team", source);
        read_through(&fetcher, &object, &set.data, STEP).await;
        let cached = object.cached().unwrap();
        let patience = std::time::Instant::now() + Duration::from_secs(20);
        // But for what it began with, and the last block, which is no whole number of pages.
        let is_direct = || run == 1 || !is_ext4 || fetcher.stats().fills_direct * 10 > blocks * 8;
        while (!cached.missing(0..blocks).is_empty() || !is_direct()) && std::time::Instant::now() < patience
        {
            tokio::task::yield_now().await;
        }
        assert_eq!(cached.missing(0..blocks).len(), 0);
        assert!(is_direct(), "{:?}", fetcher.stats());
        assert_eq!(set.origin.counts().body_bytes.load(Relaxed), size, "run {run}");
        let hits = cache.stats().hits;
        match run {
            0 => assert!(hits < 4, "{hits} reads of the disk"),
            _ => assert_eq!((fetcher.stats().fills_direct, hits), (0, size.div_ceil(STEP))),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_reads_agree_with_the_source_under_a_tiny_cache() {
    let dir = tempfile::tempdir().unwrap();
    let mut set = set(24 << 20, config(), Deadlines::data(), false).await;
    let cache = cache(dir.path(), 10 << 20);
    let config = FetchConfig {
        memory_limit: 4 << 20,
        ..config()
    };
    set.fetcher = Fetcher::new(config, Some(cache), tokio::runtime::Handle::current());
    let etag = set.origin.put("data/key", set.data.clone());
    let source = Source {
        store: store(&set.origin, &Deadlines::data()),
        key: "key".into(),
        pin: Pin::ETag(etag),
        size: set.data.len() as u64,
        sums: None,
    };
    let object = set.fetcher.open("team", source);
    let size = set.data.len() as u64;
    let mut state = 11u64;
    let triples: Vec<_> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let start = (state >> 20) % size;
        start..start + 1 + (state >> 40) % (300 << 10)
    })
    .take(500)
    .collect();
    stream::iter(triples)
        .for_each_concurrent(16, |range| {
            let (fetcher, object, data) = (&set.fetcher, &object, &set.data);
            async move {
                let mut buffer = Vec::new();
                if fetcher.read_cached(object, range.clone(), &mut buffer).is_none() {
                    buffer = fetcher.read(object, range.clone()).await.unwrap().to_vec();
                }
                let end = range.end.min(size) as usize;
                assert!(buffer == data[range.start as usize..end], "{range:?}");
            }
        })
        .await;
}
