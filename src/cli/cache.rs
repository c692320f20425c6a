//! `grid-mount cache …`: through the agent or, where none runs, on the cache directory itself.

use std::{path::PathBuf, sync::Arc};

use tokio::sync::watch;

use super::{
    CliError,
    args::{CacheCommand, CacheCommandArgs, CacheEvictArgs},
    config::{self, Overrides},
    mount::{AGENT_PAUSE, AGENT_TRIES, connect},
    output,
    progress::Bar,
};
use crate::{
    agent::{
        Agent, AgentError, CacheError,
        access::Caller,
        client::{Client, ClientError},
        control::{CacheInfo, EvictOutcome, EvictRequest, VerifyProgress, VersionRequest},
    },
    config::Settings,
    reference::Reference,
};

pub async fn cache(command: CacheCommand) -> Result<(), CliError> {
    let mut tries = 0;
    loop {
        let done = match &command {
            CacheCommand::Status(args) => status(args).await,
            CacheCommand::Path(args) => path(args).await,
            CacheCommand::Evict(args) => evict(args).await,
            CacheCommand::Verify(args) => verify(args).await,
        };
        tries += 1;
        match done {
            Err(CliError::Failed(error)) if tries < AGENT_TRIES && changes_hands(&*error) => {
                tokio::time::sleep(AGENT_PAUSE).await;
            }
            done => return done,
        }
    }
}

/// An agent that was there has just ended, or holds the cache until it has.
fn changes_hands(error: &(dyn std::error::Error + 'static)) -> bool {
    let ended = error
        .downcast_ref::<ClientError>()
        .is_some_and(ClientError::is_absence);
    let locked = matches!(
        error.downcast_ref::<AgentError>(),
        Some(AgentError::Cache {
            source: CacheError::Locked { .. },
            ..
        })
    );
    ended || locked
}

/// Who has the cache open.
enum Holder {
    Agent(Client),
    /// This process: no agent runs.
    Here(Arc<Agent>),
}

impl Holder {
    async fn find(args: &CacheCommandArgs, settings: &Settings) -> Result<Self, CliError> {
        match connect(&args.socket).await? {
            Some(client) => Ok(Self::Agent(client)),
            None => {
                let config = config::agent_config(settings)?;
                Ok(Self::Here(
                    Agent::new(config, Default::default()).map_err(CliError::failed)?,
                ))
            }
        }
    }
}

/// There is nothing in it to work on. An agent reads past such a directory; who names it wants to know.
#[derive(Debug, thiserror::Error)]
#[error("the cache directory {} cannot be used: {why}", dir.display())]
struct Unusable {
    dir: PathBuf,
    why: String,
}

impl Unusable {
    async fn refuse(agent: &Agent) -> Result<(), CliError> {
        let CacheInfo { dir, degraded, .. } = agent.cache_info().await;
        match degraded {
            None => Ok(()),
            Some(why) => Err(CliError::failed(Self { dir, why })),
        }
    }
}

async fn status(args: &CacheCommandArgs) -> Result<(), CliError> {
    let settings = config::load(&Overrides::of(&Default::default(), &args.agent))?;
    let info = match Holder::find(args, &settings).await? {
        Holder::Agent(client) => client.cache().await.map_err(CliError::failed)?,
        Holder::Here(agent) => agent.cache_info().await,
    };
    if args.output.json {
        output::print_json(&info);
    } else {
        output::print(&text(&info));
    }
    Ok(())
}

fn text(info: &CacheInfo) -> String {
    let about = if info.scanned { "" } else { " (still counting)" };
    let mut text = format!(
        "{}: {} of {} used by {} objects{about}; {} left free for others\nhits {}, misses {}, evictions {}, not stored {}, damaged {}\n",
        info.dir.display(),
        output::bytes(info.used),
        output::bytes(info.limit),
        info.objects,
        output::bytes(info.min_free),
        info.hits,
        info.misses,
        info.evictions,
        info.fill_errors,
        info.damaged,
    );
    if let Some(why) = &info.degraded {
        text.push_str(&format!("the cache takes nothing new: {why}\n"));
    }
    text
}

/// Opens nothing: the settings say it where no agent does.
async fn path(args: &CacheCommandArgs) -> Result<(), CliError> {
    let dir = match connect(&args.socket).await? {
        Some(client) => client.agent().await.map_err(CliError::failed)?.cache_dir,
        None => {
            let settings = config::load(&Overrides::of(&Default::default(), &args.agent))?;
            settings.cache_dir.value
        }
    };
    if args.output.json {
        output::print_json(&dir);
    } else {
        output::print(&format!("{}\n", dir.display()));
    }
    Ok(())
}

async fn evict(args: &CacheEvictArgs) -> Result<(), CliError> {
    let settings = config::load(&Overrides::of(&args.catalog, &args.common.agent))?;
    let version = match &args.reference {
        Some(reference) => Some(version(reference, &settings)?),
        None => None,
    };
    let request = EvictRequest { version };
    let outcome = match Holder::find(&args.common, &settings).await? {
        Holder::Agent(client) => client.evict(&request).await.map_err(CliError::failed)?,
        Holder::Here(agent) => {
            Unusable::refuse(&agent).await?;
            let evicted = agent.evict(&Caller::this_process(), request).await;
            evicted.map_err(CliError::failed)?
        }
    };
    if args.common.output.json {
        output::print_json(&outcome);
    } else {
        let EvictOutcome {
            reference,
            objects,
            freed,
        } = &outcome;
        let of = reference
            .as_ref()
            .map(|reference| format!(" of {reference}"))
            .unwrap_or_default();
        output::print(&format!(
            "{objects} objects{of} evicted, {} freed\n",
            output::bytes(*freed)
        ));
    }
    Ok(())
}

async fn verify(args: &CacheCommandArgs) -> Result<(), CliError> {
    let settings = config::load(&Overrides::of(&Default::default(), &args.agent))?;
    let bar = Bar::new("checking", "objects");
    let done = match Holder::find(args, &settings).await? {
        Holder::Agent(client) => {
            let total = client.cache().await.map_err(CliError::failed)?.objects;
            client
                .verify(|progress| bar.at(progress.objects, total))
                .await
                .map_err(CliError::failed)?
        }
        Holder::Here(agent) => {
            Unusable::refuse(&agent).await?;
            let total = agent.cache_info().await.objects;
            let (sender, mut seen) = watch::channel(VerifyProgress::default());
            let shown = async {
                while seen.changed().await.is_ok() {
                    let objects = seen.borrow_and_update().objects;
                    bar.at(objects, total);
                }
                std::future::pending().await
            };
            tokio::select! {
                done = agent.verify(sender) => done.map_err(CliError::failed)?,
                never = shown => never,
            }
        }
    };
    bar.finish();
    if args.output.json {
        output::print_json(&done);
    } else {
        output::print(&format!(
            "{} blocks of {} objects checked, {} damaged\n",
            done.blocks, done.objects, done.damaged
        ));
    }
    match done.damaged {
        0 => Ok(()),
        // They are absent from now on; but a disk that does this deserves a look.
        _ => Err(CliError::Told),
    }
}

/// What an agent is asked about a version.
pub fn version(reference: &str, settings: &Settings) -> Result<VersionRequest, CliError> {
    let _: Reference = reference.parse().map_err(CliError::usage)?;
    Ok(VersionRequest {
        reference: reference.to_owned(),
        catalog: settings.catalog.value.clone(),
        user: settings.user.value.clone(),
        store_settings: config::store_settings()?,
    })
}
