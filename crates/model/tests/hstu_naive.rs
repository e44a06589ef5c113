//! Cases without a fixture, against the equations in double precision: NVIDIA's variant, and the token
//! head with its branches.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

#[path = "common/hstu.rs"]
mod hstu;
#[path = "common/hstu_naive.rs"]
mod hstu_naive;
#[path = "common/made.rs"]
#[allow(dead_code, reason = "made for decoders too")]
mod made;

use beamline_compute::cpu::Cpu;
use beamline_compute::cpu::kv_format::KvFormat;
use beamline_compute::cpu::linear::WeightFormat;
use beamline_kv_cache::ReuseClass;
use beamline_model::families::hstu::Task;
use beamline_model::families::hstu::inputs::{Candidates, Request};
use beamline_model::rows::BeamRows;
use hstu::*;
use hstu_naive::{Naive, Row, l2, layer_norm, sigmoid};

/// How close states and predictions come, with keys and values in a format; bfloat16 keeps 8 bits.
fn tolerance(kv: KvFormat) -> f64 {
    match kv {
        KvFormat::F32 => 2e-5,
        KvFormat::Bf16 => 0.03,
    }
}

fn pick(seed: &mut u64, below: usize) -> usize {
    *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*seed >> 33) as usize % below
}

fn picks(seed: &mut u64, count: usize, below: usize) -> Vec<u32> {
    (0..count).map(|_| pick(seed, below) as u32).collect()
}

#[test]
fn the_nvidia_variant_is_its_equations() {
    KvFormat::ALL.into_iter().for_each(check_nvidia);
}

fn check_nvidia(kv: KvFormat) {
    let cpu = Cpu::new(2).unwrap();
    let variants = [
        ("in_out", true, "sigmoid", true),
        ("out_in", false, "sigmoid", true),
        ("in_out", false, "softmax", false),
    ];
    for (layout, affine, prediction, residual) in variants {
        let config = nvidia(layout, affine, prediction, residual);
        let tensors = random_tensors(&config, 7);
        let model = load(&config, &tensors, &cpu, WeightFormat::F32);
        assert_eq!(model.reuse(), ReuseClass::CrossRequest);
        let naive = Naive { config: &config, tensors: &tensors };
        let mut pages = model.page_store(kv, 16).unwrap();
        let seed = &mut 3;
        for (events, candidates, users) in
            [(0, 2, vec![3]), (3, 5, vec![]), (20, 40, vec![1, 8]), (40, 3, vec![77])]
        {
            let mut request = history(&picks(seed, events, 60), &picks(seed, events, 6), &[], 0);
            request.contextual = vec![users.clone()];
            request.candidates = Candidates { items: picks(seed, candidates, 60), additional: Vec::new() };
            let prepared = model.prepare(request.clone()).unwrap();
            let n = prepared.context_len();
            assert_eq!(n, users.len() + 2 * events);
            let (context, branch) = (table(0, n), table(8, candidates));
            let mut runner = Runner { model: &model, cpu: &cpu, pages: &mut pages };
            let mut states = runner.context(&prepared, &context, 0..n, 0, 17);
            states.extend(runner.candidates(&prepared, &context, &branch, 0..candidates));

            let tables = "_embedding_collection._data_parallel_embedding_collection.embeddings.";
            let mut x = Vec::new();
            let mut push = |name: &str, id: u32, position: usize| {
                let row = naive.row(&format!("{tables}{name}.weight"), id as usize);
                let position = naive.row(
                    "_hstu_block._preprocessor._positional_encoder._position_embeddings_weight",
                    position.min(69),
                );
                x.push(row.iter().zip(position).map(|(x, p)| x * 12f64.sqrt() + p).collect::<Row>());
            };
            let mut position = 0..;
            for &user in &users {
                push("user", user.min(8), position.next().unwrap());
            }
            for (&item, &action) in request.events.items.iter().zip(&request.events.actions) {
                push("video", item, position.next().unwrap());
                push("act", action, position.next().unwrap());
            }
            for &item in &request.candidates.items {
                push("video", item, n);
            }
            let sees = |row: usize, column: usize| row == column || (column < row && column < n);
            let expected = naive.layers(x, &sees, &[], &[], &[]);
            assert_close(&states, &expected.concat(), tolerance(kv), "states");

            let found = model.predict(&cpu, &states[n * 12..], &prepared, 0..candidates).unwrap();
            let predict = |state: &Row| -> Row {
                let bias = |x: Row, name: &str| -> Row {
                    x.iter().zip(naive.vector(name)).map(|(x, b)| x + b).collect()
                };
                let x =
                    bias(naive.product(&l2(state, 1e-6), "_mlp._mlp.0.weight", false), "_mlp._mlp.0.bias");
                // Phi by its integral, as good as any.
                let phi = |x: f64| {
                    let steps = 4000;
                    let density = |t: f64| (-t * t / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt();
                    let width = (x + 12.0) / f64::from(steps);
                    (0..steps).map(|k| density(-12.0 + (f64::from(k) + 0.5) * width) * width).sum::<f64>()
                };
                let x: Row = x.iter().map(|&x| if residual { x.max(0.0) } else { x * phi(x) }).collect();
                let x = bias(naive.product(&x, "_mlp._mlp.2.weight", false), "_mlp._mlp.2.bias");
                if prediction == "sigmoid" {
                    return x.into_iter().map(sigmoid).collect();
                }
                let total: f64 = x.iter().map(|x| x.exp()).sum();
                x.iter().map(|x| x.exp() / total).collect()
            };
            let expected: Vec<Row> = expected[n..].iter().map(predict).collect();
            assert_close(&found, &expected.concat(), tolerance(kv), "predictions");
        }
        let Task::Ranking(ranking) = model.task() else { panic!("a model that ranks") };
        let names: &[&str] = if prediction == "sigmoid" {
            &["click", "like", "share"]
        } else {
            &["rating.0", "rating.1", "rating.2"]
        };
        assert_eq!(ranking.names(), names);
    }
}

fn token_sizes() -> ResearchSizes {
    ResearchSizes { items: 40, most: 70, positions: 74, width: 14, layers: 3, heads: 2, key: 5, value: 6 }
}

/// Rows of a sequence of tokens before the first layer.
fn embedded(naive: &Naive<'_>, combine: &str, tokens: &[u32], actions: &[u32]) -> Vec<Row> {
    let row = |(position, (&token, &action)): (usize, (&u32, &u32))| -> Row {
        if token == 0 {
            return vec![0.0; 14];
        }
        let item = naive.row("_embedding_module._item_emb.weight", token as usize);
        let x: Row = if combine == "add" {
            let action = naive.row("_embedding_module._action_emb.weight", action as usize);
            item.iter().zip(action).map(|(x, a)| x + a).collect()
        } else {
            let action = naive.row("_input_features_preproc._rating_emb.weight", action as usize);
            item.into_iter().chain(action).collect()
        };
        let position = naive.row("_input_features_preproc._pos_emb.weight", position);
        x.iter().zip(position).map(|(x, p)| x * 14f64.sqrt() + p).collect()
    };
    tokens.iter().zip(actions).enumerate().map(row).collect()
}

#[test]
fn beams_of_the_token_head_are_the_full_forward_pass() {
    KvFormat::ALL.into_iter().for_each(check_token_head);
}

fn check_token_head(kv: KvFormat) {
    let cpu = Cpu::new(2).unwrap();
    for (combine, tied) in [("add", true), ("add", false), ("concat", false)] {
        let config = token_head(&token_sizes(), combine, tied);
        let tensors = random_tensors(&config, 11);
        let model = load(&config, &tensors, &cpu, WeightFormat::F32);
        assert_eq!(model.reuse(), ReuseClass::CrossRequestMinusLast);
        let Task::Tokens(head) = model.task() else { panic!("a model that decodes") };
        assert_eq!(head.vocab_size(), 41);
        let naive = Naive { config: &config, tensors: &tensors };
        let mut pages = model.page_store(kv, 16).unwrap();
        let seed = &mut 5;
        for n in [1, 31, 32, 45, 70] {
            let (tokens, actions) = (picks(seed, n, 41), picks(seed, n, 4));
            let mut time = 1_700_000_000;
            let times: Vec<i64> = (0..n)
                .map(|_| {
                    let most = 1 << pick(seed, 22);
                    time += pick(seed, most) as i64;
                    time
                })
                .collect();
            // The clock of the query may be behind.
            let query = times[n - 1] + [500, 0, -30][pick(seed, 3)];
            let prepared = model.prepare(history(&tokens, &actions, &times, query)).unwrap();
            let (context, branch) = (table(0, n), table(8, 40));
            let mut runner = Runner { model: &model, cpu: &cpu, pages: &mut pages };
            let states = runner.context(&prepared, &context, 0..n, 0, 20);

            let expect = |path: &[u32]| -> Vec<Row> {
                let all: Vec<u32> = tokens.iter().chain(path).copied().collect();
                let mut actions = actions.clone();
                actions.resize(all.len(), 2);
                let mut times = times.clone();
                times.resize(all.len() + 1, query);
                let positions: Vec<usize> = (0..all.len()).collect();
                let x = embedded(&naive, combine, &all, &actions);
                let states = naive.layers(x, &|i, j| j <= i, &times[1..], &times, &positions);
                let logits = |state: &Row| -> Row {
                    let name = if tied { "_embedding_module._item_emb.weight" } else { "_token_head.weight" };
                    naive.product(&layer_norm(state, 1e-6), name, false).iter().map(|x| 2.5 * x).collect()
                };
                states[n - 1..].iter().map(logits).collect()
            };
            let logits = head.logits(&cpu, &states[(n - 1) * 14..]);
            assert_close(&logits, &expect(&[])[0], 20.0 * tolerance(kv), "the first logits");

            // Three steps of four beams, with parents in any order.
            let width = 4;
            let mut paths: Vec<Vec<u32>> = vec![Vec::new(); width];
            let mut lineages: Vec<Vec<u32>> = vec![Vec::new(); width];
            for step in 0..3 {
                let (old_paths, old_lineages) = (paths.clone(), lineages.clone());
                for beam in 0..width {
                    let parent = pick(seed, width);
                    paths[beam].clone_from(&old_paths[parent]);
                    lineages[beam].clone_from(&old_lineages[parent]);
                    paths[beam].push(pick(seed, 41) as u32);
                    lineages[beam].push((step * width + beam) as u32);
                }
                let lineage = lineages.concat();
                let newest: Vec<u32> = paths.iter().map(|path| path[step]).collect();
                let rows = BeamRows {
                    owner: 0,
                    tokens: &newest,
                    ancestors: step + 1,
                    lineage: &lineage,
                    context_pages: &context,
                    branch_pages: &branch,
                };
                let states = runner.tokens(&prepared, rows);
                let logits = head.logits(&cpu, &states);
                for (beam, path) in paths.iter().enumerate() {
                    let expected = &expect(path)[step + 1];
                    assert_close(
                        &logits[beam * 41..][..41],
                        expected,
                        20.0 * tolerance(kv),
                        "logits of a beam",
                    );
                }
            }
        }
        // Beyond the last position there is nothing.
        let prepared = model.prepare(history(&[1; 70], &[0; 70], &[0; 70], 0)).unwrap();
        let mut batch = beamline_model::families::hstu::batch::HstuBatch::default();
        let rows = BeamRows {
            owner: 0,
            tokens: &[1],
            ancestors: 5,
            lineage: &[0, 1, 2, 3, 4],
            context_pages: &table(0, 70),
            branch_pages: &table(8, 5),
        };
        let error = model.push_tokens(&mut batch, &prepared, rows).unwrap_err();
        assert_eq!(error.to_string(), "position 74 of a model of 74 positions");
    }
}

#[test]
fn padding_events_are_zero_rows() {
    let cpu = Cpu::new(1).unwrap();
    let config = research(&token_sizes());
    let tensors = random_tensors(&config, 2);
    let model = load(&config, &tensors, &cpu, WeightFormat::F32);
    let naive = Naive { config: &config, tensors: &tensors };
    let mut pages = model.page_store(KvFormat::F32, 1).unwrap();
    let request: Request = history(&[4, 0, 9], &[], &[10, 20, 30], 40);
    let prepared = model.prepare(request).unwrap();
    let mut runner = Runner { model: &model, cpu: &cpu, pages: &mut pages };
    let states = runner.context(&prepared, &table(0, 3), 0..3, 0, 3);
    let position = |i| naive.row("_input_features_preproc._pos_emb.weight", i);
    let item = |i| naive.row("_embedding_module._item_emb.weight", i);
    let row = |i: usize, p: usize| -> Row {
        item(i).iter().zip(position(p)).map(|(x, p)| x * 14f64.sqrt() + p).collect()
    };
    let x = vec![row(4, 0), vec![0.0; 14], row(9, 2)];
    let expected = naive.layers(x, &|i, j| j <= i, &[20, 30, 40], &[10, 20, 30], &[0, 1, 2]);
    assert_close(&states, &expected.concat(), tolerance(KvFormat::F32), "states");
}
