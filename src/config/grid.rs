//! Who a person is to Grid: its variables, and the file its command line writes.

use std::{fmt, fs, io, path::PathBuf};

use serde::Deserialize;

use super::{ConfigError, Explained, Inputs, Source, Sourced};
use crate::origin::{OriginError, StoreKind, StoreUrl};

/// The variable with the control plane's address.
pub(super) const URL: &str = "GRID_URL";

/// Larger, and it is not Grid's.
const MOST: u64 = 64 << 10;

/// Never shown, neither by `Debug`.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiKey(String);

impl ApiKey {
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ApiKey(…)")
    }
}

/// What Grid's own files and variables say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Grid {
    pub user_id: Option<Sourced<String>>,
    pub api_key: Option<Sourced<ApiKey>>,
    /// Of the control plane.
    pub url: Option<Sourced<String>>,
}

/// `~/.grid/credentials.json`
#[derive(Default, Deserialize)]
struct Credentials {
    #[serde(default, rename = "UserID")]
    user_id: String,
    #[serde(default, rename = "APIKey")]
    api_key: String,
}

impl Grid {
    /// Variables first. A key from the file is taken only for the user that the file names.
    ///
    /// # Errors
    /// A file that cannot be read or understood, where it would decide something.
    pub fn load(inputs: &Inputs) -> Result<Self, ConfigError> {
        let variable = |name: &'static str| {
            inputs.variable(name).map(|value| Sourced {
                value: value.to_owned(),
                source: Source::Variable(name),
            })
        };
        let mut grid = Self {
            user_id: variable("GRID_USER_ID"),
            api_key: variable("GRID_API_KEY").map(|key| Sourced {
                value: ApiKey(key.value),
                source: key.source,
            }),
            url: variable(URL),
        };
        if grid.user_id.is_some() && grid.api_key.is_some() {
            return Ok(grid);
        }
        let Some((path, credentials)) = read(inputs)? else {
            return Ok(grid);
        };
        let from_file = || Source::Credentials(path.clone());
        let is_that_user = match &grid.user_id {
            Some(user) => user.value == credentials.user_id,
            None => true,
        };
        if grid.user_id.is_none() && !credentials.user_id.is_empty() {
            grid.user_id = Some(Sourced {
                value: credentials.user_id,
                source: from_file(),
            });
        }
        if grid.api_key.is_none() && is_that_user && !credentials.api_key.is_empty() {
            grid.api_key = Some(Sourced {
                value: ApiKey(credentials.api_key),
                source: from_file(),
            });
        }
        Ok(grid)
    }

    /// What is there of it, for `grid-mount config`.
    pub fn explain(&self) -> Vec<Explained> {
        let line = |key, value: &str, source: &Source| Explained {
            key,
            value: value.to_owned(),
            source: source.to_string(),
        };
        let mut lines = Vec::new();
        if let Some(user) = &self.user_id {
            lines.push(line("grid_user_id", &user.value, &user.source));
        }
        if let Some(key) = &self.api_key {
            lines.push(line("grid_api_key", "(set)", &key.source));
        }
        if let Some(url) = &self.url {
            lines.push(line("grid_url", &without_password(&url.value), &url.source));
        }
        lines
    }
}

/// The control plane is the catalog, where nothing else is named.
pub(super) fn control_plane(text: &str) -> Result<Sourced<StoreUrl>, ConfigError> {
    let wrong = |message: String| ConfigError::Value {
        source_of: Source::Variable(URL),
        message,
    };
    let value: StoreUrl = text
        .parse()
        .map_err(|error: OriginError| wrong(error.to_string()))?;
    match value.kind() {
        StoreKind::Http { .. } => Ok(Sourced {
            value,
            source: Source::Variable(URL),
        }),
        _ => Err(wrong(format!(
            "{value} is no control plane: write https://…, or name a catalog with GRID_MOUNT_CATALOG"
        ))),
    }
}

fn without_password(text: &str) -> String {
    match text.parse::<url::Url>() {
        Ok(mut url) if url.password().is_some() => {
            let _ = url.set_password(None);
            url.to_string()
        }
        _ => text.to_owned(),
    }
}

/// `None` where there is no such file.
fn read(inputs: &Inputs) -> Result<Option<(PathBuf, Credentials)>, ConfigError> {
    let Some(home) = inputs.home() else {
        return Ok(None);
    };
    let path = home.join(".grid/credentials.json");
    let unreadable = |source| ConfigError::Read {
        path: path.clone(),
        source,
    };
    let metadata = match fs::metadata(&path) {
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            return Ok(None);
        }
        metadata => metadata.map_err(unreadable)?,
    };
    if !metadata.is_file() || metadata.len() > MOST {
        return Err(unreadable(io::Error::other("it is no file of Grid's")));
    }
    let text = fs::read(&path).map_err(unreadable)?;
    match serde_json::from_slice(&text) {
        Ok(credentials) => Ok(Some((path, credentials))),
        Err(error) => Err(ConfigError::File {
            line: error.line(),
            // The parser's own words may quote a part of the key.
            message: "this is not Grid's {\"UserID\": …, \"APIKey\": …}; sign in to Grid again".into(),
            path,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Settings;

    fn inputs(file: Option<&str>, environment: &[(&str, &str)]) -> (tempfile::TempDir, Inputs) {
        let home = tempfile::tempdir().unwrap();
        if let Some(text) = file {
            fs::create_dir(home.path().join(".grid")).unwrap();
            fs::write(home.path().join(".grid/credentials.json"), text).unwrap();
        }
        let mut inputs = Inputs {
            host_file: Some("/nowhere/config.toml".into()),
            login: Some("login".into()),
            ..Inputs::default()
        };
        let set = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        inputs.environment = environment.iter().map(set).collect();
        inputs
            .environment
            .insert("HOME".into(), home.path().to_str().unwrap().into());
        (home, inputs)
    }

    const FILE: &str = r#"{"UserID": "filed", "APIKey": "hush-1"}"#;

    fn user(inputs: &Inputs) -> (String, String) {
        let settings = Settings::load(inputs).unwrap();
        (settings.user.value.to_string(), settings.user.source.to_string())
    }

    #[test]
    fn grid_knows_who_somebody_is_better_than_the_login() {
        let (_home, inputs) = inputs(None, &[]);
        assert_eq!(user(&inputs).0, "login");
        let (home, mut inputs) = self::inputs(Some(FILE), &[]);
        let (name, source) = user(&inputs);
        assert_eq!(name, "filed");
        assert_eq!(
            source,
            home.path().join(".grid/credentials.json").display().to_string()
        );
        inputs
            .environment
            .insert("GRID_USER_ID".into(), "variable".into());
        assert_eq!(
            user(&inputs),
            ("variable".into(), "environment GRID_USER_ID".into())
        );
        inputs.environment.insert("GRID_MOUNT_USER".into(), "ours".into());
        assert_eq!(user(&inputs).0, "ours");
    }

    #[test]
    fn keys_are_never_shown_and_never_mixed() {
        let (_home, inputs) = inputs(Some(FILE), &[("GRID_URL", "https://u:hush-2@grid.example/")]);
        let grid = Grid::load(&inputs).unwrap();
        assert_eq!(
            grid.api_key.as_ref().map(|key| key.value.expose()),
            Some("hush-1")
        );
        let shown = format!("{grid:?} {:?}", grid.explain());
        assert!(!shown.contains("hush-1"), "{shown}");
        let explained = grid.explain();
        let explained: Vec<_> = explained
            .iter()
            .map(|line| (line.key, line.value.as_str()))
            .collect();
        assert_eq!(
            explained,
            [
                ("grid_user_id", "filed"),
                ("grid_api_key", "(set)"),
                ("grid_url", "https://u@grid.example/")
            ]
        );
        // Somebody else's key is not this user's.
        let (_home, inputs) = self::inputs(Some(FILE), &[("GRID_USER_ID", "other")]);
        assert_eq!(Grid::load(&inputs).unwrap().api_key, None);
    }

    #[test]
    fn a_damaged_file_is_told_of_and_not_quoted() {
        let (_home, inputs) = inputs(Some("{\"UserID\": \"a\",\n\"APIKey\": hush-3}"), &[]);
        let error = Settings::load(&inputs).unwrap_err().to_string();
        assert!(
            error.contains("credentials.json:2") && !error.contains("hush"),
            "{error}"
        );
        // Where it decides nothing, it is nobody's concern.
        let (_home, inputs) = self::inputs(
            Some("nonsense"),
            &[("GRID_USER_ID", "a"), ("GRID_API_KEY", "hush-4")],
        );
        assert_eq!(user(&inputs).0, "a");
    }
}
