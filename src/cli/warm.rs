//! `grid-mount warm REF`.

use super::{
    CliError,
    args::WarmArgs,
    cache,
    config::{self, Overrides},
    mount::{AGENT_PAUSE, AGENT_TRIES, connect, start_agent},
    output,
    progress::Bar,
};
use crate::agent::control::{WarmProgress, WarmRequest};

/// Through the agent, which is started for it where none runs and then ends with it.
pub async fn warm(args: WarmArgs) -> Result<(), CliError> {
    let settings = config::load(&Overrides::of(&args.catalog, &args.agent))?;
    let request = WarmRequest {
        version: cache::version(&args.reference, &settings)?,
        include: args.include.clone(),
    };
    let mut last = None;
    for _ in 0..AGENT_TRIES {
        let client = match connect(&args.socket).await? {
            Some(client) => client,
            None => start_agent(&settings)?,
        };
        let bar = Bar::new("warming", "bytes");
        let outcome = client
            .warm(&request, |progress| bar.at(progress.bytes, progress.bytes_total))
            .await;
        bar.finish();
        match outcome {
            Ok(done) => {
                show(&args, &done);
                return Ok(());
            }
            Err(error) if error.is_absence() => last = Some(error),
            Err(error) => return Err(CliError::failed(error)),
        }
        tokio::time::sleep(AGENT_PAUSE).await;
    }
    Err(last.map_or(CliError::Told, CliError::failed))
}

fn show(args: &WarmArgs, done: &WarmProgress) {
    if args.output.json {
        output::print_json(done);
        return;
    }
    let reference = match &done.reference {
        Some(reference) => reference.to_string(),
        None => args.reference.clone(),
    };
    output::print(&format!(
        "{} files of {reference} ({}) are in the cache; {} fetched\n",
        done.files,
        output::bytes(done.bytes),
        output::bytes(done.bytes.saturating_sub(done.bytes_before))
    ));
}
