//! What an agent does for whom.
//!
//! A user's own agent serves that user, with that user's rights, and permits what these permit. An agent
//! that serves many users is nobody's deputy: it asks catalogs and origins from its administrator's list
//! only, lends its own credentials only to these, and never to an endpoint that a caller names.

use std::sync::Arc;

use parking_lot::RwLock;

pub use super::caller::Caller;
use crate::{
    digest::Digest,
    origin::{StoreKind, StoreSettings, StoreUrl},
};

/// What the administrator lets the users of a shared agent do.
#[derive(Clone, Debug, Default)]
pub struct Rules {
    /// Catalogs that may be asked; each is an origin, too.
    pub catalogs: Vec<StoreUrl>,
    /// Where else records may say that bytes lie.
    pub origins: Vec<StoreUrl>,
    /// Object stores' servers that callers may name, `https://minio.example:9000`.
    pub endpoints: Vec<String>,
    /// Whoever is in it sees and unmounts everything.
    pub group: Option<u32>,
    /// This agent's own settings and credentials, for what is listed.
    pub ambient: StoreSettings,
}

#[derive(Debug)]
enum Serves {
    /// The user who runs it, and root.
    Owner(u32),
    Everybody(RwLock<Arc<Rules>>),
}

/// Whom an agent serves.
#[derive(Debug)]
pub struct Access(Serves);

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AccessError {
    #[error(
        "the catalog {url} is not among those that this host's agent may ask (catalogs in /etc/grid-mount/config.toml); ask the administrator, or use an agent of your own with --own-agent"
    )]
    Catalog { url: StoreUrl },
    #[error(
        "its bytes lie in {url}, which is not among the origins that this host's agent may ask (origins in /etc/grid-mount/config.toml); ask the administrator, or use an agent of your own with --own-agent"
    )]
    Origin { url: StoreUrl },
    #[error(
        "the server {endpoint} (from {setting}) is not among those that this host's agent may ask (endpoints in /etc/grid-mount/config.toml)"
    )]
    Endpoint { setting: &'static str, endpoint: String },
    #[error(
        "{setting} cannot travel to this host's agent, which would use it with its own rights: {instead}"
    )]
    Setting { setting: String, instead: &'static str },
    #[error("{setting} is not a {what}")]
    Malformed {
        setting: &'static str,
        what: &'static str,
    },
    #[error(
        "{url} is asked with your credentials, and these are not complete: set {needed}, or none of them to use this host's"
    )]
    Credentials { url: StoreUrl, needed: &'static str },
    #[error("only root and the agent's group may do this")]
    Administrators,
}

/// With what a store is opened for a caller.
#[derive(Clone, Debug)]
pub struct Grant {
    pub settings: StoreSettings,
    /// Who may share cached bytes: whoever has the same rights to them.
    pub domain: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    Catalog,
    Origin,
}

/// Names whose values are only values: no file, no server, no token service.
const HARMLESS: [&str; 19] = [
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_SKIP_SIGNATURE",
    "AWS_VIRTUAL_HOSTED_STYLE_REQUEST",
    "AWS_UNSIGNED_PAYLOAD",
    "AWS_REQUEST_PAYER",
    "AWS_CHECKSUM_ALGORITHM",
    "AWS_S3_EXPRESS",
    "AWS_IMDSV1_FALLBACK",
    "GOOGLE_SERVICE_ACCOUNT_KEY",
    "GOOGLE_SKIP_SIGNATURE",
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_ACCESS_KEY",
    "AZURE_STORAGE_SAS_KEY",
    "AZURE_STORAGE_SAS_TOKEN",
    "AZURE_STORAGE_TOKEN",
    "AZURE_SKIP_SIGNATURE",
    "AWS_CONDITIONAL_PUT",
];
/// Become part of a host name.
const NAMES: [&str; 4] = [
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AZURE_STORAGE_ACCOUNT_NAME",
    "AZURE_STORAGE_ACCOUNT",
];
const ENDPOINTS: [&str; 6] = [
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT",
    "GOOGLE_BASE_URL",
    "AZURE_STORAGE_ENDPOINT",
    "AZURE_ENDPOINT",
];
/// Say where credentials are found; which were read before the request was sent, or cannot be.
const PASSED_OVER: [&str; 6] = [
    "AWS_PROFILE",
    "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_CONFIG_FILE",
    "AWS_EC2_METADATA_DISABLED",
    "AWS_ALLOW_HTTP",
    "AWS_SDK_LOAD_CONFIG",
];

impl Access {
    /// An agent of this process's user.
    pub fn own() -> Self {
        Self(Serves::Owner(nix::unistd::geteuid().as_raw()))
    }

    /// An agent of this host's users.
    pub fn everybody(rules: Rules) -> Self {
        Self(Serves::Everybody(RwLock::new(Arc::new(rules))))
    }

    pub fn serves_everybody(&self) -> bool {
        matches!(self.0, Serves::Everybody(_))
    }

    /// From the next request on; what is mounted stays.
    pub fn replace(&self, rules: Rules) {
        if let Serves::Everybody(now) = &self.0 {
            *now.write() = Arc::new(rules);
        }
    }

    fn rules(&self) -> Option<Arc<Rules>> {
        match &self.0 {
            Serves::Owner(_) => None,
            Serves::Everybody(rules) => Some(Arc::clone(&rules.read())),
        }
    }

    /// Whether it is talked to at all.
    pub fn admits(&self, caller: &Caller) -> bool {
        match &self.0 {
            Serves::Owner(uid) => caller.uid() == *uid || caller.uid() == 0,
            Serves::Everybody(_) => true,
        }
    }

    pub fn is_administrator(&self, caller: &Caller) -> bool {
        caller.uid() == 0
            || match &self.0 {
                Serves::Owner(uid) => caller.uid() == *uid,
                Serves::Everybody(rules) => rules.read().group.is_some_and(|group| caller.is_in(group)),
            }
    }

    pub fn administrators(&self, caller: &Caller) -> Result<(), AccessError> {
        match self.is_administrator(caller) {
            true => Ok(()),
            false => Err(AccessError::Administrators),
        }
    }

    /// Whether a caller sees what belongs to `uid`, and may unmount it.
    pub fn may_see(&self, caller: &Caller, uid: u32) -> bool {
        caller.uid() == uid || self.is_administrator(caller)
    }

    /// With what the store at `url` is opened for a caller who sent `settings`.
    pub fn grant(
        &self,
        caller: &Caller,
        url: &StoreUrl,
        asked: Asked,
        settings: &StoreSettings,
    ) -> Result<Grant, AccessError> {
        match self.rules() {
            None => Ok(Grant {
                settings: settings.clone(),
                domain: format!("uid {}", caller.uid()),
            }),
            Some(rules) => rules.grant(url, asked, settings),
        }
    }
}

impl Rules {
    fn grant(&self, url: &StoreUrl, asked: Asked, settings: &StoreSettings) -> Result<Grant, AccessError> {
        let listed = match asked {
            Asked::Catalog => within(&self.catalogs, url),
            Asked::Origin => within(&self.catalogs, url).or_else(|| within(&self.origins, url)),
        };
        let Some(listed) = listed else {
            let url = url.clone();
            return Err(match asked {
                Asked::Catalog => AccessError::Catalog { url },
                Asked::Origin => AccessError::Origin { url },
            });
        };
        let family = match url.kind() {
            // Who the caller is; no file, whoever may read it.
            StoreKind::Http { .. } => {
                let names = ["GRID_MOUNT_TOKEN", "GRID_USER_ID", "GRID_API_KEY"];
                let theirs = names.iter().filter_map(|name| Some((name, settings.get(name)?)));
                return Ok(Grant {
                    settings: theirs.collect(),
                    domain: format!("listed {listed}"),
                });
            }
            // Knows no credentials of these families.
            StoreKind::File(_) => {
                return Ok(Grant {
                    settings: StoreSettings::default(),
                    domain: format!("listed {listed}"),
                });
            }
            StoreKind::S3 { .. } => "AWS_",
            StoreKind::Gcs { .. } => "GOOGLE_",
            StoreKind::Azure { .. } => "AZURE_",
        };
        let theirs = self.harmless(family, settings)?;
        if !theirs.names().any(is_credential) && !theirs.names().any(|name| ENDPOINTS.contains(&name)) {
            return Ok(Grant {
                settings: self.ambient.clone(),
                domain: format!("listed {listed}"),
            });
        }
        let has = |name: &str| theirs.get(name).is_some();
        let (complete, needed) = match family {
            "AWS_" => (
                (has("AWS_ACCESS_KEY_ID") && has("AWS_SECRET_ACCESS_KEY"))
                    || skips(&theirs, "AWS_SKIP_SIGNATURE"),
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
            ),
            "GOOGLE_" => (
                has("GOOGLE_SERVICE_ACCOUNT_KEY") || skips(&theirs, "GOOGLE_SKIP_SIGNATURE"),
                "GOOGLE_SERVICE_ACCOUNT_KEY",
            ),
            _ => (
                [
                    "AZURE_STORAGE_ACCOUNT_KEY",
                    "AZURE_STORAGE_ACCESS_KEY",
                    "AZURE_STORAGE_SAS_KEY",
                    "AZURE_STORAGE_SAS_TOKEN",
                    "AZURE_STORAGE_TOKEN",
                ]
                .iter()
                .any(|name| has(name))
                    || skips(&theirs, "AZURE_SKIP_SIGNATURE"),
                "AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN",
            ),
        };
        if !complete {
            // The client would go on to ask this machine for its own.
            return Err(AccessError::Credentials {
                url: url.clone(),
                needed,
            });
        }
        let domain = domain_of(&theirs);
        Ok(Grant {
            settings: theirs,
            domain,
        })
    }

    /// What of a caller's settings an agent with more rights can use without lending these.
    fn harmless(&self, family: &str, settings: &StoreSettings) -> Result<StoreSettings, AccessError> {
        let mut theirs = StoreSettings::default();
        for name in settings.names().filter(|name| name.starts_with(family)) {
            let Some(value) = settings.get(name) else { continue };
            if let Some(setting) = ENDPOINTS.iter().find(|known| **known == name) {
                if !self.may_ask(value) {
                    return Err(AccessError::Endpoint {
                        setting,
                        endpoint: value.to_owned(),
                    });
                }
            } else if let Some(setting) = NAMES.iter().find(|known| **known == name) {
                let plain = value
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
                if !plain {
                    return Err(AccessError::Malformed {
                        setting,
                        what: "name of letters, digits and hyphens",
                    });
                }
            } else if PASSED_OVER.contains(&name) {
                continue;
            } else if !HARMLESS.contains(&name) {
                return Err(AccessError::Setting {
                    setting: name.to_owned(),
                    instead: "unset it and set keys or a token, or use an agent of your own with --own-agent",
                });
            }
            theirs.set(name, value);
        }
        Ok(theirs)
    }

    fn may_ask(&self, endpoint: &str) -> bool {
        let plain = |url: &str| url.trim_end_matches('/').to_ascii_lowercase();
        let own = ENDPOINTS.iter().filter_map(|name| self.ambient.get(name));
        self.endpoints
            .iter()
            .map(String::as_str)
            .chain(own)
            .any(|known| plain(known) == plain(endpoint))
    }
}

fn is_credential(name: &str) -> bool {
    HARMLESS.contains(&name)
}

fn skips(settings: &StoreSettings, name: &str) -> bool {
    matches!(settings.get(name), Some("true" | "1" | "yes" | "on"))
}

/// Whoever knows the same secrets has the same rights. Nothing can be told from it.
fn domain_of(settings: &StoreSettings) -> String {
    let mut text = String::new();
    for name in settings.names() {
        text.push_str(name);
        text.push('\0');
        text.push_str(settings.get(name).unwrap_or_default());
        text.push('\0');
    }
    format!("credentials {}", Digest::of(text.as_bytes()))
}

/// The entry of a list that covers `url`: the same store, and the same prefix or one above it.
fn within<'list>(list: &'list [StoreUrl], url: &StoreUrl) -> Option<&'list StoreUrl> {
    list.iter().find(|listed| match (listed.kind(), url.kind()) {
        // Below a directory there may be symbolic links that somebody else made.
        (StoreKind::File(listed), StoreKind::File(asked)) => listed == asked,
        (StoreKind::File(_), _) | (_, StoreKind::File(_)) => false,
        (here, there) => {
            let (above, below) = (listed.prefix(), url.prefix());
            here == there
                && (above.is_empty()
                    || below == above
                    || below
                        .strip_prefix(&above)
                        .is_some_and(|rest| rest.starts_with('/')))
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::as_caller::Identity;

    fn url(text: &str) -> StoreUrl {
        text.parse().unwrap()
    }

    fn settings(pairs: &[(&str, &str)]) -> StoreSettings {
        pairs.iter().copied().collect()
    }

    fn rules() -> Rules {
        Rules {
            catalogs: vec![
                url("s3://team/catalog"),
                url("file:///srv/catalog"),
                url("gs://team"),
            ],
            origins: vec![url("s3://data"), url("https://mirror.example/a")],
            endpoints: vec!["https://minio.example:9000".into()],
            group: None,
            ambient: settings(&[
                ("AWS_ACCESS_KEY_ID", "agent"),
                ("AWS_SECRET_ACCESS_KEY", "agent's secret"),
                ("AWS_ENDPOINT_URL", "http://10.0.0.1:8333"),
            ]),
        }
    }

    #[test]
    fn only_what_is_listed_is_asked() {
        let rules = rules();
        let none = StoreSettings::default();
        for listed in [
            "s3://team/catalog",
            "s3://team/catalog/deep",
            "s3://data",
            "s3://data/x",
            "file:///srv/catalog",
            "https://mirror.example/a/b",
            "gs://team/any",
        ] {
            rules.grant(&url(listed), Asked::Origin, &none).unwrap();
        }
        for other in [
            "file:///etc",
            "file:///",
            "file:///srv",
            "file:///srv/catalog/link",
            "s3://team",
            "s3://team/catalogue",
            "s3://team/other",
            "s3://database",
            "gs://data",
            "http://mirror.example/a",
            "https://mirror.example/ab",
            "https://mirror.example:444/a",
            "http://169.254.169.254/latest/meta-data",
            "az://team",
        ] {
            assert!(
                matches!(
                    rules.grant(&url(other), Asked::Origin, &none),
                    Err(AccessError::Origin { .. })
                ),
                "{other}"
            );
        }
        // An origin is no catalog.
        assert!(matches!(
            rules.grant(&url("s3://data"), Asked::Catalog, &none),
            Err(AccessError::Catalog { .. })
        ));
    }

    #[test]
    fn the_agents_credentials_go_to_no_endpoint_of_a_callers() {
        let rules = rules();
        let asks = |pairs: &[(&str, &str)]| rules.grant(&url("s3://data/x"), Asked::Origin, &settings(pairs));
        let ambient = asks(&[]).unwrap();
        assert_eq!(ambient.settings, rules.ambient);
        // A region alone is no wish for other credentials.
        assert_eq!(
            asks(&[("AWS_REGION", "eu-west-1")]).unwrap().settings,
            rules.ambient
        );
        let own = [
            ("AWS_ACCESS_KEY_ID", "mine"),
            ("AWS_SECRET_ACCESS_KEY", "my secret"),
            ("AWS_ENDPOINT_URL", "https://minio.example:9000/"),
        ];
        let theirs = asks(&own).unwrap();
        assert_eq!(theirs.settings, settings(&own));
        assert_ne!(theirs.domain, ambient.domain);
        assert!(!theirs.domain.contains("mine") && !theirs.domain.contains("secret"));
        assert_eq!(asks(&own).unwrap().domain, theirs.domain);
        // The endpoint of the agent's own settings, named by a caller who has no credentials.
        assert!(matches!(
            asks(&[("AWS_ENDPOINT_URL", "http://10.0.0.1:8333")]),
            Err(AccessError::Credentials { .. })
        ));
        assert!(matches!(
            asks(&[("AWS_ACCESS_KEY_ID", "half")]),
            Err(AccessError::Credentials { .. })
        ));
        assert!(matches!(
            asks(&[("AWS_SKIP_SIGNATURE", "false")]),
            Err(AccessError::Credentials { .. })
        ));
        for endpoint in [
            "http://169.254.169.254",
            "http://127.0.0.1:1",
            "https://minio.example:9000@evil.example",
            "https://minio.example",
        ] {
            let mut named = own;
            named[2].1 = endpoint;
            assert!(
                matches!(asks(&named), Err(AccessError::Endpoint { .. })),
                "{endpoint}"
            );
        }
    }

    #[test]
    fn settings_that_would_lend_rights_are_refused() {
        let rules = rules();
        for (bucket, name, value) in [
            ("s3://data", "AWS_WEB_IDENTITY_TOKEN_FILE", "/etc/shadow"),
            ("s3://data", "AWS_METADATA_ENDPOINT", "http://127.0.0.1"),
            (
                "s3://data",
                "AWS_CONTAINER_CREDENTIALS_FULL_URI",
                "http://169.254.170.2",
            ),
            ("s3://data", "AWS_PROXY_URL", "http://evil.example"),
            ("s3://data", "AWS_REGION", "evil.example/?"),
            ("gs://team", "GOOGLE_APPLICATION_CREDENTIALS", "/root/key.json"),
            ("gs://team", "GOOGLE_SERVICE_ACCOUNT", "/root/key.json"),
            ("gs://team", "GOOGLE_BASE_URL", "http://169.254.169.254"),
        ] {
            let asked = rules.grant(&url(bucket), Asked::Origin, &settings(&[(name, value)]));
            assert!(asked.is_err(), "{name}");
        }
        // Another store's settings are of no concern.
        let other = settings(&[("GOOGLE_APPLICATION_CREDENTIALS", "/x")]);
        let granted = rules.grant(&url("s3://data"), Asked::Origin, &other).unwrap();
        assert_eq!(granted.settings, rules.ambient);
    }

    #[test]
    fn a_users_own_agent_permits_what_the_user_may() {
        let access = Access::own();
        let me = Caller::this_process();
        let wild = settings(&[("AWS_ENDPOINT_URL", "http://127.0.0.1:1")]);
        for any in ["file:///etc", "http://127.0.0.1/x", "s3://any"] {
            let granted = access.grant(&me, &url(any), Asked::Catalog, &wild).unwrap();
            assert_eq!(granted.settings, wild);
        }
        assert!(access.admits(&me) && access.is_administrator(&me));
    }

    #[test]
    fn users_see_their_own_and_administrators_everything() {
        let caller = |uid, gid, groups: &[u32]| {
            Caller::unseen(Identity {
                uid,
                gid,
                groups: groups.to_vec(),
            })
        };
        let access = Access::everybody(Rules {
            group: Some(77),
            ..Rules::default()
        });
        let alice = caller(1001, 1001, &[5]);
        assert!(access.may_see(&alice, 1001) && !access.may_see(&alice, 1002) && !access.may_see(&alice, 0));
        for administrator in [caller(0, 0, &[]), caller(3, 77, &[]), caller(3, 3, &[1, 77])] {
            assert!(access.may_see(&administrator, 1001));
        }
        access.replace(Rules::default());
        assert!(!access.may_see(&caller(3, 77, &[]), 1001));
    }
}
