//! `grid-mount doctor`.

use std::fmt::Write as _;

use super::{
    CliError,
    args::DoctorArgs,
    config::{self, Overrides},
    mount, output,
    output::Tone,
};
use crate::doctor::{self, Finding, Fix, Patient, Verdict};

pub async fn doctor(args: DoctorArgs) -> Result<(), CliError> {
    let settings = config::load(&Overrides::of(&args.catalog, &args.agent))?;
    let agent = config::agent_config(&settings)?;
    let (mut origins, mut loans) = (Vec::new(), Vec::new());
    // No agent, or one that does not answer, is no reason not to look.
    if let Ok(Some(client)) = mount::connect(&args.socket).await
        && let Ok(mounts) = client.mounts().await
    {
        for mount in mounts {
            origins.push(mount.origin);
            loans.extend(mount.credentials.map(|loan| (mount.reference.to_string(), loan)));
        }
    }
    let patient = Patient {
        root: "/".into(),
        is_root: nix::unistd::geteuid().is_root(),
        cache_dir: agent.cache.dir,
        cache_size: agent.cache.max_bytes,
        cache_min_free: agent.cache.min_free,
        catalog: settings.catalog.value.clone(),
        user: settings.user.value.clone(),
        store_settings: config::store_settings()?,
        origins,
        loans,
        fix: args.fix,
    };
    if settings.catalog.source == crate::config::Source::Default {
        // It is there from the start: `list` would make it as well.
        super::catalog::open(&settings).await?;
    }
    let findings = doctor::examine(patient).await;
    if args.output.json {
        output::print_json(&findings);
    } else {
        output::print(&text(&findings));
    }
    match findings.iter().any(Finding::is_bad) {
        true => Err(CliError::Told),
        false => Ok(()),
    }
}

fn text(findings: &[Finding]) -> String {
    let mut text = String::new();
    let mut told = 0;
    for finding in findings {
        let word = match finding.verdict {
            Verdict::Good => "ok".to_owned(),
            Verdict::Note => "note".to_owned(),
            Verdict::Warning => output::toned(Tone::Warning, "warning"),
            Verdict::Bad => output::toned(Tone::Bad, "bad"),
        };
        told += usize::from(finding.verdict > Verdict::Note && finding.fix != Fix::Done);
        let _ = writeln!(text, "{word}: {}: {}", finding.check, finding.found);
        if let Some(costs) = &finding.costs {
            let _ = writeln!(text, "    so {costs}");
        }
        match (&finding.fix, &finding.mend) {
            (Fix::Done, _) => text.push_str("    mended\n"),
            (Fix::Possible, Some(mend)) => {
                let _ = writeln!(text, "    {mend}; or `grid-mount doctor --fix`");
            }
            (_, Some(mend)) => {
                let _ = writeln!(text, "    {mend}");
            }
            (_, None) => {}
        }
    }
    let _ = match told {
        0 => writeln!(text, "\nnothing is in the way"),
        1 => writeln!(text, "\n1 thing to mend"),
        told => writeln!(text, "\n{told} things to mend"),
    };
    text
}
