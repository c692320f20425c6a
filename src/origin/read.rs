//! Reading objects: exactly the bytes that were asked for, of exactly the object that was pinned.

use std::{
    io,
    ops::Range,
    pin::Pin as Pinned,
    sync::{Arc, atomic::Ordering::Relaxed},
    task::{Context, Poll},
};

use bytes::{Bytes, BytesMut};
use futures::{
    Stream, StreamExt as _,
    stream::{self, BoxStream},
};
use object_store::{GetOptions, GetRange, ObjectStoreExt as _};

use super::{Backend, ObjectInfo, OriginError, Pin, Store, http, local};

/// What is read from a local file at once.
const LOCAL_CHUNK: u64 = 1 << 20;

impl Store {
    /// Exactly `range` of the object, as a stream; errors if the answer is longer, shorter or elsewhere.
    pub async fn get_range(
        &self,
        key: &str,
        pin: &Pin,
        range: Range<u64>,
    ) -> Result<BoxStream<'static, Result<Bytes, OriginError>>, OriginError> {
        self.checked(key)?;
        if range.is_empty() {
            return Ok(stream::empty().boxed());
        }
        let wanted = key.to_owned();
        if let Some(opened) = self.local(key, move |store| store.open(&wanted)).await {
            let opened = opened?;
            if let Pin::ETag(expected) = pin {
                self.compare(key, expected, opened.info.etag.as_deref())?;
            }
            self.inner.tally.requests.fetch_add(1, Relaxed);
            let body = self.read_file(key, Arc::new(opened.file), range.clone());
            return Ok(self.exact(key, range, body));
        }
        let Backend::Remote(remote) = &self.inner.backend else {
            return Err(self.elsewhere(key));
        };
        let path = self.path(key)?;
        let mut options = GetOptions::new().with_range(Some(GetRange::Bounded(range.clone())));
        match pin {
            Pin::Content => {}
            Pin::ETag(etag) => options = options.with_if_match(Some(etag)),
            Pin::VersionId(version) => options = options.with_version(Some(version)),
        }
        let place = self.place(key);
        let result = self
            .attempt(false, || remote.store.get_opts(&path, options.clone()))
            .await
            .map_err(|(error, seen)| {
                match place.error(error, &seen) {
                    OriginError::Changed { store, key, .. } => OriginError::Changed {
                        store,
                        key,
                        expected: match pin {
                            Pin::ETag(expected) | Pin::VersionId(expected) => expected.clone(),
                            Pin::Content => "its published content".to_owned(),
                        },
                        found: None,
                    },
                    // A success that the client did not accept: not the range that was asked for.
                    OriginError::Other { store, key, source }
                        if (200..300).contains(&seen.status) || seen.status == 416 =>
                    {
                        OriginError::BadRange {
                            store,
                            key,
                            asked: range.clone(),
                            source,
                        }
                    }
                    error => error,
                }
            })?;
        if let Pin::ETag(expected) = pin {
            self.compare(key, expected, result.meta.e_tag.as_deref())?;
        }
        if result.range != range {
            return Err(OriginError::BadRange {
                store: self.inner.shown.clone(),
                key: key.to_owned(),
                asked: range,
                source: None,
            });
        }
        let (store, key_owned) = (self.clone(), key.to_owned());
        let body = result
            .into_stream()
            .map(move |chunk| {
                chunk.map_err(|error| store.place(&key_owned).error(error, &http::Seen::default()))
            })
            .boxed();
        Ok(self.exact(key, range, body))
    }

    fn compare(&self, key: &str, expected: &str, found: Option<&str>) -> Result<(), OriginError> {
        // Listings and answers differ in quotes, and proxies weaken tags.
        let bare = |tag: &str| tag.trim_start_matches("W/").trim_matches('"').to_owned();
        if found.map(bare) == Some(bare(expected)) {
            return Ok(());
        }
        Err(OriginError::Changed {
            store: self.inner.shown.clone(),
            key: key.to_owned(),
            expected: expected.to_owned(),
            found: found.map(str::to_owned),
        })
    }

    fn read_file(
        &self,
        key: &str,
        file: Arc<std::fs::File>,
        range: Range<u64>,
    ) -> BoxStream<'static, Result<Bytes, OriginError>> {
        let (store, key) = (self.clone(), key.to_owned());
        stream::try_unfold(range.start, move |offset| {
            let (store, key, file, end) = (store.clone(), key.clone(), Arc::clone(&file), range.end);
            async move {
                if offset >= end {
                    return Ok(None);
                }
                let length = usize::try_from((end - offset).min(LOCAL_CHUNK)).unwrap_or(usize::MAX);
                let bytes = tokio::task::spawn_blocking(move || local::read_at(&file, offset, length))
                    .await
                    .map_err(io::Error::other)
                    .flatten()
                    .map_err(|error| store.local_error(&key, error, false))?;
                if bytes.is_empty() {
                    return Ok(None);
                }
                store.inner.tally.bytes_in.fetch_add(bytes.len() as u64, Relaxed);
                let next = offset + bytes.len() as u64;
                Ok(Some((bytes, next)))
            }
        })
        .boxed()
    }

    /// Passes a body on, and turns too few or too many bytes into an error.
    fn exact(
        &self,
        key: &str,
        range: Range<u64>,
        body: BoxStream<'static, Result<Bytes, OriginError>>,
    ) -> BoxStream<'static, Result<Bytes, OriginError>> {
        Exact {
            body: Some(body),
            got: 0,
            store: self.clone(),
            key: key.to_owned(),
            asked: range,
        }
        .boxed()
    }

    /// The whole of a small object; `TooLarge` if it has more than `limit` bytes.
    pub async fn get(&self, key: &str, limit: u64) -> Result<(Bytes, ObjectInfo), OriginError> {
        self.checked(key)?;
        let too_large = |size| OriginError::TooLarge {
            store: self.inner.shown.clone(),
            key: key.to_owned(),
            size,
            limit,
        };
        let wanted = key.to_owned();
        if let Some(read) = self
            .local(key, move |store| {
                let open = store.open(&wanted)?;
                let length = usize::try_from(open.info.size.min(limit)).unwrap_or(usize::MAX);
                let bytes = if open.info.size > limit {
                    Bytes::new()
                } else {
                    local::read_at(&open.file, 0, length)?
                };
                Ok((bytes, open.info))
            })
            .await
        {
            let (bytes, info) = read?;
            return if info.size > limit {
                Err(too_large(info.size))
            } else {
                Ok((bytes, info))
            };
        }
        let Backend::Remote(remote) = &self.inner.backend else {
            return Err(self.elsewhere(key));
        };
        let path = self.path(key)?;
        let place = self.place(key);
        let result = self
            .attempt(false, || remote.store.get_opts(&path, GetOptions::new()))
            .await
            .map_err(|(error, seen)| place.error(error, &seen))?;
        let info = self.remote_info(key.to_owned(), &result.meta);
        if info.size > limit {
            return Err(too_large(info.size));
        }
        let size = info.size;
        let mut bytes = BytesMut::with_capacity(usize::try_from(size).unwrap_or(0));
        let mut body = result.into_stream();
        while let Some(chunk) = body.next().await {
            let chunk = chunk.map_err(|error| place.error(error, &http::Seen::default()))?;
            if (bytes.len() + chunk.len()) as u64 > limit {
                return Err(too_large((bytes.len() + chunk.len()) as u64));
            }
            bytes.extend_from_slice(&chunk);
        }
        if bytes.len() as u64 != size {
            return Err(OriginError::Truncated {
                store: self.inner.shown.clone(),
                key: key.to_owned(),
                expected: size,
                got: bytes.len() as u64,
                source: None,
            });
        }
        Ok((bytes.freeze(), info))
    }

    pub async fn head(&self, key: &str) -> Result<ObjectInfo, OriginError> {
        self.checked(key)?;
        let wanted = key.to_owned();
        if let Some(opened) = self.local(key, move |store| store.open(&wanted)).await {
            return Ok(opened?.info);
        }
        let Backend::Remote(remote) = &self.inner.backend else {
            return Err(self.elsewhere(key));
        };
        let path = self.path(key)?;
        let meta = self
            .attempt(false, || remote.store.head(&path))
            .await
            .map_err(|(error, seen)| self.place(key).error(error, &seen))?;
        Ok(self.remote_info(key.to_owned(), &meta))
    }
}

/// A body that must have as many bytes as were asked for.
struct Exact {
    /// `None`: it has ended, one way or the other.
    body: Option<BoxStream<'static, Result<Bytes, OriginError>>>,
    got: u64,
    store: Store,
    key: String,
    asked: Range<u64>,
}

impl Exact {
    fn check(&mut self, chunk: Option<Result<Bytes, OriginError>>) -> Option<Result<Bytes, OriginError>> {
        let expected = self.asked.end - self.asked.start;
        let (store, key) = (&self.store.inner.shown, &self.key);
        let truncated = |got, source| OriginError::Truncated {
            store: store.clone(),
            key: key.clone(),
            expected,
            got,
            source,
        };
        match chunk {
            Some(Ok(bytes)) => {
                self.got += bytes.len() as u64;
                if self.got > expected {
                    return Some(Err(OriginError::BadRange {
                        store: store.clone(),
                        key: key.clone(),
                        asked: self.asked.clone(),
                        source: None,
                    }));
                }
                Some(Ok(bytes))
            }
            // A connection that breaks in the middle of a body is a truncated answer.
            Some(Err(OriginError::Transient { source, .. } | OriginError::Other { source, .. })) => {
                Some(Err(truncated(self.got, source)))
            }
            Some(Err(error)) => Some(Err(error)),
            None if self.got < expected => Some(Err(truncated(self.got, None))),
            None => None,
        }
    }
}

impl Stream for Exact {
    type Item = Result<Bytes, OriginError>;

    fn poll_next(mut self: Pinned<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Some(body) = &mut self.body else {
            return Poll::Ready(None);
        };
        let Poll::Ready(chunk) = body.poll_next_unpin(context) else {
            return Poll::Pending;
        };
        let checked = self.check(chunk);
        if !matches!(checked, Some(Ok(_))) {
            self.body = None;
        }
        Poll::Ready(checked)
    }
}
