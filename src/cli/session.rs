//! `grid-mount session`: what a session wants is in place before it begins.

use std::{
    env,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use super::{
    CliError,
    args::{
        MountArgs, SessionAddArgs, SessionCommand, SessionCommonArgs, SessionStartArgs, SessionStatusArgs,
        ShareArg,
    },
    config::{self, Overrides},
    mount, output,
};
use crate::{
    agent::{control::IoModeWish, launch::SYSTEM_SOCKET},
    session::{
        self, Session, SessionError,
        record::{Datastore, Place, Record, Standing},
        spec::{Spec, Wanted},
    },
};

/// What is to be mounted, where no file says so.
const DATASTORES: &str = "GRID_DATASTORES";
/// The user whose home directory gets a link, where no file says so.
const SESSION_USER: &str = "GRID_SESSION_USER";
const HOST_SPEC: &str = "/etc/grid-mount/session.toml";

pub async fn session(command: SessionCommand) -> Result<(), CliError> {
    match command {
        SessionCommand::Start(args) => start(args).await,
        SessionCommand::Stop(args) => open(&args, None).await?.stop().await.map_err(CliError::failed),
        SessionCommand::Status(args) => status(&args),
        SessionCommand::Add(args) => add(args).await,
        SessionCommand::Remove(args) => {
            let session = open(&args.common, None).await?;
            let gone = session.remove(&args.target).await.map_err(CliError::failed)?;
            for datastore in gone {
                output::print(&format!(
                    "{} is no longer at {}\n",
                    datastore.requested,
                    datastore.path.display()
                ));
            }
            Ok(())
        }
        SessionCommand::Retry(args) => {
            let session = open(&args.common, args.share).await?;
            session.retry().await.map_err(CliError::failed)
        }
    }
}

fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// The session's file: beside the system's agent's socket, or in the user's own runtime directory.
fn place() -> Result<Place, CliError> {
    let dir = match (is_root(), Path::new(SYSTEM_SOCKET).parent()) {
        (true, Some(dir)) => {
            session::make_directory(dir, 0o755).map_err(CliError::failed)?;
            dir.to_owned()
        }
        _ => mount::runtime_dir()?.path().to_owned(),
    };
    Ok(Place::new(dir.join("session.json")))
}

/// Where datastores go that say nothing else.
fn root() -> Result<PathBuf, CliError> {
    if is_root() {
        return Ok("/datastores".into());
    }
    match env::var_os("HOME").map(PathBuf::from) {
        Some(home) if home.is_absolute() => Ok(home.join("datastores")),
        _ => Err(CliError::Usage("HOME is not set: name root in the spec".into())),
    }
}

fn wrong(error: SessionError) -> CliError {
    match error {
        SessionError::Spec { .. } => CliError::usage(error),
        error => CliError::failed(error),
    }
}

/// The named file, else `GRID_DATASTORES`, else the host's or the user's file.
fn spec(named: Option<&Path>) -> Result<Spec, CliError> {
    let root = root()?;
    let text = |path: &Path| {
        std::fs::read_to_string(path)
            .map_err(|error| CliError::Failed(format!("{} cannot be read: {error}", path.display()).into()))
    };
    if let Some(path) = named {
        return Spec::parse(&text(path)?, path, &root).map_err(wrong);
    }
    let variable = env::var(DATASTORES).unwrap_or_default();
    let mut spec = if !variable.trim().is_empty() {
        Spec::from_variable(&variable, DATASTORES, &root).map_err(wrong)?
    } else {
        let path = match (is_root(), env::var_os("HOME")) {
            (false, Some(home)) => Path::new(&home).join(".config/grid-mount/session.toml"),
            _ => HOST_SPEC.into(),
        };
        if !path.exists() {
            return Err(CliError::Usage(format!(
                "there is nothing to mount: name a file with --spec, set {DATASTORES}, or write {}",
                path.display()
            )));
        }
        Spec::parse(&text(&path)?, &path, &root).map_err(wrong)?
    };
    if spec.user.is_none() {
        spec.user = env::var(SESSION_USER).ok().filter(|user| !user.is_empty());
    }
    Ok(spec)
}

async fn open(args: &SessionCommonArgs, share: Option<ShareArg>) -> Result<Arc<Session>, CliError> {
    let settings = config::load(&Overrides::of(&args.catalog, &Default::default()))?;
    // Root's session is there for whoever works in it; a user's for that user.
    let share = share.or_else(|| is_root().then_some(ShareArg::All));
    let any = MountArgs {
        reference: Some("any".into()),
        mount_point: Some("/".into()),
        share,
        ..MountArgs::default()
    };
    let mut template = mount::request(&any, &settings)?;
    template.io_mode = IoModeWish::Auto;
    let client = match mount::connect(&args.socket).await? {
        Some(client) => client,
        None => mount::start_agent(&settings)?,
    };
    Ok(Arc::new(Session {
        client,
        template,
        place: place()?,
    }))
}

async fn start(args: SessionStartArgs) -> Result<(), CliError> {
    let spec = spec(args.spec.as_deref())?;
    let session = open(&args.common, args.share).await?;
    let patience = Duration::from_secs(args.wait);
    let record = session.start(&spec, patience).await.map_err(CliError::failed)?;
    show(&record);
    retry_later(&record.datastores, &args.common, args.share)
}

async fn add(args: SessionAddArgs) -> Result<(), CliError> {
    let session = open(&args.common, args.share).await?;
    let record = session.record().map_err(CliError::failed)?;
    let mut spec = Spec::empty(&record.root);
    let path = args.path.as_deref().map(std::path::absolute).transpose();
    let path = path.map_err(CliError::failed)?;
    spec.add(
        &args.reference,
        path.as_deref(),
        !args.optional,
        None,
        args.subdir,
    )
    .map_err(CliError::Usage)?;
    let wanted: Option<Wanted> = spec.datastores.pop();
    let Some(wanted) = wanted else { return Ok(()) };
    let datastore = session
        .add(wanted, Duration::from_secs(args.wait))
        .await
        .map_err(CliError::failed)?;
    output::print(&line(&datastore));
    retry_later(&[datastore], &args.common, args.share)
}

/// Leaves what is waiting to a process of its own, which ends when nothing is.
fn retry_later(
    datastores: &[Datastore],
    args: &SessionCommonArgs,
    share: Option<ShareArg>,
) -> Result<(), CliError> {
    if datastores
        .iter()
        .all(|datastore| datastore.standing == Standing::Mounted)
    {
        return Ok(());
    }
    let program = env::current_exe().map_err(CliError::failed)?;
    let mut command = Command::new(program);
    command.args(["session", "retry"]);
    if let Some(catalog) = &args.catalog.catalog {
        command.arg("--catalog").arg(catalog);
    }
    if let Some(user) = &args.catalog.user {
        command.arg("--user").arg(user);
    }
    if let Some(socket) = &args.socket.socket {
        command.arg("--socket").arg(socket);
    }
    if args.socket.own_agent {
        command.arg("--own-agent");
    }
    if let Some(share) = share {
        command.arg("--share").arg(share.name());
    }
    command
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    // The journal of a unit; a terminal has no use for it.
    if env::var_os("INVOCATION_ID").is_none() || output::stderr_is_terminal() {
        command.stderr(Stdio::null());
    }
    // SAFETY: setsid is async-signal-safe and touches no memory of the parent.
    unsafe {
        use std::os::unix::process::CommandExt;
        command.pre_exec(|| {
            nix::unistd::setsid()?;
            Ok(())
        });
    }
    command.spawn().map_err(CliError::failed)?;
    Ok(())
}

fn status(args: &SessionStatusArgs) -> Result<(), CliError> {
    let place = place()?;
    let record = place.read().map_err(CliError::failed)?;
    let Some(record) = record else {
        return Err(CliError::failed(SessionError::NoSession(place.path().to_owned())));
    };
    match args.output.json {
        true => output::print_json(&record),
        false => show(&record),
    }
    Ok(())
}

fn show(record: &Record) {
    for datastore in &record.datastores {
        output::print(&line(datastore));
    }
}

fn line(datastore: &Datastore) -> String {
    let path = datastore.path.display();
    match &datastore.reference {
        Some(reference) => format!("{reference} is at {path}\n"),
        None => format!(
            "{} is not at {path} yet: {}\n",
            datastore.requested,
            datastore.error.as_deref().unwrap_or_default()
        ),
    }
}
