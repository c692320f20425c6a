//! The main job over a real S3 server: publish, register, mount and compare, and what goes wrong there.

#[path = "support/compare.rs"]
mod compare;
#[path = "support/sandbox.rs"]
mod sandbox;
#[path = "support/weed.rs"]
mod weed;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::Read,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use bytes::Bytes;
use compare::assert_same_tree;
use grid_mount::origin::{Deadlines, Store, StoreSettings};
use sandbox::{Sandbox, skip, told};
use weed::{SECRET_KEY, Weed};

fn fuse_is_here(what: &str) -> bool {
    let here = Path::new("/dev/fuse").exists();
    if !here {
        skip(what, "there is no /dev/fuse");
    }
    here
}

/// A sandbox whose catalog is `catalog`, on that server.
fn on(weed: &Weed, sandbox: Sandbox, catalog: &str) -> Sandbox {
    let settings = weed.settings();
    let sandbox = settings
        .iter()
        .fold(sandbox, |sandbox, (name, value)| sandbox.env(name, value));
    sandbox.env("GRID_MOUNT_CATALOG", catalog)
}

fn toolchain_lib() -> PathBuf {
    let rustc = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".into());
    let output = Command::new(rustc).args(["--print", "sysroot"]).output().unwrap();
    Path::new(String::from_utf8(output.stdout).unwrap().trim()).join("lib")
}

/// Nobody's secret is in what was printed, logged or answered.
fn no_secret_shows(sandbox: &Sandbox, said: &str) {
    for secret in [SECRET_KEY, WRONG_SECRET] {
        assert!(!said.contains(secret), "{said}");
        let log = agent_log(sandbox);
        assert!(!log.contains(secret), "{log}");
        for line in fs::read_dir("/proc").unwrap() {
            let command = line.unwrap().path().join("cmdline");
            let command = fs::read(command).unwrap_or_default();
            let command = String::from_utf8_lossy(&command).into_owned();
            assert!(
                !command.contains("grid-mount") || !command.contains(secret),
                "{command}"
            );
        }
    }
}

const WRONG_SECRET: &str = "a-wrong-secret-that-shows-nowhere";

fn agent_log(sandbox: &Sandbox) -> String {
    fs::read_to_string(sandbox.path("run/grid-mount/agent.log")).unwrap_or_default()
}

fn nothing_is_left(sandbox: &Sandbox) {
    assert!(sandbox.mounts().is_empty());
    for _ in 0..400 {
        if sandbox.status()["agent"].is_null() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(25));
    }
    panic!("an agent without a mount stays behind");
}

#[test]
fn the_rust_toolchain_comes_back_from_s3() {
    if !fuse_is_here("mounting the toolchain from S3") {
        return;
    }
    let Some(weed) = Weed::shared() else { return };
    weed.create_bucket("toolchain");
    let catalog = "s3://toolchain/team";
    let lib = toolchain_lib();

    let sandbox = on(&weed, Sandbox::new(), catalog);
    assert_eq!(
        sandbox.ok(&["publish", lib.to_str().unwrap(), "lib"]).trim(),
        "alice:lib/1"
    );
    let mount = sandbox.path("mnt/point");
    sandbox.ok(&["alice:lib", mount.to_str().unwrap()]);
    assert_same_tree(&sandbox, &lib, &mount);
    no_secret_shows(&sandbox, &sandbox.ok(&["status", "--json"]));
    sandbox.ok(&["unmount", "--all"]);
    nothing_is_left(&sandbox);

    // An ordinary user's turn. The toolchain may be closed to them: a copy that is not, in which every
    // byte is the same and so is in the store already.
    let Some(ordinary) = Sandbox::ordinary() else {
        return;
    };
    let ordinary = on(&weed, ordinary, catalog);
    let copy = ordinary.path("lib");
    let script = "cp -a \"$1\" \"$2\" && chmod -R a+rX \"$2\"";
    let copied = Command::new("sh")
        .args(["-c", script, "sh"])
        .args([&lib, &copy])
        .status()
        .unwrap();
    assert!(copied.success());
    let published = ordinary.ok(&["publish", copy.to_str().unwrap(), "copy", "--json"]);
    let published: serde_json::Value = serde_json::from_str(&published).unwrap();
    assert_eq!(published["reference"], "alice:copy/1");
    assert_eq!(
        published["report"]["uploaded_objects"], 0,
        "{}",
        published["report"]
    );
    let mount = ordinary.path("mnt/point");
    ordinary.ok(&["alice:copy", mount.to_str().unwrap()]);
    assert_same_tree(&ordinary, &copy, &mount);
    no_secret_shows(&ordinary, &ordinary.ok(&["status", "--json"]));
    ordinary.ok(&["unmount", "--all"]);
    nothing_is_left(&ordinary);
}

/// Objects that were there before anybody thought of publishing them.
struct Prefix {
    runtime: tokio::runtime::Runtime,
    store: Store,
}

impl Prefix {
    fn new(weed: &Weed, url: &str) -> Self {
        let settings: StoreSettings = weed.settings().into_iter().collect();
        let store = Store::open(&url.parse().unwrap(), &settings, &Deadlines::control()).unwrap();
        Self {
            runtime: tokio::runtime::Runtime::new().unwrap(),
            store,
        }
    }

    fn put(&self, key: &str, bytes: &[u8]) {
        self.runtime
            .block_on(self.store.put(key, Bytes::copy_from_slice(bytes)))
            .unwrap();
    }
}

#[test]
fn a_prefix_is_registered_mounted_and_guarded() {
    if !fuse_is_here("mounting a registered prefix") {
        return;
    }
    let Some(weed) = Weed::shared() else { return };
    for bucket in ["photos", "records"] {
        weed.create_bucket(bucket);
    }
    let sandbox = on(&weed, Sandbox::new(), "s3://records/team");
    let prefix = Prefix::new(&weed, "s3://photos/2024");
    let objects: BTreeMap<&str, Vec<u8>> = BTreeMap::from([
        ("readme.txt", b"what this is\n".to_vec()),
        (
            "a/large.bin",
            (0..2_000_000u32)
                .flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes())
                .collect(),
        ),
        ("a/b/ümläut and space", vec![7; 200_000]),
        ("a/b/empty", Vec::new()),
        ("a-b", b"sorts between".to_vec()),
        ("changes.bin", vec![1; 300_000]),
        ("cached.bin", vec![3; 300_000]),
    ]);
    let source = sandbox.path("source");
    for (key, bytes) in &objects {
        prefix.put(key, bytes);
        let file = source.join(key);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, bytes).unwrap();
    }
    let registered = sandbox.ok(&["register", "s3://photos/2024", "photos"]);
    assert_eq!(registered.trim(), "alice:photos/1");
    let mount = sandbox.path("mnt/point");
    sandbox.ok(&["photos", mount.to_str().unwrap()]);
    let diff = sandbox
        .program("diff")
        .args(["-r", "--no-dereference"])
        .args([&source, &mount])
        .output()
        .unwrap();
    assert!(diff.status.success() && diff.stdout.is_empty(), "{}", told(&diff));
    sandbox.ok(&["unmount", "--all"]);
    nothing_is_left(&sandbox);

    // Another host: nothing of the changed object is cached there.
    let other = on(&weed, Sandbox::new(), "s3://records/team");
    let mount = other.path("mnt/point");
    other.ok(&["photos", mount.to_str().unwrap()]);
    assert_eq!(fs::read(mount.join("cached.bin")).unwrap(), objects["cached.bin"]);
    // Of the same size, so that only its ETag tells.
    for key in ["changes.bin", "cached.bin"] {
        prefix.put(key, &vec![2; 300_000]);
    }
    let mut file = fs::File::open(mount.join("changes.bin")).unwrap();
    let mut bytes = Vec::new();
    let error = file.read_to_end(&mut bytes).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO), "{error}");
    assert!(bytes.is_empty(), "{} bytes came before the error", bytes.len());
    let last_error = other.status()["agent"]["last_error"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    for place in [&last_error, &agent_log(&other)] {
        assert!(
            place.contains("changes.bin") && place.contains("changed since"),
            "{place}"
        );
    }
    // What was read before the change stays what was registered, also for the next agent.
    assert_eq!(fs::read(mount.join("cached.bin")).unwrap(), objects["cached.bin"]);
    assert_eq!(fs::read(mount.join("readme.txt")).unwrap(), objects["readme.txt"]);
    other.ok(&["unmount", "--all"]);
    nothing_is_left(&other);
    other.ok(&["photos", mount.to_str().unwrap()]);
    assert_eq!(fs::read(mount.join("cached.bin")).unwrap(), objects["cached.bin"]);
    let error = fs::read(mount.join("changes.bin")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO), "{error}");
    // Registered again, it can be read again.
    assert_eq!(
        other.ok(&["register", "s3://photos/2024", "photos"]).trim(),
        "alice:photos/2"
    );
    let second = other.path("mnt/second");
    other.ok(&["photos/2", second.to_str().unwrap()]);
    for key in ["changes.bin", "cached.bin"] {
        assert_eq!(fs::read(second.join(key)).unwrap(), vec![2; 300_000], "{key}");
    }
    no_secret_shows(&other, &other.ok(&["status", "--json"]));
}

/// Each fails with one line that has all of `words`, and leaves nothing.
fn all_fail(sandbox: &Sandbox, words: &[&str]) {
    let source = sandbox.path("source");
    fs::create_dir_all(&source).unwrap();
    fs::write(source.join("a"), "1").unwrap();
    let (source, point) = (source.to_str().unwrap().to_owned(), sandbox.path("mnt/point"));
    let commands: [&[&str]; 5] = [
        &["alice:photos", point.to_str().unwrap()],
        &["publish", &source, "photos"],
        &["register", "s3://given/prefix", "photos"],
        &["list", "--global"],
        &["info", "alice:photos"],
    ];
    for command in commands {
        let said = sandbox.fails(1, command);
        // Publishing says how far it is, in lines of its own.
        let progress = ["listing", "uploading"];
        let errors: Vec<_> = said.lines().filter(|line| !progress.contains(line)).collect();
        assert_eq!(errors.len(), 1, "{command:?} says more than one line: {said}");
        assert!(errors[0].starts_with("grid-mount: "), "{said}");
        for word in words {
            assert!(said.contains(word), "{command:?}: {word:?} is not in: {said}");
        }
        no_secret_shows(sandbox, &said);
        assert!(!point.exists(), "the mount point stays behind");
    }
    nothing_is_left(sandbox);
    assert_eq!(
        fs::read_dir(sandbox.path("tmp")).unwrap().count(),
        0,
        "temporary files stay behind"
    );
}

#[test]
fn wrong_keys_say_so() {
    let Some(weed) = Weed::shared() else { return };
    weed.create_bucket("given");
    let sandbox = on(&weed, Sandbox::new(), "s3://given/team").env("AWS_SECRET_ACCESS_KEY", WRONG_SECRET);
    all_fail(&sandbox, &["s3://given", "credentials"]);
    let unknown = on(&weed, Sandbox::new(), "s3://given/team").env("AWS_ACCESS_KEY_ID", "nobody");
    all_fail(&unknown, &["s3://given", "credentials"]);
    // Nothing that failed is there for those who may look.
    let sound = on(&weed, Sandbox::new(), "s3://given/team");
    assert_eq!(sound.ok(&["list", "--global", "--json"]).trim(), "[]");
}

#[test]
fn an_absent_bucket_says_so() {
    let Some(weed) = Weed::shared() else { return };
    weed.create_bucket("given");
    let sandbox = on(&weed, Sandbox::new(), "s3://no-such-bucket/team");
    all_fail(
        &sandbox,
        &[
            "s3://no-such-bucket",
            "bucket",
            "does not exist",
            "check its name",
        ],
    );
    // A catalog that is there, and a prefix to register that is not.
    let sandbox = on(&weed, Sandbox::new(), "s3://given/other");
    let said = sandbox.fails(1, &["register", "s3://no-such-bucket/prefix", "photos"]);
    assert!(
        said.contains("no-such-bucket") && said.contains("does not exist"),
        "{said}"
    );
    let said = sandbox.fails(1, &["register", "s3://given/nothing/here", "photos"]);
    assert!(said.contains("nothing below s3://given/nothing/here"), "{said}");
    assert_eq!(sandbox.ok(&["list", "--global", "--json"]).trim(), "[]");
}

#[test]
fn an_unreachable_endpoint_says_so_to_every_command() {
    let free = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let sandbox = Sandbox::new()
        .env("AWS_ENDPOINT_URL", &format!("http://{free}"))
        .env("AWS_ACCESS_KEY_ID", "key")
        .env("AWS_SECRET_ACCESS_KEY", WRONG_SECRET)
        .env("AWS_REGION", "us-east-1")
        .env("GRID_MOUNT_CATALOG", "s3://given/team");
    all_fail(&sandbox, &["s3://given", "check the endpoint"]);
}

#[test]
fn two_publishers_at_once_get_two_versions() {
    let Some(weed) = Weed::shared() else { return };
    weed.create_bucket("race");
    let sandbox = on(&weed, Sandbox::new(), "s3://race/team");
    let mut given = BTreeSet::new();
    for round in 0..3 {
        let publishers: Vec<_> = (0..2)
            .map(|who| {
                let source = sandbox.path(&format!("source-{round}-{who}"));
                fs::create_dir(&source).unwrap();
                fs::write(source.join("who"), format!("{round} {who}")).unwrap();
                let message = format!("{round} {who}");
                let arguments = ["publish", source.to_str().unwrap(), "race", "--message", &message];
                let child = sandbox
                    .grid(&arguments)
                    .stdout(Stdio::piped())
                    .stderr(Stdio::piped())
                    .spawn()
                    .unwrap();
                (message, child)
            })
            .collect();
        for (message, child) in publishers {
            let output = child.wait_with_output().unwrap();
            assert!(output.status.success(), "{}", told(&output));
            let reference = String::from_utf8(output.stdout).unwrap().trim().to_owned();
            let info: serde_json::Value =
                serde_json::from_str(&sandbox.ok(&["info", &reference, "--json"])).unwrap();
            assert_eq!(info["message"], message, "{reference} is somebody else's");
            assert!(given.insert(reference.clone()), "{reference} was given twice");
        }
    }
    let expected: BTreeSet<_> = (1..=6).map(|version| format!("alice:race/{version}")).collect();
    assert_eq!(given, expected);
}
