//! The grammar of `grid-mount cache …`, `grid-mount warm`.

use clap::{Args, Subcommand};

use super::{AgentSettingArgs, CatalogArgs, OutputArgs, SocketArgs};

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  grid-mount cache status
  grid-mount cache evict alice:imagenet/2
  grid-mount cache verify --json
Asks the agent; where none runs, opens the cache directory itself.")]
pub struct CacheArgs {
    #[command(subcommand)]
    pub command: CacheCommand,
}

#[derive(Debug, Subcommand)]
pub enum CacheCommand {
    /// How much is in it, and how it does
    #[command(after_help = "Example:\n  grid-mount cache status --json")]
    Status(CacheCommandArgs),
    /// Print the cache directory
    #[command(after_help = "Example:\n  du -sh \"$(grid-mount cache path)\"")]
    Path(CacheCommandArgs),
    /// Forget a version's data, or everything; who reads it reads on
    #[command(after_help = "Examples:\n  grid-mount cache evict alice:imagenet/2\n  grid-mount cache evict")]
    Evict(CacheEvictArgs),
    /// Compare everything in it with its checksums; what is damaged will be fetched again
    #[command(after_help = "Example:\n  grid-mount cache verify")]
    Verify(CacheCommandArgs),
}

#[derive(Debug, Args)]
pub struct CacheCommandArgs {
    #[command(flatten)]
    pub output: OutputArgs,
    #[command(flatten)]
    pub socket: SocketArgs,
    #[command(flatten)]
    pub agent: AgentSettingArgs,
}

#[derive(Debug, Args)]
pub struct CacheEvictArgs {
    /// The version to forget, with the blocks it shares with others; without it, everything
    #[arg(value_name = "REF")]
    pub reference: Option<String>,
    #[command(flatten)]
    pub catalog: CatalogArgs,
    #[command(flatten)]
    pub common: CacheCommandArgs,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  grid-mount warm alice:imagenet/3
  grid-mount warm alice:imagenet --include 'train/*.tar' --include 'labels/**'
Readers go first. Run again after an interruption: only what is missing is fetched.")]
pub struct WarmArgs {
    /// [user:]datastore[/version]; it need not be mounted
    #[arg(value_name = "REF")]
    pub reference: String,
    /// Only files whose path matches; may be repeated
    #[arg(long, value_name = "GLOB")]
    pub include: Vec<String>,
    #[command(flatten)]
    pub output: OutputArgs,
    #[command(flatten)]
    pub socket: SocketArgs,
    #[command(flatten)]
    pub catalog: CatalogArgs,
    #[command(flatten)]
    pub agent: AgentSettingArgs,
}
