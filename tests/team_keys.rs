//! Keys that a token service lends: narrowed to one version on a server that enforces it, and renewed under a
//! long read, with the control plane there and gone.

#[path = "support/compare.rs"]
mod compare;
#[path = "support/plane.rs"]
mod plane;
#[path = "support/s3_origin.rs"]
mod s3_origin;
#[path = "support/sandbox.rs"]
mod sandbox;
#[path = "support/weed.rs"]
mod weed;

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::TcpListener,
    os::unix::fs::FileExt,
    path::Path,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use compare::assert_same_tree;
use grid_mount::{
    catalog,
    origin::{Deadlines, OriginError, Store, StoreSettings, StoreUrl},
};
use plane::{Administrator, somebody};
use s3_origin::S3Origin;
use sandbox::{Sandbox, skip};
use weed::Weed;

/// How long keys last; a read under them takes ten times as long. Set GRID_MOUNT_TEST_KEY_SECONDS=30 for keys
/// as short as they may be for real, and a read of five minutes.
fn life() -> Duration {
    let set = std::env::var("GRID_MOUNT_TEST_KEY_SECONDS").ok();
    Duration::from_secs(set.map_or(2, |text| text.parse().expect("seconds")))
}

/// A control plane's file of what it lends: whatever `role` may, narrowed.
fn lending(place: &Sandbox, store: &str, endpoint: &str, service: &str, role: &str, life: u64) -> String {
    let file = place.path("home/lending.toml");
    let text = format!(
        r#"
        [[store]]
        url = "{store}"
        settings = {{ AWS_ENDPOINT_URL = "{endpoint}", AWS_REGION = "us-east-1" }}
        lifetime = {life}
        [store.assume-role]
        endpoint = "{service}"
        role = "{role}"
        keys = {{ AWS_ACCESS_KEY_ID = "{}", AWS_SECRET_ACCESS_KEY = "{}" }}
        "#,
        weed::ACCESS_KEY,
        weed::SECRET_KEY
    );
    fs::write(&file, text).unwrap();
    file.to_str().unwrap().to_owned()
}

#[test]
fn what_is_lent_reads_one_version_and_nothing_else() {
    if !Path::new("/dev/fuse").exists() {
        return skip("a team's mounts", "there is no /dev/fuse");
    }
    let Some(weed) = Weed::start_with_tokens() else {
        return;
    };
    weed.create_bucket("team");
    let store = "s3://team/catalog";
    let administrator = Administrator::new(store, &weed.settings());
    let (alice, bob) = (administrator.person("alice"), administrator.person("bob"));
    administrator.ok(&["team", "add", "vision", "alice", "bob"]);
    let endpoint = weed.endpoint();
    let file = lending(
        &administrator.sandbox,
        store,
        &endpoint,
        &endpoint,
        weed::ROLE,
        900,
    );
    let replica = administrator.serve("127.0.0.1:0", &["--credentials", &file]);

    let a = somebody(&replica, &alice);
    let source = a.path("home/source");
    fs::create_dir_all(source.join("sub")).unwrap();
    fs::write(source.join("hello.txt"), "hello\n").unwrap();
    fs::write(source.join("sub/big"), vec![7; 3_000_000]).unwrap();
    a.ok(&["publish", source.to_str().unwrap(), "images"]);
    let another = a.path("home/another");
    fs::create_dir(&another).unwrap();
    fs::write(another.join("secret.txt"), "of another version\n").unwrap();
    a.ok(&["publish", another.to_str().unwrap(), "private"]);

    let b = somebody(&replica, &bob);
    let mount = b.path("mnt/images");
    b.ok(&["alice:images/1", mount.to_str().unwrap()]);
    assert_same_tree(&b, &source, &mount);

    // The keys themselves, in other hands than the program's.
    let asked = format!(
        "{}/v1/datastores/alice/images/versions/1/credentials",
        replica.url
    );
    let answer = Command::new("curl")
        .args([
            "-sSf",
            "-X",
            "POST",
            "-H",
            &format!("Authorization: Bearer {bob}"),
            &asked,
        ])
        .output()
        .unwrap();
    let loan: serde_json::Value = serde_json::from_slice(&answer.stdout).unwrap();
    let lent: StoreSettings = serde_json::from_value(loan["settings"].clone()).unwrap();
    assert!(
        lent.get("AWS_SESSION_TOKEN").is_some() && lent.get("AWS_ACCESS_KEY_ID") != Some(weed::ACCESS_KEY)
    );
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let all: StoreSettings = weed.settings().into_iter().collect();
        let url: StoreUrl = store.parse().unwrap();
        let records = catalog::open(&url, &all, &Deadlines::control()).unwrap();
        let record = async |reference: &str| records.record(&reference.parse().unwrap()).await.unwrap();
        let (mine, other) = (record("alice:images/1").await, record("alice:private/1").await);
        let whole = Store::open(&url, &all, &Deadlines::control()).unwrap();
        let lent = Store::open(&url, &lent, &Deadlines::control()).unwrap();
        let parts = |tree: &catalog::TreeParts| {
            let parts = [Some(&tree.rows), tree.digests.as_ref(), tree.sums.as_ref()];
            parts
                .into_iter()
                .flatten()
                .map(|part| part.key.clone())
                .collect::<Vec<_>>()
        };
        for key in parts(&mine.tree) {
            lent.get(&key, 1 << 24).await.unwrap();
        }
        let mut forbidden = parts(&other.tree);
        forbidden.extend(["records/alice/images", "team"].map(|dir| dir.to_owned()));
        let mut keys = Vec::new();
        for key in &forbidden {
            if key.starts_with("trees/") {
                keys.push(key.clone());
            } else {
                let level = whole.list_level(&format!("{key}/")).await.unwrap();
                keys.extend(level.objects.into_iter().map(|object| object.key));
            }
        }
        assert!(keys.len() >= 4, "{keys:?}");
        for key in keys {
            assert!(whole.get(&key, 1 << 24).await.is_ok(), "{key}");
            let refused = lent.get(&key, 1 << 24).await;
            assert!(
                matches!(refused, Err(OriginError::Denied { .. })),
                "{key}: {refused:?}"
            );
        }
        let listed = lent.list_level("objects/").await;
        assert!(matches!(listed, Err(OriginError::Denied { .. })), "{listed:?}");
        let written = lent.put_if_absent("objects/x", "x".into()).await;
        assert!(written.is_err(), "{written:?}");
    });
}

/// A token service: hands out numbered keys, which the origin takes for so long.
struct Bank {
    url: String,
    lent: Arc<AtomicU64>,
}

impl Bank {
    fn open(origin: Arc<S3Origin>, life: Duration) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let lent = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&lent);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(mut stream) = stream else { return };
                let mut request = BufReader::new(stream.try_clone().unwrap());
                let (mut line, mut length) = (String::new(), 0);
                while request.read_line(&mut line).unwrap_or(0) > 2 {
                    if let Some(text) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                        length = text.trim().parse().unwrap();
                    }
                    line.clear();
                }
                let mut body = vec![0; length];
                request.read_exact(&mut body).unwrap();
                assert!(String::from_utf8_lossy(&body).contains("Action=AssumeRole"));
                let id = format!("KEY{}", count.fetch_add(1, Ordering::SeqCst));
                origin.take_for(&id, life);
                let answer = format!(
                    "<R><AccessKeyId>{id}</AccessKeyId><SecretAccessKey>s</SecretAccessKey><SessionToken>t</SessionToken></R>"
                );
                let head = format!(
                    "HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
                    answer.len()
                );
                let _ = stream.write_all((head + &answer).as_bytes());
            }
        });
        Self { url, lent }
    }

    fn lent(&self) -> u64 {
        self.lent.load(Ordering::SeqCst)
    }
}

const BLOCK: usize = 128 << 10;
const BLOCKS: u64 = 512;
const READS: usize = 400;

fn content(block: u64) -> Vec<u8> {
    (0..BLOCK as u64 / 8)
        .flat_map(|at| (block * 1_000_003 + at).to_le_bytes())
        .collect()
}

/// All blocks once, in an order in which nothing can be foreseen.
fn scattered() -> Vec<u64> {
    let mut blocks: Vec<u64> = (0..BLOCKS).collect();
    let mix = |x: u64| (x ^ (x >> 31)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    blocks.sort_by_key(|block| mix(mix(*block + 1)));
    blocks
}

#[test]
fn keys_that_run_out_ten_times_under_a_read_are_renewed_and_nobody_notices() {
    if !Path::new("/dev/fuse").exists() {
        return skip("a long read", "there is no /dev/fuse");
    }
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let origin = Arc::new(runtime.block_on(S3Origin::start(Default::default())));
    origin.take_for(weed::ACCESS_KEY, Duration::from_secs(86_400));
    let life = life();
    let bank = Bank::open(Arc::clone(&origin), life);
    let settings = [
        ("AWS_ENDPOINT_URL", origin.endpoint()),
        ("AWS_ACCESS_KEY_ID", weed::ACCESS_KEY.to_owned()),
        ("AWS_SECRET_ACCESS_KEY", weed::SECRET_KEY.to_owned()),
        ("AWS_REGION", "us-east-1".to_owned()),
    ];
    let store = "s3://bucket/team";
    let administrator = Administrator::new(store, &settings);
    let token = administrator.person("alice");
    let role = "arn:aws:iam::1:role/r";
    let file = lending(
        &administrator.sandbox,
        store,
        &origin.endpoint(),
        &bank.url,
        role,
        life.as_secs(),
    );
    let replica = administrator.serve("127.0.0.1:0", &["--credentials", &file]);
    let alice = somebody(&replica, &token);
    let source = alice.path("home/source");
    fs::create_dir(&source).unwrap();
    let whole: Vec<u8> = (0..BLOCKS).flat_map(content).collect();
    fs::write(source.join("data"), whole).unwrap();
    fs::write(source.join("absent"), content(BLOCKS).repeat(16)).unwrap();
    alice.ok(&["publish", source.to_str().unwrap(), "data"]);
    let mount = alice.path("mnt");
    alice.ok(&["data", mount.to_str().unwrap(), "--prefetch", "none"]);
    let keys = || alice.status()["mounts"][0]["credentials"].clone();
    let renewals = || keys()["renewals"].as_u64().unwrap();

    // Neither leaves its secrets in a core file.
    for pid in [replica.pid(), alice.agent_pid().unwrap() as u32] {
        let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
        let core = limits.lines().find(|line| line.starts_with("Max core file size"));
        assert_eq!(
            core.and_then(|line| line.split_whitespace().nth(4)),
            Some("0"),
            "{limits}"
        );
    }

    // What was lent to begin with is the difference between what the bank counts and what the mount does.
    let (first, at_first) = (bank.lent() - renewals(), renewals());
    let data = fs::File::open(mount.join("data")).unwrap();
    let gets = origin.counts().gets.load(Ordering::Relaxed);
    let order = scattered();
    let began = Instant::now();
    for (number, at) in order.iter().copied().enumerate().take(READS) {
        let mut block = vec![0; BLOCK];
        data.read_exact_at(&mut block, at * BLOCK as u64).unwrap();
        assert!(block == content(at), "block {at}");
        // Paced, not waited for: a slow machine only reads longer.
        let due = life * 10 * (number as u32 + 1) / READS as u32;
        std::thread::sleep(due.saturating_sub(began.elapsed()));
    }
    let lives = began.elapsed().as_secs_f64() / life.as_secs_f64();
    let gets = origin.counts().gets.load(Ordering::Relaxed) - gets;
    assert!(
        gets >= READS as u64 / 4,
        "{gets} requests: it was not read from the origin"
    );
    let patience = Instant::now() + Duration::from_secs(30);
    while bank.lent() - renewals() != first {
        assert!(
            Instant::now() < patience,
            "lent {}, renewed {}",
            bank.lent(),
            renewals()
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    let renewed = renewals() - at_first;
    let refused = origin.refused();
    eprintln!("{lives:.1} lives of {life:?}: {renewed} renewals, {refused} requests refused");
    assert!(
        renewed as f64 <= lives / 0.6 + 1.0 + refused as f64,
        "{renewed} renewals in {lives} lives"
    );
    assert!(
        renewed as f64 >= lives / 2.0,
        "{renewed} renewals in {lives} lives"
    );
    assert_eq!(keys()["failures"], 0);

    // The control plane goes, and then the keys run out: what is here can be read, and `status` says so.
    let address = replica.address();
    drop(replica);
    let patience = Instant::now() + life + Duration::from_secs(30);
    while keys()["expired"] != true {
        assert!(Instant::now() < patience, "{}", keys());
        std::thread::sleep(Duration::from_millis(50));
    }
    let shown = alice.ok(&["status"]);
    assert!(shown.contains("only what is in the cache can be read"), "{shown}");
    let direct = |block: u64| {
        let mut command = alice.program("dd");
        command.args(["iflag=direct", "bs=128k", "count=1", "status=none"]);
        command.arg(format!("if={}", mount.join("data").display()));
        command.arg(format!("skip={block}"));
        command
    };
    let here = direct(order[0]).output().unwrap();
    assert!(
        here.stdout == content(order[0]),
        "{}",
        String::from_utf8_lossy(&here.stderr)
    );

    // What is not waits, and is there when the control plane is.
    let before = renewals();
    let absent = mount.join("absent");
    let waiting = std::thread::spawn(move || fs::read(absent).unwrap());
    let _again = administrator.serve(&address, &["--credentials", &file]);
    assert!(waiting.join().unwrap() == content(BLOCKS).repeat(16));
    assert!(renewals() > before);
}
