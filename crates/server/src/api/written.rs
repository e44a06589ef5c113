//! The one definition of how requests write values, in JSON and in Parquet alike: ids, whole
//! numbers, times.
//!
//! | value | written as |
//! | --- | --- |
//! | id | text, or an integer, which stands for its decimal text: see [`beamline_catalog::ItemId`] |
//! | whole number | an integer, or a float without a fraction: tables write integers with gaps as floats |
//! | time | seconds since 1970, as a whole number: see [`super::timestamp`] |
//!
//! A field of a request keeps its plain type, and [`read`] reads it as one of these.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

use beamline_catalog::ItemId;
use serde::de::{self, Deserialize, Deserializer, Visitor};
use utoipa::ToSchema;

/// Whole numbers up to here are exact as floats.
const EXACT: f64 = 9_007_199_254_740_992.0;

/// A value as it is written, and the plain value for which it stands.
pub trait Written {
    /// The plain value of a field.
    type Value;

    /// Returns the plain value.
    fn value(self) -> Self::Value;
}

/// Reads a field that is written as a `W`.
///
/// # Errors
///
/// When the field is written in another way.
pub fn read<'de, W, D>(deserializer: D) -> Result<W::Value, D::Error>
where
    W: Written + Deserialize<'de>,
    D: Deserializer<'de>,
{
    W::deserialize(deserializer).map(W::value)
}

impl Written for ItemId {
    type Value = String;

    fn value(self) -> String {
        self.0
    }
}

impl<W: Written> Written for Option<W> {
    type Value = Option<W::Value>;

    fn value(self) -> Self::Value {
        self.map(W::value)
    }
}

impl<W: Written> Written for Vec<W> {
    type Value = Vec<W::Value>;

    fn value(self) -> Self::Value {
        self.into_iter().map(W::value).collect()
    }
}

impl<W: Written> Written for BTreeMap<String, W> {
    type Value = BTreeMap<String, W::Value>;

    fn value(self) -> Self::Value {
        self.into_iter().map(|(name, value)| (name, value.value())).collect()
    }
}

/// A whole number, read as an integer or as a float without a fraction.
pub struct Whole<T>(T);

impl<T> Written for Whole<T> {
    type Value = T;

    fn value(self) -> T {
        self.0
    }
}

/// A type that [`Whole`] reads.
pub trait Integer: TryFrom<i128> {
    /// The text of an error about a value of another type.
    const EXPECTED: &'static str;
}

impl Integer for u64 {
    const EXPECTED: &'static str = "a whole number, 0 or more";
}

impl Integer for u32 {
    const EXPECTED: &'static str = "a whole number from 0 to 4294967295";
}

impl Integer for i64 {
    const EXPECTED: &'static str = "a whole number";
}

impl<'de, T: Integer> Deserialize<'de> for Whole<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(WholeVisitor(PhantomData, T::EXPECTED)).map(Self)
    }
}

/// Reads a whole number, or reports what was expected.
pub(super) struct WholeVisitor<T>(pub(super) PhantomData<T>, pub(super) &'static str);

impl<T: Integer> Visitor<'_> for WholeVisitor<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.1)
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<T, E> {
        T::try_from(value.into()).map_err(|_| E::invalid_value(de::Unexpected::Unsigned(value), &self))
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<T, E> {
        T::try_from(value.into()).map_err(|_| E::invalid_value(de::Unexpected::Signed(value), &self))
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<T, E> {
        let wrong = || E::invalid_value(de::Unexpected::Float(value), &self);
        if value.fract() != 0.0 || value.abs() > EXACT {
            return Err(wrong());
        }
        T::try_from(value as i128).map_err(|_| wrong())
    }
}

/// An id: text, or an integer, which stands for its decimal text.
#[derive(ToSchema)]
#[serde(untagged)]
#[schema(as = ItemId)]
pub enum ItemIdSchema {
    /// The id as text.
    Text(String),
    /// An integer that stands for its decimal text.
    Number(i64),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whole<T: Integer>(json: &str) -> Result<T, String> {
        serde_json::from_str::<Whole<T>>(json).map(|number| number.0).map_err(|error| error.to_string())
    }

    #[test]
    fn a_float_without_a_fraction_is_a_whole_number() {
        assert_eq!(whole::<u64>("5"), Ok(5));
        assert_eq!(whole::<u64>("5.0"), Ok(5));
        assert_eq!(whole::<i64>("-5.0"), Ok(-5));
        assert_eq!(whole::<u64>("18446744073709551615"), Ok(u64::MAX));
        for json in ["5.5", "-1", "-1.0", "1e30", "\"5\"", "null", "true", "[5]"] {
            let error = whole::<u64>(json).unwrap_err();
            assert!(error.contains("expected a whole number, 0 or more"), "{json}: {error}");
        }
        assert!(whole::<u32>("4294967296").unwrap_err().contains("0 to 4294967295"));
    }

    #[test]
    fn lists_and_maps_hold_plain_values() {
        let mut reader = serde_json::Deserializer::from_str("[\"a\", 7]");
        assert_eq!(read::<Vec<ItemId>, _>(&mut reader).unwrap(), ["a", "7"]);
        let mut reader = serde_json::Deserializer::from_str("{\"f\": [1, 2.0]}");
        let map = read::<BTreeMap<String, Vec<Whole<u32>>>, _>(&mut reader).unwrap();
        assert_eq!(map["f"], [1, 2]);
        let mut reader = serde_json::Deserializer::from_str("null");
        assert_eq!(read::<Option<ItemId>, _>(&mut reader).unwrap(), None);
    }
}
