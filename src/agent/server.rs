//! The control socket's HTTP server.
//!
//! Everybody may connect to an agent of many users, so nothing that a caller does may cost the others more
//! than a bounded share: connections are counted by user, heads and bodies have deadlines and sizes, an
//! answer that nobody reads is given up. Who calls is what the kernel says (SO_PEERCRED and its like).

use std::{
    collections::BTreeMap,
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::{
    Extension, Json, Router,
    body::Body,
    extract::{FromRequest, Request, State},
    http::{Method, StatusCode, Uri, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use parking_lot::Mutex;
use serde::{Serialize, de::DeserializeOwned};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{UnixListener, UnixStream},
    sync::{mpsc, watch},
    task::JoinSet,
    time::{Instant, Sleep},
};
use tokio_util::sync::CancellationToken;

use crate::causes::in_one_line;

use super::{
    Agent, AgentError, UnderWay,
    access::Caller,
    control::{
        AgentInfo, CacheInfo, EvictOutcome, EvictRequest, Line, MountInfo, MountRequest, Problem,
        ProfileOutcome, ProfileRequest, ReloadOutcome, UnmountOutcome, UnmountRequest, WarmRequest,
    },
    snapshot::SnapshotError,
};

/// Connections open at once, all users together, and of one of them. Further ones take the place of one
/// that has not asked anything yet, or are turned away.
const MAX_CONNECTIONS: usize = 1024;
const MAX_OF_A_USER: usize = 128;
/// A request holds a reference, a path and a few credentials.
const MAX_REQUEST: usize = 64 << 10;
/// Of a request's head.
const MAX_HEAD: usize = 16 << 10;
/// For the head of a request to arrive, and then for its body.
const REQUEST_DEADLINE: Duration = Duration::from_secs(10);
/// An answer of which nobody takes a byte for so long is given up.
const STALLED: Duration = Duration::from_secs(30);
/// For requests under way when the agent ends.
const END_DEADLINE: Duration = Duration::from_secs(5);
/// Between two lines of a long answer.
const PROGRESS_EVERY: Duration = Duration::from_millis(200);
/// After a failed accept (out of descriptors), so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves until `stop` resolves; requests under way are finished first.
pub async fn serve(
    agent: Arc<Agent>,
    listener: UnixListener,
    stop: impl Future<Output = ()>,
) -> io::Result<()> {
    let routes = Router::new()
        .route("/metrics", get(super::metrics::answer))
        .route("/v1/agent", get(info))
        .route("/v1/mounts", get(mounts).post(mount))
        .route("/v1/unmount", post(unmount))
        .route("/v1/profiles", post(profiles))
        .route("/v1/cache", get(cache))
        .route("/v1/cache/evict", post(evict))
        .route("/v1/cache/verify", post(verify))
        .route("/v1/warm", post(warm))
        .route("/v1/reload", post(reload))
        .fallback(nowhere)
        .method_not_allowed_fallback(not_so)
        .layer(middleware::from_fn(whole_request))
        .with_state(Arc::clone(&agent));
    let open = Arc::new(Mutex::new(Connections::default()));
    let ending = CancellationToken::new();
    let mut tasks = JoinSet::new();
    let mut stop = std::pin::pin!(stop);
    loop {
        let accepted = tokio::select! {
            () = &mut stop => break,
            Some(_) = tasks.join_next() => continue,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "a control connection was not accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let caller = match Caller::of(&stream) {
            Ok(caller) if agent.access.admits(&caller) => caller,
            Ok(caller) => {
                tracing::warn!(
                    uid = caller.uid(),
                    "a control connection of another user was refused"
                );
                continue;
            }
            // It has gone already, or nothing is known of it.
            Err(error) => {
                tracing::debug!(%error, "a control connection of nobody known was refused");
                continue;
            }
        };
        let Some(connection) = Connection::open(&open, caller.uid()) else {
            tracing::debug!(uid = caller.uid(), "too many control connections");
            turn_away(&stream);
            continue;
        };
        tasks.spawn(converse(
            stream,
            connection,
            caller,
            routes.clone(),
            ending.clone(),
        ));
    }
    drop(listener);
    ending.cancel();
    let finished = async { while tasks.join_next().await.is_some() {} };
    // A connection that its caller leaves open ends with the process.
    let _ = tokio::time::timeout(END_DEADLINE, finished).await;
    Ok(())
}

/// One connection, one request.
async fn converse(
    stream: UnixStream,
    connection: Connection,
    caller: Arc<Caller>,
    routes: Router,
    ending: CancellationToken,
) {
    let asked = Arc::clone(&connection.place);
    let service = routes
        .layer(middleware::from_fn(move |request: Request, next: Next| {
            asked.asked.store(true, Ordering::Relaxed);
            next.run(request)
        }))
        .layer(Extension(caller));
    let serving = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(REQUEST_DEADLINE)
        .keep_alive(false)
        .max_buf_size(MAX_HEAD)
        .serve_connection(
            TokioIo::new(Impatient::new(stream)),
            TowerToHyperService::new(service),
        );
    let mut serving = std::pin::pin!(serving);
    let mut told = false;
    loop {
        tokio::select! {
            result = &mut serving => {
                if let Err(error) = result {
                    tracing::debug!(%error, "a control connection ended early");
                }
                return;
            }
            () = connection.place.wanted.cancelled() => return,
            () = ending.cancelled(), if !told => {
                told = true;
                serving.as_mut().graceful_shutdown();
            }
        }
    }
}

/// Says so without waiting for anybody.
fn turn_away(stream: &UnixStream) {
    const ANSWER: &[u8] =
        b"HTTP/1.1 429 Too Many Requests\r\nconnection: close\r\ncontent-type: application/json\r\n\
        content-length: 62\r\n\r\n{\"message\":\"too many connections at once; try again in a while\"}";
    let _ = stream.try_write(ANSWER);
}

/// Takes in all of a request before anything is done for it.
async fn whole_request(request: Request, next: Next) -> Response {
    let (head, body) = request.into_parts();
    let body = match tokio::time::timeout(REQUEST_DEADLINE, axum::body::to_bytes(body, MAX_REQUEST)).await {
        Ok(Ok(body)) => body,
        Ok(Err(_)) => {
            let message = format!("a request is {MAX_REQUEST} bytes at most");
            return Refusal(StatusCode::PAYLOAD_TOO_LARGE, message).into_response();
        }
        Err(_) => {
            let message = format!(
                "the request did not arrive within {} s",
                REQUEST_DEADLINE.as_secs()
            );
            return Refusal(StatusCode::REQUEST_TIMEOUT, message).into_response();
        }
    };
    next.run(Request::from_parts(head, Body::from(body))).await
}

type Peer = Extension<Arc<Caller>>;

async fn info(State(agent): State<Arc<Agent>>, Extension(caller): Peer) -> Json<AgentInfo> {
    Json(agent.info(&caller))
}

async fn mounts(State(agent): State<Arc<Agent>>, Extension(caller): Peer) -> Json<Vec<MountInfo>> {
    Json(agent.mounts_in_full(&caller).await)
}

/// A body of this form, or an answer in the form of every other error.
struct Asked<T>(T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Asked<T> {
    type Rejection = Refusal;

    async fn from_request(request: Request, state: &S) -> Result<Self, Refusal> {
        match Json::from_request(request, state).await {
            Ok(Json(body)) => Ok(Self(body)),
            Err(rejection) => Err(Refusal(rejection.status(), rejection.body_text())),
        }
    }
}

async fn nowhere(uri: Uri) -> Refusal {
    Refusal(StatusCode::NOT_FOUND, format!("there is no {}", uri.path()))
}

async fn not_so(method: Method, uri: Uri) -> Refusal {
    let message = format!("{} takes no {method}", uri.path());
    Refusal(StatusCode::METHOD_NOT_ALLOWED, message)
}

async fn mount(
    State(agent): State<Arc<Agent>>,
    Extension(caller): Peer,
    Asked(request): Asked<MountRequest>,
) -> Result<Json<MountInfo>, Refusal> {
    // In a task of its own: a caller who goes away must leave a whole mount or none.
    let mounting = tokio::spawn(async move { agent.mount(&caller, request).await });
    match mounting.await {
        Ok(result) => Ok(Json(result?)),
        Err(error) => Err(Refusal(StatusCode::INTERNAL_SERVER_ERROR, error.to_string())),
    }
}

async fn unmount(
    State(agent): State<Arc<Agent>>,
    Extension(caller): Peer,
    Asked(request): Asked<UnmountRequest>,
) -> Result<Json<Vec<UnmountOutcome>>, Refusal> {
    Ok(Json(agent.unmount(&caller, request).await?))
}

async fn profiles(
    State(agent): State<Arc<Agent>>,
    Extension(caller): Peer,
    Asked(request): Asked<ProfileRequest>,
) -> Result<Json<Vec<ProfileOutcome>>, Refusal> {
    Ok(Json(agent.keep_profiles(&caller, &request).await?))
}

async fn cache(State(agent): State<Arc<Agent>>) -> Json<CacheInfo> {
    Json(agent.cache_info().await)
}

async fn evict(
    State(agent): State<Arc<Agent>>,
    Extension(caller): Peer,
    Asked(request): Asked<EvictRequest>,
) -> Result<Json<EvictOutcome>, Refusal> {
    Ok(Json(agent.evict(&caller, request).await?))
}

async fn verify(State(agent): State<Arc<Agent>>, Extension(caller): Peer) -> Result<Response, Refusal> {
    agent.access.administrators(&caller).map_err(AgentError::from)?;
    // Before the first line, so that the caller of an agent that is just ending can ask the next one.
    let held = UnderWay::begin(&agent)?;
    Ok(lines(move |progress| async move {
        let _held = held;
        agent.verify(progress).await
    }))
}

async fn reload(
    State(agent): State<Arc<Agent>>,
    Extension(caller): Peer,
) -> Result<Json<ReloadOutcome>, Refusal> {
    agent.access.administrators(&caller).map_err(AgentError::from)?;
    Ok(Json(agent.reload().await?))
}

async fn warm(
    State(agent): State<Arc<Agent>>,
    Extension(caller): Peer,
    Asked(request): Asked<WarmRequest>,
) -> Result<Response, Refusal> {
    let held = UnderWay::begin(&agent)?;
    Ok(lines(move |progress| async move {
        let _held = held;
        agent.warm(&caller, request, progress).await
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
            AgentError::Access(_)
            | AgentError::Snapshot {
                source: SnapshotError::Access(_),
                ..
            } => StatusCode::FORBIDDEN,
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

/// The connections that are open, by user, the oldest first.
#[derive(Default)]
struct Connections {
    count: usize,
    of: BTreeMap<u32, Vec<Arc<Place>>>,
}

#[derive(Default)]
struct Place {
    /// Its request is there.
    asked: AtomicBool,
    /// By a later connection.
    wanted: CancellationToken,
}

/// One of them, for as long as it is open.
struct Connection {
    open: Arc<Mutex<Connections>>,
    uid: u32,
    place: Arc<Place>,
}

impl Connection {
    /// `None` if there is no place: neither a free one nor one of the same user's that is of no use.
    fn open(open: &Arc<Mutex<Connections>>, uid: u32) -> Option<Self> {
        let mut connections = open.lock();
        // Root is let in however many there are of others.
        let full = connections.count >= MAX_CONNECTIONS && uid != 0;
        let theirs = connections.of.entry(uid).or_default();
        if full || theirs.len() >= MAX_OF_A_USER {
            let idle =
                |place: &Arc<Place>| !place.asked.load(Ordering::Relaxed) && !place.wanted.is_cancelled();
            // It leaves within an instant: there may be one too many until then.
            theirs.iter().find(|place| idle(place))?.wanted.cancel();
        }
        let place = Arc::new(Place::default());
        theirs.push(Arc::clone(&place));
        connections.count += 1;
        drop(connections);
        Some(Self {
            open: Arc::clone(open),
            uid,
            place,
        })
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let mut connections = self.open.lock();
        connections.count -= 1;
        if let Some(theirs) = connections.of.get_mut(&self.uid) {
            theirs.retain(|place| !Arc::ptr_eq(place, &self.place));
            if theirs.is_empty() {
                connections.of.remove(&self.uid);
            }
        }
    }
}

/// A stream that gives up when nobody takes what is written.
struct Impatient {
    stream: UnixStream,
    stalled: Option<Pin<Box<Sleep>>>,
}

impl Impatient {
    fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            stalled: None,
        }
    }

    fn patience(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let sleep = self
            .stalled
            .get_or_insert_with(|| Box::pin(tokio::time::sleep_until(Instant::now() + STALLED)));
        ready!(sleep.as_mut().poll(context));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for Impatient {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buf)
    }
}

impl AsyncWrite for Impatient {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        match Pin::new(&mut self.stream).poll_write(context, buf) {
            Poll::Pending => self.patience(context).map_ok(|()| 0),
            written => {
                self.stalled = None;
                written
            }
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
