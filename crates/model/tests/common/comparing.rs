//! Comparing what a model computes with the records of the fixtures: see their README.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "every test uses its own part")]

use std::collections::BTreeMap;
use std::sync::Arc;

use beamline_catalog::Catalog;
use beamline_model::decode::{Normalization, Step};
use beamline_model::step::StepModel;
use beamline_model::task::{Answer, Found, Job};
use candle_core::{DType, Tensor};
use serde_json::Value;

use super::{ids, job_of, numbers, run, strings, tokens_of};

/// Least tolerances of single precision: see [`folder::tolerance`](super::folder::tolerance).
pub const HIDDEN: f64 = 5e-5;
pub const LOGITS: f64 = 2e-4;
pub const SCORES: f64 = 2e-4;
/// Tolerances with keys and values in bfloat16, which keep 8 bits. They come from the repository's
/// fixtures, where at most four fifths of each is used.
pub const BF16_HIDDEN: f64 = 0.05;
pub const BF16_LOGITS: f64 = 0.25;
pub const BF16_SCORES: f64 = 0.15;
/// An unlikely path adds up larger errors: its score may differ by this part of it.
const BF16_PART: f64 = 0.005;

pub fn values(tensor: &Tensor) -> Vec<f64> {
    tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

pub fn assert_close(found: &[f32], expected: &[f64], tolerance: f64, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (index, (found, expected)) in found.iter().zip(expected).enumerate() {
        let difference = (f64::from(*found) - expected).abs();
        assert!(difference <= tolerance, "{what} at {index}: {found} against {expected}");
    }
}

/// One list of expected paths with its scores.
struct Expected {
    paths: Vec<Vec<u32>>,
    scores: Vec<f64>,
}

fn expected(record: &Value) -> Expected {
    Expected {
        paths: record["tokens"].as_array().unwrap().iter().map(ids).collect(),
        scores: numbers(&record["scores"]),
    }
}

/// Compares a list with a record by the rule of the fixtures: see their README.
fn compare(
    found: &Expected,
    record: &Value,
    everywhere: &BTreeMap<Vec<u32>, f64>,
    tolerance: f64,
    what: &str,
) {
    let expected = expected(record);
    let part = if tolerance >= BF16_SCORES { BF16_PART } else { 0.0 };
    let within = |score: f64| tolerance.max(part * score.abs());
    assert_eq!(found.paths.len(), expected.paths.len(), "{what}: length");
    assert!(found.scores.windows(2).all(|pair| pair[0] >= pair[1]), "{what}: sorted");
    let mut known = everywhere.clone();
    known.extend(expected.paths.iter().cloned().zip(expected.scores.iter().copied()));
    for (path, score) in found.paths.iter().zip(&found.scores) {
        if let Some(expected) = known.get(path) {
            assert!(
                (score - expected).abs() <= within(*expected),
                "{what}: {path:?} {score} against {expected}"
            );
        }
    }
    let widest = expected.scores.last().map_or(tolerance, |score| within(*score));
    let clear = |name: &str| record[name].as_f64().is_none_or(|gap| gap > 2.0 * widest);
    // Rows that are equal are rounded equally here, so the tie rule decides ties at the cut too. The
    // gaps beside a tie are not on record, and bfloat16 may close them.
    let tied = tolerance >= BF16_SCORES && record["tie_at_cut"] == true;
    if clear("smallest_cut_gap") && !tied {
        let (mut a, mut b) = (found.paths.clone(), expected.paths.clone());
        a.sort();
        b.sort();
        assert_eq!(a, b, "{what}: set of paths");
        for (found, expected) in found.scores.iter().zip(&expected.scores) {
            assert!((found - expected).abs() <= within(*expected), "{what}: rank by rank");
        }
        if clear("smallest_rank_gap") {
            assert_eq!(found.paths, expected.paths, "{what}: order");
        }
    }
}

/// The beams of a case, and what they are asked of.
pub struct Beams<'a> {
    /// How messages call it.
    pub what: String,
    pub record: &'a Value,
    pub catalog: &'a Arc<Catalog>,
    pub steps: &'a Arc<[Step]>,
    /// Tokens of the contexts by the names of their prompts.
    pub prompts: BTreeMap<String, Vec<u32>>,
}

impl Beams<'_> {
    /// Compares the lists of an executor with all records, in chunks of `rows` rows.
    pub fn check(
        &self,
        executor: &mut impl StepModel<Payload = Job, Answer = Answer>,
        rows: usize,
        tolerance: f64,
    ) {
        let filters: BTreeMap<&str, Vec<String>> = self.record["filters"]
            .as_array()
            .unwrap()
            .iter()
            .map(|f| (f["name"].as_str().unwrap(), strings(&f["exclude"])))
            .collect();
        for beam in self.record["beams"].as_array().unwrap() {
            let what = format!(
                "{} {} {} {} {}",
                self.what, beam["prompt"], beam["normalization"], beam["beam_width"], beam["filter"]
            );
            let normalization = match beam["normalization"].as_str().unwrap() {
                "full_vocab" => Normalization::FullVocab,
                _ => Normalization::AllowedSet,
            };
            let width = beam["beam_width"].as_u64().map_or(self.catalog.num_leaves(), |width| width as usize);
            let exclude = beam["filter"].as_str().map_or(&[][..], |name| &filters[name]);
            let tokens = self.prompts[beam["prompt"].as_str().unwrap()].clone();
            let job = job_of(self.catalog, self.steps, tokens, exclude, normalization);
            let found = run(executor, job.clone(), width, rows).unwrap();
            self.compare(&found, &job, beam, tolerance, &what);
        }
    }

    fn compare(&self, found: &Found, job: &Job, beam: &Value, tolerance: f64, what: &str) {
        let found = &found.hypotheses;
        let list = Expected {
            paths: found.iter().map(|h| tokens_of(self.catalog, self.steps, h.leaf)).collect(),
            scores: found.iter().map(|h| h.score).collect(),
        };
        compare(&list, beam, &self.everywhere(beam), tolerance, what);
        if list.paths != expected(beam).paths {
            return;
        }
        let filter = &job.search().unwrap().filter;
        for (hypothesis, items) in found.iter().zip(beam["items"].as_array().unwrap()) {
            let found: Vec<&str> = self
                .catalog
                .items_of(hypothesis.leaf)
                .iter()
                .filter(|item| filter.allows_item(**item))
                .map(|item| self.catalog.item_id(*item))
                .collect();
            assert_eq!(found, strings(items), "{what}: items");
        }
    }

    /// What the exhaustive list of the same prompt says that any of its paths scores, filtered or not.
    fn everywhere(&self, beam: &Value) -> BTreeMap<Vec<u32>, f64> {
        let exhaustive = self.record["beams"].as_array().unwrap().iter().find(|other| {
            other["beam_width"] == "all"
                && other["filter"].is_null()
                && other["prompt"] == beam["prompt"]
                && other["normalization"] == beam["normalization"]
        });
        let transfers = beam["filter"].is_null() || beam["normalization"] == "full_vocab";
        let list = exhaustive.filter(|_| transfers).map(|record| {
            let Expected { paths, scores } = expected(record);
            paths.into_iter().zip(scores).collect()
        });
        list.unwrap_or_default()
    }
}
