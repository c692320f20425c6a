//! Registering a bucket whose keys are of every kind: each becomes a file or is reported, whatever range of the
//! keys it is listed in.

#[path = "../benches/metadata/bucket.rs"]
mod bucket;
#[path = "support/records.rs"]
mod records;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bucket::Bucket;
use grid_mount::{
    origin::{Deadlines, Store, StoreSettings, StoreUrl},
    publish::{Progress, PublishOptions, SkipReason, register},
    tree::{EntryKind, RowNo, Tree, unpack},
};
use records::{Records, name};

const PLAIN: usize = 30_000;

#[derive(Default)]
struct Heard {
    times: AtomicU64,
    files: AtomicU64,
}

impl Progress for Heard {
    fn discovered(&self, files: u64, _: u64) {
        self.times.fetch_add(1, Ordering::Relaxed);
        self.files.fetch_add(files, Ordering::Relaxed);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_key_of_a_bucket_is_a_file_or_reported() {
    let long = "x".repeat(256);
    let longest = "y".repeat(255);
    let odd: Vec<(String, Option<SkipReason>)> = [
        ("/leading", Some(SkipReason::EmptyName)),
        ("twice//slashed", Some(SkipReason::EmptyName)),
        ("up/../etc", Some(SkipReason::DotName)),
        ("..", Some(SkipReason::DotName)),
        (long.as_str(), Some(SkipReason::NameTooLong)),
        (longest.as_str(), None),
        // Objects of this bucket have bytes.
        ("both", Some(SkipReason::AlsoADirectory)),
        ("both/file", None),
        ("marked/", Some(SkipReason::DirectoryWithBytes)),
        ("case", None),
        ("Case", None),
        // One letter, composed and not: two names.
        ("\u{c4}", None),
        ("A\u{308}", None),
    ]
    .map(|(key, reason)| (key.to_owned(), reason))
    .into();
    // Some are the very keys at which a range of others is cut.
    let cuts =
        (1..4).flat_map(|digits| (0..10usize.pow(digits as u32)).map(move |n| format!("{n:0digits$}")));
    let plain = (0..PLAIN)
        .map(|number| format!("{number:05}/image.jpg"))
        .chain(cuts);
    let files: BTreeSet<String> = odd
        .iter()
        .filter(|(_, reason)| reason.is_none())
        .map(|(key, _)| key.clone())
        .chain(plain.clone())
        .collect();
    let mut keys: Vec<String> = odd.iter().map(|(key, _)| key.clone()).chain(plain).collect();
    keys.sort();
    let count = keys.len() as u64;
    let bucket = Bucket::start(count, Box::new(move |at| format!("data/{}", keys[at as usize]))).unwrap();

    let dir = tempfile::tempdir().unwrap();
    let catalog_dir = dir.path().join("catalog");
    std::fs::create_dir(&catalog_dir).unwrap();
    let local = format!("file://{}", catalog_dir.display());
    let catalog = Records::open(&local, &StoreSettings::default());
    let settings: StoreSettings = [
        ("AWS_ENDPOINT_URL", bucket.endpoint()),
        ("AWS_ACCESS_KEY_ID", "none".to_owned()),
        ("AWS_SECRET_ACCESS_KEY", "none".to_owned()),
        ("AWS_REGION", "us-east-1".to_owned()),
        ("AWS_ALLOW_HTTP", "true".to_owned()),
    ]
    .into_iter()
    .collect();
    let url: StoreUrl = "s3://bucket/data".parse().unwrap();
    let store = Store::open(&url, &settings, &Deadlines::control()).unwrap();
    let heard = Arc::new(Heard::default());
    let options = PublishOptions::new(dir.path());
    let published = register(url, &store, name("alice:data"), &catalog, &options, heard.clone())
        .await
        .unwrap();

    let (rows, out) = (&published.record.tree.rows, dir.path().join("rows"));
    let packed = std::fs::File::open(catalog_dir.join(&rows.key)).unwrap();
    unpack(packed, rows.size, rows.digest, &out).unwrap();
    let tree = Tree::open(&out).unwrap();
    let found: BTreeSet<String> = (0..tree.row_count())
        .map(RowNo)
        .filter(|row| matches!(tree.entry(*row).unwrap().kind, EntryKind::File { .. }))
        .map(|row| String::from_utf8(tree.path(row).unwrap()).unwrap())
        .collect();
    assert!(
        found == files,
        "{:?}",
        found.symmetric_difference(&files).take(9).collect::<Vec<_>>()
    );
    assert!(tree.find(b"marked").unwrap().is_some());
    let mut reported: BTreeMap<SkipReason, BTreeSet<String>> = BTreeMap::new();
    for (key, reason) in odd {
        if let Some(reason) = reason {
            reported.entry(reason).or_default().insert(key);
        }
    }
    let skipped = &published.report.skipped;
    let told: BTreeMap<SkipReason, BTreeSet<String>> = skipped
        .reasons
        .iter()
        .map(|(reason, told)| (*reason, told.examples.iter().cloned().collect()))
        .collect();
    assert_eq!(told, reported);
    assert_eq!(skipped.count() + files.len() as u64, count);

    // In parallel, and told on the way.
    assert!(bucket.ranges_begun() > 1, "one range only");
    assert!(heard.times.load(Ordering::Relaxed) > 10);
    // The object beside a directory of its name is found out only at the end.
    assert_eq!(heard.files.load(Ordering::Relaxed), files.len() as u64 + 1);
    assert!(bucket.pages_asked() >= count.div_ceil(1000));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_is_not_utf8_is_named_and_makes_no_version() {
    use std::os::unix::ffi::OsStrExt;
    let dir = tempfile::tempdir().unwrap();
    let [origin, catalog] = ["origin", "catalog"].map(|name| dir.path().join(name));
    std::fs::create_dir(&origin).unwrap();
    std::fs::create_dir(&catalog).unwrap();
    std::fs::write(origin.join("good"), "good").unwrap();
    std::fs::write(origin.join(std::ffi::OsStr::from_bytes(b"b\xffd")), "bad").unwrap();
    let url = |path: &std::path::Path| format!("file://{}", path.display());
    let records = Records::open(&url(&catalog), &StoreSettings::default());
    let from: StoreUrl = url(&origin).parse().unwrap();
    let store = Store::open(&from, &StoreSettings::default(), &Deadlines::control()).unwrap();
    let options = PublishOptions::new(dir.path());
    let error = register(from, &store, name("alice:data"), &records, &options, Arc::new(()))
        .await
        .unwrap_err();
    let mut told = error.to_string();
    let mut cause = std::error::Error::source(&error);
    while let Some(next) = cause {
        told = format!("{told}: {next}");
        cause = next.source();
    }
    assert!(told.contains("b\\xFFd"), "{told}");
    assert_eq!(records.published(), 0);
}
