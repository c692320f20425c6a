//! What `--json` prints has the shape that `docs/json.md` promises: every field that comes is written down
//! there with its type, and every field that is written down comes.

#[path = "support/sandbox.rs"]
mod sandbox;
#[path = "support/shape.rs"]
mod shape;

use std::{fs, os::unix::fs::symlink, path::Path};

use sandbox::{Sandbox, skip, told};
use serde_json::Value;
use shape::Shape;

fn source(sandbox: &Sandbox) -> String {
    let source = sandbox.path("source");
    fs::create_dir_all(source.join("sub")).unwrap();
    fs::write(source.join("a"), "one").unwrap();
    fs::write(source.join("sub/b"), vec![7; 200_000]).unwrap();
    symlink("a", source.join("link")).unwrap();
    source.to_str().unwrap().to_owned()
}

#[test]
fn what_the_catalog_commands_print() {
    let sandbox = Sandbox::new();
    let source = source(&sandbox);
    nix::unistd::mkfifo(&sandbox.path("source/fifo"), nix::sys::stat::Mode::S_IRUSR).unwrap();

    let mut publish = Shape::of("publish");
    let first = publish.take(&sandbox.ok(&["publish", &source, "data", "--message", "why", "--json"]));
    assert_eq!(first["reference"], "alice:data/1");
    assert_eq!(first["record"]["message"], "why");
    assert_eq!(first["record"]["origin"], "catalog");
    assert_eq!(first["record"]["totals"]["bytes"], 200_003);
    assert_eq!(first["report"]["previous"], Value::Null);
    assert_eq!(
        first["report"]["skipped"]["reasons"]["special"]["examples"][0],
        "fifo"
    );
    let second = publish.take(&sandbox.ok(&["publish", &source, "data", "--json"]));
    assert_eq!(
        (
            &second["report"]["previous"],
            &second["report"]["uploaded_objects"]
        ),
        (&1.into(), &0.into())
    );
    fs::remove_file(sandbox.path("source/fifo")).unwrap();
    let url = format!("file://{source}");
    let registered = publish.take(&sandbox.ok(&["register", &url, "given", "--json"]));
    assert_eq!(registered["reference"], "alice:given/1");
    assert_eq!(registered["record"]["origin"]["url"], url.as_str());
    publish.was_all_seen();

    let mut list = Shape::of("list");
    let listed = list.take(&sandbox.ok(&["list", "--json"]));
    let expected = serde_json::json!([
        { "name": "alice:data", "latest": 2 },
        { "name": "alice:given", "latest": 1 },
    ]);
    assert_eq!(listed, expected);
    list.was_all_seen();

    sandbox.ok(&["alias", "data/1", "prod"]);
    let mut info = Shape::of("info");
    let shown = info.take(&sandbox.ok(&["info", "data/prod", "--json"]));
    // The record as it was published, and what is known of its datastore.
    for (field, value) in first["record"].as_object().unwrap() {
        assert_eq!(shown[field], *value, "{field}");
    }
    assert_eq!(shown["versions"], serde_json::json!([1, 2]));
    assert_eq!(
        shown["aliases"],
        serde_json::json!([{ "alias": "prod", "version": 1 }])
    );
    let shown = info.take(&sandbox.ok(&["info", "given", "--json"]));
    assert_eq!(shown["origin_url"], url.as_str());
    info.was_all_seen();

    let mut config = Shape::of("config");
    let settings = config.take(&sandbox.ok(&["config", "--json"]));
    let user = settings
        .as_array()
        .unwrap()
        .iter()
        .find(|setting| setting["key"] == "user")
        .unwrap();
    assert_eq!(user["value"], "alice");
    assert!(
        user["source"].as_str().unwrap().contains("GRID_MOUNT_USER"),
        "{user}"
    );
    config.was_all_seen();

    // Grid's own file says who somebody is, and its key is never shown.
    let home = sandbox.path("home/.grid");
    fs::create_dir(&home).unwrap();
    let credentials = r#"{"UserID": "grid-user", "APIKey": "hush-hush"}"#;
    fs::write(home.join("credentials.json"), credentials).unwrap();
    let asked = |arguments: &[&str]| {
        let output = sandbox
            .grid(arguments)
            .env_remove("GRID_MOUNT_USER")
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", told(&output));
        String::from_utf8(output.stdout).unwrap()
    };
    for shown in [asked(&["config"]), asked(&["config", "--json"])] {
        assert!(
            shown.contains("grid-user") && shown.contains(".grid/credentials.json"),
            "{shown}"
        );
        assert!(shown.contains("(set)") && !shown.contains("hush"), "{shown}");
    }
}

#[test]
fn what_the_mount_commands_print() {
    if !Path::new("/dev/fuse").exists() {
        skip("the shape of mount, status and unmount", "there is no /dev/fuse");
        return;
    }
    let sandbox = Sandbox::new();
    let source = source(&sandbox);
    sandbox.ok(&["publish", &source, "data"]);
    let point = sandbox.path("mnt/point");
    let point = point.to_str().unwrap();

    let mut status = Shape::of("status");
    let idle = status.take(&sandbox.ok(&["status", "--json"]));
    assert_eq!(idle, serde_json::json!({ "agent": null, "mounts": [] }));

    let mut mount = Shape::of("mount");
    let mounted = mount.take(&sandbox.ok(&["data", point, "--json"]));
    assert_eq!(
        (&mounted["reference"], &mounted["requested"]),
        (&"alice:data/1".into(), &"data".into())
    );
    assert_eq!(
        (&mounted["mount_point"], &mounted["already_mounted"]),
        (&point.into(), &false.into())
    );
    assert_eq!(fs::read(Path::new(point).join("a")).unwrap(), b"one");
    let again = mount.take(&sandbox.ok(&["mount", "data", point, "--json"]));
    assert_eq!(again["already_mounted"], true);
    mount.was_all_seen_but("credentials.");

    let busy = status.take(&sandbox.ok(&["status", "--json"]));
    assert_eq!(busy["mounts"][0]["mount_point"], point);
    assert!(busy["agent"]["origin_requests"].as_u64().unwrap() > 0);
    let traffic = &busy["mounts"][0]["traffic"];
    // What was fetched for the one mount is all that was fetched.
    assert_eq!(traffic["origin_requests"], busy["agent"]["origin_requests"]);
    assert_eq!(traffic["bytes_from_origin"], busy["agent"]["bytes_from_origin"]);
    assert!(traffic["bytes_read"].as_u64().unwrap() >= 3, "{traffic}");
    assert_eq!(busy["mounts"][0]["newer_version"], Value::Null);
    assert_eq!(busy["mounts"][0]["owner"], nix::unistd::geteuid().as_raw());
    assert_eq!(fs::read(Path::new(point).join("sub/b")).unwrap().len(), 200_000);
    sandbox.ok(&["publish", &source, "data"]);
    let newer = status.take(&sandbox.ok(&["status", "data", "--json"]));
    assert_eq!(newer["mounts"][0]["newer_version"], 2);
    status.was_all_seen_but("mounts[].credentials.");
    let shown = sandbox.ok(&["status"]);
    for told in [
        "alice:data/1 at ",
        "you are on 1, 2 exists",
        " by alice (uid ",
        "% in the cache",
        "readers waited",
    ] {
        assert!(shown.contains(told), "no {told:?} in:\n{shown}");
    }
    assert!(!shown.contains('\u{1b}'), "{shown}");
    let refused = sandbox.fails(1, &["status", "nothing"]);
    assert!(refused.contains("nothing is not mounted"), "{refused}");

    let mut unmount = Shape::of("unmount");
    // `data` is also a directory right here, which is no mount point: the reference is meant.
    assert!(sandbox.path("data").is_dir());
    let held = fs::File::open(Path::new(point).join("a")).unwrap();
    let output = sandbox.grid(&["unmount", "data", "--json"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", told(&output));
    let refused = unmount.take(std::str::from_utf8(&output.stdout).unwrap());
    assert!(
        refused[0]["error"].as_str().unwrap().contains("in use"),
        "{refused}"
    );
    drop(held);
    let done = unmount.take(&sandbox.ok(&["unmount", "data", "--json"]));
    let done = &done[0];
    assert_eq!(
        (
            &done["reference"],
            &done["mount_point"],
            &done["error"],
            &done["holds"]
        ),
        (&"alice:data/1".into(), &point.into(), &Value::Null, &0.into())
    );
    // Nothing was read twice.
    assert_eq!(done["report"]["suggested_cache_bytes"], Value::Null);
    assert!(done["report"]["distinct_bytes"].as_u64().unwrap() >= 200_003);
    assert!(!done["report"]["slowest"].as_array().unwrap().is_empty());
    assert_eq!(
        unmount.take(&sandbox.ok(&["unmount", "--all", "--json"])),
        serde_json::json!([])
    );
    // A bare name that is a mount point is one.
    sandbox.ok(&["alice:data", "mnt"]);
    let done = unmount.take(&sandbox.ok(&["unmount", "mnt", "--json"]));
    assert_eq!(done[0]["mount_point"], sandbox.path("mnt").to_str().unwrap());
    sandbox.ok(&["alice:data", "mnt"]);
    let told = sandbox.ok(&["unmount", "mnt", "--report"]);
    assert!(
        told.contains("no longer at") && told.contains("nothing was read"),
        "{told}"
    );
    unmount.was_all_seen();
}

#[test]
fn what_the_cache_commands_print() {
    let sandbox = Sandbox::new();
    let source = source(&sandbox);
    sandbox.ok(&["publish", &source, "data"]);

    let mut warm = Shape::of("warm");
    let warmed = warm.take(&sandbox.ok(&["warm", "data", "--json"]));
    assert_eq!(
        (&warmed["reference"], &warmed["bytes"]),
        (&"alice:data/1".into(), &warmed["bytes_total"])
    );
    warm.was_all_seen();

    let mut status = Shape::of("cache status");
    assert!(
        status.take(&sandbox.ok(&["cache", "status", "--json"]))["used"]
            .as_u64()
            .unwrap()
            >= 200_000
    );
    status.was_all_seen();

    let mut verify = Shape::of("cache verify");
    assert_eq!(
        verify.take(&sandbox.ok(&["cache", "verify", "--json"]))["damaged"],
        0
    );
    verify.was_all_seen();

    let mut evict = Shape::of("cache evict");
    assert_eq!(
        evict.take(&sandbox.ok(&["cache", "evict", "data", "--json"]))["reference"],
        "alice:data/1"
    );
    assert_eq!(
        evict.take(&sandbox.ok(&["cache", "evict", "--json"]))["reference"],
        Value::Null
    );
    evict.was_all_seen();

    let path: String = serde_json::from_str(&sandbox.ok(&["cache", "path", "--json"])).unwrap();
    assert_eq!(Path::new(&path), sandbox.path("cache/grid"));
}

/// A line for each second, until nobody reads any more.
#[test]
fn a_watched_status_goes_on_and_ends_with_its_reader() {
    use std::io::{BufRead as _, BufReader};
    let sandbox = Sandbox::new();
    let mut watching = sandbox
        .grid(&["status", "--watch", "--json"])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(watching.stdout.take().unwrap()).lines();
    for _ in 0..2 {
        let line: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
        assert_eq!(line, serde_json::json!({ "agent": null, "mounts": [] }));
    }
    drop(lines);
    assert!(watching.wait().unwrap().success());
}

#[test]
fn what_doctor_prints() {
    let sandbox = Sandbox::new();
    let mut doctor = Shape::of("doctor");
    // What is wrong with this host, or mounted on it, is not this test's concern.
    let output = sandbox.grid(&["doctor", "--json"]).output().unwrap();
    assert!(matches!(output.status.code(), Some(0 | 1)), "{}", told(&output));
    let findings = doctor.take(std::str::from_utf8(&output.stdout).unwrap());
    let findings = findings.as_array().unwrap();
    let of = |check: &str| findings.iter().find(|finding| finding["check"] == check);
    for check in [
        "kernel",
        "dev-fuse",
        "fusermount3",
        "open-files",
        "cache-directory",
        "cache-space",
        "cache-speed",
        "cache-holes",
        "mounts",
    ] {
        assert!(of(check).is_some(), "no {check} in {findings:?}");
    }
    assert_eq!(of("catalog").unwrap()["verdict"], "good");
    let is_bad = findings.iter().any(|finding| finding["verdict"] == "bad");
    assert_eq!(output.status.code(), Some(i32::from(is_bad)));

    let nowhere = ["doctor", "--json", "--catalog", "file:///no/such/catalog"];
    let output = sandbox.grid(&nowhere).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", told(&output));
    let findings = doctor.take(std::str::from_utf8(&output.stdout).unwrap());
    let catalog = &findings.as_array().unwrap().iter();
    let catalog = catalog
        .clone()
        .find(|finding| finding["check"] == "catalog")
        .unwrap();
    assert_eq!(
        (&catalog["verdict"], &catalog["fix"]),
        (&"bad".into(), &"no".into())
    );
    assert!(
        catalog["mend"].as_str().unwrap().contains("--catalog"),
        "{catalog}"
    );
    doctor.was_all_seen();

    let output = sandbox.grid(&["doctor"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.contains("kernel: Linux ") && !text.contains('\u{1b}'),
        "{text}"
    );
}

/// Every command that prints JSON has its section, and each of these files a test of it.
#[test]
fn every_shape_is_written_down_and_looked_at() {
    let sandbox = Sandbox::new();
    let dir = sandbox.path("man");
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let document = fs::read_to_string(root.join("docs/json.md")).unwrap();
    let tests: String = ["output.rs", "output_team.rs", "agent_protocol.rs", "profile.rs"]
        .map(|file| fs::read_to_string(root.join("tests").join(file)).unwrap())
        .concat();
    for page in sandbox.ok(&["man", "--dir", dir.to_str().unwrap()]).lines() {
        let text = fs::read_to_string(page).unwrap().replace("\\-", "-");
        let name = Path::new(page).file_stem().unwrap().to_str().unwrap();
        let command = name.trim_start_matches("grid-mount").trim_start_matches('-');
        if command.is_empty() || !text.contains("\\fB--json\\fR") {
            continue;
        }
        // One word of two for the commands below a command.
        let command = match command.split_once('-') {
            Some((above @ ("cache" | "session" | "catalog" | "profile"), below)) => {
                format!("{above} {below}")
            }
            _ => command.to_owned(),
        };
        if command == "cache path" {
            continue;
        }
        let heading = document
            .lines()
            .find(|line| line.starts_with("## ") && line.contains(&format!("`{command}`")));
        let heading = heading.unwrap_or_else(|| panic!("docs/json.md has no section `{command}`"));
        let looked_at = heading
            .split('`')
            .skip(1)
            .step_by(2)
            .any(|name| tests.contains(&format!("Shape::of(\"{name}\")")));
        assert!(looked_at, "no test looks at the shape of {command}");
    }
}
