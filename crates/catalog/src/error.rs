//! Why a catalog was refused.
//!
//! Faults of single records are collected, so that all of them can be fixed in one go. Faults of
//! the file as a whole end the reading at once. A refused catalog leaves nothing behind.

use std::fmt;
use std::io;
use std::path::PathBuf;

use crate::SidPart;

/// Why a catalog could not be built.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CatalogError {
    /// The file could not be opened or read.
    #[error("cannot read the catalog {}: {source}", path.display())]
    Io {
        /// Path of the catalog file.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
    /// The file name has no known extension.
    #[error(
        "{}: not a known catalog format. Name the file .jsonl (an object per line), .parquet, or .json (one object from \
         item id to list of codes). Write a CSV table as .parquet, or as an object per line", .0.display()
    )]
    UnknownFormat(PathBuf),
    /// The text is encoded in UTF-16; holds the path of the file.
    #[error("{}this is UTF-16 text; save it as UTF-8", named(.0))]
    Utf16(PathBuf),
    /// The file of items and codes is not a JSON object.
    #[error("{}: {message}", path.display())]
    Index {
        /// Path of the catalog file.
        path: PathBuf,
        /// What is wrong with the object.
        message: String,
    },
    /// The Parquet file is damaged or uses an unsupported feature.
    #[error("{}: cannot decode Parquet after {rows_read} rows: {message}", path.display())]
    Parquet {
        /// Path of the catalog file.
        path: PathBuf,
        /// Number of rows that were read before the fault.
        rows_read: u64,
        /// The message of the decoder.
        message: String,
    },
    /// The Parquet file lacks a required column.
    #[error("{}: no column `{column}`", path.display())]
    MissingColumn {
        /// Path of the catalog file.
        path: PathBuf,
        /// Name of the missing column.
        column: &'static str,
    },
    /// Some records are bad. Lists the first ones and counts the rest.
    #[error("{}", describe(listed, *omitted))]
    BadRecords {
        /// The first bad records in file order, at most
        /// [`max_listed_problems`](crate::CatalogLimits::max_listed_problems).
        listed: Vec<BadRecord>,
        /// Number of bad records that are not listed.
        omitted: u64,
    },
    /// The catalog has more items than the limit.
    #[error("{place}: more than {limit} items, the limit of a catalog")]
    TooManyItems {
        /// Place of the first item over the limit.
        place: Place,
        /// Most items that a catalog may have.
        limit: u32,
    },
    /// The catalog has no items.
    #[error("the catalog has no items")]
    Empty,
}

/// A record that cannot be an item of the catalog.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadRecord {
    /// Place of the record in its source.
    pub place: Place,
    /// What is wrong with the record.
    pub problem: RecordProblem,
    /// Number of records with the very same problem that are not listed.
    pub alike: u64,
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
        /// Most bytes that a line may have.
        limit: usize,
    },
    /// A required field is absent or null.
    #[error("field `{0}` is missing")]
    MissingField(&'static str),
    /// The item id is of a type that an id cannot have.
    #[error("`item_id`: {got}")]
    BadItemId {
        /// The type that was found.
        got: String,
    },
    /// A field holds a value of the wrong type.
    #[error("field `{field}` must be {expected}, got {got}")]
    WrongType {
        /// Name of the field.
        field: &'static str,
        /// The type that the field should hold.
        expected: &'static str,
        /// The type that was found.
        got: String,
    },
    /// The item id is the empty string.
    #[error("`item_id` is empty")]
    EmptyItemId,
    /// A text exceeds its limit.
    #[error("`{field}` is {bytes} bytes long, the limit is {limit}")]
    TextTooLong {
        /// Name of the field.
        field: &'static str,
        /// Length of the text, in bytes.
        bytes: usize,
        /// Most bytes that the text may have.
        limit: usize,
    },
    /// The item id was used before.
    #[error("`item_id` {item_id:?} is already used by {first}")]
    DuplicateItemId {
        /// The repeated item id.
        item_id: String,
        /// Place where the id was used first.
        first: Place,
    },
    /// The SID has no parts.
    #[error("`sid` is empty")]
    EmptySid,
    /// The SID has more parts than any catalog may have.
    #[error("`sid` has {got} levels, the limit is {limit}")]
    SidTooDeep {
        /// The SID's number of parts.
        got: usize,
        /// Most parts that a SID may have.
        limit: u8,
    },
    /// The SID and the catalog differ in their number of parts.
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
        /// The part in the wrong form.
        part: SidPart,
        /// The form of the catalog's first good record.
        expected: &'static str,
    },
    /// The symbol table does not know the part.
    #[error("`sid` level {level}: unknown code {part}{}", advise(advice))]
    UnknownCode {
        /// The level, counted from 0.
        level: usize,
        /// The part that is not known.
        part: SidPart,
        /// What to write instead, if the symbol table can tell.
        advice: Option<String>,
    },
    /// The symbol table gives two different parts of a level the same symbol, so their items would
    /// be confused.
    #[error("`sid` level {level}: {part} and {other} mean the same symbol {symbol}")]
    AmbiguousCode {
        /// The level, counted from 0.
        level: usize,
        /// The part whose symbol is taken.
        part: SidPart,
        /// The part that had the symbol first.
        other: SidPart,
        /// The symbol that both parts have.
        symbol: u32,
    },
    /// The item has too many tags.
    #[error("{got} tags, the limit is {limit}")]
    TooManyTags {
        /// The item's number of tags.
        got: usize,
        /// Most tags that an item may have.
        limit: usize,
    },
}

/// The place of a record, counted from 1: `line 7`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The unit that `number` counts.
    pub unit: RecordUnit,
    /// Number of the line, row or record, counted from 1.
    pub number: u64,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.unit.name(), self.number)
    }
}

/// The units of a source of records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecordUnit {
    /// Lines of a JSON-lines file, blank ones counted.
    Line,
    /// Rows of a Parquet file.
    Row,
    /// Elements of a sequence in memory, or entries of an object.
    Record,
}

impl RecordUnit {
    fn name(self) -> &'static str {
        match self {
            Self::Line => "line",
            Self::Row => "row",
            Self::Record => "record",
        }
    }
}

/// How many places of the same problem a message names.
const NAMED: usize = 5;

/// Describes all problems, each once, with the places where it was found.
fn describe(listed: &[BadRecord], omitted: u64) -> String {
    use fmt::Write;

    let alike: u64 = listed.iter().map(|bad| bad.alike).sum();
    let total = listed.len() as u64 + alike + omitted;
    let mut text = format!("{total} bad record{}", if total == 1 { "" } else { "s" });
    let mut groups: Vec<(&RecordProblem, Vec<Place>, u64)> = Vec::new();
    for BadRecord { place, problem, alike } in listed {
        match groups.iter_mut().find(|(known, ..)| *known == problem) {
            Some((_, places, more)) => {
                places.push(*place);
                *more += alike;
            }
            None => groups.push((problem, vec![*place], *alike)),
        }
    }
    for (problem, places, more) in groups {
        // Writing to a String cannot fail.
        let _ = write!(text, "\n  {}: {problem}", describe_places(&places, more));
    }
    if omitted > 0 {
        let _ = write!(text, "\n  and {omitted} more with other problems");
    }
    text
}

/// `line 7`, or `lines 7, 8, 9, 10, 11 and 195 more`.
fn describe_places(places: &[Place], more: u64) -> String {
    let [first, rest @ ..] = places else { return String::new() };
    if rest.is_empty() && more == 0 {
        return first.to_string();
    }
    let numbers: Vec<String> = places.iter().take(NAMED).map(|place| place.number.to_string()).collect();
    let unnamed = places.len().saturating_sub(NAMED) as u64 + more;
    let unit = first.unit.name();
    match unnamed {
        0 => format!("{unit}s {}", numbers.join(", ")),
        _ => format!("{unit}s {} and {unnamed} more", numbers.join(", ")),
    }
}

fn advise(advice: &Option<String>) -> String {
    advice.as_ref().map(|advice| format!("; {advice}")).unwrap_or_default()
}

/// A path as the beginning of a message; empty for a text from memory.
fn named(path: &std::path::Path) -> String {
    if path.as_os_str().is_empty() { String::new() } else { format!("{}: ", path.display()) }
}
