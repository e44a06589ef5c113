//! Parquet: one row per request, columns named like the fields of a request, and `id`.
//!
//! A row is converted to the JSON that a line would hold, so all later steps are the same: ids,
//! whole numbers and times follow the rules of [`crate::api::written`]. Three things exist only in
//! Parquet. Columns of times with a unit become seconds. Nulls and NaN are fields that are not
//! given, except for the time of an event, which must be a number. Columns in which pandas keeps
//! the index of a table are skipped.

use std::fs::File;
use std::panic::{self, AssertUnwindSafe};

use beamline_wording::did_you_mean;
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row};
use parquet::schema::types::{Type, TypePtr};
use serde_json::{Map, Value};

use super::columns::{self, WrongColumn};
use crate::api::timestamp::Unit;
use crate::cli::lines::Line;
use crate::error::Error;

/// Names of the columns that are fields of a request.
const KNOWN: [&str; 20] = [
    "id",
    "user_id",
    "history",
    "token_ids",
    "prompt",
    "sid_prefix",
    "num_items",
    "beam_width",
    "beam_widths",
    "model",
    "normalization",
    "filters",
    "timeout_ms",
    "priority",
    "allow_degraded",
    "strict_history",
    "strict_filters",
    "tenant",
    "query_time",
    "features",
];

/// Why a file cannot be read.
#[derive(Debug, thiserror::Error)]
pub(super) enum ParquetInputError {
    /// Columns that are not fields of a request.
    #[error(
        "no request has a field for the columns {}{}. The fields are {}. Rename the columns, or give \
         --ignore-unknown-columns to leave them out",
        quoted(.0), hint(.0), KNOWN.join(", ")
    )]
    UnknownColumns(Vec<String>),
    /// A column of a type that its field cannot have.
    #[error(transparent)]
    WrongColumn(#[from] WrongColumn),
    /// The file has no column that is a field of a request.
    #[error("no column is a field of a request; the fields are {}", KNOWN.join(", "))]
    NoColumns,
    /// The file is damaged.
    #[error("after {rows} rows: {message}")]
    Damaged {
        /// Number of rows read before the fault.
        rows: u64,
        /// The message of the decoder.
        message: String,
    },
}

/// Reads rows one by one.
pub(super) struct Rows {
    rows: RowIter<'static>,
    units: Units,
    limit: usize,
    read: u64,
    len: u64,
}

impl Rows {
    /// Opens a file and checks its columns.
    pub(super) fn open(file: File, limit: usize, ignore_unknown: bool) -> Result<Self, ParquetInputError> {
        let damaged = |message| ParquetInputError::Damaged { rows: 0, message };
        let reader = decode(|| SerializedFileReader::new(file)).map_err(damaged)?;
        let schema = reader.metadata().file_metadata().schema();
        let columns = schema.get_fields().iter().filter(|field| !columns::is_index(field.name())).cloned();
        let (known, unknown): (Vec<_>, Vec<_>) = columns.partition(|field| KNOWN.contains(&field.name()));
        if !unknown.is_empty() && !ignore_unknown {
            let names = unknown.iter().map(|field| field.name().to_owned()).collect();
            return Err(ParquetInputError::UnknownColumns(names));
        }
        let units = units(&known)?;
        if known.is_empty() {
            return Err(ParquetInputError::NoColumns);
        }
        let wanted = Type::group_type_builder(schema.name()).with_fields(known).build();
        let wanted = wanted.map_err(|error| damaged(error.to_string()))?;
        let len = u64::try_from(reader.metadata().file_metadata().num_rows()).unwrap_or(0);
        let rows = decode(|| RowIter::from_file_into(Box::new(reader)).project(Some(wanted)));
        Ok(Self { rows: rows.map_err(damaged)?, units, limit, read: 0, len })
    }

    /// Number of rows of the file.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Reads the next row as JSON.
    pub(super) fn next(&mut self) -> Result<Option<Line>, ParquetInputError> {
        let row = decode(|| self.rows.next().transpose())
            .map_err(|message| ParquetInputError::Damaged { rows: self.read, message })?;
        let Some(row) = row else { return Ok(None) };
        self.read += 1;
        let json =
            request(row, self.units).and_then(|value| serde_json::to_vec(&value).map_err(Error::internal));
        Ok(Some(json.and_then(|json| match json.len() > self.limit {
            true => Err(Error::BodyTooLarge { limit: self.limit }),
            false => Ok(json),
        })))
    }
}

/// Runs a step of the decoder. The decoder reports most damage as errors but panics in some cases
/// (assertions about list layouts, unsupported types).
fn decode<T>(step: impl FnOnce() -> Result<T, ParquetError>) -> Result<T, String> {
    // Nothing more is read after a panic, so the decoder's state does not matter.
    match panic::catch_unwind(AssertUnwindSafe(step)) {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(_) => Err("the decoder gave up: damaged file or unsupported column type".to_owned()),
    }
}

/// The units of the two fields that hold times.
#[derive(Clone, Copy, Default)]
struct Units {
    query_time: Unit,
    timestamp: Unit,
}

/// Finds the units of times, and refuses columns with a unit whose field is not a time.
fn units(columns: &[TypePtr]) -> Result<Units, WrongColumn> {
    let mut units = Units::default();
    for (path, unit) in columns::times(columns)? {
        match path.join(".").as_str() {
            "query_time" => units.query_time = unit,
            "history.timestamp" => units.timestamp = unit,
            path => return Err(WrongColumn::NoTime { path: path.to_owned(), unit }),
        }
    }
    Ok(units)
}

/// The place of a wrong value, and what is wrong with it.
struct Wrong {
    path: String,
    what: &'static str,
}

type Converted = Result<Value, Wrong>;

fn request(row: Row, units: Units) -> Result<Value, Error> {
    let mut request = Map::new();
    for (name, field) in row.into_columns() {
        let value = match name.as_str() {
            "history" => history(&field, units.timestamp),
            "query_time" => time(&field, units.query_time),
            _ => plain(&field),
        };
        match value {
            Ok(Value::Null) => {}
            Ok(value) => drop(request.insert(name, value)),
            Err(Wrong { path, what }) => {
                let message = format!("column `{name}{path}` {what}");
                return Err(Error::InvalidRequest { message, param: Some(name) });
            }
        }
    }
    Ok(Value::Object(request))
}

fn wrong(what: &'static str) -> Wrong {
    Wrong { path: String::new(), what }
}

/// Converts a list of item ids, or of structs as in JSON.
fn history(field: &Field, unit: Unit) -> Converted {
    let Field::ListInternal(list) = field else { return plain(field) };
    let event = |field: &Field| match field {
        Field::Group(row) => row
            .get_column_iter()
            .map(|(name, field)| match name.as_str() {
                "timestamp" if is_nan(field) => Err(wrong("is NaN: give every event a time, or null")),
                "timestamp" => Ok((name.clone(), time(field, unit)?)),
                _ => Ok((name.clone(), plain(field)?)),
            })
            .filter(|entry| !matches!(entry, Ok((_, Value::Null))))
            .collect::<Result<Map<_, _>, _>>()
            .map(Value::Object),
        _ => plain(field),
    };
    let events = list.elements().iter().enumerate();
    events
        .map(|(index, field)| {
            event(field).map_err(|inner| Wrong { path: format!("[{index}]{}", inner.path), ..inner })
        })
        .collect()
}

/// Converts a time to seconds.
fn time(field: &Field, unit: Unit) -> Converted {
    Ok(match field {
        Field::TimestampMillis(value) => Unit::Milliseconds.seconds(*value).into(),
        Field::TimestampMicros(value) => Unit::Microseconds.seconds(*value).into(),
        Field::Date(days) => Unit::Days.seconds((*days).into()).into(),
        Field::Long(value) => unit.seconds(*value).into(),
        field => return plain(field),
    })
}

fn is_nan(field: &Field) -> bool {
    match field {
        Field::Float(value) => value.is_nan(),
        Field::Double(value) => value.is_nan(),
        _ => false,
    }
}

/// Converts a value to JSON. Types that JSON requests do not have are an error.
fn plain(field: &Field) -> Converted {
    Ok(match field {
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
        Field::Float(n) => number((*n).into())?,
        Field::Double(n) => number(*n)?,
        Field::Str(text) => text.as_str().into(),
        // Some writers leave out the annotation that says a column is text.
        Field::Bytes(bytes) => {
            std::str::from_utf8(bytes.data()).map_err(|_| wrong("holds bytes that are not UTF-8"))?.into()
        }
        Field::ListInternal(list) => list.elements().iter().map(plain).collect::<Result<_, _>>()?,
        Field::Group(row) => {
            let fields = row.get_column_iter().map(|(name, field)| Ok((name.clone(), plain(field)?)));
            let fields: Vec<(String, Value)> = fields.collect::<Result<_, _>>()?;
            Value::Object(fields.into_iter().filter(|(_, value)| !value.is_null()).collect())
        }
        Field::MapInternal(map) => {
            let entry = |(name, field): &(Field, Field)| match plain(name)? {
                Value::String(name) => Ok((name, plain(field)?)),
                _ => Err(wrong("is a map whose keys are not text")),
            };
            Value::Object(map.entries().iter().map(entry).collect::<Result<_, _>>()?)
        }
        _ => return Err(wrong("holds a value that no request can have")),
    })
}

/// A number; NaN counts as absent, because pandas writes gaps in columns as NaN.
fn number(value: f64) -> Converted {
    match value {
        _ if value.is_nan() => Ok(Value::Null),
        _ if value.is_infinite() => Err(wrong("holds an infinite number")),
        _ => Ok(value.into()),
    }
}

fn quoted(names: &[String]) -> String {
    names.iter().map(|name| format!("{name:?}")).collect::<Vec<_>>().join(", ")
}

/// A suggestion for the first of the unknown columns.
fn hint(names: &[String]) -> String {
    names.first().map(|name| did_you_mean(name, KNOWN)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_of_a_request_is_a_column() {
        let description: Value = serde_json::from_str(crate::openapi::json().unwrap()).unwrap();
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
        let json = |field: Field| plain(&field).ok();
        assert_eq!(json(Field::Double(10.0)), Some(Value::from(10.0)));
        assert_eq!(json(Field::Double(f64::NAN)), Some(Value::Null));
        assert_eq!(json(Field::Double(f64::INFINITY)), None);
        assert_eq!(json(Field::Long(-7)), Some(Value::from(-7)));
        assert_eq!(json(Field::TimestampMillis(-1)), None, "no time belongs here");
    }

    #[test]
    fn times_become_seconds() {
        let seconds = |field: Field, unit| time(&field, unit).ok();
        assert_eq!(seconds(Field::TimestampMillis(-1), Unit::Seconds), Some(Value::from(-1)));
        assert_eq!(seconds(Field::TimestampMicros(2_500_000), Unit::Seconds), Some(Value::from(2)));
        assert_eq!(seconds(Field::Long(3_999_999_999), Unit::Nanoseconds), Some(Value::from(3)));
        assert_eq!(seconds(Field::Long(7), Unit::Seconds), Some(Value::from(7)));
        assert_eq!(seconds(Field::Date(1), Unit::Seconds), Some(Value::from(86_400)));
        assert_eq!(seconds(Field::Double(7.0), Unit::Seconds), Some(Value::from(7.0)));
    }
}
