//! The catalog over a store in memory, which can be told to misbehave.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::atomic::{AtomicUsize, Ordering},
};

use parking_lot::Mutex;
use proptest::prelude::*;

use super::*;
use crate::{
    catalog::{OriginLocation, TreePart, TreeParts},
    digest::Digest,
    origin::{Level, ObjectInfo, PutOutcome},
    tree::Totals,
};

/// What becomes of a conditional put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Answered,
    /// Written, but the answer is an error that may pass.
    AnswerLost,
    /// Written, the answer lost, and the client below asked again: `AlreadyExists`.
    RepeatedBelow,
    /// Not written, and an error that may pass.
    Dropped,
    /// Not written, and a refusal.
    Refused,
}

#[derive(Default)]
struct Memory {
    objects: Mutex<BTreeMap<String, Bytes>>,
    /// Fates of the conditional puts of records, in order; then all are answered.
    fates: Mutex<Vec<Fate>>,
    overwrites: bool,
    location: String,
    gets: AtomicUsize,
    conditional_puts: AtomicUsize,
}

impl Memory {
    fn keys(&self) -> Vec<String> {
        self.objects.lock().keys().cloned().collect()
    }

    fn records(&self) -> Vec<String> {
        self.keys()
            .into_iter()
            .filter(|key| key.starts_with("records/"))
            .collect()
    }

    fn transient(&self, key: &str) -> OriginError {
        OriginError::Transient {
            store: self.location.clone(),
            key: key.to_owned(),
            source: None,
        }
    }
}

#[async_trait]
impl RecordStore for Memory {
    fn location(&self) -> String {
        format!("memory://{}", self.location)
    }

    fn store(&self) -> &Store {
        unreachable!("nothing here reads trees")
    }

    async fn get(&self, key: &str, limit: u64) -> Result<Bytes, OriginError> {
        tokio::task::yield_now().await;
        self.gets.fetch_add(1, Ordering::Relaxed);
        let object = self.objects.lock().get(key).cloned();
        let (store, key) = (self.location.clone(), key.to_owned());
        match object {
            Some(bytes) if bytes.len() as u64 > limit => Err(OriginError::TooLarge {
                store,
                key,
                size: bytes.len() as u64,
                limit,
            }),
            Some(bytes) => Ok(bytes),
            None => Err(OriginError::NotFound { store, key }),
        }
    }

    async fn put(&self, key: &str, bytes: Bytes) -> Result<(), OriginError> {
        tokio::task::yield_now().await;
        self.objects.lock().insert(key.to_owned(), bytes);
        Ok(())
    }

    async fn put_if_absent(&self, key: &str, bytes: Bytes) -> Result<PutOutcome, OriginError> {
        tokio::task::yield_now().await;
        self.conditional_puts.fetch_add(1, Ordering::Relaxed);
        let fate = match key.starts_with("records/") {
            true => self.fates.lock().pop().unwrap_or(Fate::Answered),
            false => Fate::Answered,
        };
        match fate {
            Fate::Dropped => return Err(self.transient(key)),
            Fate::Refused => {
                return Err(OriginError::Denied {
                    store: self.location.clone(),
                    key: key.to_owned(),
                    source: None,
                });
            }
            _ => {}
        }
        let mut objects = self.objects.lock();
        let existed = objects.contains_key(key);
        if !existed || self.overwrites {
            objects.insert(key.to_owned(), bytes);
        }
        match fate {
            Fate::AnswerLost => Err(self.transient(key)),
            Fate::RepeatedBelow => Ok(PutOutcome::AlreadyExists),
            _ if existed && !self.overwrites => Ok(PutOutcome::AlreadyExists),
            _ => Ok(PutOutcome::Created),
        }
    }

    async fn delete(&self, key: &str) -> Result<(), OriginError> {
        self.objects.lock().remove(key);
        Ok(())
    }

    async fn list_level(&self, prefix: &str) -> Result<Level, OriginError> {
        tokio::task::yield_now().await;
        let mut prefixes = BTreeSet::new();
        let mut level = Level::default();
        for (key, bytes) in self.objects.lock().iter() {
            let Some(rest) = key.strip_prefix(prefix) else {
                continue;
            };
            match rest.split_once('/') {
                Some((child, _)) => {
                    prefixes.insert(format!("{prefix}{child}/"));
                }
                None => level.objects.push(ObjectInfo {
                    key: key.clone(),
                    size: bytes.len() as u64,
                    etag: None,
                    version_id: None,
                    modified: (0, 0),
                }),
            }
        }
        level.prefixes = prefixes.into_iter().collect();
        Ok(level)
    }

    fn list(
        &self,
        prefix: &str,
        after: Option<&str>,
    ) -> stream::BoxStream<'static, Result<String, OriginError>> {
        let keys = self.keys().into_iter();
        let wanted: Vec<_> = keys
            .filter(|key| key.starts_with(prefix) && after.is_none_or(|after| key.as_str() > after))
            .map(Ok)
            .collect();
        stream::iter(wanted).boxed()
    }
}

fn catalog() -> StoreCatalog<Memory> {
    StoreCatalog::new(Memory::default())
}

fn name(text: &str) -> QualifiedName {
    text.parse().unwrap()
}

fn version(number: u64) -> VersionNumber {
    VersionNumber::new(number).unwrap()
}

fn draft(text: &str, message: &str) -> Draft {
    let part = TreePart {
        digest: Digest::of(message.as_bytes()),
        key: "trees/x".to_owned(),
        size: 7,
        wire_size: 5,
    };
    Draft {
        name: name(text),
        tree: TreeParts {
            rows: part.clone(),
            digests: Some(part),
            sums: None,
        },
        origin: OriginLocation::Catalog,
        message: message.to_owned(),
        totals: Totals {
            files: 3,
            directories: 1,
            symlinks: 0,
            bytes: 99,
        },
    }
}

async fn resolve(catalog: &StoreCatalog<Memory>, text: &str) -> Result<Record, CatalogError> {
    catalog
        .resolve(&text.parse().unwrap(), &"me".parse().unwrap())
        .await
}

async fn message(catalog: &StoreCatalog<Memory>, text: &str) -> String {
    resolve(catalog, text).await.unwrap_err().to_string()
}

#[tokio::test]
async fn versions_count_from_one_and_resolve_every_way() {
    let catalog = catalog();
    for number in 1..=12 {
        let record = catalog
            .publish(draft("me:imagenet", &format!("number {number}")))
            .await
            .unwrap();
        assert_eq!(record.version, version(number));
        assert_eq!(
            resolve(&catalog, &format!("me:imagenet/{number}")).await.unwrap(),
            record
        );
    }
    let prod = Alias {
        alias: "prod".parse().unwrap(),
        version: version(9),
    };
    catalog.set_alias(&name("me:imagenet"), &prod).await.unwrap();
    for (text, number) in [
        ("imagenet", 12),
        ("me:imagenet/latest", 12),
        ("imagenet/prod", 9),
        ("imagenet/10", 10),
    ] {
        assert_eq!(
            resolve(&catalog, text).await.unwrap().version,
            version(number),
            "{text}"
        );
    }
    let moved = Alias {
        version: version(11),
        ..prod.clone()
    };
    catalog.set_alias(&name("me:imagenet"), &moved).await.unwrap();
    assert_eq!(catalog.aliases(&name("me:imagenet")).await.unwrap(), [moved]);
    catalog
        .remove_alias(&name("me:imagenet"), &prod.alias)
        .await
        .unwrap();
    assert_eq!(catalog.aliases(&name("me:imagenet")).await.unwrap(), []);
    let absent = Alias {
        alias: prod.alias,
        version: version(13),
    };
    let error = catalog
        .set_alias(&name("me:imagenet"), &absent)
        .await
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "no version me:imagenet/13: me:imagenet has versions 1-12"
    );
}

#[tokio::test]
async fn what_is_missing_is_said_with_the_nearest_thing_there_is() {
    let catalog = catalog();
    assert!(message(&catalog, "imagenet").await.contains("grid-mount list"));
    for text in [
        "alice:imagenet",
        "alice:imagenet",
        "alice:mnist",
        "bob@example.org:coco",
    ] {
        catalog.publish(draft(text, "")).await.unwrap();
    }
    let prod = Alias {
        alias: "prod".parse().unwrap(),
        version: version(1),
    };
    catalog.set_alias(&name("alice:imagenet"), &prod).await.unwrap();
    for (text, expected) in [
        (
            "Alice:imagenet",
            "no user Alice in this catalog; did you mean alice?",
        ),
        (
            "alcie:imagenet",
            "no user alcie in this catalog; did you mean alice?",
        ),
        (
            "zoe:imagenet",
            "no user zoe in this catalog; `grid-mount list --global` shows who publishes here",
        ),
        (
            "alice:ImageNet/1",
            "no datastore alice:ImageNet; did you mean alice:imagenet?",
        ),
        (
            "alice:xyz",
            "no datastore alice:xyz; `grid-mount list alice` shows what there is",
        ),
        (
            "alice:imagenet/7",
            "no version alice:imagenet/7: alice:imagenet has versions 1, 2",
        ),
        (
            "alice:mnist/2",
            "no version alice:mnist/2: alice:mnist has version 1",
        ),
        (
            "alice:imagenet/prdo",
            "alice:imagenet has no alias prdo; did you mean prod?",
        ),
        (
            "alice:imagenet/v2",
            "alice:imagenet has no alias v2; did you mean 2?",
        ),
        (
            "alice:imagenet/v3",
            "alice:imagenet has no alias v3; `grid-mount info alice:imagenet` shows its versions and aliases",
        ),
        (
            "alice:mnits/prod",
            "no datastore alice:mnits; did you mean alice:mnist?",
        ),
        // No owner typed: it may be somebody else's.
        (
            "imagenet/1",
            "no datastore me:imagenet; did you mean alice:imagenet?",
        ),
        ("coco", "no datastore me:coco; did you mean bob@example.org:coco?"),
    ] {
        assert_eq!(message(&catalog, text).await, expected, "{text}");
    }
    // A datastore whose only object is not a record.
    catalog
        .records
        .put("records/alice/half/upload.tmp", Bytes::new())
        .await
        .unwrap();
    assert!(matches!(
        resolve(&catalog, "alice:half").await,
        Err(CatalogError::NoVersion { .. })
    ));
}

#[tokio::test]
async fn listing_reads_no_record() {
    let catalog = catalog();
    for text in ["b:two", "a:one", "b:one", "b:one", "c+x@example.org:z"] {
        catalog.publish(draft(text, "")).await.unwrap();
    }
    for foreign in [
        "records/.DS_Store",
        "records/b/.x/00000000000000000001.json",
        "records/b/none/readme.txt",
    ] {
        catalog.records.put(foreign, Bytes::new()).await.unwrap();
    }
    let gets = catalog.records.gets.load(Ordering::Relaxed);
    let shown = async |owner: Option<&str>| -> Vec<String> {
        let owner = owner.map(|owner| owner.parse().unwrap());
        let list = catalog.list(owner.as_ref()).await.unwrap();
        list.iter()
            .map(|summary| format!("{}/{}", summary.name, summary.latest))
            .collect()
    };
    assert_eq!(
        shown(None).await,
        ["a:one/1", "b:one/2", "b:two/1", "c+x@example.org:z/1"]
    );
    assert_eq!(shown(Some("b")).await, ["b:one/2", "b:two/1"]);
    assert_eq!(catalog.records.gets.load(Ordering::Relaxed), gets);
    let error = catalog.list(Some(&"B".parse().unwrap())).await.unwrap_err();
    assert_eq!(error.to_string(), "no user B in this catalog; did you mean b?");
}

#[tokio::test]
async fn a_store_that_overwrites_is_refused() {
    let catalog = StoreCatalog::new(Memory {
        overwrites: true,
        ..Memory::default()
    });
    for _ in 0..2 {
        let error = catalog.publish(draft("me:x", "")).await.unwrap_err();
        assert!(matches!(error, CatalogError::StoreOverwrites { .. }), "{error}");
    }
    assert_eq!(
        catalog.records.keys(),
        Vec::<String>::new(),
        "nothing may be left, the marker least of all"
    );
}

#[tokio::test]
async fn a_store_is_probed_once_and_a_copy_of_it_again() {
    let first = catalog();
    first.publish(draft("me:x", "")).await.unwrap();
    assert_eq!(
        first.records.conditional_puts.load(Ordering::Relaxed),
        3,
        "two of the probe, one of the record"
    );
    first.publish(draft("me:x", "")).await.unwrap();
    let objects = first.records.objects.into_inner();
    assert_eq!(
        objects.keys().filter(|key| key.starts_with("probe/")).count(),
        1,
        "only the marker is left"
    );

    // Another process on the same store.
    let again = StoreCatalog::new(Memory {
        objects: Mutex::new(objects.clone()),
        ..Memory::default()
    });
    again.publish(draft("me:x", "")).await.unwrap();
    assert_eq!(again.records.conditional_puts.load(Ordering::Relaxed), 1);

    // The same objects in a store that overwrites: the marker is not believed.
    let copy = Memory {
        objects: Mutex::new(objects),
        location: "copy".into(),
        overwrites: true,
        ..Memory::default()
    };
    let error = StoreCatalog::new(copy)
        .publish(draft("me:x", ""))
        .await
        .unwrap_err();
    assert!(matches!(error, CatalogError::StoreOverwrites { .. }), "{error}");
}

#[tokio::test]
async fn version_numbers_can_run_out() {
    let catalog = catalog();
    let last = layout::record(&name("me:x").at(version(u64::MAX)));
    catalog.records.put(&last, Bytes::new()).await.unwrap();
    let error = catalog.publish(draft("me:x", "")).await.unwrap_err();
    assert!(matches!(error, CatalogError::VersionsExhausted { .. }), "{error}");
}

#[tokio::test]
async fn an_overlong_message_is_refused_and_the_longest_is_readable() {
    let catalog = catalog();
    // Each of these is six bytes in JSON.
    let record = catalog
        .publish(draft("me:x", &"\u{1}".repeat(MESSAGE_LIMIT)))
        .await
        .unwrap();
    assert_eq!(resolve(&catalog, "x").await.unwrap(), record);
    let error = catalog
        .publish(draft("me:x", &"x".repeat(MESSAGE_LIMIT + 1)))
        .await
        .unwrap_err();
    assert!(matches!(error, CatalogError::MessageTooLong { .. }), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_store_that_never_answers_leaves_the_question_open_and_one_number_taken() {
    for fate in [Fate::Dropped, Fate::AnswerLost] {
        let memory = Memory {
            fates: Mutex::new(vec![fate; 50]),
            ..Memory::default()
        };
        let catalog = StoreCatalog::new(memory);
        match catalog.publish(draft("me:x", "")).await {
            // Written, and read back.
            Ok(record) => assert_eq!((fate, record.version), (Fate::AnswerLost, version(1))),
            Err(CatalogError::Unsettled { reference, .. }) => {
                assert_eq!((fate, reference.to_string().as_str()), (Fate::Dropped, "me:x/1"));
            }
            Err(error) => panic!("{fate:?}: {error}"),
        }
    }
}

fn fate() -> impl Strategy<Value = Fate> {
    prop_oneof![
        3 => Just(Fate::Answered),
        2 => Just(Fate::AnswerLost),
        2 => Just(Fate::RepeatedBelow),
        1 => Just(Fate::Dropped),
        1 => Just(Fate::Refused),
    ]
}

/// Publishers at once, on a store that loses answers: each success is one record of its own, each failure
/// none, and numbers have no gaps.
fn racing(publishers: usize, fates: Vec<Fate>) -> Result<(), TestCaseError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build()
        .unwrap();
    runtime.block_on(async {
        let catalog = StoreCatalog::new(Memory {
            fates: Mutex::new(fates),
            ..Memory::default()
        });
        let answers = futures::future::join_all((0..publishers).map(|i| {
            let catalog = &catalog;
            async move { catalog.publish(draft("me:x", &format!("publisher {i}"))).await }
        }))
        .await;
        let mut published = BTreeMap::new();
        for answer in answers {
            match answer {
                Ok(record) => {
                    prop_assert_eq!(
                        published.insert(record.version, record),
                        None,
                        "one version, two publishers"
                    );
                }
                Err(error) => {
                    // An earlier put of an unsettled record may have been written; nothing else may fail.
                    let refused = matches!(
                        error,
                        CatalogError::Origin {
                            source: OriginError::Denied { .. },
                            ..
                        }
                    );
                    prop_assert!(
                        refused || matches!(error, CatalogError::Unsettled { .. }),
                        "{}",
                        error
                    );
                }
            }
        }
        prop_assert_eq!(
            catalog.records.records().len(),
            published.len(),
            "a record too many or too few"
        );
        for (number, (version, record)) in (1..).zip(&published) {
            prop_assert_eq!(version.get(), number);
            prop_assert_eq!(&catalog.record(&record.reference()).await.unwrap(), record);
        }
        Ok(())
    })
}

/// A flipped bit in a stored record or alias is noticed wherever it is.
fn flip_every_bit(bytes: &[u8], mut decode: impl FnMut(&[u8]) -> bool) {
    assert!(decode(bytes));
    let mut flipped = bytes.to_vec();
    for bit in 0..bytes.len() * 8 {
        flipped[bit / 8] ^= 1 << (bit % 8);
        assert!(
            !decode(&flipped),
            "bit {bit} of {}",
            String::from_utf8_lossy(bytes)
        );
        flipped[bit / 8] ^= 1 << (bit % 8);
    }
    for end in 0..bytes.len() {
        assert!(!decode(&bytes[..end]), "cut to {end}");
    }
    assert!(!decode(&[bytes, b"\n"].concat()));
}

fn some_record(name: &QualifiedName, number: u64, message: &str) -> Record {
    let Draft {
        tree,
        origin,
        message,
        totals,
        ..
    } = draft("a:b", message);
    Record {
        format: Record::FORMAT,
        owner: name.owner.clone(),
        datastore: name.datastore.clone(),
        version: version(number),
        tree,
        origin,
        created: jiff::Timestamp::UNIX_EPOCH,
        message,
        totals,
        nonce: "00".to_owned(),
    }
}

#[test]
fn content_that_is_whole_but_wrong_is_damage_with_a_remedy() {
    let home = name("alice:imagenet").at(version(3));
    let good = some_record(&home.name, 3, "");
    let damage = |record: &Record| {
        decode_record(&home, &encode_record(record).unwrap())
            .unwrap_err()
            .to_string()
    };
    assert!(decode_record(&home, &encode_record(&good).unwrap()).is_ok());
    assert_eq!(
        damage(&some_record(&home.name, 4, "")),
        "it belongs to alice:imagenet/4"
    );
    assert_eq!(
        damage(&some_record(&name("alice:Imagenet"), 3, "")),
        "it belongs to alice:Imagenet/3"
    );
    assert_eq!(
        damage(&some_record(&name("bob:imagenet"), 3, "")),
        "it belongs to bob:imagenet/3"
    );
    assert_eq!(
        damage(&Record {
            format: 2,
            ..good.clone()
        }),
        "it has format 2, this grid-mount knows format 1"
    );
    let mut outside = good.clone();
    outside.tree.rows.key = "../../etc/passwd".to_owned();
    assert!(damage(&outside).contains("outside the catalog"));

    // A later format may have other fields: that is no damage, but needs another program.
    let later = sealed::seal("record", &serde_json::json!({"format": 7, "new": true})).unwrap();
    assert!(matches!(
        decode_record(&home, &later),
        Err(Damage::Format { found: 7, .. })
    ));
    let mut more = serde_json::to_value(&good).unwrap();
    more["surprise"] = 1.into();
    let more = sealed::seal("record", &more).unwrap();
    assert!(matches!(decode_record(&home, &more), Err(Damage::Fields { .. })));
    let alias = sealed::seal("alias", &good).unwrap();
    assert!(matches!(decode_record(&home, &alias), Err(Damage::Frame)));
}

#[tokio::test]
async fn damage_names_the_key_and_does_not_hide_other_versions() {
    let catalog = catalog();
    for _ in 0..2 {
        catalog.publish(draft("me:x", "")).await.unwrap();
    }
    let key = layout::record(&name("me:x").at(version(2)));
    let mut bytes = catalog.records.get(&key, 1 << 20).await.unwrap().to_vec();
    bytes[150] ^= 4;
    catalog.records.put(&key, bytes.into()).await.unwrap();
    let error = message(&catalog, "x").await;
    assert!(
        error.contains(&key) && error.contains("restore it from a backup or use another version"),
        "{error}"
    );
    assert_eq!(resolve(&catalog, "x/1").await.unwrap().version, version(1));
    assert_eq!(
        catalog.publish(draft("me:x", "")).await.unwrap().version,
        version(3)
    );
    catalog
        .records
        .put(&key, vec![b' '; 2 << 20].into())
        .await
        .unwrap();
    assert!(message(&catalog, "x/2").await.contains("more than 1048576 bytes"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn lost_answers_lose_no_record_and_make_none(publishers in 1usize..6, fates in proptest::collection::vec(fate(), 0..10)) {
        racing(publishers, fates)?;
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    #[test]
    fn every_flipped_bit_is_noticed(message in "\\PC{0,20}", number in 1..=u64::MAX) {
        let name = name("alice@example.org:imagenet");
        let record = some_record(&name, number, &message);
        let bytes = encode_record(&record).unwrap();
        flip_every_bit(&bytes, |bytes| decode_record(&name.at(version(number)), bytes).is_ok_and(|found| found == record));
        let alias = Alias { alias: "prod".parse().unwrap(), version: version(number) };
        let bytes = encode_alias(&name, &alias).unwrap();
        flip_every_bit(&bytes, |bytes| decode_alias(&name, &alias.alias, bytes).is_ok());
    }
}
