//! JSON lines: one object per line, `{"item_id": "..", "sid": [..], "tags": [..], "title": ".."}`.
//!
//! `item_id` may be an integer, which stands for its decimal text. `tags` and `title` may be absent
//! or null; other fields are ignored. Blank lines, CRLF line ends and a UTF-8 byte order mark at
//! the start are accepted. Memory is bounded by the limit on line length.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

use super::Sink;
use crate::{
    CatalogError, CatalogLimits, ItemId, ItemRecord, Place, RecordProblem, RecordUnit, SidPart, text,
};

const BUFFER_BYTES: usize = 256 << 10;

pub(super) fn read(path: &Path, limits: &CatalogLimits, sink: Sink<'_>) -> Result<(), CatalogError> {
    let file = File::open(path).map_err(|source| CatalogError::Io { path: path.to_owned(), source })?;
    read_from(BufReader::with_capacity(BUFFER_BYTES, file), path, limits, sink)
}

/// Reads from any source; error messages name it `path`.
pub(super) fn read_from(
    mut file: impl BufRead,
    path: &Path,
    limits: &CatalogLimits,
    sink: Sink<'_>,
) -> Result<(), CatalogError> {
    let io_error = |source| CatalogError::Io { path: path.to_owned(), source };
    let mut line = Vec::new();
    for number in 1.. {
        let fits = match next_line(&mut file, limits.max_line_bytes, &mut line).map_err(io_error)? {
            Some(fits) => fits,
            None => break,
        };
        let text = match number {
            1 => text::skip_mark(&line).map_err(|_| CatalogError::Utf16(path.to_owned()))?,
            _ => &line,
        };
        let place = Place { unit: RecordUnit::Line, number };
        if !fits {
            sink(place, Err(RecordProblem::LineTooLong { limit: limits.max_line_bytes }))?;
        } else if !text.trim_ascii().is_empty() {
            sink(place, parse(text))?;
        }
    }
    Ok(())
}

/// Replaces the contents of `line` by the next line without its line end. Returns whether the line
/// fits into `limit` bytes; the rest of a longer line is skipped. `None` at the end of the file.
fn next_line(reader: &mut impl BufRead, limit: usize, line: &mut Vec<u8>) -> io::Result<Option<bool>> {
    line.clear();
    // Includes room for the line end, so that a line of exactly the limit is seen to end.
    let with_end = (limit as u64).saturating_add(2);
    if reader.by_ref().take(with_end).read_until(b'\n', line)? == 0 {
        return Ok(None);
    }
    if line.ends_with(b"\n") {
        line.pop();
        if line.ends_with(b"\r") {
            line.pop();
        }
    } else if line.len() > limit {
        reader.skip_until(b'\n')?;
    }
    Ok(Some(line.len() <= limit))
}

/// The fields of a line. All are optional here, so that a missing one gets a typed error.
#[derive(serde::Deserialize)]
struct Line {
    item_id: Option<ItemId>,
    sid: Option<Vec<SidPart>>,
    tags: Option<Vec<String>>,
    title: Option<String>,
}

fn parse(text: &[u8]) -> Result<ItemRecord, RecordProblem> {
    // serde would also accept an array of the fields in order.
    if !text.trim_ascii_start().starts_with(b"{") {
        return Err(RecordProblem::Malformed("expected a JSON object, {...}".to_owned()));
    }
    let line: Line =
        serde_json::from_slice(text).map_err(|error| RecordProblem::Malformed(explain(&error)))?;
    Ok(ItemRecord {
        item_id: line.item_id.ok_or(RecordProblem::MissingField("item_id"))?.0,
        sid: line.sid.ok_or(RecordProblem::MissingField("sid"))?,
        tags: line.tags.unwrap_or_default(),
        title: line.title,
    })
}

/// Rewrites a message of serde_json. It sees one line at a time and calls each "line 1", so only
/// its column means something. It also quotes values in full, however long they are.
fn explain(error: &serde_json::Error) -> String {
    const LONGEST: usize = 200;
    let text = error.to_string();
    let position = format!(" at line {} column {}", error.line(), error.column());
    let Some(message) = text.strip_suffix(&position) else { return text };
    let (message, dots) = match message.char_indices().nth(LONGEST) {
        Some((end, _)) => (&message[..end], "..."),
        None => (message, ""),
    };
    format!("{message}{dots} (column {})", error.column())
}
