//! The parser: splits at `:` and `/`, checks each part, and says where it stopped and what to do.

use super::{
    AliasName, DatastoreName, MAX_NAME, ParseError, PinnedReference, QualifiedName, Reference, UserName,
    VersionNumber, VersionSelector,
};

/// The long form's fixed first part: `alice:/datastores/imagenet`.
const LONG_FORM: &str = "/datastores/";

/// Which part of a reference a piece of text is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    User,
    Datastore,
    Alias,
}

impl Part {
    fn name(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::Datastore => "datastore",
            Self::Alias => "alias",
        }
    }

    fn allows(self, c: char) -> bool {
        c.is_ascii_alphanumeric()
            || matches!(c, '.' | '_' | '-')
            || (self == Self::User && matches!(c, '@' | '+'))
    }

    fn may_begin_with(self, c: char) -> bool {
        match self {
            Self::Alias => c.is_ascii_alphabetic(),
            Self::User | Self::Datastore => c.is_ascii_alphanumeric(),
        }
    }

    fn alphabet(self) -> &'static str {
        match self {
            Self::User => "a user is letters, digits and . _ - @ +",
            Self::Datastore => "a datastore is letters, digits and . _ -",
            Self::Alias => "an alias is letters, digits and . _ -",
        }
    }

    fn beginning(self) -> &'static str {
        match self {
            Self::User => "a user begins with a letter or a digit",
            Self::Datastore => "a datastore begins with a letter or a digit",
            Self::Alias => "a version is a number, an alias begins with a letter",
        }
    }
}

/// The text as typed, for turning byte positions into columns.
#[derive(Clone, Copy)]
struct Typed<'a>(&'a str);

impl<'a> Typed<'a> {
    /// `at` is a byte position on a character boundary of the text.
    fn error(self, at: usize, message: impl Into<String>) -> ParseError {
        let column = self.0.get(..at).unwrap_or(self.0).chars().count() + 1;
        ParseError {
            text: self.0.to_owned(),
            column,
            message: message.into(),
        }
    }

    /// Checks one name that begins at byte `start`.
    fn name(self, part: Part, name: &str, start: usize) -> Result<(), ParseError> {
        let Some(first) = name.chars().next() else {
            return Err(self.error(start, format!("the {} is empty", part.name())));
        };
        if matches!(name, "." | "..") {
            return Err(self.error(
                start,
                format!("{name:?} is not a {}: names are not paths", part.name()),
            ));
        }
        // What is wrong with a character comes before what is wrong with its place.
        if let Some((at, bad)) = name.char_indices().find(|&(_, c)| !part.allows(c)) {
            return Err(self.error(
                start + at,
                format!("{} is not allowed here: {}", shown(bad), part.alphabet()),
            ));
        }
        if !part.may_begin_with(first) {
            return Err(self.error(
                start,
                format!("{} cannot come first: {}", shown(first), part.beginning()),
            ));
        }
        if name.len() > MAX_NAME {
            return Err(self.error(
                start + MAX_NAME,
                format!(
                    "the {} is too long: {} bytes, at most {MAX_NAME}",
                    part.name(),
                    name.len()
                ),
            ));
        }
        if part == Part::Alias && name.eq_ignore_ascii_case("latest") {
            let message = if name == "latest" {
                "`latest` always means the highest version and cannot name another".to_owned()
            } else {
                format!("write `latest`, not `{name}`: case matters")
            };
            return Err(self.error(start, message));
        }
        Ok(())
    }

    fn number(self, digits: &str, start: usize) -> Result<VersionNumber, ParseError> {
        if digits.is_empty() {
            return Err(self.error(start, "the version is empty: versions are 1, 2, 3, …"));
        }
        if let Some(at) = digits.find(|c: char| !c.is_ascii_digit()) {
            return Err(self.error(start + at, "a version number is digits only"));
        }
        let significant = digits.trim_start_matches('0');
        if significant.is_empty() {
            return Err(self.error(start, "there is no version 0: versions are 1, 2, 3, …"));
        }
        if significant.len() < digits.len() {
            return Err(self.error(
                start,
                format!("a version has no leading zeros: write {significant}"),
            ));
        }
        digits
            .parse()
            .ok()
            .and_then(VersionNumber::new)
            .ok_or_else(|| self.error(start, format!("the version is too large: at most {}", u64::MAX)))
    }

    fn selector(self, text: &str, start: usize) -> Result<VersionSelector, ParseError> {
        if text.is_empty() {
            return Err(self.error(
                start,
                "the version is missing: name one after the `/`, or leave the `/` out",
            ));
        }
        if text == "latest" {
            return Ok(VersionSelector::Latest);
        }
        if text.starts_with(|c: char| c.is_ascii_digit()) {
            return self.number(text, start).map(VersionSelector::Number);
        }
        if let Some(digits) = text.strip_prefix(['-', '+'])
            && digits.starts_with(|c: char| c.is_ascii_digit())
        {
            return Err(self.error(start, "a version has no sign: versions are 1, 2, 3, …"));
        }
        self.name(Part::Alias, text, start)?;
        Ok(VersionSelector::Alias(AliasName(text.to_owned())))
    }
}

/// A character as an error message may show it: one that moves the cursor is spelled out.
fn shown(c: char) -> String {
    match c {
        ' ' => "a space".to_owned(),
        c if c.is_control() => format!("the control character {}", c.escape_default()),
        c => format!("`{}`", c.escape_debug()),
    }
}

/// The text is one part and nothing else.
pub(super) fn whole(text: &str, part: Part) -> Result<(), ParseError> {
    Typed(text).name(part, text, 0)
}

pub(super) fn version_number(text: &str) -> Result<VersionNumber, ParseError> {
    Typed(text).number(text, 0)
}

pub(super) fn reference(text: &str) -> Result<Reference, ParseError> {
    let typed = Typed(text);
    if text.is_empty() {
        return Err(typed.error(0, "the reference is empty: write [user:]datastore[/version]"));
    }
    if let Some(at) = text.find("://") {
        return Err(typed.error(at, "this is a URL: a reference is [user:]datastore[/version]"));
    }
    let (owner, rest, rest_at) = match text.split_once(':') {
        None => (None, text, 0),
        Some(("", _)) => {
            return Err(typed.error(
                0,
                "the user before the `:` is empty: leave the `:` out to mean you",
            ));
        }
        Some((owner, rest)) => {
            // `alice/imagenet:3` is a slip of the separators, not a strange user.
            if let Some(at) = owner.find('/') {
                return Err(typed.error(
                    at,
                    "`/` comes before the version, `:` after the user: user:datastore/version",
                ));
            }
            typed.name(Part::User, owner, 0)?;
            (Some(UserName(owner.to_owned())), rest, owner.len() + 1)
        }
    };
    if let Some(at) = rest.find(':') {
        return Err(typed.error(
            rest_at + at,
            "only one `:` (after the user); the version comes after a `/`",
        ));
    }
    let (rest, rest_at) = match rest.strip_prefix(LONG_FORM) {
        Some(short) => (short, rest_at + LONG_FORM.len()),
        None if rest.starts_with('/') => {
            return Err(typed.error(
                rest_at,
                "a path here is /datastores/NAME; a datastore alone has no `/` before it",
            ));
        }
        None => (rest, rest_at),
    };
    let (datastore, version) = match rest.split_once('/') {
        None => (rest, None),
        Some((datastore, version)) => (datastore, Some(version)),
    };
    typed.name(Part::Datastore, datastore, rest_at)?;
    let version = match version {
        None => VersionSelector::Latest,
        Some(version) => {
            let version_at = rest_at + datastore.len() + 1;
            if let Some(at) = version.find('/') {
                return Err(typed.error(version_at + at, second_slash(owner.is_some(), datastore, version)));
            }
            typed.selector(version, version_at)?
        }
    };
    Ok(Reference {
        owner,
        datastore: DatastoreName(datastore.to_owned()),
        version,
    })
}

/// Two slashes: a path below the datastore, two versions, or `alice/imagenet/3`.
fn second_slash(has_owner: bool, first: &str, rest: &str) -> String {
    let mut parts = rest.split('/');
    let (second, third) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    if is_number(second) && is_number(third) {
        return "a reference names one version, this is a second".to_owned();
    }
    if third.is_empty() {
        return "nothing may follow the version: leave the last `/` out".to_owned();
    }
    let slip = format!("{first}:{second}/{third}");
    if !has_owner && parts.next().is_none() && reference(&slip).is_ok() {
        return format!("too many `/`: the user is followed by `:`; did you mean {slip}?");
    }
    "nothing may follow the version: a whole version is mounted, not a path in it".to_owned()
}

pub(super) fn qualified_name(text: &str) -> Result<QualifiedName, ParseError> {
    let Reference { owner, datastore, .. } = reference(text)?;
    let typed = Typed(text);
    let Some(owner) = owner else {
        return Err(typed.error(0, "the user is missing: write user:datastore"));
    };
    // `alice:x/latest` selects what no version selects, but it is a version all the same.
    let path_at = owner.as_str().len() + 1;
    let name_at = path_at
        + if text[path_at..].starts_with('/') {
            LONG_FORM.len()
        } else {
            0
        };
    let slash = text[name_at..].find('/').map(|at| name_at + at);
    if let Some(at) = slash {
        return Err(typed.error(at, "no version here: write user:datastore"));
    }
    Ok(QualifiedName { owner, datastore })
}

pub(super) fn pinned_reference(text: &str) -> Result<PinnedReference, ParseError> {
    let Reference {
        owner,
        datastore,
        version,
    } = reference(text)?;
    let typed = Typed(text);
    let Some(owner) = owner else {
        return Err(typed.error(0, "the user is missing: write user:datastore/version"));
    };
    match version {
        VersionSelector::Number(version) => Ok(PinnedReference {
            name: QualifiedName { owner, datastore },
            version,
        }),
        VersionSelector::Latest => Err(typed.error(
            text.len(),
            "the version number is missing: write user:datastore/3",
        )),
        VersionSelector::Alias(alias) => {
            let at = text.len() - alias.as_str().len();
            Err(typed.error(at, "this must be a version number: aliases are resolved before"))
        }
    }
}
