//! The fixtures in `fixtures/hstu`: what the reference code computes, layer by layer, for the research variant in double
//! precision and for the production variant in single precision.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

#[path = "common/hstu.rs"]
mod hstu;
#[path = "common/hstu_fixtures.rs"]
mod hstu_fixtures;
#[path = "common/made.rs"]
#[allow(dead_code, reason = "made for decoders too")]
mod made;

use std::collections::HashMap;

use beamline_kv_cache::{PageId, ReuseClass};
use beamline_model::batch::{BranchRows, ContextRows};
use beamline_model::cpu::Cpu;
use beamline_model::cpu::linear::WeightFormat;
use beamline_model::cpu::mask::Viewer;
use beamline_model::cpu::pages::PAGE_SIZE;
use beamline_model::cpu::pointwise::RelativeBias;
use beamline_model::families::hstu::batch::{ContextOf, HstuBatch};
use beamline_model::families::hstu::config::Variant;
use beamline_model::families::hstu::inputs::{Prepared, Request};
use beamline_model::families::hstu::retrieval::TopItems;
use beamline_model::families::hstu::stack::{Stack, Workspace};
use beamline_model::families::hstu::{Hstu, Task};
use candle_core::Tensor;
use hstu::*;
use hstu_fixtures::*;

const RESEARCH: f64 = 2e-5;
const PRODUCTION: f64 = 3e-5;

fn rows<'a>(values: &'a [f64], width: usize, first: &mut usize, count: usize) -> &'a [f64] {
    *first += count;
    &values[(*first - count) * width..*first * width]
}

/// Checks users, scores and the best items of a stage.
fn check_retrieval(
    model: &Hstu,
    cpu: &Cpu,
    out: &HashMap<String, Tensor>,
    stage: &str,
    user: usize,
    request: &Request,
    last: &[f32],
) {
    let Task::Retrieval(retrieval) = model.task() else { panic!("a model that retrieves") };
    let of = |name: &str| values(&out[&format!("out.{stage}{name}")].get(user).unwrap());
    let mut vector = last.to_vec();
    retrieval.users(cpu, &mut vector);
    assert_close(&vector, &of("current_embeddings"), RESEARCH, "user");
    let all = |_| true;
    let items = retrieval.items().items() - 1;
    let found =
        retrieval.items().top(cpu, &vector, &[TopItems { count: items, allowed: &all }]).remove(0).unwrap();
    let mut scores = vec![0.0; items];
    for scored in &found {
        scores[scored.item as usize - 1] = scored.score;
    }
    assert_close(&scores, &of("scores"), RESEARCH, "scores");
    let unseen = |item: u32| !request.events.items.contains(&item);
    let best =
        retrieval.items().top(cpu, &vector, &[TopItems { count: 10, allowed: &unseen }]).remove(0).unwrap();
    let ids: Vec<i64> = best.iter().map(|scored| i64::from(scored.item)).collect();
    assert_eq!(ids, integers(&out[&format!("out.{stage}topk_ids_filtered")].get(user).unwrap()));
    let scores: Vec<f32> = best.iter().map(|scored| scored.score).collect();
    assert_close(&scores, &of("topk_scores_filtered"), RESEARCH, "best scores");
}

#[test]
fn the_research_variant_is_the_reference() {
    let (single, double) = (fixture("research/fp32.safetensors"), fixture("research/fp64.safetensors"));
    let config = research_config("research");
    let cpu = Cpu::new(2).unwrap();
    let model = load(&config, &state(&single, ""), &cpu, WeightFormat::F32);
    assert_eq!(model.reuse(), ReuseClass::CrossRequestMinusLast);
    let mut pages = model.page_store(2).unwrap();
    let mut first = 0;
    for (user, request) in requests(&single, "").into_iter().enumerate() {
        let prepared = model.prepare(request.clone()).unwrap();
        let (n, mut layers) = (prepared.context_len(), Vec::new());
        let mut runner = Runner { model: &model, cpu: &cpu, pages: &mut pages };
        let states =
            runner.observed(&prepared, &table(0, n), 0..n, 0, n, &mut |_, x| layers.push(x.to_vec()));
        for layer in 0..3 {
            let expected = values(&double[&format!("out.layer{layer}.jagged")]);
            assert_close(
                &layers[layer + 1],
                rows(&expected, 10, &mut first.clone(), n),
                RESEARCH,
                &format!("layer {layer}"),
            );
        }
        let Task::Retrieval(retrieval) = model.task() else { panic!("a model that retrieves") };
        let mut all = states.clone();
        retrieval.users(&cpu, &mut all);
        let expected = values(&double["out.seq_embeddings"].get(user).unwrap());
        assert_close(&all, &expected[..n * 10], RESEARCH, "outputs");
        check_retrieval(&model, &cpu, &double, "", user, &request, &states[(n - 1) * 10..]);
        first += n;
    }
}

#[test]
fn the_relative_bias_is_the_reference() {
    let fixture = fixture("research/fp32.safetensors");
    for layer in 0..3 {
        let of = |name: &str| -> Vec<f32> {
            let name = format!("state._hstu._attention_layers.{layer}._rel_attn_bias.{name}");
            fixture[&name].to_vec1().unwrap()
        };
        let bias = RelativeBias::new(&of("_pos_w"), &of("_ts_w"));
        let expected = values(&fixture[&format!("out.layer{layer}.rel_attn_bias")]);
        let times = integers(&fixture["in.timestamps"]);
        for user in 0..4 {
            for row in 0..16 {
                for column in 0..=row {
                    let time = |position: usize| times[user * 16 + position.min(15)];
                    let found = bias.of(row, column, time(row + 1) - time(column));
                    let expected = expected[(user * 16 + row) * 16 + column];
                    assert!(
                        (f64::from(found) - expected).abs() < 1e-6,
                        "layer {layer}, user {user}, {row}, {column}"
                    );
                }
            }
        }
    }
}

/// Keys and values of some positions as the pages hold them, `[position][head][dim]`.
fn check_pages(
    pages: &beamline_model::cpu::pages::PageStore,
    table: &[PageId],
    stage: &str,
    out: &HashMap<String, Tensor>,
    first: usize,
    n: usize,
    sizes: (usize, usize),
) {
    let (key, value) = sizes;
    for layer in 0..2 {
        let of = |name: &str| values(&out[&format!("out.{stage}.{name}.layer{layer}")]);
        let (keys, vals) = (of("k"), of("v"));
        for position in 0..n {
            for head in 0..2 {
                let (k, v) =
                    pages.layer(layer)[head].context_row(table[position / PAGE_SIZE], position % PAGE_SIZE);
                let at =
                    |all: &[f64], dim: usize| all[((first + position) * 2 + head) * dim..][..dim].to_vec();
                assert_close(&k, &at(&keys, key), RESEARCH, "key");
                assert_close(v, &at(&vals, value), RESEARCH, "value");
            }
        }
    }
}

#[test]
fn committed_rows_of_an_earlier_request_give_the_same_bits() {
    let (single, double) =
        (fixture("research-append/fp32.safetensors"), fixture("research-append/fp64.safetensors"));
    let config = research_config("research-append");
    let cpu = Cpu::new(2).unwrap();
    let model = load(&config, &state(&single, ""), &cpu, WeightFormat::F32);
    let mut pages = model.page_store(4).unwrap();
    let stages = ["a.", "b.", "c."].map(|stage| requests(&single, stage));
    let [first_stage, ..] = &stages;
    let mut firsts = [0; 3];
    for (user, first_request) in first_stage.iter().enumerate() {
        let mut words = Vec::new();
        for (stage, name) in ["a", "b", "c"].into_iter().enumerate() {
            let request = &stages[stage][user];
            let prepared = model.prepare(request.clone()).unwrap();
            let n = prepared.context_len();
            let (warm, cold) = (table(0, n), table(2, n));
            let mut runner = Runner { model: &model, cpu: &cpu, pages: &mut pages };
            let alone = runner.context(&prepared, &cold, 0..n, 0, n);
            check_pages(&pages, &cold, name, &double, firsts[stage], n, (5, 6));
            check_retrieval(
                &model,
                &cpu,
                &double,
                &format!("{name}."),
                user,
                request,
                &alone[(n - 1) * 16..],
            );
            let mut runner = Runner { model: &model, cpu: &cpu, pages: &mut pages };
            if stage == 0 {
                runner.context(&prepared, &warm, 0..n, 0, n);
            } else {
                // What may be taken over is also what the words of both say.
                let reused = integers(&single[&format!("reuse.committed_rows.{name}")])[user] as usize;
                let width = model.config().words_per_position();
                let before: &Prepared = &words[0];
                let equal = before
                    .words()
                    .chunks(width)
                    .zip(prepared.words().chunks(width))
                    .take_while(|(a, b)| a == b)
                    .count();
                assert_eq!(equal, reused, "user {user}, stage {name}");
                for len in [before.context_len(), n] {
                    assert!(model.reuse().reusable_positions(len) >= reused);
                }
                let found = runner.context(&prepared, &warm, reused..n, reused, n);
                assert_eq!(bits(&found), bits(&alone[reused * 16..]), "user {user}, stage {name}");
            }
            // Stages b and c both follow a.
            if stage > 0 {
                let first = model.prepare(first_request.clone()).unwrap();
                let n = first.context_len();
                Runner { model: &model, cpu: &cpu, pages: &mut pages }.context(&first, &warm, 0..n, 0, n);
            }
            words.push(prepared);
            firsts[stage] += n;
        }
    }
}

#[test]
fn the_layers_of_the_production_variant_are_the_reference() {
    let cpu = Cpu::new(2).unwrap();
    for case in ["plain", "notarget", "ctx", "window", "groupnorm"] {
        let file = fixture(&format!("stu/stu_{case}_fp32.safetensors"));
        let (config, tensors, targets) = stu_layers(case, &file);
        let stack = Stack::load(&config, Variant::Dlrm, STU_LAYERS, &tensors, WeightFormat::F32).unwrap();
        let mask = stack.mask();
        assert_eq!(
            stack.config().reuse(),
            if mask.contextual > 0 { ReuseClass::WithinRequest } else { ReuseClass::CrossRequest }
        );
        let (x, lengths) = (values(&file["in.x"]), integers(&file["in.lengths"]));
        let num_targets = integers(&file["in.num_targets"]);
        let most = integers(&file["in.max_seq_len"])[0] as usize;
        let masks = values(&file["out.mask"]);
        let mut pages = stack.page_store(4).unwrap();
        let mut first = 0;
        for (user, &len) in lengths.iter().enumerate() {
            let len = len as usize;
            let branches = if targets { num_targets[user] as usize } else { 0 };
            let context = len - branches;
            for row in 0..len {
                for column in 0..len {
                    let expected = masks[(user * most + row) * most + column] == 1.0;
                    let viewer =
                        if row < context { Viewer::Context { position: row } } else { Viewer::Branch };
                    let found =
                        if column < context { mask.sees(context, viewer, column) } else { row == column };
                    assert_eq!(found, expected, "{case}, user {user}: {row} sees {column}");
                }
            }
            let of = |range: std::ops::Range<usize>| -> Vec<f32> {
                x[(first + range.start) * 12..(first + range.end) * 12].iter().map(|&x| x as f32).collect()
            };
            let ids = vec![0; len];
            let (context_pages, branch_pages) = (table(0, context), table(2, branches));
            let mut layers: Vec<Vec<f32>> = vec![Vec::new(); 4];
            let (mut batch, mut workspace) = (HstuBatch::default(), Workspace::default());
            let whole = ContextOf { len: context, times: &[] };
            // The context alone, then the targets in two calls: some, and the last two.
            batch.embedded.extend(of(0..context));
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
            stack.forward(&cpu, &batch, &mut pages, &mut workspace, &mut |layer, x| {
                layers[layer].extend_from_slice(x)
            });
            let middle = branches.saturating_sub(2);
            let parts = [0..middle, middle..branches];
            for part in parts.into_iter().filter(|part| !part.is_empty()) {
                batch.clear();
                batch.embedded.extend(of(context + part.start..context + part.end));
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
                stack.forward(&cpu, &batch, &mut pages, &mut workspace, &mut |layer, x| {
                    layers[layer].extend_from_slice(x)
                });
            }
            for layer in 0..3 {
                let expected = values(&file[&format!("out.layer{layer}")]);
                let what = format!("{case}, user {user}, layer {layer}");
                assert_close(
                    &layers[layer + 1],
                    &expected[first * 12..(first + len) * 12],
                    PRODUCTION,
                    &what,
                );
            }
            let expected = values(&file["out.y"]);
            assert_close(&layers[3], &expected[first * 12..(first + len) * 12], PRODUCTION, case);
            first += len;
        }
    }
}

#[test]
fn the_production_variant_is_the_reference() {
    let cpu = Cpu::new(2).unwrap();
    let file = fixture("stu/dlrm_hstu_fp32.safetensors");
    for (clamp, expected) in [
        ("model_dim", fixture("stu/dlrm_hstu_fp32.safetensors")),
        ("rows", fixture("stu/dlrm_hstu_clamp_rows_fp32.safetensors")),
    ] {
        let model = load(&dlrm(clamp), &state(&file, ""), &cpu, WeightFormat::F32);
        assert_eq!(model.reuse(), ReuseClass::WithinRequest);
        let mut pages = model.page_store(4).unwrap();
        let (mut first, mut candidate) = (0, 0);
        for request in ranking_requests(&file) {
            let prepared = model.prepare(request).unwrap();
            let (n, m) = (prepared.context_len(), prepared.candidates());
            let (context, branch) = (table(0, n), table(1, m));
            let mut runner = Runner { model: &model, cpu: &cpu, pages: &mut pages };
            let mut embedded = Vec::new();
            let mut states = runner.observed(&prepared, &context, 0..n, 0, n, &mut |layer, x| {
                if layer == 0 {
                    embedded.extend_from_slice(x);
                }
            });
            states.extend(runner.candidates(&prepared, &context, &branch, 0..m));
            let of = |name: &str| values(&expected[name])[first * 12..(first + n + m) * 12].to_vec();
            assert_close(&embedded, &of("out.position")[..n * 12], PRODUCTION, "position");
            assert_close(&states, &of("out.stu"), PRODUCTION, "stu");
            let found = model.predict(&cpu, &states[n * 12..], &prepared, 0..m).unwrap();
            let all = values(&expected["out.preds"]);
            let wanted: Vec<f64> = (0..m)
                .flat_map(|c| (0..3).map(move |task| task * 9 + candidate + c))
                .map(|i| all[i])
                .collect();
            assert_close(&found, &wanted, PRODUCTION, "predictions");
            // One at a time, the same bits.
            for c in 0..m {
                let state = runner.candidates(&prepared, &context, &branch, c..c + 1);
                assert_eq!(bits(&state), bits(&states[(n + c) * 12..(n + c + 1) * 12]));
                let one = model.predict(&cpu, &state, &prepared, c..c + 1).unwrap();
                assert_eq!(bits(&one), bits(&found[c * 3..(c + 1) * 3]));
            }
            first += n + m;
            candidate += m;
        }
        let Task::Ranking(ranking) = model.task() else { panic!("a model that ranks") };
        assert_eq!(ranking.names(), ["click", "like", "watch"]);
    }
}
