//! A control plane over a store catalog: users, teams, tokens, leases, and keys lent for a while.
//!
//! Owns who may do what. Every answer but health and the protocol's description needs a token; what its
//! owner shares no team with does not exist for them, in the same words as what nobody has. Keeps nothing
//! of its own but counters: any number of replicas serve one store, and a change (a token revoked, a team
//! joined) holds for the next request to each of them.

mod audit;
mod directory;
mod lending;
mod limit;
mod routes;
mod sts;
mod tls;

use std::{io, path::PathBuf, sync::Arc, time::Duration};

use tokio::net::TcpListener;

pub use self::{
    audit::Audit,
    directory::{Directory, DirectoryError, Keeper, TOKEN_PREFIX, TokenInfo},
    lending::{Lending, LendingError},
    tls::{TlsError, TlsFiles},
};
use self::{limit::Limits, tls::Listening};
use super::store::StoreCatalog;
use crate::{
    catalog::CatalogError,
    origin::{Deadlines, OriginError, Store, StoreSettings, StoreUrl},
};

#[derive(Clone, Debug)]
pub struct Options {
    /// Requests per second and token, in the long run; ten times as many at once.
    pub rate: u32,
    /// A mount that has not renewed its lease for so long counts as gone.
    pub lease: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            rate: 50,
            lease: Duration::from_secs(300),
        }
    }
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServerError {
    #[error("the control plane cannot use {url} as its catalog")]
    Store {
        url: StoreUrl,
        #[source]
        source: OriginError,
    },
    #[error("a control plane serves a catalog in a store (file://, s3://, gs://, az://), not {url}")]
    NotAStore { url: StoreUrl },
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    #[error(transparent)]
    Lending(#[from] LendingError),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("{path} cannot be opened for the audit log")]
    Audit {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("serving failed")]
    Serve(#[source] io::Error),
}

/// One replica.
pub struct ControlPlane {
    catalog: StoreCatalog<Store>,
    directory: Keeper,
    lending: Lending,
    limits: Limits,
    audit: Audit,
    options: Options,
}

impl ControlPlane {
    pub fn new(
        store: Store,
        directory: Keeper,
        lending: Lending,
        audit: Audit,
        options: Options,
    ) -> Arc<Self> {
        Arc::new(Self {
            catalog: StoreCatalog::new(store),
            directory,
            lending,
            limits: Limits::new(options.rate),
            audit,
            options,
        })
    }

    /// Serves until `stop` resolves; requests under way are finished first.
    pub async fn serve(
        self: Arc<Self>,
        listener: TcpListener,
        tls: Option<TlsFiles>,
        stop: impl Future<Output = ()> + Send + 'static,
    ) -> Result<(), ServerError> {
        let listening = Listening::new(listener, tls)?;
        axum::serve(listening, routes::router(self))
            .with_graceful_shutdown(stop)
            .await
            .map_err(ServerError::Serve)
    }
}

/// The store that a control plane serves; it holds users and teams too, unless they are in a file.
pub fn open_store(url: &StoreUrl, settings: &StoreSettings) -> Result<Store, ServerError> {
    if !matches!(url.scheme(), "file" | "s3" | "gs" | "az") {
        return Err(ServerError::NotAStore { url: url.clone() });
    }
    Store::open(url, settings, &Deadlines::control()).map_err(|source| ServerError::Store {
        url: url.clone(),
        source,
    })
}

/// What became of a request, when the catalog failed.
fn problem_of(error: &CatalogError) -> super::protocol::Problem {
    use super::protocol::{Kind, Problem};
    let detail = crate::causes::in_one_line(error);
    match error {
        CatalogError::NoSuchUser { user, .. } => {
            // Near misses come from everybody's names, which are not the caller's to know.
            Problem::new(Kind::NoSuchUser, format!("{user} has published nothing")).with("user", user)
        }
        CatalogError::NoSuchDatastore { name, did_you_mean } => {
            Problem::new(Kind::NoSuchDatastore, format!("there is no datastore {name}"))
                .with("name", name)
                .with("did_you_mean", did_you_mean)
        }
        CatalogError::NoSuchVersion { reference, existing } => Problem::new(Kind::NoSuchVersion, detail)
            .with("reference", reference)
            .with("existing", &existing.0),
        CatalogError::NoSuchAlias {
            name,
            alias,
            did_you_mean,
        } => Problem::new(Kind::NoSuchAlias, format!("{name} has no alias {alias}"))
            .with("name", name)
            .with("alias", alias)
            .with("did_you_mean", did_you_mean),
        CatalogError::NoVersion { name } => Problem::new(Kind::NotReady, detail).with("name", name),
        CatalogError::Retired { reference, by, at } => Problem::new(Kind::Retired, detail)
            .with("reference", reference)
            .with("by", by)
            .with("at", at),
        CatalogError::InUse { reference, holders } => Problem::new(Kind::InUse, detail)
            .with("reference", reference)
            .with("holders", holders),
        CatalogError::NotInTeam { user, did_you_mean } => Problem::new(
            Kind::NotInTeam,
            format!("you share no team with anybody called {user}"),
        )
        .with("user", user)
        .with("did_you_mean", did_you_mean),
        CatalogError::NotYours { owner, me } => Problem::new(Kind::NotYours, detail)
            .with("owner", owner)
            .with("me", me),
        CatalogError::KeyReused { .. } => Problem::new(Kind::KeyReused, detail),
        CatalogError::MessageTooLong { .. } | CatalogError::BadCursor { .. } => {
            Problem::new(Kind::BadRequest, detail)
        }
        CatalogError::Damaged { .. } => Problem::new(Kind::Damaged, detail),
        CatalogError::Unsettled { .. } | CatalogError::Contended { .. } => {
            Problem::new(Kind::Unavailable, detail)
        }
        CatalogError::Origin { source, .. } if source.is_retryable() => {
            Problem::new(Kind::Unavailable, "the catalog's store does not answer")
        }
        // What the store said may name keys and hosts: that is for the log.
        _ => Problem::new(Kind::Failed, "the control plane failed; its log says why"),
    }
}
