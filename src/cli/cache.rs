//! `grid-mount cache …`: through the agent or, where none runs, on the cache directory itself.

use std::sync::Arc;

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
        Agent, AgentError,
        client::{Client, ClientError},
        control::{CacheInfo, EvictOutcome, EvictRequest, VerifyProgress, VersionRequest},
    },
    config::Settings,
    reference::Reference,
};

pub async fn cache(command: CacheCommand) -> Result<(), CliError> {
    match command {
        CacheCommand::Status(args) => status(&args).await,
        CacheCommand::Path(args) => path(&args).await,
        CacheCommand::Evict(args) => evict(&args).await,
        CacheCommand::Verify(args) => verify(&args).await,
    }
}

/// Who has the cache open.
enum Holder {
    Agent(Client),
    /// This process: no agent runs.
    Here(Arc<Agent>),
}

#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error(transparent)]
    Agent(#[from] AgentError),
}

impl Failure {
    /// The agent was just ending: soon there is another, or none.
    fn passes(&self) -> bool {
        match self {
            Self::Client(error) => error.is_absence(),
            Self::Agent(error) => error.is_cache_taken(),
        }
    }
}

/// Does the work where the cache is open, wherever that is by then.
async fn with_holder<T>(
    args: &CacheCommandArgs,
    settings: &Settings,
    work: impl AsyncFn(Holder) -> Result<T, Failure>,
) -> Result<T, CliError> {
    let mut last = None;
    for _ in 0..AGENT_TRIES {
        let holder = match connect(&args.socket).await? {
            Some(client) => Ok(Holder::Agent(client)),
            None => Agent::new(config::agent_config(settings)?)
                .map(Holder::Here)
                .map_err(Failure::from),
        };
        let outcome = match holder {
            Ok(holder) => work(holder).await,
            Err(failure) => Err(failure),
        };
        match outcome {
            Ok(done) => return Ok(done),
            Err(failure) if failure.passes() => last = Some(failure),
            Err(failure) => return Err(CliError::failed(failure)),
        }
        tokio::time::sleep(AGENT_PAUSE).await;
    }
    Err(last.map_or(CliError::Told, CliError::failed))
}

async fn status(args: &CacheCommandArgs) -> Result<(), CliError> {
    let settings = config::load(&Overrides::of(&Default::default(), &args.agent))?;
    let info = with_holder(args, &settings, async |holder| match holder {
        Holder::Agent(client) => Ok(client.cache().await?),
        Holder::Here(agent) => Ok(agent.cache_info().await),
    })
    .await?;
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
    let outcome = with_holder(&args.common, &settings, async |holder| match holder {
        Holder::Agent(client) => Ok(client.evict(&request).await?),
        Holder::Here(agent) => Ok(agent.evict(request.clone()).await?),
    })
    .await?;
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
    let done = with_holder(args, &settings, async |holder| match holder {
        Holder::Agent(client) => {
            let total = client.cache().await?.objects;
            Ok(client.verify(|progress| bar.at(progress.objects, total)).await?)
        }
        Holder::Here(agent) => {
            let total = agent.cache_info().await.objects;
            let (progress, mut seen) = watch::channel(VerifyProgress::default());
            let watching = async {
                while seen.changed().await.is_ok() {
                    bar.at(seen.borrow_and_update().objects, total);
                }
            };
            Ok(futures::join!(agent.verify(progress), watching).0?)
        }
    })
    .await?;
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
        store_settings: config::store_settings(),
    })
}
