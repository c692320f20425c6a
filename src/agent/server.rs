//! The control socket's HTTP server. Who may connect is decided here, from what the kernel says of
//! the caller (SO_PEERCRED): this agent's own user, and root.

use std::{io, sync::Arc, time::Duration};

use axum::{
    Json, Router,
    extract::{DefaultBodyLimit, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{get, post},
    serve::Listener,
};
use nix::unistd::Uid;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{UnixListener, UnixStream, unix::SocketAddr},
    sync::{OwnedSemaphorePermit, Semaphore},
};

use crate::causes::in_one_line;

use super::{
    Agent, AgentError,
    control::{AgentInfo, MountInfo, MountRequest, Problem, UnmountOutcome, UnmountRequest},
};

/// Connections served at once; further ones wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 64;
/// A request holds a reference, a path and a few credentials.
const MAX_REQUEST: usize = 256 << 10;
/// After a failed accept (out of descriptors), so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves until `stop` resolves; requests under way are finished first.
pub async fn serve(
    agent: Arc<Agent>,
    listener: UnixListener,
    stop: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let routes = Router::new()
        .route("/v1/agent", get(info))
        .route("/v1/mounts", get(mounts).post(mount))
        .route("/v1/unmount", post(unmount))
        .layer(DefaultBodyLimit::max(MAX_REQUEST))
        .with_state(agent);
    let listener = PeerListener {
        listener,
        permits: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
        uid: Uid::effective(),
    };
    axum::serve(listener, routes).with_graceful_shutdown(stop).await
}

async fn info(State(agent): State<Arc<Agent>>) -> Json<AgentInfo> {
    Json(agent.info())
}

async fn mounts(State(agent): State<Arc<Agent>>) -> Json<Vec<MountInfo>> {
    Json(agent.mounts())
}

async fn mount(
    State(agent): State<Arc<Agent>>,
    Json(request): Json<MountRequest>,
) -> Result<Json<MountInfo>, Refusal> {
    // In a task of its own: a caller who goes away must leave a whole mount or none.
    let mounting = tokio::spawn(async move { agent.mount(request).await });
    match mounting.await {
        Ok(result) => Ok(Json(result?)),
        Err(error) => Err(Refusal(StatusCode::INTERNAL_SERVER_ERROR, error.to_string())),
    }
}

async fn unmount(
    State(agent): State<Arc<Agent>>,
    Json(request): Json<UnmountRequest>,
) -> Result<Json<Vec<UnmountOutcome>>, Refusal> {
    Ok(Json(agent.unmount(request).await?))
}

struct Refusal(StatusCode, String);

impl From<AgentError> for Refusal {
    fn from(error: AgentError) -> Self {
        let status = match error {
            AgentError::Stopping => StatusCode::SERVICE_UNAVAILABLE,
            _ => StatusCode::UNPROCESSABLE_ENTITY,
        };
        Self(status, in_one_line(&error))
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.0, Json(Problem { message: self.1 })).into_response()
    }
}

/// Lets in this agent's user and root, a bounded number at a time.
struct PeerListener {
    listener: UnixListener,
    permits: Arc<Semaphore>,
    uid: Uid,
}

impl Listener for PeerListener {
    type Io = Admitted;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            let Ok(permit) = Arc::clone(&self.permits).acquire_owned().await else {
                // The semaphore is never closed.
                std::future::pending::<()>().await;
                continue;
            };
            let (stream, address) = match self.listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "a control connection was not accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            match stream.peer_cred() {
                Ok(peer) if peer.uid() == self.uid.as_raw() || peer.uid() == 0 => {
                    return (
                        Admitted {
                            stream,
                            _permit: permit,
                        },
                        address,
                    );
                }
                Ok(peer) => tracing::warn!(
                    uid = peer.uid(),
                    "a control connection of another user was refused"
                ),
                Err(error) => tracing::warn!(%error, "a control connection of nobody known was refused"),
            }
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.listener.local_addr()
    }
}

struct Admitted {
    stream: UnixStream,
    _permit: OwnedSemaphorePermit,
}

impl AsyncRead for Admitted {
    fn poll_read(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> std::task::Poll<io::Result<()>> {
        std::pin::Pin::new(&mut self.stream).poll_read(context, buf)
    }
}

impl AsyncWrite for Admitted {
    fn poll_write(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
        buf: &[u8],
    ) -> std::task::Poll<io::Result<usize>> {
        std::pin::Pin::new(&mut self.stream).poll_write(context, buf)
    }

    fn poll_flush(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<io::Result<()>> {
        std::pin::Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<io::Result<()>> {
        std::pin::Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
