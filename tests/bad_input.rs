//! What goes wrong on other people's machines: each gives one clear message with the cause and a remedy, a
//! non-zero exit status, and leaves no half-made mount, version or process.

#[path = "support/sandbox.rs"]
mod sandbox;

use std::{
    fs,
    path::{Path, PathBuf},
};

use sandbox::{Sandbox, skip, told};

/// A catalog with `alice:photos` versions 1 and 2 and alias `prod`.
fn with_photos() -> Sandbox {
    let sandbox = Sandbox::new();
    publish_photos(&sandbox);
    sandbox
}

fn publish_photos(sandbox: &Sandbox) {
    let source = sandbox.path("source");
    fs::create_dir_all(&source).unwrap();
    fs::write(source.join("a"), "1").unwrap();
    sandbox.ok(&["publish", source.to_str().unwrap(), "photos"]);
    fs::write(source.join("a"), "22").unwrap();
    sandbox.ok(&["publish", source.to_str().unwrap(), "photos"]);
    sandbox.ok(&["alias", "photos/1", "prod"]);
}

/// Mounting fails with a message that has all of `words`, in one line, and nothing is left.
fn mount_fails(sandbox: &Sandbox, reference: &str, words: &[&str]) {
    let point = sandbox.path("mnt/point");
    let said = sandbox.fails(1, &[reference, point.to_str().unwrap()]);
    says(&said, words);
    assert!(!point.exists(), "the mount point stays behind");
    nothing_is_left(sandbox);
}

fn says(said: &str, words: &[&str]) {
    assert_eq!(said.trim_end().lines().count(), 1, "more than one line: {said}");
    for word in words {
        assert!(said.contains(word), "{word:?} is not in: {said}");
    }
}

fn nothing_is_left(sandbox: &Sandbox) {
    assert!(sandbox.mounts().is_empty());
    for _ in 0..200 {
        if sandbox.status()["agent"].is_null() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(25));
    }
    panic!("an agent without a mount stays behind");
}

#[test]
fn what_does_not_exist_is_told_apart() {
    let sandbox = with_photos();
    mount_fails(&sandbox, "alcie:photos", &["alcie", "did you mean", "alice"]);
    mount_fails(&sandbox, "alice:fotos", &["fotos", "did you mean", "photos"]);
    mount_fails(&sandbox, "alice:photos/7", &["7", "1", "2"]);
    mount_fails(&sandbox, "alice:photos/prd", &["prd", "prod"]);
    sandbox.fails(1, &["info", "alice:fotos"]);
    sandbox.fails(1, &["list", "alcie"]);
}

#[test]
fn a_reference_that_is_none_points_at_the_place() {
    let sandbox = with_photos();
    for reference in [
        "alice:photos/0",
        "alice:",
        ":photos",
        "a/b/c",
        "alice:photos/01",
        "../x",
    ] {
        let said = sandbox.fails(2, &["mount", reference, sandbox.path("mnt/p").to_str().unwrap()]);
        says(&said, &["column"]);
    }
    assert!(!sandbox.path("mnt/p").exists());
}

#[test]
fn usage_errors_are_two() {
    let sandbox = Sandbox::new();
    sandbox.fails(2, &["--no-such-flag"]);
    sandbox.fails(2, &["unmount"]);
    sandbox.fails(2, &["publish", "x"]);
    sandbox.fails(2, &["photos", "--cache-size", "lots"]);
}

#[test]
fn mount_points_that_cannot_be_are_refused() {
    let sandbox = with_photos();
    let file = sandbox.path("mnt/file");
    fs::write(&file, "x").unwrap();
    says(
        &sandbox.fails(1, &["photos", file.to_str().unwrap()]),
        &["not a directory"],
    );
    let full = sandbox.path("mnt/full");
    fs::create_dir(&full).unwrap();
    fs::write(full.join("x"), "x").unwrap();
    says(
        &sandbox.fails(1, &["photos", full.to_str().unwrap()]),
        &["not empty"],
    );
    assert_eq!(fs::read(&file).unwrap(), b"x");
    nothing_is_left(&sandbox);
}

#[test]
fn endpoints_keys_and_buckets() {
    let free_port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let sandbox = Sandbox::new()
        .env("AWS_ENDPOINT_URL", &format!("http://127.0.0.1:{free_port}"))
        .env("AWS_ACCESS_KEY_ID", "key")
        .env("AWS_SECRET_ACCESS_KEY", "a-secret-that-shows-nowhere")
        .env("AWS_REGION", "us-east-1")
        .env("GRID_MOUNT_CATALOG", "s3://bucket/team");
    let said = sandbox.fails(1, &["alice:photos", sandbox.path("mnt/p").to_str().unwrap()]);
    says(&said, &["127.0.0.1", "s3://bucket/team"]);
    assert!(!said.contains("a-secret"), "{said}");
    nothing_is_left(&sandbox);
    let source = sandbox.path("source");
    fs::create_dir(&source).unwrap();
    sandbox.fails(1, &["publish", source.to_str().unwrap(), "photos"]);

    let bad = Sandbox::new().env("GRID_MOUNT_CATALOG", "ftp://somewhere/x");
    says(&bad.fails(2, &["list"]), &["ftp", "s3"]);
}

fn files_below(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files_below(&path))
        } else {
            found.push(path)
        }
    }
    found.sort();
    found
}

#[test]
fn flipped_bits_in_records_and_trees_are_noticed() {
    let sandbox = with_photos();
    let catalog = sandbox.path("data/grid-mount/catalog");
    for part in ["records", "trees"] {
        for file in files_below(&catalog.join(part)) {
            let sound = fs::read(&file).unwrap();
            let mut damaged = sound.clone();
            let middle = damaged.len() / 2;
            damaged[middle] ^= 1;
            fs::write(&file, damaged).unwrap();
            let point = sandbox.path("mnt/point");
            let mut failures = 0;
            for version in ["alice:photos/1", "alice:photos/2"] {
                let output = sandbox
                    .grid(&[version, point.to_str().unwrap()])
                    .output()
                    .unwrap();
                if output.status.success() {
                    sandbox.ok(&["unmount", "--all"]);
                } else {
                    failures += 1;
                    says(&String::from_utf8_lossy(&output.stderr), &["damaged"]);
                }
                assert!(sandbox.mounts().is_empty());
            }
            let is_read_by_mounts = part == "records" || file.to_string_lossy().contains("rows");
            assert!(
                failures > 0 || !is_read_by_mounts,
                "{} can be damaged unnoticed",
                file.display()
            );
            fs::write(&file, sound).unwrap();
            // The cache may hold the sound tree from now on: start with none each time.
            nothing_is_left(&sandbox);
            let _ = fs::remove_dir_all(sandbox.path("cache/grid"));
        }
    }
    nothing_is_left(&sandbox);
}

/// Runs `grid-mount` in a mount namespace of its own after `setup`.
fn in_namespace(sandbox: &Sandbox, setup: &str, arguments: &[&str]) -> std::process::Output {
    let script = format!("{setup}\nexec \"$0\" \"$@\"");
    sandbox
        .program("unshare")
        .args(["--mount", "sh", "-euc", &script, env!("CARGO_BIN_EXE_grid-mount")])
        .args(arguments)
        .output()
        .unwrap()
}

fn can_unshare(what: &str) -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        skip(what, "it needs root to make a mount namespace");
    }
    root
}

#[test]
fn no_dev_fuse() {
    if !can_unshare("a host without /dev/fuse") {
        return;
    }
    let sandbox = with_photos();
    let point = sandbox.path("mnt/point");
    let output = in_namespace(
        &sandbox,
        "mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && mknod -m 666 /dev/urandom c 1 9",
        &["alice:photos", point.to_str().unwrap()],
    );
    assert_eq!(output.status.code(), Some(1), "{}", told(&output));
    says(
        &String::from_utf8_lossy(&output.stderr),
        &["/dev/fuse", "modprobe fuse"],
    );
    assert!(!point.exists());
    nothing_is_left(&sandbox);
}

#[test]
fn no_fusermount3() {
    let Some(sandbox) = Sandbox::ordinary() else {
        return;
    };
    // A PATH with everything but fusermount3.
    let bin = sandbox.path("home/bin");
    fs::create_dir(&bin).unwrap();
    let sandbox = sandbox.env("PATH", bin.to_str().unwrap());
    let source = sandbox.path("source");
    fs::create_dir(&source).unwrap();
    sandbox.ok(&["publish", source.to_str().unwrap(), "photos"]);
    mount_fails(&sandbox, "alice:photos", &["fusermount3", "fuse3"]);
}

#[test]
fn a_full_cache_disk_is_said_and_reads_go_on() {
    if !can_unshare("a full cache disk") {
        return;
    }
    let sandbox = Sandbox::new();
    let source = sandbox.path("source");
    fs::create_dir(&source).unwrap();
    let bytes: Vec<u8> = (0..4u32 << 20).map(|i| (i >> 7) as u8).collect();
    fs::write(source.join("big"), &bytes).unwrap();
    sandbox.ok(&["publish", source.to_str().unwrap(), "photos"]);
    let point = sandbox.path("mnt/point");
    let cache = sandbox.path("cache");
    let setup = format!(
        "mount -t tmpfs -o size=2m none {cache} && export GRID_MOUNT_CACHE_MIN_FREE=0",
        cache = cache.display()
    );
    // One namespace for the agent, the reader and the unmounting.
    let script = format!(
        "{setup}
        \"$0\" alice:photos {point}
        cmp {point}/big {source}/big
        \"$0\" status --json
        \"$0\" unmount --all",
        point = point.display(),
        source = source.display()
    );
    let output = sandbox
        .program("unshare")
        .args(["--mount", "sh", "-euc", &script, env!("CARGO_BIN_EXE_grid-mount")])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", told(&output));
    // Said in `status`, and why.
    assert!(
        String::from_utf8_lossy(&output.stdout).contains("\"cache_degraded\": \"the disk"),
        "{}",
        told(&output)
    );
    nothing_is_left(&sandbox);
}

#[test]
fn unknown_settings_are_errors_with_their_line() {
    let sandbox = Sandbox::new();
    let dir = sandbox.path("home/.config/grid-mount");
    fs::create_dir_all(&dir).unwrap();
    fs::write(dir.join("config.toml"), "user = \"alice\"\ncach_dir = \"/x\"\n").unwrap();
    let said = sandbox.fails(2, &["config"]);
    says(&said, &["config.toml", "2", "cach_dir", "cache_dir"]);
}

#[test]
fn unmounting_what_is_not_mounted() {
    let sandbox = with_photos();
    says(&sandbox.fails(1, &["unmount", "alice:photos"]), &["not mounted"]);
}
