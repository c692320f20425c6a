//! Settings: flags over environment over the user's file over the host's file over defaults.
//!
//! Owns the layers, the parsing of every value, and where each value came from. Must not know `clap`, nor
//! read the process's environment: both come in as plain values, so that all of it is a pure function.

mod file;
mod grid;
mod shared_agent;

use std::{
    collections::BTreeMap,
    fmt, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use serde::Serialize;

use self::file::FileSettings;
pub use self::grid::{ApiKey, Grid};
pub use self::shared_agent::SharedAgent;
use crate::{
    bytesize::{ByteSize, ByteSizeError},
    origin::{OriginError, StoreUrl},
    prefetch_policy::PrefetchPolicy,
    reference::UserName,
};

pub const HOST_FILE: &str = "/etc/grid-mount/config.toml";

/// The memory limit by default, where `allowed` bytes are what this process may have: a sixteenth of that, since
/// who has fast connections has memory, and what they carry in a round trip must fit. From 512 MiB, or a
/// quarter where there is less than 2 GiB, to 2 GiB. The rest is for the page cache and whoever else is there.
pub fn default_memory_limit(allowed: Option<u64>) -> u64 {
    const USUAL: u64 = 512 << 20;
    allowed.map_or(USUAL, |bytes| {
        (bytes / 16).clamp(USUAL, 2 << 30).min(bytes / 4).max(32 << 20)
    })
}

/// Every setting, as named in files. `GRID_MOUNT_` and the upper-case name is the environment's name,
/// `--` and the name with hyphens the flag's.
pub const KEYS: [&str; 14] = [
    "catalog",
    "user",
    "cache_dir",
    "cache_size",
    "cache_min_free",
    "cache_verify",
    "memory_limit",
    "connections",
    "read_deadline",
    "prefetch",
    "idle_timeout",
    "log_format",
    "log_level",
    "metrics_listen",
];

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    #[error("{path} cannot be read")]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{path}:{line}: {message}")]
    File {
        path: PathBuf,
        line: usize,
        message: String,
    },
    #[error("{source_of}: {message}")]
    Value { source_of: Source, message: String },
    #[error("there is no home directory to keep things in: set HOME, or name --catalog and --cache-dir")]
    NoHome,
    #[error("nobody knows who you are: set GRID_MOUNT_USER")]
    NoUser,
}

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    Flag(&'static str),
    Environment(&'static str),
    File {
        path: PathBuf,
        line: usize,
    },
    /// A variable that is not ours.
    Variable(&'static str),
    /// The file with somebody's credentials that Grid's command line writes.
    Credentials(PathBuf),
    Default,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag(key) => write!(f, "flag --{}", key.replace('_', "-")),
            Self::Environment(key) => write!(f, "environment {}", environment_name(key)),
            Self::File { path, line } => write!(f, "{}:{line}", path.display()),
            Self::Variable(name) => write!(f, "environment {name}"),
            Self::Credentials(path) => path.display().fmt(f),
            Self::Default => f.write_str("default"),
        }
    }
}

/// A value and where it came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sourced<T> {
    pub value: T,
    pub source: Source,
}

/// A share of a disk, or a number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskShare {
    Bytes(ByteSize),
    Percent(u8),
}

impl DiskShare {
    /// In bytes, of a disk of `total` bytes.
    pub fn of(self, total: u64) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.0,
            // No overflow: a hundredth first loses less than 100 bytes.
            Self::Percent(percent) => total / 100 * u64::from(percent),
        }
    }
}

impl FromStr for DiskShare {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.trim().strip_suffix('%') {
            Some(percent) => match percent.trim().parse::<u8>() {
                Ok(percent) if percent <= 100 => Ok(Self::Percent(percent)),
                _ => Err(format!(
                    "{text:?} is not a share of a disk: write 0% to 100%, or 10GiB"
                )),
            },
            None => text
                .parse()
                .map(Self::Bytes)
                .map_err(|error: ByteSizeError| format!("{error}, or a share of the disk: 20%")),
        }
    }
}

impl fmt::Display for DiskShare {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bytes(bytes) => bytes.fmt(f),
            Self::Percent(percent) => write!(f, "{percent}%"),
        }
    }
}

/// Where metrics can be had besides the control socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetricsListen {
    Nowhere,
    At(SocketAddr),
}

impl FromStr for MetricsListen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.trim() {
            "none" => Ok(Self::Nowhere),
            address => address.parse().map(Self::At).map_err(|_| {
                format!("{text:?} is not an address: write 127.0.0.1:9464, [::1]:9464, or none")
            }),
        }
    }
}

impl fmt::Display for MetricsListen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nowhere => f.write_str("none"),
            Self::At(address) => address.fmt(f),
        }
    }
}

/// The settings in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Where records are.
    pub catalog: Sourced<StoreUrl>,
    /// Who I am.
    pub user: Sourced<UserName>,
    pub cache_dir: Sourced<PathBuf>,
    pub cache_size: Sourced<DiskShare>,
    pub cache_min_free: Sourced<DiskShare>,
    pub cache_verify: Sourced<CacheVerify>,
    /// Bytes in flight from origins.
    pub memory_limit: Sourced<ByteSize>,
    /// Per origin.
    pub connections: Sourced<u16>,
    /// No reader waits longer.
    pub read_deadline: Sourced<Duration>,
    /// What a mount fetches on its own account.
    pub prefetch: Sourced<PrefetchPolicy>,
    /// A mount that nobody used for so long goes.
    pub idle_timeout: Sourced<IdleTimeout>,
    pub log_format: Sourced<LogFormat>,
    pub log_level: Sourced<LogLevel>,
    pub metrics_listen: Sourced<MetricsListen>,
    /// From the host's file alone.
    pub shared_agent: SharedAgent,
}

/// Which cached blocks are compared with their checksums before use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheVerify {
    /// Those that a power cut may have torn.
    EarlierBoot,
    /// All, on first use in each run of an agent.
    Always,
}

impl FromStr for CacheVerify {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.trim() {
            "earlier-boot" => Ok(Self::EarlierBoot),
            "always" => Ok(Self::Always),
            _ => Err(format!(
                "{text:?} does not say what of the cache to verify: write earlier-boot, always"
            )),
        }
    }
}

impl fmt::Display for CacheVerify {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::EarlierBoot => "earlier-boot",
            Self::Always => "always",
        })
    }
}

/// How long a mount may go unused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdleTimeout(pub Option<Duration>);

impl FromStr for IdleTimeout {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let text = text.trim();
        if text == "never" {
            return Ok(Self(None));
        }
        let digits = text.trim_end_matches(|unit: char| unit.is_ascii_alphabetic());
        let unit = match &text[digits.len()..] {
            "" | "s" => 1,
            "m" => 60,
            "h" => 3600,
            "d" => 86_400,
            _ => 0,
        };
        match digits
            .parse::<u64>()
            .ok()
            .and_then(|number| number.checked_mul(unit))
        {
            Some(seconds @ 1..=31_536_000) => Ok(Self(Some(Duration::from_secs(seconds)))),
            _ => Err(format!("{text:?} is not a time: write 90s, 10m, 2h, 1d or never")),
        }
    }
}

impl fmt::Display for IdleTimeout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            None => f.write_str("never"),
            Some(time) => write!(f, "{}s", time.as_secs()),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    Text,
    /// One object a line.
    Json,
}

impl FromStr for LogFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.trim() {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            other => Err(format!("{other:?} is not a form of the log: write text or json")),
        }
    }
}

impl fmt::Display for LogFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Text => "text",
            Self::Json => "json",
        })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogLevel {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

impl LogLevel {
    const ALL: [(Self, &str); 5] = [
        (Self::Error, "error"),
        (Self::Warn, "warn"),
        (Self::Info, "info"),
        (Self::Debug, "debug"),
        (Self::Trace, "trace"),
    ];
}

impl FromStr for LogLevel {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let found = Self::ALL.iter().find(|(_, name)| *name == text.trim());
        found
            .map(|(level, _)| *level)
            .ok_or_else(|| format!("{text:?} is not a level: write error, warn, info, debug or trace"))
    }
}

impl fmt::Display for LogLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Self::ALL.iter().find(|(level, _)| level == self);
        f.write_str(name.map_or("info", |(_, name)| name))
    }
}

/// One line of `grid-mount config`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Explained {
    pub key: &'static str,
    pub value: String,
    pub source: String,
}

/// What the settings are made from.
#[derive(Clone, Debug, Default)]
pub struct Inputs {
    /// By key, as typed.
    pub flags: BTreeMap<&'static str, String>,
    pub environment: BTreeMap<String, String>,
    /// `None`: [`HOST_FILE`].
    pub host_file: Option<PathBuf>,
    /// The login name, if there is one.
    pub login: Option<String>,
    pub is_root: bool,
    /// Bytes of memory that this process may have, if known: the machine's, or what control groups let it.
    pub memory_allowed: Option<u64>,
}

impl Inputs {
    fn variable(&self, name: &str) -> Option<&str> {
        self.environment
            .get(name)
            .map(String::as_str)
            .filter(|value| !value.is_empty())
    }

    fn home(&self) -> Option<&Path> {
        self.variable("HOME")
            .map(Path::new)
            .filter(|home| home.is_absolute())
    }

    /// A directory of the XDG specification, or its place below the home directory.
    fn xdg(&self, variable: &str, below_home: &str) -> Option<PathBuf> {
        match self
            .variable(variable)
            .map(PathBuf::from)
            .filter(|dir| dir.is_absolute())
        {
            Some(dir) => Some(dir),
            None => Some(self.home()?.join(below_home)),
        }
    }

    /// `~/.config/grid-mount/config.toml`
    pub fn user_file(&self) -> Option<PathBuf> {
        Some(
            self.xdg("XDG_CONFIG_HOME", ".config")?
                .join("grid-mount/config.toml"),
        )
    }
}

fn environment_name(key: &str) -> String {
    format!("GRID_MOUNT_{}", key.to_ascii_uppercase())
}

/// The layers, strongest first.
struct Layers<'inputs> {
    inputs: &'inputs Inputs,
    files: Vec<FileSettings>,
}

impl Layers<'_> {
    fn raw(&self, key: &'static str) -> Option<(String, Source)> {
        if let Some(value) = self.inputs.flags.get(key) {
            return Some((value.clone(), Source::Flag(key)));
        }
        if let Some(value) = self.inputs.variable(&environment_name(key)) {
            return Some((value.to_owned(), Source::Environment(key)));
        }
        self.files.iter().find_map(|file| {
            let (value, line) = file.values.get(key)?;
            Some((
                value.clone(),
                Source::File {
                    path: file.path.clone(),
                    line: *line,
                },
            ))
        })
    }

    fn get<T, E: fmt::Display>(
        &self,
        key: &'static str,
        parse: impl FnOnce(&str) -> Result<T, E>,
        default: impl FnOnce() -> Result<T, ConfigError>,
    ) -> Result<Sourced<T>, ConfigError> {
        match self.raw(key) {
            None => Ok(Sourced {
                value: default()?,
                source: Source::Default,
            }),
            Some((text, source)) => match parse(&text) {
                Ok(value) => Ok(Sourced { value, source }),
                Err(error) => {
                    let message = match &source {
                        Source::File { .. } => format!("{key}: {error}"),
                        _ => error.to_string(),
                    };
                    Err(match source {
                        Source::File { path, line } => ConfigError::File { path, line, message },
                        source_of => ConfigError::Value { source_of, message },
                    })
                }
            },
        }
    }
}

impl Settings {
    /// # Errors
    /// An unreadable file, an unknown key, a value that does not parse: with file and line, or the name of
    /// the flag or variable.
    pub fn load(inputs: &Inputs) -> Result<Self, ConfigError> {
        let host_file = inputs
            .host_file
            .clone()
            .unwrap_or_else(|| PathBuf::from(HOST_FILE));
        let mut files = Vec::new();
        let mut shared_agent = SharedAgent::default();
        for path in inputs.user_file().into_iter().chain([host_file.clone()]) {
            let Some(mut file) = FileSettings::read(&path)? else {
                continue;
            };
            match file.shared_agent.take() {
                Some((table, _)) if path == host_file => shared_agent = table,
                Some((_, line)) => {
                    let message = format!("[agent] belongs into the host's file, {HOST_FILE}");
                    return Err(ConfigError::File { path, line, message });
                }
                None => {}
            }
            files.push(file);
        }
        let layers = Layers { inputs, files };
        let home = |found: Option<PathBuf>| found.ok_or(ConfigError::NoHome);
        Ok(Self {
            catalog: match (layers.raw("catalog"), inputs.variable(grid::URL)) {
                (None, Some(url)) => grid::control_plane(url)?,
                _ => layers.get("catalog", str::parse, || embedded_catalog(inputs))?,
            },
            user: match layers.raw("user") {
                Some(_) => layers.get("user", str::parse, || Err(ConfigError::NoUser))?,
                None => user_by_default(inputs)?,
            },
            cache_dir: layers.get("cache_dir", absolute, || {
                if inputs.is_root {
                    return Ok(PathBuf::from("/var/cache/grid-mount"));
                }
                Ok(home(inputs.xdg("XDG_CACHE_HOME", ".cache"))?.join("grid-mount"))
            })?,
            // Much of a session host's disk is there for this; a laptop keeps most of its own.
            cache_size: layers.get("cache_size", str::parse, || Ok(DiskShare::Percent(20)))?,
            cache_min_free: layers.get("cache_min_free", str::parse, || Ok(DiskShare::Percent(5)))?,
            cache_verify: layers.get("cache_verify", str::parse, || Ok(CacheVerify::EarlierBoot))?,
            memory_limit: layers.get("memory_limit", str::parse, || {
                Ok(ByteSize(default_memory_limit(inputs.memory_allowed)))
            })?,
            connections: layers.get("connections", connections, || Ok(64))?,
            read_deadline: layers.get("read_deadline", seconds, || Ok(Duration::from_secs(60)))?,
            prefetch: layers.get("prefetch", str::parse, || Ok(PrefetchPolicy::Auto))?,
            idle_timeout: layers.get("idle_timeout", str::parse, || Ok(IdleTimeout(None)))?,
            log_format: layers.get("log_format", str::parse, || Ok(LogFormat::Text))?,
            log_level: layers.get("log_level", str::parse, || Ok(LogLevel::Info))?,
            metrics_listen: layers.get("metrics_listen", str::parse, || Ok(MetricsListen::Nowhere))?,
            shared_agent,
        })
    }

    /// Every setting with its value and source, in the order of [`KEYS`].
    pub fn explain(&self) -> Vec<Explained> {
        fn line<T: fmt::Display>(key: &'static str, sourced: &Sourced<T>) -> Explained {
            Explained {
                key,
                value: sourced.value.to_string(),
                source: sourced.source.to_string(),
            }
        }
        let cache_dir = Sourced {
            value: self.cache_dir.value.display(),
            source: self.cache_dir.source.clone(),
        };
        let read_deadline = Sourced {
            value: format!("{}s", self.read_deadline.value.as_secs()),
            source: self.read_deadline.source.clone(),
        };
        vec![
            line("catalog", &self.catalog),
            line("user", &self.user),
            line("cache_dir", &cache_dir),
            line("cache_size", &self.cache_size),
            line("cache_min_free", &self.cache_min_free),
            line("cache_verify", &self.cache_verify),
            line("memory_limit", &self.memory_limit),
            line("connections", &self.connections),
            line("read_deadline", &read_deadline),
            line("prefetch", &self.prefetch),
            line("idle_timeout", &self.idle_timeout),
            line("log_format", &self.log_format),
            line("log_level", &self.log_level),
            line("metrics_listen", &self.metrics_listen),
        ]
    }
}

/// A directory below the home directory: everything works without any server.
fn embedded_catalog(inputs: &Inputs) -> Result<StoreUrl, ConfigError> {
    let data = inputs.xdg("XDG_DATA_HOME", ".local/share");
    let dir = data.ok_or(ConfigError::NoHome)?.join("grid-mount/catalog");
    let url = url::Url::from_directory_path(&dir).map_err(|()| ConfigError::NoHome)?;
    url.as_str()
        .parse()
        .map_err(|error: OriginError| ConfigError::Value {
            source_of: Source::Default,
            message: error.to_string(),
        })
}

/// Who somebody is to Grid, else to this host.
fn user_by_default(inputs: &Inputs) -> Result<Sourced<UserName>, ConfigError> {
    if let Some(user) = Grid::load(inputs)?.user_id {
        return match user.value.parse() {
            Ok(value) => Ok(Sourced {
                value,
                source: user.source,
            }),
            Err(error) => Err(ConfigError::Value {
                source_of: user.source,
                message: format!("{error}"),
            }),
        };
    }
    let login = inputs.login.as_deref().ok_or(ConfigError::NoUser)?;
    Ok(Sourced {
        value: login.parse().map_err(|_| ConfigError::NoUser)?,
        source: Source::Default,
    })
}

fn absolute(text: &str) -> Result<PathBuf, String> {
    std::path::absolute(text).map_err(|error| format!("{text:?} is not a path: {error}"))
}

fn connections(text: &str) -> Result<u16, String> {
    match text.trim().parse() {
        Ok(count @ 1..=1024) => Ok(count),
        _ => Err(format!(
            "{text:?} is not a number of connections: write 1 to 1024"
        )),
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let number = text.trim().strip_suffix('s').unwrap_or(text.trim());
    match number.parse() {
        Ok(seconds @ 1..=3600) => Ok(Duration::from_secs(seconds)),
        _ => Err(format!("{text:?} is not a number of seconds: write 1s to 3600s")),
    }
}

#[cfg(test)]
mod tests;
