//! Parquet: one row per request, columns named like the fields of a request, and `id`.
//!
//! A row becomes the JSON that a line would hold, so everything after this is the same. What Parquet writes differently:
//! ids may be integers; a history may be a list of item ids; timestamps become seconds; a whole number may be a float,
//! and NaN is nothing, as pandas writes integer columns with gaps. Nulls are fields that are not given.

use std::fs::File;
use std::panic::{self, AssertUnwindSafe};

use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row};
use parquet::schema::types::Type;
use serde_json::{Map, Value};

use crate::cli::lines::Line;
use crate::error::Error;

/// Columns that mean something.
const KNOWN: [&str; 17] = [
    "id",
    "user_id",
    "history",
    "token_ids",
    "prompt",
    "sid_prefix",
    "num_items",
    "beam_width",
    "model",
    "normalization",
    "filters",
    "timeout_ms",
    "allow_degraded",
    "strict_history",
    "tenant",
    "query_time",
    "features",
];

/// Whole numbers up to here are exact as floats.
const EXACT: f64 = 9_007_199_254_740_992.0;

/// Why a file cannot be read.
#[derive(Debug, thiserror::Error)]
pub(super) enum ParquetInputError {
    /// Columns that no request has.
    #[error(
        "no request has a field for the columns {}; the fields are {}. Give --ignore-unknown-columns to leave them out",
        .0.join(", "), KNOWN.join(", ")
    )]
    UnknownColumns(Vec<String>),
    /// No column that a request could be made of.
    #[error("no column is a field of a request; the fields are {}", KNOWN.join(", "))]
    NoColumns,
    /// The file is damaged.
    #[error("after {rows} rows: {message}")]
    Damaged {
        /// Rows that were read.
        rows: u64,
        /// What the decoder said.
        message: String,
    },
}

/// Reads rows one by one.
pub(super) struct Rows {
    rows: RowIter<'static>,
    limit: usize,
    read: u64,
    len: u64,
}

impl Rows {
    /// Checks the columns.
    pub(super) fn open(file: File, limit: usize, ignore_unknown: bool) -> Result<Self, ParquetInputError> {
        let damaged = |message| ParquetInputError::Damaged { rows: 0, message };
        let reader = decode(|| SerializedFileReader::new(file)).map_err(damaged)?;
        let schema = reader.metadata().file_metadata().schema();
        let (known, unknown): (Vec<_>, Vec<_>) =
            schema.get_fields().iter().cloned().partition(|field| KNOWN.contains(&field.name()));
        if !unknown.is_empty() && !ignore_unknown {
            let names = unknown.iter().map(|field| format!("{:?}", field.name())).collect();
            return Err(ParquetInputError::UnknownColumns(names));
        }
        if known.is_empty() {
            return Err(ParquetInputError::NoColumns);
        }
        let wanted = Type::group_type_builder(schema.name()).with_fields(known).build();
        let wanted = wanted.map_err(|error| damaged(error.to_string()))?;
        let len = u64::try_from(reader.metadata().file_metadata().num_rows()).unwrap_or(0);
        let rows = decode(|| RowIter::from_file_into(Box::new(reader)).project(Some(wanted)));
        Ok(Self { rows: rows.map_err(damaged)?, limit, read: 0, len })
    }

    /// How many rows there are.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// The next row as JSON.
    pub(super) fn next(&mut self) -> Result<Option<Line>, ParquetInputError> {
        let row = decode(|| self.rows.next().transpose())
            .map_err(|message| ParquetInputError::Damaged { rows: self.read, message })?;
        let Some(row) = row else { return Ok(None) };
        self.read += 1;
        let json = request(row).and_then(|value| serde_json::to_vec(&value).map_err(Error::internal));
        Ok(Some(json.and_then(|json| match json.len() > self.limit {
            true => Err(Error::BodyTooLarge { limit: self.limit }),
            false => Ok(json),
        })))
    }
}

/// Runs a step of the decoder, which reports most damage as errors but panics on some of it (assertions about list
/// layouts, unsupported types).
fn decode<T>(step: impl FnOnce() -> Result<T, ParquetError>) -> Result<T, String> {
    // After a panic nothing more is read, so the decoder's state does not matter.
    match panic::catch_unwind(AssertUnwindSafe(step)) {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(_) => Err("the decoder gave up: damaged file or unsupported column type".to_owned()),
    }
}

fn request(row: Row) -> Result<Value, Error> {
    let mut request = Map::new();
    for (name, field) in row.into_columns() {
        let value = match name.as_str() {
            "user_id" => id(&field),
            "history" => history(&field),
            _ => plain(&field),
        };
        match value {
            Some(Value::Null) => {}
            Some(value) => drop(request.insert(name, value)),
            None => {
                let message = format!("column `{name}` holds a value that no request can have");
                return Err(Error::InvalidRequest { message, param: Some(name) });
            }
        }
    }
    Ok(Value::Object(request))
}

/// A list of item ids, or of structs as in JSON.
fn history(field: &Field) -> Option<Value> {
    let Field::ListInternal(list) = field else { return plain(field) };
    let action = |field: &Field| {
        let mut action = match field {
            Field::Group(_) => plain(field)?,
            _ => Value::Object(Map::from_iter([("item_id".to_owned(), id(field)?)])),
        };
        // Ids that are numbers here are text in the catalog.
        if let Some(Value::Number(number)) = action.get("item_id") {
            let text = number.to_string();
            action["item_id"] = text.into();
        }
        Some(action)
    };
    list.elements().iter().map(action).collect()
}

/// An id: text, or an integer as decimal text.
fn id(field: &Field) -> Option<Value> {
    match plain(field)? {
        Value::Number(number) if number.is_f64() => None,
        Value::Number(number) => Some(number.to_string().into()),
        value @ (Value::String(_) | Value::Null) => Some(value),
        _ => None,
    }
}

/// A value as JSON; nothing for what JSON requests do not have.
fn plain(field: &Field) -> Option<Value> {
    Some(match field {
        Field::Null => Value::Null,
        Field::Bool(value) => (*value).into(),
        Field::Byte(n) => (*n).into(),
        Field::Short(n) => (*n).into(),
        Field::Int(n) => (*n).into(),
        Field::Long(n) => (*n).into(),
        Field::UByte(n) => (*n).into(),
        Field::UShort(n) => (*n).into(),
        Field::UInt(n) => (*n).into(),
        Field::ULong(n) => (*n).into(),
        Field::Float(n) => number((*n).into()),
        Field::Double(n) => number(*n),
        Field::TimestampMillis(ms) => ms.div_euclid(1000).into(),
        Field::TimestampMicros(us) => us.div_euclid(1_000_000).into(),
        Field::Str(text) => text.as_str().into(),
        // Some writers leave out the annotation that says a column is text.
        Field::Bytes(bytes) => std::str::from_utf8(bytes.data()).ok()?.into(),
        Field::ListInternal(list) => list.elements().iter().map(plain).collect::<Option<_>>()?,
        Field::Group(row) => {
            let fields = row.get_column_iter().map(|(name, field)| Some((name.clone(), plain(field)?)));
            let fields: Option<Vec<(String, Value)>> = fields.collect();
            Value::Object(fields?.into_iter().filter(|(_, value)| !value.is_null()).collect())
        }
        Field::MapInternal(map) => {
            let entry = |(name, field): &(Field, Field)| match plain(name)? {
                Value::String(name) => Some((name, plain(field)?)),
                _ => None,
            };
            Value::Object(map.entries().iter().map(entry).collect::<Option<_>>()?)
        }
        _ => return None,
    })
}

fn number(value: f64) -> Value {
    match value {
        _ if value.is_nan() => Value::Null,
        _ if value.fract() == 0.0 && value.abs() <= EXACT => (value as i64).into(),
        _ => value.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_of_a_request_is_a_column() {
        let description: Value = serde_json::from_str(&crate::openapi::json().unwrap()).unwrap();
        let fields =
            description["components"]["schemas"]["RecommendRequest"]["properties"].as_object().unwrap();
        let mut fields: Vec<&str> = fields.keys().map(String::as_str).chain(["id"]).collect();
        let mut known = KNOWN;
        fields.sort_unstable();
        known.sort_unstable();
        assert_eq!(fields, known);
    }

    #[test]
    fn numbers_as_pandas_writes_them() {
        assert_eq!(number(10.0), Value::from(10));
        assert_eq!(number(f64::NAN), Value::Null);
        assert_eq!(number(0.5), Value::from(0.5));
        assert_eq!(plain(&Field::TimestampMillis(-1)), Some(Value::from(-1)));
        assert_eq!(id(&Field::Long(-7)), Some(Value::from("-7")));
        assert_eq!(id(&Field::Double(0.5)), None);
    }
}
