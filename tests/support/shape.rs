//! The shapes of JSON that a document promises: every field that comes is written down there with its type,
//! and every field that is written down comes.

#![allow(dead_code, reason = "each test file uses its own part of it")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use serde_json::Value;

/// One section of the document: field → the types it may have.
pub struct Shape {
    document: &'static str,
    section: String,
    pub fields: BTreeMap<String, BTreeSet<String>>,
    seen: BTreeSet<String>,
}

impl Shape {
    /// What a command prints, as docs/json.md has it.
    pub fn of(section: &str) -> Self {
        Self::in_document("docs/json.md", "\n## ", section)
    }

    /// The section of a document whose heading names `section`.
    pub fn in_document(document: &'static str, heading: &str, section: &str) -> Self {
        let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(document)).unwrap();
        let fields = text
            .split(heading)
            .skip(1)
            .find(|text| {
                text.lines()
                    .next()
                    .is_some_and(|heading| heading.contains(&format!("`{section}`")))
            })
            .unwrap_or_else(|| panic!("{document} has no section `{section}`"))
            .lines()
            .filter_map(|line| {
                let mut cells = line.strip_prefix("| `")?.split('|');
                let field = cells.next()?.trim().trim_end_matches('`').to_owned();
                let types = cells.next()?.trim().split(" or ").map(str::to_owned).collect();
                Some((field, types))
            })
            .collect();
        Self {
            document,
            section: section.to_owned(),
            fields,
            seen: BTreeSet::new(),
        }
    }

    /// What was printed, parsed: it has no field that is not written down.
    pub fn take(&mut self, printed: &str) -> Value {
        let value: Value = serde_json::from_str(printed).unwrap_or_else(|error| panic!("{error}: {printed}"));
        self.walk("", &value);
        value
    }

    fn walk(&mut self, path: &str, value: &Value) {
        let found = match value {
            Value::Array(elements) => {
                for element in elements {
                    self.walk(&format!("{path}[]"), element);
                }
                return;
            }
            Value::Object(fields) => {
                for (name, field) in fields {
                    let joined = |name: &str| {
                        if path.is_empty() {
                            name.to_owned()
                        } else {
                            format!("{path}.{name}")
                        }
                    };
                    // A key that is data is written down as `*`.
                    let any = joined("*");
                    let is_data = self
                        .fields
                        .keys()
                        .any(|field| *field == any || field.starts_with(&format!("{any}.")));
                    self.walk(&if is_data { any } else { joined(name) }, field);
                }
                return;
            }
            Value::Null => "null",
            Value::Bool(_) => "boolean",
            Value::String(_) => "string",
            Value::Number(number) if number.is_u64() => "integer",
            Value::Number(_) => "number",
        };
        let (document, section) = (self.document, &self.section);
        let types = self
            .fields
            .get(path)
            .unwrap_or_else(|| panic!("{document} does not tell of {path:?} in `{section}`"));
        assert!(
            types.contains(found),
            "{section}: {path} is {found}, {document} says {types:?}"
        );
        self.seen.insert(path.to_owned());
    }

    pub fn was_all_seen(self) {
        self.was_all_seen_but("(nothing)");
    }

    /// What begins with `elsewhere` another test sees.
    pub fn was_all_seen_but(self, elsewhere: &str) {
        let unseen: Vec<_> = self
            .fields
            .keys()
            .filter(|field| !self.seen.contains(*field) && !field.starts_with(elsewhere))
            .collect();
        assert!(
            unseen.is_empty(),
            "`{}` never had these fields of {}: {unseen:?}",
            self.section,
            self.document
        );
    }
}
