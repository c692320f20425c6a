//! Stores opened with keys that a control plane lends.

use std::{error::Error, sync::Arc};

use async_trait::async_trait;
use reqwest::Method;

use super::{
    refused,
    transport::{Answer, Ask, Transport},
};
use crate::{
    catalog::{
        CatalogError,
        protocol::{Loan, Purpose, version_path},
    },
    origin::{
        Borrowed, Credentials, Deadlines, Keys, Lender, Lent, OriginError, Secret, Store, StoreKind,
        StoreSettings, StoreUrl,
    },
    reference::{PinnedReference, UserName},
};

/// What is asked for, again and again.
enum For {
    Reading(PinnedReference, Purpose),
    Publishing(UserName),
}

/// Asks the control plane for keys.
pub(super) struct Renewal {
    transport: Arc<Transport>,
    what: For,
}

impl Renewal {
    pub fn to_read(transport: &Arc<Transport>, reference: PinnedReference, purpose: Purpose) -> Arc<Self> {
        Arc::new(Self {
            transport: Arc::clone(transport),
            what: For::Reading(reference, purpose),
        })
    }

    pub fn to_publish(transport: &Arc<Transport>, user: UserName) -> Arc<Self> {
        Arc::new(Self {
            transport: Arc::clone(transport),
            what: For::Publishing(user),
        })
    }

    /// `None`: the control plane lends none.
    pub async fn ask(&self) -> Result<Option<Loan>, CatalogError> {
        let (path, purpose) = match &self.what {
            For::Reading(reference, purpose) => {
                let purpose = match purpose {
                    Purpose::Tree => "tree",
                    Purpose::Origin => "origin",
                };
                (format!("{}/credentials", version_path(reference)), Some(purpose))
            }
            // Keys to publish are the same for all of a user's datastores.
            For::Publishing(user) => (format!("/v1/datastores/{user}/any/upload-credentials"), None),
        };
        // Asking twice for keys does no harm.
        let key = format!("{:032x}", rand::random::<u128>());
        let ask = Ask::new(Method::POST, &path).query("for", purpose).once(key);
        match self.transport.send(&ask).await? {
            Answer::Ok(bytes) if bytes.is_empty() => Ok(None),
            Answer::Ok(bytes) => {
                serde_json::from_slice(&bytes)
                    .map(Some)
                    .map_err(|error| CatalogError::BadAnswer {
                        catalog: self.transport.url().to_owned(),
                        what: format!("{path}: {error}"),
                    })
            }
            Answer::Problem(problem) => Err(refused(&self.transport, problem)),
        }
    }
}

#[async_trait]
impl Lender for Renewal {
    async fn lend(&self) -> Result<Lent, Box<dyn Error + Send + Sync>> {
        let loan = self
            .ask()
            .await?
            .ok_or("the control plane lends no keys for this store any more")?;
        lent(&loan).ok_or_else(|| "the control plane lent something else than keys".into())
    }
}

/// The keys in a loan, if it holds any.
fn lent(loan: &Loan) -> Option<Lent> {
    Some(Lent {
        keys: Keys {
            id: loan.settings.get("AWS_ACCESS_KEY_ID")?.to_owned(),
            secret: Secret::new(loan.settings.get("AWS_SECRET_ACCESS_KEY")?),
            token: loan.settings.get("AWS_SESSION_TOKEN").map(Secret::new),
        },
        expires_in: loan.life(),
    })
}

/// The loan's settings in place of the caller's own: a key of one never meets an endpoint of the other.
fn replaced(settings: &StoreSettings, loan: &Loan) -> StoreSettings {
    let mut settings = settings.without("AWS_").without("GOOGLE_").without("AZURE_");
    settings.extend(&loan.settings);
    settings
}

fn store_with(
    url: &StoreUrl,
    settings: &StoreSettings,
    credentials: Option<Arc<dyn Credentials>>,
    deadlines: &Deadlines,
) -> Result<Store, CatalogError> {
    Store::open_with(url, settings, deadlines, credentials).map_err(|source| CatalogError::Origin {
        doing: "opening the store that the control plane names",
        source,
    })
}

/// What a store is opened with.
#[derive(Clone)]
pub(super) struct Access {
    settings: StoreSettings,
    /// The keys, where they are lent.
    pub borrowed: Option<Arc<Borrowed>>,
    /// What is lent, keys included, as it was at first.
    pub lent: StoreSettings,
}

impl Access {
    /// With the caller's own settings, or with what is lent in their place.
    pub fn new(url: &StoreUrl, settings: &StoreSettings, loan: Option<&Loan>, lender: Arc<Renewal>) -> Self {
        let Some(loan) = loan else {
            return Self {
                settings: settings.clone(),
                borrowed: None,
                lent: StoreSettings::default(),
            };
        };
        let borrowed = match (lent(loan), url.kind()) {
            (Some(lent), StoreKind::S3 { .. }) => {
                Some(Borrowed::starting_with(url.to_string(), lent, lender))
            }
            _ => None,
        };
        Self {
            settings: replaced(settings, loan),
            borrowed,
            lent: loan.settings.clone(),
        }
    }

    /// The control plane cannot be asked: with what was lent `last`, if anything was.
    pub fn resuming(
        url: &StoreUrl,
        settings: &StoreSettings,
        last: &StoreSettings,
        lender: Arc<Renewal>,
    ) -> Self {
        if last.is_empty() {
            return Self::new(url, settings, None, lender);
        }
        let last = Loan {
            settings: last.clone(),
            expires_in: None,
        };
        let keys = lent(&last).filter(|_| matches!(url.kind(), StoreKind::S3 { .. }));
        Self {
            settings: replaced(settings, &last),
            borrowed: keys.map(|lent| Borrowed::resuming_with(url.to_string(), lent.keys, lender)),
            lent: last.settings,
        }
    }

    pub fn open(&self, url: &StoreUrl, deadlines: &Deadlines) -> Result<Store, CatalogError> {
        let credentials = self
            .borrowed
            .as_ref()
            .map(|borrowed| Arc::new(Arc::clone(borrowed)) as Arc<dyn Credentials>);
        store_with(url, &self.settings, credentials, deadlines)
    }
}

/// In a store that is only named, not used: whoever asks for its keys is told so.
pub(super) struct NoKeys;

#[async_trait]
impl Credentials for NoKeys {
    async fn current(&self) -> Result<Arc<Keys>, OriginError> {
        Err(OriginError::Credentials {
            store: "the control plane's store".to_owned(),
            reason: "none were asked for".to_owned(),
            source: None,
        })
    }

    async fn renew(&self, _: &str) -> Result<Arc<Keys>, OriginError> {
        self.current().await
    }
}
