//! `grid-mount REF`, `grid-mount unmount`.

use std::{
    env,
    os::{
        fd::{AsRawFd, BorrowedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
    time::Duration,
};

use super::{
    CliError,
    args::{MountArgs, SocketArgs, UnmountArgs},
    config::{self, Overrides},
    output, report,
};
use crate::{
    agent::{
        self,
        client::Client,
        control::{MountInfo, MountRequest, UnmountOutcome, UnmountRequest, UnmountTarget},
        launch::{self, RuntimeDir, SYSTEM_SOCKET},
    },
    config::{Settings, Source},
    reference::{DatastoreName, Reference},
};

/// An agent may be ending just as it is asked for something; a new one is then started, once it has.
pub const AGENT_TRIES: usize = 50;
/// A mount, which nobody asks for in vain, waits longer: an agent that ends may wait for a busy disk.
const MOUNT_TRIES: usize = 300;
pub const AGENT_PAUSE: Duration = Duration::from_millis(100);

pub async fn mount(args: MountArgs) -> Result<(), CliError> {
    let info = make(&args, None).await?;
    show(&args, &info);
    Ok(())
}

/// `trigger` is the open mount point of an automount.
pub async fn make(args: &MountArgs, trigger: Option<BorrowedFd<'_>>) -> Result<MountInfo, CliError> {
    let settings = config::load(&Overrides::of_mount(args))?;
    let mut request = request(args, &settings)?;
    request.trigger = trigger.and_then(|trigger| u32::try_from(trigger.as_raw_fd()).ok());
    through_agent(&args.socket, &settings, &request).await
}

/// Asks the agent there is, or starts one.
pub async fn through_agent(
    socket: &SocketArgs,
    settings: &Settings,
    request: &MountRequest,
) -> Result<MountInfo, CliError> {
    let mut last = None;
    for _ in 0..MOUNT_TRIES {
        let client = match connect(socket).await? {
            Some(client) => client,
            None => start_agent(settings)?,
        };
        match client.mount(request).await {
            Ok(info) => return Ok(info),
            Err(error) if error.is_absence() => last = Some(error),
            Err(error) => return Err(CliError::failed(error)),
        }
        tokio::time::sleep(AGENT_PAUSE).await;
    }
    Err(last.map_or(CliError::Told, CliError::failed))
}

/// What the agent is asked: everything that concerns the caller.
pub fn request(args: &MountArgs, settings: &Settings) -> Result<MountRequest, CliError> {
    let Some(typed) = &args.reference else {
        return Err(CliError::Usage(
            "name what to mount: user:datastore/version".into(),
        ));
    };
    let reference: Reference = typed.parse().map_err(CliError::usage)?;
    let mount_point = match &args.mount_point {
        Some(path) => absolute(path)?,
        None => default_mount_point(&reference.datastore)?,
    };
    Ok(MountRequest {
        reference: typed.clone(),
        mount_point,
        catalog: settings.catalog.value.clone(),
        user: settings.user.value.clone(),
        store_settings: config::store_settings()?,
        io_mode: args.io_mode.into(),
        prefetch: settings.prefetch.value,
        share: args.share.map(Into::into).unwrap_or_default(),
        idle_timeout: (settings.idle_timeout.source != Source::Default)
            .then(|| settings.idle_timeout.value.0.map_or(0, |time| time.as_secs())),
        trigger: None,
        record_profile: args.record_profile,
    })
}

pub fn show(args: &MountArgs, info: &MountInfo) {
    if args.output.json {
        output::print_json(info);
        return;
    }
    let already = if info.already_mounted { " already" } else { "" };
    output::print(&format!(
        "{} ({} files, {}) is{already} at {}\n",
        info.reference,
        info.totals.files,
        output::bytes(info.totals.bytes),
        info.mount_point.display()
    ));
}

/// `/datastores/NAME` for root, `~/datastores/NAME` otherwise.
pub fn default_mount_point(datastore: &DatastoreName) -> Result<PathBuf, CliError> {
    if nix::unistd::geteuid().is_root() {
        return Ok(Path::new("/datastores").join(datastore.as_str()));
    }
    match env::var_os("HOME") {
        Some(home) if Path::new(&home).is_absolute() => {
            Ok(Path::new(&home).join("datastores").join(datastore.as_str()))
        }
        _ => Err(CliError::Usage("HOME is not set: name a mount point".into())),
    }
}

/// The path without `.`, `..` and symbolic links, which the agent, elsewhere in the tree and with more
/// rights, could not or would not resolve as typed.
pub fn absolute(path: &Path) -> Result<PathBuf, CliError> {
    let path = std::path::absolute(path).map_err(CliError::failed)?;
    for above in path.ancestors() {
        if let (Ok(canonical), Ok(below)) = (above.canonicalize(), path.strip_prefix(above)) {
            let plain = |part| matches!(part, std::path::Component::Normal(_));
            if below.components().all(plain) {
                return Ok(if below.as_os_str().is_empty() {
                    canonical
                } else {
                    canonical.join(below)
                });
            }
        }
    }
    let mut clean = PathBuf::new();
    for part in path.components() {
        match part {
            std::path::Component::ParentDir => {
                clean.pop();
            }
            part => clean.push(part),
        }
    }
    Ok(clean)
}

/// The agent to ask: the one named, the system's, or the user's own; `None` where the last is to be started.
pub async fn connect(args: &SocketArgs) -> Result<Option<Client>, CliError> {
    if let Some(socket) = named_socket(args) {
        let client = Client::new(&socket);
        client.agent().await.map_err(CliError::failed)?;
        return Ok(Some(client));
    }
    let system = Client::new(Path::new(SYSTEM_SOCKET));
    if !args.own_agent && system.agent().await.is_ok() {
        return Ok(Some(system));
    }
    let own = Client::new(&runtime_dir()?.socket());
    match own.agent().await {
        Ok(_) => Ok(Some(own)),
        Err(error) if error.is_absence() => Ok(None),
        Err(error) => Err(CliError::failed(error)),
    }
}

/// `--socket`, else `GRID_MOUNT_SOCKET`, unless the user's own agent is wanted.
pub fn named_socket(args: &SocketArgs) -> Option<PathBuf> {
    if args.own_agent {
        return None;
    }
    let from_environment = || {
        env::var_os("GRID_MOUNT_SOCKET")
            .filter(|path| !path.is_empty())
            .map(PathBuf::from)
    };
    args.socket.clone().or_else(from_environment)
}

pub fn runtime_dir() -> Result<RuntimeDir, CliError> {
    let xdg = env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    RuntimeDir::of_user(xdg.as_deref()).map_err(CliError::failed)
}

pub fn start_agent(settings: &Settings) -> Result<Client, CliError> {
    let runtime = runtime_dir()?;
    let program = env::current_exe().map_err(CliError::failed)?;
    launch::start(&runtime, &program, &config::agent_arguments(settings)).map_err(CliError::failed)?;
    Ok(Client::new(&runtime.socket()))
}

pub async fn unmount(args: UnmountArgs) -> Result<(), CliError> {
    let settings = config::load(&Overrides::of(&args.catalog, &Default::default()))?;
    let target = target(&args, &settings)?;
    let request = UnmountRequest {
        target,
        lazy: args.lazy,
    };
    let outcomes = match connect(&args.socket).await? {
        None => None,
        Some(client) => match client.unmount(&request).await {
            Ok(outcomes) => Some(outcomes),
            // It has ended with its last mount since it was asked whether it is there.
            Err(error) if error.is_absence() => None,
            Err(error) => return Err(CliError::failed(error)),
        },
    };
    match outcomes {
        Some(outcomes) => tell(&args, &outcomes),
        None if args.all => tell(&args, &[]),
        None => {
            if let UnmountTarget::MountPoint(path) = &request.target
                && let Some(outcome) = agent::unmount_orphan(path, args.lazy, None)
            {
                return tell(&args, &[outcome]);
            }
            let what = args.target.as_deref().unwrap_or_default();
            Err(CliError::Failed(
                format!("{what} is not mounted: no agent is running").into(),
            ))
        }
    }
}

fn tell(args: &UnmountArgs, outcomes: &[UnmountOutcome]) -> Result<(), CliError> {
    if args.output.json {
        output::print_json(&outcomes);
    }
    let mut result = Ok(());
    for outcome in outcomes {
        let place = outcome.mount_point.display();
        match &outcome.error {
            Some(error) => {
                output::note(&format!(
                    "grid-mount: {} is still at {place}: {error}",
                    outcome.reference
                ));
                result = Err(CliError::Told);
            }
            None if !args.output.json && outcome.holds > 0 => output::print(&format!(
                "{} stays at {place}: it was mounted {} more times\n",
                outcome.reference, outcome.holds
            )),
            None if !args.output.json => {
                output::print(&format!("{} is no longer at {place}\n", outcome.reference));
                if let Some(done) = outcome.report.as_ref().filter(|_| args.report) {
                    output::print(&report::text(done));
                }
            }
            None => {}
        }
    }
    result
}

fn target(args: &UnmountArgs, settings: &Settings) -> Result<UnmountTarget, CliError> {
    match args.target.as_deref().filter(|_| !args.all) {
        Some(typed) => named(typed, settings),
        None => Ok(UnmountTarget::All),
    }
}

/// A path is what looks like one, or is a mount point; anything else is a reference. That a directory has the
/// name says nothing: `publish ./photos photos`, mount, `unmount photos` are all said in one place.
pub fn named(typed: &str, settings: &Settings) -> Result<UnmountTarget, CliError> {
    let looks_like_path = typed.starts_with(['/', '.', '~']) || is_mount_point(Path::new(typed));
    if looks_like_path {
        return Ok(UnmountTarget::MountPoint(absolute(Path::new(typed))?));
    }
    let _: Reference = typed.parse().map_err(CliError::usage)?;
    Ok(UnmountTarget::Reference {
        reference: typed.to_owned(),
        user: settings.user.value.clone(),
    })
}

fn is_mount_point(path: &Path) -> bool {
    match (path.symlink_metadata(), path.join("..").metadata()) {
        (Ok(here), Ok(above)) => here.is_dir() && here.dev() != above.dev(),
        // What a dead agent left.
        (Err(error), _) => error.raw_os_error() == Some(nix::errno::Errno::ENOTCONN as i32),
        _ => false,
    }
}
