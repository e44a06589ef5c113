//! HSTU: an answer is a function of checkpoint and request, bit for bit. Nothing else changes it: what
//! shares the step, how the context is cut, which part an earlier request cached, the number of threads,
//! the instruction set. It holds in every format of weights and in every format of keys and values.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

#[path = "common/hstu.rs"]
mod hstu;
#[path = "common/made.rs"]
#[allow(dead_code, reason = "made for decoders too")]
mod made;

use std::sync::OnceLock;

use beamline_compute::cpu::Cpu;
use beamline_compute::cpu::isa::Isa;
use beamline_compute::cpu::kv_format::KvFormat;
use beamline_compute::cpu::linear::WeightFormat;
use beamline_compute::cpu::pages::{PAGE_SIZE, PageStore};
use beamline_kv_cache::PageId;
use beamline_model::families::hstu::Hstu;
use beamline_model::families::hstu::batch::HstuBatch;
use beamline_model::families::hstu::inputs::{Candidates, Prepared, Request};
use beamline_model::families::hstu::stack::Workspace;
use beamline_model::rows::{BeamRows, CandidateRows, ContextPart};
use hstu::*;
use proptest::prelude::*;
use serde_json::Value;

/// Models of every variant in every weight format, loaded once.
fn models() -> &'static [Vec<Hstu>] {
    static MODELS: OnceLock<Vec<Vec<Hstu>>> = OnceLock::new();
    MODELS.get_or_init(|| {
        let sizes = ResearchSizes {
            items: 50,
            most: 150,
            positions: 160,
            width: 20,
            layers: 3,
            heads: 2,
            key: 7,
            value: 18,
        };
        let mut windowed = token_head(&sizes, "add", false);
        windowed["stack"]["relative_bias"] = Value::Null;
        windowed["stack"]["mask"]["max_attention_len"] = 37.into();
        let mut full_tail = nvidia("in_out", true, "sigmoid", true);
        full_tail["stack"]["mask"]["max_attention_len"] = 20.into();
        full_tail["stack"]["mask"]["min_full_attention_len"] = 9.into();
        let configs = [
            research(&sizes),
            token_head(&sizes, "add", true),
            nvidia("in_out", true, "sigmoid", true),
            dlrm("rows"),
            windowed,
            full_tail,
        ];
        let cpu = Cpu::new(2).unwrap();
        let load = |config: &Value| {
            let tensors = random_tensors(config, 23);
            WeightFormat::ALL.into_iter().map(|format| load(config, &tensors, &cpu, format)).collect()
        };
        configs.iter().map(load).collect()
    })
}

const RESEARCH: usize = 0;
const TOKENS: usize = 1;
const RANKING: [usize; 2] = [2, 3];
const WINDOWED: usize = 4;

/// What a request is made from; ids are taken modulo what the model has.
#[derive(Clone, Debug)]
struct Made {
    events: Vec<(u32, u32, u32)>,
    query_after: i64,
    unit: i64,
    users: Vec<u32>,
    candidates: Vec<u32>,
}

fn made(events: std::ops::Range<usize>) -> impl Strategy<Value = Made> {
    let event = (0u32..1000, 0u32..1000, 0u32..22);
    (
        prop::collection::vec(event, events),
        -50i64..100_000,
        prop_oneof![Just(1i64), Just(1000), Just(86_400_000)],
        prop::collection::vec(0u32..6, 0..2),
        prop::collection::vec(0u32..1000, 1..40),
    )
        .prop_map(|(events, query_after, unit, users, candidates)| Made {
            events,
            query_after,
            unit,
            users,
            candidates,
        })
}

fn request(kind: usize, made: &Made) -> Request {
    let items = |count: u32| made.events.iter().map(|event| event.0 % count).collect::<Vec<_>>();
    let mut time = 1_700_000_000;
    let times: Vec<i64> = made
        .events
        .iter()
        .map(|event| {
            // Gaps of every size, none among them.
            time += ((1i64 << event.2) - 1) * made.unit / 86_400;
            time
        })
        .collect();
    let actions: Vec<u32> = made.events.iter().map(|event| event.1 % 4).collect();
    let ids = if RANKING.contains(&kind) || kind == 5 { 50 } else { 51 };
    let mut request = history(&items(ids), &actions, &times, time + made.query_after);
    if ids == 51 {
        return request;
    }
    let candidates: Vec<u32> = made.candidates.iter().map(|id| id % 50).collect();
    if kind == 3 {
        let owners = |items: &[u32]| vec![items.iter().map(|item| item * 7 % 25).collect()];
        request.events.additional = owners(&request.events.items);
        let users: Vec<u32> = made.users.iter().take(1).copied().collect();
        request.contextual = vec![users, made.users.clone()];
        request.candidates = Candidates { additional: owners(&candidates), items: candidates };
    } else {
        request.events.items.truncate(80);
        request.events.actions.truncate(80);
        request.contextual = vec![made.users.clone()];
        request.candidates = Candidates { items: candidates, additional: Vec::new() };
    }
    request
}

fn alone(model: &Hstu, cpu: &Cpu, kv: KvFormat, prepared: &Prepared) -> (Vec<f32>, Vec<f32>, PageStore) {
    let mut pages = model.page_store(kv, 24).unwrap();
    let (n, m) = (prepared.context_len(), prepared.candidates());
    let mut runner = Runner { model, cpu, pages: &mut pages };
    let context = runner.context(prepared, &table(0, n), 0..n, 0, n);
    let candidates =
        if m > 0 { runner.candidates(prepared, &table(0, n), &table(12, m), 0..m) } else { Vec::new() };
    (context, candidates, pages)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn neither_step_nor_chunks_nor_threads_change_a_bit(
        kind in 0usize..6,
        format in 0usize..3,
        kv in prop::sample::select(KvFormat::ALL.to_vec()),
        users in prop::collection::vec(made(1..100), 1..5),
        chunks in prop::collection::vec(1usize..70, 1..6),
        threads in 1usize..4,
    ) {
        let model = &models()[kind][format];
        let cpu = Cpu::new(2).unwrap();
        let prepared: Vec<Prepared> =
            users.iter().map(|made| model.prepare(request(kind, made)).unwrap()).collect();
        let expected: Vec<_> = prepared.iter().map(|prepared| alone(model, &cpu, kv, prepared)).collect();
        for isa in Isa::all() {
            let cpu = Cpu::with_isa(threads, isa).unwrap();
            let mut pages = model.page_store(kv, 24 * users.len()).unwrap();
            let tables: Vec<(Vec<PageId>, Vec<PageId>)> = prepared.iter().enumerate().map(|(user, prepared)| {
                let first = 24 * user as u32;
                (table(first, prepared.context_len()), table(first + 12, prepared.candidates()))
            }).collect();
            let mut found = vec![(Vec::new(), Vec::new()); users.len()];
            let (mut batch, mut workspace) = (HstuBatch::default(), Workspace::default());
            let (mut done, mut ranked) = (vec![0; users.len()], vec![0; users.len()]);
            let mut step = 0;
            while (0..users.len()).any(|user| done[user] < prepared[user].context_len() || ranked[user] < prepared[user].candidates()) {
                batch.clear();
                let mut taken = Vec::new();
                for user in 0..users.len() {
                    let (n, m) = (prepared[user].context_len(), prepared[user].candidates());
                    let size = chunks[(step + 3 * user) % chunks.len()];
                    let owner = user as u32;
                    let (context_pages, branch_pages) = (&tables[user].0[..], &tables[user].1[..]);
                    if done[user] < n {
                        let positions = done[user]..n.min(done[user] + size);
                        let rows = ContextPart { owner, positions: positions.clone(), cached: 0, pages: context_pages, wanted: positions.len() };
                        model.push_context(&cpu, &mut batch, &prepared[user], rows).unwrap();
                        done[user] = positions.end;
                        taken.push((user, true, positions.len()));
                    } else if ranked[user] < m {
                        let candidates = ranked[user]..m.min(ranked[user] + size);
                        ranked[user] = candidates.end;
                        taken.push((user, false, candidates.len()));
                        let rows = CandidateRows { owner, candidates, context_pages, branch_pages };
                        model.push_candidates(&cpu, &mut batch, &prepared[user], rows);
                    }
                }
                batch.layout.check_writes(pages.pages()).unwrap();
                model.forward(&cpu, &batch, &mut pages, &mut workspace, &mut |_, _| {});
                let width = model.config().stack.model_dim;
                let mut row = 0;
                for (user, context, rows) in taken {
                    let states = &workspace.hidden[row * width..(row + rows) * width];
                    let of = &mut found[user];
                    if context { of.0.extend_from_slice(states) } else { of.1.extend_from_slice(states) }
                    row += rows;
                }
                step += 1;
            }
            for (user, (context, candidates)) in found.iter().enumerate() {
                prop_assert_eq!(bits(context), bits(&expected[user].0));
                prop_assert_eq!(bits(candidates), bits(&expected[user].1));
            }
        }
    }

    /// A second request takes over every whole page whose words are the same, as far as the reuse class
    /// allows. Nothing is stale, and the answer is that of a cold start.
    #[test]
    fn what_words_and_class_allow_is_the_same_bit_for_bit(
        kind in prop::sample::select(vec![RESEARCH, TOKENS, RANKING[0], WINDOWED]),
        format in 0usize..3,
        kv in prop::sample::select(KvFormat::ALL.to_vec()),
        made in made(30..110),
        more in prop::collection::vec((0u32..1000, 0u32..1000, 0u32..22), 0..30),
        change in prop::option::of((any::<prop::sample::Index>(), 0usize..3)),
        query_after in -50i64..100_000,
        chunk in 1usize..60,
    ) {
        let model = &models()[kind][format];
        let cpu = Cpu::new(2).unwrap();
        let mut later = made.clone();
        later.events.extend(more);
        later.query_after = query_after;
        if let Some((index, what)) = change {
            let event = index.index(later.events.len());
            let event = &mut later.events[event];
            match what {
                0 => event.0 += 1,
                1 => event.1 += 1,
                _ => event.2 = (event.2 + 1) % 22,
            }
        }
        let [before, after] = [&made, &later].map(|made| model.prepare(request(kind, made)).unwrap());
        let n = after.context_len();
        let (expected, candidates, cold) = alone(model, &cpu, kv, &after);
        let (_, _, mut pages) = alone(model, &cpu, kv, &before);

        let words = model.config().words_per_position();
        let equal = before.words().chunks(words).zip(after.words().chunks(words)).take_while(|(a, b)| a == b).count();
        let class = model.reuse();
        let cached = equal.min(class.reusable_positions(before.context_len())).min(class.reusable_positions(n));
        // Not only whole pages: every position that may be reused is right in every layer.
        for layer in 0..cold.shape().layers {
            for head in 0..cold.shape().heads {
                for position in 0..cached {
                    let of = |pages: &PageStore| {
                        let page = PageId((position / PAGE_SIZE) as u32);
                        pages.context_row(layer, head, page, position % PAGE_SIZE).map(|row| bits(&row))
                    };
                    prop_assert_eq!(of(&pages), of(&cold), "layer {}, position {} of {}", layer, position, cached);
                }
            }
        }
        let start = cached.min(n - 1);
        let mut runner = Runner { model, cpu: &cpu, pages: &mut pages };
        let found = runner.context(&after, &table(0, n), start..n, cached, chunk);
        let width = model.config().stack.model_dim;
        prop_assert_eq!(bits(&found), bits(&expected[start * width..]));
        if after.candidates() > 0 {
            let m = after.candidates();
            let found = runner.candidates(&after, &table(0, n), &table(12, m), 0..m);
            prop_assert_eq!(bits(&found), bits(&candidates));
        }
    }

    /// Permuting, adding and leaving out candidates, in calls of any size, changes no prediction.
    #[test]
    fn candidates_do_not_see_each_other(
        kind in prop::sample::select(RANKING.to_vec()),
        format in 0usize..3,
        kv in prop::sample::select(KvFormat::ALL.to_vec()),
        made in made(5..60),
        order in prop::collection::vec(any::<prop::sample::Index>(), 1..50),
        size in 1usize..20,
    ) {
        let model = &models()[kind][format];
        let cpu = Cpu::new(2).unwrap();
        let mut other = made.clone();
        let chosen: Vec<usize> = order.iter().map(|index| index.index(made.candidates.len())).collect();
        other.candidates = chosen.iter().map(|&index| made.candidates[index]).collect();
        let [first, second] = [&made, &other].map(|made| model.prepare(request(kind, made)).unwrap());
        let (_, states, _) = alone(model, &cpu, kv, &first);
        let expected = model.predict(&cpu, &states, &first, 0..first.candidates()).unwrap();
        let (_, _, mut pages) = alone(model, &cpu, kv, &second);
        let (n, m) = (second.context_len(), second.candidates());
        let mut runner = Runner { model, cpu: &cpu, pages: &mut pages };
        let mut found = Vec::new();
        for start in (0..m).step_by(size) {
            let candidates = start..m.min(start + size);
            let states = runner.candidates(&second, &table(0, n), &table(12, size), candidates.clone());
            found.extend(model.predict(&cpu, &states, &second, candidates).unwrap());
        }
        for (place, index) in chosen.into_iter().enumerate() {
            prop_assert_eq!(bits(&found[3 * place..][..3]), bits(&expected[3 * index..][..3]));
        }
    }

    /// Beams of one step, all together or each in a call of its own, with pages in any order.
    #[test]
    fn beams_do_not_see_each_other(
        kind in prop::sample::select(vec![TOKENS, WINDOWED]),
        format in 0usize..3,
        kv in prop::sample::select(KvFormat::ALL.to_vec()),
        made in made(1..100),
        tokens in prop::collection::vec(0u32..51, 2..70),
        threads in 1usize..4,
    ) {
        let model = &models()[kind][format];
        let cpu = Cpu::with_isa(threads, Isa::all()[threads % Isa::all().len()]).unwrap();
        let prepared = model.prepare(request(kind, &made)).unwrap();
        let n = prepared.context_len();
        let (_, _, mut pages) = alone(model, &cpu, kv, &prepared);
        let width = tokens.len();
        let (context, branch) = (table(0, n), table(12, 2 * width));
        let mut runner = Runner { model, cpu: &cpu, pages: &mut pages };
        let own: Vec<u32> = (0..width as u32).collect();
        let rows = BeamRows { owner: 0, tokens: &tokens, ancestors: 1, lineage: &own, context_pages: &context, branch_pages: &branch };
        runner.tokens(&prepared, rows);
        // The second step: parents in the opposite order.
        let lineage: Vec<u32> = (0..width as u32).flat_map(|beam| [width as u32 - 1 - beam, width as u32 + beam]).collect();
        let rows = BeamRows { ancestors: 2, lineage: &lineage, ..rows };
        let together = runner.tokens(&prepared, rows);
        for beam in 0..width {
            let rows = BeamRows { tokens: &tokens[beam..=beam], lineage: &lineage[2 * beam..][..2], ..rows };
            let alone = runner.tokens(&prepared, rows);
            prop_assert_eq!(bits(&alone), bits(&together[beam * 20..][..20]));
        }
    }
}
