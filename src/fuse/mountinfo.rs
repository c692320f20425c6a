//! `/proc/self/mountinfo`: which mounts there are, without touching any of them.

use std::{
    ffi::OsString,
    fmt, io,
    os::{
        fd::{AsRawFd, BorrowedFd},
        unix::ffi::{OsStrExt, OsStringExt},
    },
    path::{Path, PathBuf},
    str::FromStr,
};

use serde::{Deserialize, Serialize};

/// The number of a mounted file system: `0:42`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct DeviceNo {
    pub major: u32,
    pub minor: u32,
}

impl fmt::Display for DeviceNo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

impl FromStr for DeviceNo {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (major, minor) = text.split_once(':').ok_or(())?;
        Ok(Self {
            major: major.parse().map_err(drop)?,
            minor: minor.parse().map_err(drop)?,
        })
    }
}

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountLine {
    pub device: DeviceNo,
    pub mount_point: PathBuf,
    /// `fuse.grid-mount`
    pub kind: String,
    pub source: OsString,
    /// Of the file system.
    pub options: String,
}

/// The mounts of this process's namespace, in the order they were made.
pub fn mounts() -> io::Result<Vec<MountLine>> {
    mounts_of(Path::new("/proc/self"))
}

/// The mounts that a process sees, by its directory in `/proc`.
pub fn mounts_of(process: &Path) -> io::Result<Vec<MountLine>> {
    let text = std::fs::read(process.join("mountinfo"))?;
    Ok(text.split(|byte| *byte == b'\n').filter_map(parse).collect())
}

fn parse(line: &[u8]) -> Option<MountLine> {
    let mut fields = line.split(|byte| *byte == b' ');
    let device = str::from_utf8(fields.nth(2)?).ok()?.parse().ok()?;
    let mount_point = PathBuf::from(OsString::from_vec(unescape(fields.nth(1)?)));
    // Any number of optional fields, then a hyphen.
    fields.find(|field| *field == b"-")?;
    let kind = String::from_utf8(fields.next()?.to_vec()).ok()?;
    let source = OsString::from_vec(unescape(fields.next()?));
    let options = String::from_utf8_lossy(fields.next().unwrap_or_default()).into_owned();
    Some(MountLine {
        device,
        mount_point,
        kind,
        source,
        options,
    })
}

/// Blanks, newlines, tabs and backslashes are written as three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let escaped = tail
            .get(..3)
            .filter(|_| first == b'\\')
            .and_then(|digits| u8::from_str_radix(str::from_utf8(digits).ok()?, 8).ok());
        match escaped {
            Some(byte) => {
                out.push(byte);
                rest = &tail[3..];
            }
            None => {
                out.push(first);
                rest = tail;
            }
        }
    }
    out
}

/// The number of the file system behind a descriptor; asks the file system itself nothing.
pub(super) fn device_of(file: BorrowedFd<'_>) -> io::Result<DeviceNo> {
    statx(file.as_raw_fd(), Path::new(""), libc::AT_EMPTY_PATH)
}

/// The number of the file system at a path; asks the file system itself nothing.
pub(super) fn device_at(path: &Path) -> io::Result<DeviceNo> {
    statx(libc::AT_FDCWD, path, libc::AT_SYMLINK_NOFOLLOW)
}

fn statx(dir: i32, path: &Path, flags: i32) -> io::Result<DeviceNo> {
    let path = std::ffi::CString::new(path.as_os_str().as_bytes())?;
    let mut answer = std::mem::MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: `path` is a NUL-terminated string and `answer` room for one statx, both alive during the
    // call; a mask of 0 with AT_STATX_DONT_SYNC only asks for what the kernel has.
    let result = unsafe {
        libc::statx(
            dir,
            path.as_ptr(),
            flags | libc::AT_STATX_DONT_SYNC,
            0,
            answer.as_mut_ptr(),
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: zeroed before, and all-zero bytes are a valid statx; filled by the successful call.
    let answer = unsafe { answer.assume_init() };
    Ok(DeviceNo {
        major: answer.stx_dev_major,
        minor: answer.stx_dev_minor,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_with_their_escapes() {
        let line = br"36 35 0:42 / /mnt/a\040b\134c ro,nosuid shared:1 master:2 - fuse.grid-mount alice:x/3 ro,user_id=0";
        let mount = parse(line).unwrap();
        assert_eq!(mount.device, DeviceNo { major: 0, minor: 42 });
        assert_eq!(mount.mount_point, Path::new(r"/mnt/a b\c"));
        assert_eq!(mount.kind, "fuse.grid-mount");
        assert_eq!(mount.source, "alice:x/3");
        assert_eq!(mount.options, "ro,user_id=0");
        for bad in [&b""[..], b"1 2 3", b"36 35 0:42 / /mnt", br"1 2 x:y / / - a b c"] {
            assert_eq!(parse(bad), None);
        }
        assert_eq!(unescape(br"\9\04"), br"\9\04");
    }

    #[test]
    fn the_root_is_mounted() {
        assert!(
            mounts()
                .unwrap()
                .iter()
                .any(|mount| mount.mount_point == Path::new("/"))
        );
        device_at(Path::new("/proc")).unwrap();
    }
}
