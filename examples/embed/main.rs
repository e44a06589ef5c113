//! The engine without the server: opens a checkpoint, asks for items once, and prints them.
//!
//! `cargo run --release --example embed -- DIR ITEM..`, the oldest item first.

#![allow(clippy::print_stdout, reason = "its answer goes there")]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use beamline_catalog::{Catalog, CatalogLimits, FilterSpec};
use beamline_compute::cpu::Cpu;
use beamline_compute::cpu::kv_format::KvFormat;
use beamline_compute::cpu::linear::WeightFormat;
use beamline_compute::cpu::pages::PAGE_SIZE;
use beamline_kv_cache::{CacheConfig, Namespace};
use beamline_model::convention::Convention;
use beamline_model::convention::format::Format;
use beamline_model::decode::{Normalization, SearchRequest};
use beamline_model::loaded::{self, Facts, LoadOptions};
use beamline_model::task::{Answer, Job};
use beamline_scheduler::{Engine, Priority, Request, RequestId, SchedulerConfig};

const BEAMS: usize = 50;
const MAX_CONTEXT: usize = 1024;
const PAGES: usize = 256;

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let directory = PathBuf::from(arguments.next().context("embed DIR ITEM..")?);
    for (item, score) in recommend(&directory, &arguments.collect::<Vec<_>>())?.iter().take(10) {
        println!("{score:.4}  {item}");
    }
    Ok(())
}

/// Items and log-probabilities, best first, after a history of item ids.
fn recommend(directory: &Path, history: &[String]) -> Result<Vec<(String, f64)>> {
    // What the author brought: weights, how items are written as tokens, and which items there are.
    let checkpoint = loaded::open(directory)?;
    let Facts::Tokens(facts) = checkpoint.facts() else { bail!("this model reads no tokens") };
    let format = Format::parse(&std::fs::read_to_string(directory.join("convention.json"))?)?;
    let convention = Convention::bind_to(format, checkpoint.tokenizer()?, facts.vocab_size)?;
    let catalog = directory.join("catalog.jsonl");
    let catalog = Arc::new(Catalog::read_path(&catalog, &convention, &CatalogLimits::default())?);

    // A thread that owns the model, its pages and the schedule.
    let steps = convention.steps();
    let options = LoadOptions {
        positions: MAX_CONTEXT + steps.len(),
        weight_format: WeightFormat::F32,
        kv_format: KvFormat::F32,
        pages: PAGES,
    };
    let (model, _) = checkpoint.load(&Arc::new(Cpu::new(1)?), options)?;
    let scheduler =
        SchedulerConfig { max_context: MAX_CONTEXT, max_beam_width: BEAMS, ..SchedulerConfig::default() };
    let cache = CacheConfig {
        pages: PAGES as u32,
        page_size: PAGE_SIZE as u32,
        words_per_position: 1,
        sessions: 100,
        hash_key: [0; 32], // Random where clients are not trusted.
    };
    let engine = Engine::start(model, scheduler, cache)?;

    // The prompt: the newest items that the model was trained to look at, and the start of a decoder.
    let most = convention.format().max_history_items.unwrap_or(usize::MAX);
    let known: Vec<_> = history.iter().filter_map(|id| catalog.item(id)).collect();
    let paths: Vec<Vec<u32>> = known[known.len().saturating_sub(most)..]
        .iter()
        .map(|&item| {
            let mut path = Vec::new();
            catalog.trie().path(catalog.leaf_of(item), &mut path);
            path
        })
        .collect();
    let mut context = convention.prompt(paths.iter().map(Vec::as_slice))?;
    context.extend(convention.start_token(&facts)?);
    let context: Arc<[u32]> = context.into();

    let search = SearchRequest {
        catalog: Arc::clone(&catalog),
        filter: catalog.filter(&FilterSpec::default()),
        start: catalog.trie().root(),
        steps: Arc::clone(steps),
        normalization: Normalization::FullVocab,
        normalize_over: None,
        widths: None,
    };
    let request = Request {
        id: RequestId(0), // The engine gives another.
        namespace: Namespace::new(checkpoint.digest().as_bytes(), b""),
        session: None,
        words: Arc::clone(&context),
        context_len: context.len(),
        reuse: facts.reuse,
        shape: facts.shape,
        beam_width: BEAMS.min(catalog.num_leaves()),
        beam_widths: None,
        min_beam_width: 1,
        generated_steps: steps.len(),
        keeps_branches: true,
        deadline: None,
        priority: Priority::Interactive,
        payload: Arc::new(Job::tokens(context, Some(search))),
    };
    let answer = engine.handle().submit(request)?.wait()?.answer;
    engine.drain(Duration::from_secs(1))?;
    let Some(Answer::Found(found)) = answer else { bail!("no items") };
    let items = found.hypotheses.iter().flat_map(|path| {
        catalog.items_of(path.leaf).iter().map(|&item| (catalog.item_id(item).to_owned(), path.score))
    });
    Ok(items.collect())
}
