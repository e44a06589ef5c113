//! Encoder-decoders of semantic IDs: buckets, encoder output, hidden states, logits and beams against
//! Hugging Face in double precision, with keys and values in every format. The folder is that of
//! `BEAMLINE_CONFORMANCE`.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

mod common;

use std::rc::Rc;

use beamline_compute::batch::BranchRows;
use beamline_compute::cpu::kv_format::KvFormat;
use beamline_compute::cpu::linear::WeightFormat;
use beamline_compute::cpu::pages::{PAGE_SIZE, PageStore};
use beamline_compute::cpu::relative::bias::{Direction, bucket};
use beamline_kv_cache::PageId;
use beamline_model::families::t5::batch::{T5Batch, WholeContext};
use beamline_model::families::t5::tensors::memory;
use beamline_model::families::t5::{T5, Workspace};
use common::comparing::{
    BF16_HIDDEN, BF16_LOGITS, BF16_SCORES, Beams, HIDDEN, LOGITS, SCORES, assert_close, values,
};
use common::folder;
use common::t5::{T5Case, WHOLE};

/// How close keys and values in a format come, at least.
fn tolerance(case: &T5Case, kv: KvFormat, [single, rounded]: [f64; 2], what: &str) -> f64 {
    let tolerance = folder::tolerance(single, &case.record["max_abs_difference_from_f64"][what]);
    match kv {
        KvFormat::F32 => tolerance,
        KvFormat::Bf16 => tolerance.max(rounded),
    }
}

fn in_all_formats(case: T5Case) -> impl Iterator<Item = (Rc<T5Case>, KvFormat)> {
    let case = Rc::new(case);
    KvFormat::ALL.into_iter().map(move |kv| (Rc::clone(&case), kv))
}

#[test]
fn buckets_are_those_of_transformers() {
    for case in T5Case::all() {
        let config = case.model.config();
        let column = |name: &str| case.tensors[name].to_vec1::<i64>().unwrap();
        let offsets = column("relative_offsets");
        for (name, direction) in
            [("encoder_relative_buckets", Direction::Both), ("decoder_relative_buckets", Direction::Causal)]
        {
            for (offset, expected) in offsets.iter().zip(column(name)) {
                let found = bucket(*offset, direction, config.buckets, config.max_distance);
                assert_eq!(found as i64, expected, "{} {name} of {offset}", case.name);
            }
        }
    }
}

/// One request on the model's own pages: a context from page 0 on, and branches behind it.
struct Pass<'a> {
    case: &'a T5Case,
    pages: PageStore,
    batch: T5Batch,
    workspace: Workspace,
    tokens: Vec<u32>,
    context_pages: Vec<PageId>,
}

impl<'a> Pass<'a> {
    fn new(case: &'a T5Case, kv: KvFormat, tokens: Vec<u32>) -> Self {
        let count = tokens.len().div_ceil(PAGE_SIZE) as u32;
        Self {
            case,
            pages: case.model.page_store(kv, count as usize + 1).unwrap(),
            batch: T5Batch::default(),
            workspace: Workspace::default(),
            tokens,
            context_pages: (0..count).map(PageId).collect(),
        }
    }

    fn context(&mut self, cached: bool) {
        self.batch.clear();
        let context = WholeContext { owner: 0, tokens: &self.tokens, cached, pages: &self.context_pages };
        self.batch.push_context(context).unwrap();
        self.forward();
    }

    /// The last token of a path, whose earlier ones were given before.
    fn branch(&mut self, path: &[u32]) {
        let lineage: Vec<u32> = (0..path.len() as u32).collect();
        self.batch.clear();
        let beams = BranchRows {
            owner: 0,
            tokens: &path[path.len() - 1..],
            context_len: self.tokens.len(),
            ancestors: path.len(),
            lineage: &lineage,
            context_pages: &self.context_pages,
            branch_pages: &[PageId(self.context_pages.len() as u32)],
        };
        self.batch.push_beams(beams).unwrap();
        self.forward();
    }

    fn forward(&mut self) {
        self.batch.check_writes(self.pages.pages()).unwrap();
        let T5Case { model, cpu, .. } = self.case;
        model.forward(cpu, &self.batch, &mut self.pages, &mut self.workspace, &mut || {});
    }

    fn states(&self) -> Vec<f32> {
        self.case.model.states(&self.case.cpu, self.workspace.hidden())
    }

    fn logits(&self) -> Vec<f32> {
        let mut logits = Vec::new();
        self.case.model.logits(&self.case.cpu, self.workspace.hidden(), &mut logits);
        logits
    }
}

#[test]
fn states_and_logits_are_those_of_hugging_face() {
    for (case, kv) in T5Case::all().flat_map(in_all_formats) {
        let hidden = tolerance(&case, kv, [HIDDEN, BF16_HIDDEN], "hidden.f32");
        let logits = tolerance(&case, kv, [LOGITS, BF16_LOGITS], "logits.f32");
        for name in case.prompts() {
            let what = format!("{} {name} in {kv}", case.name);
            let expected = |tensor: &str| values(&case.tensors[&format!("{name}.{tensor}")]);
            let mut pass = Pass::new(&case, kv, case.context(name));
            pass.context(false);
            // Nothing of the encoder is in pages before it is whole.
            assert_close(pass.workspace.encoded(), &expected("encoder_hidden.f32"), HIDDEN, &what);
            assert_close(&pass.states(), &expected("hidden.f64"), hidden, &what);
            assert_close(&pass.logits(), &expected("logits.f64"), logits, &what);
            let cold = pass.logits();
            pass.context(true);
            assert_eq!(pass.logits(), cold, "{what}: cached");

            // The best path, token by token through branch rows.
            let path = case.integers(&format!("{name}.best_path"));
            let expected = expected("path_logits.f64");
            let vocab = case.model.config().vocab_size;
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
    for (case, kv) in T5Case::all().flat_map(in_all_formats) {
        let beams = Beams {
            what: format!("{} in {kv}", case.name),
            record: &case.record,
            catalog: &case.catalog,
            steps: &case.steps,
            prompts: case.prompts().map(|name| (name.to_owned(), case.context(name))).collect(),
        };
        let tolerance = tolerance(&case, kv, [SCORES, BF16_SCORES], "score.f32");
        beams.check(&mut case.executor(kv, 512), WHOLE, tolerance);
    }
}

#[test]
fn the_memory_that_is_planned_holds_the_weights() {
    for case in T5Case::all() {
        for format in WeightFormat::ALL {
            let model = T5::load(&case.checkpoint, format).unwrap();
            let (planned, taken) = (memory(model.config(), format), model.weight_bytes());
            assert!(
                taken <= planned && planned <= 3 * taken,
                "{} in {format}: {taken} of {planned}",
                case.name
            );
        }
    }
}
