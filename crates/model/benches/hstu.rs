//! HSTU on the published shapes: attention, the products beside it, a whole forward pass, and retrieval.
//!
//! The elements of a throughput are floating-point operations that the shape needs, a multiply-add
//! counted as two. So rates of attention and of products can be compared. Attention counts the keys that
//! a causal row sees; further keys in the page of the diagonal are computed and not counted.
#![allow(missing_docs, reason = "criterion's macro makes public items")]
#![allow(clippy::expect_used, reason = "a measurement for people to run")]

use std::time::{Duration, Instant};

#[path = "../tests/common/hstu.rs"]
mod hstu;
#[path = "../tests/common/made.rs"]
#[allow(dead_code, clippy::unwrap_used, reason = "made for tests too")]
mod made;

use beamline_compute::batch::ContextRows;
use beamline_compute::cpu::Cpu;
use beamline_compute::cpu::attention::Tables;
use beamline_compute::cpu::kv_format::KvFormat;
use beamline_compute::cpu::linear::{Linear, Output, Rows, WeightFormat};
use beamline_compute::cpu::mask::Mask;
use beamline_compute::cpu::pages::{Destination, PAGE_SIZE, PageShape, PageStore};
use beamline_compute::cpu::pointwise::{Call, RelativeBias, Sequence, Sequences, Shape, attend};
use beamline_kv_cache::PageId;
use beamline_model::families::hstu::batch::{ContextOf, HstuBatch};
use beamline_model::families::hstu::retrieval::{ItemTable, TopItems};
use beamline_model::families::hstu::stack::Workspace;
use beamline_model::rows::ContextPart;
use candle_core::{Device, Tensor};
use criterion::{Bencher, Criterion, Throughput, criterion_group, criterion_main};

const THREADS: usize = 2;

/// Width, heads, width of a head.
const SHAPES: [(usize, usize, usize); 2] = [(256, 4, 64), (50, 1, 50)];
const HISTORIES: [usize; 2] = [200, 2000];

fn numbers(count: usize) -> Vec<f32> {
    (0..count as u32).map(|i| (i.wrapping_mul(0x9e37_79b9) >> 8) as f32 / (1 << 23) as f32 - 1.0).collect()
}

/// Times of a user who comes in sessions: seconds within one, days between.
fn times(count: usize) -> Vec<i64> {
    let mut time = 1_700_000_000;
    (0..count as i64)
        .map(|event| {
            time += if event % 17 == 0 { 70_000 + event * 131 } else { 20 + event % 40 };
            time
        })
        .collect()
}

/// The rows of a whole context, as a family lays them out.
fn context(history: usize) -> HstuBatch {
    let pages: Vec<PageId> = (0..history.div_ceil(PAGE_SIZE) as u32).map(PageId).collect();
    let (tokens, times) = (vec![0; history], times(history + 1));
    let mut batch = HstuBatch::default();
    let rows =
        ContextRows { owner: 0, tokens: &tokens, first_position: 0, cached: 0, pages: &pages, wanted: 1 };
    batch.push_context(rows, ContextOf { len: history, times: &times });
    batch
}

/// Measures within the pool, its threads awake, as a step runs.
fn awake(bencher: &mut Bencher<'_>, cpu: &Cpu, mut work: impl FnMut() + Send) {
    bencher.iter_custom(|count| {
        cpu.run_awake(|| {
            let start = Instant::now();
            (0..count).for_each(|_| work());
            start.elapsed()
        })
    });
}

fn attention(c: &mut Criterion) {
    let cpu = Cpu::new(THREADS).expect("threads");
    let mut group = c.benchmark_group("attention");
    for (_, heads, dim) in SHAPES {
        for history in HISTORIES {
            let width = 4 * heads * dim;
            let rows = numbers(history * width);
            let shape = PageShape { format: KvFormat::F32, layers: 1, heads, key_dim: dim, value_dim: dim };
            let mut store = PageStore::new(shape, history.div_ceil(PAGE_SIZE)).expect("pages");
            for head in 0..heads {
                for position in 0..history {
                    let row = &rows[position * width + head * dim..][..dim];
                    let page = PageId((position / PAGE_SIZE) as u32);
                    let destination = Destination::Context { page, offset: position % PAGE_SIZE };
                    store.write(0, head, destination, row, row);
                }
            }
            let batch = context(history);
            let bias = RelativeBias::new(&numbers(2 * history + 41), &numbers(129));
            let (of_row, times) = (vec![0; history], times(history + 1));
            let all = [Sequence { context_len: history, times: 0..times.len() }];
            let mut out = vec![0.0; history * heads * dim];
            let operations = heads * history * (history + 1) / 2 * 4 * dim;
            group.throughput(Throughput::Elements(operations as u64));
            for (name, bias) in [("with", Some(&bias)), ("without", None)] {
                let call = Call {
                    shape: Shape {
                        heads,
                        key_dim: dim,
                        value_dim: dim,
                        row_width: width,
                        query_column: 2 * heads * dim,
                        logit_scale: 1.0,
                        divisor: 211.0,
                    },
                    mask: Mask::default(),
                    bias,
                    rows: &rows,
                    sequences: Sequences { of_row: &of_row, all: &all, times: &times },
                    pages: store.layer(0),
                    tables: Tables { pages: &batch.layout.pages, lineage: &[] },
                };
                group.bench_function(
                    format!("{heads} heads of {dim}, history {history}, {name} bias"),
                    |b| {
                        awake(b, &cpu, || attend(&cpu, &call, &batch.layout.blocks, &mut out));
                    },
                );
            }
        }
    }
    group.finish();
}

fn products(c: &mut Criterion) {
    let cpu = Cpu::new(THREADS).expect("threads");
    let mut group = c.benchmark_group("products");
    for (width, heads, dim) in SHAPES {
        for history in HISTORIES {
            for (inputs, outputs) in [(width, 4 * heads * dim), (heads * dim, width)] {
                let weight = Tensor::from_vec(numbers(inputs * outputs), (outputs, inputs), &Device::Cpu);
                let linear =
                    Linear::pack(&[weight.expect("a matrix")], None, WeightFormat::F32).expect("a matrix");
                let (x, mut rows, mut out) =
                    (numbers(history * inputs), Rows::default(), vec![0.0; history * outputs]);
                group.throughput(Throughput::Elements((2 * history * inputs * outputs) as u64));
                group.bench_function(format!("f32 {history} x {inputs} x {outputs}"), |b| {
                    awake(b, &cpu, || {
                        rows.pack(&cpu, &x, inputs, WeightFormat::F32);
                        linear.forward(&cpu, &rows, Output::Replace, &mut out);
                    });
                });
            }
        }
    }
    group.finish();
}

/// The layers of the published research models, from events to the final state of the last row.
fn forward(c: &mut Criterion) {
    let cpu = Cpu::new(THREADS).expect("threads");
    let mut group = c.benchmark_group("forward");
    for (layers, (width, heads, dim)) in [4, 2].into_iter().zip(SHAPES) {
        let config = hstu::research(&hstu::ResearchSizes {
            items: 1000,
            most: 2000,
            positions: 2011,
            width,
            layers,
            heads,
            key: dim,
            value: dim,
        });
        let tensors = hstu::random_tensors(&config, 1);
        for format in WeightFormat::ALL {
            let model = hstu::load(&config, &tensors, &cpu, format);
            for history in HISTORIES {
                let items: Vec<u32> = (0..history as u32).map(|i| 1 + i * 37 % 1000).collect();
                let request = hstu::history(&items, &[], &times(history), 1_900_000_000);
                let request = model.prepare(request).expect("a request");
                let pages: Vec<PageId> = (0..history.div_ceil(PAGE_SIZE) as u32).map(PageId).collect();
                let mut store = model.page_store(KvFormat::F32, pages.len()).expect("pages");
                let (mut batch, mut workspace) = (HstuBatch::default(), Workspace::default());
                // The whole context, and what is left of it when all pages but the last are cached.
                for first in [0, (history - 1) / PAGE_SIZE * PAGE_SIZE] {
                    let rows = history - first;
                    let pairs = history * (history + 1) / 2 - first * (first + 1) / 2;
                    let products = rows * width * 5 * heads * dim;
                    let operations = 2 * layers * (products + heads * pairs * 2 * dim);
                    group.throughput(Throughput::Elements(operations as u64));
                    let name = format!("{format} {layers} layers of {width}, {rows} rows of {history}");
                    group.bench_function(name, |b| {
                        b.iter(|| {
                            batch.clear();
                            let rows = ContextPart {
                                owner: 0,
                                positions: first..history,
                                cached: first,
                                pages: &pages,
                                wanted: 1,
                            };
                            model.push_context(&cpu, &mut batch, &request, rows).expect("rows");
                            batch.layout.check_writes(store.pages()).expect("distinct rows");
                            cpu.run_awake(|| {
                                model.forward(&cpu, &batch, &mut store, &mut workspace, &mut |_, _| {});
                            });
                        });
                    });
                }
            }
        }
    }
    group.finish();
}

fn retrieval(c: &mut Criterion) {
    let cpu = Cpu::new(THREADS).expect("threads");
    let (items, width) = (1_000_000, 64);
    let rows = numbers(items * width);
    let mut group = c.benchmark_group("retrieval");
    for format in WeightFormat::ALL {
        let table = ItemTable::new(&cpu, &rows, width, 1e-6, 1, format).expect("items");
        for users in [1, 32] {
            let vectors = numbers(users * width);
            let asked = vec![TopItems { count: 200, allowed: &|item| item % 3 != 0 }; users];
            group.throughput(Throughput::Elements((2 * users * items * width) as u64));
            group.bench_function(format!("{format}: 200 of {items} items of {width}, {users} users"), |b| {
                b.iter(|| table.top(&cpu, &vectors, &asked));
            });
        }
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).measurement_time(Duration::from_millis(1500)).warm_up_time(Duration::from_millis(300));
    targets = attention, products, forward, retrieval
}
criterion_main!(benches);
