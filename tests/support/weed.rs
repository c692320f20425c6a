//! A real S3 server for tests: SeaweedFS (`weed server -s3`) on free loopback ports, with its data
//! in a temporary directory and credentials that only the test knows.
//!
//! The binary is `$GRID_MOUNT_WEED`, else `target/tools/weed/bin/weed`, else `weed` in `PATH`.
//! Without one, [`Weed::start`] skips as every test does: `sandbox::skip`.

#![allow(dead_code)]

use std::{
    fmt::Write as _,
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, Weak},
    time::{Duration, Instant},
};

use super::sandbox::skip;

/// A server is up within seconds; a busy machine may take longer.
const START_DEADLINE: Duration = Duration::from_secs(90);
/// Several tests may pick the same port at once; the loser tries others.
const ATTEMPTS: usize = 3;

pub const ACCESS_KEY: &str = "grid-test";
pub const SECRET_KEY: &str = "grid-test-secret";
pub const REGION: &str = "us-east-1";

/// May do anything that the policy which comes with the request allows as well.
pub const ROLE: &str = "arn:aws:iam::role/Anything";
const ROLES: &str = r#"{
    "sts": {"tokenDuration": "1h", "maxSessionLength": "12h", "issuer": "grid-test",
        "signingKey": "Z3JpZC10ZXN0LXNpZ25pbmcta2V5LTMyLWJ5dGVzISE="},
    "policy": {"defaultEffect": "Deny", "storeType": "memory"},
    "policies": [{"name": "All", "document": {"Version": "2012-10-17",
        "Statement": [{"Effect": "Allow", "Action": ["s3:*"], "Resource": ["*"]}]}}],
    "roles": [{"roleName": "Anything", "roleArn": "arn:aws:iam::role/Anything", "attachedPolicies": ["All"],
        "trustPolicy": {"Version": "2012-10-17",
            "Statement": [{"Effect": "Allow", "Principal": {"AWS": "*"}, "Action": ["sts:AssumeRole"]}]}}]
}"#;

pub struct Weed {
    child: Child,
    s3_port: u16,
    filer_port: u16,
    // Removed after the child is gone (fields are dropped in order, after `drop`).
    dir: tempfile::TempDir,
}

/// Where the binary is, or why there is none.
pub fn find_binary() -> Result<PathBuf, String> {
    if let Some(path) = std::env::var_os("GRID_MOUNT_WEED") {
        let path = PathBuf::from(path);
        return if path.is_file() {
            Ok(path)
        } else {
            Err(format!(
                "GRID_MOUNT_WEED is {}, which is not a file",
                path.display()
            ))
        };
    }
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/tools/weed/bin/weed");
    if built.is_file() {
        return Ok(built);
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|dir| dir.join("weed"))
        .find(|weed| weed.is_file())
        .ok_or_else(|| {
            format!(
                "no SeaweedFS: neither $GRID_MOUNT_WEED, {} nor weed in PATH",
                built.display()
            )
        })
}

impl Weed {
    /// The server that the tests of one binary share: it takes seconds to start. It ends with the last
    /// of those that run at the same time.
    pub fn shared() -> Option<Arc<Self>> {
        static RUNNING: Mutex<Weak<Weed>> = Mutex::new(Weak::new());
        let mut running = RUNNING.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(weed) = running.upgrade() {
            return Some(weed);
        }
        let weed = Arc::new(Self::start()?);
        *running = Arc::downgrade(&weed);
        Some(weed)
    }

    /// `None` (and a line that says why) if there is no binary; panics where nothing may be skipped, or
    /// if the server does not start.
    pub fn start() -> Option<Self> {
        Self::start_with(false)
    }

    /// With a token service too, on the same port: it lends [`ROLE`] to whoever has the administrator's keys.
    pub fn start_with_tokens() -> Option<Self> {
        Self::start_with(true)
    }

    fn start_with(tokens: bool) -> Option<Self> {
        let binary = match find_binary() {
            Ok(binary) => binary,
            Err(reason) => {
                skip("a real S3 server", &reason);
                return None;
            }
        };
        let mut failures = String::new();
        for _ in 0..ATTEMPTS {
            match Self::try_start(&binary, tokens) {
                Ok(weed) => return Some(weed),
                Err(failure) => writeln!(failures, "{failure}").expect("writing to a string"),
            }
        }
        panic!("SeaweedFS does not start:\n{failures}");
    }

    fn try_start(binary: &Path, tokens: bool) -> Result<Self, String> {
        let dir = tempfile::Builder::new()
            .prefix("grid-weed-")
            .tempdir()
            .map_err(|e| e.to_string())?;
        let config = dir.path().join("s3.json");
        std::fs::write(
            &config,
            format!(
                r#"{{"identities": [{{"name": "test", "actions": ["Admin", "Read", "Write", "List", "Tagging"],
                    "credentials": [{{"accessKey": "{ACCESS_KEY}", "secretKey": "{SECRET_KEY}"}}]}},
                    {{"name": "reader", "actions": ["Read"],
                    "credentials": [{{"accessKey": "grid-reader", "secretKey": "grid-reader-secret"}}]}}]}}"#
            ),
        )
        .map_err(|e| e.to_string())?;
        let roles = dir.path().join("iam.json");
        if tokens {
            std::fs::write(&roles, ROLES).map_err(|e| e.to_string())?;
        }
        let data = dir.path().join("data");
        std::fs::create_dir(&data).map_err(|e| e.to_string())?;
        let log = std::fs::File::create(dir.path().join("log")).map_err(|e| e.to_string())?;
        let ports = free_ports::<8>()?;
        let [
            master,
            master_grpc,
            volume,
            volume_grpc,
            filer,
            filer_grpc,
            s3,
            s3_grpc,
        ] = ports;
        let child = Command::new(binary)
            .arg("server")
            .args([
                format!("-dir={}", data.display()),
                "-ip=127.0.0.1".into(),
                "-ip.bind=127.0.0.1".into(),
            ])
            .args([
                format!("-master.port={master}"),
                format!("-master.port.grpc={master_grpc}"),
            ])
            .args([
                format!("-volume.port={volume}"),
                format!("-volume.port.grpc={volume_grpc}"),
            ])
            .args([
                format!("-filer.port={filer}"),
                format!("-filer.port.grpc={filer_grpc}"),
            ])
            .args([
                "-s3".into(),
                format!("-s3.port={s3}"),
                format!("-s3.port.grpc={s3_grpc}"),
            ])
            .args([
                "-s3.port.iceberg=0",
                "-s3.port.lance=0",
                // A bucket takes seven volumes at once; without room for them its objects cannot be put (500).
                "-volume.max=200",
                "-master.volumeSizeLimitMB=256",
            ])
            .arg(format!("-s3.config={}", config.display()))
            .args(tokens.then(|| format!("-s3.iam.config={}", roles.display())))
            .current_dir(dir.path())
            .env("HOME", dir.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone().map_err(|e| e.to_string())?)
            .stderr(log)
            .spawn()
            .map_err(|e| format!("{}: {e}", binary.display()))?;
        let mut weed = Self {
            child,
            s3_port: s3,
            filer_port: filer,
            dir,
        };
        weed.wait()?;
        Ok(weed)
    }

    /// Up means: the filer takes a bucket, and S3 finds it. There is no event to wait for.
    fn wait(&mut self) -> Result<(), String> {
        let deadline = Instant::now() + START_DEADLINE;
        loop {
            if let Some(status) = self.child.try_wait().map_err(|e| e.to_string())? {
                return Err(format!("it ended with {status}:\n{}", self.log()));
            }
            let bucket = request(self.filer_port, "POST", "/buckets/ready/");
            let bucket = bucket.map(|status| if status == 409 { 200 } else { status });
            let s3 = request(self.s3_port, "GET", "/ready");
            // Without a signature S3 says 403: it is there, and it asks who we are.
            if matches!(bucket, Ok(200..=204)) && matches!(s3, Ok(403)) {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(format!(
                    "no answer (filer {bucket:?}, s3 {s3:?}):\n{}",
                    self.log()
                ));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// What the server has printed, its end.
    pub fn log(&self) -> String {
        let log = std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
        let start = log.len().saturating_sub(4000);
        log.get(start..).unwrap_or(&log).to_owned()
    }

    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.s3_port)
    }

    pub fn create_bucket(&self, name: &str) {
        let status = request(self.filer_port, "POST", &format!("/buckets/{name}/"));
        assert!(matches!(status, Ok(200..=204)), "bucket {name}: {status:?}");
    }

    /// The settings that a client needs, under the names of the environment variables.
    pub fn settings(&self) -> [(&'static str, String); 5] {
        [
            ("AWS_ENDPOINT_URL", self.endpoint()),
            ("AWS_ACCESS_KEY_ID", ACCESS_KEY.to_owned()),
            ("AWS_SECRET_ACCESS_KEY", SECRET_KEY.to_owned()),
            ("AWS_REGION", REGION.to_owned()),
            ("AWS_ALLOW_HTTP", "true".to_owned()),
        ]
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Weed {
    fn drop(&mut self) {
        // Already gone is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Ports that were free a moment ago, all different: held until all are known.
fn free_ports<const N: usize>() -> Result<[u16; N], String> {
    let mut listeners = Vec::new();
    let mut ports = [0; N];
    for port in &mut ports {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(|e| e.to_string())?;
        *port = listener.local_addr().map_err(|e| e.to_string())?.port();
        listeners.push(listener);
    }
    Ok(ports)
}

/// One HTTP request without a body; the status.
fn request(port: u16, method: &str, path: &str) -> Result<u16, String> {
    let limit = Duration::from_secs(5);
    let address = SocketAddrV4::new(Ipv4Addr::LOCALHOST, port);
    let mut stream = TcpStream::connect_timeout(&address.into(), limit).map_err(|e| e.to_string())?;
    stream.set_read_timeout(Some(limit)).map_err(|e| e.to_string())?;
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: {address}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).map_err(|e| e.to_string())?;
    let mut answer = [0; 12];
    stream.read_exact(&mut answer).map_err(|e| e.to_string())?;
    std::str::from_utf8(&answer[9..])
        .ok()
        .and_then(|status| status.parse().ok())
        .ok_or_else(|| format!("not HTTP: {answer:?}"))
}
