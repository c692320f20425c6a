//! Who the caller says they are: a token from a file or the environment, or Grid's user id and API key.

use std::{
    path::{Path, PathBuf},
    time::SystemTime,
};

use base64::Engine as _;
use parking_lot::Mutex;

use crate::origin::{Secret, StoreSettings};

/// A token is one short line.
const MOST: u64 = 4096;

pub(super) struct Identity {
    /// Read again when it changes, so that whoever rotates tokens need not restart anything.
    file: Option<PathBuf>,
    read: Mutex<Option<(SystemTime, Secret)>>,
    token: Option<Secret>,
    grid: Option<(String, Secret)>,
}

impl Identity {
    pub fn of(settings: &StoreSettings) -> Self {
        let grid = settings.get("GRID_USER_ID").zip(settings.get("GRID_API_KEY"));
        Self {
            file: settings.get("GRID_MOUNT_TOKEN_FILE").map(PathBuf::from),
            read: Mutex::new(None),
            token: settings.get("GRID_MOUNT_TOKEN").map(Secret::new),
            grid: grid.map(|(user, key)| (user.to_owned(), Secret::new(key))),
        }
    }

    /// The value of the `Authorization` header; `Err` says why there is none.
    pub async fn header(&self) -> Result<Secret, String> {
        if let Some(path) = &self.file {
            return match self.read_file(path).await {
                Ok(token) => Ok(Secret::new(format!("Bearer {}", token.expose()))),
                Err(reason) => Err(format!("{} {reason}", path.display())),
            };
        }
        if let Some(token) = &self.token {
            return Ok(Secret::new(format!("Bearer {}", token.expose())));
        }
        if let Some((user, key)) = &self.grid {
            let pair = Secret::new(format!("{user}:{}", key.expose()));
            let encoded = base64::engine::general_purpose::STANDARD.encode(pair.expose());
            return Ok(Secret::new(format!("Basic {encoded}")));
        }
        Err("there is no token".to_owned())
    }

    async fn read_file(&self, path: &Path) -> Result<Secret, String> {
        let unreadable = |error: std::io::Error| format!("cannot be read: {error}");
        let metadata = tokio::fs::metadata(path).await.map_err(unreadable)?;
        if !metadata.is_file() || metadata.len() > MOST {
            return Err("is not a file with a token in it".to_owned());
        }
        let modified = metadata.modified().map_err(unreadable)?;
        if let Some((seen, token)) = &*self.read.lock()
            && *seen == modified
        {
            return Ok(token.clone());
        }
        let text = Secret::new(tokio::fs::read_to_string(path).await.map_err(unreadable)?);
        let token = text.expose().trim();
        // Whatever else the file may be, it is not sent to anybody.
        let fit = |byte: u8| byte.is_ascii_graphic();
        if token.is_empty() || !token.bytes().all(fit) {
            return Err("does not hold one token and nothing else".to_owned());
        }
        let token = Secret::new(token);
        *self.read.lock() = Some((modified, token.clone()));
        Ok(token)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_token_file_is_read_again_when_it_changes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        let settings: StoreSettings = [("GRID_MOUNT_TOKEN_FILE", path.to_str().unwrap())]
            .into_iter()
            .collect();
        let identity = Identity::of(&settings);
        assert!(identity.header().await.unwrap_err().contains("cannot be read"));
        for (text, second) in [("first\n", 1), ("second", 2)] {
            std::fs::write(&path, text).unwrap();
            let file = std::fs::File::open(&path).unwrap();
            file.set_modified(SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(second))
                .unwrap();
            assert_eq!(
                identity.header().await.unwrap().expose(),
                format!("Bearer {}", text.trim())
            );
        }
        std::fs::write(&path, "root:x:0:0 root\nbin:x").unwrap();
        assert!(identity.header().await.is_err());
    }

    #[tokio::test]
    async fn grid_names_its_users_by_id_and_key() {
        let settings: StoreSettings = [("GRID_USER_ID", "alice"), ("GRID_API_KEY", "key")]
            .into_iter()
            .collect();
        assert_eq!(
            Identity::of(&settings).header().await.unwrap().expose(),
            "Basic YWxpY2U6a2V5"
        );
        assert!(Identity::of(&StoreSettings::default()).header().await.is_err());
    }
}
