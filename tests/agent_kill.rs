//! A command that is killed, whenever that is, leaves a whole mount or none: with an agent of many users, and with
//! an agent that the command itself starts.

#[path = "support/s3_origin.rs"]
mod s3_origin;
#[path = "support/sandbox.rs"]
mod sandbox;
#[path = "support/shared_agent.rs"]
mod shared_agent;

use std::{
    collections::BTreeSet,
    fs,
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use s3_origin::{S3Origin, Shape};
use sandbox::{Sandbox, skip};
use shared_agent::{DEADLINE, SharedAgent, said};

const USER: u32 = 40_051;

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn quiet(mut command: Command) -> Command {
    command.stdout(Stdio::null()).stderr(Stdio::null());
    command
}

/// Whether it had ended before.
fn killed(mut child: Child) -> bool {
    let ended = child.try_wait().unwrap().is_some();
    let _ = child.kill();
    let _ = child.wait();
    ended
}

/// Kills ever later by `step`, until one ends before it is killed. `left` says whether there is a mount then,
/// and leaves none.
fn at_every_point(command: impl Fn() -> Command, step: Duration, mut left: impl FnMut(u32) -> bool) {
    let mut found = BTreeSet::new();
    let mut mounts = 0;
    for point in 0.. {
        let child = command().spawn().unwrap();
        thread::sleep(step * point);
        let ended = killed(child);
        let mounted = left(point);
        assert!(mounted || !ended, "it had ended, and nothing is mounted");
        found.insert(mounted);
        mounts += u32::from(mounted);
        if ended {
            eprintln!("killed at {point} points {step:?} apart: {mounts} whole mounts");
            break;
        }
        // A machine that is busy takes longer than the first one took.
        assert!(point < 1000, "it never ends");
    }
    assert_eq!(found.len(), 2, "it was never killed in time: {found:?}");
}

#[test]
fn with_an_agent_of_many_users() {
    // So slow that every step of a mount is long enough to be killed in.
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let origin = runtime.block_on(S3Origin::start(Shape {
        first_byte: Duration::from_millis(20),
        ..Shape::default()
    }));
    let settings = origin.settings();
    let environment: Vec<(&str, &str)> = settings.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
    let team = ["--catalog", "s3://bucket/team"];
    let Some(agent) = SharedAgent::start_with("catalogs = [\"s3://bucket/team\"]", &[], &environment) else {
        return;
    };
    let source = agent.path("source");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("file"), "some text").unwrap();
    let publish = ["publish", path(&source), "data", team[0], team[1]];
    let published = agent.grid(0, &publish).envs(environment).output().unwrap();
    said(&published);
    let place = agent.home(USER).join("a/b");
    let grid = || quiet(agent.grid(USER, &["root:data", path(&place), team[0], team[1]]));
    let begun = Instant::now();
    assert!(grid().status().unwrap().success());
    let whole = begun.elapsed();
    agent.ok(USER, &["unmount", path(&place)]);
    at_every_point(grid, whole / 64, |point| {
        // What the kernel shows and what the agent says come to agree.
        let mounted = agent.wait_for("the agent and the kernel do not agree", || {
            let (kernel, says) = (agent.mounts(), agent.mount_points(USER));
            (kernel == says).then_some(!kernel.is_empty())
        });
        if mounted {
            let read = agent
                .of_user(USER, "cat")
                .arg(place.join("file"))
                .output()
                .unwrap();
            assert_eq!(said(&read), "some text");
        }
        // In either case the next command finds everything in order; one that came at the very moment
        // says that another is just mounting there.
        agent.wait_for("it cannot be mounted", || {
            grid().status().unwrap().success().then_some(())
        });
        agent.ok(USER, &["unmount", path(&place)]);
        assert!(agent.mounts().is_empty());
        assert_eq!(
            fs::read_dir(agent.home(USER)).unwrap().count(),
            0,
            "point {point}"
        );
        mounted
    });
}

#[test]
fn with_an_agent_that_it_starts_itself() {
    if !Path::new("/dev/fuse").exists() {
        return skip("a killed command", "there is no /dev/fuse");
    }
    let sandbox = Sandbox::new();
    let source = sandbox.path("source");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("file"), "some text").unwrap();
    sandbox.ok(&["publish", path(&source), "data"]);
    let place = sandbox.path("mnt/a/b");
    let grid = || quiet(sandbox.grid(&["data", path(&place)]));
    let wait_for = |what: &str, done: &dyn Fn() -> bool| {
        let begun = Instant::now();
        while !done() {
            assert!(begun.elapsed() < DEADLINE, "{what}");
            thread::sleep(Duration::from_millis(10));
        }
    };
    // Each starts an agent of its own, so the one before has ended.
    let gone = || {
        wait_for("an agent stays without a mount", &|| {
            sandbox.status()["agent"].is_null()
        });
    };
    let begun = Instant::now();
    assert!(grid().status().unwrap().success());
    let whole = begun.elapsed();
    sandbox.ok(&["unmount", "--all"]);
    gone();
    // One that starts an agent and is killed leaves that waiting for a while.
    at_every_point(grid, whole / 20, |point| {
        // An agent that nobody asks for anything ends by itself: at the end there is a mount, or no agent.
        wait_for("neither a mount nor none", &|| {
            let status = sandbox.status();
            status["agent"].is_null() || !status["mounts"].as_array().unwrap().is_empty()
        });
        let mounted = !sandbox.mounts().is_empty();
        if mounted {
            assert_eq!(fs::read(place.join("file")).unwrap(), b"some text");
            sandbox.ok(&["unmount", path(&place)]);
            gone();
        }
        assert!(sandbox.mounts().is_empty());
        assert_eq!(
            fs::read_dir(sandbox.path("mnt")).unwrap().count(),
            0,
            "point {point}"
        );
        mounted
    });
    sandbox.ok(&["data", path(&place)]);
    sandbox.ok(&["unmount", path(&place)]);
    gone();
    // Nothing of any of them is left beside the socket but the log.
    wait_for("something stays in the runtime directory", &|| {
        let left = fs::read_dir(sandbox.path("run/grid-mount")).unwrap();
        left.flatten()
            .all(|entry| entry.file_name().to_string_lossy().ends_with(".log"))
    });
}
