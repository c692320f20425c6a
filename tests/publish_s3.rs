//! Registering and publishing on a real S3 server, and registering a `file://` prefix.

#[path = "support/rebuilt.rs"]
mod rebuilt;
#[path = "support/records.rs"]
mod records;
#[path = "support/sandbox.rs"]
mod sandbox;
#[path = "support/weed.rs"]
mod weed;

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use futures::{StreamExt, stream};
use grid_mount::{
    catalog::{Catalog, OriginLocation},
    digest::Digest,
    origin::{Deadlines, Store, StoreSettings, StoreUrl},
    publish::{PublishError, PublishOptions, SkipReason, publish_directory, register},
};
use rebuilt::{SeenKind, assert_same, rebuilt, source};
use records::{Records, name};
use weed::Weed;

fn open(url: &str, settings: &StoreSettings) -> (StoreUrl, Store) {
    let url: StoreUrl = url.parse().unwrap();
    let store = Store::open(&url, settings, &Deadlines::control()).unwrap();
    (url, store)
}

/// Registers what `put` has put, and finds exactly that in the tree; nothing is written to the origin.
async fn register_and_compare(origin: &str, settings: &StoreSettings, put: &BTreeMap<String, Vec<u8>>) {
    let dir = tempfile::tempdir().unwrap();
    let catalog_url = format!("file://{}", dir.path().join("catalog").display());
    std::fs::create_dir(dir.path().join("catalog")).unwrap();
    let catalog = Records::open(&catalog_url, &StoreSettings::default());
    let (url, store) = open(origin, settings);
    let options = PublishOptions::new(dir.path());
    let before = listed(&store).await;
    let published = register(
        url.clone(),
        &store,
        name("alice:data"),
        &catalog,
        &options,
        Arc::new(()),
    )
    .await
    .unwrap();
    assert_eq!(
        listed(&store).await,
        before,
        "registering changes nothing at the origin"
    );
    assert_eq!(published.record.origin, OriginLocation::Url(url));
    assert!(published.record.tree.digests.is_none() && published.record.tree.sums.is_none());
    assert_eq!(
        published.report.skipped.count(),
        0,
        "{:?}",
        published.report.skipped
    );
    let entries = rebuilt(&published.record, catalog.store(), &store).await;
    let files: BTreeMap<_, _> = entries
        .iter()
        .filter_map(|(path, seen)| match &seen.kind {
            SeenKind::File(size, digest) => Some((path.clone(), (*size, *digest, seen.mode))),
            _ => None,
        })
        .collect();
    let expected: BTreeMap<_, _> = put
        .iter()
        .map(|(key, bytes)| {
            (
                key.clone().into_bytes(),
                (bytes.len() as u64, Digest::of(bytes), 0o644),
            )
        })
        .collect();
    assert_eq!(files, expected);
    for seen in entries.values().filter(|seen| seen.kind == SeenKind::Directory) {
        assert_eq!(seen.mode, 0o755);
    }
}

async fn listed(store: &Store) -> BTreeMap<String, Option<String>> {
    store
        .list("", None)
        .map(|object| {
            let object = object.unwrap();
            (object.key, object.etag)
        })
        .collect()
        .await
}

fn some_keys() -> BTreeMap<String, Vec<u8>> {
    [
        "a.txt",
        "a/b",
        "a-b/c",
        "deep/er/still/x",
        "Ä ö/ü+%20",
        "empty",
        "case",
        "Case",
        "~tilde/#hash?",
    ]
    .into_iter()
    .map(|key| {
        (
            key.to_owned(),
            if key == "empty" {
                Vec::new()
            } else {
                key.repeat(50).into_bytes()
            },
        )
    })
    .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_prefix_is_registered_without_a_copy() {
    let dir = tempfile::tempdir().unwrap();
    let keys = some_keys();
    for (key, bytes) in &keys {
        let path = dir.path().join(key);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }
    let url = format!("file://{}", dir.path().display());
    register_and_compare(&url, &StoreSettings::default(), &keys).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_prefix_is_no_version() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("origin")).unwrap();
    std::fs::create_dir(dir.path().join("catalog")).unwrap();
    let url = |part: &str| format!("file://{}", dir.path().join(part).display());
    let catalog = Records::open(&url("catalog"), &StoreSettings::default());
    let (origin, store) = open(&url("origin"), &StoreSettings::default());
    let options = PublishOptions::new(dir.path());
    let registered = register(
        origin,
        &store,
        name("alice:data"),
        &catalog,
        &options,
        Arc::new(()),
    )
    .await;
    assert!(matches!(registered, Err(PublishError::NothingThere { .. })));
    assert_eq!(catalog.published(), 0);
}

/// One server for all that needs one: it takes seconds to start.
#[tokio::test(flavor = "multi_thread")]
async fn on_a_real_s3_server() {
    let Some(weed) = tokio::task::spawn_blocking(Weed::start).await.unwrap() else {
        return;
    };
    let settings: StoreSettings = weed.settings().into_iter().collect();
    weed.create_bucket("data");

    // A few keys of every kind, then so many that the listing is cut.
    let mut put = some_keys();
    let (_, store) = open("s3://data/registered", &settings);
    put.extend((0..4500).map(|number| (format!("img_{number:08}.jpg"), vec![number as u8; 10])));
    stream::iter(&put)
        .for_each_concurrent(16, |(key, bytes)| {
            let store = store.clone();
            async move { store.put(key, Bytes::copy_from_slice(bytes)).await.unwrap() }
        })
        .await;
    // A few hundred are enough to be read back.
    register_and_compare_sizes("s3://data/registered", &settings, &put).await;
    let (_, few) = open("s3://data/few", &settings);
    for (key, bytes) in some_keys() {
        few.put(&key, Bytes::from(bytes)).await.unwrap();
    }
    register_and_compare("s3://data/few", &settings, &some_keys()).await;

    // The same server as a catalog: publish a directory, again, and one change.
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("source");
    std::fs::create_dir_all(root.join("nested")).unwrap();
    for number in 0..30_u32 {
        let bytes: Vec<u8> = (0..40_000 * number)
            .map(|i| (i * (number + 3) / 7) as u8)
            .collect();
        std::fs::write(root.join(format!("nested/{number}")), bytes).unwrap();
    }
    std::fs::write(root.join("multipart"), vec![42; 40 << 20]).unwrap();
    let catalog = Records::open("s3://data/catalog", &settings);
    let options = PublishOptions::new(dir.path());
    let publish = async || {
        publish_directory(&root, name("alice:data"), &catalog, &options, Arc::new(()))
            .await
            .unwrap()
    };
    let first = publish().await;
    assert_same(
        &rebuilt(&first.record, catalog.store(), catalog.store()).await,
        &source(&root),
    );
    let second = publish().await;
    assert_eq!(
        (second.report.uploaded_objects, second.report.present_objects),
        (0, 0)
    );
    std::fs::write(root.join("nested/3"), b"changed").unwrap();
    let third = publish().await;
    assert_eq!(
        (third.report.uploaded_objects, third.report.uploaded_bytes),
        (1, 7)
    );
    assert_same(
        &rebuilt(&third.record, catalog.store(), catalog.store()).await,
        &source(&root),
    );
}

/// As above for many keys: sizes and pins only, without reading each.
async fn register_and_compare_sizes(origin: &str, settings: &StoreSettings, put: &BTreeMap<String, Vec<u8>>) {
    use grid_mount::{
        origin::Pin,
        tree::{EntryKind, RowNo, Tree, unpack},
    };
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("catalog")).unwrap();
    let catalog_dir = dir.path().join("catalog");
    let catalog = Records::open(
        &format!("file://{}", catalog_dir.display()),
        &StoreSettings::default(),
    );
    let (url, store) = open(origin, settings);
    let options = PublishOptions::new(dir.path());
    let published = register(url, &store, name("alice:data"), &catalog, &options, Arc::new(()))
        .await
        .unwrap();
    assert_eq!(published.record.totals.files, put.len() as u64);
    assert!(
        !published
            .report
            .skipped
            .reasons
            .contains_key(&SkipReason::AlsoADirectory)
    );
    let (rows, out) = (&published.record.tree.rows, dir.path().join("rows"));
    let packed = std::fs::File::open(catalog_dir.join(&rows.key)).unwrap();
    unpack(packed, rows.size, rows.digest, &out).unwrap();
    let tree = Tree::open(&out).unwrap();
    let etags = listed(&store).await;
    let mut files = 0;
    for row in (0..tree.row_count()).map(RowNo) {
        let EntryKind::File { size, content } = tree.entry(row).unwrap().kind else {
            continue;
        };
        let path = String::from_utf8(tree.path(row).unwrap()).unwrap();
        assert_eq!(size, put[&path].len() as u64);
        if let Some(content) = content {
            let object = tree.object(content.object).unwrap();
            assert_eq!(
                (&object.key, object.pin),
                (&path, Pin::ETag(etags[&path].clone().unwrap()))
            );
        }
        files += 1;
    }
    assert_eq!(files, put.len());
}
