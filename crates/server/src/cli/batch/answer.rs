//! Turns a record into its line of the output and its rows of the TREC run.

use std::sync::Arc;

use anyhow::{Context, bail};
use serde::Serialize;
use serde_json::Value;

use super::trec::{self, TrecRun};
use crate::api::{self, ErrorBody, RecommendRequest, RecommendResponse};
use crate::cli::lines::Line;
use crate::error::Error;
use crate::service::Service;

/// The parts that all records share.
pub(super) struct Answerer {
    pub(super) service: Service,
    pub(super) timings: bool,
    pub(super) trec: Option<TrecRun>,
}

/// The output of a record.
pub(super) struct Answered {
    /// A line of the answers, with its line end.
    pub(super) line: Vec<u8>,
    /// Lines of the TREC run.
    pub(super) trec: Vec<u8>,
    /// Whether the answer is an error.
    pub(super) failed: bool,
}

/// The fields of an output line.
#[derive(Serialize)]
struct OutputLine<'a> {
    line: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a Value>,
    #[serde(flatten)]
    outcome: Outcome,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Outcome {
    Answer(Value),
    Error(ErrorBody),
}

/// A record that could be parsed.
struct Asked {
    id: Option<Value>,
    request: Result<RecommendRequest, Error>,
}

impl Answerer {
    /// Answers a record. A fault of the request is in its answer; an error ends the whole batch.
    pub(super) async fn answer(self: Arc<Self>, number: u64, json: Line) -> anyhow::Result<Answered> {
        let Asked { id, request } = read(json);
        let user = request.as_ref().ok().and_then(|request| request.user_id.clone());
        let qid = match &self.trec {
            Some(_) => Some(trec::query_id(id.as_ref(), user.as_deref(), number)?),
            None => None,
        };
        let result = match request {
            Ok(request) => self.service.recommend(request, format!("line-{number}")).await,
            Err(error) => Err(error),
        };
        if let Err(error @ (Error::Unhealthy | Error::Draining | Error::Loading)) = &result {
            // That is not an answer to the request, and a later run must not take it for one.
            bail!("line {number}: {error}");
        }
        let mut rows = Vec::new();
        if let (Some(run), Some(qid), Ok(answer)) = (&self.trec, qid, &result) {
            run.write(&qid, answer, &mut rows);
        }
        let failed = result.is_err();
        let outcome = match result {
            Ok(answer) => Outcome::Answer(self.value(&answer).context("cannot write an answer")?),
            Err(error) => Outcome::Error(ErrorBody::from(&error)),
        };
        let mut line = serde_json::to_vec(&OutputLine { line: number, id: id.as_ref(), outcome })
            .context("cannot write an answer")?;
        line.push(b'\n');
        Ok(Answered { line, trec: rows, failed })
    }

    fn value(&self, answer: &RecommendResponse) -> serde_json::Result<Value> {
        let mut value = serde_json::to_value(answer)?;
        if !self.timings {
            strip(&mut value);
        }
        Ok(value)
    }
}

fn read(json: Line) -> Asked {
    let value = json.and_then(|json| api::parse::<Value>(&json));
    let mut value = match value {
        Ok(value) => value,
        Err(error) => return Asked { id: None, request: Err(error) },
    };
    let id = value.as_object_mut().and_then(|object| object.remove("id"));
    Asked { id, request: api::parse_value(value) }
}

/// Removes the fields that differ from run to run.
fn strip(answer: &mut Value) {
    if let Some(answer) = answer.as_object_mut() {
        answer.remove("request_id");
        answer.remove("timings_ms");
        if let Some(usage) = answer.get_mut("usage").and_then(Value::as_object_mut) {
            usage.remove("cached_tokens");
            usage.remove("steps");
        }
    }
}
