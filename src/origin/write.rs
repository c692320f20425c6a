//! Writing objects: whole, if absent, in parts; and deleting them.

use std::io;

use bytes::{Bytes, BytesMut};
use futures::{StreamExt as _, stream::BoxStream};
use object_store::{ObjectStoreExt as _, PutMode, PutOptions, WriteMultipart};

use super::{Backend, OriginError, PutOutcome, Store, http, remote::observed};

/// Objects up to this size are uploaded in one request.
const SINGLE_PUT: u64 = 16 << 20;
const PART: u64 = 16 << 20;
/// S3 allows 10,000 parts.
const MOST_PARTS: u64 = 9_000;
/// Parts in flight: with [`PART`], what bounds the memory of an upload.
const PARTS_AT_ONCE: usize = 4;

impl Store {
    pub async fn put(&self, key: &str, bytes: Bytes) -> Result<(), OriginError> {
        self.checked(key)?;
        let (wanted, payload) = (key.to_owned(), bytes.clone());
        if let Some(done) = self.local(key, move |store| store.put(&wanted, &payload)).await {
            return done;
        }
        let Backend::Remote(remote) = &self.inner.backend else {
            return Err(self.elsewhere(key));
        };
        let path = self.path(key)?;
        self.attempt(false, || remote.store.put(&path, bytes.clone().into()))
            .await
            .map(drop)
            .map_err(|(error, seen)| self.place(key).error(error, &seen))
    }

    /// A retry inside the client can meet its own first try: `AlreadyExists` may be our own object.
    pub async fn put_if_absent(&self, key: &str, bytes: Bytes) -> Result<PutOutcome, OriginError> {
        self.checked(key)?;
        let (wanted, payload) = (key.to_owned(), bytes.clone());
        if let Some(done) = self
            .local(key, move |store| store.put_if_absent(&wanted, &payload))
            .await
        {
            return done;
        }
        let Backend::Remote(remote) = &self.inner.backend else {
            return Err(self.elsewhere(key));
        };
        let path = self.path(key)?;
        let options = PutOptions {
            mode: PutMode::Create,
            ..PutOptions::default()
        };
        match self
            .attempt(false, || {
                remote
                    .store
                    .put_opts(&path, bytes.clone().into(), options.clone())
            })
            .await
        {
            Ok(_) => Ok(PutOutcome::Created),
            Err((object_store::Error::AlreadyExists { .. }, seen)) if seen.status != 409 => {
                Ok(PutOutcome::AlreadyExists)
            }
            // 409: another conditional put of this key is being decided; the caller reads back or tries again.
            Err((object_store::Error::AlreadyExists { source, .. }, _)) => Err(OriginError::Transient {
                store: self.inner.shown.clone(),
                key: key.to_owned(),
                source: Some(source),
            }),
            Err((error, seen)) => match self.place(key).error(error, &seen) {
                OriginError::Unsupported { store, source, .. } => Err(OriginError::Unsupported {
                    store,
                    what: "put-if-absent",
                    source,
                }),
                error => Err(error),
            },
        }
    }

    /// Streams `parts` into one object: multipart, bounded memory, aborted on error.
    pub async fn put_stream(
        &self,
        key: &str,
        size: u64,
        mut parts: BoxStream<'_, io::Result<Bytes>>,
    ) -> Result<(), OriginError> {
        self.checked(key)?;
        let unreadable = |error: io::Error| OriginError::Other {
            store: self.inner.shown.clone(),
            key: key.to_owned(),
            source: Some(error.into()),
        };
        let wrong_size = |got: u64| {
            unreadable(io::Error::other(format!(
                "{got} bytes came where {size} were announced"
            )))
        };
        let wanted = key.to_owned();
        if let Some(upload) = self.local(key, move |store| store.upload(&wanted)).await {
            let mut upload = upload?;
            let mut got = 0;
            while let Some(bytes) = parts.next().await {
                let bytes = bytes.map_err(unreadable)?;
                got += bytes.len() as u64;
                let written = self
                    .local(key, move |_| upload.write(&bytes).map(|()| upload))
                    .await;
                upload = written.unwrap_or_else(|| Err(self.elsewhere(key)))?;
            }
            if got != size {
                return Err(wrong_size(got));
            }
            return self
                .local(key, move |_| upload.finish())
                .await
                .unwrap_or_else(|| Err(self.elsewhere(key)));
        }
        if size <= SINGLE_PUT {
            let mut whole = BytesMut::with_capacity(usize::try_from(size).unwrap_or(0));
            while let Some(bytes) = parts.next().await {
                let bytes = bytes.map_err(unreadable)?;
                if (whole.len() + bytes.len()) as u64 > size {
                    return Err(wrong_size((whole.len() + bytes.len()) as u64));
                }
                whole.extend_from_slice(&bytes);
            }
            return match whole.len() as u64 {
                got if got == size => self.put(key, whole.freeze()).await,
                got => Err(wrong_size(got)),
            };
        }
        let Backend::Remote(remote) = &self.inner.backend else {
            return Err(self.elsewhere(key));
        };
        let path = self.path(key)?;
        let place = self.place(key);
        let upload = self
            .attempt(false, || remote.store.put_multipart(&path))
            .await
            .map_err(|(error, seen)| place.error(error, &seen))?;
        let part = PART.max(size.div_ceil(MOST_PARTS));
        let mut upload =
            WriteMultipart::new_with_chunk_size(upload, usize::try_from(part).unwrap_or(usize::MAX));
        // Parts are sent by tasks of their own, out of sight of `observed`: their errors tell less.
        let mut got = 0;
        let failed = loop {
            match parts.next().await {
                None if got == size => break None,
                None => break Some(wrong_size(got)),
                Some(Err(error)) => break Some(unreadable(error)),
                Some(Ok(bytes)) => {
                    if let Err(error) = upload.wait_for_capacity(PARTS_AT_ONCE).await {
                        break Some(place.error(error, &http::Seen::default()));
                    }
                    got += bytes.len() as u64;
                    upload.put(bytes);
                }
            }
        };
        if let Some(error) = failed {
            // The store forgets the parts; if it does not hear of it, its own lifecycle rules do it later.
            let _ = upload.abort().await;
            return Err(error);
        }
        // `finish` aborts by itself when it fails.
        observed(false, upload.finish())
            .await
            .map(drop)
            .map_err(|(error, seen)| place.error(error, &seen))
    }

    pub async fn delete(&self, key: &str) -> Result<(), OriginError> {
        self.checked(key)?;
        let wanted = key.to_owned();
        if let Some(done) = self.local(key, move |store| store.delete(&wanted)).await {
            return done;
        }
        let Backend::Remote(remote) = &self.inner.backend else {
            return Err(self.elsewhere(key));
        };
        let path = self.path(key)?;
        self.attempt(false, || remote.store.delete(&path))
            .await
            .map_err(|(error, seen)| self.place(key).error(error, &seen))
    }
}
