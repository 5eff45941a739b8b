//! An object in several requests, which is there at the end as a whole or not at all.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use object_store::{
    Attributes, MultipartUpload, ObjectStore, PutMultipartOptions, PutPayload, Result, path::Path,
};
use tracing::debug;

use super::{PART, PARTS_IN_FLIGHT, StoreError};

/// Pauses before an abandoned upload is aborted again, in seconds; then a lifecycle rule of the bucket has
/// the last word.
const ABORT_AGAIN_AFTER: [u64; 4] = [1, 4, 15, 60];

pub(super) async fn put(
    objects: &Arc<dyn ObjectStore>,
    path: &Path,
    content: Bytes,
    attributes: Attributes,
) -> Result<()> {
    let (objects, path) = (objects.clone(), path.clone());
    // In a task of its own: if we are dropped meanwhile, the store has made an upload that only its answer
    // names, and somebody has to be there to give it up.
    let begun = tokio::spawn(async move {
        let options = PutMultipartOptions { attributes, ..PutMultipartOptions::default() };
        objects.put_multipart_opts(&path, options).await.map(|upload| Upload(Some(upload)))
    });
    let mut upload = begun.await??;
    let parts = upload.parts(&content);
    stream::iter(parts).map(Ok).try_for_each_concurrent(PARTS_IN_FLIGHT, |part| part).await?;
    upload.complete().await
}

/// An upload that is given up when it is dropped: stores keep, and charge for, the parts of one that is
/// neither completed nor aborted.
struct Upload(Option<Box<dyn MultipartUpload>>);

impl Upload {
    /// Slices of `content`, which is not copied.
    fn parts(&mut self, content: &Bytes) -> Vec<object_store::UploadPart> {
        let Some(upload) = &mut self.0 else { return Vec::new() };
        (0..content.len())
            .step_by(PART)
            .map(|start| content.slice(start..(start + PART).min(content.len())))
            .map(|part| upload.put_part(PutPayload::from_bytes(part)))
            .collect()
    }

    async fn complete(mut self) -> Result<()> {
        if let Some(upload) = &mut self.0 {
            upload.complete().await?;
        }
        self.0 = None;
        Ok(())
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        // Without a runtime the process is ending.
        if let Some(upload) = self.0.take()
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            runtime.spawn(abort(upload));
        }
    }
}

async fn abort(mut upload: Box<dyn MultipartUpload>) {
    for pause in ABORT_AGAIN_AFTER {
        let Err(error) = upload.abort().await else { return };
        debug!(%error, "an abandoned upload could not be aborted");
        if !StoreError::of(&error, "").is_transient() {
            return;
        }
        tokio::time::sleep(Duration::from_secs(pause)).await;
    }
}
