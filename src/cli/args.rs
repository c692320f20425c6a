//! The command line's grammar. Everything `clap` is here and in `cli.rs`.

mod cache;
mod control_plane;
mod profile;
mod session;

use std::path::PathBuf;

use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};

pub use self::{
    cache::{CacheArgs, CacheCommand, CacheCommandArgs, CacheEvictArgs, WarmArgs},
    control_plane::{
        CatalogAdminArgs, CatalogAdminCommand, ServeArgs, TeamCommand, TokenCommand, UserCommand,
    },
    profile::{ProfileArgs, ProfileCommand},
    session::{
        SessionAddArgs, SessionArgs, SessionCommand, SessionCommonArgs, SessionStartArgs, SessionStatusArgs,
    },
};
use crate::agent::control::{IoModeWish, Share};

const EXAMPLES: &str = "\
Examples:
  grid-mount alice:imagenet/3               mount it at ~/datastores/imagenet
  grid-mount alice:imagenet /data/imagenet  the newest, at a path of yours
  grid-mount publish ./photos photos        your directory becomes you:photos/1
  grid-mount list --global                  what the team has published
`grid-mount demo` shows it all; `grid-mount mount --help` has every option.";

/// Mounts a team's published data sets, read-only and lazily, under a path.
#[derive(Debug, Parser)]
#[command(name = "grid-mount", version, after_help = EXAMPLES, args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true, disable_help_subcommand = true, arg_required_else_help = true)]
pub struct Cli {
    #[command(flatten)]
    pub mount: MountArgs,
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// What the first screen shows of the mount's options; `mount --help` shows them all.
const FIRST_SCREEN: [&str; 3] = ["reference", "mount_point", "foreground"];

impl Cli {
    /// The grammar as people meet it.
    pub fn grammar() -> clap::Command {
        Self::command().mut_args(|arg| {
            let shown = FIRST_SCREEN.contains(&arg.get_id().as_str());
            arg.hide(!shown)
        })
    }

    /// The same with nothing left out: for manuals and shells.
    pub fn complete_grammar() -> clap::Command {
        Self::command()
    }

    /// Parses this process's arguments; prints help or usage errors and ends the process where that is due.
    pub fn from_process() -> Self {
        let matches = Self::grammar().get_matches();
        Self::from_arg_matches(&matches).unwrap_or_else(|error| error.exit())
    }
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Mount a data set (the word may be left out)
    Mount(MountArgs),
    /// Unmount by reference or by mount point
    #[command(visible_alias = "umount")]
    Unmount(UnmountArgs),
    /// Mount, run a command, unmount
    Run(RunArgs),
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
    /// Take a version out of use; who has it mounted reads on
    Retire(RetireArgs),
    /// Show my teams and who is in them
    Team(TeamArgs),
    /// Run a control plane: serve, users, teams, tokens
    Catalog(CatalogAdminArgs),
    /// Look at the cache, evict from it, check it
    Cache(CacheArgs),
    /// Bring a version, or a part of it, into the cache ahead of its readers
    Warm(WarmArgs),
    /// Keep the order in which a version was read, for the next mount
    Profile(ProfileArgs),
    /// Mount what a session's spec names, all at once, and keep at it
    Session(SessionArgs),
    /// Print the settings in force and where each came from
    Config(ConfigArgs),
    /// Look for what is in the way of mounts, and mend what can be
    Doctor(DoctorArgs),
    /// Publish, mount and compare a small real data set
    Demo(DemoArgs),
    /// Serve mounts (started by itself when needed)
    Agent(AgentArgs),
    /// Print what a shell needs to complete commands
    Completions(CompletionsArgs),
    /// Print the manual page, or write all of them
    Man(ManArgs),
}

/// Settings that every command which asks the catalog understands.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Catalog")]
pub struct CatalogArgs {
    /// Where records are: s3://bucket/prefix, file:///dir, …
    #[arg(long, value_name = "URL")]
    pub catalog: Option<String>,
    /// Who I am
    #[arg(long, value_name = "NAME")]
    pub user: Option<String>,
}

/// Settings of an agent; they take effect in the agent that a command starts.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Agent (when this command starts it)")]
pub struct AgentSettingArgs {
    /// Where fetched data is kept
    #[arg(long, value_name = "DIR")]
    pub cache_dir: Option<PathBuf>,
    /// How much: 200GiB, or a share of the disk, 20%
    #[arg(long, value_name = "SIZE")]
    pub cache_size: Option<String>,
    /// What the cache leaves free on its disk: 10GiB or 5%
    #[arg(long, value_name = "SIZE")]
    pub cache_min_free: Option<String>,
    /// What of it to check: earlier-boot, always
    #[arg(long, value_name = "WHICH")]
    pub cache_verify: Option<String>,
    /// Bytes in flight from origins, all readers together
    #[arg(long, value_name = "SIZE")]
    pub memory_limit: Option<String>,
    /// Connections per origin
    #[arg(long, value_name = "N")]
    pub connections: Option<String>,
    /// No reader waits longer than this, 60s
    #[arg(long, value_name = "SECONDS")]
    pub read_deadline: Option<String>,
}

#[derive(Clone, Debug, Default, Args)]
pub struct SocketArgs {
    /// The agent's control socket
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Use my own agent even where the system has one
    #[arg(long, conflicts_with = "socket")]
    pub own_agent: bool,
}

#[derive(Clone, Debug, Default, Args)]
pub struct OutputArgs {
    /// Print JSON for machines
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Default, Args)]
#[command(after_help = "\
Examples:
  grid-mount mount alice:imagenet/3
  grid-mount mount alice:/datastores/imagenet/3 /data/imagenet
Settings also come from GRID_MOUNT_… variables and files: see `grid-mount config`.")]
pub struct MountArgs {
    /// [user:]datastore[/version]; a version is a number or an alias
    #[arg(value_name = "REF", required = true)]
    pub reference: Option<String>,
    /// Default: ~/datastores/NAME, for root /datastores/NAME
    #[arg(value_name = "MOUNTPOINT")]
    pub mount_point: Option<PathBuf>,
    /// Stay, show the log, unmount on Ctrl-C
    #[arg(long, short)]
    pub foreground: bool,
    /// How the kernel reads: auto, passthrough or no-open
    #[arg(long, value_enum, default_value_t = IoModeArg::Auto, hide_default_value = true, hide_possible_values = true)]
    pub io_mode: IoModeArg,
    /// What to fetch unasked: auto, none or all
    #[arg(long, value_name = "WHAT")]
    pub prefetch: Option<String>,
    /// Note down the order of reading, for the next mount
    #[arg(long)]
    pub record_profile: bool,
    /// Who else may read it: group or all
    #[arg(long, value_enum, value_name = "WITH", hide_possible_values = true)]
    pub share: Option<ShareArg>,
    /// Unmount it when unused for so long: 10m, 2h, never
    #[arg(long, value_name = "TIME")]
    pub idle_timeout: Option<String>,
    #[command(flatten)]
    pub output: OutputArgs,
    #[command(flatten)]
    pub socket: SocketArgs,
    #[command(flatten)]
    pub catalog: CatalogArgs,
    #[command(flatten)]
    pub agent: AgentSettingArgs,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum ShareArg {
    Group,
    All,
}

impl ShareArg {
    /// As it is typed.
    pub fn name(self) -> &'static str {
        match self {
            Self::Group => "group",
            Self::All => "all",
        }
    }
}

impl From<ShareArg> for Share {
    fn from(arg: ShareArg) -> Self {
        match arg {
            ShareArg::Group => Self::Group,
            ShareArg::All => Self::All,
        }
    }
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
  grid-mount unmount imagenet --report
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
    /// Say what the mount has done
    #[arg(long)]
    pub report: bool,
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
  grid-mount run --datastore alice:imagenet/3 -- python train.py
  grid-mount run --datastore bob:coco=/data/coco -- ls /data/coco
  grid-mount run --datastore_name imagenet --datastore_mount_dir /data -- ls /data
Nobody but the command sees anything at these paths. Its exit status is passed on (128 + n if signal n ended it).")]
pub struct RunArgs {
    /// What to mount, and where; may be repeated. Default path: as `mount` has it
    #[arg(long, value_name = "REF[=PATH]", required_unless_present = "datastore_name")]
    pub datastore: Vec<String>,
    /// As Grid has it: one data set,
    #[arg(long = "datastore_name", value_name = "REF")]
    pub datastore_name: Option<String>,
    /// … its version
    #[arg(
        long = "datastore_version",
        value_name = "VERSION",
        requires = "datastore_name"
    )]
    pub datastore_version: Option<String>,
    /// … and its path
    #[arg(
        long = "datastore_mount_dir",
        value_name = "PATH",
        requires = "datastore_name"
    )]
    pub datastore_mount_dir: Option<PathBuf>,
    /// Mount for everything on this host to see, not for the command alone
    #[arg(long)]
    pub shared: bool,
    /// Say on standard error what the mounts have done
    #[arg(long)]
    pub report: bool,
    #[arg(
        value_name = "CMD",
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true
    )]
    pub command: Vec<std::ffi::OsString>,
    #[command(flatten)]
    pub socket: SocketArgs,
    #[command(flatten)]
    pub catalog: CatalogArgs,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  grid-mount status                      every mount: what it is and how it does
  grid-mount status imagenet             one of them
  grid-mount status --watch              live, until Ctrl-C
  grid-mount status --json | jq '.mounts[].mount_point'
Many mounts are shown as a table; name one for its details.")]
pub struct StatusArgs {
    /// A reference (without a version: any) or a mount point
    #[arg(value_name = "REF|MOUNTPOINT")]
    pub target: Option<String>,
    /// Show it again every second
    #[arg(long, short)]
    pub watch: bool,
    /// Who of the team has what mounted, on whatever host
    #[arg(long)]
    pub global: bool,
    #[command(flatten)]
    pub catalog: CatalogArgs,
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
Examples:
  grid-mount retire imagenet/3
  grid-mount retire imagenet/3 --in-use
The number is not given away again; data is not deleted.")]
pub struct RetireArgs {
    /// [me:]datastore/number
    #[arg(value_name = "REF")]
    pub reference: String,
    /// Even if somebody has it mounted
    #[arg(long)]
    pub in_use: bool,
    #[command(flatten)]
    pub catalog: CatalogArgs,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  grid-mount team --catalog https://catalog.example.org")]
pub struct TeamArgs {
    #[command(flatten)]
    pub output: OutputArgs,
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
Examples:
  grid-mount doctor
  grid-mount doctor --fix
  grid-mount doctor --json | jq '.[] | select(.verdict == \"bad\")'
Exit status 1 if something does not work. --fix takes dead mounts away, closes the cache to others and, for
root, keeps updatedb out.")]
pub struct DoctorArgs {
    /// Mend what is safe to mend
    #[arg(long)]
    pub fix: bool,
    #[command(flatten)]
    pub output: OutputArgs,
    #[command(flatten)]
    pub socket: SocketArgs,
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
Examples:
  grid-mount agent              root's: for every user of this host
  grid-mount agent --own-agent  mine alone
  grid-mount agent --log-format json --metrics-listen 127.0.0.1:9464
SIGHUP reads the settings again; SIGTERM unmounts everything and ends.")]
pub struct AgentArgs {
    /// Read this file in place of /etc/grid-mount/config.toml
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Unmount what nobody used for so long, if its mount says nothing else
    #[arg(long, value_name = "TIME")]
    pub idle_timeout: Option<String>,
    /// text or json
    #[arg(long, value_name = "FORM")]
    pub log_format: Option<String>,
    /// error, warn, info, debug or trace; GRID_MOUNT_LOG filters finer
    #[arg(long, value_name = "LEVEL")]
    pub log_level: Option<String>,
    /// End with the last mount
    #[arg(long)]
    pub on_demand: bool,
    /// Where anybody may read /metrics, too: 127.0.0.1:9464
    #[arg(long, value_name = "ADDRESS")]
    pub metrics_listen: Option<String>,
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

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  grid-mount completions bash > ~/.local/share/bash-completion/completions/grid-mount
  grid-mount completions zsh > /usr/local/share/zsh/site-functions/_grid-mount
  grid-mount completions fish > ~/.config/fish/completions/grid-mount.fish")]
pub struct CompletionsArgs {
    #[arg(value_name = "SHELL", value_enum)]
    pub shell: clap_complete::Shell,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  grid-mount man | man -l -
  grid-mount man --dir /usr/local/share/man/man1")]
pub struct ManArgs {
    /// Write a page for each command there, and print their names
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
}

#[cfg(test)]
mod tests {
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

    /// Help has to fit on a screen of 80 × 45 and to have examples.
    #[test]
    fn the_help_fits_on_a_screen() {
        let mut grammar = Cli::grammar().term_width(80);
        let help = grammar.render_help().to_string();
        assert!(
            help.lines().count() <= 45,
            "{} lines:\n{help}",
            help.lines().count()
        );
        assert!(help.contains("Examples:"));
        for command in grammar.get_subcommands_mut() {
            let help = command.render_help().to_string();
            let name = command.get_name();
            // Otherwise `--help` would print the long form, which no screen holds.
            assert!(
                command
                    .get_arguments()
                    .all(|arg| !arg.is_hide_short_help_set() && arg.get_long_help().is_none()),
                "{name} has a long form"
            );
            assert!(
                help.lines().count() <= 45,
                "{name}: {} lines:\n{help}",
                help.lines().count()
            );
            assert!(help.contains("Example"), "{name} has no example");
        }
    }
}
