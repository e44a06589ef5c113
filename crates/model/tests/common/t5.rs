//! Encoder-decoders of the fixtures, and a driver that gives them their contexts whole.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "every test uses its own part")]

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use beamline_catalog::{Catalog, CatalogLimits, SidPart, SymbolTable};
use beamline_compute::cpu::Cpu;
use beamline_compute::cpu::kv_format::KvFormat;
use beamline_compute::cpu::linear::WeightFormat;
use beamline_kv_cache::PageId;
use beamline_model::checkpoint::Checkpoint;
use beamline_model::decode::{Normalization, Step};
use beamline_model::executor::Executor;
use beamline_model::executor::cpu::CpuBackend;
use beamline_model::families::t5::T5;
use beamline_model::families::t5::config::T5Config;
use beamline_model::step::{Plan, Progress, Slot, StepModel};
use beamline_model::task::{Answer, Found, Job};
use candle_core::{Device, Tensor};
use serde_json::Value;

use super::{Running, folder, job_of};

/// A number of rows so large that a context is never cut.
pub const WHOLE: usize = usize::MAX >> 1;

/// Token ids of SID parts, by the patterns of a convention and the tokens of a tokenizer.
pub struct TokenSymbols {
    patterns: Vec<String>,
    ids: HashMap<String, u32>,
}

impl TokenSymbols {
    pub fn read(directory: &Path) -> Self {
        let convention = folder::read_json(&directory.join("convention.json"));
        let tokenizer = folder::read_json(&directory.join("tokenizer.json"));
        let added = tokenizer["added_tokens"].as_array().unwrap().iter();
        let token = |token: &Value| {
            (token["content"].as_str().unwrap().to_owned(), token["id"].as_u64().unwrap() as u32)
        };
        Self {
            patterns: super::strings(&convention["level_token_patterns"]),
            ids: added.map(token).collect(),
        }
    }
}

impl SymbolTable for TokenSymbols {
    fn depth(&self) -> Option<usize> {
        Some(self.patterns.len())
    }

    fn symbol(&self, level: usize, part: &SidPart) -> Option<u32> {
        let text = match part {
            SidPart::Code(code) => self.patterns[level].replace("{}", &code.to_string()),
            SidPart::Token(text) => text.to_string(),
        };
        self.ids.get(&text).copied()
    }
}

/// A loaded encoder-decoder with what is expected of it.
pub struct T5Case {
    pub name: String,
    pub record: Value,
    pub tensors: HashMap<String, Tensor>,
    pub checkpoint: Checkpoint<T5Config>,
    pub model: Arc<T5>,
    pub cpu: Arc<Cpu>,
    pub catalog: Arc<Catalog>,
    pub steps: Arc<[Step]>,
    /// The token that the decoder starts with.
    pub start: u32,
}

impl T5Case {
    pub fn open(directory: &Path, format: WeightFormat) -> Self {
        let convention = folder::read_json(&directory.join("convention.json"));
        let checkpoint = Checkpoint::<T5Config>::open_as(directory).unwrap();
        let symbols = TokenSymbols::read(directory);
        let catalog = directory.join("catalog.jsonl");
        let levels = convention["levels"].as_u64().unwrap() as usize;
        let tail = convention["tail_tokens"].as_array().unwrap().iter();
        let tail = tail.map(|token| Step::Fixed(token["id"].as_u64().unwrap() as u32));
        Self {
            name: directory.file_name().unwrap().to_string_lossy().into_owned(),
            record: folder::read_json(&directory.join("cases.json")),
            tensors: candle_core::safetensors::load(directory.join("cases.safetensors"), &Device::Cpu)
                .unwrap(),
            model: Arc::new(T5::load(&checkpoint, format).unwrap()),
            cpu: Arc::new(Cpu::new(2).unwrap()),
            catalog: Arc::new(Catalog::read_path(&catalog, &symbols, &CatalogLimits::default()).unwrap()),
            steps: vec![Step::Level; levels].into_iter().chain(tail).collect(),
            start: convention["decoder_start_token"]["id"].as_u64().unwrap() as u32,
            checkpoint,
        }
    }

    /// All cases there are.
    pub fn all() -> impl Iterator<Item = Self> {
        folder::encoder_decoders().into_iter().map(|path| Self::open(&path, WeightFormat::F32))
    }

    /// A case of the repository's fixtures.
    pub fn of(name: &str, format: WeightFormat) -> Self {
        Self::open(&super::fixture(name), format)
    }

    pub fn integers(&self, name: &str) -> Vec<u32> {
        let ids = self.tensors[name].to_vec1::<i64>().unwrap();
        ids.into_iter().map(|id| id as u32).collect()
    }

    pub fn prompts(&self) -> impl Iterator<Item = &str> {
        self.record["prompts"].as_array().unwrap().iter().map(|prompt| prompt["name"].as_str().unwrap())
    }

    /// The context of a prompt: its ids, and the token that the decoder starts with.
    pub fn context(&self, prompt: &str) -> Vec<u32> {
        let mut tokens = self.integers(&format!("{prompt}.input_ids"));
        tokens.push(self.start);
        tokens
    }

    pub fn executor(&self, format: KvFormat, pages: usize) -> Executor<CpuBackend<T5>> {
        self.executor_on(Arc::clone(&self.cpu), format, pages)
    }

    pub fn executor_on(&self, cpu: Arc<Cpu>, format: KvFormat, pages: usize) -> Executor<CpuBackend<T5>> {
        Executor::new(Arc::clone(&self.model), cpu, format, pages).unwrap()
    }

    pub fn job(&self, tokens: Vec<u32>, exclude: &[String], normalization: Normalization) -> Job {
        job_of(&self.catalog, &self.steps, tokens, exclude, normalization)
    }
}

/// Runs requests together, contexts whole and `beams` beams of each in a step. A context whose pages are
/// given was cached.
pub fn run_all(
    executor: &mut Executor<CpuBackend<T5>>,
    requests: &[(Job, usize, Option<Vec<PageId>>)],
    beams: usize,
) -> Vec<Result<Found, String>> {
    let mut next_page = 0;
    let mut running: Vec<Running> = Vec::new();
    for (index, (job, width, _)) in requests.iter().enumerate() {
        running.push(Running::new(index as u32, job, *width, &mut next_page));
        executor.open(Slot(index as u32), job.clone());
    }
    while running.iter().any(|request| request.found.is_none() && request.failed.is_none()) {
        let (mut plan, mut outcomes) = (Plan::default(), Vec::new());
        for (request, (.., cached)) in running.iter_mut().zip(requests) {
            if request.found.is_some() || request.failed.is_some() {
                continue;
            }
            let decoding = request.decoding;
            if let Some(pages) = cached.as_ref().filter(|_| !decoding) {
                request.context_pages.clone_from(pages);
                request.done = request.context_len - 1;
            }
            request.plan(if decoding { beams } else { WHOLE }, &mut plan);
            if let (Some(chunk), false, Some(_)) = (plan.chunks.last_mut(), decoding, cached) {
                chunk.cached = request.context_len;
            }
        }
        executor.step(&plan, &mut outcomes).unwrap();
        for (slot, progress) in outcomes {
            let request = &mut running[slot.0 as usize];
            match progress {
                Progress::Finished(found) => request.found = Some(found),
                Progress::Failed(why) => request.failed = Some(why),
                Progress::Prefilled | Progress::Partly { .. } | Progress::Expanded { .. } => {}
            }
        }
    }
    running.iter().for_each(|request| executor.close(request.slot));
    let found =
        |request: Running| request.found.and_then(Answer::into_found).ok_or_else(|| request.failed.unwrap());
    running.into_iter().map(found).collect()
}
