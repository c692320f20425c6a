//! `grid-mount profile record`.

use super::{
    CliError,
    args::ProfileCommand,
    config::{self, Overrides},
    mount, output,
};
use crate::agent::control::{ProfileOutcome, ProfileRequest};

pub async fn profile(command: ProfileCommand) -> Result<(), CliError> {
    let ProfileCommand::Record(args) = command;
    let settings = config::load(&Overrides::of(&args.catalog, &Default::default()))?;
    let request = ProfileRequest {
        target: mount::named(&args.target, &settings)?,
    };
    let Some(client) = mount::connect(&args.socket).await? else {
        return Err(CliError::Failed(
            format!("{} is not mounted: no agent is running", args.target).into(),
        ));
    };
    let outcomes = client.keep_profiles(&request).await.map_err(CliError::failed)?;
    if args.output.json {
        output::print_json(&outcomes);
    }
    let mut result = Ok(());
    for outcome in &outcomes {
        if !args.output.json {
            output::print(&text(outcome));
        }
        if let Some(error) = &outcome.error {
            output::note(&format!("grid-mount: {}: {error}", outcome.reference));
            result = Err(CliError::Told);
        }
    }
    result
}

fn text(outcome: &ProfileOutcome) -> String {
    let place = match (&outcome.shared_at, &outcome.kept_at) {
        (Some(shared), _) => format!("for everybody, at {shared}"),
        (None, Some(path)) => format!("on this host, at {}", path.display()),
        (None, None) => "nowhere".to_owned(),
    };
    format!(
        "{}: the order of {} blocks ({}) is kept {place}\n",
        outcome.reference,
        outcome.blocks,
        output::bytes(outcome.bytes)
    )
}
