//! `grid-mount doctor` and what is dead: found, told of, and with `--fix` taken away.

#[path = "support/sandbox.rs"]
mod sandbox;

use std::{
    fs,
    io::{BufRead, BufReader},
    path::Path,
    process::Stdio,
};

use sandbox::{Sandbox, skip, told};

#[test]
fn a_dead_mount_is_found_and_taken_away() {
    if !Path::new("/dev/fuse").exists() {
        skip("a dead mount", "there is no /dev/fuse");
        return;
    }
    let sandbox = Sandbox::new();
    let namespaces = sandbox.program("unshare").args(["--mount", "true"]).output();
    if !namespaces.is_ok_and(|output| output.status.success()) {
        skip("mending", "without a mount namespace it would mend this host");
        return;
    }
    let source = sandbox.path("source");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("a"), "one").unwrap();
    sandbox.ok(&["publish", source.to_str().unwrap(), "data"]);
    let point = sandbox.path("mnt");
    // In the foreground nobody keeps its descriptor: its death is the mount's.
    let mut agent = sandbox
        .grid(&["data", point.to_str().unwrap(), "--foreground"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(agent.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    assert!(line.contains("alice:data/1"), "{line}");
    agent.kill().unwrap();
    agent.wait().unwrap();
    assert_eq!(
        fs::metadata(&point).unwrap_err().raw_os_error(),
        Some(nix::libc::ENOTCONN)
    );

    // In a mount namespace of its own, what is mended here is not mended for others.
    let program = env!("CARGO_BIN_EXE_grid-mount");
    let within = |arguments: &str| {
        let script = format!(
            "if [ -e /etc/updatedb.conf ]; then mount --bind /etc/updatedb.conf /etc/updatedb.conf; fi\n\
             '{program}' doctor --json {arguments} > found.json; echo $?; grep -c ' {} ' /proc/self/mounts",
            point.display()
        );
        let output = sandbox
            .program("unshare")
            .args(["--mount", "sh", "-c", &script])
            .output()
            .unwrap();
        let found = fs::read_to_string(sandbox.path("found.json")).unwrap();
        let found: serde_json::Value =
            serde_json::from_str(&found).unwrap_or_else(|error| panic!("{error}: {found} {}", told(&output)));
        let ours = found.as_array().unwrap().iter().find(|finding| {
            finding["check"] == "mounts"
                && finding["found"]
                    .as_str()
                    .unwrap()
                    .contains(point.to_str().unwrap())
        });
        let printed = String::from_utf8(output.stdout).unwrap();
        (printed, ours.cloned().unwrap_or_default())
    };
    let (printed, finding) = within("");
    assert_eq!(printed, "1\n1\n");
    assert_eq!(finding["verdict"], "bad", "{finding}");
    assert_eq!(finding["fix"], "possible", "{finding}");
    assert!(finding["mend"].as_str().unwrap().contains("unmount"), "{finding}");
    let (printed, finding) = within("--fix");
    assert_eq!(finding["fix"], "done", "{finding}");
    assert!(printed.ends_with("\n0\n"), "{printed}");
}
