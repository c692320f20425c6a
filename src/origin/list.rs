//! Listing objects, deep or one level at a time.

use std::{collections::VecDeque, sync::Arc};

use futures::{
    StreamExt as _, TryStreamExt as _,
    stream::{self, BoxStream},
};
use object_store::list::PaginatedListOptions;

use super::{Backend, Level, ObjectInfo, OriginError, Remote, Store, http::unescape_key, local::Listed};

impl Store {
    /// Everything below `prefix` (with its trailing slash; or empty) whose key is greater than `after`, in
    /// pages, in the order of the keys' bytes where the store keeps one (S3, GCS, Azure and files do).
    pub fn list(
        &self,
        prefix: &str,
        after: Option<&str>,
    ) -> BoxStream<'static, Result<ObjectInfo, OriginError>> {
        match &self.inner.backend {
            Backend::Local(_) => self.list_files(prefix, after),
            Backend::Remote(_) => self
                .pages(prefix, after, false)
                .map_ok(move |page| {
                    let objects = page.objects.into_iter().filter(|object| !object.key.is_empty());
                    stream::iter(objects.map(Ok).collect::<Vec<_>>())
                })
                .try_flatten()
                .boxed(),
        }
    }

    fn list_files(
        &self,
        prefix: &str,
        after: Option<&str>,
    ) -> BoxStream<'static, Result<ObjectInfo, OriginError>> {
        let after = after.map(str::to_owned);
        let start = VecDeque::from([Listed::Directory(prefix.to_owned())]);
        // Depth first; each directory is read when the walk comes to it, so the memory is one path's worth.
        stream::try_unfold((self.clone(), start), move |(store, mut queue)| {
            let after = after.clone();
            async move {
                loop {
                    match queue.pop_front() {
                        None => return Ok(None),
                        Some(Listed::Object(info)) => {
                            if after.as_ref().is_none_or(|after| info.key > *after) {
                                return Ok(Some((info, (store, queue))));
                            }
                        }
                        Some(Listed::Directory(key)) => {
                            // Everything in it sorts before `after`.
                            if let Some(after) = &after
                                && after.as_str() > key.as_str()
                                && !after.starts_with(&key)
                            {
                                continue;
                            }
                            let wanted = key.clone();
                            let level = match store.local(&key, move |local| local.level(&wanted)).await {
                                Some(level) => level?,
                                None => return Err(store.elsewhere(&key)),
                            };
                            for entry in level.into_iter().rev() {
                                queue.push_front(entry);
                            }
                        }
                    }
                }
            }
        })
        .boxed()
    }

    /// The pages of a remote listing; keys relative to the store's prefix.
    fn pages(
        &self,
        prefix: &str,
        after: Option<&str>,
        delimited: bool,
    ) -> BoxStream<'static, Result<Level, OriginError>> {
        let full = format!("{}{prefix}", self.inner.prefix);
        let offset = after.map(|after| format!("{}{after}", self.inner.prefix));
        let prefix = prefix.to_owned();
        stream::try_unfold((self.clone(), Some(None::<String>)), move |(store, state)| {
            let (full, offset, prefix) = (full.clone(), offset.clone(), prefix.clone());
            async move {
                let Some(token) = state else { return Ok(None) };
                let lister = match &store.inner.backend {
                    Backend::Remote(Remote {
                        lister: Some(lister), ..
                    }) => Arc::clone(lister),
                    _ => {
                        return Err(OriginError::Unsupported {
                            store: store.inner.shown.clone(),
                            what: "listing; use s3://, gs://, az:// or file://",
                            source: None,
                        });
                    }
                };
                let options = PaginatedListOptions {
                    // A page token already knows where it goes on.
                    offset: if token.is_none() { offset.clone() } else { None },
                    delimiter: delimited.then_some("/".into()),
                    page_token: token,
                    ..PaginatedListOptions::default()
                };
                let prefix_option = (!full.is_empty()).then_some(full.as_str());
                let page = store
                    .attempt(true, || lister.list_paginated(prefix_option, options.clone()))
                    .await
                    .map_err(|(error, seen)| match store.place(&prefix).error(error, &seen) {
                        OriginError::NotFound { store, .. } => OriginError::NoBucket { store, source: None },
                        error => error,
                    })?;
                let relative = |escaped: &str| {
                    unescape_key(escaped)
                        .strip_prefix(&store.inner.prefix)
                        .map(str::to_owned)
                };
                let level = Level {
                    prefixes: page
                        .result
                        .common_prefixes
                        .iter()
                        .filter_map(|path| relative(path.as_ref()))
                        .collect(),
                    objects: page
                        .result
                        .objects
                        .iter()
                        .filter_map(|meta| {
                            let key = relative(meta.location.as_ref())?;
                            // Not every store heeds the offset.
                            let wanted = offset.as_ref().is_none_or(|offset| {
                                format!("{}{key}", store.inner.prefix).as_str() > offset.as_str()
                            });
                            wanted.then(|| store.remote_info(key, meta))
                        })
                        .collect(),
                };
                Ok(Some((level, (store, page.page_token.map(Some)))))
            }
        })
        .boxed()
    }

    /// The objects right below `prefix` (with its trailing slash; or empty), and the prefixes one level down.
    pub async fn list_level(&self, prefix: &str) -> Result<Level, OriginError> {
        let wanted = prefix.to_owned();
        if let Some(listed) = self.local(prefix, move |store| store.level(&wanted)).await {
            let mut level = Level::default();
            for entry in listed? {
                match entry {
                    Listed::Object(info) => level.objects.push(info),
                    Listed::Directory(key) => level.prefixes.push(key),
                }
            }
            return Ok(level);
        }
        let mut level = Level::default();
        let mut pages = self.pages(prefix, None, true);
        while let Some(page) = pages.next().await {
            let page = page?;
            level.prefixes.extend(page.prefixes);
            level.objects.extend(page.objects);
        }
        level.prefixes.sort_unstable();
        level.prefixes.dedup();
        Ok(level)
    }
}
