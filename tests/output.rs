//! What `--json` prints has the shape that `docs/json.md` promises: every field that comes is written down
//! there with its type, and every field that is written down comes.

#[path = "support/sandbox.rs"]
mod sandbox;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::symlink,
    path::Path,
};

use sandbox::{Sandbox, skip, told};
use serde_json::Value;

/// One section of the document: field → the types it may have.
struct Shape {
    section: &'static str,
    fields: BTreeMap<String, BTreeSet<String>>,
    seen: BTreeSet<String>,
}

impl Shape {
    fn of(section: &'static str) -> Self {
        let document =
            fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/json.md")).unwrap();
        let fields = document
            .split("\n## ")
            .find(|text| {
                text.lines()
                    .next()
                    .is_some_and(|heading| heading.contains(&format!("`{section}`")))
            })
            .unwrap_or_else(|| panic!("docs/json.md has no section `{section}`"))
            .lines()
            .filter_map(|line| {
                let mut cells = line.strip_prefix("| `")?.split('|');
                let field = cells.next()?.trim().trim_end_matches('`').to_owned();
                let types = cells.next()?.trim().split(" or ").map(str::to_owned).collect();
                Some((field, types))
            })
            .collect();
        Self {
            section,
            fields,
            seen: BTreeSet::new(),
        }
    }

    /// What was printed, parsed: it has no field that is not written down.
    fn take(&mut self, printed: &str) -> Value {
        let value: Value = serde_json::from_str(printed).unwrap_or_else(|error| panic!("{error}: {printed}"));
        self.walk("", &value);
        value
    }

    fn walk(&mut self, path: &str, value: &Value) {
        let found = match value {
            Value::Array(elements) => {
                for element in elements {
                    self.walk(&format!("{path}[]"), element);
                }
                return;
            }
            Value::Object(fields) => {
                for (name, field) in fields {
                    let joined = |name: &str| {
                        if path.is_empty() {
                            name.to_owned()
                        } else {
                            format!("{path}.{name}")
                        }
                    };
                    // A key that is data is written down as `*`.
                    let any = joined("*");
                    let is_data = self
                        .fields
                        .keys()
                        .any(|field| *field == any || field.starts_with(&format!("{any}.")));
                    self.walk(&if is_data { any } else { joined(name) }, field);
                }
                return;
            }
            Value::Null => "null",
            Value::Bool(_) => "boolean",
            Value::String(_) => "string",
            Value::Number(number) if number.is_u64() => "integer",
            Value::Number(_) => "number",
        };
        let section = self.section;
        let types = self
            .fields
            .get(path)
            .unwrap_or_else(|| panic!("docs/json.md does not tell of {path:?} in what `{section}` prints"));
        assert!(
            types.contains(found),
            "{section}: {path} is {found}, docs/json.md says {types:?}"
        );
        self.seen.insert(path.to_owned());
    }

    fn was_all_seen(self) {
        let unseen: Vec<_> = self
            .fields
            .keys()
            .filter(|field| !self.seen.contains(*field))
            .collect();
        assert!(
            unseen.is_empty(),
            "`{}` never printed these fields of docs/json.md: {unseen:?}",
            self.section
        );
    }
}

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
    mount.was_all_seen();

    let busy = status.take(&sandbox.ok(&["status", "--json"]));
    assert_eq!(busy["mounts"][0]["mount_point"], point);
    assert!(busy["agent"]["origin_requests"].as_u64().unwrap() > 0);
    status.was_all_seen();

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
    let expected =
        serde_json::json!([{ "reference": "alice:data/1", "mount_point": point, "error": null, "holds": 0 }]);
    assert_eq!(done, expected);
    assert_eq!(
        unmount.take(&sandbox.ok(&["unmount", "--all", "--json"])),
        serde_json::json!([])
    );
    // A bare name that is a mount point is one.
    sandbox.ok(&["alice:data", "mnt"]);
    let done = unmount.take(&sandbox.ok(&["unmount", "mnt", "--json"]));
    assert_eq!(done[0]["mount_point"], sandbox.path("mnt").to_str().unwrap());
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
