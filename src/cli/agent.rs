//! `grid-mount agent`, and `--foreground`: this process serves.

use std::{ffi::OsString, net::TcpListener, os::fd::AsFd, path::PathBuf, sync::Arc, time::Duration};

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::task::AbortOnDropHandle;

use super::{
    CliError,
    args::{AgentArgs, MountArgs, SocketArgs},
    config::{self, Overrides},
    logging::{self, SetLevel},
    mount,
};
use crate::causes::in_one_line;
use crate::{
    agent::{
        Agent,
        access::{Access, Caller},
        keeping::{self, Keeping, KeptBy},
        launch::{self, KeeperLock, LaunchError, Readiness, SYSTEM_SOCKET, SocketLock},
        metrics, reload, server,
        systemd::{self, Given, Manager, Wish},
    },
    config::{LogFormat, LogLevel, MetricsListen, Settings},
    keeper::{self, End, Limits, Plan},
};

/// An agent that was started for a mount which then was refused goes again after this.
const FIRST_MOUNT_PATIENCE: Duration = Duration::from_secs(5);
/// Between the last unmount and the end: the answer to it is still on its way.
const LINGER: Duration = Duration::from_millis(50);

/// What this process holds for others (keys, tokens) is not to lie in a core file. Only the soft limit:
/// `prlimit --core` allows cores again where one is wanted.
pub fn leave_no_core() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let lowered =
        getrlimit(Resource::RLIMIT_CORE).and_then(|(_, most)| setrlimit(Resource::RLIMIT_CORE, 0, most));
    if let Err(error) = lowered {
        tracing::warn!(%error, "core files are not prevented");
    }
}

pub fn agent(args: AgentArgs) -> Result<(), CliError> {
    leave_no_core();
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
    let _ = logging::start(LogFormat::Text, LogLevel::Info);
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
    let level = logging::start_exporting(settings.log_format.value, settings.log_level.value);
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
    // A user's own agent may be started from within a unit that is none of ours.
    let manager = match args.on_demand || args.kept {
        true => None,
        false => Manager::of_this_process()
            .map_err(CliError::failed)?
            .map(Arc::new),
    };
    let mut control = None;
    let (kept_by, held) = match (&manager, args.kept) {
        (None, false) => (KeptBy::Nobody, Vec::new()),
        (Some(manager), false) => {
            // SAFETY: the first and only time, and nothing else here takes numbers it did not open.
            let given = unsafe { Given::take() };
            control = given.control;
            (KeptBy::Systemd(Arc::clone(manager)), given.held)
        }
        (_, true) => {
            let socket = std::io::stdin()
                .as_fd()
                .try_clone_to_owned()
                .map_err(CliError::failed)?;
            KeptBy::keeper(socket).map_err(CliError::failed)?
        }
    };
    let lock = match args.kept {
        true => SocketLock::acquire_kept(&socket),
        false => SocketLock::acquire(&socket),
    };
    let mut lock = match lock {
        Err(LaunchError::AlreadyRunning { .. }) if args.on_demand && held.is_empty() => {
            readiness.already_running();
            return Ok(());
        }
        lock => lock.map_err(CliError::failed)?,
    };
    let runtime = runtime()?;
    let result = runtime.block_on(async {
        let keeping = Keeping::beside(&socket, kept_by);
        let metrics = metrics_listener(&settings);
        let agent =
            Agent::serving(config::agent_config(&settings)?, keeping, access).map_err(CliError::failed)?;
        agent.rereads(reread(overrides, &settings, everybody, level));
        // Before anything is resumed: a failure from then on would end what lives.
        let listener = match (control, everybody) {
            (Some(control), _) => lock.adopt(control),
            (None, true) => lock.bind_for_all(),
            (None, false) => lock.bind(),
        }
        .map_err(CliError::failed)?;
        // Only for what has to be mounted again: no reason not to start.
        agent
            .resume(held, &config::store_settings().unwrap_or_default())
            .await;
        let _scraped = metrics.map(|listener| scraped(&agent, listener));
        let ready = || {
            readiness.ready();
            if let Some(manager) = &manager {
                begin_under(manager, &agent);
            }
        };
        serve(&agent, listener, args.on_demand, manager.as_deref(), ready).await
    });
    runtime.shutdown_timeout(Duration::from_secs(5));
    drop(lock);
    result
}

/// An agent in the foreground with one mount, until that is unmounted or a signal comes.
pub fn foreground(args: MountArgs) -> Result<(), CliError> {
    leave_no_core();
    let settings = config::load(&Overrides::of_mount(&args))?;
    let _ = logging::start_exporting(settings.log_format.value, settings.log_level.value);
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
        let keeping = Keeping::beside(&socket, KeptBy::Nobody);
        let metrics = metrics_listener(&settings);
        let agent = Agent::new(config::agent_config(&settings)?, keeping).map_err(CliError::failed)?;
        let _scraped = metrics.map(|listener| scraped(&agent, listener));
        let listener = lock.bind().map_err(CliError::failed)?;
        agent.resume(Vec::new(), &request.store_settings).await;
        let info = agent
            .mount(&Caller::this_process(), request)
            .await
            .map_err(CliError::failed)?;
        let serving = serve(&agent, listener, true, None, || mount::show(&args, &info));
        serving.await
    });
    runtime.shutdown_timeout(Duration::from_secs(5));
    drop(lock);
    result
}

/// Tells systemd that the agent is ready, and from then on that it is well.
fn begin_under(manager: &Arc<Manager>, agent: &Arc<Agent>) {
    let mounts = agent.mount_count();
    if let Err(error) = manager.ready(&format!("serving, {mounts} mounts resumed")) {
        tracing::warn!(%error, "systemd does not know that this agent is ready");
    }
    let Some(patience) = manager.watchdog else {
        return;
    };
    let (manager, agent) = (Arc::clone(manager), Arc::clone(agent));
    tokio::spawn(async move {
        loop {
            // Hangs where the agent does: the runtime that runs this, the table that every request needs.
            agent.mount_count();
            if let Err(error) = manager.well() {
                tracing::warn!(%error, "systemd does not know that this agent is well");
            }
            tokio::time::sleep(patience / 3).await;
        }
    });
}

/// Ends this process and leaves its mounts to the next one: dropping them would unmount them.
fn leave(agent: &Agent, manager: &Manager) -> ! {
    let mounts = agent.mount_count();
    tracing::info!(mounts, "leaving the mounts to the next agent");
    // Whether systemd hears it or not, the next one comes.
    let _ = manager.stopping("leaving the mounts to the next agent");
    agent.leave();
    std::process::exit(0)
}

/// Serves the socket until a signal comes or, on demand, the last mount has gone; then unmounts everything,
/// unless systemd is about to start another agent.
async fn serve(
    agent: &Arc<Agent>,
    listener: std::os::unix::net::UnixListener,
    on_demand: bool,
    manager: Option<&Manager>,
    ready: impl FnOnce(),
) -> Result<(), CliError> {
    let listener = tokio::net::UnixListener::from_std(listener).map_err(CliError::failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(CliError::failed)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(CliError::failed)?;
    let mut hang_up = signal(SignalKind::hangup()).map_err(CliError::failed)?;
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
    let hung_up = async {
        while hang_up.recv().await.is_some() && agent.can_reload() {
            // What is wrong with them is in the log.
            let _ = agent.reload().await;
        }
    };
    tokio::select! {
        () = hung_up => tracing::info!("its terminal has gone: unmounting"),
        () = idle => tracing::info!("the last mount has gone: ending"),
        _ = interrupt.recv() => tracing::info!("interrupted: unmounting"),
        _ = terminate.recv() => {
            if let Some(manager) = manager
                && systemd::wish().await == Wish::GoOn
            {
                leave(agent, manager);
            }
            tracing::info!("asked to end: unmounting");
        }
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

/// An address that is taken keeps nobody's mounts from being served.
fn metrics_listener(settings: &Settings) -> Option<TcpListener> {
    let MetricsListen::At(address) = settings.metrics_listen.value else {
        return None;
    };
    match TcpListener::bind(address) {
        Ok(listener) => Some(listener),
        Err(error) => {
            tracing::error!(%address, %error, "nobody can read metrics there; the control socket has them");
            None
        }
    }
}

fn scraped(agent: &Arc<Agent>, listener: TcpListener) -> AbortOnDropHandle<()> {
    let agent = Arc::clone(agent);
    AbortOnDropHandle::new(tokio::spawn(async move {
        if let Err(error) = metrics::serve(agent, listener).await {
            tracing::error!(%error, "metrics are not served any more");
        }
    }))
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

/// Reads the settings from where they came when the agent started.
fn reread(
    overrides: Overrides,
    started_with: &Settings,
    everybody: bool,
    set_level: SetLevel,
) -> Box<reload::Reread> {
    let before = started_with.explain();
    Box::new(move || {
        let read = || -> Result<reload::Settings, CliError> {
            let settings = config::load(&overrides)?;
            let rules = everybody.then(|| config::rules(&settings)).transpose()?;
            set_level(settings.log_level.value);
            // These count at once, and these concern callers.
            let now = |key| {
                matches!(
                    key,
                    "idle_timeout" | "log_level" | "catalog" | "user" | "prefetch"
                )
            };
            let differ = before.iter().zip(settings.explain());
            Ok(reload::Settings {
                rules,
                idle_timeout: settings.idle_timeout.value.0,
                at_next_start: differ
                    .filter(|(old, new)| old.value != new.value && !now(new.key))
                    .map(|(_, new)| new.key.to_owned())
                    .collect(),
            })
        };
        read().map_err(|error| match error {
            CliError::Failed(error) => in_one_line(&*error),
            other => other.to_string(),
        })
    })
}
