//! An object in several requests, which is there at the end as a whole or not at all.

use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use object_store::{
    Attributes, MultipartUpload, ObjectStore, PutMultipartOptions, PutPayload, Result, path::Path,
};
use tracing::debug;

use super::{PART, PARTS_IN_FLIGHT};

pub(super) async fn put(
    objects: &dyn ObjectStore,
    path: &Path,
    content: Bytes,
    attributes: Attributes,
) -> Result<()> {
    let options = PutMultipartOptions { attributes, ..PutMultipartOptions::default() };
    let mut upload = objects.put_multipart_opts(path, options).await?;
    let parts: Vec<_> = (0..content.len())
        .step_by(PART)
        .map(|start| content.slice(start..(start + PART).min(content.len())))
        .map(|part| upload.put_part(PutPayload::from_bytes(part)))
        .collect();
    let mut upload = Upload(Some(upload));
    stream::iter(parts).map(Ok).try_for_each_concurrent(PARTS_IN_FLIGHT, |part| part).await?;
    upload.complete().await
}

/// An upload that is given up when it is dropped: stores keep, and charge for, the parts of one that is
/// neither completed nor aborted.
struct Upload(Option<Box<dyn MultipartUpload>>);

impl Upload {
    async fn complete(&mut self) -> Result<()> {
        if let Some(upload) = &mut self.0 {
            upload.complete().await?;
        }
        self.0 = None;
        Ok(())
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        let Some(mut upload) = self.0.take() else { return };
        // Without a runtime the process is ending; a lifecycle rule of the bucket has the last word.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                if let Err(error) = upload.abort().await {
                    debug!(%error, "an abandoned upload could not be aborted");
                }
            });
        }
    }
}
