//! The catalog and the origins: whether they answer, how fast, with which credentials, and by which clock.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use super::{Finding, Patient, Verdict};
use crate::{
    catalog::{self, CatalogError},
    causes::in_one_line,
    origin::{Deadlines, Store, StoreSettings, StoreUrl},
};

/// For one question to one store.
const PATIENCE: Duration = Duration::from_secs(10);
const SLOW: Duration = Duration::from_millis(500);
/// Signatures are refused from 5 to 15 minutes on, depending on the store.
const SKEW: f64 = 60.0;
const SOON: i64 = 15 * 60;

pub(super) async fn examine(patient: &Patient) -> Vec<Finding> {
    let mut findings = vec![catalog(patient).await];
    let mut urls: BTreeMap<String, StoreUrl> = BTreeMap::new();
    for url in &patient.origins {
        urls.insert(url.to_string(), url.clone());
    }
    for url in urls.values().filter(|url| **url != patient.catalog) {
        findings.push(origin(patient, url).await);
    }
    urls.insert(patient.catalog.to_string(), patient.catalog.clone());
    findings.extend(expiry(&patient.store_settings, jiff::Timestamp::now()));
    let mut servers = BTreeMap::new();
    for url in urls.values() {
        if let Ok(store) = Store::open(url, &patient.store_settings, &Deadlines::control())
            && let Some(server) = server(store.canonical())
        {
            servers.insert(server.to_string(), server);
        }
    }
    for server in servers.into_values() {
        findings.extend(clock(server).await);
    }
    findings
}

async fn catalog(patient: &Patient) -> Finding {
    let shown = &patient.catalog;
    let started = Instant::now();
    let asked = async {
        let catalog = catalog::connect(shown, &patient.store_settings).await?;
        match catalog.list(Some(&patient.user)).await {
            // Nothing published yet is an answer.
            Ok(_) | Err(CatalogError::NoSuchUser { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    };
    let failed = |why: String| {
        Finding::new("catalog", Verdict::Bad, format!("{shown}: {why}"))
            .costs("no reference can be resolved: nothing new can be mounted")
            .mend("check --catalog (`grid-mount config` tells where it comes from) and the credentials")
    };
    match tokio::time::timeout(PATIENCE, asked).await {
        Ok(Ok(())) => answered("catalog", shown, started.elapsed()),
        Ok(Err(error)) => failed(in_one_line(&error)),
        Err(_) => failed(format!("no answer within {} s", PATIENCE.as_secs())),
    }
}

async fn origin(patient: &Patient, url: &StoreUrl) -> Finding {
    let started = Instant::now();
    let asked = async {
        let store = Store::open(url, &patient.store_settings, &Deadlines::control())?;
        store.list_level("").await.map(|_| ())
    };
    let failed = |why: String| {
        Finding::new("origin", Verdict::Bad, format!("{url}: {why}"))
            .costs("what is not in the cache cannot be read")
            .mend("check the network, the endpoint and the credentials")
    };
    match tokio::time::timeout(PATIENCE, asked).await {
        Ok(Ok(())) => answered("origin", url, started.elapsed()),
        Ok(Err(error)) => failed(in_one_line(&error)),
        Err(_) => failed(format!("no answer within {} s", PATIENCE.as_secs())),
    }
}

fn answered(check: &'static str, url: &StoreUrl, took: Duration) -> Finding {
    let found = format!("{url} answers within {} ms", took.as_millis());
    if took > SLOW {
        Finding::new(check, Verdict::Warning, found)
            .costs("mounting, and every read of something new, waits as long")
            .mend("use a store in this region; `grid-mount warm` fetches ahead of readers")
    } else {
        Finding::good(check, found)
    }
}

/// Of keys that were lent and say for how long.
fn expiry(settings: &StoreSettings, now: jiff::Timestamp) -> Option<Finding> {
    let until: jiff::Timestamp = settings.get("AWS_CREDENTIAL_EXPIRATION")?.parse().ok()?;
    let left = until.as_second() - now.as_second();
    let bad = |verdict, found: String| {
        Finding::new("credentials", verdict, found)
            .costs("what is not in the cache cannot be read then")
            .mend("get new ones, and mount again with them")
    };
    Some(match left {
        ..=0 => bad(
            Verdict::Bad,
            format!("the AWS credentials have expired ({until})"),
        ),
        1..=SOON => bad(
            Verdict::Warning,
            format!("the AWS credentials expire in {} s", left),
        ),
        _ => Finding::good(
            "credentials",
            format!("the AWS credentials are good until {until}"),
        ),
    })
}

/// The HTTP server behind a store, if it is one.
fn server(canonical: &str) -> Option<url::Url> {
    let at = canonical.find("http")?;
    let mut url: url::Url = canonical[at..].parse().ok()?;
    url.set_path("/");
    url.set_query(None);
    Some(url)
}

/// Compares this host's clock with the server's, as its answers are dated. What it answers does not matter.
async fn clock(server: url::Url) -> Option<Finding> {
    let client = reqwest::Client::builder().timeout(PATIENCE).build().ok()?;
    let before = jiff::Timestamp::now();
    let answer = client.head(server.clone()).send().await.ok()?;
    let after = jiff::Timestamp::now();
    let date = answer.headers().get(reqwest::header::DATE)?.to_str().ok()?;
    skew(server.host_str()?, date, before, after)
}

fn skew(host: &str, date: &str, before: jiff::Timestamp, after: jiff::Timestamp) -> Option<Finding> {
    let theirs = jiff::fmt::rfc2822::parse(date).ok()?.timestamp();
    let middle = (before.as_millisecond() + after.as_millisecond()) / 2;
    // A date has whole seconds: half of one is how far off it is on average.
    let off = (middle - theirs.as_millisecond() - 500) as f64 / 1000.0;
    Some(if off.abs() > SKEW {
        let way = if off > 0.0 { "ahead of" } else { "behind" };
        Finding::new(
            "clock",
            Verdict::Bad,
            format!("this host's clock is {:.0} s {way} {host}'s", off.abs()),
        )
        .costs("signed requests are refused from a few minutes on, as if the credentials were wrong")
        .mend("let the clock be set: `timedatectl set-ntp true`")
    } else {
        Finding::good("clock", format!("within {:.0} s of {host}'s", off.abs().ceil()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_that_end_are_told_of_in_time() {
        let now: jiff::Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        for (until, verdict) in [
            ("2025-12-31T23:59:59Z", Verdict::Bad),
            ("2026-01-01T00:05:00Z", Verdict::Warning),
            ("2026-01-01T01:00:00Z", Verdict::Good),
        ] {
            let settings: StoreSettings = [("AWS_CREDENTIAL_EXPIRATION", until)].into_iter().collect();
            assert_eq!(expiry(&settings, now).unwrap().verdict, verdict, "{until}");
        }
        assert!(expiry(&StoreSettings::default(), now).is_none());
    }

    #[test]
    fn a_wrong_clock_is_found() {
        let date = "Thu, 01 Jan 2026 00:00:00 GMT";
        for (ours, verdict) in [
            ("2026-01-01T00:00:01Z", Verdict::Good),
            ("2026-01-01T00:10:00Z", Verdict::Bad),
            ("2025-12-31T23:50:00Z", Verdict::Bad),
        ] {
            let ours = ours.parse().unwrap();
            assert_eq!(skew("host", date, ours, ours).unwrap().verdict, verdict);
        }
        assert!(
            skew(
                "host",
                "soon",
                jiff::Timestamp::UNIX_EPOCH,
                jiff::Timestamp::UNIX_EPOCH
            )
            .is_none()
        );
    }

    #[test]
    fn the_server_of_a_store_is_known() {
        let of = |canonical| server(canonical).map(|url| url.to_string());
        assert_eq!(
            of("s3+http://127.0.0.1:8333/bucket/prefix/").as_deref(),
            Some("http://127.0.0.1:8333/")
        );
        assert_eq!(of("file:///somewhere"), None);
    }
}
