//! The requests of a batch, one by one, with their numbers and a running digest.
//!
//! The digest covers the requests, not the file: it shows whether the answers of an interrupted run
//! belong to this input. It works for stdin, and for a file that has grown since.

use std::fs::File;
use std::io::{self, BufReader};
use std::path::Path;

use anyhow::{Context, bail};
use indicatif::ProgressBar;
use sha2::{Digest, Sha256};

use super::is_dash;
use super::parquet::Rows;
use crate::cli::lines::{Line, Lines};

/// One request of the input.
pub(super) struct Record {
    /// Number of its line or row, from 1.
    pub(super) number: u64,
    /// The JSON of the request, or why there is none.
    pub(super) json: Line,
    /// Digest of all records up to this one, including it.
    pub(super) digest: Sha256,
}

impl Record {
    /// Whether the record is blank and needs no answer.
    pub(super) fn is_blank(&self) -> bool {
        self.json.as_ref().is_ok_and(|line| line.trim_ascii().is_empty())
    }
}

/// The source of requests.
pub(super) struct Input {
    source: Source,
    number: u64,
    digest: Sha256,
}

enum Source {
    Lines(Lines),
    Rows(Rows),
}

/// The format of a file, by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Lines,
    Rows,
}

impl Kind {
    /// Finds the format. Refuses names of tables that would be read as lines of broken JSON.
    fn of(path: &Path) -> anyhow::Result<Self> {
        let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
        match extension.to_ascii_lowercase().as_str() {
            "parquet" => Ok(Self::Rows),
            table @ ("csv" | "tsv" | "inter" | "xlsx" | "arrow" | "feather" | "avro" | "gz" | "zst"
            | "zip") => bail!(
                "a batch reads JSON lines or Parquet, not .{table}. `beamline-eval prepare` makes requests of logs in .csv, \
                 .inter and other tables; of a table with one request per row, pandas makes Parquet"
            ),
            _ => Ok(Self::Lines),
        }
    }
}

impl Input {
    /// Opens a file in the format of its extension, or stdin.
    pub(super) fn open(path: &Path, limit: usize, ignore_unknown_columns: bool) -> anyhow::Result<Self> {
        let source = if is_dash(path) {
            Source::Lines(Lines::new(Box::new(BufReader::new(io::stdin())), limit))
        } else {
            let cannot = || format!("cannot read {}", path.display());
            let kind = Kind::of(path).with_context(cannot)?;
            let file = File::open(path).with_context(cannot)?;
            match kind {
                Kind::Rows => {
                    Source::Rows(Rows::open(file, limit, ignore_unknown_columns).with_context(cannot)?)
                }
                Kind::Lines => Source::Lines(Lines::new(Box::new(BufReader::new(file)), limit)),
            }
        };
        Ok(Self { source, number: 0, digest: Sha256::new() })
    }

    /// Number of records, if the file states it.
    pub(super) fn len(&self) -> Option<u64> {
        match &self.source {
            Source::Lines(_) => None,
            Source::Rows(rows) => Some(rows.len()),
        }
    }

    /// Reads the next record.
    pub(super) fn next(&mut self) -> anyhow::Result<Option<Record>> {
        let json = match &mut self.source {
            Source::Lines(lines) => lines.next().context("cannot read the input")?,
            Source::Rows(rows) => rows.next().context("cannot read the input")?,
        };
        let Some(json) = json else { return Ok(None) };
        self.number += 1;
        // Lengths are part of the digest, so that moving the end of a line changes it.
        match &json {
            Ok(json) => {
                self.digest.update((json.len() as u64).to_le_bytes());
                self.digest.update(json);
            }
            Err(error) => {
                let message = error.to_string();
                self.digest.update((!(message.len() as u64)).to_le_bytes());
                self.digest.update(message);
            }
        }
        Ok(Some(Record { number: self.number, json, digest: self.digest.clone() }))
    }

    /// Skips the first `count` records, whose digest must be `sha256`.
    pub(super) fn skip(&mut self, count: u64, sha256: &str, bar: &ProgressBar) -> anyhow::Result<()> {
        while self.number < count {
            if self.next()?.is_none() {
                bail!(
                    "the input ends after {} lines, but {count} were answered before; --restart begins anew",
                    self.number
                );
            }
        }
        bar.set_position(count);
        bar.reset_eta();
        if hex(self.digest.clone()) != sha256 {
            bail!(
                "the first {count} lines of the input have changed since they were answered; --restart begins anew"
            );
        }
        Ok(())
    }
}

/// A digest in hexadecimal.
pub(super) fn hex(digest: Sha256) -> String {
    digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_that_are_no_requests_are_refused_by_name() {
        for (name, kind) in [("a.jsonl", Kind::Lines), ("a.json", Kind::Lines), ("a", Kind::Lines)] {
            assert_eq!(Kind::of(Path::new(name)).unwrap(), kind);
        }
        assert_eq!(Kind::of(Path::new("a.PARQUET")).unwrap(), Kind::Rows);
        for name in ["a.csv", "b/a.train.inter", "A.CSV", "a.jsonl.gz"] {
            let error = Kind::of(Path::new(name)).unwrap_err().to_string();
            assert!(
                error.contains("JSON lines or Parquet") && error.contains("beamline-eval prepare"),
                "{error}"
            );
        }
    }
}
