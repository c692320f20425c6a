//! Where a mount may go: the rules, and the directories made for it.

use std::{
    fs, io,
    path::{Component, Path, PathBuf},
};

#[derive(Debug, thiserror::Error)]
pub enum MountPointError {
    #[error("{0} is not an absolute path")]
    Relative(PathBuf),
    #[error("{0} is a file, not a directory; name another mount point")]
    NotADirectory(PathBuf),
    #[error("{0} is not empty; name an empty or a new directory as mount point")]
    NotEmpty(PathBuf),
    #[error(
        "{0} is a mount whose agent is gone (\"Transport endpoint is not connected\"); `grid-mount unmount {0}` clears it"
    )]
    Stale(PathBuf),
    #[error("{path} cannot be used as a mount point")]
    Unusable {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// A directory ready to be mounted on. Directories that were made for it are removed again with it.
#[derive(Debug)]
pub struct MountPoint {
    path: PathBuf,
    /// What was created, outermost first.
    created: Vec<PathBuf>,
}

impl MountPoint {
    /// Checks `path`, and creates it with its missing parents (mode 0755 less the umask).
    pub fn prepare(path: &Path) -> Result<Self, MountPointError> {
        if !path.is_absolute() || path.components().any(|part| part == Component::ParentDir) {
            return Err(MountPointError::Relative(path.to_owned()));
        }
        let unusable = |source| MountPointError::Unusable {
            path: path.to_owned(),
            source,
        };
        match fs::metadata(path) {
            Ok(metadata) if !metadata.is_dir() => Err(MountPointError::NotADirectory(path.to_owned())),
            Ok(_) => {
                if fs::read_dir(path).map_err(unusable)?.next().is_some() {
                    return Err(MountPointError::NotEmpty(path.to_owned()));
                }
                let path = fs::canonicalize(path).map_err(unusable)?;
                Ok(Self {
                    path,
                    created: Vec::new(),
                })
            }
            Err(error) if error.raw_os_error() == Some(nix::libc::ENOTCONN) => {
                Err(MountPointError::Stale(path.to_owned()))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Self::create(path),
            Err(error) => Err(unusable(error)),
        }
    }

    /// One that another agent prepared.
    pub fn inherited(path: PathBuf, created: Vec<PathBuf>) -> Self {
        Self { path, created }
    }

    /// What was made for it, outermost first.
    pub fn created(&self) -> &[PathBuf] {
        &self.created
    }

    /// Leaves to another agent what was made for it.
    pub fn leave(mut self) {
        self.created.clear();
    }

    fn create(path: &Path) -> Result<Self, MountPointError> {
        let mut missing: Vec<&Path> = path
            .ancestors()
            .take_while(|ancestor| fs::symlink_metadata(ancestor).is_err())
            .collect();
        missing.reverse();
        // From here on a failure removes what was made, by Drop.
        let mut made = Self {
            path: path.to_owned(),
            created: Vec::new(),
        };
        for dir in missing {
            match fs::create_dir(dir) {
                Ok(()) => made.created.push(dir.to_owned()),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(source) => {
                    return Err(MountPointError::Unusable {
                        path: dir.to_owned(),
                        source,
                    });
                }
            }
        }
        made.path = fs::canonicalize(path).map_err(|source| MountPointError::Unusable {
            path: path.to_owned(),
            source,
        })?;
        Ok(made)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for MountPoint {
    fn drop(&mut self) {
        for dir in self.created.iter().rev() {
            // Another mount may have moved in beside ours; then the directory stays.
            if fs::remove_dir(dir).is_err() {
                break;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_created_goes_and_what_was_there_stays() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("a/b/c");
        let point = MountPoint::prepare(&deep).unwrap();
        assert!(deep.is_dir());
        drop(point);
        assert!(!dir.path().join("a").exists());

        fs::create_dir_all(&deep).unwrap();
        drop(MountPoint::prepare(&deep).unwrap());
        assert!(deep.is_dir());
    }

    #[test]
    fn files_full_directories_and_relative_paths_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "x").unwrap();
        assert!(matches!(
            MountPoint::prepare(&file),
            Err(MountPointError::NotADirectory(_))
        ));
        assert!(matches!(
            MountPoint::prepare(dir.path()),
            Err(MountPointError::NotEmpty(_))
        ));
        assert!(matches!(
            MountPoint::prepare(Path::new("a")),
            Err(MountPointError::Relative(_))
        ));
        assert!(matches!(
            MountPoint::prepare(&file.join("below")),
            Err(MountPointError::Unusable { .. })
        ));
    }
}
