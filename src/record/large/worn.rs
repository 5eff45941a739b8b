//! A payload as it travels, and how a record wears it.

use std::borrow::Cow;

use bytes::Bytes;
use uuid::Uuid;

use super::content_type;
use crate::record::{
    Record, Rules,
    encode::Codec,
    envelope::{DATAREF, Envelope},
    wire::{self, Segment},
};

/// A payload as it travels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packed {
    pub encoding: Option<Codec>,
    pub form: Form,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Form {
    Inline(Bytes),
    Reference { uri: String, size: usize, sha256: String },
    Chunks { whole: Bytes, each: usize, id: Uuid, sha256: String },
}

impl Packed {
    /// How many records it takes.
    pub fn records(&self) -> u32 {
        match &self.form {
            Form::Chunks { whole, each, .. } => {
                u32::try_from(whole.len().div_ceil(*each)).unwrap_or(u32::MAX)
            }
            Form::Inline(_) | Form::Reference { .. } => 1,
        }
    }
}

impl Rules {
    /// Puts what was packed into a record; `index` is that of the chunk.
    pub(in crate::record) fn wear<'a>(&'a self, record: &mut Record<'a>, packed: &'a Packed, index: u32) {
        let spec = &self.large.spec;
        let text = |text: String| Some(text.into_bytes().into());
        let headers = &mut record.headers;
        match &packed.form {
            Form::Inline(payload) => record.payload = Some(Cow::Borrowed(payload)),
            Form::Reference { uri, size, sha256 } => {
                record.payload = Some(uri.as_bytes().into());
                if self.dress.envelope == Envelope::Binary {
                    headers.push((DATAREF.into(), Some(uri.as_bytes().into())));
                }
                if spec.whippet {
                    headers.push((wire::REF_URI.into(), Some(uri.as_bytes().into())));
                    headers.push((wire::REF_SIZE.into(), text(size.to_string())));
                    headers.push((wire::REF_SHA256.into(), Some(sha256.as_bytes().into())));
                    let content_type = content_type(headers, spec).to_owned();
                    headers.push((wire::REF_CONTENT_TYPE.into(), Some(content_type.into_bytes().into())));
                    if let Some(codec) = packed.encoding {
                        headers.push((wire::REF_ENCODING.into(), Some(codec.name().as_bytes().into())));
                    }
                }
                if spec.bakdata {
                    headers.retain(|(name, _)| name != wire::BACKED_VALUE);
                    headers.push((wire::BACKED_VALUE.into(), Some((&[wire::BACKED][..]).into())));
                    if let Some(byte) = packed.encoding.and_then(backed_codec) {
                        for name in wire::BACKED_COMPRESSION {
                            headers.push((name.into(), Some(vec![byte].into())));
                        }
                    }
                }
            }
            Form::Chunks { whole, each, id, sha256 } => {
                let count = packed.records();
                let start = index as usize * each;
                record.payload = Some((&whole[start..whole.len().min(start + each)]).into());
                headers.push((wire::CHUNK_ID.into(), text(id.to_string())));
                headers.push((wire::CHUNK_INDEX.into(), text(index.to_string())));
                headers.push((wire::CHUNK_COUNT.into(), text(count.to_string())));
                headers.push((wire::CHUNK_SIZE.into(), text(whole.len().to_string())));
                headers.push((wire::CHUNK_SHA256.into(), Some(sha256.as_bytes().into())));
                if spec.silverback {
                    headers.push((wire::SILVERBACK_INDEX.into(), text(index.to_string())));
                    headers.push((wire::SILVERBACK_COUNT.into(), text(count.to_string())));
                    if index + 1 == count {
                        headers.push((wire::SILVERBACK_LAST.into(), text("True".into())));
                    }
                }
                let size = u32::try_from(whole.len()).unwrap_or(u32::MAX);
                let segment = Segment { id: *id, index, count, size };
                if let Some(segment) = segment.to_bytes().filter(|_| spec.linkedin) {
                    headers.push((wire::LINKEDIN.into(), Some(segment.to_vec().into())));
                }
            }
        }
        if let Some(codec) = packed.encoding
            && !matches!(packed.form, Form::Reference { .. })
        {
            headers.push((wire::CONTENT_ENCODING.into(), Some(codec.name().as_bytes().into())));
        }
    }
}

/// The byte of dialect `bakdata`, for the codecs that its readers decode; of the others it has formats of
/// its own.
fn backed_codec(codec: Codec) -> Option<u8> {
    let known = matches!(codec, Codec::Gzip | Codec::Zstd);
    let byte = wire::BACKED_CODECS.iter().position(|name| *name == codec.name()).filter(|_| known)?;
    u8::try_from(byte).ok()
}
