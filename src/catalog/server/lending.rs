//! Keys for stores, lent to those who may read or write there.
//!
//! A file says for which store: keys of their own for readers and for writers, or a role that a token
//! service (STS) hands out, narrowed to one version. Read again when it changes, so that keys are rotated by
//! replacing the file. Where it says nothing of a store, callers use keys of their own.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use parking_lot::Mutex;
use serde::Deserialize;

use super::sts;
use crate::{
    catalog::{Record, protocol::Loan},
    origin::{Keys, Secret, StoreKind, StoreSettings, StoreUrl},
    reference::UserName,
};

/// How long a loan lasts where the file does not say.
const LIFETIME: u64 = 900;

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LendingError {
    #[error("{path} cannot be read")]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// Without the text around it, which may be a secret.
    #[error("{path} is not a file of credentials: line {line}: {message}")]
    Parse {
        path: PathBuf,
        line: usize,
        message: String,
    },
    #[error("the token service at {endpoint} lent nothing: {reason}")]
    TokenService { endpoint: String, reason: String },
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    store: Vec<LentStore>,
}

/// What is lent for one store, and everything below it.
#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct LentStore {
    url: StoreUrl,
    /// What clients need besides keys: `AWS_ENDPOINT_URL`, `AWS_REGION`.
    #[serde(default)]
    settings: StoreSettings,
    /// Seconds.
    #[serde(default = "lifetime")]
    lifetime: u64,
    read: Option<StoreSettings>,
    write: Option<StoreSettings>,
    assume_role: Option<sts::Role>,
    /// Whose registered versions below this store may be read with what is lent; everybody's, where nobody
    /// is named. Otherwise whoever registers a prefix could read it with the control plane's keys.
    publishers: Option<Vec<UserName>>,
}

fn lifetime() -> u64 {
    LIFETIME
}

/// What somebody wants to do with a store.
#[derive(Clone, Copy)]
pub(super) enum Wish<'record> {
    /// The tree of a version, and its objects where they lie in the catalog.
    ReadTree(&'record Record),
    /// The objects of a version that was registered.
    ReadObjects(&'record Record),
    /// Objects and trees, not records.
    Publish,
}

pub struct Lending {
    path: Option<PathBuf>,
    read: Mutex<Option<(SystemTime, Arc<File>)>>,
}

impl Lending {
    /// Everybody uses keys of their own.
    pub fn nothing() -> Self {
        Self {
            path: None,
            read: Mutex::new(None),
        }
    }

    pub async fn from_file(path: PathBuf) -> Result<Self, LendingError> {
        let lending = Self {
            path: Some(path),
            read: Mutex::new(None),
        };
        lending.file().await?;
        Ok(lending)
    }

    async fn file(&self) -> Result<Arc<File>, LendingError> {
        let Some(path) = &self.path else {
            return Ok(Arc::default());
        };
        let failed = |source| LendingError::Read {
            path: path.clone(),
            source,
        };
        let modified = tokio::fs::metadata(path)
            .await
            .and_then(|metadata| metadata.modified())
            .map_err(failed)?;
        if let Some((seen, file)) = &*self.read.lock()
            && *seen == modified
        {
            return Ok(Arc::clone(file));
        }
        let text = tokio::fs::read_to_string(path).await.map_err(failed)?;
        let file: File = toml::from_str(&text).map_err(|error| LendingError::Parse {
            path: path.clone(),
            line: error
                .span()
                .map_or(1, |span| text[..span.start].matches('\n').count() + 1),
            message: error.message().to_owned(),
        })?;
        let file = Arc::new(file);
        *self.read.lock() = Some((modified, Arc::clone(&file)));
        Ok(file)
    }

    /// `None`: the caller uses keys of their own.
    pub(super) async fn lend(
        &self,
        url: &StoreUrl,
        wish: Wish<'_>,
        user: &UserName,
    ) -> Result<Option<Loan>, LendingError> {
        let file = self.file().await?;
        let above =
            |lent: &&LentStore| lent.url == *url || url.to_string().starts_with(&format!("{}/", lent.url));
        // The most particular one.
        let chosen = file
            .store
            .iter()
            .filter(above)
            .max_by_key(|lent| lent.url.to_string().len());
        let Some(lent) = chosen else {
            return Ok(None);
        };
        if let (Wish::ReadObjects(record), Some(publishers)) = (wish, &lent.publishers)
            && !publishers.contains(&record.owner)
        {
            return Ok(None);
        }
        let keys = match (wish, &lent.read, &lent.write) {
            (Wish::Publish, _, Some(keys)) => Some(keys.clone()),
            (Wish::ReadTree(_) | Wish::ReadObjects(_), Some(keys), _) => Some(keys.clone()),
            _ => None,
        };
        let keys = match (keys, &lent.assume_role, url.kind()) {
            (Some(keys), ..) => keys,
            (None, Some(role), StoreKind::S3 { bucket }) => {
                let policy = sts::policy(&bucket, &url.prefix(), wish);
                let life = Duration::from_secs(lent.lifetime);
                let keys = role.assume(&policy, user, life).await?;
                settings_of(&keys)
            }
            _ => return Ok(None),
        };
        let mut settings = lent.settings.clone();
        settings.extend(&keys);
        Ok(Some(Loan {
            settings,
            expires_in: Some(lent.lifetime),
        }))
    }
}

fn settings_of(keys: &Keys) -> StoreSettings {
    let token = keys.token.as_ref().map(Secret::expose).unwrap_or_default();
    [
        ("AWS_ACCESS_KEY_ID", keys.id.as_str()),
        ("AWS_SECRET_ACCESS_KEY", keys.secret.expose()),
        ("AWS_SESSION_TOKEN", token),
    ]
    .into_iter()
    .collect()
}
