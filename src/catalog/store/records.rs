//! What a store catalog needs of a store: a seam, so that tests can lose answers and flip bits.

use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream::BoxStream};

use crate::origin::{Level, OriginError, PutOutcome, Store};

#[async_trait]
pub trait RecordStore: Send + Sync {
    /// The store in canonical form, for messages and to tell one store from another.
    fn location(&self) -> String;
    fn store(&self) -> &Store;
    /// The whole of an object of at most `limit` bytes.
    async fn get(&self, key: &str, limit: u64) -> Result<Bytes, OriginError>;
    async fn put(&self, key: &str, bytes: Bytes) -> Result<(), OriginError>;
    async fn put_if_absent(&self, key: &str, bytes: Bytes) -> Result<PutOutcome, OriginError>;
    async fn delete(&self, key: &str) -> Result<(), OriginError>;
    async fn list_level(&self, prefix: &str) -> Result<Level, OriginError>;
    /// Every key below `prefix` and after `after`, in order; nothing where there is no such prefix.
    fn list(&self, prefix: &str, after: Option<&str>) -> BoxStream<'static, Result<String, OriginError>>;
}

#[async_trait]
impl RecordStore for Store {
    fn location(&self) -> String {
        self.canonical().to_owned()
    }

    fn store(&self) -> &Store {
        self
    }

    async fn get(&self, key: &str, limit: u64) -> Result<Bytes, OriginError> {
        Store::get(self, key, limit).await.map(|(bytes, _)| bytes)
    }

    async fn put(&self, key: &str, bytes: Bytes) -> Result<(), OriginError> {
        Store::put(self, key, bytes).await
    }

    async fn put_if_absent(&self, key: &str, bytes: Bytes) -> Result<PutOutcome, OriginError> {
        Store::put_if_absent(self, key, bytes).await
    }

    async fn delete(&self, key: &str) -> Result<(), OriginError> {
        Store::delete(self, key).await
    }

    async fn list_level(&self, prefix: &str) -> Result<Level, OriginError> {
        Store::list_level(self, prefix).await
    }

    fn list(&self, prefix: &str, after: Option<&str>) -> BoxStream<'static, Result<String, OriginError>> {
        Store::list(self, prefix, after)
            .map_ok(|object| object.key)
            .filter(|key| {
                let absent = matches!(key, Err(OriginError::NotFound { .. }));
                futures::future::ready(!absent)
            })
            .boxed()
    }
}
