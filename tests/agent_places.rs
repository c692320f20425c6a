//! Where an agent of many users mounts: in its caller's mount namespace, and never anywhere that a symbolic
//! link, put there at the right moment, leads to.

#[path = "support/sandbox.rs"]
mod sandbox;
#[path = "support/shared_agent.rs"]
mod shared_agent;

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::fs::{PermissionsExt, chown, symlink},
    path::Path,
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread,
};

use shared_agent::SharedAgent;

const ALICE: u32 = 40_011;

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A shell in a mount namespace of its own, to which lines are sent.
struct Inside(Child);

impl Inside {
    fn new(agent: &SharedAgent, uid: u32) -> Self {
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "--propagation", "private", "setpriv"])
            .args([format!("--reuid={uid}"), format!("--regid={uid}")])
            .args(["--clear-groups", "--", "sh"])
            .env_clear()
            .env("PATH", "/usr/local/bin:/usr/bin:/bin")
            .env("HOME", agent.home(uid))
            .env("GRID_MOUNT_SOCKET", agent.socket())
            .env("GRID_MOUNT_CATALOG", agent.catalog())
            .env("GRID_MOUNT_USER", "alice")
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        Self(command.spawn().unwrap())
    }

    /// What the lines print.
    fn run(&mut self, lines: &str) -> String {
        let stdin = self.0.stdin.as_mut().unwrap();
        writeln!(stdin, "{lines}\necho; echo '=== done'").unwrap();
        stdin.flush().unwrap();
        let mut printed = String::new();
        let mut stdout = BufReader::with_capacity(1, self.0.stdout.as_mut().unwrap());
        loop {
            let mut line = String::new();
            assert!(stdout.read_line(&mut line).unwrap() > 0, "it ended: {printed}");
            if line.trim() == "=== done" {
                return printed.trim().to_owned();
            }
            printed.push_str(&line);
        }
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_caller_in_another_mount_namespace_gets_the_mount_there() {
    let Some(agent) = SharedAgent::start("catalogs = [\"CATALOG\"]") else {
        return;
    };
    agent.publish("data", &[("file", "some text")]);
    let grid = env!("CARGO_BIN_EXE_grid-mount");
    let place = agent.home(ALICE).join("made/data");
    let mut inside = Inside::new(&agent, ALICE);
    let told = inside.run(&format!("{grid} root:data {} 2>&1", path(&place)));
    assert!(told.contains("is at"), "{told}\n{}", agent.log());
    assert_eq!(inside.run(&format!("cat {}/file", path(&place))), "some text");
    assert!(agent.mounts().is_empty(), "it is in the agent's namespace too");
    assert!(!place.join("file").exists());

    // The same path here is another mount point, of the same user's.
    let told = agent.ok(ALICE, &["root:data", path(&place)]);
    assert!(!told.contains("already"), "{told}");
    assert_eq!(agent.mounts(), [place.as_path()]);
    assert_eq!(agent.mount_points(ALICE).len(), 2);

    // In use in there.
    let told = inside.run(&format!(
        "cd {0}; {grid} unmount {0} 2>&1; cd /; {grid} root:data {0} 2>&1",
        path(&place)
    ));
    assert!(told.contains("in use") && told.contains("already"), "{told}");
    let told = inside.run(&format!("{grid} unmount {} 2>&1", path(&place)));
    assert!(told.contains("no longer"), "{told}\n{}", agent.log());
    assert_eq!(agent.mounts(), [place.as_path()], "the one that was not meant");
    agent.ok(ALICE, &["unmount", path(&place)]);
    // Removing it in there would have unmounted it out here: so it stayed.
    fs::remove_dir(&place).unwrap();

    // A namespace that ends takes its mounts along.
    let told = inside.run(&format!("{grid} root:data {} 2>&1", path(&place)));
    assert!(told.contains("is at"), "{told}");
    drop(inside);
    agent.wait_for("the mount outlives its namespace", || {
        agent.mount_points(0).is_empty().then_some(())
    });
}

#[test]
fn no_link_put_there_at_the_right_moment_leads_a_mount_elsewhere() {
    let Some(agent) = SharedAgent::start("catalogs = [\"CATALOG\"]") else {
        return;
    };
    agent.publish("data", &[("file", "some text")]);
    // What the caller may not mount on, with an empty directory of the same name in it.
    let target = agent.path("target");
    fs::create_dir_all(target.join("inner")).unwrap();
    fs::set_permissions(&target, fs::Permissions::from_mode(0o755)).unwrap();
    let home = agent.home(ALICE);
    let (real, link, seen) = (home.join("real"), home.join("link"), home.join("seen"));
    fs::create_dir_all(real.join("inner")).unwrap();
    symlink(&target, &link).unwrap();
    for made in [&real, &real.join("inner")] {
        chown(made, Some(ALICE), Some(ALICE)).unwrap();
    }
    fs::rename(&real, &seen).unwrap();
    let stop = AtomicBool::new(false);
    let rounds = 60;
    let body = serde_json::json!({
        "reference": "root:data", "mount_point": seen.join("inner"), "catalog": agent.catalog(),
        "user": "root", "store_settings": {}, "io_mode": "auto",
    })
    .to_string();
    let ask = |body: &str, what: &str| {
        let asked = agent
            .of_user(ALICE, "curl")
            .args(["-sS", "--unix-socket", path(&agent.socket())])
            .args(["-H", "content-type: application/json", "-d", body])
            .arg(format!("http://localhost/v1/{what}"))
            .output()
            .unwrap();
        String::from_utf8(asked.stdout).unwrap()
    };
    let (mut mounted, mut refused) = (0, 0);
    thread::scope(|scope| {
        struct Stop<'a>(&'a AtomicBool);
        impl Drop for Stop<'_> {
            fn drop(&mut self) {
                self.0.store(true, Relaxed);
            }
        }
        let _stopping = Stop(&stop);
        // Exchanges the directory and the link, as fast as it can.
        scope.spawn(|| {
            while !stop.load(Relaxed) {
                let flags = nix::fcntl::RenameFlags::RENAME_EXCHANGE;
                let here = nix::fcntl::AT_FDCWD;
                let _ = nix::fcntl::renameat2(here, &seen, here, &link, flags);
            }
        });
        for _ in 0..rounds {
            let answer: serde_json::Value = serde_json::from_str(&ask(&body, "mounts")).unwrap();
            for place in agent.mounts() {
                assert!(
                    !place.starts_with(&target),
                    "{answer}: mounted at {}",
                    place.display()
                );
            }
            match answer["message"].as_str() {
                None => mounted += 1,
                Some(message) => {
                    assert!(message.contains("symbolic link"), "{message}");
                    refused += 1;
                }
            }
            // It may need more than one try, since it is never done through the link.
            agent.wait_for("not unmounted", || {
                ask("{\"target\": \"all\", \"lazy\": false}", "unmount");
                agent.mount_points(ALICE).is_empty().then_some(())
            });
        }
    });
    // Both happened, or nothing was raced.
    assert!(mounted > 0 && refused > 0, "{mounted} mounted, {refused} refused");
    assert_eq!(fs::read_dir(&target).unwrap().count(), 1);
    assert!(agent.mounts().is_empty());
}
