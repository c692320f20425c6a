//! `grid-mount team`, `retire`, `status --global`.

use super::{
    CliError,
    args::{RetireArgs, StatusArgs, TeamArgs},
    catalog::{me, open},
    config::{self, Overrides},
    output,
};
use crate::{
    catalog::Team,
    reference::{Reference, VersionSelector},
};

pub async fn team(args: TeamArgs) -> Result<(), CliError> {
    let settings = config::load(&Overrides::of(&args.catalog, &Default::default()))?;
    let catalog = open(&settings).await?;
    let Some(teams) = catalog.teams().await.map_err(CliError::failed)? else {
        return Err(CliError::Failed(
            "this catalog is a store and knows of no teams: who may read the store is in its team".into(),
        ));
    };
    if args.output.json {
        output::print_json(&teams);
    } else if teams.is_empty() {
        output::note("you are in no team");
    } else {
        output::print(&table(&teams));
    }
    Ok(())
}

pub fn table(teams: &[Team]) -> String {
    let rows: Vec<Vec<String>> = teams
        .iter()
        .map(|team| {
            let members: Vec<&str> = team.members.iter().map(AsRef::as_ref).collect();
            vec![team.name.clone(), members.join(", ")]
        })
        .collect();
    output::table(&["TEAM", "MEMBERS"], &rows)
}

/// `grid-mount status --global`
pub async fn mounted(args: StatusArgs) -> Result<(), CliError> {
    let settings = config::load(&Overrides::of(&args.catalog, &Default::default()))?;
    let leases = open(&settings)
        .await?
        .all_leases()
        .await
        .map_err(CliError::failed)?;
    if args.output.json {
        output::print_json(&leases);
    } else if leases.is_empty() {
        output::note("nobody has anything mounted, as far as the catalog is told");
    } else {
        let rows: Vec<Vec<String>> = leases
            .iter()
            .map(|lease| {
                vec![
                    lease.reference.to_string(),
                    lease.user.to_string(),
                    lease.host.clone(),
                    lease.since.strftime("%Y-%m-%d %H:%M:%SZ").to_string(),
                ]
            })
            .collect();
        output::print(&output::table(&["REFERENCE", "USER", "HOST", "SINCE"], &rows));
    }
    Ok(())
}

pub async fn retire(args: RetireArgs) -> Result<(), CliError> {
    let settings = config::load(&Overrides::of(&args.catalog, &Default::default()))?;
    let reference: Reference = args.reference.parse().map_err(CliError::usage)?;
    let VersionSelector::Number(version) = reference.version else {
        return Err(CliError::Usage(format!(
            "{}: name the version to retire by its number",
            args.reference
        )));
    };
    let catalog = open(&settings).await?;
    let me = me(&*catalog, &settings);
    let pinned = reference.qualify(&me).at(version);
    catalog
        .retire(&pinned, &me, args.in_use)
        .await
        .map_err(CliError::failed)?;
    output::print(&format!("{pinned} is retired\n"));
    Ok(())
}
