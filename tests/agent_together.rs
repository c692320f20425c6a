//! What users of one agent have in common, and what not: a version's tree, its blocks and its fetches for
//! those with the same rights; metrics, errors and a command's own mounts for nobody else.

#[path = "support/s3_origin.rs"]
mod s3_origin;
#[path = "support/sandbox.rs"]
mod sandbox;
#[path = "support/shared_agent.rs"]
mod shared_agent;

use std::{
    fs,
    io::{BufRead, BufReader},
    path::Path,
    process::{Output, Stdio},
    thread,
    time::Duration,
};

use s3_origin::{Fault, S3Origin, Shape};
use sandbox::told;
use shared_agent::{SharedAgent, said};

const ALICE: u32 = 40_041;
const BOB: u32 = 40_042;
const CAROL: u32 = 40_043;
const BIG: usize = 40 << 20;

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// An agent whose own keys are for the team's catalog on `origin`, with `root:data/1` in it; and the
/// version's bytes.
fn team(origin: &S3Origin) -> Option<(SharedAgent, Vec<u8>)> {
    let settings = origin.settings();
    let environment: Vec<(&str, &str)> = settings.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
    let agent = SharedAgent::start_with("catalogs = [\"s3://bucket/team\"]", &[], &environment)?;
    let source = agent.path("source");
    fs::create_dir(&source).unwrap();
    let mut bytes = vec![0; BIG];
    blake3::Hasher::new().finalize_xof().fill(&mut bytes);
    fs::write(source.join("big"), &bytes).unwrap();
    for number in 0..40 {
        fs::write(source.join(number.to_string()), number.to_string()).unwrap();
    }
    let published = agent
        .grid(
            0,
            &["publish", path(&source), "data", "--catalog", "s3://bucket/team"],
        )
        .envs(environment)
        .output()
        .unwrap();
    said(&published);
    Some((agent, bytes))
}

fn origin() -> (tokio::runtime::Runtime, S3Origin) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let origin = runtime.block_on(S3Origin::start(Shape {
        // Long enough for both to want the same at the same time.
        first_byte: Duration::from_millis(20),
        ..Shape::default()
    }));
    (runtime, origin)
}

fn mount(agent: &SharedAgent, uid: u32, settings: &[(String, String)]) -> Output {
    let place = agent.home(uid).join("data");
    agent
        .grid(
            uid,
            &[
                "root:data",
                path(&place),
                "--prefetch",
                "none",
                "--catalog",
                "s3://bucket/team",
            ],
        )
        .envs(settings.iter().map(|(name, value)| (name, value)))
        .output()
        .unwrap()
}

#[test]
fn users_with_the_same_rights_share_the_tree_the_blocks_and_the_fetches() {
    let (_runtime, origin) = origin();
    let Some((agent, bytes)) = team(&origin) else {
        return;
    };
    let before = origin.ranges().len();
    let fetched = |what: &str| -> Vec<(String, u64, u64)> {
        let mut ranges = origin.ranges().split_off(before);
        ranges.retain(|(key, ..)| key.contains(&format!("/{what}/")));
        ranges
    };
    // Both at once, then both read everything at once.
    let together = |work: &(dyn Fn(u32) + Sync)| {
        thread::scope(|scope| {
            for user in [ALICE, BOB] {
                scope.spawn(move || work(user));
            }
        });
    };
    together(&|user| {
        said(&mount(&agent, user, &[]));
    });
    let rows = fetched("trees");
    assert_eq!(rows.len(), 1, "{rows:?}");
    let maps = fs::read_to_string(format!("/proc/{}/maps", agent.pid())).unwrap();
    let mapped: Vec<_> = maps.lines().filter(|line| line.contains("/trees/")).collect();
    assert_eq!(mapped.len(), 1, "{mapped:?}");

    let read = |user: u32| {
        let read = agent
            .of_user(user, "cat")
            .arg(agent.home(user).join("data/big"))
            .output()
            .unwrap();
        assert!(read.stdout == bytes, "{} bytes, or others", read.stdout.len());
    };
    together(&read);
    let data = fetched("objects");
    let total: u64 = data.iter().map(|(.., length)| length).sum();
    let gets = data.len();
    eprintln!(
        "two users read {BIG} bytes each: {total} bytes in {gets} GETs, the tree in {}",
        rows.len()
    );
    // The bytes of one reader; what one more asks for may be asked twice at the edge of a request.
    assert!(
        total >= BIG as u64 && total < BIG as u64 + (2 << 20),
        "{total} bytes in {gets} GETs"
    );
    let traffic = |user: u32| {
        let status = agent.status(user);
        status["mounts"][0]["traffic"]["bytes_from_origin"]
            .as_u64()
            .unwrap()
    };
    assert!(traffic(ALICE) + traffic(BOB) >= BIG as u64);

    // Whoever comes with keys of their own has perhaps other rights, and takes nothing from these.
    said(&mount(&agent, CAROL, &origin.settings()));
    read(CAROL);
    let total: u64 = fetched("objects").iter().map(|(.., length)| length).sum();
    assert!(total >= 2 * BIG as u64, "{total}");
    for user in [ALICE, BOB, CAROL] {
        agent.ok(user, &["unmount", "--all"]);
    }
}

#[test]
fn metrics_and_errors_are_told_to_whom_they_concern() {
    let (_runtime, origin) = origin();
    let Some((agent, _)) = team(&origin) else { return };
    for user in [ALICE, BOB] {
        said(&mount(&agent, user, &[]));
    }
    origin.always(Some(Fault::Status(404)));
    let failed = agent
        .of_user(ALICE, "cat")
        .arg(agent.home(ALICE).join("data/big"))
        .output()
        .unwrap();
    assert!(!failed.status.success());
    let last = |user: u32| agent.status(user)["agent"]["last_error"].clone();
    let named = last(0);
    assert!(
        named.as_str().is_some_and(|text| text.contains("objects/")),
        "{named}"
    );
    assert!(last(ALICE).is_null() && last(BOB).is_null());
    // Hers says so to her.
    let own = |user: u32| {
        agent.status(user)["mounts"][0]["traffic"]["failures"]
            .as_u64()
            .unwrap()
    };
    assert!(own(ALICE) > 0 && own(BOB) == 0);
    let seen = |user: u32| {
        let metrics = agent
            .of_user(user, "curl")
            .args([
                "-sS",
                "--unix-socket",
                path(&agent.socket()),
                "http://localhost/metrics",
            ])
            .output()
            .unwrap();
        let text = said(&metrics);
        [ALICE, BOB].map(|of| text.contains(path(&agent.home(of))))
    };
    assert_eq!([seen(ALICE), seen(BOB)], [[true, false], [false, true]]);
    assert_eq!(seen(0), [true, true]);
    let shown = agent.ok(ALICE, &["status"]);
    assert!(
        shown.contains(&format!("(uid {ALICE})")) && !shown.contains(path(&agent.home(BOB))),
        "{shown}"
    );
    // What is everybody's is not for anybody to empty, check or set.
    for arguments in [vec!["cache", "evict"], vec!["cache", "verify"]] {
        let refused = agent.fails(BOB, &arguments);
        assert!(refused.contains("only root"), "{refused}");
    }
}

#[test]
fn a_command_of_a_user_runs_through_the_shared_agent() {
    let Some(agent) = SharedAgent::start("catalogs = [\"CATALOG\"]") else {
        return;
    };
    agent.publish("data", &[("file", "some text\n")]);
    let place = agent.home(ALICE).join("wanted/data");
    let runtime = agent.home(ALICE).join("run");
    fs::create_dir(&runtime).unwrap();
    std::os::unix::fs::chown(&runtime, Some(ALICE), Some(ALICE)).unwrap();
    let datastore = format!("root:data={}", place.display());
    let script = format!("cat {0}/file; read -r end; cat {0}/file; exit 9", place.display());
    let mut running = agent
        .grid(
            ALICE,
            &["run", "--datastore", &datastore, "--", "sh", "-c", &script],
        )
        .env("XDG_RUNTIME_DIR", &runtime)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(running.stdout.take().unwrap()).lines();
    let first = lines.next();
    let Some(Ok(first)) = first else {
        let output = running.wait_with_output().unwrap();
        panic!("{}\n{}", told(&output), agent.log());
    };
    assert_eq!(first, "some text");
    // It is hers, at a place of its own; where the command sees it there is nothing.
    assert_eq!(fs::read_dir(&place).unwrap().count(), 0);
    let served = agent.mount_points(ALICE);
    assert!(served.len() == 1 && served[0].starts_with(&runtime), "{served:?}");
    assert!(agent.mount_points(BOB).is_empty());
    use std::io::Write;
    running.stdin.take().unwrap().write_all(b"go on\n").unwrap();
    assert_eq!(lines.next().unwrap().unwrap(), "some text");
    assert_eq!(running.wait().unwrap().code(), Some(9));
    assert!(agent.mounts().is_empty() && agent.mount_points(0).is_empty());
    assert!(
        !place.parent().unwrap().exists(),
        "what was made for it goes with it"
    );
    assert_eq!(fs::read_dir(runtime.join("grid-mount")).unwrap().count(), 0);
}
