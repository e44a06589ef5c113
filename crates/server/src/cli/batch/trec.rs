//! TREC runs: `qid Q0 docid rank score tag`, the input of trec_eval and similar tools.
//!
//! White space ends a column and the format cannot escape it, so ids that contain any are refused.
//! Encoding them would be worse: they would not match the relevance judgements, and the metrics
//! would be too low without notice.

use std::io::Write;

use beamline_catalog::{Catalog, ItemIndex};
use serde_json::Value;

use crate::api::RecommendResponse;

/// The contents of the score column.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum TrecScores {
    /// The value num_items - rank + 1, which is strictly decreasing.
    Rank,
    /// The score of each item in the answer.
    LogProbability,
}

impl TrecScores {
    /// The value's name on the command line.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Rank => "rank",
            Self::LogProbability => "log-probability",
        }
    }
}

/// Why a run cannot be written.
#[derive(Debug, PartialEq, thiserror::Error)]
pub(super) enum TrecError {
    /// The id of a request is not valid as a qid.
    #[error(
        "line {line}: {id:?} cannot be the qid of a TREC run, which holds no white space and is not empty"
    )]
    QueryId {
        /// Number of the request's line.
        line: u64,
        /// The id of the request.
        id: String,
    },
    /// The id of a request is neither a string nor a number.
    #[error("line {0}: `id` must be a string or a number to be the qid of a TREC run")]
    NoText(u64),
    /// The id of an item is not valid as a docid.
    #[error(
        "item {0:?} of the catalog cannot be a docid of a TREC run, which holds no white space; leave out --trec, or give the \
         items other ids"
    )]
    Item(String),
}

/// How a run is written: its tag and its scores.
pub(super) struct TrecRun {
    tag: String,
    scores: TrecScores,
}

impl TrecRun {
    /// A run with this tag.
    pub(super) fn new(tag: String, scores: TrecScores) -> Self {
        Self { tag, scores }
    }

    /// Tag and scores, as the manifest records them.
    pub(super) fn describe(&self) -> (&str, &'static str) {
        (&self.tag, self.scores.name())
    }

    /// Writes the items of an answer.
    pub(super) fn write(&self, qid: &str, answer: &RecommendResponse, rows: &mut Vec<u8>) {
        for item in &answer.items {
            let (id, rank, tag) = (&item.item_id, item.rank, &self.tag);
            // Writing to memory cannot fail.
            let _ = match self.scores {
                TrecScores::Rank => {
                    let score = (answer.items_requested + 1).saturating_sub(rank);
                    writeln!(rows, "{qid} Q0 {id} {rank} {score} {tag}")
                }
                TrecScores::LogProbability => writeln!(rows, "{qid} Q0 {id} {rank} {} {tag}", item.score),
            };
        }
    }
}

/// The qid of a request.
pub(super) fn query_id(id: Option<&Value>, user: Option<&str>, line: u64) -> Result<String, TrecError> {
    let qid = match (id, user) {
        (Some(Value::String(id)), _) => id.clone(),
        (Some(Value::Number(id)), _) => id.to_string(),
        (None | Some(Value::Null), Some(user)) => user.to_owned(),
        (None | Some(Value::Null), None) => line.to_string(),
        (Some(_), _) => return Err(TrecError::NoText(line)),
    };
    if is_word(&qid) { Ok(qid) } else { Err(TrecError::QueryId { line, id: qid }) }
}

/// Checks that every item can be a docid: an error now is better than one after an hour.
pub(super) fn check_catalog(catalog: &Catalog) -> Result<(), TrecError> {
    let items = u32::try_from(catalog.num_items()).unwrap_or(u32::MAX);
    match (0..items).map(|item| catalog.item_id(ItemIndex(item))).find(|id| !is_word(id)) {
        Some(id) => Err(TrecError::Item(id.to_owned())),
        None => Ok(()),
    }
}

/// Parses a tag from the command line.
pub(super) fn tag(text: &str) -> Result<String, &'static str> {
    if is_word(text) { Ok(text.to_owned()) } else { Err("must not be empty or hold white space") }
}

/// Readers split at white space as C defines it, and some of them as Unicode does.
fn is_word(text: &str) -> bool {
    !text.is_empty() && !text.contains(|c: char| c.is_whitespace() || c.is_control())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_id_comes_first_then_the_user_then_the_line() {
        assert_eq!(query_id(Some(&json!("a")), Some("u"), 3).unwrap(), "a");
        assert_eq!(query_id(Some(&json!(7)), Some("u"), 3).unwrap(), "7");
        assert_eq!(query_id(Some(&Value::Null), Some("u"), 3).unwrap(), "u");
        assert_eq!(query_id(None, None, 3).unwrap(), "3");
    }

    #[test]
    fn ids_that_would_break_the_columns_are_refused() {
        for id in ["a b", "", "a\tb", "a\u{a0}b", "a\n"] {
            assert!(matches!(query_id(Some(&json!(id)), None, 3), Err(TrecError::QueryId { line: 3, .. })));
            assert!(tag(id).is_err());
        }
        assert_eq!(query_id(Some(&json!([1])), None, 3), Err(TrecError::NoText(3)));
    }
}
