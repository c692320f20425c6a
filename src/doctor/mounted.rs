//! What is mounted: whether somebody answers there.

use std::{path::PathBuf, sync::mpsc, time::Duration};

use super::{Finding, Patient, Verdict};
use crate::fuse;

/// A mount whose agent is gone, but whose descriptor somebody keeps, does not answer at all.
const PATIENCE: Duration = Duration::from_secs(2);

pub(super) fn examine(patient: &Patient) -> Vec<Finding> {
    let Ok(lines) = fuse::mounts() else {
        return Vec::new();
    };
    let points: Vec<PathBuf> = lines
        .into_iter()
        .filter(|line| line.kind == "fuse.grid-mount")
        .map(|line| line.mount_point)
        .collect();
    let count = points.len();
    let mut findings: Vec<Finding> = points
        .into_iter()
        .filter_map(|point| one(patient, point))
        .collect();
    if findings.is_empty() {
        findings.push(Finding::good(
            "mounts",
            format!("{count} mounts, none of them dead"),
        ));
    }
    findings
}

fn one(patient: &Patient, point: PathBuf) -> Option<Finding> {
    let (tell, answer) = mpsc::channel();
    let asked = point.clone();
    // Abandoned when there is no answer: nothing else ends a wait in the kernel.
    let asking = std::thread::Builder::new()
        .name("doctor-mount".into())
        .spawn(move || tell.send(nix::sys::statvfs::statvfs(&asked).map(|_| ())));
    let shown = point.display().to_string();
    if asking.is_err() {
        return None;
    }
    match answer.recv_timeout(PATIENCE) {
        Ok(Err(nix::Error::ENOTCONN)) => Some(
            Finding::new("mounts", Verdict::Bad, format!("nobody serves {shown} any more"))
                .costs("whoever looks there gets an error (\"Transport endpoint is not connected\")")
                .mend(format!("`grid-mount unmount {shown}`, or mount it again"))
                .fixed_by(patient.fix, || {
                    fuse::unmount_at(&point, true)
                        .map_err(|error| std::io::Error::other(crate::causes::in_one_line(&error)))
                }),
        ),
        // Another user's mount may not be looked at, which is as it should be.
        Ok(_) => None,
        Err(_) => Some(
            Finding::new(
                "mounts",
                Verdict::Bad,
                format!("{shown} does not answer within {} s", PATIENCE.as_secs()),
            )
            .costs("whoever reads there waits")
            .mend("look into the agent's log; `grid-mount unmount --lazy` takes it away"),
        ),
    }
}
