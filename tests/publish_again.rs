//! Publishing with the real binary, with what is uploaded counted where it arrives: a second time costs what
//! has changed, and an interrupted time costs what is missing.

#[path = "support/s3_origin.rs"]
mod s3_origin;
#[path = "support/sandbox.rs"]
mod sandbox;

use std::{
    collections::BTreeSet,
    fs,
    process::Stdio,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use s3_origin::{S3Origin, Shape};
use sandbox::{Sandbox, told};

const CATALOG: &str = "s3://bucket/team";

struct Origin {
    s3: S3Origin,
    _runtime: tokio::runtime::Runtime,
}

impl Origin {
    fn start(shape: Shape) -> Self {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let s3 = runtime.block_on(S3Origin::start(shape));
        Self {
            s3,
            _runtime: runtime,
        }
    }

    fn sandbox(&self) -> Sandbox {
        let settings = self.s3.settings();
        let sandbox = settings
            .iter()
            .fold(Sandbox::new(), |sandbox, (name, value)| sandbox.env(name, value));
        sandbox.env("GRID_MOUNT_CATALOG", CATALOG)
    }

    /// The data objects written from the `from`th write on, with their sizes.
    fn data_objects(&self, from: usize) -> Vec<(String, u64)> {
        let written = self.s3.written().split_off(from);
        written
            .into_iter()
            .filter(|(key, _)| key.starts_with("team/objects/"))
            .collect()
    }
}

/// Bytes that are like no other file's.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    hasher.finalize_xof().fill(&mut bytes);
    bytes
}

#[test]
fn one_changed_file_among_many_uploads_one_file() {
    // More than one directory's batch and one bundle's files; the number changes nothing else.
    const DIRECTORIES: usize = 20;
    const FILES: usize = 600;
    let origin = Origin::start(Shape::default());
    let sandbox = origin.sandbox();
    let source = sandbox.path("source");
    for directory in 0..DIRECTORIES {
        let dir = source.join(format!("{directory:03}"));
        fs::create_dir_all(&dir).unwrap();
        for file in 0..FILES {
            fs::write(dir.join(format!("{file:03}")), format!("{directory} {file}")).unwrap();
        }
    }
    let publish = || -> serde_json::Value {
        let began = Instant::now();
        let printed = sandbox.ok(&["publish", source.to_str().unwrap(), "many", "--json"]);
        println!("published in {:?}", began.elapsed());
        serde_json::from_str(&printed).unwrap()
    };
    let first = publish();
    assert_eq!(first["record"]["totals"]["files"], DIRECTORIES * FILES);

    let changed = b"a file that changed, and is longer than it was";
    fs::write(source.join("007/123"), changed).unwrap();
    let writes = origin.s3.written().len();
    let second = publish();
    assert_eq!(second["reference"], "alice:many/2");
    let objects = origin.data_objects(writes);
    println!("second time: {objects:?}");
    assert_eq!(objects.len(), 1, "{objects:?}");
    assert_eq!(objects[0].1, changed.len() as u64);
    assert_eq!(second["report"]["uploaded_objects"], 1);
    assert_eq!(second["report"]["unchanged_files"], DIRECTORIES * FILES - 1);
    // Beside it: the tree's parts and the record, a few objects however many files there are.
    let beside: Vec<_> = origin.s3.written().split_off(writes);
    assert!(beside.len() <= 6, "{beside:?}");

    // And nothing at all when nothing has changed.
    let writes = origin.s3.written().len();
    assert_eq!(publish()["report"]["uploaded_objects"], 0);
    assert_eq!(origin.data_objects(writes), []);
}

#[test]
fn an_interrupted_publish_goes_on_where_it_was() {
    const FILES: usize = 48;
    const SIZE: usize = 3 << 19;
    for signal in [Signal::SIGKILL, Signal::SIGINT] {
        // Slow enough to be interrupted in the middle.
        let origin = Origin::start(Shape {
            write: Duration::from_millis(150),
            ..Shape::default()
        });
        let sandbox = origin.sandbox();
        let source = sandbox.path("source");
        fs::create_dir(&source).unwrap();
        for file in 0..FILES {
            fs::write(source.join(format!("{file}")), noise(file as u64, SIZE)).unwrap();
        }
        let arguments = ["publish", source.to_str().unwrap(), "data", "--json"];
        let child = sandbox
            .grid(&arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let began = Instant::now();
        while origin.data_objects(0).len() < FILES / 4 {
            assert!(
                began.elapsed() < Duration::from_secs(120),
                "nothing is being uploaded"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(child.id() as i32), signal).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(!output.status.success(), "{}", told(&output));
        if signal == Signal::SIGINT {
            assert_eq!(output.status.code(), Some(1));
            assert!(
                String::from_utf8_lossy(&output.stderr).contains("run it again"),
                "{}",
                told(&output)
            );
            assert_eq!(
                fs::read_dir(sandbox.path("tmp")).unwrap().count(),
                0,
                "temporary files stay behind"
            );
        }
        // A put that was under way may still arrive.
        std::thread::sleep(Duration::from_millis(500));
        let before: BTreeSet<_> = origin.data_objects(0).into_iter().collect();
        assert!(
            before.len() < FILES,
            "everything was uploaded before the signal came"
        );
        assert_eq!(
            sandbox.ok(&["list", "--json"]).trim(),
            "[]",
            "half a version is visible"
        );

        origin.s3.shape(Shape::default());
        let writes = origin.s3.written().len();
        let published: serde_json::Value = serde_json::from_str(&sandbox.ok(&arguments)).unwrap();
        assert_eq!(published["reference"], "alice:data/1");
        let again = origin.data_objects(writes);
        println!("{signal}: {} objects before, {} after", before.len(), again.len());
        assert_eq!(again.len(), FILES - before.len());
        assert!(
            again.iter().all(|object| !before.contains(object)),
            "an object was uploaded twice"
        );
        let report = &published["report"];
        assert_eq!(report["uploaded_objects"], again.len());
        assert_eq!(report["present_objects"], before.len());
        assert_eq!(report["uploaded_bytes"], again.len() * SIZE);
    }
}

/// An upload may take longer than an answer: the deadline grows with what is sent.
#[test]
fn a_slow_upload_is_given_its_time() {
    use grid_mount::origin::{Deadlines, Store, StoreSettings};
    let origin = Origin::start(Shape {
        write: Duration::from_millis(1500),
        ..Shape::default()
    });
    let settings: StoreSettings = origin.s3.settings().into_iter().collect();
    let impatient = Deadlines {
        first_byte: Duration::from_millis(300),
        read: Duration::from_millis(300),
        retries: 0,
        ..Deadlines::control()
    };
    let store = Store::open(&"s3://bucket/x".parse().unwrap(), &settings, &impatient).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime
        .block_on(store.put("large", noise(0, 8 << 20).into()))
        .unwrap();
    // What is small is due at once.
    let error = runtime
        .block_on(store.put("small", noise(1, 10).into()))
        .unwrap_err();
    assert!(error.to_string().contains("did not answer"), "{error}");
}
