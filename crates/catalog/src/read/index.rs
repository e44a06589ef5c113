//! `.json`: one object from item id to its list of codes, `{"0": ["<a_9>", "<b_2>"], ...}`, as
//! training code writes it.
//!
//! The codes may be integers or token strings. Such a file has no tags and no titles. Entries are
//! read one by one.

use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader, Cursor, Read};
use std::path::Path;

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, Visitor};
use serde_json::Value;

use super::Sink;
use crate::{CatalogError, CatalogLimits, ItemRecord, Place, RecordProblem, RecordUnit, SidPart, text};

const BUFFER_BYTES: usize = 256 << 10;
/// As many bytes as the longest byte order mark.
const MARK_BYTES: u64 = 3;

pub(super) fn read(path: &Path, limits: &CatalogLimits, sink: Sink<'_>) -> Result<(), CatalogError> {
    let io_error = |source| CatalogError::Io { path: path.to_owned(), source };
    let mut file = BufReader::with_capacity(BUFFER_BYTES, File::open(path).map_err(io_error)?);
    let mut start = Vec::new();
    file.by_ref().take(MARK_BYTES).read_to_end(&mut start).map_err(io_error)?;
    let start = text::skip_mark(&start).map_err(|_| CatalogError::Utf16(path.to_owned()))?;
    let whole = Cursor::new(start).chain(file);
    read_from(whole, path, limits, sink)
}

fn read_from(
    text: impl BufRead,
    path: &Path,
    limits: &CatalogLimits,
    sink: Sink<'_>,
) -> Result<(), CatalogError> {
    let mut failed = None;
    let mut reader = serde_json::Deserializer::from_reader(text);
    let entries = Entries { sink, limits, failed: &mut failed };
    let read = entries.deserialize(&mut reader).and_then(|()| reader.end());
    match (failed, read) {
        (Some(error), _) => Err(error),
        (None, Err(error)) => Err(CatalogError::Index { path: path.to_owned(), message: error.to_string() }),
        (None, Ok(())) => Ok(()),
    }
}

/// Passes each entry of the object on as it is read.
struct Entries<'a, 'b> {
    sink: Sink<'a>,
    limits: &'a CatalogLimits,
    /// The error with which the sink ended the reading.
    failed: &'b mut Option<CatalogError>,
}

impl<'de> DeserializeSeed<'de> for Entries<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Entries<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(
            "an object from item id to its list of codes; write a list of items as .jsonl, one per line",
        )
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        for number in 1.. {
            let Some((item_id, codes)) = map.next_entry::<String, Value>()? else { break };
            let place = Place { unit: RecordUnit::Record, number };
            let record = record(item_id, codes, self.limits);
            if let Err(error) = (self.sink)(place, record) {
                *self.failed = Some(error);
                return Err(A::Error::custom("the catalog is refused"));
            }
        }
        Ok(())
    }
}

fn record(item_id: String, codes: Value, limits: &CatalogLimits) -> Result<ItemRecord, RecordProblem> {
    if let Value::Array(parts) = &codes
        && parts.len() > usize::from(limits.max_depth)
    {
        return Err(RecordProblem::SidTooDeep { got: parts.len(), limit: limits.max_depth });
    }
    let sid: Result<Vec<SidPart>, _> = serde_json::from_value(codes);
    let malformed = |error| RecordProblem::Malformed(format!("codes of item {item_id:?}: {error}"));
    let sid = sid.map_err(malformed)?;
    Ok(ItemRecord { item_id, sid, tags: Vec::new(), title: None })
}
