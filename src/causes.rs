//! An error and its causes in one line: what people read, and what logs and sockets carry.

use std::error::Error;

/// "what failed: why: why". Many errors repeat their source in their own words: each is told once.
/// Causes quote servers (a body of XML, say): line breaks and control characters become spaces.
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
    text.split(|c: char| c.is_control() || c == ' ')
        .filter(|word| !word.is_empty())
        .collect::<Vec<_>>()
        .join(" ")
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
        let quoting = Outer::Silent(io::Error::other("403:\r\n <Error>\u{1b}[2J\n</Error>\n"));
        assert_eq!(in_one_line(&quoting), "no catalog: 403: <Error> [2J </Error>");
    }
}
