//! The grammar of `grid-mount session …`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::{CatalogArgs, OutputArgs, ShareArg, SocketArgs};

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  grid-mount session start --spec session.toml
  GRID_DATASTORES='alice:imagenet/3 bob:coco=/data/coco' grid-mount session start
  grid-mount session add alice:voc --optional
  grid-mount session stop
A spec is TOML: [[datastore]] with ref, and as wished path, required, prefetch, subdir.")]
pub struct SessionArgs {
    #[command(subcommand)]
    pub command: SessionCommand,
}

#[derive(Debug, Subcommand)]
pub enum SessionCommand {
    /// Mount everything; fails if something required cannot be
    #[command(after_help = "Example:\n  grid-mount session start --spec session.toml --wait 30")]
    Start(SessionStartArgs),
    /// Unmount everything it mounted
    #[command(after_help = "Example:\n  grid-mount session stop")]
    Stop(SessionCommonArgs),
    /// Show what became of each datastore
    #[command(after_help = "Example:\n  grid-mount session status --json")]
    Status(SessionStatusArgs),
    /// Add a datastore to the running session
    #[command(after_help = "Example:\n  grid-mount session add alice:voc /data/voc --optional")]
    Add(SessionAddArgs),
    /// Take a datastore from the running session
    #[command(after_help = "Example:\n  grid-mount session remove alice:voc")]
    Remove(SessionRemoveArgs),
    /// Try again what is waiting, until nothing is
    #[command(hide = true, after_help = "Example:\n  grid-mount session retry")]
    Retry(SessionRetryArgs),
}

#[derive(Debug, Args)]
pub struct SessionCommonArgs {
    #[command(flatten)]
    pub socket: SocketArgs,
    #[command(flatten)]
    pub catalog: CatalogArgs,
}

#[derive(Debug, Args)]
pub struct SessionStartArgs {
    /// What to mount; otherwise GRID_DATASTORES, /etc/grid-mount/session.toml or
    /// ~/.config/grid-mount/session.toml
    #[arg(long, value_name = "FILE")]
    pub spec: Option<PathBuf>,
    /// How long to try what is required
    #[arg(long, value_name = "SECONDS", default_value_t = 0, hide_default_value = true)]
    pub wait: u64,
    /// Who else may read it: my group, or all (the default for root's sessions)
    #[arg(long, value_enum, value_name = "WITH")]
    pub share: Option<ShareArg>,
    #[command(flatten)]
    pub common: SessionCommonArgs,
}

#[derive(Debug, Args)]
pub struct SessionAddArgs {
    #[arg(value_name = "REF")]
    pub reference: String,
    /// Default: its name, below the session's root
    #[arg(value_name = "PATH")]
    pub path: Option<PathBuf>,
    /// Try again in the background if it cannot be mounted
    #[arg(long)]
    pub optional: bool,
    /// Show this directory of it only
    #[arg(long, value_name = "DIR")]
    pub subdir: Option<PathBuf>,
    /// How long to try
    #[arg(long, value_name = "SECONDS", default_value_t = 0, hide_default_value = true)]
    pub wait: u64,
    /// Who else may read it: my group, or all (the default for root's sessions)
    #[arg(long, value_enum, value_name = "WITH")]
    pub share: Option<ShareArg>,
    #[command(flatten)]
    pub common: SessionCommonArgs,
}

#[derive(Debug, Args)]
pub struct SessionRetryArgs {
    /// Who else may read it: my group, or all (the default for root's sessions)
    #[arg(long, value_enum, value_name = "WITH")]
    pub share: Option<ShareArg>,
    #[command(flatten)]
    pub common: SessionCommonArgs,
}

#[derive(Debug, Args)]
pub struct SessionStatusArgs {
    #[command(flatten)]
    pub output: OutputArgs,
}

#[derive(Debug, Args)]
pub struct SessionRemoveArgs {
    /// As it was asked for, what it resolved to, or where it is
    #[arg(value_name = "REF|PATH")]
    pub target: String,
    #[command(flatten)]
    pub common: SessionCommonArgs,
}
