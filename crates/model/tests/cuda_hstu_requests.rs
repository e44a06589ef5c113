//! Whole requests of HSTU models on the CUDA path: retrieval, ranking and decoding through the executor.
//! They are compared with the CPU's executor in single precision, and with themselves in company. The
//! device is as in tests/cuda.rs.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

#[path = "common/emulated.rs"]
mod emulated;
#[path = "common/hstu.rs"]
mod hstu;
#[path = "common/made.rs"]
#[allow(dead_code, reason = "made for decoders too")]
mod made;
#[path = "common/running.rs"]
mod running;

use std::sync::Arc;

use beamline_catalog::{Catalog, CatalogLimits, Filter, FilterSpec, ItemRecord, SidPart, WrittenSymbols};
use beamline_compute::cpu::Cpu;
use beamline_compute::cpu::kv_format::KvFormat;
use beamline_compute::cpu::linear::WeightFormat;
use beamline_compute::cuda::device::Device;
use beamline_compute::cuda::pages::DevicePages;
use beamline_model::cuda::hstu::model::DeviceHstu;
use beamline_model::cuda::hstu::stack::DeviceStack;
use beamline_model::decode::{Normalization, SearchRequest, Step};
use beamline_model::executor::Executor;
use beamline_model::executor::cpu::CpuBackend;
use beamline_model::executor::cuda::DeviceBackend;
use beamline_model::families::hstu::Hstu;
use beamline_model::families::hstu::config::HstuConfig;
use beamline_model::families::hstu::inputs::{Candidates, Request};
use beamline_model::step::ContextShape;
use beamline_model::task::{Answer, Context, Job, Retrieve, Task};
use emulated::{device, on_gpu};
use hstu::*;
use running::{Queued, brought_back, run_together};
use serde_json::{Value, json};

/// The item whose row is so large that no state behind it is finite.
const BROKEN: u32 = 49;

/// Inner products of vectors of unit length whose directions are off by one or two parts in a hundred
/// (tests/cuda_hstu.rs).
const ITEM_SCORES: f64 = 0.04;
/// Probabilities; regressions relative to their size.
const PREDICTIONS: f64 = 0.04;
/// Sums of three log-probabilities from logits of up to ten, of states that are off as much.
const PATHS: f64 = 0.5;
/// Answers among the best that are the same. What is lost lies closer to the cut than the tolerance.
const OVERLAP: f64 = 0.85;

fn sizes() -> ResearchSizes {
    ResearchSizes { items: 60, most: 150, positions: 160, width: 20, layers: 3, heads: 2, key: 7, value: 18 }
}

fn decoding(combine: &str, tied: bool) -> Value {
    let mut config = token_head(&sizes(), combine, tied);
    config["output"]["head"]["semantic_id_levels"] = json!([
        {"first_token": 1, "codes": 16}, {"first_token": 17, "codes": 16}, {"first_token": 33, "codes": 16}
    ]);
    config
}

/// Numbers below `most`, without the broken item.
fn ids(count: usize, most: u32, seed: u64) -> Vec<u32> {
    let id = |x: f32| (((x + 1.0) * 0.5 * most as f32) as u32).min(most - 1);
    made::numbers(count, seed).into_iter().map(id).map(|id| if id == BROKEN { 1 } else { id }).collect()
}

fn request(config: &Value, events: usize, candidates: usize, seed: u64) -> Request {
    let ranks = config["hstu_variant"] != "research";
    let most = if ranks { 50 } else { 61 };
    let times: Vec<i64> = (0..events).map(|event| 1_700_000_000 + (event * event * 977) as i64).collect();
    let actions = ids(events, 4, seed + 1);
    let mut request = history(&ids(events, most, seed), &actions, &times, 1_800_000_000);
    let additional = config["input"]["features"].as_array().map_or(0, |features| features.len() - 1);
    let contextual = config["input"]["contextual"].as_array().map_or(0, Vec::len);
    request.events.additional = (0..additional).map(|_| ids(events, 20, seed + 2)).collect();
    request.contextual = (0..contextual).map(|_| ids(1, 6, seed + 3)).collect();
    if ranks {
        let additional = (0..additional).map(|_| ids(candidates, 20, seed + 4)).collect();
        request.candidates = Candidates { items: ids(candidates, 50, seed + 5), additional };
    }
    request
}

/// Items whose semantic IDs are rows or tokens of the model; the broken one is not among them.
fn catalog(config: &Value) -> Arc<Catalog> {
    let decodes = config["output"]["head"]["kind"] == "tokens";
    let record = |index: u32| {
        let sid: Vec<u32> = match decodes {
            true => vec![1 + index * 7 % 16, 17 + index * 5 % 11, 33 + index % 16],
            false => vec![index + 1],
        };
        ItemRecord {
            item_id: format!("item {index}"),
            sid: sid.into_iter().map(SidPart::Code).collect(),
            tags: Vec::new(),
            title: None,
        }
    };
    let items = if decodes { 0..300 } else { 0..60 };
    let records: Vec<ItemRecord> =
        items.map(record).filter(|record| !record.sid.contains(&SidPart::Code(BROKEN))).collect();
    Arc::new(Catalog::from_records(records, &WrittenSymbols::codes(), &CatalogLimits::default()).unwrap())
}

/// All items, all but a few, all but half, a few.
fn filters(catalog: &Catalog) -> Vec<Filter> {
    let every = |step: usize| -> Vec<String> {
        catalog.items().step_by(step).map(|item| catalog.item_id(item).to_owned()).collect()
    };
    let (few, half) = (every(9), every(2));
    [
        FilterSpec::default(),
        FilterSpec { exclude_items: &few, ..FilterSpec::default() },
        FilterSpec { exclude_items: &half, ..FilterSpec::default() },
        FilterSpec { allow_items: Some(&few), ..FilterSpec::default() },
    ]
    .iter()
    .map(|spec| catalog.filter(spec))
    .collect()
}

struct Both {
    config: HstuConfig,
    host: Executor<CpuBackend<Hstu>>,
    /// The CPU with its weights in bf16, as a measure of what that does.
    rounded: Executor<CpuBackend<Hstu>>,
    device: Executor<DeviceBackend<DeviceHstu>>,
}

impl Both {
    fn open(device: &Arc<dyn Device>, json: &Value) -> Self {
        let cpu = Arc::new(Cpu::new(2).unwrap());
        let mut tensors = random_tensors(json, 23);
        for (name, (shape, values)) in &mut tensors {
            if name.ends_with("_item_emb.weight") || name.ends_with("video.weight") {
                let start = BROKEN as usize * shape[1];
                values[start..start + shape[1]].fill(3e38);
            }
        }
        let directory = checkpoint(json, &tensors);
        let checkpoint = Hstu::open(directory.path()).unwrap();
        let host = |format| {
            let model = Arc::new(Hstu::load(&checkpoint, &cpu, format).unwrap());
            Executor::new(model, Arc::clone(&cpu), KvFormat::F32, 128).unwrap()
        };
        let model = Arc::new(DeviceHstu::load(device, &checkpoint, &cpu).unwrap());
        Self {
            config: checkpoint.config().clone(),
            host: host(WeightFormat::F32),
            rounded: host(WeightFormat::Bf16),
            device: Executor::on_device(model, 128).unwrap(),
        }
    }
}

/// A request, how many rows at a time, and how many branch rows it holds.
#[derive(Clone)]
struct Asked {
    job: Job,
    width: usize,
    branch_rows: usize,
    filter: Option<Filter>,
}

impl Asked {
    fn catalog(&self) -> Option<&Arc<Catalog>> {
        match &self.job.task {
            Task::Retrieve(wanted) => Some(&wanted.catalog),
            Task::Search(search) => Some(&search.catalog),
            Task::Score | Task::Warm => None,
        }
    }

    fn queued(&self) -> Queued<Job> {
        Queued {
            context_len: self.job.context.len(),
            payload: self.job.clone(),
            width: self.width,
            branch_rows: self.branch_rows,
        }
    }
}

/// Requests for what the model is for.
fn asked(config: &HstuConfig, json: &Value) -> Vec<Asked> {
    let decodes = json["output"]["head"]["kind"] == "tokens";
    let ranks = json["hstu_variant"] != "research";
    let prepare =
        |events, candidates, seed| Arc::new(config.prepare(request(json, events, candidates, seed)).unwrap());
    if ranks {
        // In one micro-batch, in several, and one candidate.
        let sizes = [(40, 35, 64), (9, 20, 8), (1, 1, 4)];
        let asked = sizes.into_iter().enumerate().map(|(seed, (events, candidates, width))| Asked {
            job: Job::events(prepare(events, candidates, 10 * seed as u64), Task::Score),
            width,
            branch_rows: width,
            filter: None,
        });
        return asked.collect();
    }
    let catalog = catalog(json);
    let asked = filters(&catalog).into_iter().enumerate().map(|(seed, filter)| {
        let request = prepare([40, 3, 17, 34][seed], 0, 10 * seed as u64);
        let width = [12, 9, 5, 20][seed];
        let (task, branch_rows) = match decodes {
            true => {
                let search = SearchRequest {
                    catalog: Arc::clone(&catalog),
                    filter: filter.clone(),
                    start: catalog.trie().root(),
                    steps: [Step::Level; 3].into(),
                    normalization: [Normalization::FullVocab, Normalization::AllowedSet][seed % 2],
                    normalize_over: None,
                    widths: None,
                };
                (Task::Search(Arc::new(search)), 2 * width)
            }
            false => {
                let (catalog, filter) = (Arc::clone(&catalog), filter.clone());
                (Task::Retrieve(Arc::new(Retrieve { count: width, catalog, filter })), 0)
            }
        };
        let width = if decodes { width } else { 1 };
        Asked { job: Job::events(request, task), width, branch_rows, filter: Some(filter) }
    });
    asked.collect()
}

/// Scores by what they are of, best first.
fn scored(answer: &Answer, catalog: Option<&Catalog>) -> Vec<(u32, f64)> {
    match answer {
        Answer::Items(items) => {
            let leaf = |item: u32| {
                let trie = catalog.unwrap().trie();
                trie.leaf(trie.walk(&[item]).unwrap()).unwrap().0
            };
            items.iter().map(|scored| (leaf(scored.item), f64::from(scored.score))).collect()
        }
        Answer::Found(found) => found.hypotheses.iter().map(|h| (h.leaf.0, h.score)).collect(),
        Answer::Predictions(all) => {
            all.iter().enumerate().map(|(index, &x)| (index as u32, f64::from(x))).collect()
        }
    }
}

fn models() -> Vec<(&'static str, Value, f64)> {
    let mut windowed = decoding("add", false);
    windowed["stack"]["relative_bias"] = Value::Null;
    windowed["stack"]["mask"]["max_attention_len"] = 21.into();
    let mut plain = research(&sizes());
    plain["output"]["normalization"] = json!({"kind": "layer_norm", "eps": 1e-6});
    let mut contextual = dlrm("rows");
    contextual["stack"]["mask"]["contextual_len"] = 3.into();
    vec![
        ("retrieval", research(&sizes()), ITEM_SCORES),
        // States are longer than items here: by the root of their width.
        ("retrieval of normed states", plain, 5.0 * ITEM_SCORES),
        ("decoding", decoding("concat", false), PATHS),
        ("decoding in a window", windowed, PATHS),
        ("ranking of nvidia", nvidia("in_out", true, "sigmoid", true), PREDICTIONS),
        ("ranking of classes", nvidia("out_in", false, "softmax", false), PREDICTIONS),
        ("ranking of dlrm", dlrm("rows"), PREDICTIONS),
        ("ranking with contextual rows", contextual, PREDICTIONS),
    ]
}

#[test]
fn answers_are_the_cpus_to_the_tolerance_of_bf16_and_the_same_in_company() {
    let Some(device) = device() else { return };
    for (name, json, tolerance) in models() {
        let mut both = Both::open(&device, &json);
        let asked = asked(&both.config, &json);
        let catalog = asked[0].catalog().cloned();
        let (mut kept, mut all, mut squares, mut largest, mut rounded) = (0, 0, 0.0, 0.0_f64, 0.0_f64);
        let mut alone = Vec::new();
        for (index, asked) in asked.iter().enumerate() {
            let what = format!("{name}, request {index}");
            let expected = run_together(&mut both.host, vec![asked.queued()], 1000).remove(0).unwrap();
            let found = run_together(&mut both.device, vec![asked.queued()], 1000).remove(0).unwrap();
            let (expected, scores) =
                (scored(&expected, catalog.as_deref()), scored(&found, catalog.as_deref()));
            assert_eq!(scores.len(), expected.len(), "{what}");
            if let Some(filter) = &asked.filter {
                let forbidden =
                    scores.iter().filter(|(leaf, _)| !filter.allows_leaf(beamline_catalog::Leaf(*leaf)));
                assert_eq!(forbidden.count(), 0, "{what}: forbidden items");
                assert!(scores.windows(2).all(|pair| pair[0].1 >= pair[1].1), "{what}: sorted");
            }
            // A regression may be larger than one.
            let size = |expected: f64| if asked.filter.is_none() { expected.abs().max(1.0) } else { 1.0 };
            let errors = |scores: &[(u32, f64)]| -> Vec<f64> {
                let error = |(of, score): &(u32, f64)| {
                    let (_, expected) = expected.iter().find(|(other, _)| other == of)?;
                    Some((score - expected).abs() / size(*expected))
                };
                scores.iter().filter_map(error).collect()
            };
            for error in errors(&scores) {
                (squares, largest, kept) = (squares + error * error, largest.max(error), kept + 1);
            }
            let of_cpu = run_together(&mut both.rounded, vec![asked.queued()], 1000).remove(0).unwrap();
            rounded = errors(&scored(&of_cpu, catalog.as_deref())).into_iter().fold(rounded, f64::max);
            all += expected.len();
            if expected.len() < 2 || expected[0].1 - expected[1].1 > 2.0 * tolerance {
                assert_eq!(scores[0].0, expected[0].0, "{what}: the best");
            }
            alone.push(found);
        }
        let mean = (squares / f64::from(kept)).sqrt();
        println!(
            "{name}: {kept} of {all} are the same, off by {mean:.4} (root mean square), at most {largest:.4}, the CPU in bf16 {rounded:.4}"
        );
        assert!(f64::from(kept) >= OVERLAP * all as f64, "{name}: {kept} of {all} are the same");
        // Networks of made weights may enlarge rounding errors. Then the CPU in bf16 says by how much.
        assert!(
            largest < tolerance.max(2.0 * rounded),
            "{name}: off by {largest}, the CPU in bf16 by {rounded}"
        );
        // In company, in chunks: the same bits, except on a graphics processor, whose products round by
        // the number of rows.
        let queued = || asked.iter().map(Asked::queued).collect();
        if both.config.context_shape() == ContextShape::Whole {
            let cut = run_together(&mut both.device, queued(), 13);
            // A scheduler never cuts such a context. If one did, the request would fail, and nobody else.
            for (asked, found) in asked.iter().zip(&cut).filter(|(asked, _)| asked.job.context.len() > 13) {
                let what = asked.job.context.len();
                assert!(found.as_ref().is_err_and(|why| why.contains("in parts")), "{name}: {what} rows");
            }
        }
        let sizes: &[usize] = match both.config.context_shape() {
            ContextShape::Causal => &[1000, 13],
            ContextShape::Whole => &[1000],
        };
        for &rows in sizes {
            let together = run_together(&mut both.device, queued(), rows);
            for (index, (found, alone)) in together.into_iter().zip(&alone).enumerate() {
                let (found, what) = (found.unwrap(), format!("{name}, request {index}, chunks of {rows}"));
                if on_gpu() {
                    let [found, alone] = [&found, alone].map(|answer| scored(answer, catalog.as_deref()));
                    let same = found.iter().filter(|(of, _)| alone.iter().any(|(other, _)| other == of));
                    assert!(same.count() as f64 >= OVERLAP * alone.len() as f64, "{what}");
                } else {
                    assert_eq!(found, *alone, "{what}");
                }
            }
        }
    }
}

#[test]
fn a_context_that_was_moved_away_and_back_changes_no_bit() {
    let Some(device) = device() else { return };
    let models = [research(&sizes()), decoding("concat", false), nvidia("in_out", true, "sigmoid", true)];
    for json in models {
        let mut both = Both::open(&device, &json);
        let stack = &both.config.stack;
        let widths = DeviceStack::check(stack).unwrap();
        let page_bytes = DevicePages::bytes_per_page(stack.layers, stack.heads, widths);
        let asked = asked(&both.config, &json);
        let (visit, other) = (&asked[0], &asked[asked.len() - 2]);
        let cold = run_together(&mut both.device, vec![visit.queued()], 1000).remove(0).unwrap();
        let words: Vec<u32> = (0..visit.queued().context_len as u32).collect();
        let visits = [visit, visit, other].map(Asked::queued);
        let warm = brought_back(&mut both.device, page_bytes, visits, [&words, &words]);
        if on_gpu() {
            // Products of fewer rows may round otherwise.
            let [warm, cold] =
                [&warm, &cold].map(|answer| scored(answer, visit.catalog().map(|catalog| &**catalog)));
            let same = warm.iter().filter(|(of, _)| cold.iter().any(|(other, _)| other == of));
            assert!(same.count() as f64 >= OVERLAP * cold.len() as f64);
        } else {
            assert_eq!(warm, cold);
        }
    }
}

#[test]
fn a_request_whose_states_are_not_finite_fails_alone() {
    let Some(device) = device() else { return };
    let models = [research(&sizes()), decoding("add", false), nvidia("in_out", true, "sigmoid", true)];
    for json in models {
        let mut both = Both::open(&device, &json);
        let mut asked = asked(&both.config, &json);
        let mut alone = Vec::new();
        for asked in [&asked[0], &asked[1]] {
            alone.push(run_together(&mut both.device, vec![asked.queued()], 1000).remove(0).unwrap());
        }
        // Between the two stands a request that equals the second in all items except one.
        let mut broken = asked[1].clone();
        let mut request = request(&json, 6, 20, 4);
        match json["hstu_variant"] == "research" {
            true => request.events.items[2] = BROKEN,
            false => request.candidates.items[13] = BROKEN,
        }
        broken.job.context = Context::Events(Arc::new(both.config.prepare(request).unwrap()));
        asked.insert(1, broken);
        asked.truncate(3);
        for executor in [true, false] {
            let queued = asked.iter().map(Asked::queued).collect();
            let found = match executor {
                true => run_together(&mut both.device, queued, 1000),
                false => run_together(&mut both.host, queued, 1000),
            };
            assert!(found[1].is_err(), "the broken one");
            if executor && !on_gpu() {
                assert_eq!([found[0].as_ref(), found[2].as_ref()], [Ok(&alone[0]), Ok(&alone[1])]);
            } else {
                assert!(found[0].is_ok() && found[2].is_ok());
            }
            if executor {
                println!("{}", found[1].as_ref().unwrap_err());
            }
        }
    }
}

#[test]
fn what_the_device_cannot_do_fails_with_a_word() {
    let Some(device) = device() else { return };
    let json = research(&sizes());
    let mut both = Both::open(&device, &json);
    let mut asked = asked(&both.config, &json).remove(0);
    // More than there are is all there are.
    let Task::Retrieve(wanted) = &mut asked.job.task else { panic!("a model that retrieves") };
    Arc::make_mut(wanted).count = 1000;
    let found = run_together(&mut both.device, vec![asked.queued()], 1000).remove(0).unwrap();
    assert!(matches!(&found, Answer::Items(items) if items.len() == 59));
    // Work of another kind.
    asked.job.task = Task::Score;
    let why = run_together(&mut both.device, vec![asked.queued()], 1000).remove(0).unwrap_err();
    assert_eq!(why, "the model scores no candidates");
    // What it does not read.
    let mut asked = self::asked(&both.config, &json).remove(0);
    asked.job.context = Context::Tokens([1, 2, 3].into());
    let why = run_together(&mut both.device, vec![asked.queued()], 1000).remove(0).unwrap_err();
    assert_eq!(why, "this model reads events, not tokens");
    let mut asked = self::asked(&both.config, &json).remove(0);
    asked.job.task = Task::Warm;
    let good = self::asked(&both.config, &json).remove(1);
    let alone = run_together(&mut both.device, vec![good.queued()], 1000).remove(0);
    let mut found = run_together(&mut both.device, vec![asked.queued(), good.queued()], 1000);
    let good = found.pop().unwrap();
    assert!(good.is_ok() && (on_gpu() || good == alone), "what fails has no rows among those of others");
    assert!(found[0].is_err());
    // A head that is too wide for the kernels.
    let mut wide = research(&sizes());
    wide["stack"]["key_dim"] = 300.into();
    let directory = checkpoint(&wide, &random_tensors(&wide, 1));
    let checkpoint = Hstu::open(directory.path()).unwrap();
    let error = DeviceHstu::load(&device, &checkpoint, &Arc::new(Cpu::new(1).unwrap())).unwrap_err();
    assert!(error.to_string().contains("key_dim and value_dim are [300, 18], more than 256"), "{error}");
}
