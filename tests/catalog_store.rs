//! The store catalog on real stores: a `file://` directory, and an S3 server.

#[path = "support/sandbox.rs"]
mod sandbox;
#[path = "support/weed.rs"]
mod weed;

use std::{collections::BTreeSet, sync::Arc};

use grid_mount::{
    catalog::{self, Alias, Catalog, CatalogError, Draft, OriginLocation, Record, TreePart, TreeParts},
    digest::Digest,
    origin::{Deadlines, StoreSettings, StoreUrl},
    reference::{QualifiedName, VersionNumber},
    tree::Totals,
};
use weed::Weed;

const PUBLISHERS: usize = 16;

fn draft(name: &QualifiedName, message: &str) -> Draft {
    let rows = TreePart {
        digest: Digest::of(message.as_bytes()),
        key: "trees/x".to_owned(),
        size: 7,
        wire_size: 5,
    };
    Draft {
        name: name.clone(),
        tree: TreeParts {
            rows,
            digests: None,
            sums: None,
        },
        origin: OriginLocation::Catalog,
        message: message.to_owned(),
        totals: Totals::default(),
    }
}

/// Publishers who share nothing but the store: each has a catalog of its own.
async fn race(url: &StoreUrl, settings: &StoreSettings) -> Arc<dyn Catalog> {
    let name: QualifiedName = "alice+x@example.org:imagenet".parse().unwrap();
    let publishers: Vec<_> = (0..PUBLISHERS)
        .map(|i| {
            let catalog = catalog::open(url, settings, &Deadlines::control()).unwrap();
            let draft = draft(&name, &format!("publisher {i}"));
            tokio::spawn(async move { catalog.publish(draft).await })
        })
        .collect();
    let mut published: Vec<Record> = Vec::new();
    for publisher in publishers {
        published.push(publisher.await.unwrap().unwrap());
    }
    let versions: BTreeSet<u64> = published.iter().map(|record| record.version.get()).collect();
    assert_eq!(
        versions,
        (1..=PUBLISHERS as u64).collect(),
        "every publisher has a version of its own"
    );

    let catalog = catalog::open(url, settings, &Deadlines::control()).unwrap();
    for record in &published {
        assert_eq!(
            &catalog.record(&record.reference()).await.unwrap(),
            record,
            "nobody's record was overwritten"
        );
    }
    let list = catalog.list(None).await.unwrap();
    assert_eq!(
        list.iter()
            .map(|line| (&line.name, line.latest.get()))
            .collect::<Vec<_>>(),
        [(&name, PUBLISHERS as u64)]
    );

    let prod = Alias {
        alias: "prod".parse().unwrap(),
        version: VersionNumber::new(7).unwrap(),
    };
    catalog.set_alias(&name, &prod).await.unwrap();
    assert_eq!(catalog.aliases(&name).await.unwrap(), std::slice::from_ref(&prod));
    let me = "me".parse().unwrap();
    let resolved = catalog
        .resolve(&format!("{name}/prod").parse().unwrap(), &me)
        .await
        .unwrap();
    assert_eq!(resolved.version, prod.version);
    catalog.remove_alias(&name, &prod.alias).await.unwrap();
    assert_eq!(catalog.aliases(&name).await.unwrap(), []);
    let error = catalog
        .resolve(&"imagnet".parse().unwrap(), &name.owner)
        .await
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("no datastore {}:imagnet; did you mean {name}?", name.owner)
    );
    catalog
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn sixteen_publishers_get_sixteen_versions_in_a_directory() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("catalog");
    std::fs::create_dir(&root).unwrap();
    let url: StoreUrl = format!("file://{}", root.display()).parse().unwrap();
    race(&url, &StoreSettings::default()).await;

    // What lies on the disk is what the catalog's documentation says.
    let record = root.join("records/alice+x@example.org/imagenet/00000000000000000009.json");
    let mut bytes = std::fs::read(&record).unwrap();
    assert!(serde_json::from_slice::<serde_json::Value>(&bytes).is_ok());
    bytes[200] ^= 1;
    std::fs::write(&record, &bytes).unwrap();
    let catalog = catalog::open(&url, &StoreSettings::default(), &Deadlines::control()).unwrap();
    let reference = "alice+x@example.org:imagenet/9".parse().unwrap();
    assert!(matches!(
        catalog.record(&reference).await,
        Err(CatalogError::Damaged { .. })
    ));
}

#[tokio::test]
async fn an_empty_directory_lists_nothing_and_knows_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let url: StoreUrl = format!("file://{}", dir.path().display()).parse().unwrap();
    let catalog = catalog::open(&url, &StoreSettings::default(), &Deadlines::control()).unwrap();
    assert_eq!(catalog.list(None).await.unwrap(), []);
    let error = catalog.versions(&"alice:x".parse().unwrap()).await.unwrap_err();
    assert!(matches!(error, CatalogError::NoSuchUser { .. }), "{error}");
}

#[test]
fn a_server_is_not_a_catalog_yet_and_the_error_says_what_is() {
    let url: StoreUrl = "https://example.org/catalog".parse().unwrap();
    let error = catalog::open(&url, &StoreSettings::default(), &Deadlines::control())
        .err()
        .unwrap()
        .to_string();
    for scheme in ["file://", "s3://", "gs://", "az://"] {
        assert!(error.contains(scheme), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn sixteen_publishers_get_sixteen_versions_on_s3() {
    let Some(weed) = tokio::task::spawn_blocking(Weed::start).await.unwrap() else {
        return;
    };
    weed.create_bucket("team");
    let settings: StoreSettings = weed.settings().into_iter().collect();
    race(&"s3://team/catalog".parse().unwrap(), &settings).await;
}
