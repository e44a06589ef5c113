//! HSTU on the CUDA path: final states and whole requests of all variants, against the CPU in single
//! precision and against itself. The CPU is compared with the reference in tests/hstu_conformance.rs.
//! The device is the CPU unless the feature `cuda` is on and `BEAMLINE_GPU` names a graphics processor.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]
#![allow(clippy::print_stdout, reason = "figures are what docs/CUDA.md quotes")]

#[path = "common/emulated.rs"]
mod emulated;
#[path = "common/hstu.rs"]
mod hstu;
#[path = "common/hstu_fixtures.rs"]
mod hstu_fixtures;
#[path = "common/made.rs"]
#[allow(dead_code, reason = "made for decoders too")]
mod made;

use std::ops::Range;
use std::sync::Arc;

use beamline_compute::batch::ContextRows;
use beamline_compute::cpu::Cpu;
use beamline_compute::cpu::kv_format::KvFormat;
use beamline_compute::cpu::linear::WeightFormat;
use beamline_compute::cuda::device::{Device, DeviceError, Memory};
use beamline_compute::cuda::pages::DevicePages;
use beamline_compute::cuda::rows::BranchChunk;
use beamline_kv_cache::PageId;
use beamline_model::cuda::hstu::model::DeviceHstu;
use beamline_model::cuda::hstu::stack::DeviceStack;
use beamline_model::cuda::hstu::step::{Step, StepMemory};
use beamline_model::families::hstu::Hstu;
use beamline_model::families::hstu::batch::ContextOf;
use beamline_model::families::hstu::config::Variant;
use beamline_model::families::hstu::inputs::{Candidates, Prepared, Request};
use beamline_model::rows::{CandidateRows, ContextPart};
use emulated::{device, on_gpu};
use hstu::*;
use hstu_fixtures::*;
use serde_json::Value;

/// A model on the device with pages and memory, and the same on the CPU.
struct Both {
    host: Hstu,
    device: DeviceHstu,
    cpu: Arc<Cpu>,
    pages: DevicePages,
    memory: StepMemory,
}

impl Both {
    fn open(device: &Arc<dyn Device>, config: &Value, tensors: &Tensors) -> Self {
        let cpu = Arc::new(Cpu::new(2).unwrap());
        let directory = checkpoint(config, tensors);
        let checkpoint = Hstu::open(directory.path()).unwrap();
        let host = Hstu::load(&checkpoint, &cpu, WeightFormat::F32).unwrap();
        let model = DeviceHstu::load(device, &checkpoint, &cpu).unwrap();
        let pages = model.stack().pages(64).unwrap();
        Self { host, device: model, cpu, pages, memory: StepMemory::new(device).unwrap() }
    }

    /// Final states of a context on the CPU, and of its candidates.
    fn expected(&self, request: &Prepared) -> (Vec<f32>, Vec<f32>) {
        let (n, m) = (request.context_len(), request.candidates());
        let mut pages = self.host.page_store(KvFormat::F32, 64).unwrap();
        let mut runner = Runner { model: &self.host, cpu: &self.cpu, pages: &mut pages };
        let context = runner.context(request, &table(0, n), 0..n, 0, n);
        let candidates =
            if m > 0 { runner.candidates(request, &table(0, n), &table(32, m), 0..m) } else { Vec::new() };
        (context, candidates)
    }

    /// Final states of some rows of a step.
    fn run(&mut self, step: &mut Step) -> Vec<f32> {
        step.layout.finish(self.pages.pages()).unwrap();
        self.device.states(step, &self.pages, &mut self.memory).unwrap()
    }

    /// Final states of positions, computed in chunks; those below `cached` are in pages.
    fn context(
        &mut self,
        request: &Prepared,
        pages: &[PageId],
        positions: Range<usize>,
        cached: usize,
        chunk: usize,
    ) -> Vec<f32> {
        let mut states = Vec::new();
        let end = positions.end;
        for start in positions.step_by(chunk) {
            let positions = start..end.min(start + chunk);
            let wanted = positions.len();
            let mut step = Step::default();
            let rows = ContextPart { owner: 0, positions, cached, pages, wanted };
            self.device.push_context(&mut step, request, rows).unwrap();
            states.extend(self.run(&mut step));
        }
        states
    }

    fn candidates(&mut self, request: &Prepared, pages: &[PageId], candidates: Range<usize>) -> Vec<f32> {
        let mut step = Step::default();
        let branch_pages = &table(32, candidates.len());
        let rows = CandidateRows { owner: 0, candidates, context_pages: pages, branch_pages };
        assert!(self.device.push_candidates(&mut step, request, rows));
        self.run(&mut step)
    }
}

/// How far states are off, relative to the root mean square of what they should be.
#[derive(Default)]
struct Errors {
    squares: f64,
    expected: f64,
    count: usize,
    largest: f64,
}

impl Errors {
    fn add(&mut self, found: &[f32], expected: &[f32]) {
        assert_eq!(found.len(), expected.len());
        for (&found, &expected) in found.iter().zip(expected) {
            assert!(found.is_finite());
            let (expected, error) = (f64::from(expected), f64::from(found) - f64::from(expected));
            self.squares += error * error;
            self.expected += expected * expected;
            self.largest = self.largest.max(error.abs());
            self.count += 1;
        }
    }

    fn check(&self, what: &str) {
        let size = (self.expected / self.count as f64).sqrt();
        let (mean, largest) = ((self.squares / self.count as f64).sqrt() / size, self.largest / size);
        println!(
            "{what}: {} values of size {size:.3}, off by {mean:.5} of it, at most {largest:.5}",
            self.count
        );
        assert!(mean < MEAN && largest < LARGEST, "{what}: off by {mean}, at most {largest}");
    }
}

/// Every weight and every input of a product is rounded to bf16, each by 2^-9 of itself at most and half
/// of that as a root mean square. Products of few terms, as in these models, average little of it away.
/// A layer has two products, between them a norm that subtracts the mean, and there are two or three
/// layers. That is some 3 * sqrt(4 roundings) * 2^-10 for one value in the middle, and more where a norm
/// meets a row of small variance.
const MEAN: f64 = 0.02;
/// The largest of some thousand values is four to six times their root mean square.
const LARGEST: f64 = 0.12;

#[test]
fn final_states_are_the_reference_to_the_tolerance_of_bf16() {
    let Some(device) = device() else { return };
    for (folder, stages) in [("research", &[""][..]), ("research-append", &["a.", "b.", "c."][..])] {
        let file = fixture(&format!("{folder}/fp32.safetensors"));
        let mut both = Both::open(&device, &research_config(folder), &state(&file, ""));
        let mut errors = Errors::default();
        // The emulation is slow; all of them where there is a graphics processor.
        let step = if on_gpu() || stages.len() == 1 { 1 } else { 5 };
        for request in stages.iter().flat_map(|stage| requests(&file, stage)).step_by(step) {
            let prepared = both.host.prepare(request).unwrap();
            let n = prepared.context_len();
            let (expected, _) = both.expected(&prepared);
            errors.add(&both.context(&prepared, &table(0, n), 0..n, 0, n), &expected);
        }
        errors.check(folder);
    }
    for (clamp, file) in [("model_dim", "dlrm_hstu_fp32"), ("rows", "dlrm_hstu_clamp_rows_fp32")] {
        // The other file has the outputs of the same weights.
        let weights = fixture("stu/dlrm_hstu_fp32.safetensors");
        let out = fixture(&format!("stu/{file}.safetensors"));
        let mut both = Both::open(&device, &dlrm(clamp), &state(&weights, ""));
        let (mut errors, mut predictions) = (Errors::default(), Errors::default());
        let (mut first, mut candidate) = (0, 0);
        for request in ranking_requests(&weights) {
            let prepared = both.host.prepare(request).unwrap();
            let (n, m) = (prepared.context_len(), prepared.candidates());
            let mut states = both.context(&prepared, &table(0, n), 0..n, 0, n);
            states.extend(both.candidates(&prepared, &table(0, n), 0..m));
            let expected: Vec<f32> = values(&out["out.stu"]).iter().map(|&x| x as f32).collect();
            errors.add(&states, &expected[first * 12..(first + n + m) * 12]);
            let found = both.device.predict(&states[n * 12..], &prepared, 0..m).unwrap();
            let all = values(&out["out.preds"]);
            let of = |c: usize| (0..3).map(move |task| task * 9 + candidate + c);
            let expected: Vec<f32> = (0..m).flat_map(of).map(|index| all[index] as f32).collect();
            predictions.add(&found, &expected);
            first += n + m;
            candidate += m;
        }
        errors.check(&format!("dlrm, {clamp}"));
        predictions.check(&format!("predictions of dlrm, {clamp}"));
    }
}

#[test]
fn the_layers_of_the_production_variant_are_the_reference_to_the_tolerance_of_bf16() {
    let Some(device) = device() else { return };
    for case in ["plain", "notarget", "ctx", "window", "groupnorm"] {
        let file = fixture(&format!("stu/stu_{case}_fp32.safetensors"));
        let (config, tensors, targets) = stu_layers(case, &file);
        let stack = DeviceStack::load(&device, &config, Variant::Dlrm, STU_LAYERS, &tensors).unwrap();
        let pages = stack.pages(8).unwrap();
        let mut memory = StepMemory::new(&device).unwrap();
        let single = |name: &str| values(&file[name]).iter().map(|&x| x as f32).collect::<Vec<_>>();
        let (x, y, lengths) = (single("in.x"), single("out.y"), integers(&file["in.lengths"]));
        let num_targets = integers(&file["in.num_targets"]);
        let (mut first, mut errors) = (0, Errors::default());
        for (user, &len) in lengths.iter().enumerate() {
            let len = len as usize;
            let context = len - if targets { num_targets[user] as usize } else { 0 };
            let ids = vec![0; len];
            let mut step = Step::default();
            let whole = ContextOf { len: context, times: &[] };
            let chunk = ContextRows {
                owner: 0,
                tokens: &ids[..context],
                first_position: 0,
                cached: 0,
                pages: &table(0, context),
                wanted: context,
            };
            step.layout.push_context(stack.shape(), config.mask.into(), &chunk, whole);
            if context < len {
                let chunk = BranchChunk {
                    owner: 0,
                    width: len - context,
                    ancestors: 1,
                    context_len: context,
                    context_pages: &table(0, context),
                    branch_pages: &table(4, len - context),
                };
                step.layout.push_candidates(stack.shape(), &chunk, whole);
            }
            step.layout.finish(pages.pages()).unwrap();
            let none = |_| Ok::<Vec<u32>, DeviceError>(Vec::new());
            let (arrays, _) = memory.send(&*device, &step, none).unwrap();
            let own = first * 12..(first + len) * 12;
            let hidden = Memory::of(&device, &x[own.clone()]).unwrap();
            let states = stack
                .forward(&step.layout, &arrays, hidden.address(), &pages, &[], &mut memory.workspace)
                .unwrap();
            let mut found = vec![0.0_f32; len * 12];
            device.download(states, bytemuck::cast_slice_mut(&mut found)).unwrap();
            errors.add(&found, &y[own]);
            first += len;
        }
        errors.check(&format!("stu {case}"));
    }
}

/// Models with settings that the fixtures lack: NVIDIA's variant, no residual, normed parts, windows
/// with full tails, heads of several widths, odd ones, keys and values of different widths, actions.
fn made() -> Vec<(&'static str, Value)> {
    let sizes = |key, value| ResearchSizes {
        items: 50,
        most: 150,
        positions: 160,
        width: 20,
        layers: 3,
        heads: 2,
        key,
        value,
    };
    let mut full_tail = nvidia("in_out", true, "sigmoid", true);
    full_tail["stack"]["mask"]["max_attention_len"] = 20.into();
    full_tail["stack"]["mask"]["min_full_attention_len"] = 9.into();
    full_tail["stack"]["output_parts"] = "concat_normed".into();
    let mut wide = nvidia("out_in", false, "softmax", false);
    (wide["stack"]["key_dim"], wide["stack"]["value_dim"]) = (33.into(), 70.into());
    let mut contextual = dlrm("rows");
    contextual["stack"]["mask"]["contextual_len"] = 3.into();
    contextual["stack"]["output_norm"]["kind"] = "group".into();
    let mut windowed = token_head(&sizes(7, 18), "add", false);
    windowed["stack"]["relative_bias"] = Value::Null;
    windowed["stack"]["mask"]["max_attention_len"] = 37.into();
    vec![
        ("research", research(&sizes(7, 18))),
        ("actions appended", token_head(&sizes(130, 6), "concat", false)),
        ("windowed, actions added", windowed),
        ("full tail", full_tail),
        ("wide", wide),
        ("contextual", contextual),
    ]
}

/// A request for a made model, of about this number of events.
fn request(config: &Value, events: usize, seed: u64) -> Request {
    let number = |index: usize, most: u32| {
        let x = made::numbers(index + 1, seed)[index];
        (((x + 1.0) * 0.5 * most as f32) as u32).min(most - 1)
    };
    let ids = |first: usize, count: usize, most: u32| -> Vec<u32> {
        (0..count).map(|index| number(first + index, most)).collect()
    };
    let actions = ids(1000, events, 4);
    let times: Vec<i64> = (0..events).map(|event| 1_700_000_000 + (event * event * 977) as i64).collect();
    let mut request = history(&ids(0, events, 50), &actions, &times, 1_700_000_000 + 100_000_000);
    let additional = config["input"]["features"].as_array().map_or(0, |features| features.len() - 1);
    let contextual = config["input"]["contextual"].as_array().map_or(0, Vec::len);
    request.events.additional = (0..additional).map(|_| ids(2000, events, 20)).collect();
    request.contextual = (0..contextual).map(|feature| vec![number(3000 + feature, 6)]).collect();
    if config["hstu_variant"] != "research" {
        let additional = (0..additional).map(|_| ids(4000, 40, 20)).collect();
        request.candidates = Candidates { items: ids(5000, 40, 50), additional };
    }
    request
}

#[test]
fn states_are_the_cpus_to_the_tolerance_of_bf16_and_depend_on_nothing_else_of_a_step() {
    let Some(device) = device() else { return };
    for (name, config) in made() {
        let mut both = Both::open(&device, &config, &random_tensors(&config, 23));
        let whole = config["stack"]["mask"]["contextual_len"] != 0;
        let width = both.host.config().stack.model_dim;
        let mut errors = Errors::default();
        let prepared: Vec<Prepared> = [45, 1, 9]
            .iter()
            .enumerate()
            .map(|(user, &events)| both.host.prepare(request(&config, events, user as u64)).unwrap())
            .collect();
        let mut alone = Vec::new();
        for request in &prepared {
            let (n, m) = (request.context_len(), request.candidates());
            let (context, candidates) = both.expected(request);
            let found = both.context(request, &table(0, n), 0..n, 0, n);
            errors.add(&found, &context);
            let of_candidates = if m > 0 { both.candidates(request, &table(0, n), 0..m) } else { Vec::new() };
            errors.add(&of_candidates, &candidates);
            let same = |again: &[f32], first: &[f32], what: &str| {
                assert_same(again, first, &format!("{name}: {what}"))
            };
            if !whole {
                // In chunks; with what is cached of it; the last row again.
                let chunked = both.context(request, &table(8, n), 0..n, 0, 26);
                same(&chunked, &found, "in chunks");
                let cached = n / 2;
                let rest = both.context(request, &table(8, n), cached..n, cached, 23);
                same(&rest, &found[cached * width..], "behind what is cached");
                let last = both.context(request, &table(8, n), n - 1..n, n, 1);
                same(&last, &found[(n - 1) * width..], "the last row again");
            }
            if m > 0 {
                let some = both.candidates(request, &table(0, n), 7..18);
                same(&some, &of_candidates[7 * width..18 * width], "some of the candidates");
            }
            alone.push((found, of_candidates));
        }
        errors.check(name);
        // All in one step: contexts first, then candidates of the same requests.
        let mut step = Step::default();
        let places = |user: usize| (8 * user as u32, 32 + 8 * user as u32);
        for (user, request) in prepared.iter().enumerate() {
            let n = request.context_len();
            let pages = &table(places(user).0, n)[..];
            let rows = ContextPart { owner: user as u32, positions: 0..n, cached: 0, pages, wanted: n };
            both.device.push_context(&mut step, request, rows).unwrap();
        }
        for (user, request) in prepared.iter().enumerate().filter(|(_, request)| request.candidates() > 0) {
            let (n, m) = (request.context_len(), request.candidates());
            let (context_pages, branch_pages) =
                (&table(places(user).0, n)[..], &table(places(user).1, m)[..]);
            let rows = CandidateRows { owner: user as u32, candidates: 0..m, context_pages, branch_pages };
            assert!(both.device.push_candidates(&mut step, request, rows));
        }
        let together = both.run(&mut step);
        let expected = alone.iter().map(|(context, _)| context).chain(alone.iter().map(|(_, of)| of));
        let expected: Vec<f32> = expected.flatten().copied().collect();
        assert_same(&together, &expected, &format!("{name}: in company"));
    }
}

/// The same bits; on a graphics processor, whose products round by the number of rows, to its tolerance.
fn assert_same(found: &[f32], expected: &[f32], what: &str) {
    if on_gpu() {
        let mut errors = Errors::default();
        errors.add(found, expected);
        errors.check(what);
    } else {
        assert_eq!(bits(found), bits(expected), "{what}");
    }
}
