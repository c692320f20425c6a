//! One agent of root's, several users: each sees, reads and unmounts what is theirs, mounts only where they
//! could have made the directory, and gets nothing that they could not have got without it.

#[path = "support/sandbox.rs"]
mod sandbox;
#[path = "support/shared_agent.rs"]
mod shared_agent;

use std::{fs, path::Path, process::Output};

use sandbox::told;
use shared_agent::{SharedAgent, said};

const ALICE: u32 = 40_001;
const BOB: u32 = 40_002;

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn refused(output: &Output) -> String {
    assert!(!output.status.success(), "{}", told(output));
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn users_have_their_mounts_to_themselves() {
    let Some(agent) = SharedAgent::start("catalogs = [\"CATALOG\"]") else {
        return;
    };
    agent.publish("data", &[("file", "some text\n"), ("dir/deep", "more\n")]);
    let alices = agent.home(ALICE).join("data");
    let bobs = agent.home(BOB).join("new/data");
    agent.ok(ALICE, &["root:data", path(&alices)]);
    agent.ok(BOB, &["root:data", path(&bobs)]);

    let read = |uid, file: &Path| agent.of_user(uid, "cat").arg(file).output().unwrap();
    assert_eq!(said(&read(ALICE, &alices.join("file"))), "some text\n");
    assert_eq!(said(&read(BOB, &bobs.join("dir/deep"))), "more\n");
    let owner = agent
        .of_user(ALICE, "stat")
        .args(["-c", "%u %g"])
        .arg(alices.join("file"))
        .output()
        .unwrap();
    assert_eq!(said(&owner).trim(), format!("{ALICE} {ALICE}"));
    // Not even with the directory above open to all does another user get in, nor root.
    fs::set_permissions(
        agent.home(ALICE),
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )
    .unwrap();
    assert!(refused(&read(BOB, &alices.join("file"))).contains("Permission denied"));
    assert!(fs::read(alices.join("file")).is_err());

    assert_eq!(agent.mount_points(ALICE), [alices.as_path()]);
    assert_eq!(agent.mount_points(BOB), [bobs.as_path()]);
    assert_eq!(agent.mount_points(0).len(), 2);
    assert_eq!(agent.status(0)["mounts"][0]["owner"], ALICE);
    // The directories on the way are Bob's, as if he had made them.
    let made = fs::metadata(bobs.parent().unwrap()).unwrap();
    assert_eq!(std::os::unix::fs::MetadataExt::uid(&made), BOB);

    let flags = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let line = flags.lines().find(|line| line.contains(path(&alices))).unwrap();
    assert!(
        line.contains("ro,nosuid,nodev")
            && line.contains(&format!("user_id={ALICE}"))
            && !line.contains("allow_other"),
        "{line}"
    );

    // Nor is it said what she has there.
    let told = agent.fails(BOB, &["unmount", path(&alices)]);
    assert!(told.contains("not mounted"), "{told}");
    agent.ok(BOB, &["unmount", "root:data"]);
    agent.ok(BOB, &["unmount", "--all"]);
    assert_eq!(agent.mount_points(ALICE), [alices.as_path()]);
    assert!(
        !bobs.parent().unwrap().exists(),
        "what was made for it goes with it"
    );
    assert_eq!(said(&read(ALICE, &alices.join("file"))), "some text\n");
    // Root can.
    agent.ok(0, &["unmount", path(&alices)]);
    assert!(agent.mounts().is_empty());
}

#[test]
fn a_mount_point_is_what_the_caller_could_have_made() {
    let Some(agent) = SharedAgent::start("catalogs = [\"CATALOG\"]") else {
        return;
    };
    agent.publish("data", &[("file", "text\n")]);
    let bobs = agent.home(BOB).join("empty");
    fs::create_dir(&bobs).unwrap();
    std::os::unix::fs::chown(&bobs, Some(BOB), Some(BOB)).unwrap();
    fs::set_permissions(
        agent.home(BOB),
        std::os::unix::fs::PermissionsExt::from_mode(0o777),
    )
    .unwrap();
    let full = agent.home(ALICE).join("full");
    fs::create_dir(&full).unwrap();
    fs::write(full.join("x"), "").unwrap();
    std::os::unix::fs::chown(&full, Some(ALICE), Some(ALICE)).unwrap();
    let link = agent.home(ALICE).join("link");
    std::os::unix::fs::symlink("/etc", &link).unwrap();
    let above = agent.path("home/not-hers");
    for (place, word) in [
        (bobs.as_path(), "another user"),
        (Path::new("/etc"), "another user"),
        (Path::new("/root/x"), "Permission denied"),
        (Path::new("/etc/x"), "Permission denied"),
        (above.as_path(), "Permission denied"),
        (full.as_path(), "not empty"),
        (Path::new("/proc/1"), "kernel's own"),
        (Path::new("/"), "another user"),
    ] {
        let told = agent.fails(ALICE, &["root:data", path(place)]);
        assert!(told.contains(word), "{}: {told}", place.display());
    }
    // The command line resolves its links; a request that has one left is refused.
    let body = serde_json::json!({
        "reference": "root:data", "mount_point": link.join("x"), "catalog": agent.catalog(),
        "user": "root", "store_settings": {}, "io_mode": "auto",
    });
    let asked = agent
        .of_user(ALICE, "curl")
        .args([
            "-sS",
            "--unix-socket",
            path(&agent.socket()),
            "-H",
            "content-type: application/json",
        ])
        .args(["-d", &body.to_string(), "http://localhost/v1/mounts"])
        .output()
        .unwrap();
    assert!(said(&asked).contains("symbolic link"), "{}", told(&asked));
    assert!(agent.mounts().is_empty());
    // A directory in /tmp is whose it is.
    let in_tmp = tempfile::tempdir().unwrap();
    std::os::unix::fs::chown(in_tmp.path(), Some(ALICE), Some(ALICE)).unwrap();
    agent.ok(ALICE, &["root:data", path(in_tmp.path())]);
    agent.ok(ALICE, &["unmount", path(in_tmp.path())]);
}

#[test]
fn sharing_is_with_whom_it_says() {
    let Some(agent) = SharedAgent::start("catalogs = [\"CATALOG\"]") else {
        return;
    };
    let source = agent.path("source-modes");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("private"), "p").unwrap();
    fs::set_permissions(
        source.join("private"),
        std::os::unix::fs::PermissionsExt::from_mode(0o600),
    )
    .unwrap();
    agent.publish("modes", &[]);
    for user in [ALICE, BOB] {
        fs::set_permissions(
            agent.home(user),
            std::os::unix::fs::PermissionsExt::from_mode(0o755),
        )
        .unwrap();
    }
    let read = |uid: u32, group: u32, file: &Path| {
        let output = std::process::Command::new("setpriv")
            .args([format!("--reuid={uid}"), format!("--regid={group}")])
            .args(["--clear-groups", "--", "cat"])
            .arg(file)
            .output()
            .unwrap();
        output.status.success()
    };
    for (share, [group, other]) in [("group", [true, false]), ("all", [true, true])] {
        let place = agent.home(ALICE).join(share);
        agent.ok(ALICE, &["root:modes", path(&place), "--share", share]);
        let file = place.join("private");
        assert!(read(ALICE, ALICE, &file));
        assert_eq!(read(BOB, ALICE, &file), group, "{share}");
        assert_eq!(read(BOB, BOB, &file), other, "{share}");
        // Seen by others, it is still hers.
        assert!(agent.mount_points(BOB).is_empty());
        agent.fails(BOB, &["unmount", path(&place)]);
        agent.ok(ALICE, &["unmount", path(&place)]);
    }
}

/// A record of the catalog's, changed; as whoever may write to the catalog could.
fn plant(agent: &SharedAgent, from: &str, name: &str, change: impl Fn(&mut serde_json::Value)) {
    let catalog = agent.path("catalog");
    let mut found = Vec::new();
    let mut dirs = vec![catalog.clone()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => dirs.push(path),
                false => found.push(path),
            }
        }
    }
    for path in found {
        let Ok(bytes) = fs::read(&path) else { continue };
        let Ok(mut sealed) = serde_json::from_slice::<serde_json::Value>(&bytes) else {
            continue;
        };
        let mut record = sealed["record"].take();
        if record["datastore"] != from {
            continue;
        }
        record["datastore"] = name.into();
        change(&mut record);
        let below = path.strip_prefix(&catalog).unwrap().to_str().unwrap();
        let copy = catalog.join(below.replace(from, name));
        fs::create_dir_all(copy.parent().unwrap()).unwrap();
        let record: grid_mount::catalog::Record = serde_json::from_value(record).unwrap();
        fs::write(
            copy,
            grid_mount::catalog::sealed::seal("record", &record).unwrap(),
        )
        .unwrap();
        return;
    }
    panic!("no record of {from}");
}

#[test]
fn a_record_that_names_what_is_not_listed_gets_nothing() {
    let ambient = [
        ("AWS_ACCESS_KEY_ID", "the-agents-key"),
        ("AWS_SECRET_ACCESS_KEY", "the-agents-secret"),
    ];
    let rules = "catalogs = [\"CATALOG\"]\norigins = [\"s3://own-team\"]";
    let Some(agent) = SharedAgent::start_with(rules, &[], &ambient) else {
        return;
    };
    // A registered directory has the form of an attack: a tree whose files are files of the host.
    let secrets = agent.path("secrets");
    fs::create_dir(&secrets).unwrap();
    fs::write(secrets.join("shadow"), "root's secret").unwrap();
    fs::set_permissions(&secrets, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    agent.ok(0, &["register", path(&secrets), "secrets"]);
    let home = agent.home(ALICE).join("x");
    let listens = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let server = format!("http://{}", listens.local_addr().unwrap());
    let told = agent.fails(ALICE, &["root:secrets", path(&home)]);
    assert!(told.contains("origins"), "{told}");
    for (name, origin) in [
        ("etc", "file:///etc"),
        ("root", "file:///"),
        ("metadata", "http://169.254.169.254/latest"),
        ("server", server.as_str()),
        ("others", "s3://other-team/data"),
        ("beside", "s3://own-team-2"),
    ] {
        plant(&agent, "secrets", name, |record| {
            record["origin"] = serde_json::json!({ "url": origin });
        });
        for user in [ALICE, 0] {
            let told = agent.fails(user, &[&format!("root:{name}"), path(&home)]);
            assert!(told.contains("origins") && told.contains(origin), "{told}");
        }
    }
    // A catalog of one's own is no way round, nor is a link beside the one that is listed.
    let own = agent.home(ALICE).join("catalog");
    for catalog in [
        format!("file://{}", own.display()),
        server.clone(),
        "file:///etc".to_owned(),
        format!("{}/trees", agent.catalog()),
        "s3://own-team/catalog".to_owned(),
    ] {
        let told = agent.fails(ALICE, &["root:secrets", path(&home), "--catalog", &catalog]);
        assert!(told.contains("catalogs"), "{told}");
    }
    // Nobody was asked anything, with or without credentials.
    listens.set_nonblocking(true).unwrap();
    assert!(listens.accept().is_err());
    assert!(agent.mounts().is_empty() && !home.exists());
    assert!(!agent.log().contains("the-agents-secret"));
}

#[test]
fn a_callers_endpoint_gets_the_callers_credentials_and_no_others() {
    use std::io::{Read, Write};
    let ambient = [
        ("AWS_ACCESS_KEY_ID", "the-agents-key"),
        ("AWS_SECRET_ACCESS_KEY", "the-agents-secret"),
    ];
    let listens = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let server = format!("http://{}", listens.local_addr().unwrap());
    let rules = format!("catalogs = [\"s3://team\"]\nendpoints = [\"{server}\"]");
    let Some(agent) = SharedAgent::start_with(&rules, &[], &ambient) else {
        return;
    };
    // Says no to everything, and keeps what it was asked.
    let (sender, asked) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for stream in listens.incoming() {
            let Ok(mut stream) = stream else { return };
            let mut head = Vec::new();
            let mut byte = [0];
            while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte).is_ok_and(|read| read > 0) {
                head.push(byte[0]);
            }
            let _ =
                stream.write_all(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
            if sender.send(String::from_utf8_lossy(&head).into_owned()).is_err() {
                return;
            }
        }
    });
    let home = agent.home(ALICE).join("x");
    let mount = |settings: &[(&str, &str)]| {
        let arguments = ["root:data", path(&home), "--catalog", "s3://team"];
        let output = agent
            .grid(ALICE, &arguments)
            .envs(settings.iter().copied())
            .output()
            .unwrap();
        refused(&output)
    };
    let told = mount(&[("AWS_ENDPOINT_URL", &server)]);
    assert!(told.contains("credentials"), "{told}");
    assert!(
        asked.try_recv().is_err(),
        "asked for somebody without credentials"
    );
    let hers = [
        ("AWS_ENDPOINT_URL", server.as_str()),
        ("AWS_ACCESS_KEY_ID", "alices-key"),
        ("AWS_SECRET_ACCESS_KEY", "alices-secret"),
    ];
    mount(&hers);
    let head = asked.recv_timeout(shared_agent::DEADLINE).unwrap();
    assert!(
        head.contains("Credential=alices-key/") && !head.contains("the-agents"),
        "{head}"
    );
    let other = [("AWS_ENDPOINT_URL", "http://169.254.169.254"), hers[1], hers[2]];
    let told = mount(&other);
    assert!(told.contains("endpoints"), "{told}");
    // What would make the agent read a file for her is not taken along.
    let told = mount(&[
        ("AWS_WEB_IDENTITY_TOKEN_FILE", "/etc/shadow"),
        ("AWS_ROLE_ARN", "arn:x"),
    ]);
    assert!(told.contains("AWS_"), "{told}");
}
