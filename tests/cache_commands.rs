//! `grid-mount cache …` and `grid-mount warm`, with the real binary.

#[path = "support/sandbox.rs"]
mod sandbox;

use std::{
    fs::{self, File},
    io::Read as _,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
};

use sandbox::Sandbox;
use serde_json::Value;

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

fn noise(seed: u32, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    hasher.finalize_xof().fill(&mut bytes);
    bytes
}

/// `alice:things/1`: two large files and a bundle of small ones.
fn published(sandbox: &Sandbox) -> PathBuf {
    let dir = sandbox.path("home/things");
    fs::create_dir_all(dir.join("large")).unwrap();
    fs::create_dir_all(dir.join("small")).unwrap();
    for n in 0..2 {
        fs::write(dir.join(format!("large/{n}.bin")), noise(n, 11_000_000)).unwrap();
    }
    for n in 0..20 {
        fs::write(dir.join(format!("small/{n}")), noise(100 + n, 30_000)).unwrap();
    }
    sandbox.ok(&["publish", dir.to_str().unwrap(), "things"]);
    dir
}

fn objects(dir: &Path) -> Vec<PathBuf> {
    walkdir::WalkDir::new(dir.join("objects"))
        .into_iter()
        .filter_map(Result::ok)
        .filter(|entry| entry.file_type().is_file())
        .map(walkdir::DirEntry::into_path)
        .filter(|path| path.extension().is_none())
        .collect()
}

#[test]
fn a_version_is_warmed_looked_at_checked_and_evicted() {
    let sandbox = Sandbox::new();
    published(&sandbox);
    let cache = PathBuf::from(sandbox.ok(&["cache", "path"]).trim());
    assert_eq!(cache, sandbox.path("cache/grid"));

    let large = json(&sandbox.ok(&["warm", "things", "--include", "large/0.*", "--json"]));
    assert_eq!(large["files"], 1);
    assert_eq!(large["bytes"], 11_000_000);
    assert_eq!(large["bytes_before"], 0);
    assert_eq!(large["reference"], json("\"alice:things/1\""));
    // Taken up where it was left: only the rest is fetched.
    let all = json(&sandbox.ok(&["warm", "things", "--json"]));
    assert_eq!(all["files"], 22);
    assert_eq!(all["bytes"], all["bytes_total"]);
    assert_eq!(all["bytes_before"], 11_000_000);
    let again = json(&sandbox.ok(&["warm", "alice:things/1", "--json"]));
    assert_eq!(again["bytes_before"], again["bytes_total"]);

    // The agent was there for that only; now the command opens the directory itself.
    let info = json(&sandbox.ok(&["cache", "status", "--json"]));
    assert!(info["used"].as_u64().unwrap() >= 22_000_000, "{info}");
    assert_eq!(info["objects"], 3);
    assert!(sandbox.ok(&["cache", "status"]).contains("3 objects"));
    let checked = json(&sandbox.ok(&["cache", "verify", "--json"]));
    assert_eq!(checked["damaged"], 0);
    assert_eq!(checked["objects"], 3);

    let victim = objects(&cache)
        .into_iter()
        .find(|path| path.metadata().unwrap().len() == 11_000_000)
        .unwrap();
    let file = File::options().read(true).write(true).open(victim).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 5_000_000).unwrap();
    file.write_all_at(&[!byte[0]], 5_000_000).unwrap();
    drop(file);
    let output = sandbox.grid(&["cache", "verify", "--json"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", sandbox::told(&output));
    assert!(!output.stdout.is_empty(), "{}", sandbox::told(&output));
    let checked = json(&String::from_utf8(output.stdout).unwrap());
    assert_eq!(checked["damaged"], 1, "{checked}");
    let mended = json(&sandbox.ok(&["warm", "things", "--json"]));
    assert_eq!(mended["bytes"], mended["bytes_total"]);
    assert_ne!(mended["bytes_before"], mended["bytes_total"]);

    let gone = json(&sandbox.ok(&["cache", "evict", "things", "--json"]));
    assert_eq!(gone["objects"], 3);
    assert!(gone["freed"].as_u64().unwrap() >= 22_000_000, "{gone}");
    assert!(objects(&cache).is_empty());
    sandbox.ok(&["warm", "things", "--include", "small/*"]);
    assert!(sandbox.ok(&["cache", "evict"]).contains("evicted"));
    assert!(objects(&cache).is_empty());
}

#[test]
fn what_cannot_be_warmed_says_why() {
    let sandbox = Sandbox::new().env("GRID_MOUNT_CACHE_SIZE", "16MiB");
    published(&sandbox);
    let told = sandbox.fails(1, &["warm", "things"]);
    assert!(
        told.contains("--include") && told.contains("--cache-size"),
        "{told}"
    );
    let told = sandbox.fails(1, &["warm", "things", "--include", "nothing/*"]);
    assert!(told.contains("matches nothing/*"), "{told}");
    let told = sandbox.fails(1, &["warm", "things", "--include", "a["]);
    assert!(told.contains("pattern"), "{told}");
    let told = sandbox.fails(1, &["warm", "nothing"]);
    assert!(told.contains("nothing"), "{told}");
    sandbox.fails(2, &["warm", "alice:things/0"]);
    // What fits is warmed all the same.
    sandbox.ok(&["warm", "things", "--include", "small/*"]);
}

/// Evicting under a mount costs its readers a fetch, never an answer.
#[test]
fn a_mounted_version_is_warmed_and_evicted_under_its_readers() {
    if !Path::new("/dev/fuse").exists() {
        return sandbox::skip("a mount", "there is no /dev/fuse");
    }
    let sandbox = Sandbox::new();
    let dir = published(&sandbox);
    let mount = sandbox.path("mnt/point");
    sandbox.ok(&["things", mount.to_str().unwrap()]);
    sandbox.ok(&["warm", "things"]);
    let before = sandbox.status()["agent"]["bytes_from_origin"].as_u64().unwrap();
    let mut reader = File::open(mount.join("large/0.bin")).unwrap();
    let mut start = vec![0; 1_000_000];
    reader.read_exact(&mut start).unwrap();
    assert_eq!(sandbox.status()["agent"]["bytes_from_origin"], before);
    sandbox.ok(&["cache", "evict", "things"]);
    let mut rest = Vec::new();
    reader.read_to_end(&mut rest).unwrap();
    start.extend(rest);
    assert!(start == fs::read(dir.join("large/0.bin")).unwrap());
    assert!(fs::read(mount.join("large/1.bin")).unwrap() == noise(1, 11_000_000));
    assert_eq!(json(&sandbox.ok(&["cache", "verify", "--json"]))["damaged"], 0);
    drop(reader);
    sandbox.ok(&["unmount", "--all"]);
}
