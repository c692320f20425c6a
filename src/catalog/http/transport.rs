//! One request to a control plane, repeated while that may help, with a deadline over all.

use std::time::Duration;

use jiff::Timestamp;
use reqwest::{Method, StatusCode, header};
use serde::{Serialize, de::DeserializeOwned};
use tokio::time::Instant;

use super::identity::Identity;
use crate::{
    catalog::{
        CatalogError,
        protocol::{IDEMPOTENCY_KEY, Problem},
    },
    causes::in_one_line,
    origin::{StoreSettings, StoreUrl},
};

const CONNECT: Duration = Duration::from_secs(5);
/// One try; the server's own deadline is a minute, but nobody waits for that.
const TRY: Duration = Duration::from_secs(20);
/// All tries together: a control plane that is being restarted is back by then.
const PATIENCE: Duration = Duration::from_secs(45);
const PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// A page of a thousand datastores has a few hundred kilobytes.
const MOST: usize = 32 << 20;
/// Stores refuse signatures from further away than a quarter of an hour.
const MOST_SKEW: i64 = 14 * 60;

pub(super) struct Transport {
    client: reqwest::Client,
    url: String,
    identity: Identity,
    patience: Duration,
}

/// What is asked.
pub(super) struct Ask<'a> {
    method: Method,
    path: &'a str,
    query: Vec<(&'static str, String)>,
    body: Option<Vec<u8>>,
    key: Option<String>,
}

impl<'a> Ask<'a> {
    pub fn new(method: Method, path: &'a str) -> Self {
        Self {
            method,
            path,
            query: Vec::new(),
            body: None,
            key: None,
        }
    }

    pub fn get(path: &'a str) -> Self {
        Self::new(Method::GET, path)
    }

    pub fn query(mut self, name: &'static str, value: Option<impl ToString>) -> Self {
        self.query.extend(value.map(|value| (name, value.to_string())));
        self
    }

    pub fn body(mut self, body: &impl Serialize) -> Self {
        // What the protocol has is all maps with text for keys.
        self.body = serde_json::to_vec(body).ok();
        self
    }

    /// Repeating it does no harm, whatever its method.
    pub fn once(mut self, key: String) -> Self {
        self.key = Some(key);
        self
    }
}

pub(super) enum Answer {
    Ok(Vec<u8>),
    Problem(Problem),
}

/// Why one try failed.
enum Failure {
    /// Another may succeed, not before so long.
    Passing(Option<Duration>, String),
    Final(CatalogError),
}

impl Transport {
    pub fn new(url: &StoreUrl, settings: &StoreSettings) -> Result<Self, CatalogError> {
        let failed = |reason: String| CatalogError::Client {
            catalog: url.to_string(),
            reason,
        };
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut builder = reqwest::Client::builder()
            .connect_timeout(CONNECT)
            .timeout(TRY)
            // A token goes where it was meant to go.
            .redirect(reqwest::redirect::Policy::none())
            .user_agent(concat!("grid-mount/", env!("CARGO_PKG_VERSION")));
        for name in ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"] {
            let Some(path) = settings.get(name).filter(|_| url.scheme() == "https") else {
                continue;
            };
            let certificates = std::fs::read(path)
                .map_err(|error| error.to_string())
                .and_then(|pem| {
                    reqwest::Certificate::from_pem_bundle(&pem).map_err(|error| in_one_line(&error))
                })
                .map_err(|reason| failed(format!("{name} names {path}: {reason}")))?;
            builder = builder.tls_certs_merge(certificates);
        }
        Ok(Self {
            client: builder.build().map_err(|error| failed(in_one_line(&error)))?,
            url: url.to_string(),
            identity: Identity::of(settings),
            patience: PATIENCE,
        })
    }

    /// Waits less long for a control plane that does not answer.
    #[cfg(test)]
    pub fn impatient(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    pub fn url(&self) -> &str {
        &self.url
    }

    /// The answer as `T`.
    pub async fn ask<T: DeserializeOwned>(&self, ask: Ask<'_>) -> Result<Result<T, Problem>, CatalogError> {
        match self.send(&ask).await? {
            Answer::Problem(problem) => Ok(Err(problem)),
            Answer::Ok(bytes) => serde_json::from_slice(&bytes)
                .map(Ok)
                .map_err(|error| self.bad(format!("{}: {error}", ask.path))),
        }
    }

    fn bad(&self, what: String) -> CatalogError {
        CatalogError::BadAnswer {
            catalog: self.url.clone(),
            what,
        }
    }

    pub async fn send(&self, ask: &Ask<'_>) -> Result<Answer, CatalogError> {
        let began = Instant::now();
        // What is repeated must not happen twice.
        let repeatable = ask.method != Method::POST || ask.key.is_some();
        let mut tries = 0;
        loop {
            let (wait, reason) = match self.try_once(ask).await {
                Ok(answer) => return Ok(answer),
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Passing(wait, reason)) => (wait, reason),
            };
            tries += 1;
            let pause = PAUSE * (1 << u32::min(tries, 8));
            let pause = pause.min(LONGEST_PAUSE).mul_f64(rand::random_range(0.3..1.0));
            let pause = pause.max(wait.unwrap_or_default());
            if !repeatable || began.elapsed() + pause > self.patience {
                return Err(CatalogError::Unreachable {
                    catalog: self.url.clone(),
                    waited: began.elapsed(),
                    source: Some(reason.into()),
                });
            }
            tracing::debug!(catalog = self.url, reason, "asking again");
            tokio::time::sleep(pause).await;
        }
    }

    async fn try_once(&self, ask: &Ask<'_>) -> Result<Answer, Failure> {
        let wrong = |reason: String| {
            Failure::Final(CatalogError::WrongToken {
                catalog: self.url.clone(),
                reason,
            })
        };
        let authorization = self.identity.header().await.map_err(wrong)?;
        let mut value = header::HeaderValue::from_str(authorization.expose())
            .map_err(|_| wrong("the token has characters that no token has".to_owned()))?;
        value.set_sensitive(true);
        let mut url = format!("{}{}", self.url, ask.path);
        if !ask.query.is_empty() {
            let query = url::form_urlencoded::Serializer::new(String::new())
                .extend_pairs(&ask.query)
                .finish();
            url = format!("{url}?{query}");
        }
        let mut request = self
            .client
            .request(ask.method.clone(), url)
            .header(header::AUTHORIZATION, value);
        if let Some(body) = &ask.body {
            request = request
                .header(header::CONTENT_TYPE, "application/json")
                .body(body.clone());
        }
        if let Some(key) = &ask.key {
            request = request.header(IDEMPOTENCY_KEY, key);
        }
        let mut response = request
            .send()
            .await
            .map_err(|error| Failure::Passing(None, in_one_line(&error.without_url())))?;
        let (status, headers) = (response.status(), response.headers().clone());
        let mut bytes = Vec::new();
        loop {
            match response.chunk().await {
                Ok(Some(chunk)) if bytes.len() + chunk.len() > MOST => {
                    return Err(Failure::Final(self.bad(format!("more than {MOST} bytes"))));
                }
                Ok(Some(chunk)) => bytes.extend_from_slice(&chunk),
                Ok(None) => break,
                Err(error) => return Err(Failure::Passing(None, in_one_line(&error.without_url()))),
            }
        }
        if status.is_success() {
            return Ok(Answer::Ok(bytes));
        }
        let problem: Option<Problem> = serde_json::from_slice(&bytes).ok();
        let detail = problem
            .as_ref()
            .map_or_else(|| status.to_string(), |problem| problem.detail.clone());
        match status {
            StatusCode::UNAUTHORIZED => Err(wrong(detail)),
            StatusCode::TOO_MANY_REQUESTS
            | StatusCode::BAD_GATEWAY
            | StatusCode::SERVICE_UNAVAILABLE
            | StatusCode::GATEWAY_TIMEOUT => {
                let wait = headers
                    .get(header::RETRY_AFTER)
                    .and_then(|value| value.to_str().ok()?.trim().parse().ok())
                    .map(Duration::from_secs);
                Err(Failure::Passing(wait, detail))
            }
            _ => match problem {
                Some(problem) => Ok(Answer::Problem(problem)),
                None => Err(Failure::Final(self.bad(format!("{} {status}", ask.path)))),
            },
        }
    }

    /// Whether requests signed with this machine's clock will be refused; asks for the server's time.
    pub async fn refuse_skew(&self) -> Result<(), CatalogError> {
        let answer = self.client.get(format!("{}/health", self.url)).send().await;
        let date = answer.ok().and_then(|answer| {
            let date = answer.headers().get(header::DATE)?.to_str().ok()?.to_owned();
            jiff::fmt::rfc2822::parse(&date).ok()
        });
        let Some(date) = date else { return Ok(()) };
        let seconds = Timestamp::now().as_second() - date.timestamp().as_second();
        if seconds.abs() > MOST_SKEW {
            return Err(CatalogError::ClockSkew {
                catalog: self.url.clone(),
                seconds,
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    use super::*;

    /// Gives these answers, one a connection, then none.
    async fn server(answers: Vec<String>) -> (StoreUrl, tokio::task::JoinHandle<Vec<String>>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let serving = tokio::spawn(async move {
            let mut asked = Vec::new();
            for answer in answers {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut request = vec![0; 8192];
                let read = stream.read(&mut request).await.unwrap();
                asked.push(String::from_utf8_lossy(&request[..read]).into_owned());
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
            asked
        });
        (url.parse().unwrap(), serving)
    }

    fn answer(status: &str, body: &str) -> String {
        format!(
            "HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        )
    }

    fn transport(url: &StoreUrl) -> Transport {
        let settings = [("GRID_MOUNT_TOKEN", "gmt_hunter2")].into_iter().collect();
        Transport::new(url, &settings)
            .unwrap()
            .impatient(Duration::from_secs(3))
    }

    #[tokio::test]
    async fn what_may_pass_is_asked_again_with_the_same_key_and_not_sooner_than_told() {
        let answers = vec![
            answer("503 Service Unavailable", ""),
            answer("429 Too Many Requests\r\nretry-after: 1", ""),
            answer("200 OK", "7"),
        ];
        let (url, serving) = server(answers).await;
        let began = Instant::now();
        let ask = Ask::new(Method::POST, "/x").once("the-key".to_owned());
        let seven: u32 = transport(&url).ask(ask).await.unwrap().unwrap();
        assert_eq!(seven, 7);
        assert!(began.elapsed() >= Duration::from_secs(1));
        let asked = serving.await.unwrap();
        assert_eq!(asked.len(), 3);
        for request in asked {
            assert!(request.contains("idempotency-key: the-key"), "{request}");
            assert!(request.contains("authorization: Bearer gmt_hunter2"), "{request}");
        }
    }

    #[tokio::test]
    async fn what_might_happen_twice_is_not_asked_again() {
        let (url, serving) = server(vec![answer("503 Service Unavailable", "")]).await;
        let asked = transport(&url).send(&Ask::new(Method::POST, "/x")).await;
        assert!(matches!(asked, Err(CatalogError::Unreachable { .. })));
        assert_eq!(serving.await.unwrap().len(), 1);
    }

    #[tokio::test]
    async fn a_control_plane_that_stays_away_is_an_error_that_shows_no_token() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url: StoreUrl = format!("http://{}", listener.local_addr().unwrap())
            .parse()
            .unwrap();
        drop(listener);
        let transport = transport(&url).impatient(Duration::from_millis(500));
        let error = transport.send(&Ask::get("/v1/me")).await.err().unwrap();
        let shown = format!("{} {error:?}", in_one_line(&error));
        assert!(shown.contains("did not answer"), "{shown}");
        assert!(!shown.contains("hunter2"), "{shown}");
    }

    #[tokio::test]
    async fn what_is_no_control_plane_is_said_to_be_none() {
        let (url, _serving) = server(vec![answer("404 Not Found", "<html>nginx</html>")]).await;
        let error = transport(&url).send(&Ask::get("/v1/me")).await.err().unwrap();
        assert!(
            error.to_string().contains("is it a grid-mount catalog?"),
            "{error}"
        );
    }
}
