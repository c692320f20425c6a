//! A team on one control plane: who publishes, who mounts, who is refused, on a real S3 server and through
//! two replicas. People have a token and no keys: what they read and write with is lent.

#[path = "support/compare.rs"]
mod compare;
#[path = "support/plane.rs"]
mod plane;
#[path = "support/sandbox.rs"]
mod sandbox;
#[path = "support/weed.rs"]
mod weed;

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use compare::assert_same_tree;
use plane::{Administrator, somebody};
use sandbox::{Sandbox, skip};
use weed::Weed;

fn data(dir: &Path) {
    fs::create_dir_all(dir.join("sub")).unwrap();
    fs::write(dir.join("hello.txt"), "hello\n").unwrap();
    fs::write(
        dir.join("sub/big"),
        (0..3_000_000u32).map(|i| (i * 7 / 3) as u8).collect::<Vec<_>>(),
    )
    .unwrap();
}

/// Which keys the control plane lends: other ones to readers than to publishers.
fn lending(administrator: &Sandbox, weed: &Weed, store: &str) -> String {
    let file = administrator.path("home/lending.toml");
    let endpoint = weed.endpoint();
    fs::write(
        &file,
        format!(
            r#"
            [[store]]
            url = "{store}"
            settings = {{ AWS_ENDPOINT_URL = "{endpoint}", AWS_REGION = "us-east-1" }}
            read = {{ AWS_ACCESS_KEY_ID = "grid-reader", AWS_SECRET_ACCESS_KEY = "grid-reader-secret" }}
            write = {{ AWS_ACCESS_KEY_ID = "{}", AWS_SECRET_ACCESS_KEY = "{}" }}
            lifetime = 600
            "#,
            weed::ACCESS_KEY,
            weed::SECRET_KEY
        ),
    )
    .unwrap();
    file.to_str().unwrap().to_owned()
}

#[test]
fn a_teammate_mounts_an_outsider_learns_nothing_and_a_revoked_token_is_over_at_once() {
    if !Path::new("/dev/fuse").exists() {
        return skip("a team's mounts", "there is no /dev/fuse");
    }
    let Some(weed) = Weed::start() else { return };
    weed.create_bucket("team");
    let store = "s3://team/catalog";
    let administrator = Administrator::new(store, &weed.settings());
    let (alice, bob, carol) = (
        administrator.person("alice"),
        administrator.person("bob"),
        administrator.person("carol"),
    );
    administrator.ok(&["team", "add", "vision", "alice", "bob"]);
    let file = lending(&administrator.sandbox, &weed, store);
    let replicas =
        [0, 1].map(|_| administrator.serve("127.0.0.1:0", &["--credentials", &file, "--rate", "1000"]));

    // Alice publishes, through one replica.
    let a = somebody(&replicas[0], &alice);
    let source = a.path("home/source");
    data(&source);
    let published = a.ok(&["publish", source.to_str().unwrap(), "images"]);
    assert_eq!(published.trim(), "alice:images/1");
    assert_eq!(
        a.ok(&["publish", source.to_str().unwrap(), "images"]).trim(),
        "alice:images/2"
    );

    // Bob mounts, through the other.
    let b = somebody(&replicas[1], &bob);
    let mount = b.path("mnt/images");
    let mount = mount.to_str().unwrap();
    b.ok(&["alice:images/1", mount]);
    assert_same_tree(&b, &source, Path::new(mount));
    assert!(b.ok(&["list", "--global"]).contains("alice:images"));
    assert!(b.ok(&["team"]).contains("alice, bob"));
    assert!(b.ok(&["info", "alice:images"]).contains("alice:images/2"));

    // He changes nothing of hers.
    let said = b.fails(1, &["publish", source.to_str().unwrap(), "alice:images"]);
    assert!(said.contains("only alice may change"), "{said}");
    for arguments in [
        &["alias", "alice:images/1", "prod"][..],
        &["retire", "alice:images/1"],
    ] {
        let said = b.fails(1, arguments);
        assert!(said.contains("only alice may change"), "{said}");
    }
    a.ok(&["alias", "images/1", "prod"]);
    assert!(b.ok(&["info", "alice:images/prod"]).contains("alice:images/1"));

    // What is not there is told apart, for those who may know.
    for (reference, expected) in [
        ("alice:images/9", "alice:images has versions 1, 2"),
        ("alice:imagse", "did you mean alice:images"),
        ("alice:images/pord", "did you mean prod"),
        ("bob:images", "no user bob"),
        ("alise:images", "did you mean alice"),
    ] {
        let said = b.fails(1, &["info", reference]);
        assert!(said.contains(expected), "{reference}: {said}");
    }

    // Carol hears the same of what there is as of what there is not.
    let c = somebody(&replicas[0], &carol);
    let refused = |arguments: &[&str]| c.fails(1, arguments);
    for (there, absent) in [
        (vec!["info", "alice:images"], vec!["info", "nobody:images"]),
        (vec!["alice:images/1", "x"], vec!["nobody:images/1", "x"]),
        (vec!["list", "alice"], vec!["list", "nobody"]),
        (
            vec!["alias", "alice:images/1", "mine"],
            vec!["alias", "nobody:images/1", "mine"],
        ),
        (
            vec!["retire", "alice:images/1"],
            vec!["retire", "nobody:images/1"],
        ),
    ] {
        let (there, absent) = (refused(&there), refused(&absent));
        assert_eq!(there.replace("alice", "nobody"), absent);
        assert!(there.contains("you share no team with"), "{there}");
    }
    assert!(!c.ok(&["list", "--global"]).contains("alice"));

    // A version that is retired: who has it reads on.
    b.ok(&["alice:images/2", b.path("mnt/two").to_str().unwrap()]);
    // The mount tells of itself beside its work.
    let patience = Instant::now() + Duration::from_secs(30);
    while !a.ok(&["info", "images"]).contains("bob on") {
        assert!(Instant::now() < patience, "the lease is not there");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(a.ok(&["status", "--global"]).contains("alice:images/2"));
    assert!(c.ok(&["status", "--global"]).is_empty());
    let said = a.fails(1, &["retire", "images/2"]);
    assert!(said.contains("is mounted by bob on"), "{said}");
    a.ok(&["retire", "images/2", "--in-use"]);
    let said = b.fails(1, &["alice:images/2", b.path("mnt/again").to_str().unwrap()]);
    assert!(said.contains("was retired by alice"), "{said}");
    assert_eq!(
        fs::read_to_string(b.path("mnt/two/hello.txt")).unwrap(),
        "hello\n"
    );
    assert!(
        b.ok(&["info", "alice:images"]).contains("alice:images/1"),
        "latest is what can be mounted"
    );

    // Bob's token is revoked: nothing new through either replica, what he has reads on.
    administrator.ok(&["token", "revoke", &bob]);
    for replica in &replicas {
        let b2 = somebody(replica, &bob);
        let said = b2.fails(1, &["alice:images/1", b2.path("mnt/x").to_str().unwrap()]);
        assert!(said.contains("does not accept who you say you are"), "{said}");
        assert!(!said.contains(&bob), "{said}");
    }
    assert_same_tree(&b, &source, Path::new(mount));
    // A new token in the same file is all it takes.
    let token = administrator.ok(&["token", "new", "bob"]);
    fs::write(b.path("home/token"), token).unwrap();
    b.ok(&["info", "alice:images"]);
}

#[test]
fn a_control_plane_that_is_down_stops_no_reader_and_a_mount_waits_for_it() {
    if !Path::new("/dev/fuse").exists() {
        return skip("a control plane that is down", "there is no /dev/fuse");
    }
    let dir = tempfile::tempdir().unwrap();
    let administrator = Administrator::new(&format!("file://{}", dir.path().display()), &[]);
    let alice = administrator.person("alice");
    let replica = administrator.serve("127.0.0.1:0", &[]);
    let a = somebody(&replica, &alice);
    let source = a.path("home/source");
    data(&source);
    a.ok(&["publish", source.to_str().unwrap(), "images"]);
    a.ok(&["images", a.path("mnt/one").to_str().unwrap()]);
    a.ok(&["images", a.path("mnt/gone").to_str().unwrap()]);
    a.ok(&["unmount", a.path("mnt/gone").to_str().unwrap()]);
    let address = replica.address();
    drop(replica);
    assert_same_tree(&a, &source, &a.path("mnt/one"));
    let two = a.path("mnt/two");
    let waiting = a.grid(&["images/1", two.to_str().unwrap()]).spawn().unwrap();
    // It has asked at least once, and nobody answered, by the time that the server is up.
    assert_eq!(
        fs::read_to_string(a.path("mnt/one/hello.txt")).unwrap(),
        "hello\n"
    );
    let _again = administrator.serve(&address, &[]);
    assert!(waiting.wait_with_output().unwrap().status.success());
    assert_same_tree(&a, &source, &two);
}

#[test]
fn a_proxy_is_asked_where_one_is_named() {
    use std::io::{Read, Write};
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let proxy = format!("http://{}", listener.local_addr().unwrap());
    let asking = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut request = vec![0; 4096];
        let length = stream.read(&mut request).unwrap();
        stream
            .write_all(b"HTTP/1.1 401 Unauthorized\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            .unwrap();
        String::from_utf8_lossy(&request[..length]).into_owned()
    });
    let somebody = sandbox::Sandbox::new()
        .env("GRID_MOUNT_CATALOG", "http://plane.example")
        .env("GRID_MOUNT_TOKEN", "gmt_x")
        .env("HTTP_PROXY", &proxy)
        .env("http_proxy", &proxy);
    let said = somebody.fails(1, &["list"]);
    assert!(said.contains("http://plane.example does not accept"), "{said}");
    let asked = asking.join().unwrap();
    assert!(asked.starts_with("GET http://plane.example/v1/me"), "{asked}");
}
