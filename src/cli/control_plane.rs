//! `grid-mount catalog serve|user|team|token`: what whoever runs a control plane types.

use std::{path::PathBuf, time::Duration};

use jiff::Timestamp;
use tokio::net::TcpListener;

use super::{
    CliError,
    args::{CatalogAdminArgs, CatalogAdminCommand, ServeArgs, TeamCommand, TokenCommand, UserCommand},
    config::{self, Overrides},
    logging, output,
};
use crate::{
    catalog::server::{
        Audit, ControlPlane, Directory, Keeper, Lending, Options, ServerError, TlsFiles, open_store,
    },
    config::Settings,
    reference::UserName,
};

pub async fn admin(args: CatalogAdminArgs) -> Result<(), CliError> {
    let settings = config::load(&Overrides::of(&args.catalog, &Default::default()))?;
    let keeper = keeper(&settings, args.users)?;
    match args.command {
        CatalogAdminCommand::Serve(serve) => self::serve(serve, &settings, keeper).await,
        CatalogAdminCommand::User { command } => user(command, &keeper).await,
        CatalogAdminCommand::Team { command } => team(command, &keeper).await,
        CatalogAdminCommand::Token { command } => token(command, &keeper).await,
    }
}

/// Users and teams are in the catalog's store, unless a file is named.
fn keeper(settings: &Settings, file: Option<PathBuf>) -> Result<Keeper, CliError> {
    match file {
        Some(path) => Ok(Keeper::File(path)),
        None => store(settings).map(Keeper::in_store),
    }
}

fn store(settings: &Settings) -> Result<crate::origin::Store, CliError> {
    super::catalog::make_directory(&settings.catalog.value)?;
    match open_store(&settings.catalog.value, &config::store_settings()?) {
        Ok(store) => Ok(store),
        Err(error @ ServerError::NotAStore { .. }) => Err(CliError::usage(error)),
        Err(error) => Err(CliError::failed(error)),
    }
}

async fn serve(args: ServeArgs, settings: &Settings, keeper: Keeper) -> Result<(), CliError> {
    super::agent::leave_no_core();
    let _ = logging::start(settings.log_format.value, settings.log_level.value);
    let lending = match args.credentials {
        Some(path) => Lending::from_file(path).await.map_err(CliError::failed)?,
        None => Lending::nothing(),
    };
    let audit = match &args.audit_log {
        Some(path) => Audit::in_file(path).map_err(|source| {
            CliError::failed(ServerError::Audit {
                path: path.clone(),
                source,
            })
        })?,
        None => Audit::in_log(),
    };
    let tls = args
        .tls_certificate
        .zip(args.tls_key)
        .map(|(certificates, key)| TlsFiles { certificates, key });
    let options = Options {
        rate: args.rate,
        lease: Duration::from_secs(args.lease),
    };
    let listener = TcpListener::bind(args.listen).await.map_err(|error| {
        CliError::Failed(format!("{} cannot be listened on: {error}", args.listen).into())
    })?;
    let address = listener.local_addr().map_err(CliError::failed)?;
    let scheme = if tls.is_some() { "https" } else { "http" };
    let plane = ControlPlane::new(store(settings)?, keeper, lending, audit, options);
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())
        .map_err(CliError::failed)?;
    // Whoever started this reads the port from here.
    output::print(&format!("{scheme}://{address}\n"));
    let stop = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = tokio::signal::ctrl_c() => {}
        }
    };
    plane.serve(listener, tls, stop).await.map_err(CliError::failed)
}

async fn user(command: UserCommand, keeper: &Keeper) -> Result<(), CliError> {
    match command {
        UserCommand::Add { user } => {
            let user = name(&user)?;
            changed(keeper, |directory| directory.add_user(user.clone())).await
        }
        UserCommand::Remove { user } => {
            let user = name(&user)?;
            changed(keeper, |directory| directory.remove_user(&user)).await
        }
        UserCommand::List => {
            let directory = keeper.read().await.map_err(CliError::failed)?;
            for user in directory.users() {
                output::print(&format!("{user}\n"));
            }
            Ok(())
        }
    }
}

async fn team(command: TeamCommand, keeper: &Keeper) -> Result<(), CliError> {
    match command {
        TeamCommand::Add { team, members } => {
            let members = names(&members)?;
            changed(keeper, |directory| directory.add_to_team(&team, &members)).await
        }
        TeamCommand::Remove { team, members } => {
            let members = names(&members)?;
            changed(keeper, |directory| directory.remove_from_team(&team, &members)).await
        }
        TeamCommand::List => {
            let directory = keeper.read().await.map_err(CliError::failed)?;
            output::print(&super::team::table(&directory.all_teams()));
            Ok(())
        }
    }
}

async fn token(command: TokenCommand, keeper: &Keeper) -> Result<(), CliError> {
    match command {
        TokenCommand::New { user, label, days } => {
            let user = name(&user)?;
            let expires = days
                .map(|days| Timestamp::now().checked_add(Duration::from_secs(u64::from(days) * 86_400)))
                .transpose()
                .map_err(CliError::usage)?;
            let (info, secret) = keeper
                .change(|directory| directory.new_token(&user, &label, expires))
                .await
                .map_err(CliError::failed)?;
            output::note(&format!(
                "token {} of {user}: shown once, kept nowhere; revoke it with `grid-mount catalog token revoke {}`",
                info.id, info.id
            ));
            output::print(&format!("{}\n", secret.expose()));
            Ok(())
        }
        TokenCommand::Revoke { id } => changed(keeper, |directory| directory.revoke(&id)).await,
        TokenCommand::List => {
            let directory = keeper.read().await.map_err(CliError::failed)?;
            let rows: Vec<Vec<String>> = directory
                .tokens()
                .into_iter()
                .map(|token| {
                    let expires = token.expires.map_or_else(|| "never".to_owned(), day);
                    vec![
                        token.id,
                        token.user.to_string(),
                        day(token.created),
                        expires,
                        token.label,
                    ]
                })
                .collect();
            output::print(&output::table(
                &["ID", "USER", "CREATED", "EXPIRES", "LABEL"],
                &rows,
            ));
            Ok(())
        }
    }
}

fn day(at: Timestamp) -> String {
    at.strftime("%Y-%m-%d").to_string()
}

async fn changed(
    keeper: &Keeper,
    change: impl FnMut(&mut Directory) -> Result<(), crate::catalog::server::DirectoryError>,
) -> Result<(), CliError> {
    keeper.change(change).await.map_err(CliError::failed)
}

fn name(text: &str) -> Result<UserName, CliError> {
    text.parse().map_err(CliError::usage)
}

fn names(texts: &[String]) -> Result<Vec<UserName>, CliError> {
    texts.iter().map(|text| name(text)).collect()
}
