//! `grid-mount status`.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    path::Path,
    time::{Duration, Instant},
};

use futures::StreamExt as _;
use serde::Serialize;

use super::{
    CliError,
    args::StatusArgs,
    config,
    mount::connect,
    output::{self, Tone},
};
use crate::{
    agent::control::{AgentInfo, MountInfo},
    catalog,
    origin::{LoanState, StoreUrl},
    reference::{QualifiedName, Reference, VersionNumber, VersionSelector},
};

/// More mounts than this are a table.
const CARDS: usize = 6;
/// Whether there is a newer version is worth this much waiting, for all mounts together, …
const NEWS_PATIENCE: Duration = Duration::from_millis(700);
/// … and with `--watch` is asked again after so long.
const NEWS_AGAIN: Duration = Duration::from_secs(60);
const CATALOGS_AT_ONCE: usize = 8;
const WATCH_EVERY: Duration = Duration::from_secs(1);

#[derive(Serialize)]
struct Status {
    /// `null` when none runs.
    agent: Option<AgentInfo>,
    mounts: Vec<Shown>,
}

#[derive(Serialize)]
struct Shown {
    #[serde(flatten)]
    info: MountInfo,
    /// The newest version, where that is newer than this one and the catalog said so in time.
    newer_version: Option<VersionNumber>,
}

/// Catalog and datastore → newest version.
type News = BTreeMap<(String, QualifiedName), VersionNumber>;

pub async fn status(args: StatusArgs) -> Result<(), CliError> {
    if args.global {
        return super::team::mounted(args).await;
    }
    let mut news = News::new();
    let mut asked: Option<Instant> = None;
    let mut screen = Screen::default();
    loop {
        let (agent, mounts) = ask(&args).await?;
        if asked.is_none_or(|asked| asked.elapsed() > NEWS_AGAIN) {
            news = newest(&mounts).await;
            asked = Some(Instant::now());
        }
        let status = Status {
            agent,
            mounts: chosen(&args, mounts)?
                .into_iter()
                .map(|info| Shown {
                    newer_version: news
                        .get(&key(&info))
                        .filter(|newest| **newest > info.reference.version)
                        .copied(),
                    info,
                })
                .collect(),
        };
        match (args.watch, args.output.json) {
            (false, true) => output::print_json(&status),
            (false, false) => output::print(&text(&status, args.target.is_some())),
            (true, json) => {
                let shown = match json {
                    // A line for each, so that whoever reads knows where one ends.
                    true => serde_json::to_string(&status).map_err(CliError::failed)? + "\n",
                    false => screen.next(&text(&status, args.target.is_some())),
                };
                if output::try_print(&shown).is_err() {
                    // Nobody reads any more.
                    return Ok(());
                }
            }
        }
        if !args.watch {
            return Ok(());
        }
        tokio::time::sleep(WATCH_EVERY).await;
    }
}

/// Nothing where no agent runs, or it ends just now.
async fn ask(args: &StatusArgs) -> Result<(Option<AgentInfo>, Vec<MountInfo>), CliError> {
    let Some(client) = connect(&args.socket).await? else {
        return Ok((None, Vec::new()));
    };
    match futures::try_join!(client.agent(), client.mounts()) {
        Ok((agent, mounts)) => Ok((Some(agent), mounts)),
        Err(error) if error.is_absence() => Ok((None, Vec::new())),
        Err(error) => Err(CliError::failed(error)),
    }
}

/// Those that were named. One that is not mounted is an error, except while watching for it.
fn chosen(args: &StatusArgs, mounts: Vec<MountInfo>) -> Result<Vec<MountInfo>, CliError> {
    let Some(target) = &args.target else {
        return Ok(mounts);
    };
    let reference = target.parse::<Reference>().ok();
    let path = Path::new(target);
    let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let is_named = |mount: &MountInfo| {
        let pinned = &mount.reference;
        let by_reference = reference.as_ref().is_some_and(|reference| {
            reference.datastore == pinned.name.datastore
                && reference
                    .owner
                    .as_ref()
                    .is_none_or(|owner| *owner == pinned.name.owner)
                && match &reference.version {
                    VersionSelector::Latest => true,
                    VersionSelector::Number(version) => *version == pinned.version,
                    VersionSelector::Alias(_) => mount.requested == *target,
                }
        });
        mount.mount_point == path || by_reference
    };
    let named: Vec<MountInfo> = mounts.into_iter().filter(is_named).collect();
    if named.is_empty() && !args.watch {
        return Err(CliError::Failed(
            format!("{target} is not mounted; `grid-mount status` shows what is").into(),
        ));
    }
    Ok(named)
}

fn key(mount: &MountInfo) -> (String, QualifiedName) {
    (mount.catalog.to_string(), mount.reference.name.clone())
}

/// Asks the catalogs of the caller's own mounts, with the caller's settings. What does not answer in time,
/// or not at all, is left out: it is a courtesy.
async fn newest(mounts: &[MountInfo]) -> News {
    let me = nix::unistd::geteuid().as_raw();
    let wanted: BTreeMap<(String, QualifiedName), StoreUrl> = mounts
        .iter()
        .filter(|mount| mount.owner == me)
        .map(|mount| (key(mount), mount.catalog.clone()))
        .collect();
    let Ok(settings) = config::store_settings() else {
        return News::new();
    };
    let settings = &settings;
    let answers = futures::stream::iter(wanted)
        .map(|(key, url)| async move {
            let catalog = catalog::connect(&url, settings).await.ok()?;
            let versions = catalog.versions(&key.1).await.ok()?;
            Some((key, *versions.last()?))
        })
        .buffer_unordered(CATALOGS_AT_ONCE)
        .filter_map(std::future::ready);
    let mut answers = std::pin::pin!(answers);
    let until = tokio::time::Instant::now() + NEWS_PATIENCE;
    let mut news = News::new();
    while let Ok(Some((key, version))) = tokio::time::timeout_at(until, answers.next()).await {
        news.insert(key, version);
    }
    news
}

/// What was shown last, to be overwritten.
#[derive(Default)]
struct Screen {
    lines: usize,
}

impl Screen {
    /// On a terminal: no more than fits, in place of what is there. Else: one after the other.
    fn next(&mut self, text: &str) -> String {
        match output::terminal_size() {
            None => format!("{text}\n"),
            Some(size) => self.replace(text, size),
        }
    }

    fn replace(&mut self, text: &str, (width, height): (usize, usize)) -> String {
        let mut shown = String::new();
        if self.lines > 0 {
            let _ = write!(shown, "\x1b[{}A\r", self.lines);
        }
        // The last line of the terminal is the cursor's.
        let lines: Vec<&str> = text.lines().take(height.saturating_sub(1)).collect();
        for line in &lines {
            shown.push_str(&within(line, width));
            // To the end of the line: it may have been longer.
            shown.push_str("\x1b[K\n");
        }
        shown.push_str("\x1b[J");
        self.lines = lines.len();
        shown
    }
}

/// The line cut to `width` characters, not counting colours, which are ended.
fn within(line: &str, width: usize) -> String {
    let mut cut = String::new();
    let (mut taken, mut escaped, mut coloured) = (0, false, false);
    for c in line.chars() {
        if c == '\x1b' {
            (escaped, coloured) = (true, true);
        } else if !escaped {
            if taken == width {
                break;
            }
            taken += 1;
        }
        cut.push(c);
        if escaped && c == 'm' {
            escaped = false;
        }
    }
    if coloured {
        cut.push_str("\x1b[0m");
    }
    cut
}

fn text(status: &Status, named: bool) -> String {
    let Some(agent) = &status.agent else {
        return "nothing is mounted; no agent runs (`grid-mount REF` starts one)\n".into();
    };
    let mut text = String::new();
    if status.mounts.is_empty() {
        text.push_str("nothing is mounted\n");
    } else if status.mounts.len() <= CARDS || named {
        let cards: Vec<String> = status.mounts.iter().map(card).collect();
        text.push_str(&cards.join("\n"));
    } else {
        text.push_str(&overview(&status.mounts));
    }
    text.push_str(&of_agent(agent));
    text
}

fn percent(share: Option<f64>) -> String {
    share.map_or_else(|| "–".into(), |share| format!("{:.1} %", share * 100.0))
}

fn overview(mounts: &[Shown]) -> String {
    let rows: Vec<Vec<String>> = mounts
        .iter()
        .map(|Shown { info, newer_version }| {
            let newer = newer_version.map_or_else(String::new, |newer| format!(" ({newer} exists)"));
            vec![
                format!("{}{newer}", info.reference),
                info.mount_point.display().to_string(),
                output::bytes(info.totals.bytes),
                percent(info.cached_percent.map(|percent| percent / 100.0)),
                percent(info.traffic.hit_ratio),
                output::bytes(info.traffic.bytes_from_origin),
                output::seconds(info.traffic.waited_seconds),
                if info.traffic.failures > 0 {
                    info.traffic.failures.to_string()
                } else {
                    String::new()
                },
            ]
        })
        .collect();
    output::table(
        &[
            "REFERENCE",
            "MOUNT POINT",
            "SIZE",
            "CACHED",
            "AT ONCE",
            "FETCHED",
            "WAITED",
            "FAILED",
        ],
        &rows,
    )
}

/// Everything about one mount.
/// How the keys are doing that a control plane lends for a mount.
fn lent(keys: &LoanState) -> String {
    let until = keys.expires.map(|at| at.strftime("%Y-%m-%d %H:%M:%SZ"));
    let mut text = match (keys.expired, until) {
        (true, Some(until)) => {
            let expired = format!("expired at {until}: only what is in the cache can be read");
            output::toned(Tone::Bad, &expired)
        }
        (_, Some(until)) => format!("lent until {until}"),
        (_, None) => "lent until they are refused".to_owned(),
    };
    let _ = write!(text, "; renewed {} times", keys.renewals);
    if let Some(error) = &keys.last_error {
        let _ = write!(text, "; the last try failed: {error}");
    }
    text
}

fn card(Shown { info, newer_version }: &Shown) -> String {
    let traffic = &info.traffic;
    let mut text = output::toned(
        Tone::Heading,
        &format!("{} at {}", info.reference, info.mount_point.display()),
    );
    text.push('\n');
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "  {name:11} {value}");
    };
    if let Some(newer) = newer_version {
        let news = format!("you are on {}, {newer} exists", info.reference.version);
        line("newer", output::toned(Tone::Warning, &news));
    }
    line(
        "mounted",
        format!(
            "{} by {} (uid {}) as {}",
            info.since.strftime("%Y-%m-%d %H:%M:%SZ"),
            info.user,
            info.owner,
            info.requested
        ),
    );
    line("catalog", info.catalog.to_string());
    line("origin", info.origin.to_string());
    let cached = match info.cached_percent {
        Some(percent) => format!(", {percent:.1} % in the cache"),
        None => String::new(),
    };
    line(
        "holds",
        format!(
            "{} files, {}{cached}",
            info.totals.files,
            output::bytes(info.totals.bytes)
        ),
    );
    line("I/O mode", format!("{}: {}", info.io_mode, info.io_mode_reason));
    line(
        "open files",
        traffic
            .open_files
            .map_or_else(|| "not known in this mode".into(), |count| count.to_string()),
    );
    let requests: u64 = info.requests.values().sum();
    line(
        "requests",
        match traffic.hit_ratio {
            Some(ratio) => format!(
                "{requests}; {} of the reads answered at once",
                percent(Some(ratio))
            ),
            None => format!("{requests}; no reads yet"),
        },
    );
    line(
        "bytes",
        format!(
            "{} given to the kernel; {} from the cache, {} from the origin",
            output::bytes(traffic.bytes_read),
            output::bytes(traffic.bytes_from_cache),
            output::bytes(traffic.bytes_from_origin)
        ),
    );
    line(
        "fetching",
        format!(
            "{} requests, {} retries; readers waited {}",
            traffic.origin_requests,
            traffic.retries,
            output::seconds(traffic.waited_seconds)
        ),
    );
    if let Some(keys) = &info.credentials {
        line("keys", lent(keys));
    }
    if let Some(error) = &traffic.last_error {
        let failed = format!("{} failed, the last: {error}", traffic.failures);
        line("errors", output::toned(Tone::Bad, &failed));
    }
    text
}

fn of_agent(agent: &AgentInfo) -> String {
    let mut text = format!(
        "\nagent {} (pid {}), cache {}: {} of {} used\nread from the cache {}, from origins {} in {} requests ({} retries)\n",
        agent.version,
        agent.pid,
        agent.cache_dir.display(),
        output::bytes(agent.cache_used),
        output::bytes(agent.cache_limit),
        output::bytes(agent.bytes_from_cache),
        output::bytes(agent.bytes_from_origin),
        agent.origin_requests,
        agent.retries,
    );
    if let Some(why) = &agent.cache_degraded {
        let degraded = format!("the cache takes nothing new: {why}");
        let _ = writeln!(text, "{}", output::toned(Tone::Warning, &degraded));
    }
    if let Some(error) = &agent.last_error {
        let _ = writeln!(
            text,
            "{}",
            output::toned(Tone::Bad, &format!("last error: {error}"))
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_watched_screen_is_overwritten_and_never_scrolls() {
        let mut screen = Screen::default();
        let first = screen.replace("a\nbb\nccccc\nd\n", (4, 4));
        assert_eq!(first, "a\u{1b}[K\nbb\u{1b}[K\ncccc\u{1b}[K\n\u{1b}[J");
        let second = screen.replace("e\n", (4, 4));
        assert_eq!(second, "\u{1b}[3A\re\u{1b}[K\n\u{1b}[J");
    }

    #[test]
    fn colours_take_no_room_and_end() {
        assert_eq!(within("\u{1b}[1mabcdef\u{1b}[0m", 3), "\u{1b}[1mabc\u{1b}[0m");
        assert_eq!(within("abc", 3), "abc");
    }
}
