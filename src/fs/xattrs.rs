//! `user.grid.*`: what a mount says of its files to whoever asks with `getfattr`.

use super::{FsError, GridFs};
use crate::{
    pin::Pin,
    tree::{EntryKind, Ino},
};

const REFERENCE: &[u8] = b"user.grid.reference";
const DIGEST: &[u8] = b"user.grid.digest";
const ETAG: &[u8] = b"user.grid.etag";
const VERSION_ID: &[u8] = b"user.grid.version-id";
const KEY: &[u8] = b"user.grid.key";
const CACHED: &[u8] = b"user.grid.cached";

/// An attribute's name and value.
type Named = (&'static [u8], Vec<u8>);

impl GridFs {
    /// The value of one attribute.
    pub fn xattr(&self, ino: Ino, name: &[u8]) -> Result<Vec<u8>, FsError> {
        // Programs ask for `security.*` and `system.*` of every file they list, and the kernel keeps no
        // answer to that. Told that there are none of that kind, and not only none on this file, `ls`
        // does not ask again.
        if !name.starts_with(b"user.") {
            self.row(ino)?;
            return Err(FsError::UnsupportedAttribute);
        }
        self.xattrs(ino)?
            .into_iter()
            .find(|(key, _)| *key == name)
            .map(|(_, value)| value)
            .ok_or(FsError::NoSuchAttribute)
    }

    /// The names, each ended by a NUL, as `listxattr(2)` wants them.
    pub fn xattr_names(&self, ino: Ino) -> Result<Vec<u8>, FsError> {
        let mut names = Vec::new();
        for (name, _) in self.xattrs(ino)? {
            names.extend_from_slice(name);
            names.push(0);
        }
        Ok(names)
    }

    fn xattrs(&self, ino: Ino) -> Result<Vec<Named>, FsError> {
        let reference = (REFERENCE, self.reference().as_bytes().to_vec());
        match self.entry(ino)?.kind {
            // Linux knows no `user.*` attributes on symbolic links.
            EntryKind::Symlink { .. } => Ok(Vec::new()),
            EntryKind::Directory { .. } | EntryKind::File { content: None, .. } => Ok(vec![reference]),
            EntryKind::File {
                size,
                content: Some(content),
            } => {
                let object = self.tree().object(content.object).map_err(FsError::Tree)?;
                let mut all = vec![reference, (KEY, object.key.into_bytes())];
                // A bundle's digest says nothing of the one file in it.
                if let Some(digest) = object.digest
                    && content.offset == 0
                    && size == object.size
                {
                    all.push((DIGEST, digest.to_string().into_bytes()));
                }
                match object.pin {
                    Pin::Content => {}
                    Pin::ETag(etag) => all.push((ETAG, etag.into_bytes())),
                    Pin::VersionId(id) => all.push((VERSION_ID, id.into_bytes())),
                }
                let range = content.offset..content.offset.saturating_add(size);
                let cached = self
                    .snapshot
                    .content
                    .cached_bytes(content.object, range)
                    .min(size);
                // Rounded down: only what is wholly cached says 100.
                let percent = u128::from(cached) * 100 / u128::from(size.max(1));
                all.push((CACHED, format!("{percent}%").into_bytes()));
                Ok(all)
            }
        }
    }
}
