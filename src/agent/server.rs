//! The control socket's HTTP server. Who may connect is decided here, from what the kernel says of
//! the caller (SO_PEERCRED): this agent's own user, and root.

use std::{io, sync::Arc, time::Duration};

use axum::{
    Json, Router,
    body::Body,
    extract::{DefaultBodyLimit, State},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::{get, post},
    serve::Listener,
};
use nix::unistd::Uid;
use serde::Serialize;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{UnixListener, UnixStream, unix::SocketAddr},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch},
};

use crate::causes::in_one_line;

use super::{
    Agent, AgentError, UnderWay,
    control::{
        AgentInfo, CacheInfo, EvictOutcome, EvictRequest, Line, MountInfo, MountRequest, Problem,
        UnmountOutcome, UnmountRequest, WarmRequest,
    },
};

/// Connections served at once; further ones wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 64;
/// A request holds a reference, a path and a few credentials.
const MAX_REQUEST: usize = 256 << 10;
/// Between two lines of a long answer.
const PROGRESS_EVERY: Duration = Duration::from_millis(200);
/// After a failed accept (out of descriptors), so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves until `stop` resolves; requests under way are finished first.
pub async fn serve(
    agent: Arc<Agent>,
    listener: UnixListener,
    stop: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let routes = Router::new()
        .route("/metrics", get(super::metrics::answer))
        .route("/v1/agent", get(info))
        .route("/v1/mounts", get(mounts).post(mount))
        .route("/v1/unmount", post(unmount))
        .route("/v1/cache", get(cache))
        .route("/v1/cache/evict", post(evict))
        .route("/v1/cache/verify", post(verify))
        .route("/v1/warm", post(warm))
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
    Json(agent.mounts_in_full().await)
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

async fn cache(State(agent): State<Arc<Agent>>) -> Json<CacheInfo> {
    Json(agent.cache_info().await)
}

async fn evict(
    State(agent): State<Arc<Agent>>,
    Json(request): Json<EvictRequest>,
) -> Result<Json<EvictOutcome>, Refusal> {
    Ok(Json(agent.evict(request).await?))
}

async fn verify(State(agent): State<Arc<Agent>>) -> Result<Response, Refusal> {
    // Before the first line, so that the caller of an agent that is just ending can ask the next one.
    let held = UnderWay::begin(&agent)?;
    Ok(lines(move |progress| async move {
        let _held = held;
        agent.verify(progress).await
    }))
}

async fn warm(
    State(agent): State<Arc<Agent>>,
    Json(request): Json<WarmRequest>,
) -> Result<Response, Refusal> {
    let held = UnderWay::begin(&agent)?;
    Ok(lines(move |progress| async move {
        let _held = held;
        agent.warm(request, progress).await
    }))
}

/// Answers with a line of progress now and then, and the outcome as the last one. The work ends when
/// nobody reads any more.
fn lines<T, F>(work: impl FnOnce(watch::Sender<T>) -> F + Send + 'static) -> Response
where
    T: Default + Clone + Send + Sync + Serialize + 'static,
    F: Future<Output = Result<T, AgentError>> + Send + 'static,
{
    let (sender, receiver) = mpsc::channel::<Vec<u8>>(1);
    tokio::spawn(async move {
        let (progress, seen) = watch::channel(T::default());
        let mut work = std::pin::pin!(work(progress));
        loop {
            let (line, last) = tokio::select! {
                outcome = &mut work => match outcome {
                    Ok(done) => (Line::Done(done), true),
                    Err(error) => (Line::Failed(Problem { message: in_one_line(&error) }), true),
                },
                () = tokio::time::sleep(PROGRESS_EVERY) => (Line::Progress(seen.borrow().clone()), false),
            };
            let Ok(mut bytes) = serde_json::to_vec(&line) else {
                return;
            };
            bytes.push(b'\n');
            if sender.send(bytes).await.is_err() || last {
                return;
            }
        }
    });
    let body = futures::stream::unfold(receiver, |mut receiver| async move {
        let bytes = receiver.recv().await?;
        Some((Ok::<_, std::convert::Infallible>(bytes), receiver))
    });
    (
        [(header::CONTENT_TYPE, "application/x-ndjson")],
        Body::from_stream(body),
    )
        .into_response()
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
