//! Lists a prefix in parallel over the key space.
//!
//! One task begins at the first key. A task that has read a few pages and sees that there is room
//! for more tasks gives away the end of its range, cut at several keys at once: a range nobody has
//! seen the end of after each leading character of the current key, a known range in equal parts.
//! A cut that meets nothing costs one request, and nothing need be known of how keys are made.
//!
//! Stores do not agree on the order: by bytes, `a-b` comes before `a/b`; SeaweedFS, which keeps
//! directories, lists `a/b` first. The two orders agree on every comparison with a key that has no
//! slash and nothing but letters and digits where it differs, so only such keys are cuts: the first
//! level is listed in parallel, flat or not, and what lies below one name of it by one task.

use std::{
    cmp::Ordering as Order,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use futures::StreamExt;
use tokio::{sync::mpsc, task::JoinSet};

use super::{PublishError, sort::part_order};
use crate::origin::{ObjectInfo, Store};

/// Keys handed over together.
const PAGE: usize = 1000;
/// A range is worth cutting when this many of its keys were read and there are more.
const PAGES_BEFORE_CUT: usize = 2;

/// Keys after `after` up to and including `end`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct KeyRange {
    after: Option<String>,
    end: Option<String>,
}

struct Shared {
    store: Store,
    /// How many more tasks there may be.
    room: AtomicUsize,
    pages: mpsc::Sender<Vec<ObjectInfo>>,
    cut_off: mpsc::Sender<KeyRange>,
}

/// Sends every object below the store's prefix to `pages`, each once, in no order.
/// `sorted`: whether this kind of store lists in key order; otherwise one task lists all.
pub(super) async fn list_all(
    store: &Store,
    sorted: bool,
    threads: usize,
    pages: mpsc::Sender<Vec<ObjectInfo>>,
) -> Result<(), PublishError> {
    let threads = if sorted { threads.max(1) } else { 1 };
    let (cut_off, mut ranges) = mpsc::channel(threads);
    let shared = Arc::new(Shared {
        store: store.clone(),
        room: AtomicUsize::new(threads - 1),
        pages,
        cut_off,
    });
    let mut tasks = JoinSet::new();
    tasks.spawn(list_range(shared.clone(), KeyRange::default(), sorted));
    loop {
        tokio::select! {
            // A task hands over its ranges before it ends, so look there first.
            biased;
            Some(range) = ranges.recv() => {
                tasks.spawn(list_range(shared.clone(), range, sorted));
            }
            Some(ended) = tasks.join_next() => {
                ended??;
                shared.room.fetch_add(1, Ordering::Relaxed);
                if tasks.is_empty() && ranges.is_empty() {
                    return Ok(());
                }
            }
        }
    }
}

async fn list_range(shared: Arc<Shared>, range: KeyRange, sorted: bool) -> Result<(), PublishError> {
    let KeyRange { after, mut end } = range;
    let mut objects = shared.store.list("", after.as_deref());
    let mut last = after;
    let mut page = Vec::with_capacity(PAGE);
    let mut pages_read = 0;
    while let Some(object) = objects.next().await {
        let object = object?;
        if sorted {
            let ascends = |last: &String| *last < object.key || part_order(last, &object.key).is_lt();
            if !last.as_ref().is_none_or(ascends) {
                let url = shared.store.url().to_string();
                return Err(PublishError::BadListing { url, key: object.key });
            }
            if end.as_ref().is_some_and(|end| object.key > *end) {
                break;
            }
            last = Some(object.key.clone());
        }
        page.push(object);
        if page.len() < PAGE {
            continue;
        }
        if shared
            .pages
            .send(std::mem::replace(&mut page, Vec::with_capacity(PAGE)))
            .await
            .is_err()
        {
            // Nobody wants them any more: the receiver's own error says why.
            return Ok(());
        }
        pages_read += 1;
        if sorted
            && pages_read >= PAGES_BEFORE_CUT
            && let Some(key) = &last
        {
            end = give_away(&shared, key, end).await;
        }
    }
    // A closed channel: as above.
    let _ = shared.pages.send(page).await;
    Ok(())
}

/// Cuts off what lies behind the next keys if there is room for more tasks; the new end.
async fn give_away(shared: &Shared, key: &str, end: Option<String>) -> Option<String> {
    let room = shared.room.swap(0, Ordering::Relaxed);
    let mut cuts = if room == 0 {
        Vec::new()
    } else {
        cuts(key, end.as_deref(), room)
    };
    shared.room.fetch_add(room - cuts.len(), Ordering::Relaxed);
    let mut upper = end;
    while let Some(cut) = cuts.pop() {
        let range = KeyRange {
            after: Some(cut.clone()),
            end: upper,
        };
        // As many as there was room for, so the channel has a place for each; the coordinator
        // lives longer than its tasks.
        if shared.cut_off.send(range).await.is_err() {
            return Some(cut);
        }
        upper = Some(cut);
    }
    upper
}

/// The characters that cuts are made of: safe in every request, in byte order.
const ALPHABET: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
/// How finely a known range is cut.
const DIGITS: u32 = 4;

/// At most `count` keys without a slash, strictly between what lies below the first name of `key`
/// and `end`, ascending.
fn cuts(key: &str, end: Option<&str>, count: usize) -> Vec<String> {
    let key = key.split_inclusive('/').next().unwrap_or_default();
    let mut cuts = match end {
        None => cuts_after_each_part(key),
        Some(end) => cuts_between(key, end, count),
    };
    cuts.retain(|cut| cut.as_str() > key && end.is_none_or(|end| cut.as_str() < end));
    // Stores differ in where `a/x` comes relative to `a-1`: by bytes, or part by part. Only a cut whose every
    // byte is above the slash has the same keys before it in both orders; a key of no cut is in no gap.
    cuts.retain(|cut| cut.bytes().all(|byte| byte > b'/'));
    cuts.sort_unstable();
    cuts.dedup();
    if cuts.len() > count {
        // Evenly over the levels; the outermost always, it may hold most.
        let step = cuts.len() as f64 / count as f64;
        let chosen = (1..=count).map(|n| (n as f64 * step) as usize - 1);
        cuts = chosen.filter_map(|index| cuts.get(index).cloned()).collect();
        cuts.dedup();
    }
    cuts
}

/// For `ab/`: `ab0`, `ac`, `b`.
fn cuts_after_each_part(key: &str) -> Vec<String> {
    key.char_indices()
        .filter_map(|(position, character)| {
            let next = ALPHABET.iter().find(|next| char::from(**next) > character)?;
            Some(format!("{}{}", &key[..position], char::from(*next)))
        })
        .collect()
}

fn cuts_between(key: &str, end: &str, count: usize) -> Vec<String> {
    let common: usize = key
        .chars()
        .zip(end.chars())
        .take_while(|(a, b)| a == b)
        .map(|(character, _)| character.len_utf8())
        .sum();
    let low = rank(&key.as_bytes()[common..]);
    let high = rank(&end.as_bytes()[common..]);
    let key = key.trim_end_matches('/');
    let parts = count as u64 + 1;
    (1..parts)
        .map(|part| low + high.saturating_sub(low) * part / parts)
        .map(|value| format!("{}{}", &key[..common], digits(value)))
        .collect()
}

/// The first bytes as a number in base 62, rounded down to the alphabet.
fn rank(bytes: &[u8]) -> u64 {
    (0..DIGITS as usize).fold(0, |value, position| {
        let byte = bytes.get(position).copied().unwrap_or(0);
        let below = ALPHABET.partition_point(|character| match character.cmp(&byte) {
            Order::Less | Order::Equal => true,
            Order::Greater => false,
        });
        value * 62 + below.saturating_sub(1) as u64
    })
}

fn digits(mut value: u64) -> String {
    let mut text = [b'0'; DIGITS as usize];
    for digit in text.iter_mut().rev() {
        *digit = ALPHABET[(value % 62) as usize];
        value /= 62;
    }
    String::from_utf8_lossy(&text).into_owned()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn cuts_lie_strictly_between_and_ascend(
            key in "[ -~é]{0,20}",
            end in proptest::option::of("[ -.0-~é]{0,20}"),
            other in "[ -~é]{0,20}",
            count in 1usize..40,
        ) {
            let cuts = cuts(&key, end.as_deref(), count);
            prop_assert!(cuts.len() <= count);
            prop_assert!(cuts.is_sorted_by(|a, b| a < b));
            for cut in &cuts {
                prop_assert!(*cut > key);
                prop_assert!(!cut.contains('/'));
                prop_assert!(end.as_ref().is_none_or(|end| cut < end));
                // What makes a cut safe whatever the store's order is.
                prop_assert_eq!(part_order(cut, &other), cut.cmp(&other));
                for (at, _) in cut.char_indices() {
                    let directory = format!("{}/{other}", &cut[..at]);
                    prop_assert_eq!(part_order(cut, &directory), cut.cmp(&directory), "{}", directory);
                }
            }
        }
    }

    #[test]
    fn an_open_range_is_cut_at_every_level_and_a_known_one_evenly() {
        assert_eq!(cuts("ab/c", None, 9), ["ab0", "ac", "b"]);
        assert_eq!(cuts("ab/c", None, 1), ["b"]);
        assert_eq!(cuts("img_0000", Some("img_9999"), 2).len(), 2);
        let middle = cuts("img_0000", Some("img_9999"), 1);
        assert!(middle[0].starts_with("img_4"), "{middle:?}");
        assert!(cuts("a", Some("a"), 3).is_empty());
    }
}
