//! Settings at the edge: from flags and the process's environment into plain structs.

use std::{
    collections::BTreeMap,
    env, io,
    path::{Path, PathBuf},
};

use super::{
    CliError,
    args::{AgentArgs, AgentSettingArgs, CatalogArgs, ConfigArgs, MountArgs},
    memory, output,
};
use crate::{
    agent::{AgentConfig, CacheConfig, FetchConfig, VerifyPolicy, access::Rules},
    config::{CacheVerify, Grid, Inputs, Settings, Source},
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
            ("metrics_listen", &args.metrics_listen),
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
            ("cache_verify", agent.cache_verify.clone()),
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
    Settings::load(&inputs(overrides)).map_err(CliError::usage)
}

fn inputs(overrides: &Overrides) -> Inputs {
    let uid = nix::unistd::geteuid();
    let account = nix::unistd::User::from_uid(uid).ok().flatten();
    let mut environment: BTreeMap<_, _> = unicode_environment().collect();
    // mount(8) takes it away from users; root's services never had one.
    if let (Some(account), false) = (&account, uid.is_root())
        && let Some(home) = account.dir.to_str()
    {
        environment
            .entry("HOME".to_owned())
            .or_insert_with(|| home.to_owned());
    }
    Inputs {
        flags: overrides.flags.clone(),
        environment,
        host_file: overrides.host_file.clone(),
        login: account.map(|account| account.name),
        is_root: uid.is_root(),
        memory_allowed: memory::allowed(),
    }
}

/// What is not Unicode is none of our variables.
fn unicode_environment() -> impl Iterator<Item = (String, String)> {
    env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
}

/// The caller's object-store settings, profile included: they travel with each request. Under systemd those of
/// its credential `grid-mount.env` besides, where the environment does not have them.
pub fn store_settings() -> Result<StoreSettings, CliError> {
    let mut settings = StoreSettings::from_env().map_err(CliError::failed)?;
    add_grid_identity(&mut settings);
    let Some(dir) = env::var_os("CREDENTIALS_DIRECTORY") else {
        return Ok(settings);
    };
    let path = Path::new(&dir).join(SYSTEMD_CREDENTIAL);
    match std::fs::read_to_string(&path) {
        Ok(text) => {
            for (name, value) in assignments(&text) {
                if settings.get(name).is_none() {
                    settings.set(name, value);
                }
            }
            Ok(settings)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(settings),
        Err(error) => Err(CliError::Failed(
            format!("{} cannot be read: {error}", path.display()).into(),
        )),
    }
}

/// Who the caller is to a control plane, from Grid's own file, where the environment does not say it. One that
/// cannot be read is told of by whoever needs it: a store catalog does not.
fn add_grid_identity(settings: &mut StoreSettings) {
    let said = ["GRID_MOUNT_TOKEN", "GRID_MOUNT_TOKEN_FILE", "GRID_API_KEY"];
    if said.iter().any(|name| settings.get(name).is_some()) {
        return;
    }
    let grid = Grid::load(&inputs(&Overrides::default())).unwrap_or_default();
    if let (Some(user), Some(key)) = (grid.user_id, grid.api_key) {
        settings.set("GRID_USER_ID", &user.value);
        settings.set("GRID_API_KEY", key.value.expose());
    }
}

/// As in `LoadCredential=` of the units.
const SYSTEMD_CREDENTIAL: &str = "grid-mount.env";

/// Lines of `NAME=value`, as systemd's environment files and shells have them.
fn assignments(text: &str) -> impl Iterator<Item = (&str, &str)> {
    text.lines().filter_map(|line| {
        let line = line.trim();
        let (name, value) = line.strip_prefix("export ").unwrap_or(line).split_once('=')?;
        let value = value.trim();
        let unquoted = ['"', '\'']
            .into_iter()
            .find_map(|quote| value.strip_prefix(quote)?.strip_suffix(quote));
        (!name.starts_with('#')).then_some((name.trim(), unquoted.unwrap_or(value)))
    })
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
            verify: match settings.cache_verify.value {
                CacheVerify::EarlierBoot => VerifyPolicy::EarlierBoot,
                CacheVerify::Always => VerifyPolicy::Always,
            },
        },
        fetch: FetchConfig {
            connections: usize::from(settings.connections.value),
            memory_limit: settings.memory_limit.value.0,
            read_deadline: settings.read_deadline.value,
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
    let overrides = Overrides::of(&args.catalog, &args.agent);
    let mut explained = load(&overrides)?.explain();
    explained.extend(
        Grid::load(&inputs(&overrides))
            .map_err(CliError::usage)?
            .explain(),
    );
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_credential_is_lines_of_assignments() {
        let text = "# a remark with = in it\nA=1\n export B=\"two words\"\n\nC='x=y'\nno assignment\nD=\n";
        assert_eq!(
            assignments(text).collect::<Vec<_>>(),
            [("A", "1"), ("B", "two words"), ("C", "x=y"), ("D", "")]
        );
    }
}
