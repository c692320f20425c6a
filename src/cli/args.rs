//! The command line's grammar. Everything `clap` is here and in `cli.rs`.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::agent::control::IoModeWish;

const EXAMPLES: &str = "\
Examples:
  grid-mount alice:imagenet/3               mount it at ~/datastores/imagenet
  grid-mount alice:imagenet /data/imagenet  the newest version, at a path of yours
  grid-mount publish ./photos photos        your directory becomes you:photos/1
  grid-mount list --global                  what the team has published
  grid-mount unmount imagenet               and away
Try `grid-mount demo`; `grid-mount COMMAND --help` tells more.";

/// Mounts a team's published data sets read-only and lazily: user:datastore/version under a path.
#[derive(Debug, Parser)]
#[command(name = "grid-mount", version, after_help = EXAMPLES, args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true, disable_help_subcommand = true, arg_required_else_help = true)]
pub struct Cli {
    #[command(flatten)]
    pub mount: MountArgs,
    #[command(subcommand)]
    pub command: Option<Command>,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Mount a data set (the word may be left out)
    Mount(MountArgs),
    /// Unmount by reference or by mount point
    #[command(visible_alias = "umount")]
    Unmount(UnmountArgs),
    /// Show what is mounted, and the cache
    Status(StatusArgs),
    /// List datastores: yours, a user's, or everybody's
    List(ListArgs),
    /// Show a version: size, files, created, origin, message
    Info(InfoArgs),
    /// Publish a directory as a new version
    Publish(PublishArgs),
    /// Make an existing bucket prefix a version, copying nothing
    Register(RegisterArgs),
    /// Name a version (prod), or take the name away
    Alias(AliasArgs),
    /// Print the settings in force and where each came from
    Config(ConfigArgs),
    /// Publish, mount and compare a small real data set
    Demo(DemoArgs),
    /// Serve mounts (started by itself when needed)
    Agent(AgentArgs),
}

/// Settings that every command which asks the catalog understands.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Catalog")]
pub struct CatalogArgs {
    /// Where records are: file:///dir, s3://bucket/prefix, gs://…, az://… [env: GRID_MOUNT_CATALOG]
    #[arg(long, value_name = "URL", hide_short_help = true)]
    pub catalog: Option<String>,
    /// Who I am: whose datastores a reference without owner means [env: GRID_MOUNT_USER]
    #[arg(long, value_name = "NAME", hide_short_help = true)]
    pub user: Option<String>,
}

/// Settings of an agent; they take effect in the agent that a command starts.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Agent (when this command starts it)")]
pub struct AgentSettingArgs {
    /// Where fetched data is kept [env: GRID_MOUNT_CACHE_DIR]
    #[arg(long, value_name = "DIR", hide_short_help = true)]
    pub cache_dir: Option<PathBuf>,
    /// How much: 200GiB, or a share of the disk, 20% [env: GRID_MOUNT_CACHE_SIZE]
    #[arg(long, value_name = "SIZE", hide_short_help = true)]
    pub cache_size: Option<String>,
    /// What the cache leaves free on its disk: 10GiB or 5% [env: GRID_MOUNT_CACHE_MIN_FREE]
    #[arg(long, value_name = "SIZE", hide_short_help = true)]
    pub cache_min_free: Option<String>,
    /// Bytes in flight from origins, all readers together [env: GRID_MOUNT_MEMORY_LIMIT]
    #[arg(long, value_name = "SIZE", hide_short_help = true)]
    pub memory_limit: Option<String>,
    /// Connections per origin [env: GRID_MOUNT_CONNECTIONS]
    #[arg(long, value_name = "N", hide_short_help = true)]
    pub connections: Option<String>,
    /// No reader waits longer than this, 60s [env: GRID_MOUNT_READ_DEADLINE]
    #[arg(long, value_name = "SECONDS", hide_short_help = true)]
    pub read_deadline: Option<String>,
}

#[derive(Clone, Debug, Default, Args)]
pub struct SocketArgs {
    /// The agent's control socket [env: GRID_MOUNT_SOCKET]
    #[arg(long, value_name = "PATH", hide_short_help = true)]
    pub socket: Option<PathBuf>,
    /// Use my own agent even where the system has one
    #[arg(long, conflicts_with = "socket", hide_short_help = true)]
    pub own_agent: bool,
}

#[derive(Clone, Debug, Default, Args)]
pub struct OutputArgs {
    /// Print JSON for machines
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  grid-mount mount alice:imagenet/3
  grid-mount mount alice:/datastores/imagenet/3 /data/imagenet
  grid-mount mount bob:coco/prod --foreground")]
pub struct MountArgs {
    /// [user:]datastore[/version]: a number, `latest` or an alias; no version means the newest
    #[arg(value_name = "REF", required = true)]
    pub reference: Option<String>,
    /// Default: /datastores/NAME for root, ~/datastores/NAME otherwise; created if absent
    #[arg(value_name = "MOUNTPOINT")]
    pub mount_point: Option<PathBuf>,
    /// Stay, show the log, unmount on Ctrl-C
    #[arg(long, short)]
    pub foreground: bool,
    /// How the kernel reads: chosen from the data set unless said
    #[arg(long, value_enum, default_value_t = IoModeArg::Auto, hide_short_help = true)]
    pub io_mode: IoModeArg,
    #[command(flatten)]
    pub output: OutputArgs,
    #[command(flatten)]
    pub socket: SocketArgs,
    #[command(flatten)]
    pub catalog: CatalogArgs,
    #[command(flatten)]
    pub agent: AgentSettingArgs,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
pub enum IoModeArg {
    #[default]
    Auto,
    Passthrough,
    NoOpen,
}

impl From<IoModeArg> for IoModeWish {
    fn from(arg: IoModeArg) -> Self {
        match arg {
            IoModeArg::Auto => Self::Auto,
            IoModeArg::Passthrough => Self::Passthrough,
            IoModeArg::NoOpen => Self::NoOpen,
        }
    }
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  grid-mount unmount alice:imagenet/3
  grid-mount unmount ~/datastores/imagenet
  grid-mount unmount --all --lazy")]
pub struct UnmountArgs {
    /// A reference (without a version: every mounted version of it) or a mount point
    #[arg(
        value_name = "REF|MOUNTPOINT",
        required_unless_present = "all",
        conflicts_with = "all"
    )]
    pub target: Option<String>,
    /// Everything this agent has mounted
    #[arg(long)]
    pub all: bool,
    /// Detach now, even when in use; finish when the last user goes
    #[arg(long)]
    pub lazy: bool,
    #[command(flatten)]
    pub output: OutputArgs,
    #[command(flatten)]
    pub socket: SocketArgs,
    #[command(flatten)]
    pub catalog: CatalogArgs,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  grid-mount status
  grid-mount status --json | jq '.mounts[].mount_point'")]
pub struct StatusArgs {
    #[command(flatten)]
    pub output: OutputArgs,
    #[command(flatten)]
    pub socket: SocketArgs,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  grid-mount list             mine
  grid-mount list alice       alice's
  grid-mount list --global    the whole team's")]
pub struct ListArgs {
    /// Whose datastores; mine if nobody is named
    #[arg(value_name = "USER", conflicts_with = "global")]
    pub owner: Option<String>,
    /// Everybody's
    #[arg(long)]
    pub global: bool,
    #[command(flatten)]
    pub output: OutputArgs,
    #[command(flatten)]
    pub catalog: CatalogArgs,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  grid-mount info alice:imagenet
  grid-mount info alice:imagenet/3 --json")]
pub struct InfoArgs {
    #[arg(value_name = "REF")]
    pub reference: String,
    #[command(flatten)]
    pub output: OutputArgs,
    #[command(flatten)]
    pub catalog: CatalogArgs,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  grid-mount publish ./photos photos
  grid-mount publish ./photos photos --message 'blurred faces removed'
Run again after an interruption: only what is missing is uploaded.")]
pub struct PublishArgs {
    /// The directory to publish; it is only read
    #[arg(value_name = "DIR")]
    pub directory: PathBuf,
    /// The datastore: photos, or me:photos
    #[arg(value_name = "[OWNER:]NAME")]
    pub name: String,
    /// What this version is
    #[arg(long, short, default_value = "")]
    pub message: String,
    /// Compare contents with the last version, not just size and time
    #[arg(long)]
    pub checksum: bool,
    #[command(flatten)]
    pub output: OutputArgs,
    #[command(flatten)]
    pub catalog: CatalogArgs,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  grid-mount register s3://bucket/imagenet imagenet
  grid-mount register s3://bucket/imagenet imagenet --message 'as delivered'
The objects stay where they are and must not change: one that does is an error on read.")]
pub struct RegisterArgs {
    /// The prefix: s3://bucket/prefix, gs://…, az://…, file:///dir
    #[arg(value_name = "URL")]
    pub url: String,
    /// The datastore: imagenet, or me:imagenet
    #[arg(value_name = "[OWNER:]NAME")]
    pub name: String,
    /// What this version is
    #[arg(long, short, default_value = "")]
    pub message: String,
    #[command(flatten)]
    pub output: OutputArgs,
    #[command(flatten)]
    pub catalog: CatalogArgs,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  grid-mount alias alice:imagenet/3 prod
  grid-mount alias alice:imagenet prod --remove")]
pub struct AliasArgs {
    /// The version to name; with --remove, the datastore
    #[arg(value_name = "REF")]
    pub reference: String,
    #[arg(value_name = "ALIAS")]
    pub alias: String,
    /// Take the alias away
    #[arg(long)]
    pub remove: bool,
    #[command(flatten)]
    pub catalog: CatalogArgs,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  grid-mount config --json
Flags beat the environment, which beats ~/.config/grid-mount/config.toml, which beats
/etc/grid-mount/config.toml.")]
pub struct ConfigArgs {
    #[command(flatten)]
    pub output: OutputArgs,
    #[command(flatten)]
    pub catalog: CatalogArgs,
    #[command(flatten)]
    pub agent: AgentSettingArgs,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  cargo run --release -- demo
Needs /dev/fuse; touches nothing outside a temporary directory, which it removes.")]
pub struct DemoArgs {
    /// Leave it mounted
    #[arg(long)]
    pub keep: bool,
    /// What to publish; by default a part of the Rust toolchain, or of /usr
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  grid-mount agent --socket /run/user/1000/grid-mount/agent.sock
Any `grid-mount REF` starts one by itself; it ends with its last mount.")]
pub struct AgentArgs {
    /// End with the last mount
    #[arg(long)]
    pub on_demand: bool,
    /// A descriptor that is told when the agent is ready
    #[arg(long, hide = true)]
    pub ready_fd: Option<i32>,
    /// Start an agent, and again when it dies; needs --on-demand
    #[arg(long, hide = true)]
    pub keep: bool,
    /// Standard input is the keeper's socket
    #[arg(long, hide = true, conflicts_with = "keep")]
    pub kept: bool,
    #[command(flatten)]
    pub socket: SocketArgs,
    #[command(flatten)]
    pub agent: AgentSettingArgs,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_grammar_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_word_mount_may_be_left_out() {
        let bare = Cli::try_parse_from(["grid-mount", "alice:imagenet/3", "/data"]).unwrap();
        assert!(bare.command.is_none());
        assert_eq!(bare.mount.reference.as_deref(), Some("alice:imagenet/3"));
        let Some(Command::Mount(spelt)) = Cli::try_parse_from(["grid-mount", "mount", "alice:imagenet/3"])
            .unwrap()
            .command
        else {
            panic!("not a mount");
        };
        assert_eq!(spelt.reference.as_deref(), Some("alice:imagenet/3"));
        assert!(
            Cli::try_parse_from(["grid-mount", "list", "--global"])
                .unwrap()
                .command
                .is_some()
        );
    }

    /// The short help has to fit on a screen of 80 × 40 and to end in examples.
    #[test]
    fn the_help_fits_on_a_screen() {
        let help = Cli::command().term_width(80).render_help().to_string();
        assert!(
            help.lines().count() <= 40,
            "{} lines:\n{help}",
            help.lines().count()
        );
        assert!(help.contains("Examples:"));
        for mut command in Cli::command().get_subcommands().cloned() {
            let name = command.get_name().to_owned();
            let help = command.render_help().to_string();
            assert!(help.lines().count() <= 40, "{name}:\n{help}");
            assert!(help.contains("Example"), "{name} has no example");
        }
    }
}
