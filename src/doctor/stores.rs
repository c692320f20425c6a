//! The catalog and the origins: whether they answer, how fast, with which credentials, and by which clock.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use super::{Finding, Patient, Verdict};
use crate::{
    catalog::{self, CatalogError},
    causes::in_one_line,
    origin::{Deadlines, LoanState, Store, StoreKind, StoreSettings, StoreUrl},
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
    let now = jiff::Timestamp::now();
    let asked_with = expiry(&patient.store_settings, now);
    findings.extend(asked_with.or_else(|| keys(urls.values(), &patient.store_settings)));
    findings.extend(patient.loans.iter().map(|(of, loan)| lent(of, loan, now)));
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

/// Whether there are any, where they do not say for how long.
fn keys<'urls>(mut urls: impl Iterator<Item = &'urls StoreUrl>, settings: &StoreSettings) -> Option<Finding> {
    if !urls.any(|url| matches!(url.kind(), StoreKind::S3 { .. })) {
        return None;
    }
    let has = |name| settings.get(name).is_some();
    if has("AWS_ACCESS_KEY_ID") && has("AWS_SECRET_ACCESS_KEY") {
        let found = "there are AWS keys; they do not say how long they are good for";
        return Some(Finding::good("credentials", found));
    }
    if has("AWS_SKIP_SIGNATURE") {
        return Some(Finding::good("credentials", "AWS stores are asked without any"));
    }
    let elsewhere = [
        "AWS_WEB_IDENTITY_TOKEN_FILE",
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
        "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    ];
    Some(match elsewhere.into_iter().find(|name| has(name)) {
        Some(name) => Finding::good("credentials", format!("AWS credentials come from {name}")),
        None => Finding::new(
            "credentials",
            Verdict::Note,
            "there are no AWS credentials: this machine's own are asked for",
        )
        .costs("where it has none, every request fails, and only after a while")
        .mend("set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"),
    })
}

/// Keys that a control plane lends for a mount, and renews by itself.
fn lent(reference: &str, loan: &LoanState, now: jiff::Timestamp) -> Finding {
    let why = loan.last_error.as_deref().unwrap_or("nobody renewed them");
    let bad = |verdict, found: String| {
        Finding::new("lent-credentials", verdict, found)
            .costs("what is not in the cache cannot be read")
            .mend("see that the control plane is up and your token is good (`grid-mount team`)")
    };
    let left = loan.expires.map(|until| until.as_second() - now.as_second());
    if loan.expired || left.is_some_and(|left| left <= 0) {
        return bad(
            Verdict::Bad,
            format!("the keys lent for {reference} have run out: {why}"),
        );
    }
    if loan.last_error.is_some() {
        let found = format!("the keys lent for {reference} are not renewed: {why}");
        return bad(Verdict::Warning, found);
    }
    let until = left.map_or_else(String::new, |left| format!(" for {left} s more"));
    Finding::good(
        "lent-credentials",
        format!(
            "the keys lent for {reference} are good{until}, renewed {} times",
            loan.renewals
        ),
    )
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
    fn whose_credentials_are_used_is_told() {
        let s3: [StoreUrl; 1] = ["s3://bucket/x".parse().unwrap()];
        let verdict = |pairs: &[(&str, &str)]| {
            let settings = pairs.iter().copied().collect();
            keys(s3.iter(), &settings).unwrap().verdict
        };
        let given = [("AWS_ACCESS_KEY_ID", "a"), ("AWS_SECRET_ACCESS_KEY", "b")];
        assert_eq!(verdict(&given), Verdict::Good);
        assert_eq!(verdict(&given[..1]), Verdict::Note);
        assert_eq!(verdict(&[("AWS_WEB_IDENTITY_TOKEN_FILE", "/x")]), Verdict::Good);
        assert_eq!(verdict(&[]), Verdict::Note);
        let directory: [StoreUrl; 1] = ["file:///x".parse().unwrap()];
        assert!(keys(directory.iter(), &StoreSettings::default()).is_none());
    }

    #[test]
    fn lent_keys_that_end_or_are_not_renewed_are_told_of() {
        let now: jiff::Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        let loan = |expires: &str, expired, error: Option<&str>| LoanState {
            expires: Some(expires.parse().unwrap()),
            expired,
            last_error: error.map(str::to_owned),
            ..LoanState::default()
        };
        for (loan, verdict) in [
            (loan("2026-01-01T00:10:00Z", false, None), Verdict::Good),
            (
                loan("2026-01-01T00:10:00Z", false, Some("refused")),
                Verdict::Warning,
            ),
            (loan("2026-01-01T00:10:00Z", true, Some("refused")), Verdict::Bad),
            (loan("2025-12-31T00:00:00Z", false, None), Verdict::Bad),
        ] {
            assert_eq!(lent("alice:data/1", &loan, now).verdict, verdict, "{loan:?}");
        }
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
