//! The `[agent]` table of the host's file: what its administrator lets users ask of an agent they share.

use super::{ConfigError, file::At};
use crate::origin::{OriginError, StoreUrl};

/// The table's keys.
const KEYS: [&str; 4] = ["catalogs", "origins", "endpoints", "group"];

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SharedAgent {
    /// Catalogs that may be asked; each is an origin, too.
    pub catalogs: Vec<StoreUrl>,
    /// Where else bytes may lie.
    pub origins: Vec<StoreUrl>,
    /// Object stores' servers that callers may name with credentials of their own.
    pub endpoints: Vec<String>,
    /// The group whose members see and unmount everything.
    pub group: Option<String>,
}

impl SharedAgent {
    pub(super) fn parse(table: toml::Table, at: &At<'_>) -> Result<Self, ConfigError> {
        let mut shared = Self::default();
        for (key, value) in table {
            match key.as_str() {
                "catalogs" => shared.catalogs = urls(&key, value, at)?,
                "origins" => shared.origins = urls(&key, value, at)?,
                "endpoints" => shared.endpoints = endpoints(&key, value, at)?,
                "group" => match value {
                    toml::Value::String(group) => shared.group = Some(group),
                    _ => return Err(at.error("agent.group: write a group's name".into())),
                },
                _ => {
                    let known = KEYS.join(", ");
                    return Err(at.error(format!("there is no setting agent.{key}; there are {known}")));
                }
            }
        }
        Ok(shared)
    }
}

fn texts(key: &str, value: toml::Value, at: &At<'_>) -> Result<Vec<String>, ConfigError> {
    let wrong = || at.error(format!("agent.{key}: write a list of texts: [\"…\", \"…\"]"));
    let toml::Value::Array(values) = value else {
        return Err(wrong());
    };
    values
        .into_iter()
        .map(|value| match value {
            toml::Value::String(text) => Ok(text),
            _ => Err(wrong()),
        })
        .collect()
}

fn urls(key: &str, value: toml::Value, at: &At<'_>) -> Result<Vec<StoreUrl>, ConfigError> {
    texts(key, value, at)?
        .iter()
        .map(|text| {
            text.parse()
                .map_err(|error: OriginError| at.error(format!("agent.{key}: {error}")))
        })
        .collect()
}

/// `https://host[:port]`
fn endpoints(key: &str, value: toml::Value, at: &At<'_>) -> Result<Vec<String>, ConfigError> {
    let texts = texts(key, value, at)?;
    for text in &texts {
        let server = url::Url::parse(text).is_ok_and(|url| {
            matches!(url.scheme(), "http" | "https") && url.username().is_empty() && url.query().is_none()
        });
        if !server {
            return Err(at.error(format!(
                "agent.{key}: {text:?} is not a server: write https://host:port"
            )));
        }
    }
    Ok(texts)
}
