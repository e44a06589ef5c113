//! One part of a semantic ID (SID), as a catalog file writes it.
//!
//! Files write a SID either as integer codes (`[12, 7, 301]`) or as token strings
//! (`["<a_12>", "<b_7>", "<c_301>"]`). What a part means to a model is not decided here: see
//! [`SymbolTable`](crate::SymbolTable).

use std::fmt;

use serde::de::{self, Deserialize, Deserializer, Visitor};
use serde::{Serialize, Serializer};

/// One part of a SID: an integer code, or the text of a token. In JSON: an integer or a string.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SidPart {
    /// A code of the level's codebook.
    Code(u32),
    /// The text of a token.
    Token(Box<str>),
}

impl fmt::Display for SidPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(f, "{code}"),
            Self::Token(text) => write!(f, "{text:?}"),
        }
    }
}

impl From<u32> for SidPart {
    fn from(code: u32) -> Self {
        Self::Code(code)
    }
}

impl From<&str> for SidPart {
    fn from(text: &str) -> Self {
        Self::Token(text.into())
    }
}

impl Serialize for SidPart {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Code(code) => serializer.serialize_u32(*code),
            Self::Token(text) => serializer.serialize_str(text),
        }
    }
}

// Written by hand: serde's untagged enums only say "did not match any variant", which does not help
// to fix a file.
impl<'de> Deserialize<'de> for SidPart {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PartVisitor;

        impl Visitor<'_> for PartVisitor {
            type Value = SidPart;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a SID part: an integer code from 0 to 4294967295, or a token string")
            }

            fn visit_u64<E: de::Error>(self, value: u64) -> Result<SidPart, E> {
                u32::try_from(value)
                    .map(SidPart::Code)
                    .map_err(|_| E::invalid_value(de::Unexpected::Unsigned(value), &self))
            }

            fn visit_i64<E: de::Error>(self, value: i64) -> Result<SidPart, E> {
                u32::try_from(value)
                    .map(SidPart::Code)
                    .map_err(|_| E::invalid_value(de::Unexpected::Signed(value), &self))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<SidPart, E> {
                Ok(SidPart::Token(text.into()))
            }
        }

        deserializer.deserialize_any(PartVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_and_writes_both_forms() {
        let parts: Vec<SidPart> = serde_json::from_str(r#"[0, 4294967295, "<a_1>"]"#).unwrap();
        assert_eq!(parts, [SidPart::Code(0), SidPart::Code(u32::MAX), SidPart::from("<a_1>")]);
        assert_eq!(serde_json::to_string(&parts).unwrap(), r#"[0,4294967295,"<a_1>"]"#);
    }

    #[test]
    fn refuses_other_numbers_and_types() {
        for text in ["-1", "4294967296", "1.0", "true", "null", "[1]"] {
            let error = serde_json::from_str::<SidPart>(text).unwrap_err().to_string();
            assert!(error.contains("integer code"), "{text}: {error}");
        }
    }
}
