//! What outlives an agent: the state from which another one goes on with its mounts.
//!
//! Owns the form of that state, which the next version of this program must be able to read: an upgrade
//! is a restart. The descriptor itself is kept by somebody else (systemd, a parent process). Must not
//! know what a mount serves.

use std::{
    io::Write,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{
    fs::Owner,
    fuse::{DeviceNo, Handshake, MountOptions, Mounted, Way},
};

/// Raised when a field changes its meaning; new fields alone do not raise it (they have defaults).
pub const FORMAT: u32 = 1;

/// All that has to be known of one mount, but what it serves. Unknown fields are ignored, so that a
/// program can be replaced by an older one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountState {
    pub format: u32,
    pub reference: String,
    pub mount_point: PathBuf,
    pub device: DeviceNo,
    pub way: Way,
    pub owner: Owner,
    pub share: bool,
    pub threads: usize,
    /// Where it is written down which inodes are open.
    #[serde(default)]
    pub open_table: Option<PathBuf>,
    pub handshake: Handshake,
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HandoverError {
    #[error("{path}")]
    Io {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{path} is no mount state")]
    Damaged {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
    #[error("{path} has format {found}; this version of grid-mount reads {FORMAT}")]
    Format { path: PathBuf, found: u32 },
}

impl MountState {
    pub fn of(mounted: &Mounted) -> Self {
        let options = mounted.options();
        Self {
            format: FORMAT,
            reference: options.reference.clone(),
            mount_point: options.mount_point.clone(),
            device: mounted.device(),
            way: mounted.way(),
            owner: options.owner,
            share: options.share,
            threads: options.threads,
            open_table: options.open_table.clone(),
            handshake: mounted.handshake().clone(),
        }
    }

    /// The options to go on with.
    pub fn options(&self) -> MountOptions {
        MountOptions {
            share: self.share,
            threads: self.threads,
            open_table: self.open_table.clone(),
            ..MountOptions::new(&self.mount_point, &self.reference, self.owner)
        }
    }

    /// Replaces the file as a whole.
    pub fn write(&self, path: &Path) -> Result<(), HandoverError> {
        let io = |source| HandoverError::Io {
            path: path.into(),
            source,
        };
        let text = serde_json::to_vec_pretty(self).map_err(|source| HandoverError::Damaged {
            path: path.into(),
            source,
        })?;
        let dir = path
            .parent()
            .filter(|dir| !dir.as_os_str().is_empty())
            .unwrap_or(Path::new("."));
        let mut file = tempfile::NamedTempFile::new_in(dir).map_err(io)?;
        file.write_all(&text).map_err(io)?;
        file.persist(path).map_err(|error| io(error.error))?;
        Ok(())
    }

    pub fn read(path: &Path) -> Result<Self, HandoverError> {
        #[derive(Deserialize)]
        struct Version {
            format: u32,
        }
        let text = std::fs::read(path).map_err(|source| HandoverError::Io {
            path: path.into(),
            source,
        })?;
        let damaged = |source| HandoverError::Damaged {
            path: path.into(),
            source,
        };
        let Version { format } = serde_json::from_slice(&text).map_err(damaged)?;
        if format != FORMAT {
            return Err(HandoverError::Format {
                path: path.into(),
                found: format,
            });
        }
        serde_json::from_slice(&text).map_err(damaged)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuse::{ChosenIoMode, IoMode};

    fn state() -> MountState {
        MountState {
            format: FORMAT,
            reference: "alice:x/3".into(),
            mount_point: "/mnt/x".into(),
            device: DeviceNo { major: 0, minor: 42 },
            way: Way::Kernel,
            owner: Owner { uid: 1, gid: 2 },
            share: true,
            threads: 4,
            open_table: None,
            handshake: Handshake {
                kernel_major: 7,
                kernel_minor: 44,
                capabilities: u64::MAX,
                max_readahead: 131_072,
                io_mode: ChosenIoMode {
                    mode: IoMode::NoOpen,
                    reason: "because".into(),
                },
            },
        }
    }

    #[test]
    fn state_survives_and_later_versions_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.json");
        state().write(&path).unwrap();
        assert_eq!(MountState::read(&path).unwrap(), state());
        let text = std::fs::read_to_string(&path).unwrap();
        // A field that a later version added, and one that an earlier one did not have.
        let later = text.replacen('{', "{ \"colour\": 1,", 1);
        std::fs::write(&path, later).unwrap();
        assert_eq!(MountState::read(&path).unwrap(), state());
        std::fs::write(&path, text.replace("  \"open_table\": null,\n", "")).unwrap();
        assert_eq!(MountState::read(&path).unwrap(), state());
        std::fs::write(&path, text.replace("\"format\": 1", "\"format\": 2")).unwrap();
        assert!(matches!(
            MountState::read(&path),
            Err(HandoverError::Format { found: 2, .. })
        ));
        std::fs::write(&path, &text[..text.len() / 2]).unwrap();
        assert!(matches!(
            MountState::read(&path),
            Err(HandoverError::Damaged { .. })
        ));
        assert!(matches!(
            MountState::read(&dir.path().join("none")),
            Err(HandoverError::Io { .. })
        ));
    }
}
