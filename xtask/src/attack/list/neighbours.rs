//! Neighbours that take much: what is left for others.

use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::attack::arena::Arena;
use crate::attack::bystanders::Bystanders;
use crate::attack::outcome::Outcome;
use crate::attack::server::Server;
use crate::attack::wire;

/// Items of a long history.
const LONG: usize = 1300;
const GREEDY: usize = 64;

/// One client that asks for as much as it may, again and again.
pub(super) fn heavy(arena: &Arena) -> Result<Outcome> {
    let request = heavy_request(&arena.checkpoint, "heavy")?;
    beside(arena, &wire::post("/v1/recommend", &request), 1)
}

/// Many clients of one tenant, none of them large.
pub(super) fn greedy(arena: &Arena) -> Result<Outcome> {
    let history = history(&arena.checkpoint, 60)?;
    let request = format!(r#"{{"tenant":"greedy","history":{history},"num_items":10,"beam_width":128}}"#);
    beside(arena, &wire::post("/v1/recommend", &request), GREEDY)
}

/// The polite client alone, and then beside others.
fn beside(arena: &Arena, request: &str, clients: usize) -> Result<Outcome> {
    let server = arena.serve(&[])?;
    let alone = Bystanders::watch(&server);
    std::thread::sleep(arena.time / 2);
    let alone = alone.stop().polite.quantile(0.99);
    let (over, done) = (AtomicBool::new(false), AtomicUsize::new(0));
    let bystanders = Bystanders::watch(&server);
    let request = request.replacen("host: x", "host: x\r\nconnection: close", 1);
    std::thread::scope(|scope| {
        for _ in 0..clients {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    done.fetch_add(usize::from(ask(&server, &request)), Ordering::Relaxed);
                }
            });
        }
        std::thread::sleep(arena.time);
        over.store(true, Ordering::Relaxed);
    });
    let witness = bystanders.stop();
    let beside = witness.polite.quantile(0.99);
    Ok(Outcome {
        happened: format!(
            "{} answers for the neighbour; P99 of the polite client {:.0} ms alone, {:.0} ms beside it",
            done.into_inner(),
            alone.as_secs_f64() * 1e3,
            beside.as_secs_f64() * 1e3
        ),
        witness: Some(witness),
        ..Outcome::default()
    })
}

/// Whether a request was answered with 200.
fn ask(server: &Server, request: &str) -> bool {
    let answer = wire::connect(server.address).and_then(|mut stream| {
        stream.write_all(request.as_bytes())?;
        Ok(wire::read_all(&mut stream, Duration::from_secs(15)))
    });
    answer.is_ok_and(|answer| wire::status(&answer) == 200)
}

/// A request that takes long: a history of many items and the widest beam.
pub(super) fn heavy_request(checkpoint: &Path, tenant: &str) -> Result<String> {
    let history = history(checkpoint, LONG)?;
    Ok(format!(r#"{{"tenant":"{tenant}","history":{history},"num_items":10,"beam_width":512}}"#))
}

/// A history of this number of items of the catalog.
pub(super) fn history(checkpoint: &Path, items: usize) -> Result<Value> {
    let text = std::fs::read_to_string(checkpoint.join("catalog.jsonl"))?;
    let ids: Vec<Value> = text
        .lines()
        .take(items)
        .map(|line| Ok(serde_json::from_str::<Value>(line)?["item_id"].clone()))
        .collect::<Result<_>>()?;
    let first = ids.first().context("the catalog is empty")?;
    let all = ids.iter().chain(std::iter::repeat(first)).take(items);
    Ok(all.map(|id| json!({"item_id": id, "action": "view"})).collect())
}
