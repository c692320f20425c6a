//! The control socket's other end: what the command line uses to talk to an agent.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Method, Request, StatusCode, client::conn::http1, header};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use tokio::net::UnixStream;

use super::control::{AgentInfo, MountInfo, MountRequest, Problem, UnmountOutcome, UnmountRequest};

/// An answer larger than this is not one of ours.
const MAX_ANSWER: usize = 64 << 20;

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
        if status == StatusCode::SERVICE_UNAVAILABLE {
            return Err(ClientError::Stopping {
                socket: self.socket.clone(),
            });
        }
        let problem: Problem = serde_json::from_slice(&answer).map_err(|source| self.protocol(source))?;
        Err(ClientError::Refused(problem.message))
    }

    async fn exchange<B: Serialize>(
        &self,
        method: Method,
        path: &str,
        body: Option<&B>,
    ) -> Result<(StatusCode, Bytes), ClientError> {
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
        let connection = tokio::spawn(connection);
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
        let status = response.status();
        let answer = Limited::new(response.into_body(), MAX_ANSWER)
            .collect()
            .await
            .map_err(|source| ClientError::Protocol {
                socket: self.socket.clone(),
                source,
            })?
            .to_bytes();
        connection.abort();
        Ok((status, answer))
    }

    fn protocol(&self, source: impl std::error::Error + Send + Sync + 'static) -> ClientError {
        ClientError::Protocol {
            socket: self.socket.clone(),
            source: Box::new(source),
        }
    }
}
