//! What a session wants mounted: a TOML file, or one environment variable.

use std::{
    collections::BTreeMap,
    path::{Component, Path, PathBuf},
};

use serde::Deserialize;

use super::SessionError;
use crate::{prefetch_policy::PrefetchPolicy, reference::Reference};

/// What is to be mounted, and around it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spec {
    /// Where datastores are mounted that say nothing else.
    pub root: PathBuf,
    /// Whose home directory gets a link to the root.
    pub user: Option<String>,
    pub datastores: Vec<Wanted>,
}

/// One datastore.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    pub reference: String,
    pub path: PathBuf,
    /// Without it there is no session; otherwise it comes when it can.
    pub required: bool,
    pub prefetch: Option<PrefetchPolicy>,
    /// Only this directory of it is seen at the path.
    pub subdir: Option<PathBuf>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    root: Option<PathBuf>,
    user: Option<String>,
    #[serde(default)]
    datastore: Vec<Entry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    #[serde(rename = "ref")]
    reference: String,
    path: Option<PathBuf>,
    #[serde(default = "yes")]
    required: bool,
    prefetch: Option<String>,
    subdir: Option<PathBuf>,
}

fn yes() -> bool {
    true
}

impl Spec {
    pub fn empty(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
            user: None,
            datastores: Vec::new(),
        }
    }

    /// `[[datastore]]` tables with `ref`, `path`, `required`, `prefetch`, `subdir`; above them `root`, `user`.
    pub fn parse(text: &str, named: &Path, root: &Path) -> Result<Self, SessionError> {
        let wrong = |reason: String| SessionError::Spec {
            named: named.display().to_string(),
            reason,
        };
        let file: File = toml::from_str(text).map_err(|error| {
            let line = error.span().map_or(1, |span| {
                text[..span.start.min(text.len())].matches('\n').count() + 1
            });
            wrong(format!("line {line}: {}", error.message()))
        })?;
        let mut spec = Self {
            user: file.user,
            ..Self::empty(file.root.as_deref().unwrap_or(root))
        };
        if !spec.root.is_absolute() {
            return Err(wrong(format!(
                "root: {} is not an absolute path",
                spec.root.display()
            )));
        }
        for entry in file.datastore {
            let prefetch = entry.prefetch.as_deref().map(str::parse).transpose();
            let prefetch = prefetch.map_err(|error| wrong(format!("{}: {error}", entry.reference)))?;
            spec.add(
                &entry.reference,
                entry.path.as_deref(),
                entry.required,
                prefetch,
                entry.subdir,
            )
            .map_err(&wrong)?;
        }
        spec.distinct().map_err(wrong)?;
        Ok(spec)
    }

    /// `alice:imagenet/3 bob:coco=/data/coco`
    pub fn from_variable(text: &str, name: &str, root: &Path) -> Result<Self, SessionError> {
        let wrong = |reason: String| SessionError::Spec {
            named: name.to_owned(),
            reason,
        };
        let mut spec = Self::empty(root);
        for word in text.split_whitespace() {
            let (reference, path) = match word.split_once('=') {
                Some((reference, path)) => (reference, Some(Path::new(path))),
                None => (word, None),
            };
            spec.add(reference, path, true, None, None).map_err(&wrong)?;
        }
        spec.distinct().map_err(wrong)?;
        Ok(spec)
    }

    /// Adds one, checked.
    pub fn add(
        &mut self,
        typed: &str,
        path: Option<&Path>,
        required: bool,
        prefetch: Option<PrefetchPolicy>,
        subdir: Option<PathBuf>,
    ) -> Result<(), String> {
        let reference: Reference = typed.parse().map_err(|error| format!("{error}"))?;
        let path = match path {
            Some(path) if path.is_absolute() => path.to_owned(),
            Some(path) => return Err(format!("{typed}: {} is not an absolute path", path.display())),
            None => self.root.join(reference.datastore.as_str()),
        };
        let plain = |part| matches!(part, Component::Normal(_));
        if let Some(subdir) = &subdir
            && !(subdir.components().all(plain) && subdir.components().next().is_some())
        {
            return Err(format!(
                "{typed}: subdir {} is not a path below the datastore",
                subdir.display()
            ));
        }
        self.datastores.push(Wanted {
            reference: typed.to_owned(),
            path,
            required,
            prefetch,
            subdir,
        });
        Ok(())
    }

    fn distinct(&self) -> Result<(), String> {
        let mut taken = BTreeMap::new();
        for wanted in &self.datastores {
            if let Some(other) = taken.insert(&wanted.path, &wanted.reference) {
                return Err(format!(
                    "{other} and {} are both to be at {}; give one of them a path",
                    wanted.reference,
                    wanted.path.display()
                ));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Spec, String> {
        Spec::parse(text, Path::new("session.toml"), Path::new("/datastores"))
            .map_err(|error| error.to_string())
    }

    #[test]
    fn a_spec_says_what_where_and_how_badly() {
        let spec = parse(
            "user = \"ann\"\n[[datastore]]\nref = \"alice:imagenet/3\"\n\n[[datastore]]\nref = \"bob:coco\"\n\
             path = \"/data/coco\"\nrequired = false\nprefetch = \"all\"\nsubdir = \"train/a\"\n",
        )
        .unwrap();
        assert_eq!(spec.user.as_deref(), Some("ann"));
        let [first, second] = &spec.datastores[..] else {
            panic!("two")
        };
        assert_eq!(first.path, Path::new("/datastores/imagenet"));
        assert!(first.required && !second.required);
        assert_eq!(second.path, Path::new("/data/coco"));
        assert_eq!(second.prefetch, Some(PrefetchPolicy::All));
        assert_eq!(second.subdir.as_deref(), Some(Path::new("train/a")));
    }

    #[test]
    fn what_is_wrong_is_said_with_its_line() {
        let said = parse("\n[[datastore]]\nref = \"a:b\"\npaht = \"/x\"\n").unwrap_err();
        assert!(said.contains("line 4") && said.contains("paht"), "{said}");
        for (text, part) in [
            ("[[datastore]]\nref = \"a:b/0\"\n", "0"),
            ("[[datastore]]\nref = \"a:b\"\npath = \"x\"\n", "absolute"),
            ("[[datastore]]\nref = \"a:b\"\nsubdir = \"../x\"\n", "subdir"),
            ("[[datastore]]\nref = \"a:b\"\nprefetch = \"some\"\n", "some"),
            (
                "[[datastore]]\nref = \"a:b\"\n[[datastore]]\nref = \"c:b\"\n",
                "a:b and c:b",
            ),
        ] {
            let said = parse(text).unwrap_err();
            assert!(said.contains(part), "{said}");
        }
    }

    #[test]
    fn a_variable_is_words_with_paths() {
        let spec = Spec::from_variable(
            " alice:imagenet/3  bob:coco=/data/coco ",
            "GRID_DATASTORES",
            Path::new("/datastores"),
        )
        .unwrap();
        let places: Vec<_> = spec
            .datastores
            .iter()
            .map(|wanted| (wanted.reference.as_str(), wanted.path.to_str().unwrap()))
            .collect();
        assert_eq!(
            places,
            [
                ("alice:imagenet/3", "/datastores/imagenet"),
                ("bob:coco", "/data/coco")
            ]
        );
        assert!(Spec::from_variable("a:b=c", "X", Path::new("/d")).is_err());
    }
}
