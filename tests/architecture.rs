//! The arrows of `ARCHITECTURE.md`, checked: who may use whom, and who may use `fuser`, `clap`,
//! `object_store`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// Room → rooms it may use. Leaves that everybody may use are in [`LEAVES`].
const ARROWS: &[(&str, &[&str])] = &[
    ("reference", &[]),
    ("origin", &[]),
    ("config", &["reference", "origin"]),
    ("tree", &[]),
    ("catalog", &["reference", "origin", "tree"]),
    ("publish", &["tree", "origin", "catalog", "reference"]),
    ("cache", &[]),
    ("fetch", &["cache", "origin"]),
    // Names objects by their numbers in a tree.
    ("profile", &["tree"]),
    ("fs", &["tree", "fetch", "cache"]),
    ("fuse", &["fs", "tree"]),
    ("handover", &["fs", "fuse", "tree"]),
    ("keeper", &[]),
    (
        "agent",
        &[
            "catalog",
            "reference",
            "origin",
            "tree",
            "cache",
            "fetch",
            "fs",
            "fuse",
            "handover",
            "keeper",
            "profile",
        ],
    ),
    // It asks an agent as a user would, and reads what was resolved.
    ("session", &["agent", "reference"]),
    // Asks the stores as a mount would, and the mount table; knows no agent and no settings' layers.
    ("doctor", &["catalog", "reference", "origin", "fuse"]),
    (
        "cli",
        &[
            "agent",
            "catalog",
            "config",
            "doctor",
            "keeper",
            "publish",
            "reference",
            "origin",
            "session",
        ],
    ),
];

/// Newtypes without behaviour of their own.
const LEAVES: &[&str] = &[
    "block",
    "bytesize",
    "causes",
    "digest",
    "histogram",
    "pin",
    "prefetch_policy",
];

/// Crate → the only rooms that may name it.
const CRATES: &[(&str, &[&str])] = &[
    ("fuser", &["fuse", "handover"]),
    ("clap", &["cli"]),
    ("clap_complete", &["cli"]),
    ("clap_mangen", &["cli"]),
    ("object_store", &["origin"]),
    ("indicatif", &["cli"]),
    // The control socket, and the control plane.
    ("axum", &["agent", "catalog"]),
    // The protocol's client, and the date of a server's answer, which no store client tells; `origin` has
    // its own HTTP client underneath `object_store`. `cli` sends spans to a collector with it.
    ("reqwest", &["catalog", "doctor", "cli"]),
    ("memmap2", &["tree"]),
];

fn sources(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

fn room_of(path: &Path, src: &Path) -> String {
    let first = path.strip_prefix(src).unwrap().components().next().unwrap();
    first
        .as_os_str()
        .to_str()
        .unwrap()
        .trim_end_matches(".rs")
        .to_owned()
}

/// Code lines only: comments may speak of anything.
fn code(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap();
    text.lines()
        .map(|line| line.split("//").next().unwrap())
        .collect::<Vec<_>>()
        .join("\n")
}

/// The rooms named by `crate::room` and by `use crate::{room…, room…}`.
fn rooms_named(code: &str) -> BTreeSet<String> {
    let mut named = BTreeSet::new();
    for (at, _) in code.match_indices("crate::") {
        let before = code[..at].chars().next_back();
        if before.is_some_and(|c| c.is_alphanumeric() || c == '_') {
            continue;
        }
        let rest = &code[at + "crate::".len()..];
        if let Some(group) = rest.strip_prefix('{') {
            let mut depth = 0;
            let mut word = String::new();
            let mut taking = true;
            for c in group.chars() {
                match c {
                    '{' => {
                        depth += 1;
                        taking = false;
                    }
                    '}' if depth == 0 => break,
                    '}' => depth -= 1,
                    ',' if depth == 0 => {
                        named.insert(std::mem::take(&mut word));
                        taking = true;
                    }
                    ':' if depth == 0 => taking = false,
                    c if taking && depth == 0 && !c.is_whitespace() => word.push(c),
                    _ => {}
                }
            }
            named.insert(word);
        } else {
            named.insert(
                rest.chars()
                    .take_while(|c| c.is_alphanumeric() || *c == '_')
                    .collect(),
            );
        }
    }
    named.remove("");
    named
}

#[test]
fn the_arrows_point_one_way() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let arrows: BTreeMap<_, _> = ARROWS.iter().copied().collect();
    let rooms: BTreeSet<_> = ARROWS
        .iter()
        .map(|(room, _)| *room)
        .chain(LEAVES.iter().copied())
        .collect();
    let mut files = Vec::new();
    sources(&src, &mut files);
    let mut wrong = Vec::new();
    for file in files {
        let room = room_of(&file, &src);
        if room == "lib" || room == "main" {
            continue;
        }
        if !rooms.contains(room.as_str()) {
            wrong.push(format!("{}: room {room} is not in the drawing", file.display()));
            continue;
        }
        let code = code(&file);
        for named in rooms_named(&code) {
            let allowed = named == room
                || LEAVES.contains(&named.as_str())
                || arrows
                    .get(room.as_str())
                    .is_some_and(|to| to.contains(&named.as_str()));
            if rooms.contains(named.as_str()) && !allowed {
                wrong.push(format!("{}: {room} uses {named}", file.display()));
            }
        }
        for (name, users) in CRATES {
            let uses = code.contains(&format!("{name}::")) || code.contains(&format!("use {name}"));
            if uses && !users.contains(&room.as_str()) {
                wrong.push(format!("{}: {room} uses the crate {name}", file.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn the_reader_of_imports_sees_groups_and_paths() {
    let seen =
        rooms_named("use crate::{cache::{Cache, X}, fs, tree::Row}; crate::fuse::mount(); mycrate::no()");
    assert_eq!(
        seen.into_iter().collect::<Vec<_>>(),
        ["cache", "fs", "fuse", "tree"]
    );
}
