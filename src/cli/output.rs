//! What people see: errors with their causes, tables, byte counts.

use std::{
    fmt::Write as _,
    io::{self, IsTerminal, Write},
};

use serde::Serialize;

/// A failed write to a closed pipe (`… | head`) is the reader's choice, not our failure.
pub fn print(text: &str) {
    let _ = try_print(text);
}

/// As [`print`], for what goes on as long as somebody reads.
pub fn try_print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

pub fn print_json(value: &impl Serialize) {
    match serde_json::to_string_pretty(value) {
        Ok(text) => print(&format!("{text}\n")),
        Err(error) => note(&format!("this cannot be shown as JSON: {error}")),
    }
}

/// One line for people, on standard error.
pub fn note(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

pub fn stderr_is_terminal() -> bool {
    io::stderr().is_terminal()
}

pub fn stdout_is_terminal() -> bool {
    io::stdout().is_terminal()
}

/// Columns and rows of the terminal that standard output is; `None` where it is none.
pub fn terminal_size() -> Option<(usize, usize)> {
    let (width, height) = terminal_size::terminal_size_of(io::stdout())?;
    Some((usize::from(width.0), usize::from(height.0)))
}

/// How a piece of text stands out.
#[derive(Clone, Copy)]
pub enum Tone {
    Heading,
    Warning,
    Bad,
}

/// Colours, where standard output is a terminal that wants them (`NO_COLOR`, `TERM=dumb`).
pub fn toned(tone: Tone, text: &str) -> String {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    let wanted =
        stdout_is_terminal() && set("NO_COLOR").is_none() && set("TERM").is_none_or(|term| term != "dumb");
    paint(wanted, tone, text)
}

fn paint(wanted: bool, tone: Tone, text: &str) -> String {
    let code = match tone {
        Tone::Heading => 1,
        Tone::Warning => 33,
        Tone::Bad => 31,
    };
    if wanted {
        format!("\x1b[{code}m{text}\x1b[0m")
    } else {
        text.to_owned()
    }
}

/// Left-aligned columns, two spaces apart; the last one is not padded. On a terminal no line is wider than
/// it: what is too long loses its middle.
pub fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    table_within(terminal_size().map(|(width, _)| width), header, rows)
}

const BETWEEN: usize = 2;
/// No column is made narrower.
const NARROWEST: usize = 8;

fn table_within(most: Option<usize>, header: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = header.iter().map(|cell| cell.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    if let Some(most) = most {
        let between = BETWEEN * widths.len().saturating_sub(1);
        let mut excess = (widths.iter().sum::<usize>() + between).saturating_sub(most);
        // The widest gives way, a character at a time: tables are small.
        while excess > 0 {
            match widths.iter_mut().max().filter(|width| **width > NARROWEST) {
                Some(widest) => *widest -= 1,
                None => break,
            }
            excess -= 1;
        }
    }
    let mut text = String::new();
    let mut line = |cells: &mut dyn Iterator<Item = &str>| {
        let mut row = String::new();
        for (cell, width) in cells.zip(&widths) {
            let _ = write!(row, "{:width$}  ", shortened(cell, *width));
        }
        text.push_str(row.trim_end());
        text.push('\n');
    };
    line(&mut header.iter().copied());
    for row in rows {
        line(&mut row.iter().map(String::as_str));
    }
    text
}

/// At most `width` characters: the ends say more than the middle.
pub fn shortened(text: &str, width: usize) -> String {
    let length = text.chars().count();
    if length <= width {
        return text.to_owned();
    }
    let kept = width.saturating_sub(1);
    let (front, back) = (kept.div_ceil(2), kept / 2);
    let mut short: String = text.chars().take(front).collect();
    short.push('…');
    short.extend(text.chars().skip(length - back));
    short
}

/// `1 min 5 s`: for people.
pub fn seconds(count: f64) -> String {
    let whole = count as u64;
    match whole {
        0 if count < 0.000_5 => "0 s".into(),
        0 if count < 1.0 => format!("{:.0} ms", count * 1000.0),
        0..60 => format!("{count:.1} s"),
        60..3600 => format!("{} min {} s", whole / 60, whole % 60),
        3600..86400 => format!("{} h {} min", whole / 3600, whole % 3600 / 60),
        _ => format!("{} d {} h", whole / 86400, whole % 86400 / 3600),
    }
}

/// `1.4 GiB`: for people; machines get bytes.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut value = count as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_counts_read_well() {
        for (count, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1536, "1.5 KiB"),
            ((1 << 20) - 1, "1.0 MiB"),
            (3 << 30, "3.0 GiB"),
            (u64::MAX, "16.0 EiB"),
        ] {
            assert_eq!(bytes(count), text);
        }
    }

    #[test]
    fn tables_align() {
        let rows = [vec!["a".into(), "bbbb".into()], vec!["ccc".into(), "d".into()]];
        assert_eq!(table(&["X", "Y"], &rows), "X    Y\na    bbbb\nccc  d\n");
    }

    #[test]
    fn a_table_fits_the_terminal_and_keeps_both_ends() {
        let rows = [vec![
            "alice:imagenet/3".into(),
            "/home/alice/datastores/a-rather-long-name/imagenet".into(),
        ]];
        for width in [20, 40, 66, 80] {
            let text = table_within(Some(width), &["REFERENCE", "MOUNT POINT"], &rows);
            assert!(text.lines().all(|line| line.chars().count() <= width), "{text}");
            assert!(text.contains("/3") && text.contains("net"), "{text}");
        }
        assert_eq!(shortened("abcdefgh", 5), "ab…gh");
        assert_eq!(shortened("äöü", 3), "äöü");
    }

    #[test]
    fn colour_is_a_matter_of_the_terminal_alone() {
        assert_eq!(paint(false, Tone::Bad, "no"), "no");
        assert_eq!(paint(true, Tone::Bad, "no"), "\u{1b}[31mno\u{1b}[0m");
    }

    #[test]
    fn durations_read_well() {
        for (count, text) in [
            (0.0, "0 s"),
            (0.0123, "12 ms"),
            (1.25, "1.2 s"),
            (65.0, "1 min 5 s"),
            (3725.0, "1 h 2 min"),
            (90_000.0, "1 d 1 h"),
        ] {
            assert_eq!(seconds(count), text);
        }
    }
}
