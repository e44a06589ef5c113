//! Expanding beams: log-sum-exp over the vocabulary, continuations from the trie, the best of them.
#![allow(missing_docs, reason = "criterion's macro makes public items")]
#![allow(clippy::expect_used, reason = "a measurement for people to run")]

use std::sync::Arc;

use beamline_catalog::{Catalog, CatalogLimits, FilterSpec, ItemRecord, SidPart, WrittenSymbols};
use beamline_compute::cpu::isa::Isa;
use beamline_model::decode::{Normalization, Search, SearchRequest, Step};
use criterion::{Criterion, criterion_group, criterion_main};

const CODES: u32 = 1024;

fn catalog() -> Arc<Catalog> {
    let records = (0..200_000u32).map(|item| ItemRecord {
        item_id: format!("item-{item}"),
        sid: (0..3)
            .map(|level| SidPart::Code((3 * item + level).wrapping_mul(0x9e37_79b9) >> 8 & (CODES - 1)))
            .collect(),
        tags: Vec::new(),
        title: None,
    });
    let limits = CatalogLimits::default();
    Arc::new(
        Catalog::from_records(records, &WrittenSymbols::codes(), &limits).expect("the records are sound"),
    )
}

fn search(c: &mut Criterion) {
    let (catalog, isa) = (catalog(), Isa::detect());
    let logits: Vec<f32> =
        (0..3 * CODES).map(|i| (i.wrapping_mul(0x9e37_79b9) >> 8) as f32 / (1 << 22) as f32).collect();
    for normalization in [Normalization::FullVocab, Normalization::AllowedSet] {
        for beams in [32, 128, 512] {
            let request = || SearchRequest {
                catalog: Arc::clone(&catalog),
                filter: catalog.filter(&FilterSpec::default()),
                start: catalog.trie().root(),
                steps: Arc::from([Step::Level; 3]),
                normalize_over: None,
                widths: None,
                normalization,
            };
            c.bench_function(&format!("{beams} beams, three levels, {normalization:?}"), |b| {
                b.iter(|| {
                    let mut search = Search::new(request(), beams);
                    while !search.is_over() {
                        for beam in 0..search.beams().len() {
                            search.offer(isa, beam, &logits).expect("finite");
                        }
                        search.advance();
                    }
                    search.hypotheses().len()
                });
            });
        }
    }
}

criterion_group!(benches, search);
criterion_main!(benches);
