//! An S3 bucket that only lists: keys are made up as they are asked for, so that ten million cost nothing.

use std::{
    io::{BufRead, BufReader, Result, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

/// What AWS gives at most.
const PAGE: u64 = 1000;

/// Ascending keys by their number.
pub type Keys = Box<dyn Fn(u64) -> String + Send + Sync>;

struct State {
    count: u64,
    key: Keys,
    asked: AtomicU64,
    begun: AtomicU64,
}

/// Serves for as long as the process lives.
pub struct Bucket {
    address: SocketAddr,
    state: Arc<State>,
}

impl Bucket {
    pub fn start(count: u64, key: Keys) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let state = Arc::new(State {
            count,
            key,
            asked: AtomicU64::new(0),
            begun: AtomicU64::new(0),
        });
        let served = Arc::clone(&state);
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let state = Arc::clone(&served);
                // A connection that breaks off is its client's affair.
                thread::spawn(move || serve(&state, stream).ok());
            }
        });
        Ok(Self { address, state })
    }

    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn pages_asked(&self) -> u64 {
        self.state.asked.load(Ordering::Relaxed)
    }

    /// Listings begun: one for each range of keys.
    pub fn ranges_begun(&self) -> u64 {
        self.state.begun.load(Ordering::Relaxed)
    }
}

fn serve(state: &State, stream: TcpStream) -> Result<()> {
    stream.set_nodelay(true)?;
    let mut stream = BufReader::new(stream);
    loop {
        let mut line = String::new();
        if stream.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let mut header = String::new();
        while stream.read_line(&mut header)? > 2 {
            header.clear();
        }
        let target = line.split(' ').nth(1).unwrap_or_default();
        let query = target.split_once('?').map_or("", |(_, query)| query);
        let (status, body) = match line.starts_with("GET ") && query.contains("list-type=2") {
            true => (200, page(state, query)),
            false => (404, "<Error><Code>NoSuchKey</Code></Error>".to_owned()),
        };
        let head = format!(
            "HTTP/1.1 {status} x\r\ncontent-type: application/xml\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        stream.get_mut().write_all(&[head, body].concat().into_bytes())?;
    }
}

fn page(state: &State, query: &str) -> String {
    state.asked.fetch_add(1, Ordering::Relaxed);
    let value = |name: &str| {
        let mut pairs = query.split('&').filter_map(|pair| pair.split_once('='));
        pairs.find(|(key, _)| *key == name).map(|(_, value)| value)
    };
    let token = value("continuation-token").and_then(|token| token.parse().ok());
    let first = token.unwrap_or_else(|| {
        state.begun.fetch_add(1, Ordering::Relaxed);
        let after = value("start-after").unwrap_or_default().replace("%2F", "/");
        first_after(state, &after)
    });
    let end = (first + PAGE).min(state.count);
    let mut body = String::from("<ListBucketResult>");
    for number in first..end {
        let noise = blake3::hash(&number.to_le_bytes());
        let etag = noise.to_hex();
        body += &format!(
            "<Contents><Key>{}</Key><Size>{}</Size><ETag>&quot;{}&quot;</ETag>\
             <LastModified>2024-01-{:02}T{:02}:00:00.000Z</LastModified></Contents>",
            (state.key)(number),
            50_000 + u64::from(noise.as_bytes()[0]) * 300,
            etag.get(..32).unwrap_or_default(),
            noise.as_bytes()[1] % 28 + 1,
            noise.as_bytes()[2] % 24,
        );
    }
    let more = end < state.count;
    if more {
        body += &format!("<NextContinuationToken>{end}</NextContinuationToken>");
    }
    body + &format!("<IsTruncated>{more}</IsTruncated></ListBucketResult>")
}

fn first_after(state: &State, after: &str) -> u64 {
    let (mut low, mut high) = (0, state.count);
    while low < high {
        let middle = low + (high - low) / 2;
        match (state.key)(middle).as_str() <= after {
            true => low = middle + 1,
            false => high = middle,
        }
    }
    low
}
