//! A client of the server: one connection that is kept open, and what an answer told.
//!
//! It shares the cores with the server, so it does as little as it can while a request is on its way;
//! answers are read into numbers afterwards.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::Deserialize;

/// Largest answer that is read.
const MAX_ANSWER: u64 = 16 << 20;

/// One keep-alive connection.
#[derive(Debug)]
pub(super) struct Client {
    agent: ureq::Agent,
    recommend: String,
}

impl Client {
    /// `server` is an address such as `http://127.0.0.1:8080`.
    pub(super) fn new(server: &str) -> Self {
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(Duration::from_secs(120)))
            .build();
        Self { agent: ureq::Agent::new_with_config(config), recommend: format!("{server}/v1/recommend") }
    }

    /// Sends one request and waits for its answer.
    ///
    /// # Errors
    ///
    /// When there was no answer at all; a refusal is an answer.
    pub(super) fn recommend(&self, body: &[u8]) -> Result<Reply> {
        let started = Instant::now();
        let mut response = self
            .agent
            .post(&self.recommend)
            .header("content-type", "application/json")
            .send(body)
            .context("no answer")?;
        let status = response.status().as_u16();
        let body = response.body_mut().with_config().limit(MAX_ANSWER).read_to_vec()?;
        Ok(Reply { status, body, elapsed: started.elapsed() })
    }
}

/// An answer as it came.
#[derive(Debug)]
pub(super) struct Reply {
    pub(super) status: u16,
    pub(super) body: Vec<u8>,
    /// From before the request was written until the answer was read.
    pub(super) elapsed: Duration,
}

impl Reply {
    /// Reads what the answer told. An answer that is neither a slate nor a typed error is an error here.
    pub(super) fn read(&self) -> Result<Answer> {
        let text = || String::from_utf8_lossy(&self.body[..self.body.len().min(300)]).into_owned();
        if self.status == 200 {
            return serde_json::from_slice(&self.body).map(Answer::Slate).with_context(text);
        }
        let refusal: Refusal = serde_json::from_slice(&self.body)
            .with_context(|| format!("status {} without a typed error: {}", self.status, text()))?;
        Ok(Answer::Refused(refusal.error.kind))
    }
}

/// What an answer told.
#[derive(Debug)]
pub(super) enum Answer {
    Slate(Slate),
    /// The type of the error.
    Refused(String),
}

/// The parts of a slate that are looked at.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Slate {
    pub(super) items: Vec<Item>,
    pub(super) usage: Usage,
    pub(super) timings_ms: Timings,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
pub(super) struct Item {
    pub(super) item_id: String,
    pub(super) score: f64,
}

#[derive(Clone, Copy, Debug, Deserialize)]
pub(super) struct Usage {
    pub(super) context_tokens: u64,
    pub(super) cached_tokens: u64,
}

/// Milliseconds inside the server.
#[derive(Clone, Copy, Debug, Deserialize)]
pub(super) struct Timings {
    pub(super) queue: f64,
    pub(super) prefill: f64,
    pub(super) decode: f64,
    pub(super) total: f64,
}

#[derive(Deserialize)]
struct Refusal {
    error: RefusalBody,
}

#[derive(Deserialize)]
struct RefusalBody {
    #[serde(rename = "type")]
    kind: String,
}
