//! The settings of the object-store ecosystems, collected at the edge.
//!
//! Owns their names, and reading them from the environment and the AWS profile files. Never prints a value.

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::OriginError;

/// `AWS_ENDPOINT_URL`, `GOOGLE_APPLICATION_CREDENTIALS`, `AZURE_STORAGE_ACCOUNT_NAME`, …: only names of
/// these three families are kept, and who the caller is for a control plane (`GRID_MOUNT_TOKEN`, …). They travel from the caller to the agent, so they serialize; `Debug`
/// never shows a value.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct StoreSettings(BTreeMap<String, String>);

const FAMILIES: [&str; 3] = ["AWS_", "GOOGLE_", "AZURE_"];
/// Before the names of settings that a control plane lent.
const LENT: &str = "LENT_";
/// Who the caller is for a control plane, and which certificates are believed.
const NAMES: [&str; 6] = [
    "GRID_MOUNT_TOKEN",
    "GRID_MOUNT_TOKEN_FILE",
    "GRID_USER_ID",
    "GRID_API_KEY",
    "SSL_CERT_FILE",
    "REQUESTS_CA_BUNDLE",
];

impl StoreSettings {
    /// The settings of this process' environment, with the AWS profile it names (or `default`) filled in
    /// from `~/.aws`. Read here, at the edge, as the caller: an agent must not read files for somebody else.
    pub fn from_env() -> Result<Self, OriginError> {
        let settings: Self = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .collect();
        settings
            .with_token()
            .with_profile(std::env::var_os("HOME").map(PathBuf::from).as_deref())
    }

    /// The token itself beside its file, which an agent of many users does not open. One that cannot be read is
    /// an error only where somebody asks for it.
    fn with_token(mut self) -> Self {
        let file = self.get("GRID_MOUNT_TOKEN_FILE").map(PathBuf::from);
        let short =
            |path: &PathBuf| std::fs::metadata(path).is_ok_and(|file| file.is_file() && file.len() < 4096);
        if let Some(path) = file.filter(short)
            && let Ok(text) = std::fs::read_to_string(path)
        {
            self.set("GRID_MOUNT_TOKEN", text.trim());
        }
        self
    }

    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    pub fn set(&mut self, name: &str, value: &str) {
        let name = name.to_ascii_uppercase();
        let known = FAMILIES.iter().any(|family| name.starts_with(family)) || NAMES.contains(&name.as_str());
        if !value.is_empty() && known {
            self.0.insert(name, value.to_owned());
        }
    }

    /// Takes over everything that is set in `others`.
    pub fn extend(&mut self, others: &Self) {
        for (name, value) in &others.0 {
            self.0.insert(name.clone(), value.clone());
        }
    }

    /// Without what belongs to `family` (`AWS_`).
    #[must_use]
    pub fn without(&self, family: &str) -> Self {
        let kept = self.0.iter().filter(|(name, _)| !name.starts_with(family));
        Self(kept.map(|(name, value)| (name.clone(), value.clone())).collect())
    }

    /// Keeps `lent` beside the settings, where no store looks for it.
    #[must_use]
    pub fn with_lent(&self, lent: &Self) -> Self {
        let mut all = self.clone();
        let lent = lent.0.iter().filter(|(name, _)| !name.starts_with(LENT));
        all.0
            .extend(lent.map(|(name, value)| (format!("{LENT}{name}"), value.clone())));
        all
    }

    /// What was kept so.
    #[must_use]
    pub fn lent(&self) -> Self {
        let kept = self.0.iter();
        Self(
            kept.filter_map(|(name, value)| Some((name.strip_prefix(LENT)?.to_owned(), value.clone())))
                .collect(),
        )
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The names that are set: fit for printing, values are not.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    pub(super) fn family<'s>(&'s self, prefix: &'s str) -> impl Iterator<Item = (&'s str, &'s str)> {
        self.0
            .iter()
            .filter(move |(name, _)| name.starts_with(prefix))
            .map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// Fills in what the profile says and the settings do not. Explicit keys win over a profile, unless the
    /// profile was named explicitly and the keys were not: then there is nothing to win over.
    pub fn with_profile(mut self, home: Option<&Path>) -> Result<Self, OriginError> {
        let explicit = self.get("AWS_PROFILE").map(str::to_owned);
        let profile = explicit.clone().unwrap_or_else(|| "default".to_owned());
        let file = |setting: &str, name: &str| {
            self.get(setting)
                .map(PathBuf::from)
                .or_else(|| Some(home?.join(".aws").join(name)))
        };
        let mut found = BTreeMap::new();
        let mut seen = false;
        let headings = [profile.clone(), format!("profile {profile}")];
        for path in [
            file("AWS_SHARED_CREDENTIALS_FILE", "credentials"),
            file("AWS_CONFIG_FILE", "config"),
        ]
        .into_iter()
        .flatten()
        {
            // An unreadable file is as good as none, unless the profile turns out to be needed.
            let Ok(text) = std::fs::read_to_string(&path) else {
                continue;
            };
            if let Some(section) = section(&text, &headings) {
                seen = true;
                for (name, value) in section {
                    found.entry(name).or_insert(value);
                }
            }
        }
        if let (Some(profile), false) = (&explicit, seen) {
            return Err(OriginError::Credentials {
                store: "AWS".to_owned(),
                reason: format!("there is no profile {profile:?} in ~/.aws/credentials or ~/.aws/config"),
                source: None,
            });
        }
        let has_keys = self.0.contains_key("AWS_ACCESS_KEY_ID");
        if explicit.is_some() && !has_keys && !found.contains_key("aws_access_key_id") {
            for unsupported in [
                "credential_process",
                "sso_session",
                "sso_start_url",
                "source_profile",
            ] {
                if found.contains_key(unsupported) {
                    return Err(OriginError::Credentials {
                        store: "AWS".to_owned(),
                        reason: format!(
                            "profile {profile:?} uses {unsupported}, which is not read here; run `eval \"$(aws configure \
                             export-credentials --profile {profile} --format env)\"` first"
                        ),
                        source: None,
                    });
                }
            }
        }
        for (name, setting) in [
            ("aws_access_key_id", "AWS_ACCESS_KEY_ID"),
            ("aws_secret_access_key", "AWS_SECRET_ACCESS_KEY"),
            ("aws_session_token", "AWS_SESSION_TOKEN"),
            ("region", "AWS_REGION"),
            ("endpoint_url", "AWS_ENDPOINT_URL"),
            ("role_arn", "AWS_ROLE_ARN"),
            ("web_identity_token_file", "AWS_WEB_IDENTITY_TOKEN_FILE"),
        ] {
            // A key id from one place never meets a secret or a token from another.
            let credential = name.starts_with("aws_");
            if (credential && has_keys) || self.0.contains_key(setting) {
                continue;
            }
            if name == "region" && self.0.contains_key("AWS_DEFAULT_REGION") {
                continue;
            }
            if let Some(value) = found.get(name) {
                self.0.insert(setting.to_owned(), value.clone());
            }
        }
        Ok(self)
    }
}

/// The `name = value` lines of the first of `headings` that the file has. Indented lines belong to nested
/// values (`s3 =`), which are not read.
fn section(text: &str, headings: &[String]) -> Option<BTreeMap<String, String>> {
    let mut found: Option<BTreeMap<String, String>> = None;
    let mut inside = false;
    for line in text.lines() {
        let line = line.trim_end();
        if line.starts_with([' ', '\t', '#', ';']) || line.is_empty() {
            continue;
        }
        if let Some(heading) = line.strip_prefix('[').and_then(|l| l.split(']').next()) {
            let heading = heading.split_whitespace().collect::<Vec<_>>().join(" ");
            inside = headings.contains(&heading);
            if inside {
                found.get_or_insert_default();
            }
        } else if let (true, Some((name, value)), Some(found)) =
            (inside, line.split_once('='), found.as_mut())
        {
            found.insert(name.trim().to_ascii_lowercase(), value.trim().to_owned());
        }
    }
    found
}

impl<N: AsRef<str>, V: AsRef<str>> FromIterator<(N, V)> for StoreSettings {
    fn from_iter<I: IntoIterator<Item = (N, V)>>(settings: I) -> Self {
        let mut collected = Self::default();
        for (name, value) in settings {
            collected.set(name.as_ref(), value.as_ref());
        }
        collected
    }
}

impl fmt::Debug for StoreSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map()
            .entries(self.0.keys().map(|name| (name, "…")))
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_only_the_three_families_and_never_shows_a_value() {
        let settings: StoreSettings = [
            ("AWS_SECRET_ACCESS_KEY", "hunter2"),
            ("PATH", "/bin"),
            ("aws_region", "eu-west-1"),
            ("AZURE_X", ""),
        ]
        .into_iter()
        .collect();
        assert_eq!(
            settings.names().collect::<Vec<_>>(),
            ["AWS_REGION", "AWS_SECRET_ACCESS_KEY"]
        );
        assert!(!format!("{settings:?}").contains("hunter2"));
    }

    #[test]
    fn a_profile_fills_gaps_and_never_mixes_keys() {
        let home = tempfile::tempdir().unwrap();
        std::fs::create_dir(home.path().join(".aws")).unwrap();
        std::fs::write(
            home.path().join(".aws/credentials"),
            "[default]\naws_access_key_id = D\naws_secret_access_key=DS\n[team]\naws_access_key_id=T\naws_secret_access_key = TS\n",
        )
        .unwrap();
        std::fs::write(
            home.path().join(".aws/config"),
            "[profile team]\nregion = eu-central-1\nendpoint_url = http://127.0.0.1:1\ns3 =\n  endpoint_url = nested\n[profile sso]\nsso_session = x\n",
        )
        .unwrap();
        let with = |settings: &[(&str, &str)]| {
            settings
                .iter()
                .copied()
                .collect::<StoreSettings>()
                .with_profile(Some(home.path()))
        };
        let team = with(&[("AWS_PROFILE", "team")]).unwrap();
        assert_eq!(team.get("AWS_ACCESS_KEY_ID"), Some("T"));
        assert_eq!(team.get("AWS_REGION"), Some("eu-central-1"));
        assert_eq!(team.get("AWS_ENDPOINT_URL"), Some("http://127.0.0.1:1"));
        assert_eq!(with(&[]).unwrap().get("AWS_SECRET_ACCESS_KEY"), Some("DS"));
        let own = with(&[("AWS_ACCESS_KEY_ID", "own"), ("AWS_PROFILE", "team")]).unwrap();
        assert_eq!(
            (own.get("AWS_ACCESS_KEY_ID"), own.get("AWS_SECRET_ACCESS_KEY")),
            (Some("own"), None)
        );
        assert!(
            with(&[("AWS_PROFILE", "nobody")])
                .unwrap_err()
                .to_string()
                .contains("nobody")
        );
        assert!(
            with(&[("AWS_PROFILE", "sso")])
                .unwrap_err()
                .to_string()
                .contains("export-credentials")
        );
    }
}
