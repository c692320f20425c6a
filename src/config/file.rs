//! One configuration file: its keys, and the line of each.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use super::{ConfigError, KEYS, shared_agent::SharedAgent};

/// A key this close to a known one was meant to be it.
const NEAR: f64 = 0.7;

pub struct FileSettings {
    pub path: PathBuf,
    /// Key → value as text, line.
    pub values: BTreeMap<String, (String, usize)>,
    /// The table `[agent]`.
    pub shared_agent: Option<(SharedAgent, usize)>,
}

/// A place in a file, for errors.
pub struct At<'file> {
    path: &'file Path,
    line: usize,
}

impl At<'_> {
    pub fn error(&self, message: String) -> ConfigError {
        ConfigError::File {
            path: self.path.to_owned(),
            line: self.line,
            message,
        }
    }
}

impl FileSettings {
    /// `None` where there is no such file.
    pub fn read(path: &Path) -> Result<Option<Self>, ConfigError> {
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
                ) =>
            {
                return Ok(None);
            }
            Err(source) => {
                return Err(ConfigError::Read {
                    path: path.to_owned(),
                    source,
                });
            }
        };
        Self::parse(path, &text).map(Some)
    }

    pub fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let error = |line, message| ConfigError::File {
            path: path.to_owned(),
            line,
            message,
        };
        let line_of = |offset: usize| text[..offset.min(text.len())].matches('\n').count() + 1;
        let table: BTreeMap<toml::Spanned<String>, toml::Spanned<toml::Value>> = toml::from_str(text)
            .map_err(|failure| {
                error(
                    line_of(failure.span().map_or(0, |span| span.start)),
                    failure.message().to_owned(),
                )
            })?;
        let mut values = BTreeMap::new();
        let mut shared_agent = None;
        for (key, value) in table {
            let line = line_of(key.span().start);
            let key = key.into_inner();
            if key == "agent" {
                let toml::Value::Table(table) = value.into_inner() else {
                    return Err(error(line, "agent is a table: write [agent]".into()));
                };
                let at = At { path, line };
                shared_agent = Some((SharedAgent::parse(table, &at)?, line));
                continue;
            }
            if !KEYS.contains(&key.as_str()) {
                return Err(error(line, unknown(&key)));
            }
            let value = match value.into_inner() {
                toml::Value::String(text) => text,
                toml::Value::Integer(number) => number.to_string(),
                other => {
                    return Err(error(
                        line,
                        format!("{key}: a {} cannot be its value", other.type_str()),
                    ));
                }
            };
            values.insert(key, (value, line));
        }
        Ok(Self {
            path: path.to_owned(),
            values,
            shared_agent,
        })
    }
}

fn unknown(key: &str) -> String {
    let nearest = KEYS
        .iter()
        .map(|known| (strsim::jaro_winkler(key, known), *known))
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .filter(|(score, _)| *score >= NEAR);
    match nearest {
        Some((_, known)) => format!("there is no setting {key:?}; did you mean {known}?"),
        None => format!("there is no setting {key:?}; there are {}", KEYS.join(", ")),
    }
}
