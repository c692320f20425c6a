//! `grid-mount agent`, and `--foreground`: this process serves.

use std::{ffi::OsString, os::fd::AsFd, path::PathBuf, sync::Arc, time::Duration};

use tokio::signal::unix::{SignalKind, signal};

use super::{
    CliError,
    args::{AgentArgs, MountArgs, SocketArgs},
    config::{self, Overrides},
    mount, output,
};
use crate::causes::in_one_line;
use crate::{
    agent::{
        Agent,
        access::{Access, Caller},
        keeping::{self, Keeping},
        launch::{self, KeeperLock, LaunchError, Readiness, SYSTEM_SOCKET, SocketLock},
        server,
    },
    config::{LogFormat, LogLevel},
    keeper::{self, End, Limits, Link, Plan},
};

/// An agent that was started for a mount which then was refused goes again after this.
const FIRST_MOUNT_PATIENCE: Duration = Duration::from_secs(5);
/// Between the last unmount and the end: the answer to it is still on its way.
const LINGER: Duration = Duration::from_millis(50);

pub fn agent(args: AgentArgs) -> Result<(), CliError> {
    if args.keep {
        return keep(&args);
    }
    // SAFETY: the descriptor was inherited for this purpose from `launch::start`, which names it in this
    // hidden flag; nothing else in this process knows of it.
    let mut readiness = match args.ready_fd {
        Some(fd) => unsafe { Readiness::from_raw(fd) },
        None => Readiness::none(),
    };
    let result = agent_inner(&args, &mut readiness);
    if let Err(error) = &result {
        readiness.failed(&match error {
            CliError::Failed(error) => in_one_line(&**error),
            other => other.to_string(),
        });
    }
    result
}

/// The agent's parent. It has one thread, and opens nothing but its log, its lock and what it keeps.
fn keep(args: &AgentArgs) -> Result<(), CliError> {
    start_logging(LogFormat::Text, LogLevel::Info)?;
    // SAFETY: as in `agent`. Whoever waits hears the first agent, which has inherited the descriptor; this
    // one is closed once that runs.
    let mut readiness = match args.ready_fd {
        Some(fd) => unsafe { Readiness::from_raw(fd) },
        None => Readiness::none(),
    };
    let prepared = (|| {
        let settings = config::load(&Overrides::of_agent(args))?;
        let socket = own_socket(&args.socket)?;
        let program = std::env::current_exe().map_err(CliError::failed)?;
        Ok((settings, socket, program))
    })();
    let (settings, socket, program) =
        prepared.inspect_err(|error: &CliError| readiness.failed(&error.to_string()))?;
    let lock = match KeeperLock::acquire(&socket) {
        Ok(lock) => lock,
        Err(LaunchError::AlreadyRunning { .. }) => {
            readiness.already_running();
            return Ok(());
        }
        Err(error) => {
            readiness.failed(&crate::causes::in_one_line(&error));
            return Err(CliError::failed(error));
        }
    };
    let mut arguments: Vec<OsString> = ["agent", "--on-demand", "--kept", "--socket"]
        .map(Into::into)
        .into();
    arguments.push(socket.clone().into());
    arguments.extend(config::agent_arguments(&settings).into_iter().map(Into::into));
    let ready = args.ready_fd.map(|fd| format!("--ready-fd={fd}").into());
    let plan = Plan {
        program,
        arguments,
        first: ready.into_iter().collect(),
        limits: Limits::default(),
    };
    let end = keeper::keep(&plan, || drop(readiness)).map_err(CliError::failed)?;
    if !matches!(end, End::Ended { well: true }) {
        tracing::warn!(?end, "no agent any more: clearing what it left");
        // Every descriptor is closed, so what was mounted is dead.
        if let Ok(agents) = SocketLock::acquire_kept(&socket) {
            keeping::clear(&socket);
            drop(agents);
        }
    }
    drop(lock);
    match end {
        End::Ended { well: true } | End::Stopped => Ok(()),
        End::Ended { well: false } | End::GaveUp { .. } => Err(CliError::Told),
    }
}

fn agent_inner(args: &AgentArgs, readiness: &mut Readiness) -> Result<(), CliError> {
    let overrides = Overrides::of_agent(args);
    let settings = config::load(&overrides)?;
    start_logging(settings.log_format.value, settings.log_level.value)?;
    // A user's own goes with its mounts; root's, started to stay, is for all.
    let everybody = nix::unistd::geteuid().is_root() && !args.on_demand && !args.socket.own_agent;
    let socket = match (everybody, mount::named_socket(&args.socket)) {
        (false, _) => own_socket(&args.socket)?,
        (true, named) => {
            let socket = named.unwrap_or_else(|| SYSTEM_SOCKET.into());
            launch::shared_dir(&socket).map_err(CliError::failed)?;
            socket
        }
    };
    let access = match everybody {
        true => Access::everybody(config::rules(&settings)?),
        false => Access::own(),
    };
    let (link, held) = match args.kept {
        false => (None, Vec::new()),
        true => {
            let socket = std::io::stdin()
                .as_fd()
                .try_clone_to_owned()
                .map_err(CliError::failed)?;
            let (link, held) = Link::new(socket).map_err(CliError::failed)?;
            (Some(link), held)
        }
    };
    let lock = match args.kept {
        true => SocketLock::acquire_kept(&socket),
        false => SocketLock::acquire(&socket),
    };
    let lock = match lock {
        Err(LaunchError::AlreadyRunning { .. }) if args.on_demand && held.is_empty() => {
            readiness.already_running();
            return Ok(());
        }
        lock => lock.map_err(CliError::failed)?,
    };
    let runtime = runtime()?;
    let result = runtime.block_on(async {
        let keeping = Keeping::beside(&socket, link);
        let agent =
            Agent::new(config::agent_config(&settings)?, keeping, access).map_err(CliError::failed)?;
        // Before anything is resumed: a failure from then on would end what lives.
        let listener = lock.bind(everybody).map_err(CliError::failed)?;
        // Only for what has to be mounted again: no reason not to start.
        agent
            .resume(held, &config::store_settings().unwrap_or_default())
            .await;
        serve(&agent, listener, args.on_demand, || readiness.ready()).await
    });
    runtime.shutdown_timeout(Duration::from_secs(5));
    drop(lock);
    result
}

/// An agent in the foreground with one mount, until that is unmounted or a signal comes.
pub fn foreground(args: MountArgs) -> Result<(), CliError> {
    let settings = config::load(&Overrides::of_mount(&args))?;
    start_logging(settings.log_format.value, settings.log_level.value)?;
    let request = mount::request(&args, &settings)?;
    let socket = own_socket(&args.socket)?;
    let lock = SocketLock::acquire(&socket).map_err(|error| match error {
        LaunchError::AlreadyRunning { socket } => CliError::Failed(
            format!(
                "your agent is running already (socket {}): mount without --foreground, or unmount its mounts first, or name another socket and cache with --socket and --cache-dir",
                socket.display()
            )
            .into(),
        ),
        error => CliError::failed(error),
    })?;
    let runtime = runtime()?;
    let result = runtime.block_on(async {
        let keeping = Keeping::beside(&socket, None);
        let agent =
            Agent::new(config::agent_config(&settings)?, keeping, Access::own()).map_err(CliError::failed)?;
        let listener = lock.bind(false).map_err(CliError::failed)?;
        agent.resume(Vec::new(), &request.store_settings).await;
        let info = agent
            .mount(&Caller::this_process(), request)
            .await
            .map_err(CliError::failed)?;
        let serving = serve(&agent, listener, true, || mount::show(&args, &info));
        serving.await
    });
    runtime.shutdown_timeout(Duration::from_secs(5));
    drop(lock);
    result
}

/// Serves the socket until a signal comes or, on demand, the last mount has gone; then unmounts everything.
async fn serve(
    agent: &Arc<Agent>,
    listener: std::os::unix::net::UnixListener,
    on_demand: bool,
    ready: impl FnOnce(),
) -> Result<(), CliError> {
    let listener = tokio::net::UnixListener::from_std(listener).map_err(CliError::failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(CliError::failed)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(CliError::failed)?;
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let serving = tokio::spawn(server::serve(Arc::clone(agent), listener, async {
        let _ = stopped.await;
    }));
    ready();
    let idle = async {
        if !on_demand {
            return std::future::pending::<()>().await;
        }
        loop {
            agent.idle(FIRST_MOUNT_PATIENCE).await;
            tokio::time::sleep(LINGER).await;
            if agent.stop_if_idle() {
                return;
            }
        }
    };
    tokio::select! {
        () = idle => tracing::info!("the last mount has gone: ending"),
        _ = interrupt.recv() => tracing::info!("interrupted: unmounting"),
        _ = terminate.recv() => tracing::info!("asked to end: unmounting"),
    }
    agent.shut_down().await;
    let _ = stop.send(());
    match tokio::time::timeout(Duration::from_secs(5), serving).await {
        Ok(Ok(result)) => result.map_err(CliError::failed),
        Ok(Err(error)) => Err(CliError::failed(error)),
        // A connection that its caller leaves open ends with the process.
        Err(_) => Ok(()),
    }
}

fn own_socket(args: &SocketArgs) -> Result<PathBuf, CliError> {
    match mount::named_socket(args) {
        Some(socket) => Ok(socket),
        None => Ok(mount::runtime_dir()?.socket()),
    }
}

fn runtime() -> Result<tokio::runtime::Runtime, CliError> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(CliError::failed)
}

/// To standard error, which is the log file of an agent started on demand, and the journal of a service.
/// `GRID_MOUNT_LOG` filters finer than a level (`info`, `grid_mount=debug`).
fn start_logging(format: LogFormat, level: LogLevel) -> Result<(), CliError> {
    let filter = tracing_subscriber::EnvFilter::try_from_env("GRID_MOUNT_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(level.to_string()));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(output::stderr_is_terminal() && std::env::var_os("NO_COLOR").is_none());
    // One that is there already stays.
    let _ = match format {
        LogFormat::Text => log.try_init(),
        LogFormat::Json => log.json().flatten_event(true).try_init(),
    };
    Ok(())
}
