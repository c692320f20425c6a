//! `grid-mount agent`, and `--foreground`: this process serves.

use std::{path::PathBuf, sync::Arc, time::Duration};

use tokio::signal::unix::{SignalKind, signal};

use super::{
    CliError,
    args::{AgentArgs, MountArgs, SocketArgs},
    config::{self, Overrides},
    mount, output,
};
use crate::agent::{
    Agent,
    launch::{LaunchError, Readiness, SocketLock},
    server,
};
use crate::causes::in_one_line;

/// An agent that was started for a mount which then was refused goes again after this.
const FIRST_MOUNT_PATIENCE: Duration = Duration::from_secs(5);
/// Between the last unmount and the end: the answer to it is still on its way.
const LINGER: Duration = Duration::from_millis(50);

pub fn agent(args: AgentArgs) -> Result<(), CliError> {
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

fn agent_inner(args: &AgentArgs, readiness: &mut Readiness) -> Result<(), CliError> {
    start_logging();
    let settings = config::load(&Overrides::of(&Default::default(), &args.agent))?;
    let socket = own_socket(&args.socket)?;
    let lock = match SocketLock::acquire(&socket) {
        Err(LaunchError::AlreadyRunning { .. }) if args.on_demand => {
            readiness.already_running();
            return Ok(());
        }
        lock => lock.map_err(CliError::failed)?,
    };
    let runtime = runtime()?;
    let result = runtime.block_on(async {
        let agent = Agent::new(config::agent_config(&settings)?).map_err(CliError::failed)?;
        serve(&agent, &lock, args.on_demand, || readiness.ready()).await
    });
    runtime.shutdown_timeout(Duration::from_secs(5));
    drop(lock);
    result
}

/// An agent in the foreground with one mount, until that is unmounted or a signal comes.
pub fn foreground(args: MountArgs) -> Result<(), CliError> {
    start_logging();
    let settings = config::load(&Overrides::of_mount(&args))?;
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
        let agent = Agent::new(config::agent_config(&settings)?).map_err(CliError::failed)?;
        let info = agent.mount(request).await.map_err(CliError::failed)?;
        let serving = serve(&agent, &lock, true, || mount::show(&args, &info));
        serving.await
    });
    runtime.shutdown_timeout(Duration::from_secs(5));
    drop(lock);
    result
}

/// Serves the socket until a signal comes or, on demand, the last mount has gone; then unmounts everything.
async fn serve(
    agent: &Arc<Agent>,
    lock: &SocketLock,
    on_demand: bool,
    ready: impl FnOnce(),
) -> Result<(), CliError> {
    let listener = lock.bind().map_err(CliError::failed)?;
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

/// To standard error, which is the log file of an agent started on demand. `GRID_MOUNT_LOG` filters
/// (`info`, `grid_mount=debug`).
fn start_logging() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("GRID_MOUNT_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(output::stderr_is_terminal() && std::env::var_os("NO_COLOR").is_none())
        .try_init();
}
