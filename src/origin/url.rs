//! The grammar of store locations.
//!
//! Owns parsing, normalising and printing. Knows nothing of clients or credentials.

use std::{fmt, path::PathBuf, str::FromStr};

use percent::decode;
use serde::{Deserialize, Serialize};
use url::Url;

use super::OriginError;

/// An object store location: `file:///dir`, `s3://bucket/prefix`, `gs://…`, `az://…`, `http(s)://…`.
/// Never holds credentials (user info in the URL is a parse error).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct StoreUrl(Url);

/// What kind of store a URL names, taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreKind {
    /// An absolute directory.
    File(PathBuf),
    S3 {
        bucket: String,
    },
    Gcs {
        bucket: String,
    },
    Azure {
        container: String,
    },
    /// `http(s)://host[:port]`, without a path.
    Http {
        base: String,
    },
}

impl StoreUrl {
    pub fn kind(&self) -> StoreKind {
        let bucket = || self.0.host_str().unwrap_or_default().to_owned();
        match self.0.scheme() {
            "file" => StoreKind::File(PathBuf::from(format!("/{}", self.prefix()))),
            "s3" => StoreKind::S3 { bucket: bucket() },
            "gs" => StoreKind::Gcs { bucket: bucket() },
            "az" => StoreKind::Azure { container: bucket() },
            _ => StoreKind::Http {
                base: self.0[..url::Position::BeforePath].to_owned(),
            },
        }
    }

    /// The part below the bucket (or below the root, or the server), decoded, without slashes at its ends.
    pub fn prefix(&self) -> String {
        // `parse` has refused what does not decode.
        decode(self.0.path().trim_matches('/')).unwrap_or_default()
    }

    pub fn scheme(&self) -> &str {
        self.0.scheme()
    }
}

impl FromStr for StoreUrl {
    type Err = OriginError;

    fn from_str(text: &str) -> Result<Self, OriginError> {
        let refuse = |reason: &str| OriginError::BadUrl {
            // The text may hold a password: show none of what precedes an `@`.
            text: redacted(text),
            reason: reason.to_owned(),
        };
        let text_url = if text.starts_with('/') {
            // A plain absolute path, as typed in a shell: every character stands for itself.
            format!("file://{}", percent::encode(text))
        } else {
            text.to_owned()
        };
        let Ok(mut url) = Url::parse(&text_url) else {
            return Err(refuse(
                "not a URL; write file:///dir, s3://bucket/prefix, gs://…, az://…, http://… or https://…",
            ));
        };
        if !url.username().is_empty() || url.password().is_some() {
            return Err(refuse(
                "a store URL holds no user, password or account; credentials come from the environment (AWS_…, GOOGLE_…, AZURE_…)",
            ));
        }
        if url.query().is_some() || url.fragment().is_some() {
            return Err(refuse(
                "a store URL has no ?query and no #fragment; write %3F or %23 in a prefix",
            ));
        }
        let scheme = match url.scheme() {
            "file" => "file",
            "s3" | "s3a" => "s3",
            "gs" | "gcs" => "gs",
            "az" | "azure" | "abfs" | "abfss" => "az",
            "http" => "http",
            "https" => "https",
            _ => {
                return Err(refuse(
                    "unknown kind of store; known are file, s3, gs, az, http and https",
                ));
            }
        };
        match (scheme, url.host_str()) {
            ("file", None | Some("" | "localhost")) => {}
            ("file", Some(_)) => return Err(refuse("a file URL has three slashes: file:///dir")),
            (_, None | Some("")) => return Err(refuse("the bucket (or host) is missing")),
            _ => {}
        }
        if !matches!(scheme, "http" | "https") && url.port().is_some() {
            return Err(refuse(
                "a bucket has no port; the server goes into AWS_ENDPOINT_URL (or its like)",
            ));
        }
        if url.scheme() != scheme {
            let rest = url
                .as_str()
                .split_once(':')
                .map(|(_, rest)| rest.to_owned())
                .unwrap_or_default();
            url = Url::parse(&format!("{scheme}:{rest}")).map_err(|_| refuse("not a URL"))?;
        }
        let path = url.path().trim_end_matches('/').to_owned();
        let path = if scheme == "file" { collapse(&path) } else { path };
        match decode(path.trim_start_matches('/')) {
            None => return Err(refuse("the path is not UTF-8")),
            Some(prefix) if prefix.chars().any(char::is_control) => {
                return Err(refuse("the path holds a control character"));
            }
            Some(prefix) if !prefix.is_empty() && prefix.split('/').any(|s| matches!(s, "" | "." | "..")) => {
                return Err(refuse("the path has an empty, `.` or `..` part"));
            }
            Some(_) => {}
        }
        if path.starts_with("//") {
            return Err(refuse("the path has an empty part"));
        }
        url.set_path(&path);
        Ok(Self(url))
    }
}

fn collapse(path: &str) -> String {
    path.split('/')
        .filter(|part| !part.is_empty())
        .fold(String::new(), |all, part| all + "/" + part)
}

fn redacted(text: &str) -> String {
    let shown = match (text.split_once("://"), text.rfind('@')) {
        (Some((scheme, _)), Some(at)) => format!("{scheme}://…{}", &text[at..]),
        _ => text.to_owned(),
    };
    shown.split('?').next().unwrap_or_default().to_owned()
}

impl fmt::Display for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.scheme() == "file" && self.0.path() == "/" {
            return f.write_str("file:///");
        }
        f.write_str(self.0.as_str().trim_end_matches('/'))
    }
}

impl TryFrom<String> for StoreUrl {
    type Error = OriginError;
    fn try_from(text: String) -> Result<Self, OriginError> {
        text.parse()
    }
}

impl From<StoreUrl> for String {
    fn from(url: StoreUrl) -> Self {
        url.to_string()
    }
}

/// Percent encoding, as much of it as store URLs and listings need.
pub(super) mod percent {
    use std::fmt::Write as _;

    /// `None` when the result is not UTF-8. A `%` that starts no escape stands for itself.
    pub fn decode(text: &str) -> Option<String> {
        let bytes = text.as_bytes();
        let mut out = Vec::with_capacity(bytes.len());
        let mut at = 0;
        while at < bytes.len() {
            let escape = (bytes[at] == b'%')
                .then(|| text.get(at + 1..at + 3))
                .flatten()
                .filter(|hex| hex.bytes().all(|b| b.is_ascii_hexdigit()))
                .and_then(|hex| u8::from_str_radix(hex, 16).ok());
            match escape {
                Some(byte) => {
                    out.push(byte);
                    at += 3;
                }
                None => {
                    out.push(bytes[at]);
                    at += 1;
                }
            }
        }
        String::from_utf8(out).ok()
    }

    /// Escapes what a URL's path would not keep as it is.
    pub fn encode(path: &str) -> String {
        let mut out = String::with_capacity(path.len());
        for byte in path.bytes() {
            if byte.is_ascii_alphanumeric() || b"/-_.~!$&'()*+,;=:@".contains(&byte) {
                out.push(char::from(byte));
            } else {
                let _ = write!(out, "%{byte:02X}");
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normal_forms() {
        for (text, normal) in [
            ("s3://bucket", "s3://bucket"),
            ("s3://bucket/", "s3://bucket"),
            ("s3a://Bucket_1/a/b//", "s3://Bucket_1/a/b"),
            ("file:///", "file:///"),
            ("file:///a//b/", "file:///a/b"),
            ("/a b/c%d", "file:///a%20b/c%25d"),
            ("gs://b/p", "gs://b/p"),
            ("azure://c/p/", "az://c/p"),
            ("abfss://c/p", "az://c/p"),
            ("http://127.0.0.1:8080/x/", "http://127.0.0.1:8080/x"),
            ("https://Host/x", "https://host/x"),
        ] {
            let url: StoreUrl = text.parse().unwrap();
            assert_eq!(url.to_string(), normal);
            let again: StoreUrl = url.to_string().parse().unwrap();
            assert_eq!(again, url, "{text}");
            let json = serde_json::to_string(&url).unwrap();
            assert_eq!(serde_json::from_str::<StoreUrl>(&json).unwrap(), url);
        }
        assert_eq!(
            "/a b/c%d".parse::<StoreUrl>().unwrap().kind(),
            StoreKind::File("/a b/c%d".into())
        );
        assert_eq!("s3://b/a%20b".parse::<StoreUrl>().unwrap().prefix(), "a b");
    }

    #[test]
    fn refusals_say_why_and_show_no_secret() {
        for bad in [
            "",
            "bucket",
            "./dir",
            "ftp://h/x",
            "s3:///x",
            "file://host/x",
            "s3://b/x?y=1",
            "s3://b/x#y",
            "s3://b:80/x",
            "s3://b/a//b",
            "s3://b//a",
            "s3://b/%00",
            "s3://b/%ff",
            "s3://b/a%2F..%2Fb",
        ] {
            assert!(bad.parse::<StoreUrl>().is_err(), "{bad}");
        }
        for bad in [
            "s3://AKIA:hunter2@bucket/x",
            "https://me:hunter2@host/",
            "https://h/x?sig=hunter2",
        ] {
            let error = bad.parse::<StoreUrl>().unwrap_err();
            assert!(!format!("{error} {error:?}").contains("hunter2"), "{error:?}");
        }
    }
}
