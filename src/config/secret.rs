//! A value that is never printed.

use std::borrow::Cow;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::interpolate::Recipe;

const REDACTED: &str = "<redacted>";

/// Text that Debug, Display and Serialize show as `<redacted>`.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Secret {
    text: String,
    /// Where files are in it, so that they can be read again.
    recipe: Option<Recipe>,
}

impl Secret {
    /// Wraps `text`.
    pub fn new(text: impl Into<String>) -> Secret {
        Secret { text: text.into(), recipe: None }
    }

    pub(super) fn made_by(self, recipe: Recipe) -> Secret {
        Secret { recipe: Some(recipe), ..self }
    }

    /// The text itself: for the client that needs it, never for a message.
    pub fn expose(&self) -> &str {
        &self.text
    }

    /// The same, with `${file:…}` as the files are now; as they were, where one cannot be read.
    pub fn expose_now(&self) -> Cow<'_, str> {
        let read = self.recipe.as_ref().and_then(|recipe| recipe.read().ok());
        read.map_or(Cow::Borrowed(&*self.text), Cow::Owned)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(REDACTED)
    }
}

impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(REDACTED)
    }
}

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Secret, D::Error> {
        String::deserialize(from).map(Secret::new)
    }
}

impl Serialize for Secret {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(REDACTED)
    }
}

impl JsonSchema for Secret {
    fn schema_name() -> Cow<'static, str> {
        "Secret".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string" })
    }

    fn inline_schema() -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_never_printed() {
        let secret = Secret::new("hunter2");
        assert_eq!(format!("{secret} {secret:?} {secret:#?}"), "<redacted> <redacted> <redacted>");
        assert_eq!(serde_json::to_string(&secret).unwrap(), "\"<redacted>\"");
        assert_eq!(secret.expose(), "hunter2");
    }
}
