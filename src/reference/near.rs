//! "Did you mean": the candidate nearest to what was typed, if it is near enough to be a slip.

use strsim::osa_distance;

/// The candidate that `typed` is most likely a slip for. Another spelling of the same letters
/// (`ImageNet`, `image-net`, `image_net`) always counts; otherwise one slip for every three
/// characters; and something longer that begins with what was typed. `typed` itself is no near miss.
pub fn did_you_mean<'c>(typed: &str, candidates: impl IntoIterator<Item = &'c str>) -> Option<&'c str> {
    let folded = fold(typed);
    candidates
        .into_iter()
        .filter(|candidate| *candidate != typed)
        .filter_map(|candidate| Some((rank(&folded, &fold(candidate))?, candidate)))
        // The first of equals, so that a sorted list gives the same answer every time.
        .min_by_key(|&(rank, _)| rank)
        .map(|(_, candidate)| candidate)
}

/// Lower is nearer; `None` is too far.
fn rank(typed: &str, candidate: &str) -> Option<usize> {
    if typed == candidate {
        return Some(0);
    }
    let (length, other) = (typed.chars().count(), candidate.chars().count());
    let allowed = (length.max(other) / 3).min(4);
    if length.abs_diff(other) <= allowed {
        let distance = osa_distance(typed, candidate);
        if distance <= allowed {
            return Some(distance);
        }
    }
    // A beginning comes after every slip (at most 4), the least left out first.
    (length >= 3 && candidate.starts_with(typed)).then(|| 5 + other - length)
}

fn fold(name: &str) -> String {
    name.chars()
        .filter(|c| !matches!(c, '-' | '_'))
        .flat_map(char::to_lowercase)
        .collect()
}
