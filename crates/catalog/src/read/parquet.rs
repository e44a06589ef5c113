//! Parquet: one row per item, columns `item_id` (string, or integers as decimal text), `sid` (list
//! of integers or strings), and optionally `tags` (list of strings) and `title` (string).
//!
//! Only these columns are decoded, and rows are decoded one by one, so memory is bounded by a page
//! per column.

use std::fs::File;
use std::panic::{self, AssertUnwindSafe};
use std::path::Path;

use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row};
use parquet::schema::types::Type;

use super::Sink;
use crate::item_id::integer;
use crate::{CatalogError, ItemId, ItemRecord, Place, RecordProblem, RecordUnit, SidPart};

const REQUIRED: [&str; 2] = ["item_id", "sid"];
const OPTIONAL: [&str; 2] = ["tags", "title"];

pub(super) fn read(path: &Path, sink: Sink<'_>) -> Result<(), CatalogError> {
    let file = File::open(path).map_err(|source| CatalogError::Io { path: path.to_owned(), source })?;
    let damaged = |rows_read, message| CatalogError::Parquet { path: path.to_owned(), rows_read, message };

    let reader = decode(|| SerializedFileReader::new(file)).map_err(|message| damaged(0, message))?;
    let columns = wanted_columns(&reader, path)?;
    let mut rows =
        decode(|| RowIter::from_file(Some(columns), &reader)).map_err(|message| damaged(0, message))?;
    for number in 1.. {
        let row = match decode(|| rows.next().transpose()).map_err(|message| damaged(number - 1, message))? {
            Some(row) => row,
            None => break,
        };
        sink(Place { unit: RecordUnit::Row, number }, record(row))?;
    }
    Ok(())
}

/// Runs a step of the decoder. The decoder reports most damage as errors but panics in some cases
/// (assertions about list layouts, unsupported types).
fn decode<T>(step: impl FnOnce() -> Result<T, ParquetError>) -> Result<T, String> {
    // After a panic the decoder is dropped, so its state does not matter.
    match panic::catch_unwind(AssertUnwindSafe(step)) {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(_) => Err("the decoder gave up: damaged file or unsupported column type".to_owned()),
    }
}

/// The schema of the file reduced to the columns of a catalog.
fn wanted_columns(reader: &SerializedFileReader<File>, path: &Path) -> Result<Type, CatalogError> {
    let schema = reader.metadata().file_metadata().schema();
    for column in REQUIRED {
        if !schema.get_fields().iter().any(|field| field.name() == column) {
            return Err(CatalogError::MissingColumn { path: path.to_owned(), column });
        }
    }
    let wanted = |name| REQUIRED.contains(&name) || OPTIONAL.contains(&name);
    let fields = schema.get_fields().iter().filter(|field| wanted(field.name())).cloned().collect();
    Type::group_type_builder(schema.name()).with_fields(fields).build().map_err(|error| {
        CatalogError::Parquet { path: path.to_owned(), rows_read: 0, message: error.to_string() }
    })
}

fn record(row: Row) -> Result<ItemRecord, RecordProblem> {
    let (mut item_id, mut sid, mut tags, mut title) = (None, None, Vec::new(), None);
    for (name, field) in row.into_columns() {
        match (name.as_str(), field) {
            (_, Field::Null) => {}
            ("item_id", field) => item_id = Some(id(&field)?),
            ("sid", field) => sid = Some(list("sid", SID_EXPECTED, &field, part)?),
            ("tags", field) => tags = list("tags", "a list of strings", &field, text)?,
            ("title", field) => {
                title = Some(text(&field).ok_or_else(|| wrong_type("title", "a string", &field))?);
            }
            _ => {}
        }
    }
    Ok(ItemRecord {
        item_id: item_id.ok_or(RecordProblem::MissingField("item_id"))?,
        sid: sid.ok_or(RecordProblem::MissingField("sid"))?,
        tags,
        title,
    })
}

const SID_EXPECTED: &str = "a list of integer codes from 0 to 4294967295 or of token strings";

fn id(field: &Field) -> Result<String, RecordProblem> {
    let id = ItemId::from_parquet(field).map_err(|got| RecordProblem::BadItemId { got })?;
    Ok(id.0)
}

fn list<T>(
    name: &'static str,
    expected: &'static str,
    field: &Field,
    element: impl Fn(&Field) -> Option<T>,
) -> Result<Vec<T>, RecordProblem> {
    let Field::ListInternal(list) = field else {
        return Err(wrong_type(name, expected, field));
    };
    list.elements()
        .iter()
        .map(|field| element(field).ok_or_else(|| wrong_type(name, expected, field)))
        .collect()
}

fn part(field: &Field) -> Option<SidPart> {
    let code = integer(field).and_then(|code| u32::try_from(code).ok()).map(SidPart::Code);
    code.or_else(|| text(field).map(|text| SidPart::Token(text.into())))
}

fn text(field: &Field) -> Option<String> {
    match field {
        Field::Str(text) => Some(text.clone()),
        // Some writers leave out the annotation that says a column is text.
        Field::Bytes(bytes) => std::str::from_utf8(bytes.data()).ok().map(str::to_owned),
        _ => None,
    }
}

fn wrong_type(field: &'static str, expected: &'static str, got: &Field) -> RecordProblem {
    RecordProblem::WrongType { field, expected, got: describe(got) }
}

/// Names a value in an error. The decoder's own formatting panics on dates out of range, so it is
/// not used.
fn describe(field: &Field) -> String {
    if let Some(integer) = integer(field) {
        return integer.to_string();
    }
    match field {
        Field::Null => "null".to_owned(),
        Field::Bool(value) => value.to_string(),
        // This form keeps the ".0" of a whole number, which is what is wrong with it.
        Field::Float(value) => format!("{value:?}"),
        Field::Double(value) => format!("{value:?}"),
        Field::Str(_) => "a string".to_owned(),
        Field::Bytes(_) => "bytes that are not UTF-8".to_owned(),
        Field::Group(_) => "a struct".to_owned(),
        Field::ListInternal(_) => "a list".to_owned(),
        Field::MapInternal(_) => "a map".to_owned(),
        _ => "a value of another type".to_owned(),
    }
}
