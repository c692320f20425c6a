//! Publishing local directories into a `file://` catalog, rebuilt independently and compared.

#[path = "support/rebuilt.rs"]
mod rebuilt;
#[path = "support/records.rs"]
mod records;

use std::{
    os::unix::{
        ffi::OsStrExt,
        fs::{PermissionsExt, symlink},
    },
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use grid_mount::{
    catalog::Record,
    origin::StoreSettings,
    publish::{Phase, Progress, PublishError, PublishOptions, Published, SkipReason, publish_directory},
};
use rebuilt::{assert_same, rebuilt, source};
use records::{Records, name};

struct Bench {
    dir: tempfile::TempDir,
    catalog: Records,
    options: PublishOptions,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for part in ["source", "store", "scratch"] {
            std::fs::create_dir(dir.path().join(part)).unwrap();
        }
        let url = format!("file://{}", dir.path().join("store").display());
        let catalog = Records::open(&url, &StoreSettings::default());
        let options = PublishOptions::new(dir.path().join("scratch"));
        Self {
            dir,
            catalog,
            options,
        }
    }

    fn source(&self) -> PathBuf {
        self.dir.path().join("source")
    }

    fn write(&self, path: &str, bytes: &[u8]) {
        let path = self.source().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }

    async fn try_publish(&self, source: &Path) -> Result<Published, PublishError> {
        let name = name("alice:data");
        let published = publish_directory(source, name, &self.catalog, &self.options, Arc::new(())).await;
        let left = std::fs::read_dir(&self.options.scratch).unwrap().count();
        assert_eq!(left, 0, "temporary files are left");
        published
    }

    async fn publish(&self) -> Published {
        self.try_publish(&self.source()).await.unwrap()
    }

    async fn assert_holds(&self, record: &Record, of: &Path) {
        let store = grid_mount::catalog::Catalog::store(&self.catalog);
        assert_same(&rebuilt(record, store, store).await, &source(of));
    }

    /// Data objects in the store, by path.
    fn objects(&self) -> Vec<PathBuf> {
        walkdir::WalkDir::new(self.dir.path().join("store/objects"))
            .into_iter()
            .filter_map(|entry| entry.ok().filter(|entry| entry.file_type().is_file()))
            .map(walkdir::DirEntry::into_path)
            .collect()
    }
}

/// Bytes that look like nothing else.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    blake3::Hasher::new()
        .update(&seed.to_le_bytes())
        .finalize_xof()
        .fill(&mut bytes);
    bytes
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_tree_comes_back_as_it_was_and_again_costs_nothing() {
    let bench = Bench::new();
    let sysroot = Command::new("rustc")
        .args(["--print", "sysroot"])
        .output()
        .unwrap();
    let sysroot = PathBuf::from(String::from_utf8(sysroot.stdout).unwrap().trim());
    let real = sysroot.join("lib/rustlib");
    let first = bench.try_publish(&real).await.unwrap();
    assert!(first.report.uploaded_objects > 0);
    bench.assert_holds(&first.record, &real).await;
    let objects = bench.objects().len();

    let second = bench.try_publish(&real).await.unwrap();
    assert_eq!(second.report.uploaded_objects, 0);
    assert_eq!(
        second.report.present_objects, 0,
        "nothing had to be looked for either"
    );
    assert_eq!(bench.objects().len(), objects);
    assert_eq!(second.record.totals, first.record.totals);
    bench.assert_holds(&second.record, &real).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_a_directory_can_hold_is_kept_or_reported() {
    let bench = Bench::new();
    let root = bench.source();
    bench.write("small", b"small");
    bench.write("empty", b"");
    bench.write("deep/er/large", &noise(1, (3 << 20) + 5));
    bench.write("exactly", &noise(2, 1 << 20));
    bench.write("below", &noise(3, (1 << 20) - 1));
    let odd = root.join(std::ffi::OsStr::from_bytes(b"\xff\xfe latin \xe4"));
    std::fs::write(&odd, b"not UTF-8").unwrap();
    symlink("nowhere/at/all", root.join("dangling")).unwrap();
    symlink("..", root.join("deep/up")).unwrap();
    std::fs::hard_link(root.join("small"), root.join("other name")).unwrap();
    std::fs::create_dir(root.join("hollow")).unwrap();
    for (path, mode) in [
        ("small", 0o4711),
        ("deep", 0o1777),
        ("hollow", 0o2500),
        ("exactly", 0o400),
    ] {
        std::fs::set_permissions(root.join(path), PermissionsExt::from_mode(mode)).unwrap();
    }
    let time = std::time::UNIX_EPOCH + std::time::Duration::new(86_400, 123_456_789);
    std::fs::File::open(root.join("hollow"))
        .unwrap()
        .set_modified(time)
        .unwrap();
    let before_the_epoch = std::time::UNIX_EPOCH - std::time::Duration::new(5, 999_999_999);
    std::fs::File::open(root.join("empty"))
        .unwrap()
        .set_modified(before_the_epoch)
        .unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(root.join("socket")).unwrap();
    nix::unistd::mkfifo(&root.join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();

    let Published { record, report } = bench.publish().await;
    bench.assert_holds(&record, &root).await;
    assert_eq!(report.hard_linked_files, 2);
    assert_eq!(
        report.duplicate_files, 1,
        "the second name's bytes are stored once"
    );
    let skipped = &report.skipped.reasons[&SkipReason::Special];
    assert_eq!(
        (skipped.count, skipped.examples.clone()),
        (2, vec!["fifo".to_owned(), "socket".to_owned()])
    );
    // Two large ones and a bundle.
    assert_eq!(bench.objects().len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_changed_file_among_many_uploads_about_one_file() {
    let bench = Bench::new();
    for number in 0..3000 {
        bench.write(
            &format!("{}/{number}", number % 30),
            &noise(number, 500 + number as usize),
        );
    }
    let first = bench.publish().await;
    bench.write("7/1237", b"changed");
    let second = bench.publish().await;
    assert_eq!(second.report.uploaded_objects, 1);
    assert_eq!(second.report.uploaded_bytes, 7);
    assert_eq!(second.report.unchanged_files, 2999);
    bench.assert_holds(&second.record, &bench.source()).await;
    // A moved directory is recognised by its digests.
    std::fs::rename(bench.source().join("9"), bench.source().join("moved")).unwrap();
    let third = bench.publish().await;
    assert_eq!(
        (third.report.uploaded_objects, third.report.duplicate_files),
        (0, 100)
    );
    bench.assert_holds(&third.record, &bench.source()).await;
    assert_eq!(first.record.totals.files, third.record.totals.files);
}

#[tokio::test(flavor = "multi_thread")]
async fn checksum_sees_what_size_and_time_hide_and_forgives_a_touch() {
    let mut bench = Bench::new();
    bench.write("sly", b"before");
    bench.write("touched", b"as it was");
    bench.publish().await;
    let sly = bench.source().join("sly");
    let modified = sly.metadata().unwrap().modified().unwrap();
    std::fs::write(&sly, b"after!").unwrap();
    std::fs::File::options()
        .write(true)
        .open(&sly)
        .unwrap()
        .set_modified(modified)
        .unwrap();
    let touched = std::fs::File::options()
        .write(true)
        .open(bench.source().join("touched"))
        .unwrap();
    touched.set_modified(std::time::UNIX_EPOCH).unwrap();

    bench.options.checksum = true;
    let second = bench.publish().await;
    assert_eq!(second.report.unchanged_files, 1);
    assert_eq!(second.report.uploaded_bytes, 6);
    bench.assert_holds(&second.record, &bench.source()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bundle_of_which_little_is_left_is_packed_anew() {
    let bench = Bench::new();
    for number in 0..40 {
        bench.write(&format!("{number:02}"), &noise(number, 5000));
    }
    bench.publish().await;
    let remove = |numbers: std::ops::Range<u64>| {
        numbers.for_each(|n| std::fs::remove_file(bench.source().join(format!("{n:02}"))).unwrap());
    };
    remove(0..15);
    let most = bench.publish().await;
    assert_eq!(
        (most.report.repacked_bundles, most.report.uploaded_objects),
        (0, 0)
    );
    remove(15..25);
    let few = bench.publish().await;
    assert_eq!((few.report.repacked_bundles, few.report.uploaded_objects), (1, 1));
    bench.assert_holds(&few.record, &bench.source()).await;
    // The new bundle is full: there is nothing to gain a second time.
    let again = bench.publish().await;
    assert_eq!(
        (again.report.repacked_bundles, again.report.uploaded_objects),
        (0, 0)
    );
}

/// Ends the wait for `cut` after so many bytes were handed to the store.
struct CutAfter {
    left: AtomicU64,
    cut: tokio::sync::Notify,
}

impl Progress for CutAfter {
    fn sent(&self, bytes: u64) {
        let left = self.left.load(Ordering::SeqCst).saturating_sub(bytes);
        self.left.store(left, Ordering::SeqCst);
        if left == 0 {
            self.cut.notify_one();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn interrupted_and_run_again_uploads_only_what_is_missing() {
    let mut bench = Bench::new();
    bench.options.threads = 2;
    for number in 0..12 {
        bench.write(&format!("large {number:02}"), &noise(number, 5 << 20));
        for small in 0..20 {
            bench.write(
                &format!("dir {number:02}/{small}"),
                &noise(1000 + number * 100 + small, 300_000),
            );
        }
    }
    let cut = Arc::new(CutAfter {
        left: AtomicU64::new(30 << 20),
        cut: tokio::sync::Notify::new(),
    });
    let source = bench.source();
    tokio::select! {
        _ = publish_directory(&source, name("alice:data"), &bench.catalog, &bench.options, cut.clone()) => {
            panic!("it was to be interrupted")
        }
        () = cut.cut.notified() => {}
    }
    assert_eq!(
        bench.catalog.published(),
        0,
        "half-finished publishing is never visible"
    );
    let there = bench.objects().len() as u64;
    assert!(there > 0);
    std::fs::remove_dir_all(&bench.options.scratch).unwrap();
    std::fs::create_dir(&bench.options.scratch).unwrap();

    let Published { record, report } = bench.publish().await;
    assert!(report.present_objects > 0 && report.present_objects >= there.saturating_sub(4));
    let all = report.uploaded_objects + report.present_objects;
    assert_eq!(
        all,
        bench.objects().len() as u64,
        "nothing was uploaded under another name"
    );
    bench.assert_holds(&record, &bench.source()).await;
}

#[derive(Default)]
struct Heard {
    phases: Mutex<Vec<Phase>>,
    discovered: [AtomicU64; 2],
    settled: [AtomicU64; 2],
    sent: AtomicU64,
}

impl Progress for Heard {
    fn phase(&self, phase: Phase) {
        self.phases.lock().unwrap().push(phase);
    }

    fn discovered(&self, files: u64, bytes: u64) {
        self.discovered[0].fetch_add(files, Ordering::SeqCst);
        self.discovered[1].fetch_add(bytes, Ordering::SeqCst);
    }

    fn settled(&self, files: u64, bytes: u64) {
        self.settled[0].fetch_add(files, Ordering::SeqCst);
        self.settled[1].fetch_add(bytes, Ordering::SeqCst);
    }

    fn sent(&self, bytes: u64) {
        self.sent.fetch_add(bytes, Ordering::SeqCst);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn progress_comes_to_the_totals_of_the_record() {
    let bench = Bench::new();
    for number in 0..50 {
        bench.write(&format!("{number}"), &noise(number / 2, 60_000 * number as usize));
    }
    for _ in 0..2 {
        let heard = Arc::new(Heard::default());
        let published = publish_directory(
            &bench.source(),
            name("alice:data"),
            &bench.catalog,
            &bench.options,
            heard.clone(),
        )
        .await
        .unwrap();
        let totals = published.record.totals;
        let get = |pair: &[AtomicU64; 2]| [0, 1].map(|index: usize| pair[index].load(Ordering::SeqCst));
        assert_eq!(get(&heard.discovered), [totals.files, totals.bytes]);
        assert_eq!(get(&heard.settled), [totals.files, totals.bytes]);
        assert!(heard.sent.load(Ordering::SeqCst) >= published.report.uploaded_bytes);
        let phases = [Phase::Discover, Phase::Upload, Phase::Tree, Phase::Record];
        assert_eq!(*heard.phases.lock().unwrap(), phases);
    }
}

/// Appends to a file whenever bytes are sent: it never holds still.
struct Restless {
    file: PathBuf,
    on: AtomicBool,
}

impl Progress for Restless {
    fn sent(&self, _: u64) {
        if self.on.load(Ordering::SeqCst) {
            use std::io::Write;
            let mut file = std::fs::File::options().write(true).open(&self.file).unwrap();
            file.write_all(&noise(rand::random(), 64)).unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_never_holds_still_is_an_error_and_nothing_is_published() {
    let bench = Bench::new();
    bench.write("restless", &noise(0, 40 << 20));
    let file = bench.source().join("restless");
    // The end of the file changes while its beginning is on its way: the upload must not complete.
    let restless = Arc::new(Restless {
        file: file.clone(),
        on: AtomicBool::new(true),
    });
    // The first bytes are read by then, so write behind them.
    let published = publish_directory(
        &bench.source(),
        name("alice:data"),
        &bench.catalog,
        &bench.options,
        restless,
    )
    .await;
    match published {
        Err(PublishError::Changed { path }) => assert_eq!(path, file.canonicalize().unwrap()),
        // What was sent before the change may have been all that counts: then it is what was hashed.
        Ok(published) => {
            assert_eq!(published.record.totals.files, 1);
        }
        Err(other) => panic!("{other}"),
    }
    for object in bench.objects() {
        let digest = grid_mount::digest::Digest::of(&std::fs::read(&object).unwrap()).to_string();
        assert_eq!(
            object.file_name().unwrap().to_str(),
            Some(digest.as_str()),
            "an object under a wrong name"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_published_says_so() {
    let bench = Bench::new();
    bench.write("file", b"1");
    let file = bench.source().join("file");
    assert!(matches!(
        bench.try_publish(&file).await,
        Err(PublishError::NotADirectory { .. })
    ));
    let absent = bench.source().join("absent");
    let error = bench.try_publish(&absent).await.unwrap_err();
    assert!(error.to_string().contains("absent"), "{error}");
    let error = bench.try_publish(bench.dir.path()).await.unwrap_err();
    assert!(matches!(error, PublishError::Contains { .. }), "{error}");
    assert_eq!(bench.catalog.published(), 0);
}
