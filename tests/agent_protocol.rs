//! docs/agent.md is what the control socket does: its examples run as they stand, its tables name what is
//! taken and answered, and every error has the one form.

#[path = "support/sandbox.rs"]
mod sandbox;
#[path = "support/shape.rs"]
mod shape;

use std::{collections::BTreeSet, fs, path::Path};

use sandbox::{Sandbox, skip, told};
use serde_json::{Value, json};
use shape::Shape;

fn document() -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/agent.md")).unwrap()
}

fn section(name: &str) -> Shape {
    Shape::in_document("docs/agent.md", "\n### ", name)
}

/// With `alice:imagenet/3`, and an agent that serves `keep`.
fn sandbox() -> Option<Sandbox> {
    if !Path::new("/dev/fuse").exists() {
        skip("the control socket", "there is no /dev/fuse");
        return None;
    }
    let sandbox = Sandbox::new();
    let source = sandbox.path("source");
    fs::create_dir_all(source.join("train")).unwrap();
    fs::write(source.join("train/a"), vec![7; 300_000]).unwrap();
    for _ in 0..3 {
        sandbox.ok(&["publish", source.to_str().unwrap(), "imagenet"]);
    }
    sandbox.ok(&["imagenet/1", sandbox.path("mnt/keep").to_str().unwrap()]);
    Some(sandbox)
}

fn catalog(sandbox: &Sandbox) -> String {
    format!("file://{}", sandbox.path("data/grid-mount/catalog").display())
}

/// What curl prints, and the status.
fn curl(sandbox: &Sandbox, arguments: &str) -> (u16, String) {
    // An answer given before all of a large request was read can be lost with the connection: not every time.
    let mut tries = 0;
    loop {
        match try_curl(sandbox, arguments) {
            Ok(answer) => return answer,
            Err(_) if tries < 20 && arguments.contains("/dev/zero") => tries += 1,
            Err(failed) => panic!("{arguments}: {failed}"),
        }
    }
}

fn try_curl(sandbox: &Sandbox, arguments: &str) -> Result<(u16, String), String> {
    let line = format!(
        "cd mnt; S=$XDG_RUNTIME_DIR/grid-mount/agent.sock; curl -sS -w '\n%{{http_code}}' --unix-socket $S {arguments}"
    );
    let output = sandbox.program("sh").args(["-c", &line]).output().unwrap();
    if !output.status.success() {
        return Err(told(&output));
    }
    let printed = String::from_utf8(output.stdout).unwrap();
    let (body, status) = printed.rsplit_once('\n').unwrap();
    Ok((status.parse().unwrap(), body.to_owned()))
}

#[test]
fn the_examples_run_as_they_stand() {
    let Some(sandbox) = sandbox() else { return };
    let text = document();
    let block = text
        .split("```console\n")
        .nth(1)
        .unwrap()
        .split("```")
        .next()
        .unwrap();
    let mut asked = BTreeSet::new();
    for line in block.lines().filter(|line| line.starts_with("curl ")) {
        let arguments = line
            .strip_prefix("curl --unix-socket $S ")
            .unwrap_or_else(|| panic!("{line}"))
            .replace("s3://team/catalog", &catalog(&sandbox));
        let (status, body) = curl(&sandbox, &arguments);
        assert_eq!(status, 200, "{line}: {body}");
        let path = line
            .split("http://localhost")
            .nth(1)
            .unwrap()
            .split(' ')
            .next()
            .unwrap();
        let method = match line.contains("--json") || line.contains("POST") {
            true => "POST",
            false => "GET",
        };
        asked.insert(format!("{method} {path}"));
        let value = || serde_json::from_str::<Value>(&body).unwrap_or_else(|error| panic!("{error}: {body}"));
        // Lines, the last of which says what came of it.
        let last = || {
            let line: Value = serde_json::from_str(body.trim().lines().last().unwrap()).unwrap();
            line["done"].clone()
        };
        match (method, path) {
            ("GET", "/v1/agent") => {
                let mut shape = section("GET /v1/agent");
                shape.take(&body);
                // null stands for those that have nothing to say here.
                shape.was_all_seen();
            }
            ("POST", "/v1/mounts") => {
                Shape::of("mount").take(&body);
                assert_eq!(
                    fs::read(sandbox.path("mnt/imagenet/train/a")).unwrap().len(),
                    300_000
                );
            }
            ("GET", "/v1/mounts") => assert_eq!(value().as_array().unwrap().len(), 2),
            ("GET", "/v1/cache") => {
                let mut shape = Shape::of("cache status");
                shape.take(&body);
                shape.was_all_seen();
            }
            // Nothing records.
            ("POST", "/v1/profiles") => assert_eq!(value(), serde_json::json!([])),
            ("POST", "/v1/warm") => {
                let mut shape = Shape::of("warm");
                shape.take(&last().to_string());
                shape.was_all_seen();
            }
            ("POST", "/v1/cache/verify") => {
                let mut shape = Shape::of("cache verify");
                shape.take(&last().to_string());
                shape.was_all_seen();
            }
            ("POST", "/v1/cache/evict") => {
                let mut shape = Shape::of("cache evict");
                shape.take(&body);
                shape.was_all_seen();
            }
            ("POST", "/v1/reload") => {
                let mut shape = section("POST /v1/reload");
                shape.take(&body);
            }
            ("POST", "/v1/unmount") => {
                Shape::of("unmount").take(&body);
                assert!(!sandbox.path("mnt/imagenet").exists(), "{body}");
            }
            ("GET", "/metrics") => assert!(body.contains("grid_mount_mounts 2"), "{body}"),
            other => panic!("{other:?} is not looked at"),
        }
    }
    // The table has what the examples have, and the program nothing more.
    let table: BTreeSet<String> = text
        .lines()
        .filter_map(|line| line.strip_prefix("| `"))
        .filter(|line| line.starts_with("GET ") || line.starts_with("POST "))
        .map(|line| line.split('`').next().unwrap().to_owned())
        .collect();
    assert_eq!(asked, table);
    let server =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/agent/server.rs")).unwrap();
    let mut served = BTreeSet::new();
    for line in server
        .lines()
        .filter_map(|line| line.trim().strip_prefix(".route(\""))
    {
        let (path, methods) = line.split_once('"').unwrap();
        for (function, method) in [("get(", "GET"), ("post(", "POST")] {
            if methods.contains(function) {
                served.insert(format!("{method} {path}"));
            }
        }
    }
    assert_eq!(served, table);
}

/// The names that an error says it would have taken.
fn expected(message: &str) -> BTreeSet<String> {
    let (_, list) = message
        .split_once("expected")
        .unwrap_or_else(|| panic!("{message}"));
    list.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

/// The first or second part of the names in a table.
fn documented(section: &str, below: Option<&str>) -> BTreeSet<String> {
    let shape = self::section(section);
    shape
        .fields
        .keys()
        .filter_map(|field| match below {
            None => field.split('.').next(),
            Some(below) => field.strip_prefix(below)?.strip_prefix('.')?.split('.').next(),
        })
        .map(str::to_owned)
        .collect()
}

#[test]
fn the_tables_name_what_is_taken() {
    let Some(sandbox) = sandbox() else { return };
    let asked = |path: &str, body: Value| {
        let (status, answer) = curl(&sandbox, &format!("http://localhost{path} --json '{body}'"));
        assert_eq!(status, 422, "{answer}");
        let answer: Value = serde_json::from_str(&answer).unwrap();
        answer["message"].as_str().unwrap().to_owned()
    };
    for (path, below, body) in [
        ("/v1/mounts", None, json!({ "what": 1 })),
        ("/v1/unmount", None, json!({ "what": 1 })),
        ("/v1/warm", None, json!({ "what": 1 })),
        ("/v1/warm", Some("version"), json!({ "version": { "what": 1 } })),
        ("/v1/cache/evict", None, json!({ "what": 1 })),
        (
            "/v1/cache/evict",
            Some("version"),
            json!({ "version": { "what": 1 } }),
        ),
    ] {
        let taken = expected(&asked(path, body));
        assert_eq!(
            taken,
            documented(&format!("POST {path}"), below),
            "{path} {below:?}"
        );
    }
    let mut targets = expected(&asked("/v1/unmount", json!({ "target": "what", "lazy": false })));
    assert!(targets.remove("all"));
    assert_eq!(targets, documented("POST /v1/unmount", Some("target")));
    // Whatever is left out.
    let whole = json!({
        "reference": "alice:imagenet/3", "mount_point": sandbox.path("mnt/x"), "catalog": catalog(&sandbox),
        "user": "alice", "store_settings": {}, "io_mode": "auto",
    });
    for field in whole.as_object().unwrap().keys() {
        let mut body = whole.clone();
        body.as_object_mut().unwrap().remove(field);
        let message = asked("/v1/mounts", body);
        assert!(message.contains(&format!("`{field}`")), "{message}");
    }
}

#[test]
fn every_error_has_one_form() {
    let Some(sandbox) = sandbox() else { return };
    let json = "-H 'content-type: application/json'";
    for (arguments, status, word) in [
        ("http://localhost/".to_owned(), 404, "there is no /"),
        (
            "http://localhost/v1/nothing -X POST".to_owned(),
            404,
            "/v1/nothing",
        ),
        ("http://localhost/v1/mounts -X DELETE".to_owned(), 405, "DELETE"),
        ("http://localhost/v1/agent -X POST".to_owned(), 405, "POST"),
        (
            format!("http://localhost/v1/mounts {json} -d 'no json'"),
            400,
            "JSON",
        ),
        (
            "http://localhost/v1/mounts -H 'content-type: text/plain' -d '{}'".to_owned(),
            415,
            "application/json",
        ),
        (
            format!("http://localhost/v1/mounts {json} -d \"$(head -c 70000 /dev/zero | tr '\\0' ' ')\""),
            413,
            "65536 bytes",
        ),
        (
            format!(
                "http://localhost/v1/unmount {json} -d '{{\"target\": {{\"mount-point\": \"/no/such\"}}, \"lazy\": false}}'"
            ),
            422,
            "/no/such is not mounted",
        ),
    ] {
        let (found, body) = curl(&sandbox, &arguments);
        assert_eq!(found, status, "{arguments}: {body}");
        let body: Value = serde_json::from_str(&body).unwrap_or_else(|error| panic!("{error}: {body}"));
        let fields: Vec<&String> = body.as_object().unwrap().keys().collect();
        assert_eq!(fields, ["message"], "{body}");
        assert!(body["message"].as_str().unwrap().contains(word), "{body}");
        // It is written down.
        assert!(
            document().contains(&found.to_string()),
            "docs/agent.md has no {found}"
        );
    }
}
