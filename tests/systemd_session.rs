//! A host's session, under a real systemd: its data is in place before anybody logs in, or says why not.

#[path = "support/systemd_box.rs"]
mod systemd_box;

use std::{fs, path::PathBuf, time::Instant};

use serde_json::Value;
use systemd_box::SystemdBox;

const RECORD: &str = "/run/grid-mount/session.json";

fn publish(on: &SystemdBox, name: &str) {
    on.write(&format!("/srv/{name}/name"), name);
    on.ok(&format!("grid-mount publish /srv/{name} {name}"));
}

fn spec(on: &SystemdBox, third: &str) {
    on.write(
        "/etc/grid-mount/session.toml",
        &format!(
            "user = \"ann\"\n\
             [[datastore]]\nref = \"alice:one/1\"\nprefetch = \"all\"\n\
             [[datastore]]\nref = \"two\"\npath = \"/data/two\"\n\
             [[datastore]]\nref = \"three\"\nrequired = {third}\n"
        ),
    );
}

fn standings(on: &SystemdBox) -> Vec<String> {
    let record: Value = serde_json::from_str(&on.read(RECORD)).unwrap();
    let datastores = record["datastores"].as_array().unwrap();
    datastores
        .iter()
        .map(|one| one["standing"].as_str().unwrap().to_owned())
        .collect()
}

#[test]
fn a_session_has_its_data_before_anybody_logs_in_or_says_why_not() {
    let Some(on) = SystemdBox::boot() else { return };
    on.ok("useradd --create-home ann 2>/dev/null || (mkdir -p /home/ann && chown 1000 /home/ann)");
    publish(&on, "one");
    publish(&on, "two");
    // As at boot: everything enabled, the agent not there yet, the catalog not either.
    on.ok("systemctl enable grid-mount.socket grid-mount.service grid-mount-session.service");
    on.ok("mkdir -p /data && mv /srv/catalog /srv/away");
    spec(&on, "false");
    let order = on.property("systemd-user-sessions.service", "After");
    assert!(order.contains("grid-mount-session.service"), "{order}");
    let order = on.property("grid-mount-session.service", "After");
    assert!(order.contains("network-online.target"), "{order}");
    on.ok("systemctl start --no-block multi-user.target");
    on.wait_for("the start to wait for a catalog that is down", || {
        (on.property("grid-mount-session.service", "ActiveState") == "activating").then_some(())
    });
    let begun = Instant::now();
    on.ok("mv /srv/away /srv/catalog");
    on.wait_for("the session", || {
        (on.property("grid-mount-session.service", "ActiveState") == "active").then_some(())
    });
    eprintln!("in place {:?} after the catalog came up", begun.elapsed());

    assert_eq!(on.read("/datastores/one/name"), "one");
    assert_eq!(on.read("/data/two/name"), "two");
    assert_eq!(standings(&on), ["mounted", "mounted", "waiting"]);
    let link = on.ok("readlink /home/ann/datastores");
    assert_eq!(link.trim(), "/datastores");
    // For whoever works in it, not for root alone.
    let ann = on.ok("stat --format='setpriv --reuid %u --regid %u --clear-groups --' /home/ann");
    assert_eq!(
        on.ok(&format!("{} cat /home/ann/datastores/one/name", ann.trim())),
        "one"
    );

    // Published while the session runs.
    publish(&on, "three");
    on.wait_for("what was waiting", || {
        (standings(&on)[2] == "mounted").then_some(())
    });
    assert_eq!(on.read("/datastores/three/name"), "three");
    publish(&on, "four");
    on.ok("grid-mount session add four --socket /run/grid-mount/agent.sock");
    assert_eq!(on.read("/datastores/four/name"), "four");
    on.ok("grid-mount session remove four --socket /run/grid-mount/agent.sock");
    // The agent's restart is none of the session's business.
    on.ok("systemctl restart grid-mount.service");
    assert_eq!(on.read("/datastores/one/name"), "one");

    // What is in use does not keep a session from ending.
    let held = fs::File::open(on.path("/datastores/one/name")).unwrap();
    on.ok("systemctl stop grid-mount-session.service");
    drop(held);
    on.wait_for("no mount", || on.mounts().is_empty().then_some(()));
    on.fails("readlink /home/ann/datastores");

    // Required, and not to be had: no session, and one line that says why.
    spec(&on, "true");
    on.write(
        "/etc/grid-mount/session.toml",
        &on.read("/etc/grid-mount/session.toml")
            .replace("three", "nobodys"),
    );
    on.ok("mkdir -p /run/systemd/system/grid-mount-session.service.d");
    on.write(
        "/run/systemd/system/grid-mount-session.service.d/impatient.conf",
        "[Service]\nExecStart=\nExecStart=/usr/bin/grid-mount session start --socket /run/grid-mount/agent.sock --wait 1\n",
    );
    on.ok("systemctl daemon-reload");
    on.fails("systemctl start grid-mount-session.service");
    let journal = on.ok("journalctl --no-pager --output=cat -u grid-mount-session.service");
    let told: Vec<_> = journal.lines().filter(|line| line.contains("nobodys")).collect();
    assert!(told.iter().any(|line| line.contains("1 of 3")), "{journal}");
    assert_eq!(on.mounts(), [] as [PathBuf; 0], "a failed start leaves mounts");

    // Without a file: a line in the environment.
    on.ok("rm /etc/grid-mount/session.toml");
    on.write(
        "/etc/grid-mount/session.env",
        "GRID_DATASTORES=alice:one/1 two=/data/two\n",
    );
    on.ok("systemctl reset-failed grid-mount-session.service; systemctl start grid-mount-session.service");
    assert_eq!(on.read("/datastores/one/name"), "one");
    assert_eq!(on.read("/data/two/name"), "two");
    let score = on.run("systemd-analyze security --no-pager grid-mount.service | tail -1");
    eprint!("{}", String::from_utf8_lossy(&score.stdout));
    let boot = on.run("systemctl show --value -p ExecMainStartTimestampMonotonic -p ActiveEnterTimestampMonotonic grid-mount-session.service");
    let stamps: Vec<u64> = String::from_utf8_lossy(&boot.stdout)
        .lines()
        .filter_map(|line| line.trim().parse().ok())
        .collect();
    if let [start, active] = stamps[..] {
        eprintln!(
            "from the start of the session's unit to mounted: {} ms",
            active.abs_diff(start) / 1000
        );
    }
    // A shutdown hangs on no mount, though somebody has a file open there.
    on.ok("systemd-run --quiet --unit=reader sh -c 'exec sleep 1000 < /datastores/one/name'");
    let told = on.power_off();
    assert!(!told.contains("no clean poweroff"), "{told}");
}
