//! An error and its causes in one line: what people read, and what logs and sockets carry.

use std::error::Error;

/// "what failed: why: why". Many errors repeat their source in their own words: each is told once.
pub fn in_one_line(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.contains(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[derive(Debug, thiserror::Error)]
    enum Outer {
        #[error("no catalog")]
        Silent(#[source] io::Error),
        #[error("no catalog: {0}")]
        Repeating(#[source] io::Error),
    }

    #[test]
    fn a_cause_is_told_once() {
        let cause = || io::Error::other("no route");
        assert_eq!(in_one_line(&Outer::Silent(cause())), "no catalog: no route");
        assert_eq!(in_one_line(&Outer::Repeating(cause())), "no catalog: no route");
    }
}
