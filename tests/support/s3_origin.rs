//! An S3-protocol origin within the process: cheap on CPU, shaped, faulty on demand, and counting.
//!
//! Speaks as much of S3 as `object_store`'s client needs: GET with Range and If-Match, HEAD, PUT with
//! If-None-Match, DELETE (bulk too), multipart uploads, ListObjectsV2. Signatures are not checked.

#![allow(dead_code)]

use std::{
    collections::{BTreeMap, VecDeque},
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{TcpListener, TcpStream},
    sync::watch,
};

/// What becomes of one GET of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// An empty answer with this status.
    Status(u16),
    /// An S3 error with this status and code.
    Error(u16, &'static str),
    /// The connection is closed before any answer.
    Reset,
    /// Half of the body, then the connection is closed.
    Truncated,
    /// More body than the range has, announced as such.
    Overlong,
    /// The bytes (and the Content-Range) of another range.
    WrongRange,
    /// Another object's ETag.
    WrongETag,
    /// The right headers, and bytes that were flipped.
    Flipped,
    /// No answer, ever.
    Stall,
    /// Half of the body, then nothing.
    StallInBody,
    /// This long before the first byte.
    Late(Duration),
}

#[derive(Clone, Debug, Default)]
pub struct Shape {
    pub first_byte: Duration,
    /// Bytes a second and connection; 0: unlimited.
    pub rate: u64,
    /// One GET in so many is late by `straggle`; 0: none.
    pub straggler_every: u64,
    pub straggle: Duration,
    /// Before a write is answered.
    pub write: Duration,
}

#[derive(Default)]
pub struct Counts {
    pub gets: AtomicU64,
    pub puts: AtomicU64,
    pub heads: AtomicU64,
    pub lists: AtomicU64,
    pub body_bytes: AtomicU64,
    pub connections: AtomicU64,
}

#[derive(Clone)]
enum Body {
    Bytes(Bytes),
    /// So many times the same byte, of which none is kept.
    Uniform(u64),
}

impl Body {
    fn len(&self) -> usize {
        match self {
            Body::Bytes(bytes) => bytes.len(),
            Body::Uniform(size) => *size as usize,
        }
    }

    fn slice(&self, range: std::ops::Range<usize>) -> Self {
        match self {
            Body::Bytes(bytes) => Body::Bytes(bytes.slice(range)),
            Body::Uniform(_) => Body::Uniform(range.len() as u64),
        }
    }

    /// All of it in memory.
    fn bytes(&self) -> Bytes {
        match self {
            Body::Bytes(bytes) => bytes.clone(),
            Body::Uniform(size) => vec![UNIFORM; *size as usize].into(),
        }
    }
}

#[derive(Clone)]
struct Stored {
    body: Body,
    etag: String,
}

#[derive(Default)]
struct State {
    objects: Mutex<BTreeMap<String, Stored>>,
    uploads: Mutex<BTreeMap<String, BTreeMap<u32, Bytes>>>,
    faults: Mutex<VecDeque<Fault>>,
    always: Mutex<Option<Fault>>,
    shape: Mutex<Shape>,
    counts: Counts,
    next: AtomicU64,
    closed: AtomicBool,
    /// Bytes of an object from here on wait.
    withheld: watch::Sender<Option<u64>>,
    /// The offsets of ranged GETs, in order.
    ranges: Mutex<Vec<(String, u64, u64)>>,
    /// The id of the only access key that is taken, and with what error others are refused.
    keys: Mutex<Option<(String, u16, &'static str)>>,
    /// Until when keys of these ids are taken; `None`: any key for ever.
    lent: Mutex<Option<BTreeMap<String, Instant>>>,
    /// Requests refused for their keys.
    refused: AtomicU64,
    /// (key, size) of every object that came to be, in order; one that is overwritten, again.
    written: Mutex<Vec<(String, u64)>>,
}

/// Serves one bucket (`bucket`) until dropped.
pub struct S3Origin {
    state: Arc<State>,
    address: SocketAddr,
    accept: tokio::task::JoinHandle<()>,
}

impl Drop for S3Origin {
    fn drop(&mut self) {
        // An abort comes when it comes; whoever asks after this line finds nobody.
        self.state.closed.store(true, Relaxed);
        self.accept.abort();
    }
}

impl S3Origin {
    /// What lies at this offset of any object and after it comes only once this is lifted.
    pub fn withhold(&self, from: Option<u64>) {
        self.state.withheld.send_replace(from);
    }

    pub async fn start(shape: Shape) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let state = Arc::new(State {
            shape: Mutex::new(shape),
            ..State::default()
        });
        let served = Arc::clone(&state);
        let accept = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                served.counts.connections.fetch_add(1, Relaxed);
                let _ = stream.set_nodelay(true);
                connections.spawn(serve(Arc::clone(&served), stream));
            }
        });
        Self {
            state,
            address,
            accept,
        }
    }

    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn settings(&self) -> Vec<(String, String)> {
        settings(&self.endpoint())
    }

    pub fn counts(&self) -> &Counts {
        &self.state.counts
    }

    /// (key, offset, length) of every ranged GET so far.
    pub fn ranges(&self) -> Vec<(String, u64, u64)> {
        self.state.ranges.lock().expect("ranges").clone()
    }

    /// (key, size) of every object written so far, in order.
    pub fn written(&self) -> Vec<(String, u64)> {
        self.state.written.lock().expect("written").clone()
    }

    pub fn put(&self, key: &str, bytes: impl Into<Bytes>) -> String {
        store(&self.state, key, Body::Bytes(bytes.into()))
    }

    /// An object of `size` bytes that are all the same, which takes no memory.
    pub fn put_uniform(&self, key: &str, size: u64) -> String {
        store(&self.state, key, Body::Uniform(size))
    }

    /// The next GETs meet these, one each.
    pub fn faults(&self, faults: impl IntoIterator<Item = Fault>) {
        self.state.faults.lock().expect("faults").extend(faults);
    }

    pub fn always(&self, fault: Option<Fault>) {
        *self.state.always.lock().expect("fault") = fault;
    }

    /// From now on only requests signed with the key of this id are served; others get this error.
    pub fn take_only(&self, key: &str, status: u16, code: &'static str) {
        *self.state.keys.lock().expect("keys") = Some((key.to_owned(), status, code));
    }

    /// From the first call on only requests signed with such keys are served, and for so long.
    pub fn take_for(&self, key: &str, life: Duration) {
        let mut lent = self.state.lent.lock().expect("lent keys");
        lent.get_or_insert_default()
            .insert(key.to_owned(), Instant::now() + life);
    }

    /// Requests refused for their keys so far.
    pub fn refused(&self) -> u64 {
        self.state.refused.load(Relaxed)
    }

    pub fn shape(&self, shape: Shape) {
        *self.state.shape.lock().expect("shape") = shape;
    }
}

/// For a store's client.
pub fn settings(endpoint: &str) -> Vec<(String, String)> {
    [
        ("AWS_ENDPOINT_URL", endpoint),
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "test"),
        ("AWS_REGION", "us-east-1"),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .into()
}

fn store(state: &State, key: &str, body: Body) -> String {
    let written = (key.to_owned(), body.len() as u64);
    state.written.lock().expect("written").push(written);
    let etag = format!("\"{:016x}\"", state.next.fetch_add(1, Relaxed) + 1);
    let stored = Stored {
        body,
        etag: etag.clone(),
    };
    state
        .objects
        .lock()
        .expect("objects")
        .insert(key.to_owned(), stored);
    etag
}

struct Request {
    method: String,
    key: String,
    query: BTreeMap<String, String>,
    headers: BTreeMap<String, String>,
    body: Bytes,
}

fn decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let (mut out, mut at) = (Vec::new(), 0);
    while at < bytes.len() {
        let hex = (bytes[at] == b'%').then(|| text.get(at + 1..at + 3)).flatten();
        match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(byte) => {
                out.push(byte);
                at += 3;
            }
            None => {
                out.push(bytes[at]);
                at += 1;
            }
        }
    }
    String::from_utf8(out).expect("UTF-8 keys")
}

async fn read_request(stream: &mut BufReader<TcpStream>) -> std::io::Result<Option<Request>> {
    let mut line = String::new();
    if stream.read_line(&mut line).await? == 0 {
        return Ok(None);
    }
    let mut words = line.split_whitespace();
    let method = words.next().unwrap_or_default().to_owned();
    let target = words.next().unwrap_or_default();
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let key = decode(
        path.trim_start_matches('/')
            .split_once('/')
            .map_or("", |(_, key)| key),
    );
    let query = query
        .split('&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
        .map(|(name, value)| (name.to_owned(), decode(&value.replace('+', " "))))
        .collect();
    let mut headers = BTreeMap::new();
    loop {
        let mut header = String::new();
        stream.read_line(&mut header).await?;
        let header = header.trim_end();
        if header.is_empty() {
            break;
        }
        if let Some((name, value)) = header.split_once(':') {
            headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
        }
    }
    let mut body = Vec::new();
    if headers
        .get("transfer-encoding")
        .is_some_and(|coding| coding == "chunked")
    {
        loop {
            let mut size = String::new();
            stream.read_line(&mut size).await?;
            let size = usize::from_str_radix(size.trim(), 16).unwrap_or(0);
            let mut chunk = vec![0; size + 2];
            stream.read_exact(&mut chunk).await?;
            if size == 0 {
                break;
            }
            body.extend_from_slice(&chunk[..size]);
        }
    } else if let Some(length) = headers
        .get("content-length")
        .and_then(|length| length.parse().ok())
    {
        body = vec![0; length];
        stream.read_exact(&mut body).await?;
    }
    Ok(Some(Request {
        method,
        key,
        query,
        headers,
        body: body.into(),
    }))
}

async fn serve(state: Arc<State>, stream: TcpStream) {
    let mut stream = BufReader::new(stream);
    while let Ok(Some(request)) = read_request(&mut stream).await {
        let refusal = state.keys.lock().expect("keys").clone().filter(|(key, ..)| {
            let signature = request.headers.get("authorization");
            !signature.is_some_and(|text| text.contains(&format!("Credential={key}/")))
        });
        let expired = state
            .lent
            .lock()
            .expect("lent keys")
            .as_ref()
            .is_some_and(|lent| {
                let signature = request.headers.get("authorization");
                let id = signature.and_then(|text| text.split_once("Credential=")?.1.split_once('/'));
                id.and_then(|(id, _)| lent.get(id))
                    .is_none_or(|until| *until < Instant::now())
            });
        let refusal = match refusal {
            None if expired => Some((String::new(), 403, "ExpiredToken")),
            refusal => refusal,
        };
        if let Some((_, status, code)) = refusal {
            state.refused.fetch_add(1, Relaxed);
            if error(&mut stream, status, code).await.is_err() {
                return;
            }
            continue;
        }
        if state.closed.load(Relaxed) {
            return;
        }
        let kept = match (request.method.as_str(), request.query.contains_key("list-type")) {
            ("GET", true) => list(&state, &mut stream, &request).await,
            ("GET", false) => get(&state, &mut stream, &request).await,
            ("HEAD", _) => head(&state, &mut stream, &request).await,
            ("PUT" | "POST" | "DELETE", _) => write(&state, &mut stream, &request).await,
            _ => answer(&mut stream, 405, "", b"").await,
        };
        if kept.is_err() {
            return;
        }
    }
}

async fn answer(
    stream: &mut BufReader<TcpStream>,
    status: u16,
    headers: &str,
    body: &[u8],
) -> std::io::Result<()> {
    let head = format!(
        "HTTP/1.1 {status} x\r\ncontent-length: {}\r\n{headers}\r\n",
        body.len()
    );
    stream.write_all(&[head.as_bytes(), body].concat()).await
}

async fn error(stream: &mut BufReader<TcpStream>, status: u16, code: &str) -> std::io::Result<()> {
    answer(
        stream,
        status,
        "content-type: application/xml\r\n",
        format!("<Error><Code>{code}</Code></Error>").as_bytes(),
    )
    .await
}

const MODIFIED: &str = "last-modified: Mon, 01 Jan 2024 00:00:00 GMT\r\n";

fn closed() -> std::io::Error {
    std::io::ErrorKind::ConnectionReset.into()
}

async fn head(state: &State, stream: &mut BufReader<TcpStream>, request: &Request) -> std::io::Result<()> {
    state.counts.heads.fetch_add(1, Relaxed);
    let found = state.objects.lock().expect("objects").get(&request.key).cloned();
    let text = match found {
        None => "HTTP/1.1 404 x\r\ncontent-length: 0\r\n\r\n".to_owned(),
        Some(found) => format!(
            "HTTP/1.1 200 x\r\ncontent-length: {}\r\netag: {}\r\n{MODIFIED}\r\n",
            found.body.len(),
            found.etag
        ),
    };
    stream.write_all(text.as_bytes()).await
}

async fn get(state: &State, stream: &mut BufReader<TcpStream>, request: &Request) -> std::io::Result<()> {
    let number = state.counts.gets.fetch_add(1, Relaxed) + 1;
    let fault = {
        let next = state.faults.lock().expect("faults").pop_front();
        next.or(*state.always.lock().expect("fault"))
    };
    let shape = state.shape.lock().expect("shape").clone();
    tokio::time::sleep(shape.first_byte).await;
    if shape.straggler_every > 0 && number.is_multiple_of(shape.straggler_every) {
        tokio::time::sleep(shape.straggle).await;
    }
    match fault {
        Some(Fault::Status(status)) => return answer(stream, status, "", b"").await,
        Some(Fault::Error(status, code)) => return error(stream, status, code).await,
        Some(Fault::Reset) => return Err(closed()),
        Some(Fault::Stall) => std::future::pending::<()>().await,
        Some(Fault::Late(late)) => tokio::time::sleep(late).await,
        _ => {}
    }
    let found = state.objects.lock().expect("objects").get(&request.key).cloned();
    let Some(found) = found else {
        return error(stream, 404, "NoSuchKey").await;
    };
    if request
        .headers
        .get("if-match")
        .is_some_and(|tag| *tag != found.etag)
    {
        return error(stream, 412, "PreconditionFailed").await;
    }
    let size = found.body.len();
    let asked = request.headers.get("range").and_then(|range| {
        let (start, end) = range.strip_prefix("bytes=")?.split_once('-')?;
        let start: usize = start.parse().ok()?;
        let end = end.parse().map_or(size, |end: usize| end + 1).min(size);
        Some((start, end))
    });
    let (mut start, mut end) = asked.unwrap_or((0, size));
    if asked.is_some() && (start >= size || start >= end) {
        return error(stream, 416, "InvalidRange").await;
    }
    state
        .ranges
        .lock()
        .expect("ranges")
        .push((request.key.clone(), start as u64, (end - start) as u64));
    if fault == Some(Fault::WrongRange) {
        (start, end) = (start + 1, end + 1);
    }
    let mut body = found.body.slice(start.min(size)..end.min(size));
    if fault == Some(Fault::Flipped) {
        body = Body::Bytes(body.bytes().iter().map(|byte| !byte).collect());
    }
    if fault == Some(Fault::Overlong) {
        body = Body::Bytes([&body.bytes()[..], b"and more"].concat().into());
    }
    let etag = if fault == Some(Fault::WrongETag) {
        "\"another\""
    } else {
        &found.etag
    };
    let range = match asked {
        Some(_) => format!("content-range: bytes {start}-{}/{size}\r\n", end - 1),
        None => String::new(),
    };
    let head = format!(
        "HTTP/1.1 {} x\r\ncontent-length: {}\r\netag: {etag}\r\n{MODIFIED}{range}\r\n",
        if asked.is_some() { 206 } else { 200 },
        body.len()
    );
    stream.write_all(head.as_bytes()).await?;
    let cut = matches!(fault, Some(Fault::Truncated | Fault::StallInBody));
    let length = if cut { body.len() / 2 } else { body.len() };
    // Paced in pieces: enough of them to be smooth, few enough to cost nothing.
    let began = tokio::time::Instant::now();
    let mut done = 0;
    while done < length {
        let piece = done..(done + PIECE).min(length);
        let end = (start + piece.end) as u64;
        let mut withheld = state.withheld.subscribe();
        let free = withheld.wait_for(|from| from.is_none_or(|from| end <= from));
        free.await.map_err(|_| closed())?;
        match &body {
            Body::Bytes(bytes) => stream.write_all(&bytes[piece.clone()]).await?,
            Body::Uniform(_) => stream.write_all(&UNIFORM_PIECE[..piece.len()]).await?,
        }
        done = piece.end;
        state.counts.body_bytes.fetch_add(piece.len() as u64, Relaxed);
        if shape.rate > 0 {
            tokio::time::sleep_until(began + Duration::from_secs_f64(done as f64 / shape.rate as f64)).await;
        }
    }
    match fault {
        Some(Fault::Truncated) => Err(closed()),
        Some(Fault::StallInBody) => std::future::pending().await,
        _ => Ok(()),
    }
}

const PIECE: usize = 256 << 10;
const UNIFORM: u8 = 0x5a;

static UNIFORM_PIECE: [u8; PIECE] = [UNIFORM; PIECE];

async fn write(state: &State, stream: &mut BufReader<TcpStream>, request: &Request) -> std::io::Result<()> {
    state.counts.puts.fetch_add(1, Relaxed);
    let write = state.shape.lock().expect("shape").write;
    tokio::time::sleep(write).await;
    let upload = request.query.get("uploadId").cloned();
    match (request.method.as_str(), upload) {
        ("PUT", Some(upload)) => {
            let part = request
                .query
                .get("partNumber")
                .and_then(|part| part.parse().ok())
                .unwrap_or(0);
            state
                .uploads
                .lock()
                .expect("uploads")
                .entry(upload)
                .or_default()
                .insert(part, request.body.clone());
            answer(stream, 200, &format!("etag: \"part{part}\"\r\n"), b"").await
        }
        ("PUT", None) => {
            let etag = {
                let exists = state.objects.lock().expect("objects").contains_key(&request.key);
                let conditional = request.headers.get("if-none-match").is_some_and(|tag| tag == "*");
                if conditional && exists {
                    None
                } else {
                    Some(store(state, &request.key, Body::Bytes(request.body.clone())))
                }
            };
            match etag {
                Some(etag) => answer(stream, 200, &format!("etag: {etag}\r\n"), b"").await,
                None => error(stream, 412, "PreconditionFailed").await,
            }
        }
        ("POST", None) if request.query.contains_key("uploads") => {
            let id = state.next.fetch_add(1, Relaxed).to_string();
            state
                .uploads
                .lock()
                .expect("uploads")
                .insert(id.clone(), BTreeMap::new());
            let body = format!(
                "<InitiateMultipartUploadResult><UploadId>{id}</UploadId></InitiateMultipartUploadResult>"
            );
            answer(stream, 200, "", body.as_bytes()).await
        }
        ("POST", Some(upload)) => {
            let parts = state
                .uploads
                .lock()
                .expect("uploads")
                .remove(&upload)
                .unwrap_or_default();
            let parts: Vec<Bytes> = parts.into_values().collect();
            let whole = parts.concat();
            let etag = store(state, &request.key, Body::Bytes(whole.into()));
            let body =
                format!("<CompleteMultipartUploadResult><ETag>{etag}</ETag></CompleteMultipartUploadResult>");
            answer(stream, 200, "", body.as_bytes()).await
        }
        ("POST", None) => {
            let body = String::from_utf8_lossy(&request.body).into_owned();
            for key in body
                .split("<Key>")
                .skip(1)
                .filter_map(|rest| rest.split("</Key>").next())
            {
                state.objects.lock().expect("objects").remove(key);
            }
            answer(stream, 200, "", b"<DeleteResult></DeleteResult>").await
        }
        (_, Some(upload)) => {
            state.uploads.lock().expect("uploads").remove(&upload);
            answer(stream, 204, "", b"").await
        }
        _ => {
            state.objects.lock().expect("objects").remove(&request.key);
            answer(stream, 204, "", b"").await
        }
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

async fn list(state: &State, stream: &mut BufReader<TcpStream>, request: &Request) -> std::io::Result<()> {
    state.counts.lists.fetch_add(1, Relaxed);
    let get = |name: &str| request.query.get(name).cloned().unwrap_or_default();
    let (prefix, delimiter) = (get("prefix"), get("delimiter"));
    let after = get("start-after").max(get("continuation-token"));
    let most = get("max-keys").parse().unwrap_or(1000);
    let mut body = String::from("<ListBucketResult>");
    let (mut last, mut count, mut more) = (String::new(), 0, false);
    {
        let objects = state.objects.lock().expect("objects");
        for (key, stored) in objects
            .range(prefix.clone().max(after.clone())..)
            .take_while(|(key, _)| key.starts_with(&prefix))
        {
            if *key <= after
                || (!last.is_empty()
                    && last.ends_with('/')
                    && !delimiter.is_empty()
                    && key.starts_with(&last))
            {
                continue;
            }
            if count == most {
                more = true;
                break;
            }
            count += 1;
            let rest = &key[prefix.len()..];
            match (delimiter.is_empty(), rest.find('/')) {
                (false, Some(at)) => {
                    last = format!("{prefix}{}", &rest[..=at]);
                    body += &format!(
                        "<CommonPrefixes><Prefix>{}</Prefix></CommonPrefixes>",
                        escape(&last)
                    );
                }
                _ => {
                    last = key.clone();
                    body += &format!(
                        "<Contents><Key>{}</Key><Size>{}</Size><ETag>{}</ETag><LastModified>2024-01-01T00:00:00.000Z</LastModified></Contents>",
                        escape(key),
                        stored.body.len(),
                        escape(&stored.etag)
                    );
                }
            }
        }
    }
    if more {
        body += &format!("<NextContinuationToken>{}</NextContinuationToken>", escape(&last));
    }
    body += &format!("<IsTruncated>{more}</IsTruncated></ListBucketResult>");
    answer(stream, 200, "content-type: application/xml\r\n", body.as_bytes()).await
}
