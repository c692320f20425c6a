//! The end of every publish: the parts of the tree, then the record.

use std::sync::Arc;

use super::{Phase, Progress, PublishError, PublishOptions, content::stream_file, upload::size_of};
use crate::{
    catalog::{Catalog, Draft, OriginLocation, Record, TreePart, TreeParts},
    origin::Store,
    reference::QualifiedName,
    tree::builder::{BuiltPart, BuiltTree},
};

/// Uploads what makes up the tree and only then writes the record.
pub(super) async fn publish_tree(
    built: BuiltTree,
    name: QualifiedName,
    origin: OriginLocation,
    catalog: &dyn Catalog,
    options: &PublishOptions,
    progress: &Arc<dyn Progress>,
) -> Result<Record, PublishError> {
    let store = catalog.store();
    let tree = TreeParts {
        rows: upload(store, built.rows, "rows.zst", progress).await?,
        digests: upload_some(store, built.digests, "digests.zst", progress).await?,
        sums: upload_some(store, built.sums, "sums", progress).await?,
    };
    progress.phase(Phase::Record);
    let draft = Draft {
        name,
        tree,
        origin,
        message: options.message.clone(),
        totals: built.totals,
    };
    Ok(catalog.publish(draft).await?)
}

async fn upload_some(
    store: &Store,
    part: Option<BuiltPart>,
    suffix: &str,
    progress: &Arc<dyn Progress>,
) -> Result<Option<TreePart>, PublishError> {
    match part {
        Some(part) => Ok(Some(upload(store, part, suffix, progress).await?)),
        None => Ok(None),
    }
}

async fn upload(
    store: &Store,
    part: BuiltPart,
    suffix: &str,
    progress: &Arc<dyn Progress>,
) -> Result<TreePart, PublishError> {
    let BuiltPart {
        path,
        digest,
        size,
        wire_size,
    } = part;
    let mut key = format!("trees/{digest}.{suffix}");
    let mut there = size_of(store, &key).await?;
    if there.is_some_and(|size| size != wire_size) {
        // Compressed otherwise, by another release say. Other records give its size: leave it alone.
        key = format!("trees/{digest}.{wire_size}.{suffix}");
        there = size_of(store, &key).await?;
    }
    if there != Some(wire_size) {
        let stream = stream_file(path, wire_size, None);
        store.put_stream(&key, wire_size, stream.parts).await?;
        progress.sent(wire_size);
    }
    Ok(TreePart {
        digest,
        key,
        size,
        wire_size,
    })
}
