//! What `--json` prints of teams and sessions, as docs/json.md has it; and what a mount prints whose keys are lent.

#[path = "support/plane.rs"]
mod plane;
#[path = "support/s3_origin.rs"]
mod s3_origin;
#[path = "support/sandbox.rs"]
mod sandbox;
#[path = "support/shape.rs"]
mod shape;

use std::{fs, path::Path};

use plane::{Administrator, somebody};
use s3_origin::S3Origin;
use sandbox::{Sandbox, skip, told};
use shape::Shape;

#[test]
fn what_a_team_prints() {
    if !Path::new("/dev/fuse").exists() {
        return skip("a team's mounts", "there is no /dev/fuse");
    }
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let origin = runtime.block_on(S3Origin::start(Default::default()));
    let settings = origin.settings();
    let settings: Vec<(&str, String)> = settings
        .iter()
        .map(|(name, value)| (name.as_str(), value.clone()))
        .collect();
    let administrator = Administrator::new("s3://bucket/team", &settings);
    let token = administrator.person("alice");
    administrator.person("bob");
    administrator.ok(&["team", "add", "vision", "alice", "bob"]);
    let lending = administrator.sandbox.path("home/lending.toml");
    let endpoint = origin.endpoint();
    let keys = "{ AWS_ACCESS_KEY_ID = \"test\", AWS_SECRET_ACCESS_KEY = \"test\" }";
    let text = format!(
        "[[store]]\nurl = \"s3://bucket/team\"\n\
         settings = {{ AWS_ENDPOINT_URL = \"{endpoint}\", AWS_REGION = \"us-east-1\" }}\n\
         read = {keys}\nwrite = {keys}\nlifetime = 600\n"
    );
    fs::write(&lending, text).unwrap();
    let replica = administrator.serve("127.0.0.1:0", &["--credentials", lending.to_str().unwrap()]);

    let alice = somebody(&replica, &token);
    let mut team = Shape::of("team");
    let teams = team.take(&alice.ok(&["team", "--json"]));
    assert_eq!(
        teams,
        serde_json::json!([{ "name": "vision", "members": ["alice", "bob"] }])
    );
    team.was_all_seen();
    assert_eq!(alice.ok(&["team"]), "TEAM    MEMBERS\nvision  alice, bob\n");

    let source = alice.path("home/source");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("a"), "text").unwrap();
    alice.ok(&["publish", source.to_str().unwrap(), "data"]);
    let mut mount = Shape::of("mount");
    let place = alice.path("mnt/data");
    let mounted = mount.take(&alice.ok(&["data", place.to_str().unwrap(), "--json"]));
    assert_eq!(mounted["credentials"]["expired"], false, "{mounted}");
    assert_eq!(fs::read(place.join("a")).unwrap(), b"text");
    let mut status = Shape::of("status");
    let shown = status.take(&alice.ok(&["status", "--json"]));
    assert!(
        shown["mounts"][0]["credentials"]["expires"].is_string(),
        "{shown}"
    );

    // Told once the mount is there, by itself.
    let mut global = Shape::of("status --global");
    let mut leases = serde_json::json!([]);
    for _ in 0..600 {
        leases = global.take(&alice.ok(&["status", "--global", "--json"]));
        if leases.as_array().is_some_and(|leases| !leases.is_empty()) {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    assert_eq!(
        (&leases[0]["reference"], &leases[0]["user"]),
        (&"alice:data/1".into(), &"alice".into())
    );
    global.was_all_seen();
    let printed = alice.ok(&["status", "--global"]);
    assert!(
        printed.starts_with("REFERENCE") && printed.contains("alice:data/1"),
        "{printed}"
    );
    alice.ok(&["unmount", "--all"]);

    // As Grid's command line leaves it: an address, and a file with who she is.
    let grid = Sandbox::new().env("GRID_URL", &replica.url);
    let credentials = format!("{{\"UserID\": \"alice\", \"APIKey\": \"{token}\"}}");
    let nobody = || {
        grid.grid(&["list"])
            .env_remove("GRID_MOUNT_USER")
            .output()
            .unwrap()
    };
    assert!(!nobody().status.success());
    fs::create_dir(grid.path("home/.grid")).unwrap();
    fs::write(grid.path("home/.grid/credentials.json"), credentials).unwrap();
    let listed = nobody();
    assert!(
        String::from_utf8_lossy(&listed.stdout).contains("alice:data"),
        "{}",
        told(&listed)
    );
    grid.ok(&["alice:data", grid.path("mnt").to_str().unwrap()]);
    assert_eq!(fs::read(grid.path("mnt/a")).unwrap(), b"text");
    grid.ok(&["unmount", "--all"]);
    let settings = grid.ok(&["config"]);
    assert!(
        settings.contains("environment GRID_URL") && !settings.contains(&token),
        "{settings}"
    );

    // What whoever runs it sees.
    assert_eq!(administrator.ok(&["user", "list"]), "alice\nbob\n");
    assert_eq!(
        administrator.ok(&["team", "list"]),
        "TEAM    MEMBERS\nvision  alice, bob\n"
    );
    let tokens = administrator.ok(&["token", "list"]);
    assert!(
        tokens.starts_with("ID ") && !tokens.contains(token.as_str()),
        "{tokens}"
    );
}

#[test]
fn what_a_session_prints() {
    if !Path::new("/dev/fuse").exists() {
        return skip("a session's mounts", "there is no /dev/fuse");
    }
    let Some(sandbox) = Sandbox::ordinary() else {
        return;
    };
    let source = sandbox.path("source");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("a"), "text").unwrap();
    sandbox.ok(&["publish", source.to_str().unwrap(), "data"]);
    let file = sandbox.path("session.toml");
    let text = "[[datastore]]\nref = \"data\"\nprefetch = \"none\"\n\
                [[datastore]]\nref = \"missing\"\nrequired = false\n";
    fs::write(&file, text).unwrap();
    sandbox.ok(&["session", "start", "--spec", file.to_str().unwrap()]);
    let mut status = Shape::of("session status");
    let shown = status.take(&sandbox.ok(&["session", "status", "--json"]));
    let standing = |number: usize| shown["datastores"][number]["standing"].clone();
    assert_eq!((standing(0), standing(1)), ("mounted".into(), "waiting".into()));
    status.was_all_seen();
    let told = sandbox.ok(&["session", "status"]);
    assert!(
        told.contains("alice:data/1 is at ") && told.contains("missing is not at "),
        "{told}"
    );
    sandbox.ok(&["session", "stop"]);
}
