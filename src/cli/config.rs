//! Settings at the edge: from flags and the process's environment into plain structs.

use std::{
    collections::BTreeMap,
    env, io,
    path::{Path, PathBuf},
};

use super::{
    CliError,
    args::{AgentArgs, AgentSettingArgs, CatalogArgs, ConfigArgs, MountArgs},
    output,
};
use crate::{
    agent::{AgentConfig, CacheConfig, FetchConfig, VerifyPolicy, access::Rules},
    config::{Inputs, Settings, Source},
    origin::StoreSettings,
};

/// What the flags say, by setting.
#[derive(Default)]
pub struct Overrides {
    flags: BTreeMap<&'static str, String>,
    host_file: Option<PathBuf>,
}

impl Overrides {
    /// Of a mount: its prefetching besides.
    pub fn of_mount(args: &MountArgs) -> Self {
        Self::of(&args.catalog, &args.agent)
            .and([("prefetch", &args.prefetch), ("idle_timeout", &args.idle_timeout)])
    }

    /// Of the `agent` command.
    pub fn of_agent(args: &AgentArgs) -> Self {
        Self {
            host_file: args.config.clone(),
            ..Self::of(&Default::default(), &args.agent)
        }
        .and([
            ("idle_timeout", &args.idle_timeout),
            ("log_format", &args.log_format),
            ("log_level", &args.log_level),
        ])
    }

    fn and<const N: usize>(mut self, given: [(&'static str, &Option<String>); N]) -> Self {
        let given = given
            .into_iter()
            .filter_map(|(key, value)| Some((key, value.clone()?)));
        self.flags.extend(given);
        self
    }

    pub fn of(catalog: &CatalogArgs, agent: &AgentSettingArgs) -> Self {
        let path =
            |path: &Option<std::path::PathBuf>| path.as_ref().map(|path| path.to_string_lossy().into_owned());
        let given = [
            ("catalog", catalog.catalog.clone()),
            ("user", catalog.user.clone()),
            ("cache_dir", path(&agent.cache_dir)),
            ("cache_size", agent.cache_size.clone()),
            ("cache_min_free", agent.cache_min_free.clone()),
            ("memory_limit", agent.memory_limit.clone()),
            ("connections", agent.connections.clone()),
            ("read_deadline", agent.read_deadline.clone()),
        ];
        Self {
            flags: given
                .into_iter()
                .filter_map(|(key, value)| Some((key, value?)))
                .collect(),
            host_file: None,
        }
    }
}

pub fn load(overrides: &Overrides) -> Result<Settings, CliError> {
    let inputs = Inputs {
        flags: overrides.flags.clone(),
        environment: unicode_environment().collect(),
        host_file: overrides.host_file.clone(),
        login: nix::unistd::User::from_uid(nix::unistd::geteuid())
            .ok()
            .flatten()
            .map(|user| user.name),
        is_root: nix::unistd::geteuid().is_root(),
    };
    Settings::load(&inputs).map_err(CliError::usage)
}

/// What is not Unicode is none of our variables.
fn unicode_environment() -> impl Iterator<Item = (String, String)> {
    env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
}

/// The caller's object-store settings, profile included: they travel with each request.
pub fn store_settings() -> Result<StoreSettings, CliError> {
    StoreSettings::from_env().map_err(CliError::failed)
}

/// The `agent` subcommand's flags that give a new agent these settings.
pub fn agent_arguments(settings: &Settings) -> Vec<String> {
    settings
        .explain()
        .into_iter()
        // What concerns the caller travels with each request.
        .filter(|line| !matches!(line.key, "catalog" | "user" | "prefetch" | "idle_timeout"))
        .map(|line| format!("--{}={}", line.key.replace('_', "-"), line.value))
        .collect()
}

/// Shares of the disk become bytes of the disk that the cache directory is, or will be, on.
pub fn agent_config(settings: &Settings) -> Result<AgentConfig, CliError> {
    let disk = disk_size(&settings.cache_dir.value).map_err(CliError::failed)?;
    Ok(AgentConfig {
        cache: CacheConfig {
            dir: settings.cache_dir.value.clone(),
            max_bytes: settings.cache_size.value.of(disk),
            min_free: settings.cache_min_free.value.of(disk),
            verify: VerifyPolicy::EarlierBoot,
        },
        fetch: FetchConfig {
            connections: usize::from(settings.connections.value),
            memory_limit: settings.memory_limit.value.0,
            read_deadline: settings.read_deadline.value,
            // An extent for each of 32 connections, which then wait little for first bytes; a quarter of the
            // memory is the tighter bound.
            max_readahead: 256 << 20,
        },
        idle_timeout: settings.idle_timeout.value.0,
    })
}

/// What an agent of many users lets them do.
pub fn rules(settings: &Settings) -> Result<Rules, CliError> {
    let shared = &settings.shared_agent;
    let mut catalogs = shared.catalogs.clone();
    // The catalog that the host's settings name is everybody's.
    if settings.catalog.source != Source::Default {
        catalogs.push(settings.catalog.value.clone());
    }
    let group = match &shared.group {
        None => None,
        Some(name) => match nix::unistd::Group::from_name(name).map_err(CliError::failed)? {
            Some(group) => Some(group.gid.as_raw()),
            None => {
                let message = format!("agent.group: there is no group {name:?} on this host");
                return Err(CliError::Usage(message));
            }
        },
    };
    Ok(Rules {
        catalogs,
        origins: shared.origins.clone(),
        endpoints: shared.endpoints.clone(),
        group,
        ambient: store_settings()?,
    })
}

fn disk_size(dir: &Path) -> io::Result<u64> {
    let existing = dir
        .ancestors()
        .find(|ancestor| ancestor.exists())
        .unwrap_or(Path::new("/"));
    let statistics = nix::sys::statvfs::statvfs(existing)?;
    Ok(statistics.blocks().saturating_mul(statistics.fragment_size()))
}

/// `grid-mount config`
pub fn show(args: &ConfigArgs) -> Result<(), CliError> {
    let explained = load(&Overrides::of(&args.catalog, &args.agent))?.explain();
    if args.output.json {
        output::print_json(&explained);
        return Ok(());
    }
    let rows: Vec<Vec<String>> = explained
        .into_iter()
        .map(|line| vec![line.key.to_owned(), line.value, line.source])
        .collect();
    output::print(&output::table(&["SETTING", "VALUE", "FROM"], &rows));
    Ok(())
}
