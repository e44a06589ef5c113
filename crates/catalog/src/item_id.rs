//! How every interface reads ids: as text, or as an integer, which stands for its decimal text.
//!
//! `5` and `"5"` are the same id. A float is not an id, not even `5.0`: it may be meant as `5` or
//! as `5.0`, and tables write integer columns with gaps as floats.

use std::fmt;

use parquet::record::Field;
use serde::de::{self, Deserialize, Deserializer, Visitor};

/// The end of an error message about a bad id.
const EXPECTED: &str = "an id: text, or an integer";
/// Floats from here on are integers that were too long for 64 bits.
const BEYOND_INTEGERS: f64 = 1.8e19;

/// An id, as text. In JSON and Parquet: text, or an integer.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ItemId(pub String);

impl<'de> Deserialize<'de> for ItemId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ItemIdVisitor)
    }
}

struct ItemIdVisitor;

impl Visitor<'_> for ItemIdVisitor {
    type Value = ItemId;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(EXPECTED)
    }

    fn visit_str<E: de::Error>(self, id: &str) -> Result<ItemId, E> {
        Ok(ItemId(id.to_owned()))
    }

    fn visit_string<E: de::Error>(self, id: String) -> Result<ItemId, E> {
        Ok(ItemId(id))
    }

    fn visit_u64<E: de::Error>(self, id: u64) -> Result<ItemId, E> {
        Ok(ItemId(id.to_string()))
    }

    fn visit_i64<E: de::Error>(self, id: i64) -> Result<ItemId, E> {
        Ok(ItemId(id.to_string()))
    }

    fn visit_f64<E: de::Error>(self, id: f64) -> Result<ItemId, E> {
        Err(E::custom(refuse_float(id)))
    }
}

fn refuse_float(id: f64) -> String {
    if id.abs() >= BEYOND_INTEGERS {
        return format!("{id:e} has lost digits: write ids of more than 64 bits as text, in quotation marks");
    }
    format!("{id:?} is a float, expected {EXPECTED}; write it without a fraction, or in quotation marks")
}

impl ItemId {
    /// Reads the id that a Parquet column holds.
    ///
    /// # Errors
    ///
    /// A description of the value, if it is not an id.
    pub fn from_parquet(field: &Field) -> Result<Self, String> {
        match *field {
            Field::Str(ref text) => Ok(Self(text.clone())),
            // Some writers leave out the annotation that says a column is text.
            Field::Bytes(ref bytes) => match std::str::from_utf8(bytes.data()) {
                Ok(text) => Ok(Self(text.to_owned())),
                Err(_) => Err(format!("bytes that are not UTF-8, expected {EXPECTED}")),
            },
            Field::Float(id) => Err(refuse_float(id.into())),
            Field::Double(id) => Err(refuse_float(id)),
            _ => match integer(field) {
                Some(id) => Ok(Self(id.to_string())),
                None => Err(format!("a value of another type, expected {EXPECTED}")),
            },
        }
    }
}

/// The integer that a Parquet column holds.
pub(crate) fn integer(field: &Field) -> Option<i128> {
    match *field {
        Field::Byte(n) => Some(n.into()),
        Field::Short(n) => Some(n.into()),
        Field::Int(n) => Some(n.into()),
        Field::Long(n) => Some(n.into()),
        Field::UByte(n) => Some(n.into()),
        Field::UShort(n) => Some(n.into()),
        Field::UInt(n) => Some(n.into()),
        Field::ULong(n) => Some(n.into()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<String, String> {
        serde_json::from_str::<ItemId>(json).map(|id| id.0).map_err(|error| error.to_string())
    }

    #[test]
    fn text_and_integers_are_ids_and_floats_are_none() {
        assert_eq!(read("\"5\"").unwrap(), "5");
        assert_eq!(read("5").unwrap(), "5");
        assert_eq!(read("-7").unwrap(), "-7");
        assert_eq!(read("18446744073709551615").unwrap(), "18446744073709551615");
        assert!(read("5.0").unwrap_err().contains("5.0 is a float"));
        assert!(read("18446744073709551616").unwrap_err().contains("has lost digits"));
        for other in ["true", "null", "[1]", "{}"] {
            assert!(read(other).unwrap_err().contains(EXPECTED), "{other}");
        }
    }

    #[test]
    fn columns_follow_the_same_rule() {
        let id = |field: Field| ItemId::from_parquet(&field).map(|id| id.0);
        assert_eq!(id(Field::Str("5".into())), Ok("5".into()));
        assert_eq!(id(Field::Long(-7)), Ok("-7".into()));
        assert_eq!(id(Field::ULong(u64::MAX)), Ok(u64::MAX.to_string()));
        assert!(id(Field::Double(5.0)).unwrap_err().contains("5.0 is a float"));
        assert!(id(Field::TimestampMillis(1)).unwrap_err().contains(EXPECTED));
    }
}
