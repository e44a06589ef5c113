//! What the tests share: fixtures, and the smallest possible driver of a step model.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "every test uses its own part")]

pub mod comparing;
pub mod folder;
pub mod running;
pub mod t5;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use beamline_catalog::{Catalog, CatalogLimits, FilterSpec, Leaf, Node};
use beamline_compute::cpu::Cpu;
use beamline_compute::cpu::kv_format::KvFormat;
use beamline_compute::cpu::linear::WeightFormat;
use beamline_model::checkpoint::Checkpoint;
use beamline_model::convention::Convention;
use beamline_model::convention::format::Format;
use beamline_model::decode::{Normalization, SearchRequest, Step};
use beamline_model::executor::Executor;
use beamline_model::executor::cpu::CpuBackend;
use beamline_model::families::decoder::Decoder;
use beamline_model::step::StepModel;
use beamline_model::task::{Answer, Found, Job};
pub use running::{Queued, run_together};

use serde_json::Value;

pub const CASES: [&str; 5] =
    ["qwen3-untied", "qwen3-tied-bf16-sharded", "qwen2-minionerec", "llama-lcrec", "qwen3-collisions"];

/// A decoder of the repository's fixtures.
pub fn fixture(name: &str) -> PathBuf {
    folder::repository().join("hf").join(name)
}

pub fn cases(name: &str) -> Value {
    folder::read_json(&fixture(name).join("cases.json"))
}

/// A loaded fixture.
pub struct Loaded {
    pub checkpoint: Checkpoint,
    pub convention: Arc<Convention>,
    pub catalog: Arc<Catalog>,
    pub model: Arc<Decoder>,
    pub cpu: Arc<Cpu>,
}

impl Loaded {
    pub fn open(name: &str) -> Self {
        Self::open_in(name, WeightFormat::F32)
    }

    pub fn open_in(name: &str, weights: WeightFormat) -> Self {
        Self::open_at(&fixture(name), weights)
    }

    pub fn open_at(directory: &Path, weights: WeightFormat) -> Self {
        let checkpoint = Checkpoint::open(directory).unwrap();
        let format =
            Format::parse(&std::fs::read_to_string(directory.join("convention.json")).unwrap()).unwrap();
        let convention = Convention::bind(format, directory, checkpoint.config().vocab_size).unwrap();
        let catalog =
            Catalog::read_path(&directory.join("catalog.jsonl"), &convention, &CatalogLimits::default())
                .unwrap();
        let model = Arc::new(Decoder::load(&checkpoint, 2048, weights).unwrap());
        let cpu = Arc::new(Cpu::new(2).unwrap());
        Self { checkpoint, convention: Arc::new(convention), catalog: Arc::new(catalog), model, cpu }
    }

    pub fn executor(&self, pages: usize) -> Executor<CpuBackend<Decoder>> {
        self.executor_in(KvFormat::F32, pages)
    }

    pub fn executor_in(&self, format: KvFormat, pages: usize) -> Executor<CpuBackend<Decoder>> {
        Executor::new(Arc::clone(&self.model), Arc::clone(&self.cpu), format, pages).unwrap()
    }

    pub fn prompt(&self, history: &[String]) -> Vec<u32> {
        let trie = self.catalog.trie();
        let items: Vec<Vec<u32>> = history
            .iter()
            .map(|id| {
                let leaf = self.catalog.leaf_of(self.catalog.item(id).unwrap());
                let mut path = Vec::new();
                trie.path(leaf, &mut path);
                path
            })
            .collect();
        self.convention.prompt(items.iter().map(Vec::as_slice)).unwrap()
    }

    pub fn job(&self, tokens: Vec<u32>, exclude: &[String], normalization: Normalization) -> Job {
        job_of(&self.catalog, self.convention.steps(), tokens, exclude, normalization)
    }

    /// All tokens of a path: what the steps of the convention generate on the way to a node.
    pub fn tokens_of(&self, leaf: Leaf) -> Vec<u32> {
        tokens_of(&self.catalog, self.convention.steps(), leaf)
    }

    pub fn root(&self) -> Node {
        self.catalog.trie().root()
    }
}

/// A search over a whole catalog, except some items.
pub fn job_of(
    catalog: &Arc<Catalog>,
    steps: &Arc<[Step]>,
    tokens: Vec<u32>,
    exclude: &[String],
    normalization: Normalization,
) -> Job {
    let search = SearchRequest {
        catalog: Arc::clone(catalog),
        filter: catalog.filter(&FilterSpec { exclude_items: exclude, ..FilterSpec::default() }),
        start: catalog.trie().root(),
        steps: Arc::clone(steps),
        normalize_over: None,
        widths: None,
        normalization,
    };
    Job::tokens(tokens.into(), Some(search))
}

/// All tokens that some steps generate on the way to a leaf.
pub fn tokens_of(catalog: &Catalog, steps: &[Step], leaf: Leaf) -> Vec<u32> {
    let mut path = Vec::new();
    catalog.trie().path(leaf, &mut path);
    let mut levels = path.into_iter();
    let token = |step: &Step| match step {
        Step::Level => levels.next().unwrap(),
        Step::Fixed(token) | Step::Given(token) => *token,
    };
    steps.iter().map(token).collect()
}

/// Runs one request to its end, in chunks of `rows` rows.
pub fn run(
    executor: &mut impl StepModel<Payload = Job, Answer = Answer>,
    job: Job,
    width: usize,
    rows: usize,
) -> Result<Found, String> {
    let answer = run_together(executor, vec![Queued::of(job, width)], rows).remove(0)?;
    Ok(answer.into_found().unwrap())
}

pub fn strings(value: &Value) -> Vec<String> {
    value.as_array().unwrap().iter().map(|item| item.as_str().unwrap().to_owned()).collect()
}

pub fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|item| item.as_f64().unwrap()).collect()
}

pub fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|item| item.as_u64().unwrap() as u32).collect()
}

/// A request of a decoder on its way.
pub type Running = running::Running<Answer>;

impl Running {
    pub fn new(slot: u32, job: &Job, width: usize, next_page: &mut u32) -> Self {
        Self::of(slot, &Queued::of(job.clone(), width), next_page)
    }
}

impl Queued<Job> {
    /// A job of a decoder.
    pub fn of(job: Job, width: usize) -> Self {
        let steps = job.search().map_or(0, |search| search.steps.len());
        let branch_rows = width * steps.saturating_sub(1);
        Self { context_len: job.context.len(), width, branch_rows, payload: job }
    }
}
