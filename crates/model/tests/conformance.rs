//! The fixtures in `fixtures/hf`: prompts, hidden states, logits and beams against Hugging Face in double precision.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

mod common;

use std::collections::BTreeMap;

use beamline_kv_cache::PageId;
use beamline_model::batch::{Batch, BranchRows, ContextRows};
use beamline_model::cpu::pages::PAGE_SIZE;
use beamline_model::decode::Normalization;
use beamline_model::families::qwen::Workspace;
use candle_core::{DType, Device, Tensor};
use common::{CASES, Loaded, cases, fixture, ids, numbers, run, strings};
use serde_json::Value;

const HIDDEN: f64 = 5e-5;
const LOGITS: f64 = 2e-4;
const SCORES: f64 = 2e-4;

fn tensors(case: &str) -> std::collections::HashMap<String, Tensor> {
    candle_core::safetensors::load(fixture(case).join("cases.safetensors"), &Device::Cpu).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f64> {
    tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn assert_close(found: &[f32], expected: &[f64], tolerance: f64, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (index, (found, expected)) in found.iter().zip(expected).enumerate() {
        let difference = (f64::from(*found) - expected).abs();
        assert!(difference <= tolerance, "{what} at {index}: {found} against {expected}");
    }
}

#[test]
fn prompts_and_tokenizer_cases_are_exact() {
    for case in CASES {
        let loaded = Loaded::open(case);
        let tensors = tensors(case);
        for prompt in cases(case)["prompts"].as_array().unwrap() {
            let name = prompt["name"].as_str().unwrap();
            let ids = loaded.prompt(&strings(&prompt["history"]));
            let expected: Vec<u32> = tensors[&format!("{name}.input_ids")]
                .to_vec1::<i64>()
                .unwrap()
                .iter()
                .map(|&id| id as u32)
                .collect();
            assert_eq!(ids, expected, "{case} {name}");
            assert_eq!(
                loaded.convention.tokenize(prompt["prompt_text"].as_str().unwrap()).unwrap(),
                expected
            );
        }
        assert!(loaded.convention.composes(), "{case}: items are added tokens");
        for text in cases(case)["tokenizer"].as_array().unwrap() {
            let special = loaded.convention.format().add_special_tokens;
            let expected = ids(&text[if special { "ids" } else { "ids_without_special_tokens" }]);
            assert_eq!(loaded.convention.tokenize(text["text"].as_str().unwrap()).unwrap(), expected);
        }
    }
}

#[test]
fn states_and_logits_are_those_of_hugging_face() {
    for case in CASES {
        let loaded = Loaded::open(case);
        let (model, tensors) = (&loaded.model, tensors(case));
        let width = model.config().hidden_size;
        let mut pages = beamline_model::cpu::pages::PageStore::new(
            model.config().layers,
            model.config().kv_heads,
            model.config().head_dim,
            model.config().head_dim,
            64,
        )
        .unwrap();
        let table: Vec<PageId> = (0..32).map(PageId).collect();
        let branch_table: Vec<PageId> = (40..41).map(PageId).collect();
        for prompt in cases(case)["prompts"].as_array().unwrap() {
            let name = prompt["name"].as_str().unwrap();
            let tokens = loaded.prompt(&strings(&prompt["history"]));
            let (mut batch, mut workspace) = (Batch::default(), Workspace::default());
            let rows = |wanted| ContextRows {
                owner: 0,
                tokens: &tokens,
                first_position: 0,
                cached: 0,
                pages: &table,
                wanted,
            };
            if name == "h2" {
                batch.push_context(rows(tokens.len()));
                let expected = values(&tensors["h2.residual.f64"]);
                let size = tokens.len() * width;
                batch.check_writes(pages.pages()).unwrap();
                model.forward(&loaded.cpu, &batch, &mut pages, &mut workspace, &mut |layer, x| {
                    assert_close(
                        x,
                        &expected[layer * size..(layer + 1) * size],
                        HIDDEN,
                        &format!("{case} layer {layer}"),
                    );
                });
                assert_close(
                    &model.states(&loaded.cpu, &workspace.hidden),
                    &values(&tensors["h2.hidden_all.f64"]),
                    HIDDEN,
                    case,
                );
            }
            batch.clear();
            batch.push_context(rows(1));
            batch.check_writes(pages.pages()).unwrap();
            model.forward(&loaded.cpu, &batch, &mut pages, &mut workspace, &mut |_, _| {});
            assert_close(
                &model.states(&loaded.cpu, &workspace.hidden),
                &values(&tensors[&format!("{name}.hidden.f64")]),
                HIDDEN,
                case,
            );
            let mut logits = Vec::new();
            model.logits(&loaded.cpu, &workspace.hidden, &mut logits);
            assert_close(&logits, &values(&tensors[&format!("{name}.logits.f64")]), LOGITS, case);

            // The best path, token by token through branch rows.
            let path: Vec<u32> = tensors[&format!("{name}.best_path")]
                .to_vec1::<i64>()
                .unwrap()
                .iter()
                .map(|&id| id as u32)
                .collect();
            let expected = values(&tensors[&format!("{name}.path_logits.f64")]);
            let vocab = model.config().vocab_size;
            for step in 1..path.len() {
                let lineage: Vec<u32> = (0..step as u32).collect();
                batch.clear();
                batch.push_branches(BranchRows {
                    owner: 0,
                    tokens: &path[step - 1..step],
                    context_len: tokens.len(),
                    ancestors: step,
                    lineage: &lineage,
                    context_pages: &table[..tokens.len().div_ceil(PAGE_SIZE)],
                    branch_pages: &branch_table,
                });
                batch.check_writes(pages.pages()).unwrap();
                model.forward(&loaded.cpu, &batch, &mut pages, &mut workspace, &mut |_, _| {});
                model.logits(&loaded.cpu, &workspace.hidden, &mut logits);
                assert_close(
                    &logits,
                    &expected[step * vocab..(step + 1) * vocab],
                    LOGITS,
                    &format!("{case} step {step}"),
                );
            }
        }
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
fn compare(found: &Expected, record: &Value, everywhere: &BTreeMap<Vec<u32>, f64>, what: &str) {
    let expected = expected(record);
    assert_eq!(found.paths.len(), expected.paths.len(), "{what}: length");
    assert!(found.scores.windows(2).all(|pair| pair[0] >= pair[1]), "{what}: sorted");
    let mut known = everywhere.clone();
    known.extend(expected.paths.iter().cloned().zip(expected.scores.iter().copied()));
    for (path, score) in found.paths.iter().zip(&found.scores) {
        if let Some(expected) = known.get(path) {
            assert!((score - expected).abs() <= SCORES, "{what}: {path:?} {score} against {expected}");
        }
    }
    let clear = |name: &str| record[name].as_f64().is_none_or(|gap| gap > 2.0 * SCORES);
    // Rows that are equal are rounded equally here, so ties at the cut are decided by the tie rule too.
    if clear("smallest_cut_gap") {
        let (mut a, mut b) = (found.paths.clone(), expected.paths.clone());
        a.sort();
        b.sort();
        assert_eq!(a, b, "{what}: set of paths");
        for (found, expected) in found.scores.iter().zip(&expected.scores) {
            assert!((found - expected).abs() <= SCORES, "{what}: rank by rank");
        }
        if clear("smallest_rank_gap") {
            assert_eq!(found.paths, expected.paths, "{what}: order");
        }
    }
}

#[test]
fn beams_are_those_of_hugging_face() {
    for case in CASES {
        let loaded = Loaded::open(case);
        let record = cases(case);
        let mut executor = loaded.executor(512);
        let prompts: BTreeMap<&str, Vec<u32>> = record["prompts"]
            .as_array()
            .unwrap()
            .iter()
            .map(|p| (p["name"].as_str().unwrap(), loaded.prompt(&strings(&p["history"]))))
            .collect();
        let filters: BTreeMap<&str, Vec<String>> = record["filters"]
            .as_array()
            .unwrap()
            .iter()
            .map(|f| (f["name"].as_str().unwrap(), strings(&f["exclude"])))
            .collect();
        let beams = record["beams"].as_array().unwrap();
        for beam in beams {
            let what = format!(
                "{case} {} {} {} {}",
                beam["prompt"], beam["normalization"], beam["beam_width"], beam["filter"]
            );
            let normalization = match beam["normalization"].as_str().unwrap() {
                "full_vocab" => Normalization::FullVocab,
                _ => Normalization::AllowedSet,
            };
            let width =
                beam["beam_width"].as_u64().map_or(loaded.catalog.num_leaves(), |width| width as usize);
            let exclude = beam["filter"].as_str().map_or(&[][..], |name| &filters[name]);
            let job = loaded.job(prompts[beam["prompt"].as_str().unwrap()].clone(), exclude, normalization);
            let filter = job.search.as_ref().unwrap().filter.clone();
            let found = run(&mut executor, job, width, 100).unwrap().hypotheses;

            // The exhaustive list of the same prompt says what any of its paths scores, filtered or not.
            let exhaustive = beams.iter().find(|other| {
                other["beam_width"] == "all"
                    && other["filter"].is_null()
                    && other["prompt"] == beam["prompt"]
                    && other["normalization"] == beam["normalization"]
            });
            let transfers = beam["filter"].is_null() || normalization == Normalization::FullVocab;
            let everywhere = exhaustive
                .filter(|_| transfers)
                .map(|record| {
                    let Expected { paths, scores } = expected(record);
                    paths.into_iter().zip(scores).collect()
                })
                .unwrap_or_default();
            let list = Expected {
                paths: found.iter().map(|h| loaded.tokens_of(h.leaf)).collect(),
                scores: found.iter().map(|h| h.score).collect(),
            };
            compare(&list, beam, &everywhere, &what);
            if list.paths == expected(beam).paths {
                for (hypothesis, items) in found.iter().zip(beam["items"].as_array().unwrap()) {
                    let found: Vec<&str> = loaded
                        .catalog
                        .items_of(hypothesis.leaf)
                        .iter()
                        .filter(|item| filter.allows_item(**item))
                        .map(|item| loaded.catalog.item_id(*item))
                        .collect();
                    assert_eq!(found, strings(items), "{what}: items");
                }
            }
        }
    }
}
