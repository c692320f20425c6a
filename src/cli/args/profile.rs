//! The grammar of `grid-mount profile …`.

use clap::{Args, Subcommand};

use super::{CatalogArgs, OutputArgs, SocketArgs};

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  grid-mount alice:imagenet/3 --record-profile   then train for an epoch
  grid-mount profile record alice:imagenet/3     keeps the order it was read in
The next mount fetches in that order. Unmounting keeps it, too.")]
pub struct ProfileArgs {
    #[command(subcommand)]
    pub command: ProfileCommand,
}

#[derive(Debug, Subcommand)]
pub enum ProfileCommand {
    /// Keep what mounts with --record-profile have recorded so far
    #[command(after_help = "Example:\n  grid-mount profile record alice:imagenet/3")]
    Record(ProfileRecordArgs),
}

#[derive(Debug, Args)]
pub struct ProfileRecordArgs {
    /// A reference (without a version: any) or a mount point
    #[arg(value_name = "REF|MOUNTPOINT")]
    pub target: String,
    #[command(flatten)]
    pub output: OutputArgs,
    #[command(flatten)]
    pub socket: SocketArgs,
    #[command(flatten)]
    pub catalog: CatalogArgs,
}
