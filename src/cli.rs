//! The command line: the only room that knows `clap`, and the only one that prints.

mod agent;
mod args;
mod cache;
mod catalog;
mod config;
mod control_plane;
mod demo;
mod doctor;
mod logging;
mod manual;
mod memory;
mod mount;
mod mount_grid;
mod output;
mod profile;
mod progress;
mod publish;
mod report;
mod run;
mod session;
mod status;
mod team;
mod warm;

use std::process::ExitCode;

use crate::causes::in_one_line;

use self::args::{Cli, Command};

/// Why a command ended without doing what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// The request itself is wrong: exit status 2.
    #[error("{0}")]
    Usage(String),
    /// Exit status 1.
    #[error(transparent)]
    Failed(Box<dyn std::error::Error + Send + Sync>),
    /// Everything has been said already: exit status 1.
    #[error("")]
    Told,
    /// Everything has been said already, and this is the exit status.
    #[error("")]
    Exit(u8),
}

impl CliError {
    fn failed(error: impl std::error::Error + Send + Sync + 'static) -> Self {
        Self::Failed(Box::new(error))
    }

    /// A wrong request, with its causes in one line.
    fn usage(error: impl std::error::Error) -> Self {
        Self::Usage(in_one_line(&error))
    }
}

/// The program: parses, runs, prints what failed. 0 done, 1 failed, 2 usage.
pub fn main() -> ExitCode {
    if mount_grid::is_called() {
        return mount_grid::main();
    }
    let cli = Cli::from_process();
    let command = cli.command.unwrap_or(Command::Mount(cli.mount));
    match perform(command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(CliError::Told) => ExitCode::from(1),
        Err(CliError::Exit(status)) => ExitCode::from(status),
        Err(error @ CliError::Usage(_)) => {
            output::note(&format!("grid-mount: {error}"));
            ExitCode::from(2)
        }
        Err(CliError::Failed(error)) => {
            output::note(&format!("grid-mount: {}", in_one_line(&*error)));
            ExitCode::from(1)
        }
    }
}

fn perform(command: Command) -> Result<(), CliError> {
    match command {
        Command::Mount(args) if args.foreground => agent::foreground(args),
        Command::Mount(args) => block_on(mount::mount(args)),
        Command::Unmount(args) => block_on(mount::unmount(args)),
        Command::Run(args) => block_on(run::run(args)),
        Command::Status(args) => block_on(status::status(args)),
        Command::List(args) => block_on(catalog::list(args)),
        Command::Info(args) => block_on(catalog::info(args)),
        Command::Alias(args) => block_on(catalog::alias(args)),
        Command::Retire(args) => block_on(team::retire(args)),
        Command::Team(args) => block_on(team::team(args)),
        Command::Catalog(args) => block_on(control_plane::admin(args)),
        Command::Publish(args) => block_on(publish::publish(args)),
        Command::Register(args) => block_on(publish::register(args)),
        Command::Cache(args) => block_on(cache::cache(args.command)),
        Command::Warm(args) => block_on(warm::warm(args)),
        Command::Profile(args) => block_on(profile::profile(args.command)),
        Command::Session(args) => block_on(session::session(args.command)),
        Command::Config(args) => config::show(&args),
        Command::Doctor(args) => block_on(doctor::doctor(args)),
        Command::Demo(args) => demo::demo(&args),
        Command::Agent(args) => agent::agent(args),
        Command::Completions(args) => {
            manual::completions(&args);
            Ok(())
        }
        Command::Man(args) => manual::man(&args),
    }
}

/// Runs a command to its end on a runtime of its own.
fn block_on(command: impl Future<Output = Result<(), CliError>>) -> Result<(), CliError> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(CliError::failed)?;
    let result = runtime.block_on(command);
    // A look-up or an upload that hangs must not hold the end up.
    runtime.shutdown_background();
    result
}
