//! A hundred thousand datastores, listed a page at a time: whoever serves them holds no more for the last page
//! than for the first.

#[path = "support/plane.rs"]
mod plane;
#[path = "support/s3_origin.rs"]
mod s3_origin;
#[path = "support/sandbox.rs"]
mod sandbox;

use std::{fs, process::Command};

use plane::{Administrator, Replica, somebody};
use s3_origin::S3Origin;

const USERS: [&str; 2] = ["ann", "ben"];
const EACH: usize = 50_000;
/// What the allocator and the runtime may grow by while the same is done a hundred times.
const MORE: u64 = 16 << 20;

/// The most memory that the server ever had.
fn peak(replica: &Replica) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", replica.pid())).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

#[test]
fn a_hundred_thousand_datastores_are_listed_in_the_memory_of_one_page() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let origin = runtime.block_on(S3Origin::start(Default::default()));
    let settings = origin.settings();
    let settings: Vec<(&str, String)> = settings
        .iter()
        .map(|(name, value)| (name.as_str(), value.clone()))
        .collect();
    let administrator = Administrator::new("s3://bucket/team", &settings);
    let token = administrator.person(USERS[0]);
    administrator.ok(&["user", "add", USERS[1]]);
    administrator.ok(&["team", "add", "all", USERS[0], USERS[1]]);
    // As records lie in a store; only their names matter to a listing.
    for user in USERS {
        for number in 0..EACH {
            origin.put(&format!("team/records/{user}/data{number:05}/{:020}.json", 1), "");
        }
    }
    let replica = administrator.serve("127.0.0.1:0", &["--rate", "10000"]);
    let page = |after: &str| -> serde_json::Value {
        let url = format!("{}/v1/datastores?limit=1000{after}", replica.url);
        let answer = Command::new("curl")
            .args(["-sSf", "-H", &format!("Authorization: Bearer {token}"), &url])
            .output()
            .unwrap();
        serde_json::from_slice(&answer.stdout).unwrap()
    };
    let (mut after, mut listed, mut first) = (String::new(), 0, None);
    loop {
        let page = page(&after);
        listed += page["items"].as_array().unwrap().len();
        first.get_or_insert_with(|| peak(&replica));
        match page["next"].as_str() {
            Some(next) => after = format!("&after={next}"),
            None => break,
        }
    }
    let (first, last) = (first.unwrap(), peak(&replica));
    eprintln!("{listed} datastores; at most {first} bytes for the first page, {last} for all");
    assert_eq!(listed, USERS.len() * EACH);
    assert!(
        last <= first + MORE,
        "{first} bytes for the first page, {last} for all"
    );

    let somebody = somebody(&replica, &token);
    let all = somebody.ok(&["list", "--global"]);
    assert_eq!(all.lines().count(), USERS.len() * EACH + 1);
}
