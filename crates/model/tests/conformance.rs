//! Decoders of semantic IDs: prompts, hidden states, logits and beams against Hugging Face in double
//! precision, with keys and values in every format. The folder is that of `BEAMLINE_CONFORMANCE`.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

mod common;

use std::collections::HashMap;
use std::rc::Rc;

use beamline_compute::batch::{Batch, BranchRows, ContextRows};
use beamline_compute::cpu::kv_format::KvFormat;
use beamline_compute::cpu::linear::WeightFormat;
use beamline_compute::cpu::pages::{PAGE_SIZE, PageStore};
use beamline_kv_cache::PageId;
use beamline_model::families::decoder::{Workspace, page_shape};
use candle_core::{Device, Tensor};
use common::comparing::{
    BF16_HIDDEN, BF16_LOGITS, BF16_SCORES, Beams, HIDDEN, LOGITS, SCORES, assert_close, values,
};
use common::{Loaded, folder, ids, strings};
use serde_json::Value;

/// A checkpoint with what is expected of it.
struct Case {
    name: String,
    loaded: Loaded,
    record: Value,
    tensors: HashMap<String, Tensor>,
}

impl Case {
    fn all() -> impl Iterator<Item = Self> {
        folder::decoders().into_iter().map(|path| Self {
            name: path.file_name().unwrap().to_string_lossy().into_owned(),
            loaded: Loaded::open_at(&path, WeightFormat::F32),
            record: folder::read_json(&path.join("cases.json")),
            tensors: candle_core::safetensors::load(path.join("cases.safetensors"), &Device::Cpu).unwrap(),
        })
    }

    /// How close keys and values in a format come, at least.
    fn tolerance(&self, kv: KvFormat, [single, rounded]: [f64; 2], what: &str) -> f64 {
        let tolerance = folder::tolerance(single, &self.record["max_abs_difference_from_f64"][what]);
        match kv {
            KvFormat::F32 => tolerance,
            KvFormat::Bf16 => tolerance.max(rounded),
        }
    }

    fn prompts(&self) -> &[Value] {
        self.record["prompts"].as_array().unwrap()
    }

    fn integers(&self, name: &str) -> Vec<u32> {
        let ids = self.tensors[name].to_vec1::<i64>().unwrap();
        ids.into_iter().map(|id| id as u32).collect()
    }
}

fn in_all_formats(case: Case) -> impl Iterator<Item = (Rc<Case>, KvFormat)> {
    let case = Rc::new(case);
    KvFormat::ALL.into_iter().map(move |kv| (Rc::clone(&case), kv))
}

#[test]
fn prompts_and_tokenizer_cases_are_exact() {
    for case in Case::all() {
        let (name, loaded) = (&case.name, &case.loaded);
        for prompt in case.prompts() {
            let prompt_name = prompt["name"].as_str().unwrap();
            let ids = loaded.prompt(&strings(&prompt["history"]));
            let expected = case.integers(&format!("{prompt_name}.input_ids"));
            assert_eq!(ids, expected, "{name} {prompt_name}");
            let text = prompt["prompt_text"].as_str().unwrap();
            assert_eq!(loaded.convention.tokenize(text).unwrap(), expected);
        }
        assert!(loaded.convention.composes(), "{name}: items are added tokens");
        for text in case.record["tokenizer"].as_array().unwrap() {
            let special = loaded.convention.format().add_special_tokens;
            let expected = ids(&text[if special { "ids" } else { "ids_without_special_tokens" }]);
            assert_eq!(loaded.convention.tokenize(text["text"].as_str().unwrap()).unwrap(), expected);
        }
    }
}

/// One request on the model's own pages: a context from page 0 on, and branches behind it.
struct Pass<'a> {
    loaded: &'a Loaded,
    pages: PageStore,
    batch: Batch,
    workspace: Workspace,
    tokens: &'a [u32],
    context_pages: Vec<PageId>,
}

impl<'a> Pass<'a> {
    fn new(loaded: &'a Loaded, kv: KvFormat, tokens: &'a [u32]) -> Self {
        let count = tokens.len().div_ceil(PAGE_SIZE) as u32;
        let pages = PageStore::new(page_shape(loaded.model.config(), kv), count as usize + 1).unwrap();
        let context_pages = (0..count).map(PageId).collect();
        Self {
            loaded,
            pages,
            batch: Batch::default(),
            workspace: Workspace::default(),
            tokens,
            context_pages,
        }
    }

    /// The whole context; states of its last `wanted` positions.
    fn context(&mut self, wanted: usize, observe: &mut dyn FnMut(usize, &[f32])) {
        self.batch.clear();
        self.batch.push_context(ContextRows {
            owner: 0,
            tokens: self.tokens,
            first_position: 0,
            cached: 0,
            pages: &self.context_pages,
            wanted,
        });
        self.forward(observe);
    }

    /// The last token of a path, whose earlier ones were given before.
    fn branch(&mut self, path: &[u32]) {
        let lineage: Vec<u32> = (0..path.len() as u32).collect();
        self.batch.clear();
        self.batch.push_branches(BranchRows {
            owner: 0,
            tokens: &path[path.len() - 1..],
            context_len: self.tokens.len(),
            ancestors: path.len(),
            lineage: &lineage,
            context_pages: &self.context_pages,
            branch_pages: &[PageId(self.context_pages.len() as u32)],
        });
        self.forward(&mut |_, _| {});
    }

    fn forward(&mut self, observe: &mut dyn FnMut(usize, &[f32])) {
        self.batch.check_writes(self.pages.pages()).unwrap();
        let (model, cpu) = (&self.loaded.model, &self.loaded.cpu);
        model.forward(cpu, &self.batch, &mut self.pages, &mut self.workspace, observe);
    }

    fn states(&self) -> Vec<f32> {
        self.loaded.model.states(&self.loaded.cpu, &self.workspace.hidden)
    }

    fn logits(&self) -> Vec<f32> {
        let mut logits = Vec::new();
        self.loaded.model.logits(&self.loaded.cpu, &self.workspace.hidden, &mut logits);
        logits
    }
}

#[test]
fn states_and_logits_are_those_of_hugging_face() {
    for (case, kv) in Case::all().flat_map(in_all_formats) {
        let hidden = case.tolerance(kv, [HIDDEN, BF16_HIDDEN], "hidden.f32");
        let logits = case.tolerance(kv, [LOGITS, BF16_LOGITS], "logits.f32");
        for prompt in case.prompts() {
            let name = prompt["name"].as_str().unwrap();
            let what = format!("{} {name} in {kv}", case.name);
            let tokens = case.loaded.prompt(&strings(&prompt["history"]));
            let mut pass = Pass::new(&case.loaded, kv, &tokens);
            if let Some(expected) = case.tensors.get(&format!("{name}.residual.f64")) {
                let (expected, size) =
                    (values(expected), tokens.len() * case.loaded.model.config().hidden_size);
                pass.context(tokens.len(), &mut |layer, x| {
                    let own = &expected[layer * size..(layer + 1) * size];
                    assert_close(x, own, hidden, &format!("{what} layer {layer}"));
                });
                assert_close(
                    &pass.states(),
                    &values(&case.tensors[&format!("{name}.hidden_all.f64")]),
                    hidden,
                    &what,
                );
            }
            pass.context(1, &mut |_, _| {});
            assert_close(
                &pass.states(),
                &values(&case.tensors[&format!("{name}.hidden.f64")]),
                hidden,
                &what,
            );
            assert_close(
                &pass.logits(),
                &values(&case.tensors[&format!("{name}.logits.f64")]),
                logits,
                &what,
            );

            // The best path, token by token through branch rows.
            let path = case.integers(&format!("{name}.best_path"));
            let expected = values(&case.tensors[&format!("{name}.path_logits.f64")]);
            let vocab = case.loaded.model.config().vocab_size;
            for step in 1..path.len() {
                pass.branch(&path[..step]);
                let own = &expected[step * vocab..(step + 1) * vocab];
                assert_close(&pass.logits(), own, logits, &format!("{what} step {step}"));
            }
        }
    }
}

#[test]
fn beams_are_those_of_hugging_face() {
    for (case, kv) in Case::all().flat_map(in_all_formats) {
        let Case { name, loaded, record, .. } = &*case;
        let tolerance = case.tolerance(kv, [SCORES, BF16_SCORES], "score.f32");
        let prompt =
            |p: &Value| (p["name"].as_str().unwrap().to_owned(), loaded.prompt(&strings(&p["history"])));
        let beams = Beams {
            what: format!("{name} in {kv}"),
            record,
            catalog: &loaded.catalog,
            steps: loaded.convention.steps(),
            prompts: case.prompts().iter().map(prompt).collect(),
        };
        let mut executor = loaded.executor_in(kv, 512);
        beams.check(&mut executor, 100, tolerance);
    }
}
