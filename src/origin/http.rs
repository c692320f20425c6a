//! What happens around every HTTP request of a store client: counting, deadlines, and seeing the status.
//!
//! `object_store` keeps the status and the body of a failed request in private types, and refuses a whole
//! page of a listing for one key it cannot represent. Both are put right here, where the answers pass by.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll},
    time::Duration,
};

use async_trait::async_trait;
use http_body_util::BodyExt as _;
use object_store::{
    ClientOptions,
    client::{
        HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpService,
        ReqwestConnector,
    },
};
use parking_lot::Mutex;

use super::url::percent;

/// What a store's clients did so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Counters {
    pub requests: u64,
    /// Answers other than success, and requests without an answer.
    pub failures: u64,
    /// Bytes of bodies received.
    pub bytes_in: u64,
    /// Bytes of bodies sent.
    pub bytes_out: u64,
}

#[derive(Debug, Default)]
pub(super) struct Tally {
    pub requests: AtomicU64,
    pub failures: AtomicU64,
    pub bytes_in: AtomicU64,
    pub bytes_out: AtomicU64,
}

impl Tally {
    pub fn read(&self) -> Counters {
        Counters {
            requests: self.requests.load(Relaxed),
            failures: self.failures.load(Relaxed),
            bytes_in: self.bytes_in.load(Relaxed),
            bytes_out: self.bytes_out.load(Relaxed),
        }
    }
}

/// What was seen of the last request made within a scope.
#[derive(Clone, Debug, Default)]
pub(super) struct Seen {
    /// 0: no answer.
    pub status: u16,
    /// The `<Code>` of an XML error body.
    pub code: Option<String>,
    /// The request went to somebody who gives out credentials, not to the store.
    pub for_credentials: bool,
    /// Whether the answer is a listing whose keys are to be made representable.
    pub listing: bool,
    /// The id of the keys that the request was signed with, where they were lent.
    pub signed_with: Option<String>,
}

impl Seen {
    /// Whether the store said that it is the keys that it does not take.
    pub fn keys_are_refused(&self) -> bool {
        matches!(
            self.code.as_deref(),
            Some(
                "ExpiredToken"
                    | "ExpiredTokenException"
                    | "TokenRefreshRequired"
                    | "InvalidAccessKeyId"
                    | "InvalidToken"
                    | "SignatureDoesNotMatch"
            )
        )
    }
}

tokio::task_local! {
    /// Requests are made within the task that asks for them (clients spawn nothing), so this reaches
    /// [`Service::call`] where an argument cannot.
    pub(super) static SEEN: Arc<Mutex<Seen>>;
}

/// An error body longer than this is not worth reading for its code.
const ERROR_BODY: usize = 64 << 10;
/// An upload is given the time it takes at this rate, bytes a second, before its answer is due. Many run at
/// once and share one line.
const SLOWEST_UPLOAD: u64 = 64 << 10;

#[derive(Debug)]
pub(super) struct Connector {
    pub tally: Arc<Tally>,
    pub first_byte: Duration,
    pub read: Duration,
    /// `host[:port]` suffixes of the store itself; empty: anything.
    pub credential_hosts: &'static [&'static str],
}

impl HttpConnector for Connector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(Service {
            inner: ReqwestConnector::default().connect(options)?,
            tally: Arc::clone(&self.tally),
            first_byte: self.first_byte,
            read: self.read,
            credential_hosts: self.credential_hosts,
        }))
    }
}

/// Who hands out credentials, for all the clouds: instance metadata, task roles, token services.
pub(super) const CREDENTIAL_HOSTS: &[&str] = &[
    "169.254.169.254",
    "169.254.170.2",
    "169.254.170.23",
    "fd00:ec2::254",
    "metadata.google.internal",
    "metadata",
    "sts.",
    "oauth2.googleapis.com",
    "accounts.google.com",
    "login.microsoftonline.com",
];

#[derive(Debug)]
struct Service {
    inner: HttpClient,
    tally: Arc<Tally>,
    first_byte: Duration,
    read: Duration,
    credential_hosts: &'static [&'static str],
}

#[derive(Debug, thiserror::Error)]
#[error("no answer within {0:?}")]
struct NoAnswer(Duration);

#[derive(Debug, thiserror::Error)]
#[error("nothing more came within {0:?}")]
struct Stalled(Duration);

/// A body whose every piece has a deadline. The client's own read timeout also runs while a request is
/// being sent, and so would end every upload that takes longer.
struct Impatient<B> {
    inner: Pin<Box<B>>,
    patience: Duration,
    alarm: Option<Pin<Box<tokio::time::Sleep>>>,
}

impl<B: hyper::body::Body<Data = bytes::Bytes, Error = HttpError>> hyper::body::Body for Impatient<B> {
    type Data = bytes::Bytes;
    type Error = HttpError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<hyper::body::Frame<bytes::Bytes>, HttpError>>> {
        let polled = self.inner.as_mut().poll_frame(context);
        if polled.is_ready() {
            // It runs again from when somebody next waits: a reader that pauses is not a server that stalls.
            self.alarm = None;
            return polled;
        }
        let patience = self.patience;
        let alarm = self
            .alarm
            .get_or_insert_with(|| Box::pin(tokio::time::sleep(patience)));
        alarm
            .as_mut()
            .poll(context)
            .map(|()| Some(Err(HttpError::new(HttpErrorKind::Timeout, Stalled(patience)))))
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> hyper::body::SizeHint {
        self.inner.size_hint()
    }
}

#[async_trait]
impl HttpService for Service {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let sent = request.body().content_length() as u64;
        self.tally.requests.fetch_add(1, Relaxed);
        self.tally.bytes_out.fetch_add(sent, Relaxed);
        let host = request.uri().host().unwrap_or_default();
        let for_credentials = self
            .credential_hosts
            .iter()
            .any(|known| host == *known || (known.ends_with('.') && host.starts_with(known)));
        let listing = SEEN
            .try_with(|seen| {
                let mut seen = seen.lock();
                seen.status = 0;
                seen.code = None;
                seen.for_credentials = for_credentials;
                seen.listing
            })
            .unwrap_or(false)
            && !for_credentials;
        let patience = self.first_byte + Duration::from_secs(sent / SLOWEST_UPLOAD);
        let response = match tokio::time::timeout(patience, self.inner.execute(request)).await {
            Ok(Ok(response)) => response,
            Ok(Err(error)) => {
                self.tally.failures.fetch_add(1, Relaxed);
                return Err(error);
            }
            Err(_) => {
                self.tally.failures.fetch_add(1, Relaxed);
                return Err(HttpError::new(HttpErrorKind::Timeout, NoAnswer(patience)));
            }
        };
        let status = response.status();
        let _ = SEEN.try_with(|seen| seen.lock().status = status.as_u16());
        let tally = Arc::clone(&self.tally);
        let (parts, body) = response.into_parts();
        let body = Impatient {
            inner: Box::pin(body),
            patience: self.read,
            alarm: None,
        };
        let counted = object_store::client::HttpResponseBody::new(body.map_frame(move |frame| {
            if let Some(data) = frame.data_ref() {
                tally.bytes_in.fetch_add(data.len() as u64, Relaxed);
            }
            frame
        }));
        if status.is_success() && !listing {
            return Ok(HttpResponse::from_parts(parts, counted));
        }
        if status.is_success() {
            let page = counted.bytes().await?;
            let page = match std::str::from_utf8(&page) {
                Ok(text) => escape_keys(text).into_bytes().into(),
                Err(_) => page,
            };
            return Ok(HttpResponse::from_parts(parts, page.into()));
        }
        self.tally.failures.fetch_add(1, Relaxed);
        let short = hyper::body::Body::size_hint(&counted)
            .upper()
            .is_none_or(|length| length <= ERROR_BODY as u64);
        if !short {
            return Ok(HttpResponse::from_parts(parts, counted));
        }
        let body = http_body_util::Limited::new(counted, ERROR_BODY)
            .collect()
            .await
            .map(http_body_util::Collected::to_bytes)
            .unwrap_or_default();
        if let Some(code) = std::str::from_utf8(&body)
            .ok()
            .and_then(|text| element(text, "Code"))
        {
            let _ = SEEN.try_with(|seen| seen.lock().code = Some(code.to_owned()));
        }
        Ok(HttpResponse::from_parts(parts, body.into()))
    }
}

fn element<'x>(xml: &'x str, name: &str) -> Option<&'x str> {
    let (_, rest) = xml.split_once(&format!("<{name}>"))?;
    Some(rest.split_once('<')?.0)
}

/// Rewrites the keys of a listing so that each is one path segment of harmless characters, which
/// `object_store` takes without complaint and without change; [`unescape_key`] gives the key back.
/// Otherwise one `a//b`, `dir/`, `..` or tab in a bucket fails the whole listing, or comes back altered.
fn escape_keys(xml: &str) -> String {
    let mut out = String::with_capacity(xml.len() + xml.len() / 4);
    let mut rest = xml;
    while let Some(start) = rest.find('<') {
        let Some(end) = rest[start..].find('>').map(|at| start + at + 1) else {
            break;
        };
        out.push_str(&rest[..end]);
        let tag = &rest[start + 1..end - 1];
        rest = &rest[end..];
        // S3 and GCS say Key and Prefix, Azure says Name.
        if matches!(tag, "Key" | "Prefix" | "Name") {
            let text_end = rest.find('<').unwrap_or(rest.len());
            escape_into(&mut out, &unescape_xml(&rest[..text_end]));
            rest = &rest[text_end..];
        }
    }
    out.push_str(rest);
    out
}

fn escape_into(out: &mut String, key: &str) {
    use std::fmt::Write as _;
    for byte in key.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_') {
            out.push(char::from(byte));
        } else {
            let _ = write!(out, "%{byte:02X}");
        }
    }
}

pub(super) fn unescape_key(escaped: &str) -> String {
    // What `escape_into` wrote is UTF-8 when decoded; what it did not write (no HTTP in between) stays.
    percent::decode(escaped).unwrap_or_else(|| escaped.to_owned())
}

fn unescape_xml(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find('&') {
        out.push_str(&rest[..start]);
        rest = &rest[start..];
        let Some(end) = rest.find(';') else { break };
        let entity = &rest[1..end];
        let character = match entity {
            "amp" => Some('&'),
            "lt" => Some('<'),
            "gt" => Some('>'),
            "quot" => Some('"'),
            "apos" => Some('\''),
            _ => entity
                .strip_prefix('#')
                .and_then(|number| match number.strip_prefix(['x', 'X']) {
                    Some(hex) => u32::from_str_radix(hex, 16).ok(),
                    None => number.parse().ok(),
                })
                .and_then(char::from_u32),
        };
        match character {
            Some(character) => out.push(character),
            None => out.push_str(&rest[..=end]),
        }
        rest = &rest[end + 1..];
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn xml_escape(text: &str) -> String {
        text.chars()
            .map(|c| match c {
                '&' => "&amp;".to_owned(),
                '<' => "&lt;".to_owned(),
                '>' => "&gt;".to_owned(),
                c if c.is_control() => format!("&#x{:x};", u32::from(c)),
                c => c.to_string(),
            })
            .collect()
    }

    proptest! {
        #[test]
        fn any_key_survives_a_listing(key in any::<String>()) {
            let page = format!("<R><Name>b</Name><Contents><Key>{}</Key><Size>3</Size></Contents></R>", xml_escape(&key));
            let escaped = escape_keys(&page);
            let found = element(&escaped, "Key").unwrap();
            prop_assert!(found.bytes().all(|b| b.is_ascii_alphanumeric() || b"%-_".contains(&b)));
            prop_assert_eq!(unescape_key(found), key);
            prop_assert!(escaped.ends_with("<Size>3</Size></Contents></R>"));
        }

        #[test]
        fn no_bytes_break_it(page in any::<String>()) {
            escape_keys(&page);
        }
    }
}
