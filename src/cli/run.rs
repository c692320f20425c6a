//! `grid-mount run … -- CMD`: mounts, runs the command, unmounts, and ends as the command ended.
//!
//! The agent mounts in a directory that only its user can enter; the command sees the mount at the wanted
//! path, in a mount namespace (and, without root, a user namespace) of its own. So the cache and the agent
//! are those of every other mount, and at that path nobody but the command sees anything. Where the kernel
//! makes no namespaces, the mounts are ordinary ones.

mod private;

use std::{
    fs, io,
    os::unix::{fs::DirBuilderExt as _, process::ExitStatusExt as _},
    path::{Path, PathBuf},
    process::ExitStatus,
};

use tokio::{
    process::{Child, Command},
    signal::unix::{SignalKind, signal},
};

use self::private::Private;
use super::{
    CliError,
    args::RunArgs,
    config::{self, Overrides},
    mount::{self, absolute, default_mount_point},
    output, report,
};
use crate::{
    agent::{
        control::{MountInfo, MountRequest, UnmountRequest, UnmountTarget},
        mount_point::MountPoint,
    },
    causes::in_one_line,
    config::Settings,
    reference::Reference,
};

/// As shells have it: the command is there but cannot be run, or is not there.
const CANNOT_RUN: u8 = 126;
const NO_SUCH_COMMAND: u8 = 127;
const KILLED: u8 = 128;

/// One data set and where the command is to see it.
struct Wanted {
    reference: String,
    path: PathBuf,
}

pub async fn run(args: RunArgs) -> Result<(), CliError> {
    let settings = config::load(&Overrides::of(&args.catalog, &Default::default()))?;
    let wanted = wanted(&args)?;
    // From now on what would end this program ends the command first.
    let mut signals = Signals::new().map_err(CliError::failed)?;
    let private = !args.shared && private::possible();
    if !private && !args.shared {
        output::note("grid-mount: this kernel makes no namespaces here; others see where it is mounted");
    }
    let mut stage = Stage::new(&args, &settings, private)?;
    let outcome = stage.play(&args, &wanted, &mut signals).await;
    stage.clear(args.report).await;
    match ended(outcome?) {
        0 => Ok(()),
        status => Err(CliError::Exit(status)),
    }
}

fn ended(status: ExitStatus) -> u8 {
    match (status.code(), status.signal()) {
        (Some(code), _) => u8::try_from(code).unwrap_or(u8::MAX),
        (None, signal) => signal
            .and_then(|signal| u8::try_from(signal).ok())
            .map_or(u8::MAX, |signal| KILLED.saturating_add(signal)),
    }
}

fn wanted(args: &RunArgs) -> Result<Vec<Wanted>, CliError> {
    let at = |reference: String, path: Option<&Path>| {
        let parsed: Reference = reference.parse().map_err(CliError::usage)?;
        let path = match path {
            Some(path) => absolute(path)?,
            None => default_mount_point(&parsed.datastore)?,
        };
        Ok(Wanted { reference, path })
    };
    let mut wanted = Vec::new();
    for datastore in &args.datastore {
        let (reference, path) = match datastore.split_once('=') {
            Some((reference, path)) => (reference, Some(Path::new(path))),
            None => (datastore.as_str(), None),
        };
        wanted.push(at(reference.to_owned(), path)?);
    }
    if let Some(name) = &args.datastore_name {
        let reference = match &args.datastore_version {
            Some(version) => format!("{name}/{version}"),
            None => name.clone(),
        };
        wanted.push(at(reference, args.datastore_mount_dir.as_deref())?);
    }
    for (position, one) in wanted.iter().enumerate() {
        if wanted[..position].iter().any(|other| other.path == one.path) {
            return Err(CliError::Usage(format!(
                "two data sets at {}: name a path for each, REF=PATH",
                one.path.display()
            )));
        }
    }
    Ok(wanted)
}

/// What stands while the command runs, and is taken down after it.
struct Stage<'args> {
    args: &'args RunArgs,
    settings: &'args Settings,
    /// Where the agent mounts when the command is to see it elsewhere.
    hidden: Option<PathBuf>,
    /// The paths that the command sees, made where they were not there.
    points: Vec<MountPoint>,
    mounted: Vec<MountInfo>,
}

impl<'args> Stage<'args> {
    fn new(args: &'args RunArgs, settings: &'args Settings, private: bool) -> Result<Self, CliError> {
        let hidden = match private {
            false => None,
            true => {
                let socket = mount::runtime_dir()?.socket();
                let dir = socket.with_file_name(format!("run-{}", std::process::id()));
                // Left by one that was killed and had our number.
                let _ = fs::remove_dir(&dir);
                fs::DirBuilder::new()
                    .mode(0o700)
                    .create(&dir)
                    .map_err(|error| CliError::Failed(format!("{}: {error}", dir.display()).into()))?;
                Some(dir)
            }
        };
        Ok(Self {
            args,
            settings,
            hidden,
            points: Vec::new(),
            mounted: Vec::new(),
        })
    }

    async fn play(
        &mut self,
        args: &RunArgs,
        wanted: &[Wanted],
        signals: &mut Signals,
    ) -> Result<ExitStatus, CliError> {
        let mut binds = Vec::new();
        for (number, one) in wanted.iter().enumerate() {
            let mount_point = match &self.hidden {
                None => one.path.clone(),
                Some(hidden) => {
                    let point = MountPoint::prepare(&one.path).map_err(CliError::failed)?;
                    let inside = hidden.join(number.to_string());
                    binds.push((inside.clone(), point.path().to_owned()));
                    self.points.push(point);
                    inside
                }
            };
            let request = MountRequest {
                reference: one.reference.clone(),
                mount_point,
                catalog: self.settings.catalog.value.clone(),
                user: self.settings.user.value.clone(),
                store_settings: config::store_settings()?,
                io_mode: Default::default(),
                prefetch: self.settings.prefetch.value,
                share: Default::default(),
                idle_timeout: None,
                trigger: None,
                record_profile: false,
            };
            let making = mount::through_agent(&self.args.socket, self.settings, &request);
            let info = tokio::select! {
                info = making => info?,
                number = signals.next() => return Ok(ExitStatus::from_raw(number)),
            };
            // One that goes by itself counts for whom it stays: this command is one of them.
            if !info.already_mounted || info.idle_timeout.is_some() {
                self.mounted.push(info);
            }
        }
        let Some((program, arguments)) = args.command.split_first() else {
            return Err(CliError::Usage("name a command after --".into()));
        };
        let mut command = std::process::Command::new(program);
        command.args(arguments);
        if self.hidden.is_some() {
            let private = Private::new(&binds).map_err(CliError::failed)?;
            private.confine(&mut command);
        }
        let child = Command::from(command).spawn().map_err(|error| {
            output::note(&format!("grid-mount: {}: {error}", program.to_string_lossy()));
            CliError::Exit(match error.kind() {
                io::ErrorKind::NotFound => NO_SUCH_COMMAND,
                _ => CANNOT_RUN,
            })
        })?;
        signals.accompany(child).await.map_err(CliError::failed)
    }

    /// What goes wrong here is told, and changes nothing about how the command ended.
    async fn clear(&mut self, told: bool) {
        for info in self.mounted.drain(..) {
            let Ok(Some(client)) = mount::connect(&self.args.socket).await else {
                continue;
            };
            let unmount = async |lazy| {
                let target = UnmountTarget::MountPoint(info.mount_point.clone());
                client.unmount(&UnmountRequest { target, lazy }).await
            };
            // What the command left running goes on reading; else it is gone when this ends.
            let outcomes = match unmount(false).await {
                Ok(outcomes) if outcomes.iter().any(|outcome| outcome.error.is_some()) => unmount(true).await,
                outcomes => outcomes,
            };
            match outcomes {
                Ok(outcomes) => {
                    for outcome in outcomes {
                        if let Some(error) = outcome.error {
                            output::note(&format!(
                                "grid-mount: {} is still mounted: {error}",
                                info.reference
                            ));
                        } else if let Some(done) = outcome.report.filter(|_| told) {
                            output::note(&format!("{}\n{}", info.reference, report::text(&done).trim_end()));
                        }
                    }
                }
                Err(error) if error.is_absence() => {}
                Err(error) => output::note(&format!(
                    "grid-mount: {} is still mounted: {}",
                    info.reference,
                    in_one_line(&error)
                )),
            }
        }
        self.points.clear();
        if let Some(hidden) = &self.hidden {
            // The agent takes its mount points away as its sessions end, which for a command that left
            // something running is later: then the directory stays, empty. What is still mounted stays.
            for number in 0..self.args.datastore.len() + 1 {
                let _ = fs::remove_dir(hidden.join(number.to_string()));
            }
            let _ = fs::remove_dir(hidden);
        }
    }
}

/// The signals that are passed on.
struct Signals(Vec<(i32, tokio::signal::unix::Signal)>);

impl Signals {
    fn new() -> io::Result<Self> {
        let kinds = [
            SignalKind::interrupt(),
            SignalKind::terminate(),
            SignalKind::hangup(),
            SignalKind::quit(),
            SignalKind::user_defined1(),
            SignalKind::user_defined2(),
            SignalKind::window_change(),
        ];
        let listening = kinds.map(|kind| Ok((kind.as_raw_value(), signal(kind)?)));
        Ok(Self(listening.into_iter().collect::<io::Result<_>>()?))
    }

    async fn next(&mut self) -> i32 {
        let all = self.0.iter_mut().map(|(number, signal)| {
            Box::pin(async move {
                signal.recv().await;
                *number
            })
        });
        futures::future::select_all(all).await.0
    }

    /// Passes signals on until the command has ended.
    async fn accompany(&mut self, mut child: Child) -> io::Result<ExitStatus> {
        let pid = child
            .id()
            .and_then(|pid| i32::try_from(pid).ok())
            .map(nix::unistd::Pid::from_raw);
        loop {
            tokio::select! {
                status = child.wait() => return status,
                number = self.next() => {
                    let Ok(signal) = nix::sys::signal::Signal::try_from(number) else { continue };
                    use nix::sys::signal::Signal::{SIGINT, SIGQUIT, SIGWINCH};
                    // A terminal sends these to all of its foreground group: the command has them already.
                    let sent = matches!(signal, SIGINT | SIGQUIT | SIGWINCH) && in_foreground();
                    if let Some(pid) = pid.filter(|_| !sent) {
                        // It may have ended just now.
                        let _ = nix::sys::signal::kill(pid, signal);
                    }
                }
            }
        }
    }
}

/// Whether this process's group is the one that its terminal's keys send signals to.
fn in_foreground() -> bool {
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // After the name, which may hold anything: state, parent, group, session, terminal, its foreground group.
    let mut fields = stat
        .rsplit(')')
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .skip(2);
    let (group, foreground) = (fields.next(), fields.nth(2));
    group.is_some() && group == foreground
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_that_was_killed_ends_as_in_a_shell() {
        assert_eq!(ended(ExitStatus::from_raw(0)), 0);
        assert_eq!(ended(ExitStatus::from_raw(3 << 8)), 3);
        assert_eq!(ended(ExitStatus::from_raw(9)), 137);
    }
}
