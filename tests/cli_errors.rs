//! Every command, asked for what cannot be: one line that says what and why, the exit status that scripts
//! go by, and nothing on standard output.

#[path = "support/sandbox.rs"]
mod sandbox;

use std::{collections::BTreeSet, fs, path::Path};

use sandbox::{Sandbox, skip, told};

/// Exit status, what is typed, words of what is said. `SOURCE` and `FILE` are a directory and a file,
/// `NEW` and `FULL` a place for a mount and one that is none.
const ERRORS: &[(i32, &str, &[&str])] = &[
    // The mount, with and without its word.
    (1, "data/7 NEW", &["data/7", "1"]),
    (1, "mount alcie:data NEW", &["alcie", "did you mean", "alice"]),
    (1, "mount data FULL", &["not empty"]),
    (1, "mount data FILE", &["not a directory"]),
    (1, "mount data /proc/1", &["/proc/1"]),
    (
        1,
        "mount data NEW --catalog file:///no/such/catalog",
        &["/no/such/catalog"],
    ),
    (1, "mount data NEW --socket /no/such/socket", &["/no/such/socket"]),
    (2, "mount a/b/c NEW", &["column"]),
    (2, "mount data NEW --io-mode fast", &["fast", "no-open"]),
    (2, "mount data NEW --share everybody", &["everybody", "group"]),
    (2, "mount data NEW --prefetch some", &["some", "auto"]),
    (2, "mount data NEW --idle-timeout soon", &["soon", "10m"]),
    (2, "mount data NEW --cache-size lots", &["lots"]),
    (
        2,
        "mount data NEW --own-agent --socket /x",
        &["cannot be used with"],
    ),
    (2, "mount data NEW --foreground --catalog ftp://x", &["ftp"]),
    (1, "unmount data", &["data is not mounted"]),
    (1, "unmount NEW", &["is not mounted"]),
    (2, "unmount", &["REF|MOUNTPOINT"]),
    (2, "unmount data --all", &["cannot be used with"]),
    (2, "unmount a//b", &["column"]),
    (1, "run --datastore data/7 -- true", &["data/7"]),
    (
        127,
        "run --datastore data=NEW -- no-such-command",
        &["no-such-command"],
    ),
    (2, "run -- true", &["--datastore"]),
    (2, "run --datastore data", &["CMD"]),
    (2, "run --datastore_version 1 -- true", &["--datastore_name"]),
    (1, "status data", &["data is not mounted"]),
    (1, "status --socket /no/such/socket", &["/no/such/socket"]),
    (2, "status --global --catalog ftp://x", &["ftp"]),
    (1, "list nobody", &["nobody", "list --global"]),
    (2, "list alice --global", &["cannot be used with"]),
    (2, "list a/b", &["column"]),
    (1, "info fata", &["fata", "data"]),
    (1, "info data/prod", &["prod"]),
    (2, "info", &["REF"]),
    (1, "publish /no/such/directory data", &["/no/such/directory"]),
    (1, "publish FILE data", &["FILE"]),
    (2, "publish SOURCE a//b", &["column"]),
    (2, "publish SOURCE data/2", &["without a version"]),
    (2, "publish SOURCE", &["NAME"]),
    (1, "register file:///no/such/prefix data", &["/no/such/prefix"]),
    (2, "register ftp://host/x data", &["ftp"]),
    (2, "register file:///tmp data/2", &["without a version"]),
    (1, "alias data/7 prod", &["7"]),
    (1, "alias data gone --remove", &["gone"]),
    (2, "alias data/1 2", &["2"]),
    (2, "alias data", &["ALIAS"]),
    (1, "retire data/7", &["7"]),
    (2, "retire data", &["number"]),
    (2, "retire data/prod", &["number"]),
    (1, "team", &["store", "no teams"]),
    (2, "catalog", &["serve"]),
    (1, "catalog user remove nobody", &["nobody"]),
    (2, "catalog user add a/b", &["column"]),
    (1, "catalog team add vision nobody", &["nobody"]),
    (1, "catalog team remove nothing", &["nothing"]),
    (1, "catalog token new nobody", &["nobody"]),
    (1, "catalog token revoke nothing", &["nothing"]),
    (1, "catalog serve --credentials /no/such/file", &["/no/such/file"]),
    (2, "catalog serve --listen nowhere", &["nowhere"]),
    (2, "catalog serve --tls-key FILE", &["--tls-certificate"]),
    (1, "cache status --socket /no/such/socket", &["/no/such/socket"]),
    (1, "cache path --socket /no/such/socket", &["/no/such/socket"]),
    (1, "cache verify --cache-dir FILE", &["FILE"]),
    (1, "cache evict --cache-dir FILE", &["FILE"]),
    (1, "cache evict data/7", &["data/7"]),
    (2, "cache", &["evict"]),
    (2, "cache evict a//b", &["column"]),
    (1, "warm data/7", &["data/7"]),
    (1, "warm data --include nothing/**", &["nothing/**"]),
    (1, "warm data --include [", &["["]),
    (2, "warm", &["REF"]),
    (2, "profile", &["record"]),
    (2, "profile record", &["REF|MOUNTPOINT"]),
    (1, "profile record nothing", &["nothing is not mounted"]),
    (1, "session start --spec /no/such/file", &["/no/such/file"]),
    (1, "session stop", &["no session"]),
    (1, "session status", &["no session"]),
    (1, "session add data", &["no session"]),
    (1, "session remove data", &["no session"]),
    (2, "session", &["start"]),
    (2, "config --cache-min-free 101%", &["101%"]),
    (
        2,
        "config --cache-verify never",
        &["never", "earlier-boot", "always"],
    ),
    (2, "config --user a:b", &["a:b"]),
    (1, "doctor --catalog file:///no/such/catalog", &[]),
    (2, "doctor --catalog ftp://x", &["ftp"]),
    (1, "demo --data /no/such/directory", &["/no/such/directory"]),
    (2, "agent --log-level loud", &["loud", "debug"]),
    (2, "agent --log-format xml", &["xml", "json"]),
    (
        2,
        "agent --metrics-listen everywhere",
        &["everywhere", "127.0.0.1"],
    ),
    // A cache directory that cannot be used is none: the agent reads past it (tests/cache_unusable.rs).
    (1, "agent --on-demand --socket FILE/socket", &["FILE/socket"]),
    (2, "completions tcsh", &["tcsh", "bash"]),
    (1, "man --dir FILE", &["FILE"]),
    (2, "mount --no-such-flag", &["--no-such-flag"]),
];

#[test]
fn every_command_says_what_is_wrong() {
    if !Path::new("/dev/fuse").exists() {
        return skip("what a refused mount says", "there is no /dev/fuse");
    }
    let sandbox = Sandbox::new();
    let source = sandbox.path("source");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("a"), "text").unwrap();
    sandbox.ok(&["publish", source.to_str().unwrap(), "data"]);
    fs::write(sandbox.path("FILE"), "").unwrap();
    fs::create_dir(sandbox.path("mnt/FULL")).unwrap();
    fs::write(sandbox.path("mnt/FULL/x"), "").unwrap();
    let mut wrong = Vec::new();
    for (status, typed, words) in ERRORS {
        let arguments: Vec<String> = typed
            .split(' ')
            .map(|word| {
                word.replace("NEW", sandbox.path("mnt/NEW").to_str().unwrap())
                    .replace("FULL", sandbox.path("mnt/FULL").to_str().unwrap())
                    .replace("FILE", sandbox.path("FILE").to_str().unwrap())
                    .replace("SOURCE", source.to_str().unwrap())
            })
            .collect();
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let output = sandbox.grid(&arguments).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let mut mistakes = Vec::new();
        if output.status.code() != Some(*status) {
            mistakes.push(format!("not {status}"));
        }
        for word in words.iter().filter(|word| !said.contains(**word)) {
            mistakes.push(format!("no {word:?}"));
        }
        // What is wrong about the grammar is clap's to tell, in its own lines.
        let ours = said.lines().filter(|line| !line.is_empty()).count();
        if *status == 1 && !words.is_empty() && ours != 1 {
            mistakes.push(format!("{ours} lines"));
        }
        if said.contains("panicked") || said.contains("RUST_BACKTRACE") {
            mistakes.push("it panicked".into());
        }
        // Only doctor has something to show besides.
        if !output.stdout.is_empty() && !words.is_empty() {
            mistakes.push("something on standard output".into());
        }
        if !mistakes.is_empty() {
            wrong.push(format!(
                "grid-mount {typed}: {}: {}",
                mistakes.join(", "),
                told(&output)
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(sandbox.mounts().is_empty());
    assert!(!sandbox.path("mnt/NEW").exists());
}

/// The table above leaves no command out.
#[test]
fn no_command_is_forgotten() {
    let sandbox = Sandbox::new();
    let dir = sandbox.path("man");
    let pages = sandbox.ok(&["man", "--dir", dir.to_str().unwrap()]);
    let asked: BTreeSet<String> = ERRORS
        .iter()
        .map(|(_, typed, _)| typed.replace(' ', "-"))
        .collect();
    let readme = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap();
    for page in pages.lines() {
        let name = Path::new(page).file_stem().unwrap().to_str().unwrap();
        let command = name.trim_start_matches("grid-mount").trim_start_matches('-');
        // `user add` and its like are one thing to whoever reads.
        if command.ends_with("-list") {
            continue;
        }
        assert!(
            asked.iter().any(|typed| typed.starts_with(command)),
            "no error of `{command}` is looked at"
        );
        let first = command.split('-').next().unwrap();
        assert!(
            first.is_empty() || readme.contains(&format!("`grid-mount {first}")),
            "README.md does not tell of `grid-mount {first}`"
        );
    }
}
