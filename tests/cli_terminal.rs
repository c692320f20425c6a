//! What people see on a terminal, and what programs see that are given none: colours, widths, progress, a status
//! that is overwritten in place.

#[path = "support/s3_origin.rs"]
mod s3_origin;
#[path = "support/sandbox.rs"]
mod sandbox;

use std::{fs, path::Path, time::Duration};

use s3_origin::{S3Origin, Shape};
use sandbox::{Sandbox, skip, told};

const WIDTH: usize = 60;

/// What the command prints to a terminal of [`WIDTH`] columns; `None` where there is no program to make one.
fn on_a_terminal(sandbox: &Sandbox, environment: &str, command: &str) -> Option<String> {
    if !Path::new("/usr/bin/script").exists() {
        skip("a terminal", "there is no /usr/bin/script");
        return None;
    }
    let line = format!(
        "stty cols {WIDTH} rows 20; PATH={}:$PATH {environment} {command}",
        Path::new(env!("CARGO_BIN_EXE_grid-mount"))
            .parent()
            .unwrap()
            .display()
    );
    let output = sandbox
        .program("/usr/bin/script")
        .args(["-qec", &line, "/dev/null"])
        .env("TERM", "xterm-256color")
        .output()
        .unwrap();
    assert!(output.status.success(), "{command}: {}", told(&output));
    Some(String::from_utf8_lossy(&output.stdout).replace("\r\n", "\n"))
}

fn published(sandbox: &Sandbox) -> String {
    let source = sandbox.path("source");
    fs::create_dir_all(&source).unwrap();
    fs::write(source.join("a"), vec![3; 500_000]).unwrap();
    source.to_str().unwrap().to_owned()
}

#[test]
fn tables_are_as_wide_as_the_terminal() {
    let sandbox = Sandbox::new();
    let source = published(&sandbox);
    let name = "a-name-that-is-rather-long-for-a-narrow-terminal-but-allowed";
    sandbox.ok(&["publish", &source, name]);
    for command in ["list", "config", "list --global"] {
        let plain = sandbox.ok(&command.split(' ').collect::<Vec<_>>());
        // Programs get everything.
        assert!(plain.lines().any(|line| line.chars().count() > WIDTH), "{plain}");
        let Some(shown) = on_a_terminal(&sandbox, "", &format!("grid-mount {command}")) else {
            return;
        };
        assert_eq!(shown.lines().count(), plain.lines().count(), "{shown}");
        for line in shown.lines() {
            assert!(line.chars().count() <= WIDTH, "{command}: {line:?}");
        }
        assert!(shown.contains('…'), "{shown}");
    }
}

#[test]
fn colours_are_for_terminals_that_want_them() {
    if !Path::new("/dev/fuse").exists() {
        return skip("the colours of status", "there is no /dev/fuse");
    }
    let sandbox = Sandbox::new();
    let source = published(&sandbox);
    sandbox.ok(&["publish", &source, "data"]);
    sandbox.ok(&["data", sandbox.path("mnt/data").to_str().unwrap()]);
    for (environment, coloured) in [
        ("", true),
        // An empty one says nothing.
        ("NO_COLOR=", true),
        ("NO_COLOR=1", false),
        ("TERM=dumb", false),
    ] {
        let Some(shown) = on_a_terminal(&sandbox, environment, "grid-mount status") else {
            return;
        };
        assert_eq!(shown.contains("\u{1b}["), coloured, "{environment}: {shown:?}");
        assert!(shown.contains("alice:data/1 at "), "{shown}");
    }
    assert!(!sandbox.ok(&["status"]).contains('\u{1b}'));

    // Overwritten where it stands, until Ctrl-C.
    let watching = "timeout --preserve-status -s INT 5 grid-mount status --watch || true";
    let Some(shown) = on_a_terminal(&sandbox, "", watching) else {
        return;
    };
    let screens = shown.matches("alice:data/1 at ").count();
    let upwards = shown.matches("A\r").count();
    assert!(screens >= 2 && upwards == screens - 1, "{shown:?}");
}

#[test]
fn long_work_shows_how_far_it_is() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let origin = runtime.block_on(S3Origin::start(Shape {
        first_byte: Duration::from_millis(100),
        write: Duration::from_millis(100),
        ..Shape::default()
    }));
    let sandbox = origin
        .settings()
        .iter()
        .fold(Sandbox::new(), |sandbox, (name, value)| sandbox.env(name, value))
        .env("GRID_MOUNT_CATALOG", "s3://bucket/team");
    let source = published(&sandbox);
    for number in 0..20 {
        origin.put(&format!("given/{number}"), vec![number; 1000]);
    }
    for (command, word) in [
        (format!("publish {source} data"), "uploading"),
        ("register s3://bucket/given given".to_owned(), "listing"),
        ("warm data".to_owned(), "warming"),
        ("cache verify".to_owned(), "checking"),
    ] {
        let Some(shown) = on_a_terminal(&sandbox, "", &format!("grid-mount {command}")) else {
            return;
        };
        assert!(
            shown.contains(&format!("{word} ")) && shown.contains('['),
            "{command}: {shown:?}"
        );
        // What stays is the outcome alone.
        let last = shown.rsplit('\r').next().unwrap();
        assert!(!last.contains("ETA"), "{command}: {shown:?}");
    }
    // Whoever reads it as lines is not sent a bar.
    let output = sandbox.grid(&["publish", &source, "data"]).output().unwrap();
    assert!(output.status.success(), "{}", told(&output));
    assert_eq!(output.stdout, b"alice:data/2\n");
    assert!(!String::from_utf8_lossy(&output.stderr).contains('\u{1b}'));
}
