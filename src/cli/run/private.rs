//! A mount namespace for one command, in which some directories are others.

use std::{
    ffi::{CStr, CString},
    io,
    os::unix::{ffi::OsStrExt as _, process::CommandExt as _},
    path::PathBuf,
    process::{Command, Stdio},
};

use nix::{
    fcntl::{OFlag, open},
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    sys::stat::Mode,
    unistd::{getegid, geteuid, write},
};

/// Everything that is needed between fork and exec, where nothing may be allocated.
pub struct Private {
    flags: CloneFlags,
    /// Of a user namespace, where one is made: file → what is written to it.
    maps: Vec<(&'static CStr, String)>,
    /// What is there → where it is to be seen.
    binds: Vec<(CString, CString)>,
}

impl Private {
    pub fn new(binds: &[(PathBuf, PathBuf)]) -> io::Result<Self> {
        let (user, group) = (geteuid(), getegid());
        let mut flags = CloneFlags::CLONE_NEWNS;
        let mut maps = Vec::new();
        if !user.is_root() {
            flags |= CloneFlags::CLONE_NEWUSER;
            // The same numbers inside as outside; an ordinary user may give up setgroups, and then map a group.
            maps.push((c"/proc/self/setgroups", "deny".to_owned()));
            maps.push((c"/proc/self/uid_map", format!("{user} {user} 1")));
            maps.push((c"/proc/self/gid_map", format!("{group} {group} 1")));
        }
        let path = |path: &PathBuf| CString::new(path.as_os_str().as_bytes()).map_err(io::Error::from);
        Ok(Self {
            flags,
            maps,
            binds: binds
                .iter()
                .map(|(from, to)| Ok((path(from)?, path(to)?)))
                .collect::<io::Result<_>>()?,
        })
    }

    /// The command will begin in the namespace.
    pub fn confine(self, command: &mut Command) {
        // SAFETY: `enter` makes system calls only, with memory that was allocated before the fork.
        unsafe {
            command.pre_exec(move || self.enter().map_err(io::Error::from));
        }
    }

    fn enter(&self) -> nix::Result<()> {
        unshare(self.flags)?;
        for (file, text) in &self.maps {
            let file = open(*file, OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty())?;
            write(&file, text.as_bytes())?;
        }
        // What is mounted here stays here; what is unmounted outside goes here, too.
        mount(
            None::<&CStr>,
            c"/",
            None::<&CStr>,
            MsFlags::MS_REC | MsFlags::MS_SLAVE,
            None::<&CStr>,
        )?;
        for (from, to) in &self.binds {
            mount(
                Some(from.as_c_str()),
                to.as_c_str(),
                None::<&CStr>,
                MsFlags::MS_BIND,
                None::<&CStr>,
            )?;
        }
        Ok(())
    }
}

/// Whether the kernel lets this user have such namespaces: tried, since several settings decide it.
pub fn possible() -> bool {
    let Ok(private) = Private::new(&[]) else {
        return false;
    };
    let mut command = Command::new("/proc/self/exe");
    command
        .arg("--version")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    private.confine(&mut command);
    command.status().is_ok_and(|status| status.success())
}
