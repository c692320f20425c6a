//! The control plane and its client: authorisation against a model, pages, idempotency, limits, TLS, and the
//! protocol's own description.

#[path = "support/sandbox.rs"]
mod sandbox;

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};

use grid_mount::{
    catalog::{
        self, Alias, Catalog, CatalogError, Draft, Lease, LeaseId, OriginLocation, TreePart, TreeParts,
        http::HttpCatalog,
        server::{Audit, ControlPlane, Keeper, Lending, Options, TlsFiles, open_store},
    },
    digest::Digest,
    origin::{Deadlines, StoreSettings, StoreUrl},
    reference::{QualifiedName, UserName, VersionNumber},
    tree::Totals,
};
use proptest::prelude::*;
use sandbox::skip;
use tokio::{net::TcpListener, sync::oneshot};

/// A control plane in this process, over a directory.
struct Served {
    dir: tempfile::TempDir,
    url: StoreUrl,
    keeper: Keeper,
    _stop: oneshot::Sender<()>,
}

impl Served {
    async fn start(options: Options, tls: Option<TlsFiles>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = || open_store(&Self::store_url(dir.path()), &StoreSettings::default()).unwrap();
        let scheme = if tls.is_some() { "https" } else { "http" };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        // By name, as certificates have it.
        let port = listener.local_addr().unwrap().port();
        let url = format!("{scheme}://localhost:{port}").parse().unwrap();
        let audit = Audit::in_file(&dir.path().join("audit")).unwrap();
        let plane = ControlPlane::new(
            store(),
            Keeper::in_store(store()),
            Lending::nothing(),
            audit,
            options,
        );
        let (stop, stopped) = oneshot::channel::<()>();
        tokio::spawn(plane.serve(listener, tls, async {
            let _ = stopped.await;
        }));
        Self {
            keeper: Keeper::in_store(store()),
            dir,
            url,
            _stop: stop,
        }
    }

    async fn plain() -> Self {
        let options = Options {
            rate: 100_000,
            ..Options::default()
        };
        Self::start(options, None).await
    }

    fn store_url(dir: &Path) -> StoreUrl {
        dir.to_str().unwrap().parse().unwrap()
    }

    /// A user with a token.
    async fn person(&self, name: &str) -> String {
        let secret = self
            .keeper
            .change(|directory| {
                directory.add_user(user(name))?;
                directory.new_token(&user(name), "", None)
            })
            .await
            .unwrap();
        secret.1.expose().to_owned()
    }

    async fn team(&self, name: &str, members: &[&str]) {
        let members: Vec<UserName> = members.iter().map(|member| user(member)).collect();
        self.keeper
            .change(|directory| directory.add_to_team(name, &members))
            .await
            .unwrap();
    }

    fn settings(token: &str) -> StoreSettings {
        [("GRID_MOUNT_TOKEN", token)].into_iter().collect()
    }

    async fn connect(&self, token: &str) -> HttpCatalog {
        HttpCatalog::connect_to_publish(&self.url, &Self::settings(token))
            .await
            .unwrap()
    }

    /// As the protocol has it, without the client.
    fn raw(&self, method: &str, path: &str, token: &str, more: &[&str]) -> Raw {
        let output = Command::new("curl")
            .args(["-sS", "-i", "-X", method, "-H"])
            .arg(format!("Authorization: Bearer {token}"))
            .args(more)
            .arg(format!("{}{path}", self.url))
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        Raw {
            status: head.split(' ').nth(1).unwrap().parse().unwrap(),
            head: head.to_ascii_lowercase(),
            body: body.to_owned(),
        }
    }
}

struct Raw {
    status: u16,
    head: String,
    body: String,
}

fn user(name: &str) -> UserName {
    name.parse().unwrap()
}

fn name(text: &str) -> QualifiedName {
    text.parse().unwrap()
}

fn version(number: u64) -> VersionNumber {
    VersionNumber::new(number).unwrap()
}

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

#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Allowed,
    NotYours,
    Absent,
}

fn verdict<T>(answer: Result<T, CatalogError>) -> Verdict {
    match answer {
        // Whoever gets as far as what there is may do it.
        Ok(_)
        | Err(
            CatalogError::NoSuchAlias { .. }
            | CatalogError::NoSuchVersion { .. }
            | CatalogError::NoSuchUser { .. },
        ) => Verdict::Allowed,
        Err(CatalogError::NotYours { .. }) => Verdict::NotYours,
        Err(CatalogError::NotInTeam { .. }) => Verdict::Absent,
        Err(error) => panic!("{error:?}"),
    }
}

const PEOPLE: [&str; 4] = ["ann", "ben", "cid", "dot"];

/// Everything that anybody can ask of anybody, compared with what teams say.
async fn compare(catalogs: &[HttpCatalog], teams: &[BTreeSet<usize>]) {
    for (asking, catalog) in catalogs.iter().enumerate() {
        let readable = |owner: usize| {
            asking == owner
                || teams
                    .iter()
                    .any(|team| team.contains(&asking) && team.contains(&owner))
        };
        for (owner, person) in PEOPLE.iter().enumerate() {
            let data = name(&format!("{person}:data"));
            let read = if readable(owner) {
                Verdict::Allowed
            } else {
                Verdict::Absent
            };
            let change = match (asking == owner, readable(owner)) {
                (true, _) => Verdict::Allowed,
                (false, true) => Verdict::NotYours,
                (false, false) => Verdict::Absent,
            };
            let alias = Alias {
                alias: "prod".parse().unwrap(),
                version: version(1),
            };
            let lease = Lease {
                id: LeaseId::random(),
                reference: data.at(version(1)),
                user: user("nobody"),
                host: "host".to_owned(),
                since: jiff::Timestamp::now(),
                expires: jiff::Timestamp::now(),
            };
            let asked = format!("{} asks for {data}", PEOPLE[asking]);
            let reads = [
                verdict(catalog.record(&data.at(version(1))).await),
                verdict(
                    catalog
                        .resolve(&format!("{data}").parse().unwrap(), &user("x"))
                        .await,
                ),
                verdict(catalog.versions(&data).await),
                verdict(catalog.aliases(&data).await),
                verdict(catalog.leases(&data).await),
                verdict(catalog.list(Some(&data.owner)).await),
                verdict(catalog.hold(&lease).await),
                verdict(catalog.release(&lease).await),
            ];
            for seen in reads {
                assert_eq!(seen, read, "{asked}");
            }
            let changes = [
                verdict(catalog.publish(draft(&data, "again")).await),
                verdict(catalog.set_alias(&data, &alias).await),
                verdict(catalog.remove_alias(&data, &alias.alias).await),
                verdict(catalog.retire(&data.at(version(999)), &user("x"), true).await),
            ];
            for seen in changes {
                assert_eq!(seen, change, "{asked}, to change it");
            }
        }
        let seen: BTreeSet<String> = catalog
            .list(None)
            .await
            .unwrap()
            .into_iter()
            .map(|item| item.name.owner.to_string())
            .collect();
        let expected = (0..PEOPLE.len()).filter(|owner| readable(*owner));
        assert_eq!(seen, expected.map(|owner| PEOPLE[owner].to_owned()).collect());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(6))]

    #[test]
    fn everybody_may_what_the_model_says(
        teams in prop::collection::vec(prop::collection::btree_set(0..PEOPLE.len(), 2..4), 1..3),
        leaves in prop::option::of((0..3usize, 0..PEOPLE.len())),
    ) {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let served = Served::plain().await;
            let mut catalogs = Vec::new();
            for person in PEOPLE {
                let catalog = served.connect(&served.person(person).await).await;
                catalog.publish(draft(&name(&format!("{person}:data")), "first")).await.unwrap();
                catalogs.push(catalog);
            }
            let mut model = teams;
            for (number, members) in model.iter().enumerate() {
                let members: Vec<&str> = members.iter().map(|member| PEOPLE[*member]).collect();
                served.team(&format!("team{number}"), &members).await;
            }
            compare(&catalogs, &model).await;
            // Who leaves a team is out with the next request.
            if let Some((team, person)) = leaves && team < model.len() {
                model[team].remove(&person);
                let leaver = [user(PEOPLE[person])];
                served
                    .keeper
                    .change(|directory| directory.remove_from_team(&format!("team{team}"), &leaver))
                    .await
                    .unwrap();
                compare(&catalogs, &model).await;
            }
        });
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeated_publish_is_one_version_and_a_reused_key_is_refused() {
    let served = Served::plain().await;
    let ann = served.person("ann").await;
    let catalog = served.connect(&ann).await;
    let published = catalog.publish(draft(&name("ann:data"), "first")).await.unwrap();
    let mut body = serde_json::to_value(&published).unwrap();
    let fields = body.as_object_mut().unwrap();
    fields.retain(|field, _| matches!(field.as_str(), "tree" | "origin" | "message" | "totals"));
    let body_text = body.to_string();
    let post = |key: &str, body: &str| {
        let key = format!("Idempotency-Key: {key}");
        served.raw(
            "POST",
            "/v1/datastores/ann/data/versions",
            &ann,
            &["-H", &key, "-d", body],
        )
    };
    let first = tokio::task::block_in_place(|| post("k1", &body_text));
    assert_eq!(first.status, 201, "{}", first.body);
    assert!(
        first
            .head
            .contains("location: /v1/datastores/ann/data/versions/2"),
        "{}",
        first.head
    );
    for _ in 0..3 {
        let again = tokio::task::block_in_place(|| post("k1", &body_text));
        assert_eq!((again.status, &again.body), (201, &first.body));
    }
    // Eight at once.
    let posts: Vec<_> = std::thread::scope(|scope| {
        let running: Vec<_> = (0..8)
            .map(|_| scope.spawn(|| post("k2", &body_text).body))
            .collect();
        running.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(posts.iter().all(|body| *body == posts[0]), "{posts:?}");
    assert_eq!(catalog.versions(&name("ann:data")).await.unwrap().len(), 3);
    body["message"] = "something else".into();
    let reused = tokio::task::block_in_place(|| post("k1", &body.to_string()));
    assert_eq!(reused.status, 422, "{}", reused.body);
    assert!(reused.head.contains("application/problem+json"));
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_have_tags_problems_say_what_and_everything_is_in_the_audit_log() {
    let served = Served::plain().await;
    let ann = served.person("ann").await;
    served
        .connect(&ann)
        .await
        .publish(draft(&name("ann:data"), "x"))
        .await
        .unwrap();
    tokio::task::block_in_place(|| {
        let first = served.raw("GET", "/v1/datastores/ann/data", &ann, &[]);
        let tag = first
            .head
            .lines()
            .find_map(|line| line.strip_prefix("etag: "))
            .unwrap();
        let header = format!("If-None-Match: {tag}");
        assert_eq!(
            served
                .raw("GET", "/v1/datastores/ann/data", &ann, &["-H", &header])
                .status,
            304
        );
        for (method, path, token, status) in [
            ("GET", "/v1/me", "gmt_wrong", 401),
            ("GET", "/v1/nothing", ann.as_str(), 404),
            ("PATCH", "/v1/me", ann.as_str(), 405),
            ("GET", "/v1/datastores?limit=0", ann.as_str(), 400),
            ("GET", "/v1/datastores?after=..", ann.as_str(), 400),
            ("GET", "/v1/datastores/ann/data/versions/7", ann.as_str(), 404),
            ("GET", "/v1/datastores/zed/data/versions/7", ann.as_str(), 404),
            ("DELETE", "/v1/datastores/ann/data/versions/0", ann.as_str(), 400),
        ] {
            let answer = served.raw(method, path, token, &[]);
            assert_eq!(answer.status, status, "{method} {path}: {}", answer.body);
            assert!(
                answer.head.contains("application/problem+json"),
                "{path}: {}",
                answer.head
            );
            let problem: serde_json::Value = serde_json::from_str(&answer.body).unwrap();
            assert_eq!(problem["status"], status);
        }
    });
    let log = std::fs::read_to_string(served.dir.path().join("audit")).unwrap();
    let lines: Vec<serde_json::Value> = log
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert!(
        lines
            .iter()
            .any(|line| line["user"] == "ann" && line["status"] == 201)
    );
    assert!(
        lines
            .iter()
            .any(|line| line["user"].is_null() && line["status"] == 401)
    );
    assert!(!log.contains("gmt_"), "tokens are not in the audit log");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_asks_too_often_is_told_when_to_come_back_and_the_client_does() {
    let options = Options {
        rate: 2,
        ..Options::default()
    };
    let served = Served::start(options, None).await;
    let ann = served.person("ann").await;
    let catalog = served.connect(&ann).await;
    let answers: Vec<Raw> =
        tokio::task::block_in_place(|| (0..40).map(|_| served.raw("GET", "/v1/me", &ann, &[])).collect());
    let refused: Vec<_> = answers.iter().filter(|answer| answer.status == 429).collect();
    assert!(!refused.is_empty());
    assert!(
        refused
            .iter()
            .all(|answer| answer.head.contains("retry-after: 1"))
    );
    assert!(catalog.teams().await.unwrap().unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn many_datastores_come_a_page_at_a_time_and_each_once() {
    let served = Served::plain().await;
    let (ann, ben) = (served.person("ann").await, served.person("ben").await);
    served.team("all", &["ann", "ben"]).await;
    // As records lie in a store; only their names matter to a listing.
    let records = served.dir.path().join("records");
    for (owner, count) in [("ann", 2500), ("ben", 700)] {
        for number in 0..count {
            // Names that begin alike sort otherwise as keys than as names.
            let dir = records.join(format!("{owner}/d{}{}", number / 3, ["", "-x", ".y"][number % 3]));
            std::fs::create_dir_all(&dir).unwrap();
            for version in 1..=(number % 2 + 1) {
                std::fs::write(dir.join(format!("{version:020}.json")), "").unwrap();
            }
        }
    }
    let catalog = served.connect(&ben).await;
    let all = catalog.list(None).await.unwrap();
    assert_eq!(all.len(), 3200);
    assert!(all.is_sorted_by(|one, other| one.name < other.name));
    assert!(all.iter().any(|item| item.latest == version(2)));
    let pages = tokio::task::block_in_place(|| {
        let mut after = String::new();
        let mut sizes = Vec::new();
        loop {
            let path = format!("/v1/datastores?limit=999{after}");
            let page: serde_json::Value =
                serde_json::from_str(&served.raw("GET", &path, &ann, &[]).body).unwrap();
            sizes.push(page["items"].as_array().unwrap().len());
            match page["next"].as_str() {
                Some(next) => after = format!("&after={next}"),
                None => return sizes,
            }
        }
    });
    assert_eq!(pages, [999, 999, 999, 203]);
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_is_believed_with_the_right_certificate_and_not_without() {
    let dir = tempfile::tempdir().unwrap();
    let Some(files) = certificate(dir.path()) else {
        return skip("TLS", "there is no openssl to make a certificate");
    };
    let served = Served::start(Options::default(), Some(files.clone())).await;
    let token = served.person("ann").await;
    let mut settings = Served::settings(&token);
    settings.set("REQUESTS_CA_BUNDLE", files.certificates.to_str().unwrap());
    let catalog = catalog::connect(&served.url, &settings).await.unwrap();
    assert_eq!(catalog.me(), Some(&user("ann")));
}

fn certificate(dir: &Path) -> Option<TlsFiles> {
    let (certificates, key): (PathBuf, PathBuf) = (dir.join("cert.pem"), dir.join("key.pem"));
    let made = Command::new("openssl")
        .args([
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
        ])
        .args([
            "-days",
            "2",
            "-subj",
            "/CN=localhost",
            "-addext",
            "subjectAltName=DNS:localhost",
        ])
        .args(["-addext", "basicConstraints=critical,CA:FALSE"])
        .arg("-keyout")
        .arg(&key)
        .arg("-out")
        .arg(&certificates)
        .output()
        .ok()?;
    made.status.success().then_some(TlsFiles { certificates, key })
}

#[tokio::test(flavor = "multi_thread")]
async fn leases_say_who_and_run_out() {
    let options = Options {
        lease: std::time::Duration::from_secs(2),
        ..Options::default()
    };
    let served = Served::start(options, None).await;
    let (ann, ben) = (served.person("ann").await, served.person("ben").await);
    served.team("all", &["ann", "ben"]).await;
    let (ann, ben) = (served.connect(&ann).await, served.connect(&ben).await);
    let data = name("ann:data");
    ann.publish(draft(&data, "x")).await.unwrap();
    let lease = Lease {
        id: LeaseId::random(),
        reference: data.at(version(1)),
        user: user("ben"),
        host: "node7".to_owned(),
        since: jiff::Timestamp::now(),
        expires: jiff::Timestamp::now(),
    };
    assert!(ben.hold(&lease).await.unwrap().is_some());
    let held = ann.all_leases().await.unwrap();
    assert_eq!((&held[0].user, held[0].host.as_str()), (&user("ben"), "node7"));
    let refused = ann
        .retire(&data.at(version(1)), &user("ann"), false)
        .await
        .unwrap_err();
    assert!(
        refused.to_string().contains("mounted by ben on node7"),
        "{refused}"
    );
    // Nobody can end another's lease.
    ann.release(&lease).await.unwrap();
    assert_eq!(ann.leases(&data).await.unwrap().len(), 1);
    // The host dies: nobody renews.
    tokio::time::timeout(std::time::Duration::from_secs(30), async {
        while !ann.leases(&data).await.unwrap().is_empty() {
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
    })
    .await
    .unwrap();
    ann.retire(&data.at(version(1)), &user("ann"), false)
        .await
        .unwrap();
    let gone = ben.record(&data.at(version(1))).await.unwrap_err();
    assert!(matches!(gone, CatalogError::Retired { .. }), "{gone}");
}

#[tokio::test]
async fn a_store_catalog_and_a_control_plane_are_one_kind_of_thing() {
    let served = Served::plain().await;
    let token = served.person("ann").await;
    served
        .connect(&token)
        .await
        .publish(draft(&name("ann:data"), "x"))
        .await
        .unwrap();
    let store = catalog::open(
        &Served::store_url(served.dir.path()),
        &StoreSettings::default(),
        &Deadlines::control(),
    )
    .unwrap();
    let over_http: Arc<dyn Catalog> = Arc::new(served.connect(&token).await);
    let reference = "data".parse().unwrap();
    assert_eq!(
        store.resolve(&reference, &user("ann")).await.unwrap(),
        over_http.resolve(&reference, &user("somebody")).await.unwrap()
    );
}

/// What the description says, asked of the server in many ways: every answer is one that it describes.
#[tokio::test(flavor = "multi_thread")]
async fn the_description_of_the_protocol_is_true() {
    let tool = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/tools/schemathesis");
    if !tool.join("bin/schemathesis").is_file() {
        return skip(
            "the protocol's description",
            "there is no schemathesis in target/tools",
        );
    }
    let served = Served::plain().await;
    let ann = served.person("ann").await;
    let catalog = served.connect(&ann).await;
    for message in ["first", "second"] {
        catalog.publish(draft(&name("ann:data"), message)).await.unwrap();
    }
    let config = served.dir.path().join("schemathesis.toml");
    std::fs::write(
        &config,
        r#"
        [parameters]
        owner = "ann"
        datastore = "data"
        "path.version" = "1"

        # A retired version, and an idempotency key that is used again, are refused rightly.
        [checks.positive_data_acceptance]
        expected-statuses = ["2xx", "3xx", 401, 403, 404, 409, 410, 422, 429]

        [[operations]]
        include-method = "DELETE"
        parameters = { "path.version" = "2", in_use = "true" }
        "#,
    )
    .unwrap();
    let output = tokio::task::block_in_place(|| {
        Command::new(tool.join("bin/schemathesis"))
            .arg("--config-file")
            .arg(&config)
            .args(["run", "docs/openapi.yaml", "--url", &served.url.to_string()])
            .args(["--header", &format!("Authorization: Bearer {ann}")])
            .args(["--max-examples", "15", "--generation-deterministic", "--no-color"])
            .args(["--exclude-checks", "ignored_auth"])
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .env("PYTHONPATH", &tool)
            .env("HOME", served.dir.path())
            .output()
            .unwrap()
    });
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(said.contains("Tested: 17"), "{said}");
}
