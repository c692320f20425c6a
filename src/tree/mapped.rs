//! What happens when the disk under a mapped part fails: the part goes, then the process.
//!
//! Touching a page that cannot be read (a bad sector, a file cut short by somebody else) raises SIGBUS,
//! and there is no answer that could be given instead. The process dies of it, as it would anyway; but a
//! process that is started in its place, asked the same again, would map the same file and die as well.
//! So the handler first removes the file, of those parts that can be had again.

use std::{
    ffi::CString,
    io,
    ops::Range,
    os::unix::ffi::OsStrExt,
    path::Path,
    sync::{
        Once,
        atomic::{AtomicU64, Ordering},
    },
};

use parking_lot::Mutex;

/// One mapping whose file goes when it cannot be read.
struct Replaceable {
    id: u64,
    addresses: Range<usize>,
    path: CString,
}

/// As many as there are mounts. Never held while a mapping is touched.
static REPLACEABLE: Mutex<Vec<Replaceable>> = Mutex::new(Vec::new());

/// Until this is dropped, a failure to read the mapping removes its file.
pub(super) struct RemovedOnFailure {
    id: u64,
}

impl RemovedOnFailure {
    pub(super) fn new(mapping: &[u8], path: &Path) -> io::Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        static HANDLER: Once = Once::new();
        HANDLER.call_once(install);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        let start = mapping.as_ptr().addr();
        // The handler may run when the current directory is another one.
        let path = CString::new(std::path::absolute(path)?.as_os_str().as_bytes())?;
        REPLACEABLE.lock().push(Replaceable {
            id,
            addresses: start..start + mapping.len(),
            path,
        });
        Ok(Self { id })
    }
}

impl Drop for RemovedOnFailure {
    fn drop(&mut self) {
        REPLACEABLE.lock().retain(|replaceable| replaceable.id != self.id);
    }
}

fn install() {
    // SAFETY: `on_bus_error` is a handler of the kind that SA_SIGINFO announces, and stays one; the
    // struct is valid when zeroed, and initialized where the call reads it. What was installed before
    // (the standard library's, which tells stack overflows apart, which Linux reports as SIGSEGV) is
    // replaced by what it does with everything else: the default action.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_bus_error as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
        libc::sigemptyset(&raw mut action.sa_mask);
        libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut());
    }
}

extern "C" fn on_bus_error(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: only async-signal-safe functions. With the default action back in place, whatever goes
    // wrong below ends the process as well. The kernel gives a valid `info`, whose address is meaningful
    // for the code that is compared first.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = libc::SIG_DFL;
        libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut());
        if (*info).si_code == libc::BUS_ADRERR {
            remove((*info).si_addr().addr());
        }
        // Pending until the handler returns; a signal that somebody sent ends the process, too.
        libc::raise(libc::SIGBUS);
    }
}

/// Runs in the handler: takes no memory and panics nowhere.
fn remove(address: usize) {
    // Of this thread it is certain that it does not hold the lock: it was touching a mapping. Others hold it
    // for a moment.
    let replaceable = loop {
        match REPLACEABLE.try_lock() {
            Some(replaceable) => break replaceable,
            None => std::hint::spin_loop(),
        }
    };
    for part in replaceable.iter() {
        if part.addresses.contains(&address) {
            // SAFETY: a NUL-terminated string; unlink and write are async-signal-safe, and their failure
            // changes nothing about what follows.
            unsafe { libc::unlink(part.path.as_ptr()) };
            for text in [
                b"grid-mount: cannot be read any more, and is removed to be fetched anew: ".as_slice(),
                part.path.to_bytes(),
                b"\n",
            ] {
                // SAFETY: the bytes are alive during the call.
                unsafe { libc::write(libc::STDERR_FILENO, text.as_ptr().cast(), text.len()) };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{self, File, Permissions},
        os::unix::{fs::PermissionsExt, process::ExitStatusExt},
        path::{Path, PathBuf},
        process::{Command, Output},
    };

    use crate::tree::{RowNo, Timestamp, Tree, builder::TreeBuilder, unpack};

    /// For the child: how to open, and the directory to work in.
    const HOW: &str = "GRID_MOUNT_TEST_MAPPED_HOW";
    const DIR: &str = "GRID_MOUNT_TEST_MAPPED_DIR";
    const FILES: u32 = 1000;

    fn part(dir: &Path, name: &str) -> PathBuf {
        let mut builder = TreeBuilder::new(dir, 1 << 20).unwrap();
        for number in 0..FILES {
            let path = format!("{number:05}");
            let time = Timestamp::default();
            builder
                .add_file(path.as_bytes(), 0o644, time, 0, None, None)
                .unwrap();
        }
        let rows = builder.finish(dir).unwrap().rows;
        let out = dir.join(name);
        unpack(File::open(&rows.path).unwrap(), rows.size, rows.digest, &out).unwrap();
        fs::set_permissions(&out, Permissions::from_mode(0o600)).unwrap();
        out
    }

    /// Not a test by itself: what the test below starts as a process of its own.
    #[test]
    fn child() {
        let (Some(how), Some(dir)) = (std::env::var_os(HOW), std::env::var_os(DIR)) else {
            return;
        };
        let dir = PathBuf::from(dir);
        let (path, other) = (part(&dir, "part"), part(&dir, "other"));
        let (open, read): (fn(&Path) -> _, bool) = match how.to_str().unwrap() {
            "replaceable" => (Tree::open_replaceable, true),
            "plain" => (Tree::open, true),
            "signalled" => (Tree::open_replaceable, false),
            _ => unreachable!(),
        };
        let others = [Tree::open_replaceable(&other), Tree::open_replaceable(&path)];
        let tree = open(&path).unwrap();
        // The handler must find the one that is left, and nothing else.
        let [other, same] = others.map(Result::unwrap);
        drop(same);
        let last = RowNo(FILES);
        assert!(tree.entry(last).is_ok());
        if read {
            let file = File::options().write(true).open(&path).unwrap();
            file.set_len(4096).unwrap();
            assert!(other.entry(last).is_ok());
            let _ = tree.entry(last);
        } else {
            nix::sys::signal::raise(nix::sys::signal::Signal::SIGBUS).unwrap();
        }
        unreachable!("it is still alive");
    }

    fn run_child(how: &str) -> (Output, Vec<String>) {
        let dir = tempfile::tempdir().unwrap();
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "tree::mapped::tests::child", "--nocapture"])
            .env(HOW, how)
            .env(DIR, dir.path())
            .output()
            .unwrap();
        let parts = ["other", "part"].map(str::to_owned);
        let left = parts.into_iter().filter(|part| dir.path().join(part).exists());
        (output, left.collect())
    }

    #[test]
    fn a_part_that_cannot_be_read_goes_before_its_process() {
        for (how, left) in [
            ("replaceable", &["other"][..]),
            ("plain", &["other", "part"]),
            ("signalled", &["other", "part"]),
        ] {
            let (output, found) = run_child(how);
            let said = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.signal(), Some(libc::SIGBUS), "{how}: {said}");
            assert_eq!(found, left, "{how}: {said}");
            assert_eq!(
                said.contains("fetched anew"),
                how == "replaceable",
                "{how}: {said}"
            );
        }
    }
}
