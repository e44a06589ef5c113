//! Why a catalog was refused.
//!
//! Faults of single records are collected, so that whoever wrote the file can fix them in one go; faults of the file
//! as a whole end the reading at once. A refused catalog leaves nothing behind.

use std::fmt;
use std::io;
use std::path::PathBuf;

use crate::SidPart;

/// A catalog could not be built.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CatalogError {
    /// The file could not be opened or read.
    #[error("cannot read the catalog {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// The file name does not end in `.jsonl` or `.parquet`.
    #[error("{}: not a known catalog format; name the file .jsonl or .parquet", .0.display())]
    UnknownFormat(PathBuf),
    /// The Parquet file is damaged or uses an unsupported feature.
    #[error("{}: cannot decode Parquet after {rows_read} rows: {message}", path.display())]
    Parquet {
        /// The file.
        path: PathBuf,
        /// Rows read without fault before this one.
        rows_read: u64,
        /// What the decoder said.
        message: String,
    },
    /// The Parquet file lacks a required column.
    #[error("{}: no column `{column}`", path.display())]
    MissingColumn {
        /// The file.
        path: PathBuf,
        /// The column.
        column: &'static str,
    },
    /// Some records are bad: the first of them, and the number of those not listed.
    #[error("{}", describe(listed, *omitted))]
    BadRecords {
        /// The first bad records in file order, at most
        /// [`max_listed_problems`](crate::CatalogLimits::max_listed_problems).
        listed: Vec<BadRecord>,
        /// How many more there are.
        omitted: u64,
    },
    /// More items than the limit.
    #[error("{place}: more than {limit} items, the limit of a catalog")]
    TooManyItems {
        /// Where the first item over the limit is.
        place: Place,
        /// The limit.
        limit: u32,
    },
    /// No items at all.
    #[error("the catalog has no items")]
    Empty,
}

/// A record that cannot be an item of the catalog.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadRecord {
    /// Where it is.
    pub place: Place,
    /// What is wrong with it.
    pub problem: RecordProblem,
}

/// What is wrong with one record.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RecordProblem {
    /// The text is not a JSON object of the right shape.
    #[error("{0}")]
    Malformed(String),
    /// The line is over the limit and was skipped unread.
    #[error("longer than {limit} bytes")]
    LineTooLong {
        /// The limit.
        limit: usize,
    },
    /// A required field is absent or null.
    #[error("field `{0}` is missing")]
    MissingField(&'static str),
    /// A field holds a value of the wrong type.
    #[error("field `{field}` must be {expected}, got {got}")]
    WrongType {
        /// The field.
        field: &'static str,
        /// What it should hold.
        expected: &'static str,
        /// What it holds.
        got: String,
    },
    /// The item id is the empty string.
    #[error("`item_id` is empty")]
    EmptyItemId,
    /// A text is over its limit.
    #[error("`{field}` is {bytes} bytes long, the limit is {limit}")]
    TextTooLong {
        /// The field.
        field: &'static str,
        /// Its length.
        bytes: usize,
        /// The limit.
        limit: usize,
    },
    /// The item id was used before.
    #[error("`item_id` {item_id:?} is already used by {first}")]
    DuplicateItemId {
        /// The id.
        item_id: String,
        /// Where it was used first.
        first: Place,
    },
    /// The SID has no parts.
    #[error("`sid` is empty")]
    EmptySid,
    /// The SID has more parts than any catalog may have.
    #[error("`sid` has {got} levels, the limit is {limit}")]
    SidTooDeep {
        /// Its number of parts.
        got: usize,
        /// The limit.
        limit: u8,
    },
    /// The SID has another number of parts than the catalog.
    #[error("`sid` has {got} levels, expected {expected}")]
    WrongDepth {
        /// The catalog's depth.
        expected: usize,
        /// The SID's number of parts.
        got: usize,
    },
    /// The SID uses integer codes in a catalog of token strings, or the reverse.
    #[error("`sid` level {level} is {part}, but this catalog is written in {expected}")]
    MixedForms {
        /// The level, counted from 0.
        level: usize,
        /// The part.
        part: SidPart,
        /// The form of the catalog's first good record.
        expected: &'static str,
    },
    /// The symbol table does not know the part.
    #[error("`sid` level {level}: unknown code {part}")]
    UnknownCode {
        /// The level, counted from 0.
        level: usize,
        /// The part.
        part: SidPart,
    },
    /// The symbol table gives two different parts of a level the same symbol, so their items would be confused.
    #[error("`sid` level {level}: {part} and {other} mean the same symbol {symbol}")]
    AmbiguousCode {
        /// The level, counted from 0.
        level: usize,
        /// The part.
        part: SidPart,
        /// The part that had the symbol first.
        other: SidPart,
        /// The symbol.
        symbol: u32,
    },
    /// The item has too many tags.
    #[error("{got} tags, the limit is {limit}")]
    TooManyTags {
        /// Their number.
        got: usize,
        /// The limit.
        limit: usize,
    },
}

/// Where a record is, counted from 1: `line 7`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// What the source is made of.
    pub unit: RecordUnit,
    /// The number of the line, row or record.
    pub number: u64,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = match self.unit {
            RecordUnit::Line => "line",
            RecordUnit::Row => "row",
            RecordUnit::Record => "record",
        };
        write!(f, "{unit} {}", self.number)
    }
}

/// What a source of records is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecordUnit {
    /// Lines of a JSON-lines file, blank ones counted.
    Line,
    /// Rows of a Parquet file.
    Row,
    /// Elements of a sequence in memory.
    Record,
}

fn describe(listed: &[BadRecord], omitted: u64) -> String {
    use fmt::Write;

    let total = listed.len() as u64 + omitted;
    let mut text = format!("{total} bad record{}", if total == 1 { "" } else { "s" });
    for BadRecord { place, problem } in listed {
        // Writing to a String cannot fail.
        let _ = write!(text, "\n  {place}: {problem}");
    }
    if omitted > 0 {
        let _ = write!(text, "\n  and {omitted} more");
    }
    text
}
