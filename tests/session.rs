//! Sessions, with the real program and no systemd: all at once, required or not, added and taken away.

#[path = "support/sandbox.rs"]
mod sandbox;

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use sandbox::{Sandbox, skip};

const DEADLINE: Duration = Duration::from_secs(60);

fn sandboxes() -> Vec<Sandbox> {
    if !Path::new("/dev/fuse").exists() {
        skip("a session", "there is no /dev/fuse");
        return Vec::new();
    }
    // Root's session is the host's: those are tested under systemd.
    Sandbox::ordinary().into_iter().collect()
}

fn publish(sandbox: &Sandbox, name: &str) {
    let source = sandbox.path(&format!("source-{name}"));
    fs::create_dir_all(source.join("train/part")).unwrap();
    fs::write(source.join("name"), name).unwrap();
    fs::write(source.join("train/part/file"), format!("part of {name}")).unwrap();
    sandbox.ok(&["publish", source.to_str().unwrap(), name]);
}

fn record(sandbox: &Sandbox) -> serde_json::Value {
    let file = sandbox.path("run/grid-mount/session.json");
    let parsed = |bytes: &[u8]| serde_json::from_slice::<serde_json::Value>(bytes).unwrap();
    // What is tried again in the background may write it anew meanwhile.
    loop {
        let before = fs::read(&file).unwrap();
        let printed = sandbox.ok(&["session", "status", "--json"]);
        if fs::read(&file).unwrap() == before {
            assert_eq!(parsed(printed.as_bytes()), parsed(&before));
            return parsed(&before);
        }
    }
}

fn wait_for<T>(what: &str, mut done: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(value) = done() {
            return value;
        }
        assert!(begun.elapsed() < DEADLINE, "{what}");
        thread::sleep(Duration::from_millis(50));
    }
}

/// As the sandbox's user, whose mounts nobody else may read.
fn read(sandbox: &Sandbox, path: &Path) -> String {
    let output = sandbox.program("/bin/cat").arg(path).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

fn spec(sandbox: &Sandbox, third_is_required: bool) -> PathBuf {
    let path = sandbox.path("session.toml");
    let root = sandbox.path("mnt");
    let text = format!(
        "root = {root:?}\n\
         [[datastore]]\nref = \"one/1\"\n\
         [[datastore]]\nref = \"alice:two\"\npath = {:?}\nsubdir = \"train/part\"\nprefetch = \"none\"\n\
         [[datastore]]\nref = \"three\"\nrequired = {third_is_required}\n\
         [[datastore]]\nref = \"four\"\nrequired = {third_is_required}\n",
        root.join("elsewhere/part"),
    );
    fs::write(&path, text).unwrap();
    fs::create_dir_all(root.join("elsewhere")).unwrap();
    std::os::unix::fs::chown(root.join("elsewhere"), Some(sandbox.uid()), Some(sandbox.uid())).unwrap();
    path
}

#[test]
fn what_is_required_decides_and_what_is_not_comes_later() {
    for sandbox in sandboxes() {
        publish(&sandbox, "one");
        publish(&sandbox, "two");
        let file = spec(&sandbox, true);
        let start = ["session", "start", "--spec", file.to_str().unwrap()];
        let told = sandbox.fails(1, &start);
        assert!(
            told.contains("2 of 4") && told.contains("three") && told.contains("four"),
            "{told}"
        );
        assert_eq!(told.trim().lines().count(), 1, "{told}");
        assert_eq!(
            sandbox.mounts(),
            [] as [PathBuf; 0],
            "a failed start leaves mounts"
        );
        assert!(sandbox.fails(1, &["session", "status"]).contains("no session"));

        spec(&sandbox, false);
        sandbox.ok(&start);
        let mnt = sandbox.path("mnt");
        assert_eq!(read(&sandbox, &mnt.join("one/name")), "one");
        assert_eq!(read(&sandbox, &mnt.join("elsewhere/part/file")), "part of two");
        let first = record(&sandbox);
        let of = |record: &serde_json::Value, number: usize| record["datastores"][number].clone();
        assert_eq!(of(&first, 0)["reference"], "alice:one/1");
        assert_eq!(of(&first, 1)["reference"], "alice:two/1");
        assert_eq!(of(&first, 1)["standing"], "mounted");
        assert_eq!(of(&first, 2)["standing"], "waiting");
        assert!(
            of(&first, 2)["error"].as_str().unwrap().contains("three"),
            "{first}"
        );
        assert!(sandbox.fails(1, &start).contains("running already"));

        // Published by somebody, and there without anybody asking.
        publish(&sandbox, "three");
        wait_for("what is waiting is mounted when it can be", || {
            (of(&record(&sandbox), 2)["standing"] == "mounted").then_some(())
        });
        assert_eq!(read(&sandbox, &mnt.join("three/name")), "three");
        assert_eq!(of(&record(&sandbox), 2)["reference"], "alice:three/1");
        assert_eq!(of(&record(&sandbox), 3)["standing"], "waiting");

        publish(&sandbox, "five");
        sandbox.ok(&["session", "add", "five"]);
        assert_eq!(read(&sandbox, &mnt.join("five/name")), "five");
        assert!(sandbox.fails(1, &["session", "add", "five"]).contains("taken"));
        assert!(sandbox.fails(1, &["session", "add", "six"]).contains("six"));
        sandbox.ok(&["session", "remove", "one/1"]);
        sandbox.ok(&["session", "remove", mnt.join("elsewhere/part").to_str().unwrap()]);
        assert!(!mnt.join("elsewhere/part").is_symlink());
        assert!(
            sandbox
                .fails(1, &["session", "remove", "one/1"])
                .contains("none of")
        );
        let left: Vec<_> = record(&sandbox)["datastores"]
            .as_array()
            .unwrap()
            .iter()
            .map(|datastore| datastore["requested"].as_str().unwrap().to_owned())
            .collect();
        assert_eq!(left, ["three", "four", "five"]);
        sandbox.ok(&["session", "stop"]);
        assert_eq!(sandbox.mounts(), [] as [PathBuf; 0]);
        assert!(sandbox.fails(1, &["session", "stop"]).contains("no session"));
    }
}

#[test]
fn a_variable_says_it_in_one_line() {
    for sandbox in sandboxes() {
        publish(&sandbox, "one");
        publish(&sandbox, "two");
        let second = sandbox.path("mnt/second");
        let words = format!("alice:one/1 two={}", second.display());
        let sandbox = sandbox.env("GRID_DATASTORES", &words);
        let told = sandbox.ok(&["session", "start"]);
        assert_eq!(told.lines().count(), 2, "{told}");
        assert_eq!(read(&sandbox, &sandbox.path("home/datastores/one/name")), "one");
        assert_eq!(read(&sandbox, &second.join("name")), "two");
        sandbox.ok(&["session", "stop"]);
        assert_eq!(sandbox.mounts(), [] as [PathBuf; 0]);
    }
}
