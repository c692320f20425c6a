//! How a small JSON object is stored so that any flipped bit is noticed:
//!
//! ```text
//! {"blake3":"<64 hex digits>","record":{…}}⏎
//! ```
//!
//! The digest is that of the bytes between `"record":` and the last `}`. The frame is compared byte for
//! byte, so every bit of the object is either framing, digest or digested. It is JSON for whoever looks
//! at it with other tools; it guards against rot, not against somebody who may write to the store.

use std::fmt;

use serde::{Serialize, de::DeserializeOwned};

use super::Damage;
use crate::digest::Digest;

const HEAD: &[u8] = b"{\"blake3\":\"";
const HEX: usize = 64;
const TAIL: &[u8] = b"}\n";

/// What stands between the digest and the content: `","record":`.
fn middle(kind: &str) -> String {
    format!("\",\"{kind}\":")
}

/// Frames `content` under the name `kind`.
pub fn seal<T: Serialize>(kind: &str, content: &T) -> Result<Vec<u8>, serde_json::Error> {
    let content = serde_json::to_vec(content)?;
    let digest = Digest::of(&content).to_string();
    Ok([HEAD, digest.as_bytes(), middle(kind).as_bytes(), &content, TAIL].concat())
}

/// Takes the frame off, and believes the content only if every byte is as it was written.
pub fn unseal<T: DeserializeOwned>(kind: &str, format: u32, bytes: &[u8]) -> Result<T, Damage> {
    let (hex, rest) = bytes
        .strip_prefix(HEAD)
        .and_then(|rest| rest.split_at_checked(HEX))
        .ok_or(Damage::Frame)?;
    let content = rest
        .strip_prefix(middle(kind).as_bytes())
        .and_then(|rest| rest.strip_suffix(TAIL))
        .ok_or(Damage::Frame)?;
    let digest: Digest = std::str::from_utf8(hex)
        .ok()
        .and_then(|hex| hex.parse().ok())
        .ok_or(Damage::Frame)?;
    if Digest::of(content) != digest {
        return Err(Damage::Digest);
    }
    // The format first: fields of a later format are not damage.
    let Format { format: found } = serde_json::from_slice(content).map_err(|source| Damage::Fields {
        known: format,
        source,
    })?;
    if found != u64::from(format) {
        return Err(Damage::Format { found, known: format });
    }
    serde_json::from_slice(content).map_err(|source| Damage::Fields {
        known: format,
        source,
    })
}

#[derive(serde::Deserialize)]
struct Format {
    format: u64,
}

/// Refuses content that is whole but lies under a key that is not its own.
pub(super) fn at_home<T: PartialEq + fmt::Display>(expected: &T, found: &T) -> Result<(), Damage> {
    if expected == found {
        Ok(())
    } else {
        Err(Damage::Elsewhere {
            found: found.to_string(),
        })
    }
}
