//! What the reference code of HSTU computes, layer by layer: the research variant in double precision,
//! the production variant in single precision. The folder is that of `BEAMLINE_CONFORMANCE`; all sizes
//! come from the fixture's files.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

#[path = "common/hstu.rs"]
mod hstu;
#[path = "common/hstu_fixtures.rs"]
mod hstu_fixtures;
#[path = "common/made.rs"]
#[allow(dead_code, reason = "made for decoders too")]
mod made;

use std::collections::HashMap;
use std::path::Path;

use beamline_compute::batch::{BranchRows, ContextRows};
use beamline_compute::cpu::Cpu;
use beamline_compute::cpu::kv_format::KvFormat;
use beamline_compute::cpu::linear::WeightFormat;
use beamline_compute::cpu::mask::Viewer;
use beamline_compute::cpu::pages::PAGE_SIZE;
use beamline_compute::cpu::pointwise::RelativeBias;
use beamline_kv_cache::{PageId, ReuseClass};
use beamline_model::families::hstu::batch::{ContextOf, HstuBatch};
use beamline_model::families::hstu::config::Variant;
use beamline_model::families::hstu::inputs::{Prepared, Request};
use beamline_model::families::hstu::retrieval::TopItems;
use beamline_model::families::hstu::stack::{Stack, Workspace};
use beamline_model::families::hstu::{Hstu, Task};
use candle_core::{DType, Tensor};
use hstu::*;
use hstu_fixtures::*;
use serde_json::Value;

/// Least tolerances of single precision: see [`folder::tolerance`].
const RESEARCH: f64 = 2e-5;
const PRODUCTION: f64 = 3e-5;
/// How close states come with keys and values in bfloat16, which keep 8 bits.
const BF16: f64 = 0.15;
/// How much the relative bias may be off, which is a sum of two table entries.
const BIAS: f64 = 1e-6;

/// A fixture of the research variant: its files, its sizes, and how close to it one must come.
struct Research {
    config: Value,
    single: HashMap<String, Tensor>,
    double: HashMap<String, Tensor>,
    width: usize,
    layers: usize,
    heads: usize,
    tolerance: f64,
}

impl Research {
    fn open(name: &str) -> Option<Self> {
        let folder = folder::find(name)?;
        let config = folder::read_json(&folder.join("config.json"));
        let file = |name: &str| tensors_of(&folder.join(name));
        let (single, double) = (file("fp32.safetensors"), file("fp64.safetensors"));
        let of = |name: &str| config[name].as_u64().unwrap() as usize;
        let (width, layers, heads) = (of("embedding_dim"), of("num_blocks"), of("num_heads"));
        let tolerance = folder::tolerance(RESEARCH, &largest_difference(&single, &double).into());
        Some(Self { config: research_of(&config), single, double, width, layers, heads, tolerance })
    }

    /// Pages that the longest request takes.
    fn pages(&self, stages: &[&str]) -> usize {
        let lengths =
            stages.iter().flat_map(|stage| integers(&self.single[&format!("in.{stage}past_lengths")]));
        pages_of(lengths.max().unwrap() as usize)
    }
}

/// How far the fixture's single precision is from its double precision, over all outputs.
fn largest_difference(single: &HashMap<String, Tensor>, double: &HashMap<String, Tensor>) -> f64 {
    let outputs = double.iter().filter(|(name, tensor)| {
        name.starts_with("out.") && tensor.dtype() == DType::F64 && !name.contains("div_temperature")
    });
    let differences = outputs.map(|(name, tensor)| {
        let (a, b) = (values(&single[name]), values(tensor));
        a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
    });
    differences.fold(0.0, f64::max)
}

fn pages_of(positions: usize) -> usize {
    positions.div_ceil(PAGE_SIZE)
}

/// Checks users, scores and the best items of a stage.
fn check_retrieval(
    model: &Hstu,
    cpu: &Cpu,
    fixture: &Research,
    stage: &str,
    user: usize,
    request: &Request,
    last: &[f32],
) {
    let (out, tolerance) = (&fixture.double, fixture.tolerance);
    let Task::Retrieval(retrieval) = model.task() else { panic!("a model that retrieves") };
    let of = |name: &str| values(&out[&format!("out.{stage}{name}")].get(user).unwrap());
    let mut vector = last.to_vec();
    retrieval.users(cpu, &mut vector);
    assert_close(&vector, &of("current_embeddings"), tolerance, "user");
    let all = |_| true;
    let items = retrieval.items().items() - 1;
    let found =
        retrieval.items().top(cpu, &vector, &[TopItems { count: items, allowed: &all }]).remove(0).unwrap();
    let mut scores = vec![0.0; items];
    for scored in &found {
        scores[scored.item as usize - 1] = scored.score;
    }
    assert_close(&scores, &of("scores"), tolerance, "scores");
    let unseen = |item: u32| !request.events.items.contains(&item);
    let expected = integers(&out[&format!("out.{stage}topk_ids_filtered")].get(user).unwrap());
    let wanted = TopItems { count: expected.len(), allowed: &unseen };
    let best = retrieval.items().top(cpu, &vector, &[wanted]).remove(0).unwrap();
    let ids: Vec<i64> = best.iter().map(|scored| i64::from(scored.item)).collect();
    assert_eq!(ids, expected);
    let scores: Vec<f32> = best.iter().map(|scored| scored.score).collect();
    assert_close(&scores, &of("topk_scores_filtered"), tolerance, "best scores");
}

#[test]
fn the_research_variant_is_the_reference() {
    let Some(fixture) = Research::open("hstu-research") else { return };
    let cpu = Cpu::new(2).unwrap();
    let model = load(&fixture.config, &state(&fixture.single, ""), &cpu, WeightFormat::F32);
    assert_eq!(model.reuse(), ReuseClass::CrossRequestMinusLast);
    for kv in KvFormat::ALL {
        check_research(&fixture, &model, &cpu, kv);
    }
}

fn check_research(fixture: &Research, model: &Hstu, cpu: &Cpu, kv: KvFormat) {
    let width = fixture.width;
    let tolerance = if kv == KvFormat::F32 { fixture.tolerance } else { fixture.tolerance.max(BF16) };
    let mut pages = model.page_store(kv, fixture.pages(&[""])).unwrap();
    let mut first = 0;
    for (user, request) in requests(&fixture.single, "").into_iter().enumerate() {
        let prepared = model.prepare(request.clone()).unwrap();
        let (n, mut layers) = (prepared.context_len(), Vec::new());
        let mut runner = Runner { model, cpu, pages: &mut pages };
        let states =
            runner.observed(&prepared, &table(0, n), 0..n, 0, n, &mut |_, x| layers.push(x.to_vec()));
        for layer in 0..fixture.layers {
            let expected = values(&fixture.double[&format!("out.layer{layer}.jagged")]);
            let own = &expected[first * width..(first + n) * width];
            assert_close(&layers[layer + 1], own, tolerance, &format!("layer {layer}"));
        }
        let Task::Retrieval(retrieval) = model.task() else { panic!("a model that retrieves") };
        let mut all = states.clone();
        retrieval.users(cpu, &mut all);
        let expected = values(&fixture.double["out.seq_embeddings"].get(user).unwrap());
        assert_close(&all, &expected[..n * width], tolerance, "outputs");
        // Rounded, items that score alike may change places.
        if kv == KvFormat::F32 {
            check_retrieval(model, cpu, fixture, "", user, &request, &states[(n - 1) * width..]);
        }
        first += n;
    }
}

#[test]
fn the_relative_bias_is_the_reference() {
    let Some(fixture) = Research::open("hstu-research") else { return };
    for layer in 0..fixture.layers {
        let of = |name: &str| -> Vec<f32> {
            let name = format!("state._hstu._attention_layers.{layer}._rel_attn_bias.{name}");
            fixture.single[&name].to_vec1().unwrap()
        };
        let bias = RelativeBias::new(&of("_pos_w"), &of("_ts_w"));
        let expected = &fixture.single[&format!("out.layer{layer}.rel_attn_bias")];
        let &[users, positions, _] = expected.dims() else { panic!("a bias per user, row and column") };
        let expected = values(expected);
        let times = integers(&fixture.single["in.timestamps"]);
        for (user, row) in (0..users).flat_map(|user| (0..positions).map(move |row| (user, row))) {
            for column in 0..=row {
                let time = |position: usize| times[user * positions + position.min(positions - 1)];
                let found = bias.of(row, column, time(row + 1) - time(column));
                let expected = expected[(user * positions + row) * positions + column];
                let difference = (f64::from(found) - expected).abs();
                assert!(difference < BIAS, "layer {layer}, user {user}, {row}, {column}");
            }
        }
    }
}

/// Keys and values of some positions as the pages hold them, `[position][head][dim]`.
fn check_pages(
    pages: &beamline_compute::cpu::pages::PageStore,
    table: &[PageId],
    stage: &str,
    fixture: &Research,
    first: usize,
    n: usize,
) {
    let (heads, tolerance) = (fixture.heads, fixture.tolerance);
    for layer in 0..fixture.layers {
        let of = |name: &str| values(&fixture.double[&format!("out.{stage}.{name}.layer{layer}")]);
        let (keys, vals) = (of("k"), of("v"));
        for (position, head) in (0..n).flat_map(|position| (0..heads).map(move |head| (position, head))) {
            let [k, v] = pages.context_row(layer, head, table[position / PAGE_SIZE], position % PAGE_SIZE);
            let at =
                |all: &[f64], dim: usize| all[((first + position) * heads + head) * dim..][..dim].to_vec();
            assert_close(&k, &at(&keys, k.len()), tolerance, "key");
            assert_close(&v, &at(&vals, v.len()), tolerance, "value");
        }
    }
}

#[test]
fn committed_rows_of_an_earlier_request_give_the_same_bits() {
    let Some(fixture) = Research::open("hstu-research-append") else { return };
    const STAGES: [&str; 3] = ["a", "b", "c"];
    let width = fixture.width;
    let cpu = Cpu::new(2).unwrap();
    let model = load(&fixture.config, &state(&fixture.single, ""), &cpu, WeightFormat::F32);
    let most = fixture.pages(&["a.", "b.", "c."]);
    let mut pages = model.page_store(KvFormat::F32, 2 * most).unwrap();
    let stages = STAGES.map(|stage| requests(&fixture.single, &format!("{stage}.")));
    let [first_stage, ..] = &stages;
    let mut firsts = [0; 3];
    for (user, first_request) in first_stage.iter().enumerate() {
        let before = model.prepare(first_request.clone()).unwrap();
        for (stage, name) in STAGES.into_iter().enumerate() {
            let request = &stages[stage][user];
            let prepared = model.prepare(request.clone()).unwrap();
            let n = prepared.context_len();
            let (warm, cold) = (table(0, n), table(most as u32, n));
            let mut runner = Runner { model: &model, cpu: &cpu, pages: &mut pages };
            let alone = runner.context(&prepared, &cold, 0..n, 0, n);
            check_pages(&pages, &cold, name, &fixture, firsts[stage], n);
            let last = &alone[(n - 1) * width..];
            check_retrieval(&model, &cpu, &fixture, &format!("{name}."), user, request, last);
            firsts[stage] += n;
            if stage == 0 {
                continue;
            }
            // Stages b and c both follow a: its rows are in the pages.
            let mut runner = Runner { model: &model, cpu: &cpu, pages: &mut pages };
            let len = before.context_len();
            runner.context(&before, &table(0, len), 0..len, 0, len);
            // What may be taken over is also what the words of both say.
            let reused = integers(&fixture.single[&format!("reuse.committed_rows.{name}")])[user] as usize;
            assert_eq!(equal_rows(&model, &before, &prepared), reused, "user {user}, stage {name}");
            for len in [len, n] {
                assert!(model.reuse().reusable_positions(len) >= reused);
            }
            let found = runner.context(&prepared, &warm, reused..n, reused, n);
            assert_eq!(bits(&found), bits(&alone[reused * width..]), "user {user}, stage {name}");
        }
    }
}

/// Leading positions whose words are equal.
fn equal_rows(model: &Hstu, one: &Prepared, other: &Prepared) -> usize {
    let width = model.config().words_per_position();
    let pairs = one.words().chunks(width).zip(other.words().chunks(width));
    pairs.take_while(|(a, b)| a == b).count()
}

/// The layers of one case of the production variant, and what they must give.
struct Layers {
    case: String,
    stack: Stack,
    /// Whether the last rows of a user are targets.
    targets: bool,
    file: HashMap<String, Tensor>,
    width: usize,
}

impl Layers {
    fn open(folder: &Path, config: &Value, case: &str) -> Self {
        let file = tensors_of(&folder.join(format!("stu_{case}_fp32.safetensors")));
        let (config, tensors, targets) = layers_of(config, case, &file);
        let stack = Stack::load(&config, Variant::Dlrm, STU_LAYERS, &tensors, WeightFormat::F32).unwrap();
        let width = file["in.x"].dims()[1];
        Self { case: case.to_owned(), stack, targets, file, width }
    }

    /// What each row of a user sees.
    fn check_mask(&self, user: usize, len: usize, context: usize) {
        let mask = self.stack.mask();
        let expected = self.file["out.mask"].get(user).unwrap();
        let (expected, most) = (values(&expected), expected.dims()[1]);
        for (row, column) in (0..len).flat_map(|row| (0..len).map(move |column| (row, column))) {
            let viewer = if row < context { Viewer::Context { position: row } } else { Viewer::Branch };
            let found = if column < context { mask.sees(context, viewer, column) } else { row == column };
            let what = format!("{}, user {user}: {row} sees {column}", self.case);
            assert_eq!(found, expected[row * most + column] == 1.0, "{what}");
        }
    }

    /// All layers of a user: its context alone, then the targets in two calls, some and the last two.
    fn run(&self, cpu: &Cpu, x: &[f32], len: usize, context: usize) -> Vec<Vec<f32>> {
        let (context_pages, branch_pages) =
            (table(0, context), table(pages_of(context) as u32, len - context));
        let mut pages =
            self.stack.page_store(KvFormat::F32, pages_of(context) + pages_of(len - context)).unwrap();
        let mut layers: Vec<Vec<f32>> = vec![Vec::new(); self.stack.config().layers + 1];
        let (mut batch, mut workspace) = (HstuBatch::default(), Workspace::default());
        let (ids, whole) = (vec![0; len], ContextOf { len: context, times: &[] });
        let own = |range: std::ops::Range<usize>| &x[range.start * self.width..range.end * self.width];
        batch.embedded.extend(own(0..context));
        let rows = ContextRows {
            owner: 0,
            tokens: &ids[..context],
            first_position: 0,
            cached: 0,
            pages: &context_pages,
            wanted: context,
        };
        batch.push_context(rows, whole);
        batch.layout.check_writes(pages.pages()).unwrap();
        self.stack.forward(cpu, &batch, &mut pages, &mut workspace, &mut |layer, x| {
            layers[layer].extend_from_slice(x)
        });
        let middle = (len - context).saturating_sub(2);
        for part in [0..middle, middle..len - context].into_iter().filter(|part| !part.is_empty()) {
            batch.clear();
            batch.embedded.extend(own(context + part.start..context + part.end));
            let lineage: Vec<u32> = (0..part.len() as u32).collect();
            let rows = BranchRows {
                owner: 0,
                tokens: &ids[..part.len()],
                context_len: context,
                ancestors: 1,
                lineage: &lineage,
                context_pages: &context_pages,
                branch_pages: &branch_pages,
            };
            batch.push_branches(rows, whole);
            batch.layout.check_writes(pages.pages()).unwrap();
            self.stack.forward(cpu, &batch, &mut pages, &mut workspace, &mut |layer, x| {
                layers[layer].extend_from_slice(x)
            });
        }
        layers
    }

    fn check(&self, cpu: &Cpu) {
        let mask = self.stack.mask();
        let reuse = if mask.contextual > 0 { ReuseClass::WithinRequest } else { ReuseClass::CrossRequest };
        assert_eq!(self.stack.config().reuse(), reuse);
        let x: Vec<f32> = values(&self.file["in.x"]).iter().map(|&x| x as f32).collect();
        let num_targets = integers(&self.file["in.num_targets"]);
        let mut first = 0;
        for (user, &len) in integers(&self.file["in.lengths"]).iter().enumerate() {
            let len = len as usize;
            let context = len - if self.targets { num_targets[user] as usize } else { 0 };
            self.check_mask(user, len, context);
            let own = first * self.width..(first + len) * self.width;
            let layers = self.run(cpu, &x[own.clone()], len, context);
            let outputs =
                (0..self.stack.config().layers).map(|layer| (layer + 1, format!("out.layer{layer}")));
            for (layer, name) in outputs.chain([(self.stack.config().layers, "out.y".to_owned())]) {
                let expected = values(&self.file[&name]);
                let what = format!("{}, user {user}, {name}", self.case);
                assert_close(&layers[layer], &expected[own.clone()], PRODUCTION, &what);
            }
            first += len;
        }
    }
}

#[test]
fn the_layers_of_the_production_variant_are_the_reference() {
    let Some(folder) = folder::find("hstu-stu") else { return };
    let config = folder::read_json(&folder.join("config.json"));
    let cpu = Cpu::new(2).unwrap();
    for case in config["cases"].as_object().unwrap().keys() {
        Layers::open(&folder, &config, case).check(&cpu);
    }
}

#[test]
fn the_production_variant_is_the_reference() {
    let Some(folder) = folder::find("hstu-stu") else { return };
    let config = folder::read_json(&folder.join("dlrm_config.json"));
    let cpu = Cpu::new(2).unwrap();
    let file = tensors_of(&folder.join("dlrm_hstu_fp32.safetensors"));
    let width = file["out.stu"].dims()[1];
    for (clamp, outputs) in [("model_dim", "dlrm_hstu_fp32"), ("rows", "dlrm_hstu_clamp_rows_fp32")] {
        let expected = tensors_of(&folder.join(format!("{outputs}.safetensors")));
        let model = load(&ranking_config(&config, &file, clamp), &state(&file, ""), &cpu, WeightFormat::F32);
        assert_eq!(model.reuse(), ReuseClass::WithinRequest);
        let (tasks, total) = file["out.preds"].dims2().unwrap();
        let (mut first, mut candidate) = (0, 0);
        for request in requests_of(&config, &file) {
            let prepared = model.prepare(request).unwrap();
            let (n, m) = (prepared.context_len(), prepared.candidates());
            let (context, branch) = (table(0, n), table(pages_of(n) as u32, m));
            let mut pages = model.page_store(KvFormat::F32, pages_of(n) + pages_of(m)).unwrap();
            let mut runner = Runner { model: &model, cpu: &cpu, pages: &mut pages };
            let mut embedded = Vec::new();
            let mut states = runner.observed(&prepared, &context, 0..n, 0, n, &mut |layer, x| {
                if layer == 0 {
                    embedded.extend_from_slice(x);
                }
            });
            states.extend(runner.candidates(&prepared, &context, &branch, 0..m));
            let of = |name: &str| values(&expected[name])[first * width..(first + n + m) * width].to_vec();
            assert_close(&embedded, &of("out.position")[..n * width], PRODUCTION, "position");
            assert_close(&states, &of("out.stu"), PRODUCTION, "stu");
            let found = model.predict(&cpu, &states[n * width..], &prepared, 0..m).unwrap();
            let all = values(&expected["out.preds"]);
            let wanted = (0..m).flat_map(|c| (0..tasks).map(move |task| task * total + candidate + c));
            let wanted: Vec<f64> = wanted.map(|place| all[place]).collect();
            assert_close(&found, &wanted, PRODUCTION, "predictions");
            // One at a time, the same bits.
            for c in 0..m {
                let state = runner.candidates(&prepared, &context, &branch, c..c + 1);
                assert_eq!(bits(&state), bits(&states[(n + c) * width..(n + c + 1) * width]));
                let one = model.predict(&cpu, &state, &prepared, c..c + 1).unwrap();
                assert_eq!(bits(&one), bits(&found[c * tasks..(c + 1) * tasks]));
            }
            first += n + m;
            candidate += m;
        }
        let Task::Ranking(ranking) = model.task() else { panic!("a model that ranks") };
        let names = config["tasks"].as_array().unwrap().iter().map(|task| task["name"].as_str().unwrap());
        assert_eq!(ranking.names(), names.collect::<Vec<_>>());
    }
}
