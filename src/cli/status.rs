//! `grid-mount status`.

use serde::Serialize;

use super::{CliError, args::StatusArgs, mount::connect, output};
use crate::agent::control::{AgentInfo, MountInfo};

#[derive(Serialize)]
struct Status {
    /// `null` when none runs.
    agent: Option<AgentInfo>,
    mounts: Vec<MountInfo>,
}

pub async fn status(args: StatusArgs) -> Result<(), CliError> {
    if args.global {
        return super::team::mounted(args).await;
    }
    let status = ask(&args).await?.unwrap_or(Status {
        agent: None,
        mounts: Vec::new(),
    });
    if args.output.json {
        output::print_json(&status);
    } else {
        output::print(&text(&status));
    }
    Ok(())
}

/// `None` where no agent runs, or it ends just now.
async fn ask(args: &StatusArgs) -> Result<Option<Status>, CliError> {
    let Some(client) = connect(&args.socket).await? else {
        return Ok(None);
    };
    match futures::try_join!(client.agent(), client.mounts()) {
        Ok((agent, mounts)) => Ok(Some(Status {
            agent: Some(agent),
            mounts,
        })),
        Err(error) if error.is_absence() => Ok(None),
        Err(error) => Err(CliError::failed(error)),
    }
}

fn text(status: &Status) -> String {
    let Some(agent) = &status.agent else {
        return "nothing is mounted; no agent runs (`grid-mount REF` starts one)\n".into();
    };
    let mut text = String::new();
    if status.mounts.is_empty() {
        text.push_str("nothing is mounted\n");
    } else {
        let rows: Vec<Vec<String>> = status
            .mounts
            .iter()
            .map(|mount| {
                vec![
                    mount.reference.to_string(),
                    mount.mount_point.display().to_string(),
                    mount.totals.files.to_string(),
                    output::bytes(mount.totals.bytes),
                    mount.io_mode.clone(),
                    mount.since.strftime("%Y-%m-%d %H:%M:%SZ").to_string(),
                ]
            })
            .collect();
        text.push_str(&output::table(
            &["REFERENCE", "MOUNT POINT", "FILES", "SIZE", "I/O MODE", "SINCE"],
            &rows,
        ));
    }
    text.push_str(&format!(
        "\nagent {} (pid {}), cache {}: {} of {} used\nread from the cache {}, from origins {} in {} requests ({} retries)\n",
        agent.version,
        agent.pid,
        agent.cache_dir.display(),
        output::bytes(agent.cache_used),
        output::bytes(agent.cache_limit),
        output::bytes(agent.bytes_from_cache),
        output::bytes(agent.bytes_from_origin),
        agent.origin_requests,
        agent.retries,
    ));
    if let Some(why) = &agent.cache_degraded {
        text.push_str(&format!("the cache takes nothing new: {why}\n"));
    }
    if let Some(error) = &agent.last_error {
        text.push_str(&format!("last error: {error}\n"));
    }
    text
}
