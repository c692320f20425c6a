//! The control socket's other end: what the command line uses to talk to an agent.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Method, Request, Response, StatusCode, body::Incoming, client::conn::http1, header};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use tokio::net::UnixStream;

use super::control::{
    AgentInfo, CacheInfo, EvictOutcome, EvictRequest, Line, MountInfo, MountRequest, Problem, ProfileOutcome,
    ProfileRequest, UnmountOutcome, UnmountRequest, VerifyProgress, WarmProgress, WarmRequest,
};

/// An answer larger than this is not one of ours.
const MAX_ANSWER: usize = 64 << 20;
const MAX_LINE: usize = 1 << 20;

/// Covers a cold catalog and a large tree on a slow link; the agent's own deadlines end sooner.
const MOUNT_DEADLINE: Duration = Duration::from_secs(600);
const CONTROL_DEADLINE: Duration = Duration::from_secs(60);

#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("no agent listens on {socket}")]
    NoAgent {
        socket: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the agent on {socket} went away")]
    Gone {
        socket: PathBuf,
        #[source]
        source: hyper::Error,
    },
    #[error("the agent on {socket} did not answer within {} s", after.as_secs())]
    Deadline { socket: PathBuf, after: Duration },
    #[error(
        "the agent on {socket} gave an answer that this version does not understand; restart the agent after an upgrade"
    )]
    Protocol {
        socket: PathBuf,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("the agent on {socket} is just ending; try again")]
    Stopping { socket: PathBuf },
    /// The agent's own words.
    #[error("{0}")]
    Refused(String),
}

impl ClientError {
    /// There is no agent, or soon there will be none: a new one can be started.
    pub fn is_absence(&self) -> bool {
        matches!(
            self,
            Self::NoAgent { .. } | Self::Gone { .. } | Self::Stopping { .. }
        )
    }
}

/// Closed when this goes.
struct Connection(tokio::task::JoinHandle<hyper::Result<()>>);

impl Drop for Connection {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    pub fn new(socket: &Path) -> Self {
        Self {
            socket: socket.to_owned(),
        }
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }

    pub async fn agent(&self) -> Result<AgentInfo, ClientError> {
        self.call(Method::GET, "/v1/agent", None::<&()>, CONTROL_DEADLINE)
            .await
    }

    pub async fn mounts(&self) -> Result<Vec<MountInfo>, ClientError> {
        self.call(Method::GET, "/v1/mounts", None::<&()>, CONTROL_DEADLINE)
            .await
    }

    pub async fn mount(&self, request: &MountRequest) -> Result<MountInfo, ClientError> {
        self.call(Method::POST, "/v1/mounts", Some(request), MOUNT_DEADLINE)
            .await
    }

    pub async fn unmount(&self, request: &UnmountRequest) -> Result<Vec<UnmountOutcome>, ClientError> {
        self.call(Method::POST, "/v1/unmount", Some(request), CONTROL_DEADLINE)
            .await
    }

    pub async fn keep_profiles(&self, request: &ProfileRequest) -> Result<Vec<ProfileOutcome>, ClientError> {
        self.call(Method::POST, "/v1/profiles", Some(request), MOUNT_DEADLINE)
            .await
    }

    pub async fn cache(&self) -> Result<CacheInfo, ClientError> {
        self.call(Method::GET, "/v1/cache", None::<&()>, CONTROL_DEADLINE)
            .await
    }

    pub async fn evict(&self, request: &EvictRequest) -> Result<EvictOutcome, ClientError> {
        self.call(Method::POST, "/v1/cache/evict", Some(request), MOUNT_DEADLINE)
            .await
    }

    pub async fn verify(&self, seen: impl FnMut(VerifyProgress)) -> Result<VerifyProgress, ClientError> {
        self.follow("/v1/cache/verify", None::<&()>, seen).await
    }

    pub async fn warm(
        &self,
        request: &WarmRequest,
        seen: impl FnMut(WarmProgress),
    ) -> Result<WarmProgress, ClientError> {
        self.follow("/v1/warm", Some(request), seen).await
    }

    /// A long answer, line by line; how long it takes does not matter, only that lines keep coming.
    async fn follow<B: Serialize, T: DeserializeOwned>(
        &self,
        path: &str,
        body: Option<&B>,
        mut seen: impl FnMut(T),
    ) -> Result<T, ClientError> {
        let late = |_| ClientError::Deadline {
            socket: self.socket.clone(),
            after: CONTROL_DEADLINE,
        };
        let broken = |reason: &'static str| self.protocol(io::Error::other(reason));
        let sending = self.send(Method::POST, path, body);
        let (response, _connection) = tokio::time::timeout(CONTROL_DEADLINE, sending)
            .await
            .map_err(late)??;
        let status = response.status();
        let mut body = response.into_body();
        let mut buffer = Vec::new();
        loop {
            let frame = tokio::time::timeout(CONTROL_DEADLINE, body.frame())
                .await
                .map_err(late)?;
            let ended = frame.is_none();
            if let Some(frame) = frame {
                let frame = frame.map_err(|source| ClientError::Gone {
                    socket: self.socket.clone(),
                    source,
                })?;
                buffer.extend_from_slice(frame.data_ref().map_or(&[][..], |data| data));
            }
            if !status.is_success() {
                if ended {
                    return Err(self.problem(status, &buffer));
                }
            } else {
                while let Some(end) = buffer.iter().position(|byte| *byte == b'\n') {
                    let line: Vec<u8> = buffer.drain(..=end).collect();
                    match serde_json::from_slice(&line).map_err(|source| self.protocol(source))? {
                        Line::Progress(progress) => seen(progress),
                        Line::Done(done) => return Ok(done),
                        Line::Failed(problem) => return Err(ClientError::Refused(problem.message)),
                    }
                }
            }
            if ended {
                return Err(broken("the answer has no end"));
            }
            if buffer.len() > MAX_LINE {
                return Err(broken("a line is too long"));
            }
        }
    }

    fn problem(&self, status: StatusCode, answer: &[u8]) -> ClientError {
        if status == StatusCode::SERVICE_UNAVAILABLE {
            return ClientError::Stopping {
                socket: self.socket.clone(),
            };
        }
        match serde_json::from_slice::<Problem>(answer) {
            Ok(problem) => ClientError::Refused(problem.message),
            Err(source) => self.protocol(source),
        }
    }

    async fn call<B: Serialize, A: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&B>,
        deadline: Duration,
    ) -> Result<A, ClientError> {
        let (status, answer) = tokio::time::timeout(deadline, self.exchange(method, path, body))
            .await
            .map_err(|_| ClientError::Deadline {
                socket: self.socket.clone(),
                after: deadline,
            })??;
        if status.is_success() {
            return serde_json::from_slice(&answer).map_err(|source| self.protocol(source));
        }
        Err(self.problem(status, &answer))
    }

    async fn exchange<B: Serialize>(
        &self,
        method: Method,
        path: &str,
        body: Option<&B>,
    ) -> Result<(StatusCode, Bytes), ClientError> {
        let (response, _connection) = self.send(method, path, body).await?;
        let status = response.status();
        let answer = Limited::new(response.into_body(), MAX_ANSWER)
            .collect()
            .await
            .map_err(|source| ClientError::Protocol {
                socket: self.socket.clone(),
                source,
            })?
            .to_bytes();
        Ok((status, answer))
    }

    async fn send<B: Serialize>(
        &self,
        method: Method,
        path: &str,
        body: Option<&B>,
    ) -> Result<(Response<Incoming>, Connection), ClientError> {
        let stream = UnixStream::connect(&self.socket)
            .await
            .map_err(|source| ClientError::NoAgent {
                socket: self.socket.clone(),
                source,
            })?;
        let gone = |source| ClientError::Gone {
            socket: self.socket.clone(),
            source,
        };
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(gone)?;
        let connection = Connection(tokio::spawn(connection));
        let body = match body {
            Some(body) => Bytes::from(serde_json::to_vec(body).map_err(|source| self.protocol(source))?),
            None => Bytes::new(),
        };
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "localhost")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(body))
            .map_err(|source| self.protocol(source))?;
        let response = sender.send_request(request).await.map_err(gone)?;
        Ok((response, connection))
    }

    fn protocol(&self, source: impl std::error::Error + Send + Sync + 'static) -> ClientError {
        ClientError::Protocol {
            socket: self.socket.clone(),
            source: Box::new(source),
        }
    }
}
