//! Stores behind HTTP: building `object_store` clients from settings, and telling their errors apart.

use std::{error::Error as _, future::Future, str::FromStr, sync::Arc, time::Duration};

use object_store::{
    ClientOptions, ObjectStore, RetryConfig,
    client::{HttpError, HttpErrorKind},
    list::PaginatedListStore,
    path::{Path, PathPart},
};
use parking_lot::Mutex;

use super::{
    Deadlines, OriginError, StoreSettings,
    credentials::{Credentials, Provider},
    http::{CREDENTIAL_HOSTS, Connector, SEEN, Seen, Tally},
    url::{StoreKind, StoreUrl},
};

#[derive(Clone)]
pub(super) struct Remote {
    pub store: Arc<dyn ObjectStore>,
    /// Plain HTTP servers cannot list.
    pub lister: Option<Arc<dyn PaginatedListStore>>,
}

/// The client, and where it really goes (part of cached objects' identity).
pub(super) fn build(
    url: &StoreUrl,
    settings: &StoreSettings,
    deadlines: &Deadlines,
    tally: &Arc<Tally>,
    credentials: Option<Arc<dyn Credentials>>,
) -> Result<(Remote, String), OriginError> {
    let bad_setting = |source: object_store::Error| OriginError::Settings {
        store: url.to_string(),
        source: Some(Box::new(source)),
    };
    let options = || {
        ClientOptions::new()
            // The whole request has no deadline of its own: its parts have (`http::Service`).
            .with_timeout_disabled()
            .with_connect_timeout(deadlines.connect)
            .with_pool_idle_timeout(Duration::from_secs(30))
    };
    let retry = RetryConfig {
        max_retries: deadlines.retries,
        retry_timeout: deadlines.retry_for,
        ..RetryConfig::default()
    };
    let connector = || Connector {
        tally: Arc::clone(tally),
        first_byte: deadlines.first_byte,
        read: deadlines.read,
        credential_hosts: CREDENTIAL_HOSTS,
    };
    macro_rules! configured {
        ($builder:expr, $key:ty, $family:literal, $skip:pat) => {
            settings
                .family($family)
                .fold($builder, |builder, (name, value)| {
                    let name = name.to_ascii_lowercase();
                    match (name.as_str(), <$key>::from_str(&name)) {
                        // The location comes from the URL alone.
                        ($skip, _) | (_, Err(_)) => builder,
                        (_, Ok(key)) => builder.with_config(key, value),
                    }
                })
        };
    }
    match url.kind() {
        StoreKind::S3 { bucket } => {
            let endpoint = settings
                .get("AWS_ENDPOINT_URL_S3")
                .or(settings.get("AWS_ENDPOINT_URL"))
                .or(settings.get("AWS_ENDPOINT"))
                .map(|endpoint| endpoint.trim_end_matches('/').to_owned());
            let has_credentials = [
                "AWS_ACCESS_KEY_ID",
                "AWS_WEB_IDENTITY_TOKEN_FILE",
                "AWS_SKIP_SIGNATURE",
            ]
            .iter()
            .any(|name| settings.get(name).is_some())
                || settings.names().any(|name| name.starts_with("AWS_CONTAINER_"));
            let at_amazon = endpoint
                .as_ref()
                .is_none_or(|endpoint| endpoint.contains(".amazonaws.com"));
            if credentials.is_none()
                && !has_credentials
                && (!at_amazon || settings.get("AWS_EC2_METADATA_DISABLED") == Some("true"))
            {
                // An endpoint that somebody named does not get this machine's own role.
                return Err(OriginError::Credentials {
                    store: url.to_string(),
                    reason: "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE (or AWS_SKIP_SIGNATURE=true \
                             for a public bucket)"
                        .to_owned(),
                    source: None,
                });
            }
            let mut builder = object_store::aws::AmazonS3Builder::new().with_client_options(options());
            builder = configured!(
                builder,
                object_store::aws::AmazonS3ConfigKey,
                "AWS_",
                "aws_bucket" | "aws_bucket_name"
            );
            if endpoint
                .as_ref()
                .is_some_and(|endpoint| endpoint.starts_with("http://"))
            {
                builder = builder.with_allow_http(true);
            }
            if let Some(credentials) = credentials {
                builder = builder.with_credentials(Arc::new(Provider(credentials)));
            }
            let store = builder
                .with_bucket_name(&bucket)
                // One object at a time is deleted here, and not every S3 knows the bulk request.
                .with_disable_bulk_delete(true)
                .with_retry(retry)
                .with_http_connector(connector())
                .build()
                .map_err(bad_setting)?;
            let canonical = format!(
                "{}/{bucket}",
                endpoint.as_deref().unwrap_or("https://s3.amazonaws.com")
            );
            Ok((with_listing(Arc::new(store)), format!("s3+{canonical}")))
        }
        StoreKind::Gcs { bucket } => {
            let builder = object_store::gcp::GoogleCloudStorageBuilder::new().with_client_options(options());
            let builder = configured!(
                builder,
                object_store::gcp::GoogleConfigKey,
                "GOOGLE_",
                "google_bucket" | "google_bucket_name"
            );
            let store = builder
                .with_bucket_name(&bucket)
                .with_retry(retry)
                .with_http_connector(connector())
                .build()
                .map_err(bad_setting)?;
            let base = settings
                .get("GOOGLE_BASE_URL")
                .unwrap_or("https://storage.googleapis.com");
            Ok((with_listing(Arc::new(store)), format!("gs+{base}/{bucket}")))
        }
        StoreKind::Azure { container } => {
            let builder = object_store::azure::MicrosoftAzureBuilder::new().with_client_options(options());
            let mut builder = configured!(
                builder,
                object_store::azure::AzureConfigKey,
                "AZURE_",
                "azure_container_name"
            );
            // The name the Azure command line uses, which the client does not know.
            if let (Some(account), None) = (
                settings.get("AZURE_STORAGE_ACCOUNT"),
                settings.get("AZURE_STORAGE_ACCOUNT_NAME"),
            ) {
                builder = builder.with_account(account);
            }
            let endpoint = settings
                .get("AZURE_STORAGE_ENDPOINT")
                .or(settings.get("AZURE_ENDPOINT"));
            if endpoint.is_some_and(|endpoint| endpoint.starts_with("http://")) {
                builder = builder.with_allow_http(true);
            }
            let store = builder
                .with_container_name(&container)
                .with_retry(retry)
                .with_http_connector(connector())
                .build()
                .map_err(bad_setting)?;
            let account = settings
                .get("AZURE_STORAGE_ACCOUNT_NAME")
                .or(settings.get("AZURE_STORAGE_ACCOUNT"))
                .unwrap_or_default();
            let canonical = format!(
                "az+{}/{account}/{container}",
                endpoint.unwrap_or("https://blob.core.windows.net")
            );
            Ok((with_listing(Arc::new(store)), canonical))
        }
        StoreKind::Http { base } => {
            let store = object_store::http::HttpBuilder::new()
                .with_client_options(options().with_allow_http(true))
                .with_url(&base)
                .with_retry(retry)
                .with_http_connector(connector())
                .build()
                .map_err(bad_setting)?;
            Ok((
                Remote {
                    store: Arc::new(store),
                    lister: None,
                },
                base,
            ))
        }
        StoreKind::File(_) => Err(OriginError::Unsupported {
            store: url.to_string(),
            what: "an HTTP client",
            source: None,
        }),
    }
}

fn with_listing<S: ObjectStore + PaginatedListStore>(store: Arc<S>) -> Remote {
    Remote {
        store: Arc::clone(&store) as _,
        lister: Some(store as _),
    }
}

/// The key as the client takes it, unchanged: empty parts (`a//b`, `dir/`) and every printable character
/// are kept. `.` and `..` as parts and control characters are refused: URLs do not carry them faithfully.
pub(super) fn path(key: &str) -> Result<Path, String> {
    key.split('/').try_fold(Path::default(), |path, part| {
        if path.is_root() && part.is_empty() {
            return Err("it starts with an empty part".to_owned());
        }
        Ok(path.join(PathPart::parse(part).map_err(|error| error.to_string())?))
    })
}

/// Runs one operation of a client and says what was seen of its last request.
pub(super) async fn observed<T>(
    listing: bool,
    operation: impl Future<Output = object_store::Result<T>>,
) -> Result<T, (object_store::Error, Seen)> {
    let seen = Arc::new(Mutex::new(Seen {
        listing,
        ..Seen::default()
    }));
    let result = SEEN.scope(Arc::clone(&seen), operation).await;
    result.map_err(|error| (error, seen.lock().clone()))
}

/// An error of ours on its way through the client, which [`Place::error`] takes out again.
pub(super) fn carried(error: OriginError) -> object_store::Error {
    object_store::Error::Generic {
        store: "S3",
        source: Box::new(error),
    }
}

/// Where an error happened.
pub(super) struct Place<'a> {
    pub store: &'a str,
    pub key: &'a str,
    pub deadlines: &'a Deadlines,
}

impl Place<'_> {
    pub fn error(&self, error: object_store::Error, seen: &Seen) -> OriginError {
        let error = match error {
            object_store::Error::Generic { store, source } => match source.downcast::<OriginError>() {
                Ok(carried) => return *carried,
                Err(source) => object_store::Error::Generic { store, source },
            },
            error => error,
        };
        let (store, key) = (self.store.to_owned(), self.key.to_owned());
        let transport = transport_kind(&error);
        let code = seen.code.as_deref().unwrap_or_default();
        let unsupported = matches!(
            error,
            object_store::Error::NotSupported { .. } | object_store::Error::NotImplemented { .. }
        );
        let source = Some(error.into());
        let credentials = |reason: &str, source| OriginError::Credentials {
            store: store.clone(),
            reason: reason.to_owned(),
            source,
        };
        if unsupported {
            return OriginError::Unsupported {
                store,
                what: "this operation",
                source,
            };
        }
        if seen.for_credentials {
            return credentials(
                "none are set, and none could be had from the instance's metadata or token service; set AWS_…, \
                 GOOGLE_… or AZURE_…",
                source,
            );
        }
        match code {
            "NoSuchBucket" | "ContainerNotFound" => return OriginError::NoBucket { store, source },
            "ExpiredToken" | "ExpiredTokenException" | "TokenRefreshRequired" => {
                return credentials("they have expired; renew them", source);
            }
            "InvalidAccessKeyId"
            | "InvalidToken"
            | "SignatureDoesNotMatch"
            | "AuthorizationHeaderMalformed" => {
                return credentials(
                    "the store does not accept them; check the keys, the token and the region",
                    source,
                );
            }
            "RequestTimeTooSkewed" => {
                return credentials(
                    "this machine's clock differs too much from the store's; set the clock",
                    source,
                );
            }
            "SlowDown" | "ServerBusy" | "ThrottlingException" => {
                return OriginError::Throttled { store, key, source };
            }
            "PreconditionFailed" if seen.status == 412 => {}
            _ => {}
        }
        match seen.status {
            404 => OriginError::NotFound { store, key },
            401 => credentials("the store wants credentials, or other ones", source),
            403 => OriginError::Denied { store, key, source },
            412 => OriginError::Changed {
                store,
                key,
                expected: "what was pinned".to_owned(),
                found: None,
            },
            429 | 503 => OriginError::Throttled { store, key, source },
            408 | 500 | 502 | 504 => OriginError::Transient { store, key, source },
            405 | 501 => OriginError::Unsupported {
                store,
                what: "this operation",
                source,
            },
            _ => match transport {
                Some(HttpErrorKind::Connect) => OriginError::Unreachable { store, source },
                Some(HttpErrorKind::Timeout) => OriginError::Deadline {
                    store,
                    key,
                    after: self.deadlines.first_byte,
                    source,
                },
                Some(_) => OriginError::Transient { store, key, source },
                None => OriginError::Other { store, key, source },
            },
        }
    }
}

fn transport_kind(error: &object_store::Error) -> Option<HttpErrorKind> {
    let mut cause = error.source();
    while let Some(error) = cause {
        if let Some(http) = error.downcast_ref::<HttpError>() {
            return Some(http.kind());
        }
        cause = error.source();
    }
    None
}
