//! Asks a running server for items, ranks them, and waits where the server says that it is busy.
//!
//! `cargo run --release --example client -- http://127.0.0.1:8080 ITEM..`, the oldest item first.

#![allow(clippy::print_stdout, reason = "its answers go there")]

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// Longest time for all tries of a request together.
const PATIENCE: Duration = Duration::from_secs(30);

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let server = arguments.next().context("client URL ITEM..")?;
    let history: Vec<String> = arguments.collect();

    let answer = post(&server, "/v1/recommend", &json!({"history": history, "num_items": 5}))?;
    let items = answer["items"].as_array().context("no items")?;
    for item in items {
        println!("{}  {}", item["score"], item["item_id"]);
    }

    // Candidates from elsewhere are given scores by the same model.
    let candidates: Vec<&Value> = items.iter().rev().map(|item| &item["item_id"]).collect();
    let weights = json!({"log_probability": 1.0});
    let asked = json!({"history": history, "candidates": candidates, "task_weights": weights});
    let answer = post(&server, "/v1/rank", &asked)?;
    for candidate in answer["candidates"].as_array().context("no candidates")? {
        println!("{}  {}", candidate["rank"], candidate["item_id"]);
    }
    Ok(())
}

/// Sends JSON and reads JSON. 429 and 503 say in Retry-After, in seconds, when another try makes sense.
/// Every other error is final.
fn post(server: &str, path: &str, body: &Value) -> Result<Value> {
    let end = Instant::now() + PATIENCE;
    // Reuse an agent for many requests: it keeps connections.
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .http_status_as_error(false)
        .timeout_global(Some(PATIENCE))
        .build()
        .into();
    loop {
        let mut answer = agent.post(format!("{server}{path}")).send_json(body)?;
        let status = answer.status().as_u16();
        let retry = answer.headers().get("retry-after").and_then(|value| value.to_str().ok()?.parse().ok());
        let text: Value = answer.body_mut().read_json()?;
        match (status, retry) {
            (200, _) => return Ok(text),
            (429 | 503, Some(seconds)) if Instant::now() + Duration::from_secs(seconds) < end => {
                std::thread::sleep(Duration::from_secs(seconds));
            }
            _ => bail!("{path}: {status} {}", text["error"]["message"]),
        }
    }
}
