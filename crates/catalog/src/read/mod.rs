//! Readers of catalog files. A reader turns a file into records one by one and reports the place of
//! each. It holds one record at a time and checks only its form.

mod index;
mod json_lines;
mod parquet;

use std::path::Path;

use crate::{CatalogError, CatalogLimits, ItemRecord, Place, RecordProblem};

/// Receives a record, or what is wrong with it, and its place. An error ends the reading.
pub(crate) type Sink<'a> =
    &'a mut dyn FnMut(Place, Result<ItemRecord, RecordProblem>) -> Result<(), CatalogError>;

/// Reads JSON lines from memory.
pub(crate) fn for_each_line(text: &[u8], limits: &CatalogLimits, sink: Sink<'_>) -> Result<(), CatalogError> {
    // There is no file and so no name. Reading from memory does not fail.
    json_lines::read_from(text, Path::new(""), limits, sink)
}

/// Reads a file in the format that its extension names.
pub(crate) fn for_each_record(
    path: &Path,
    limits: &CatalogLimits,
    sink: Sink<'_>,
) -> Result<(), CatalogError> {
    match path.extension().and_then(|extension| extension.to_str()) {
        Some(extension) if extension.eq_ignore_ascii_case("jsonl") => json_lines::read(path, limits, sink),
        Some(extension) if extension.eq_ignore_ascii_case("json") => index::read(path, limits, sink),
        Some(extension) if extension.eq_ignore_ascii_case("parquet") => parquet::read(path, sink),
        _ => Err(CatalogError::UnknownFormat(path.to_owned())),
    }
}
