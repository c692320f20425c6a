//! `mount.grid`: this program under the name by which mount(8) and systemd call it.
//!
//! `mount -t grid alice:imagenet/3 /data -o version=3` becomes `mount.grid alice:imagenet/3 /data -o rw,version=3`.

use std::{
    ffi::OsString,
    os::fd::{AsFd, OwnedFd},
    path::Path,
    process::ExitCode,
};

use clap::ValueEnum;
use nix::{
    fcntl::OFlag,
    sys::{
        stat::Mode,
        statfs::{AUTOFS_SUPER_MAGIC, fstatfs},
    },
};

use super::{
    CliError,
    args::{IoModeArg, MountArgs, ShareArg},
    block_on, mount, output,
};
use crate::causes::in_one_line;

const NAME: &str = "mount.grid";
/// mount(8): wrong arguments.
const USAGE: u8 = 1;
/// mount(8): the mount failed.
const FAILED: u8 = 32;

const HELP: &str = "\
Usage: mount -t grid [USER:]DATASTORE[/VERSION] DIRECTORY [-o OPTIONS]
  version=N|ALIAS   instead of /VERSION
  prefetch=auto|none|all, io-mode=auto|passthrough|no-open
  share=group|all   let others read it: my group, or everybody
  idle-timeout=TIME unmount it when nobody used it for so long
  catalog=URL, as=NAME, socket=PATH
The options that mount(8) and systemd understand are left to them.";

/// Whether this process was called by that name.
pub fn is_called() -> bool {
    let called = std::env::args_os().next();
    called.is_some_and(|called| Path::new(&called).file_name().is_some_and(|name| name == NAME))
}

pub fn main() -> ExitCode {
    let arguments = std::env::args_os().skip(1);
    let arguments: Result<Vec<String>, OsString> = arguments.map(OsString::into_string).collect();
    let plan = match arguments {
        Ok(arguments) => parse(&arguments),
        Err(other) => Err(format!("{} is not Unicode", other.display())),
    };
    let args = match plan {
        Ok(Plan::Mount(args)) => *args,
        Ok(Plan::Nothing) => return ExitCode::SUCCESS,
        Ok(Plan::Help) => {
            output::print(&format!("{HELP}\n"));
            return ExitCode::SUCCESS;
        }
        Err(message) => {
            output::note(&format!("{NAME}: {message}"));
            return ExitCode::from(USAGE);
        }
    };
    let trigger = args.mount_point.as_deref().and_then(automount_trigger);
    let trigger = trigger.as_ref().map(AsFd::as_fd);
    let failed = match block_on(async { mount::make(&args, trigger).await.map(drop) }) {
        Ok(()) => return ExitCode::SUCCESS,
        Err(CliError::Failed(error)) => in_one_line(&*error),
        Err(error) => error.to_string(),
    };
    output::note(&format!("{NAME}: {failed}"));
    ExitCode::from(FAILED)
}

/// The mount point, open, if it is one that an automount waits at. This process is of systemd's process group
/// when an automount called it, and may walk there; an agent may not.
fn automount_trigger(path: &Path) -> Option<OwnedFd> {
    let open = nix::fcntl::open(path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).ok()?;
    let kind = fstatfs(&open).ok()?.filesystem_type();
    (kind == AUTOFS_SUPER_MAGIC).then_some(open)
}

#[derive(Debug)]
enum Plan {
    Mount(Box<MountArgs>),
    /// `-f`: everything but the mount.
    Nothing,
    Help,
}

fn parse(arguments: &[String]) -> Result<Plan, String> {
    let mut places = Vec::new();
    let mut options = Vec::new();
    let (mut fake, mut sloppy) = (false, false);
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        let mut value = |option: &str| rest.next().ok_or_else(|| format!("{option} needs a value"));
        match argument.as_str() {
            "-h" | "--help" => return Ok(Plan::Help),
            "-o" => options.extend(value("-o")?.split(',')),
            // The type, which is why this program runs.
            "-t" => drop(value("-t")?),
            "-N" => return Err("-N is not supported: mount from within the namespace".into()),
            flags if flags.starts_with('-') && flags.len() > 1 => {
                for flag in flags.chars().skip(1) {
                    match flag {
                        'f' => fake = true,
                        's' => sloppy = true,
                        'n' | 'v' | 'r' | 'w' => {}
                        _ => return Err(format!("there is no option -{flag}")),
                    }
                }
            }
            place => places.push(place),
        }
    }
    let [reference, directory] = places[..] else {
        return Err(format!("name what to mount and where\n{HELP}"));
    };
    let mut args = MountArgs {
        mount_point: Some(directory.into()),
        ..MountArgs::default()
    };
    let mut version = None;
    for option in options.into_iter().filter(|option| !option.is_empty()) {
        let (name, value) = option.split_once('=').unwrap_or((option, ""));
        let owned = || match value {
            "" => Err(format!("{name}= needs a value")),
            value => Ok(Some(value.to_owned())),
        };
        match name {
            "version" => version = owned()?,
            "prefetch" => args.prefetch = owned()?,
            "idle-timeout" => args.idle_timeout = owned()?,
            "catalog" => args.catalog.catalog = owned()?,
            "as" => args.catalog.user = owned()?,
            "socket" => args.socket.socket = owned()?.map(Into::into),
            "io-mode" => args.io_mode = IoModeArg::from_str(value, false)?,
            "share" => args.share = Some(ShareArg::from_str(value, false)?),
            _ if sloppy || is_of_others(name) => {}
            _ => return Err(format!("there is no option {name}\n{HELP}")),
        }
    }
    args.reference = Some(match version {
        None => reference.to_owned(),
        Some(version) => match reference.rsplit('/').next() {
            Some(said) if said == version => reference.to_owned(),
            _ => format!("{reference}/{version}"),
        },
    });
    Ok(match fake {
        true => Plan::Nothing,
        false => Plan::Mount(Box::new(args)),
    })
}

/// Options that mount(8), fstab(5) and systemd.mount(5) give a meaning of their own, and what a mount of ours
/// is anyway: read-only, `nosuid`, `nodev`.
fn is_of_others(name: &str) -> bool {
    const OTHERS: [&str; 32] = [
        "defaults",
        "ro",
        "rw",
        "auto",
        "noauto",
        "nofail",
        "fail",
        "_netdev",
        "user",
        "nouser",
        "users",
        "owner",
        "noowner",
        "group",
        "nogroup",
        "comment",
        "suid",
        "nosuid",
        "dev",
        "nodev",
        "exec",
        "noexec",
        "async",
        "sync",
        "atime",
        "noatime",
        "diratime",
        "nodiratime",
        "relatime",
        "norelatime",
        "silent",
        "loud",
    ];
    OTHERS.contains(&name) || name.starts_with("x-") || name.starts_with("X-")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Plan, String> {
        parse(&line.split(' ').map(str::to_owned).collect::<Vec<_>>())
    }

    fn mount(line: &str) -> MountArgs {
        match parsed(line) {
            Ok(Plan::Mount(args)) => *args,
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn a_line_of_fstab_becomes_a_mount() {
        let args = mount(
            "alice:imagenet /data -o rw,version=3,prefetch=all,_netdev,nofail,x-systemd.automount,user,share=all",
        );
        assert_eq!(args.reference.as_deref(), Some("alice:imagenet/3"));
        assert_eq!(args.mount_point.as_deref(), Some(Path::new("/data")));
        assert_eq!(args.prefetch.as_deref(), Some("all"));
        assert!(matches!(args.share, Some(ShareArg::All)));
        // The same twice is no contradiction; another one is left to the grammar of references to refuse.
        assert_eq!(
            mount("a:b/3 /d -sn -o version=3").reference.as_deref(),
            Some("a:b/3")
        );
        assert_eq!(
            mount("a:b/2 /d -o version=3").reference.as_deref(),
            Some("a:b/2/3")
        );
    }

    #[test]
    fn what_nobody_knows_is_refused() {
        for line in [
            "a:b /d -o speling",
            "a:b /d -o share=everybody",
            "a:b /d -o version",
            "a:b",
            "a:b /d /e",
            "a:b /d -N 7",
            "a:b /d -q",
        ] {
            assert!(parsed(line).is_err(), "{line}");
        }
        assert!(matches!(parsed("a:b /d -s -o speling"), Ok(Plan::Mount(_))));
        assert!(matches!(parsed("a:b /d -f"), Ok(Plan::Nothing)));
    }
}
