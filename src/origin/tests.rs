//! Files as a store, and what every store refuses. Stores behind HTTP are tested in `tests/`.

use std::ops::Range;

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, stream};

use super::*;

fn store(dir: &std::path::Path) -> Store {
    let url = dir.to_str().unwrap().parse().unwrap();
    Store::open(&url, &StoreSettings::default(), &Deadlines::data()).unwrap()
}

async fn read(store: &Store, key: &str, pin: &Pin, range: Range<u64>) -> Result<Vec<u8>, OriginError> {
    let chunks: Vec<Bytes> = store.get_range(key, pin, range).await?.try_collect().await?;
    Ok(chunks.concat())
}

#[tokio::test]
async fn a_missing_root_is_an_error_and_stays_missing() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("absent");
    let store = store(&root);
    assert!(matches!(store.head("a").await, Err(OriginError::NoBucket { .. })));
    assert!(matches!(
        store.list_level("").await,
        Err(OriginError::NoBucket { .. })
    ));
    assert!(matches!(
        store.list("", None).try_collect::<Vec<_>>().await,
        Err(OriginError::NoBucket { .. })
    ));
    assert!(!root.exists());
    store.put("d/a", Bytes::from_static(b"x")).await.unwrap();
    assert!(matches!(store.head("b").await, Err(OriginError::NotFound { .. })));
}

#[tokio::test]
async fn odd_keys_round_trip_and_list_in_key_order() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let mut keys = [
        "a b",
        "a%20b",
        "ü/é",
        "a/b",
        "a.b",
        "a/b#1",
        "a-b/c",
        "z?",
        "back\\slash",
        "100%",
    ];
    for key in keys {
        store
            .put(key, Bytes::copy_from_slice(key.as_bytes()))
            .await
            .unwrap();
        assert_eq!(store.get(key, 100).await.unwrap().0, key);
    }
    keys.sort_unstable();
    let listed: Vec<_> = store
        .list("", None)
        .map_ok(|info| info.key)
        .try_collect()
        .await
        .unwrap();
    assert_eq!(listed, keys);
    for (at, after) in keys.iter().enumerate() {
        let rest: Vec<_> = store
            .list("", Some(after))
            .map_ok(|info| info.key)
            .try_collect()
            .await
            .unwrap();
        assert_eq!(rest, keys[at + 1..], "after {after}");
    }
    let below: Vec<_> = store
        .list("a/", None)
        .map_ok(|info| info.key)
        .try_collect()
        .await
        .unwrap();
    assert_eq!(below, ["a/b", "a/b#1"]);
    let level = store.list_level("").await.unwrap();
    assert_eq!(level.prefixes, ["a-b/", "a/", "ü/"]);
    for bad in ["", "/a", "a/../b", ".", "a\nb", "a//b", "a/"] {
        assert!(
            matches!(
                store.put(bad, Bytes::new()).await,
                Err(OriginError::BadKey { .. })
            ),
            "{bad:?}"
        );
    }
}

#[tokio::test]
async fn pins_ranges_and_limits_hold() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    store.put("k", Bytes::from_static(b"0123456789")).await.unwrap();
    let etag = Pin::ETag(store.head("k").await.unwrap().etag.unwrap());
    assert_eq!(read(&store, "k", &etag, 2..5).await.unwrap(), b"234");
    assert!(matches!(
        read(&store, "k", &etag, 8..12).await,
        Err(OriginError::Truncated { got: 2, .. })
    ));
    assert!(matches!(
        store.get("k", 9).await,
        Err(OriginError::TooLarge { size: 10, .. })
    ));
    store.put("k", Bytes::from_static(b"9876543210")).await.unwrap();
    assert!(matches!(
        read(&store, "k", &etag, 2..5).await,
        Err(OriginError::Changed { .. })
    ));
    assert_eq!(read(&store, "k", &Pin::Content, 2..5).await.unwrap(), b"765");
}

#[tokio::test]
async fn one_of_many_wins_put_if_absent_and_nothing_is_left_behind() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let tries = (0..16u8).map(|n| store.put_if_absent("records/1", Bytes::from(vec![n; 4])));
    let outcomes = futures::future::join_all(tries).await;
    let winners: Vec<_> = (0u8..16)
        .zip(&outcomes)
        .filter(|(_, o)| matches!(o, Ok(PutOutcome::Created)))
        .collect();
    assert_eq!(winners.len(), 1);
    assert_eq!(store.get("records/1", 4).await.unwrap().0, vec![winners[0].0; 4]);

    let broken = stream::iter([Ok(Bytes::from_static(b"half")), Err(io::Error::other("disk"))]).boxed();
    assert!(store.put_stream("s", 8, broken).await.is_err());
    let short = stream::iter([Ok(Bytes::from_static(b"half"))]).boxed();
    assert!(store.put_stream("s", 8, short).await.is_err());
    let whole = stream::iter([Ok(Bytes::from_static(b"half")), Ok(Bytes::from_static(b"half"))]).boxed();
    store.put_stream("t", 8, whole).await.unwrap();
    let files: Vec<_> = walkdir::WalkDir::new(dir.path())
        .into_iter()
        .flatten()
        .filter(|e| e.file_type().is_file())
        .collect();
    assert_eq!(files.len(), 2, "{files:?}");
}

#[tokio::test]
async fn a_link_out_of_the_root_is_not_followed() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("secret"), "x").unwrap();
    let root = dir.path().join("root");
    std::fs::create_dir(&root).unwrap();
    std::os::unix::fs::symlink("../secret", root.join("out")).unwrap();
    std::fs::write(root.join("real"), "y").unwrap();
    std::os::unix::fs::symlink("real", root.join("in")).unwrap();
    let store = store(&root);
    assert!(matches!(
        store.get("out", 10).await,
        Err(OriginError::Denied { .. })
    ));
    assert_eq!(store.get("in", 10).await.unwrap().0, "y");
    let listed: Vec<_> = store
        .list("", None)
        .map_ok(|info| info.key)
        .try_collect()
        .await
        .unwrap();
    assert_eq!(listed, ["in", "real"]);
}

#[test]
fn errors_name_store_and_key_and_never_a_secret() {
    let settings: StoreSettings = [("AWS_ENDPOINT_URL", "http://127.0.0.1:1"), ("AWS_REGION", "x")]
        .into_iter()
        .collect();
    let error = Store::open(&"s3://b/p".parse().unwrap(), &settings, &Deadlines::data()).unwrap_err();
    assert!(matches!(error, OriginError::Credentials { .. }));
    assert!(
        error.to_string().contains("s3://b/p") && error.to_string().contains("AWS_ACCESS_KEY_ID"),
        "{error}"
    );
}
