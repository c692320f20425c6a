//! `grid-mount run`: the command sees its data sets, nobody else sees them there, and what the command was
//! told and how it ended is passed on.

#[path = "support/sandbox.rs"]
mod sandbox;

use std::{
    fs,
    io::{BufRead, BufReader, Read},
    path::Path,
    process::Stdio,
};

use sandbox::{Sandbox, skip, told};

/// With one data set, `alice:data/1`, that holds the file `a`; removes what it does not need.
fn published(sandbox: Sandbox) -> Option<Sandbox> {
    if !Path::new("/dev/fuse").exists() {
        skip("grid-mount run", "there is no /dev/fuse");
        return None;
    }
    let source = sandbox.path("tmp/source");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("a"), "one\n").unwrap();
    sandbox.ok(&["publish", source.to_str().unwrap(), "data"]);
    Some(sandbox)
}

fn nothing_is_left(sandbox: &Sandbox) {
    assert_eq!(sandbox.mounts(), Vec::<std::path::PathBuf>::new());
    let left: Vec<_> = fs::read_dir(sandbox.path("mnt")).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

fn the_command_alone_sees_it(sandbox: &Sandbox) {
    let point = sandbox.path("mnt/point");
    let datastore = format!("data={}", point.display());
    let script = format!(
        "cat {}/a; id -u; echo ready; read -r line; echo $line",
        point.display()
    );
    let mut running = sandbox
        .grid(&[
            "run",
            "--datastore",
            &datastore,
            "--report",
            "--",
            "sh",
            "-c",
            &script,
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(running.stdout.take().unwrap()).lines();
    let mut line = || lines.next().unwrap().unwrap();
    assert_eq!(line(), "one");
    assert_eq!(line(), sandbox.uid().to_string());
    assert_eq!(line(), "ready");
    let seen: Vec<_> = fs::read_dir(&point).unwrap().collect();
    assert!(seen.is_empty(), "others see it, too: {seen:?}");
    assert!(!sandbox.mounts().contains(&point));
    drop(running.stdin.take());
    let mut said = String::new();
    running.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    // The shell's read failed at the end of its input; the echo did not.
    assert!(running.wait().unwrap().success(), "{said}");
    assert!(
        said.contains("alice:data/1") && said.contains("fetched"),
        "{said}"
    );
    nothing_is_left(sandbox);
}

#[test]
fn root_has_a_place_of_its_own_for_a_command() {
    if let Some(sandbox) = published(Sandbox::new()) {
        the_command_alone_sees_it(&sandbox);
    }
}

#[test]
fn an_ordinary_user_has_one_too() {
    let Some(sandbox) = Sandbox::ordinary() else {
        return;
    };
    let namespaces = sandbox
        .program("unshare")
        .args(["--user", "--mount", "true"])
        .output();
    if !namespaces.is_ok_and(|output| output.status.success()) {
        skip("a user's own mount namespace", "the kernel makes none here");
        return;
    }
    let source = sandbox.path("tmp/source");
    let made = sandbox
        .program("sh")
        .args(["-c", "mkdir tmp/source && echo one > tmp/source/a"])
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", told(&made));
    sandbox.ok(&["publish", source.to_str().unwrap(), "data"]);
    the_command_alone_sees_it(&sandbox);
}

#[test]
fn how_the_command_ended_is_passed_on() {
    let Some(sandbox) = published(Sandbox::new()) else {
        return;
    };
    let point = sandbox.path("mnt/point");
    let datastore = format!("alice:data/1={}", point.display());
    let ends = |code: i32, command: &[&str]| {
        let mut arguments = vec!["run", "--datastore", &datastore, "--"];
        arguments.extend(command);
        let said = sandbox.fails(code, &arguments);
        nothing_is_left(&sandbox);
        said
    };
    ends(7, &["sh", "-c", "exit 7"]);
    ends(137, &["sh", "-c", "kill -KILL $$"]);
    assert!(ends(127, &["no-such-command"]).contains("no-such-command"));
    assert!(ends(126, &["/etc/passwd"]).contains("/etc/passwd"));

    let refused = sandbox.fails(1, &["run", "--datastore", "missing", "--", "true"]);
    assert!(refused.contains("missing"), "{refused}");
    let refused = sandbox.fails(2, &["run", "--", "true"]);
    assert!(refused.contains("--datastore"), "{refused}");
    let refused = sandbox.fails(
        2,
        &[
            "run",
            "--datastore",
            "data",
            "--datastore",
            "bob:data",
            "--",
            "true",
        ],
    );
    assert!(refused.contains("two data sets"), "{refused}");

    // As Grid's people say it, for all to see.
    let mount_dir = point.to_str().unwrap();
    let script = format!("cat {mount_dir}/a; grep -c {mount_dir} /proc/mounts");
    let said = sandbox.ok(&[
        "run",
        "--shared",
        "--datastore_name",
        "data",
        "--datastore_version",
        "1",
        "--datastore_mount_dir",
        mount_dir,
        "--",
        "sh",
        "-c",
        &script,
    ]);
    assert_eq!(said, "one\n1\n");
    nothing_is_left(&sandbox);
}

#[test]
fn signals_reach_the_command() {
    let Some(sandbox) = published(Sandbox::new()) else {
        return;
    };
    let datastore = format!("data={}", sandbox.path("mnt/point").display());
    let script = "trap 'echo told; exit 9' TERM; echo ready; while :; do sleep 0.05; done";
    let mut running = sandbox
        .grid(&["run", "--datastore", &datastore, "--", "sh", "-c", script])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(running.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "ready");
    let pid = nix::unistd::Pid::from_raw(running.id().try_into().unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    assert_eq!(lines.next().unwrap().unwrap(), "told");
    assert_eq!(running.wait().unwrap().code(), Some(9));
    nothing_is_left(&sandbox);
}
