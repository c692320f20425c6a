//! What an agent of many users does by itself, and when it is told to: mounts that nobody uses go, settings
//! are read again without unmounting, the log has the form that was asked for, and the end has an order.

#[path = "support/sandbox.rs"]
mod sandbox;
#[path = "support/shared_agent.rs"]
mod shared_agent;

use std::{
    fs,
    io::{Read, Write},
    os::unix::fs::PermissionsExt,
    path::Path,
    process::Stdio,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use sandbox::{Sandbox, skip};
use shared_agent::{DEADLINE, SharedAgent, said};

const ALICE: u32 = 40_031;
const BOB: u32 = 40_032;

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn what_nobody_uses_goes_and_what_somebody_uses_stays() {
    let Some(agent) = SharedAgent::start_with("catalogs = [\"CATALOG\"]", &["--idle-timeout", "4s"], &[])
    else {
        return;
    };
    agent.publish("data", &[("file", "some text"), ("d/x", "y")]);
    let place = |name: &str| agent.home(ALICE).join(name);
    for name in ["idle", "cached", "open", "twice"] {
        agent.ok(ALICE, &["root:data", path(&place(name))]);
    }
    agent.ok(
        ALICE,
        &["root:data", path(&place("kept")), "--idle-timeout", "never"],
    );
    let told: serde_json::Value = serde_json::from_str(&agent.ok(
        ALICE,
        &[
            "root:data",
            path(&place("twice")),
            "--idle-timeout",
            "1h",
            "--json",
        ],
    ))
    .unwrap();
    // It was there already, as it was asked for first.
    assert_eq!((&told["holds"], &told["idle_timeout"]), (&2.into(), &4.into()));
    // One who wants it no more does not take it from the other.
    let told = agent.ok(ALICE, &["unmount", path(&place("twice"))]);
    assert!(told.contains("stays"), "{told}");
    let told = agent.ok(ALICE, &["unmount", path(&place("twice"))]);
    assert!(told.contains("no longer"), "{told}");

    let mut holder = agent
        .of_user(ALICE, "sh")
        .args(["-c", "exec 3<\"$0\"/file; echo; read end", path(&place("open"))])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    holder.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
    // What the kernel answers from its caches never gets to the agent.
    let mut looker = agent
        .of_user(ALICE, "sh")
        .args([
            "-c",
            "while cat \"$0\"/file > /dev/null; do sleep 0.2; done",
            path(&place("cached")),
        ])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let begun = Instant::now();
    agent.wait_for("it does not go", || (!place("idle").exists()).then_some(()));
    // So long that any of them would have gone, had nobody used it.
    while begun.elapsed() < Duration::from_secs(13) {
        thread::sleep(Duration::from_millis(100));
    }
    let stays = |name: &str| agent.mounts().contains(&place(name));
    assert!(
        stays("open") && stays("cached") && stays("kept"),
        "{:?}",
        agent.mounts()
    );
    holder.stdin.take().unwrap().write_all(b"\n").unwrap();
    holder.wait().unwrap();
    let _ = looker.kill();
    looker.wait().unwrap();
    agent.wait_for("they do not go", || {
        (agent.mounts() == [place("kept")]).then_some(())
    });
    assert!(agent.log().contains("unused: unmounting"));
}

#[test]
fn a_users_own_agent_goes_with_its_last_mount_when_that_is_unused() {
    if !Path::new("/dev/fuse").exists() {
        return skip("idle mounts", "there is no /dev/fuse");
    }
    for sandbox in [Some(Sandbox::new()), Sandbox::ordinary()].into_iter().flatten() {
        let source = sandbox.path("source");
        fs::create_dir(&source).unwrap();
        fs::write(source.join("file"), "x").unwrap();
        sandbox.ok(&["publish", path(&source), "data"]);
        sandbox.ok(&["data", path(&sandbox.path("mnt/point")), "--idle-timeout", "1s"]);
        let begun = Instant::now();
        while !sandbox.mounts().is_empty() || !sandbox.status()["agent"].is_null() {
            assert!(begun.elapsed() < DEADLINE, "it does not go");
            thread::sleep(Duration::from_millis(50));
        }
    }
}

#[test]
fn settings_are_read_again_and_mounts_stay() {
    let Some(agent) = SharedAgent::start_with("catalogs = [\"CATALOG\"]", &["--log-format", "json"], &[])
    else {
        return;
    };
    agent.publish("data", &[("file", "some text")]);
    let place = agent.home(ALICE).join("data");
    agent.ok(ALICE, &["root:data", path(&place)]);
    let big = place.join("file");
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        struct Stop<'a>(&'a AtomicBool);
        impl Drop for Stop<'_> {
            fn drop(&mut self) {
                self.0.store(true, Relaxed);
            }
        }
        let _stopping = Stop(&stop);
        scope.spawn(|| {
            while !stop.load(Relaxed) {
                let read = agent.of_user(ALICE, "cat").arg(&big).output().unwrap();
                assert_eq!(said(&read), "some text");
            }
        });
        let reload = |uid| {
            let asked = agent
                .of_user(uid, "curl")
                .args(["-sS", "-X", "POST", "--unix-socket", path(&agent.socket())])
                .arg("http://localhost/v1/reload")
                .output()
                .unwrap();
            serde_json::from_str::<serde_json::Value>(&said(&asked)).unwrap()
        };
        // No user's business.
        assert!(reload(ALICE)["message"].as_str().unwrap().contains("only root"));
        agent.configure("catalogs = []");
        agent.signal(Signal::SIGHUP);
        agent.wait_for("the rules stay", || {
            let output = agent.grid(BOB, &["root:data"]).output().unwrap();
            let told = String::from_utf8_lossy(&output.stderr).into_owned();
            if output.status.success() {
                agent.ok(BOB, &["unmount", "--all"]);
            }
            told.contains("catalogs").then_some(())
        });
        // A mistake in them changes nothing.
        agent.configure("catalog = [\"CATALOG\"]");
        let refused = reload(0);
        assert!(
            refused["message"].as_str().unwrap().contains("agent.catalog"),
            "{refused}"
        );
        agent.fails(BOB, &["root:data"]);
        agent.configure("catalogs = [\"CATALOG\"]\norigins = [\"s3://x\"]");
        let outcome = reload(0);
        assert_eq!(
            (&outcome["catalogs"], &outcome["origins"]),
            (&1.into(), &1.into()),
            "{outcome}"
        );
        agent.ok(BOB, &["root:data"]);
    });
    assert_eq!(agent.mount_points(0).len(), 2);

    let log = agent.log();
    assert!(!log.is_empty());
    for line in log.lines() {
        let line: serde_json::Value = serde_json::from_str(line).unwrap_or_else(|_| panic!("{line}"));
        assert!(
            line["level"].is_string() && line["timestamp"].is_string(),
            "{line}"
        );
    }
    assert!(
        log.contains("\"message\":\"mounted\"") && log.contains("\"uid\":40031"),
        "{log}"
    );
    assert!(!log.contains("DEBUG"));
}

#[test]
fn the_end_unmounts_everything_in_order_even_what_is_in_use() {
    let Some(mut agent) = SharedAgent::start("catalogs = [\"CATALOG\"]") else {
        return;
    };
    agent.publish("data", &[("file", "some text")]);
    for (user, name) in [(ALICE, "one"), (ALICE, "in use"), (BOB, "other")] {
        agent.ok(user, &["root:data", path(&agent.home(user).join(name))]);
    }
    let mut holder = agent
        .of_user(ALICE, "sh")
        .args([
            "-c",
            "cd \"$0\"; echo; read end",
            path(&agent.home(ALICE).join("in use")),
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    holder.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
    // A caller who never finishes does not put it off.
    let mut slow = std::os::unix::net::UnixStream::connect(agent.socket()).unwrap();
    slow.write_all(b"POST /v1/mounts HTTP/1.1\r\n").unwrap();
    let status = agent.stop();
    assert!(status.success(), "{status}: {}", agent.log());
    assert!(agent.mounts().is_empty());
    let left: Vec<_> = fs::read_dir(agent.path("run")).unwrap().flatten().collect();
    assert!(left.is_empty(), "{left:?}");
    let log = agent.log();
    let at = |what: &str| log.find(what).unwrap_or_else(|| panic!("{what}: {log}"));
    assert!(at("asked to end") < at("still in use: detached"));
    let _ = holder.kill();
    holder.wait().unwrap();
    // The next one serves the same socket at once.
    agent.launch();
    agent.ok(BOB, &["root:data"]);
}

#[test]
fn the_socket_is_for_all_and_its_directory_for_nobody_else() {
    let Some(agent) = SharedAgent::start("catalogs = []") else {
        return;
    };
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode(&agent.socket()), 0o666);
    assert_eq!(mode(&agent.path("run")), 0o755);
    let unsafe_dir = agent.path("unsafe");
    fs::create_dir(&unsafe_dir).unwrap();
    fs::set_permissions(&unsafe_dir, fs::Permissions::from_mode(0o777)).unwrap();
    let refused = agent
        .of_root(env!("CARGO_BIN_EXE_grid-mount"))
        .args([
            "agent",
            "--socket",
            path(&unsafe_dir.join("agent.sock")),
            "--cache-dir",
        ])
        .arg(agent.path("cache-2"))
        .output()
        .unwrap();
    assert!(!refused.status.success());
    assert!(
        String::from_utf8_lossy(&refused.stderr).contains("others may write"),
        "{}",
        sandbox::told(&refused)
    );
}

#[test]
fn the_journal_is_told_how_bad_each_line_is() {
    use std::os::unix::fs::MetadataExt;
    let sandbox = Sandbox::new();
    for form in ["text", "json"] {
        let path = sandbox.path(form);
        let log = fs::File::create(&path).unwrap();
        let metadata = log.metadata().unwrap();
        let mut agent = sandbox
            .grid(&["agent", "--own-agent", "--log-format", form])
            .env("JOURNAL_STREAM", format!("{}:{}", metadata.dev(), metadata.ino()))
            .stderr(log)
            .spawn()
            .unwrap();
        let begun = Instant::now();
        while sandbox.status()["agent"].is_null() {
            assert!(
                begun.elapsed() < DEADLINE,
                "{}",
                fs::read_to_string(&path).unwrap()
            );
            thread::sleep(Duration::from_millis(20));
        }
        nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(agent.id().try_into().unwrap()),
            Signal::SIGTERM,
        )
        .unwrap();
        assert!(agent.wait().unwrap().success());
        let log = fs::read_to_string(&path).unwrap();
        assert!(log.contains("asked to end"), "{log}");
        for line in log.lines() {
            let (priority, rest) = line.split_at(3);
            assert!(["<3>", "<4>", "<6>"].contains(&priority), "{line}");
            assert_eq!(
                serde_json::from_str::<serde_json::Value>(rest).is_ok(),
                form == "json",
                "{line}"
            );
        }
    }
}
