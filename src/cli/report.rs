//! What a mount has done, in words, at its end.

use std::fmt::Write as _;

use super::output;
use crate::agent::control::MountReport;

/// The slowest reads that are worth a line.
const SLOWEST: usize = 3;

pub fn text(report: &MountReport) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "  {name:12} {value}");
    };
    line("mounted for", output::seconds(report.seconds));
    line(
        "read",
        format!(
            "{} given to the kernel, of {} different bytes",
            output::bytes(report.bytes_read),
            output::bytes(report.distinct_bytes)
        ),
    );
    line(
        "fetched",
        format!(
            "{} in {} requests ({} retries); {} of it was read",
            output::bytes(report.bytes_from_origin),
            report.origin_requests,
            report.retries,
            output::bytes(report.bytes_used_of_fetched),
        ),
    );
    line(
        "waiting",
        match report.hit_ratio {
            Some(ratio) => format!(
                "{:.1} % of the reads were answered at once; for the others readers waited {}",
                ratio * 100.0,
                output::seconds(report.waited_seconds)
            ),
            None => "nothing was read".into(),
        },
    );
    for slow in report.slowest.iter().take(SLOWEST) {
        line(
            "slow",
            format!(
                "{} for {} at {} of {}",
                output::seconds(slow.seconds),
                output::bytes(slow.length),
                output::bytes(slow.offset),
                slow.path
            ),
        );
    }
    if report.failures > 0 {
        line("failed", format!("{} requests", report.failures));
    }
    if let Some(bytes) = report.suggested_cache_bytes {
        line(
            "cache",
            format!(
                "{} would hold nearly all of what was read again",
                output::bytes(bytes)
            ),
        );
    }
    text
}
