//! Composing a request's filter, and asking it about intervals of leaves.
#![allow(missing_docs, reason = "criterion's macro makes public items")]
#![allow(clippy::expect_used, reason = "a measurement for people to run")]

mod common;

use std::hint::black_box;
use std::ops::Range;

use beamline_catalog::{FilterSpec, ItemIndex, Node};
use criterion::{Criterion, criterion_group, criterion_main};

fn filter(c: &mut Criterion) {
    let catalog = common::catalog();
    let seen: Vec<ItemIndex> =
        (0..500).map(|i| ItemIndex(common::mix(i) % catalog.num_items() as u32)).collect();
    let allow: Vec<String> = seen.iter().map(|&item| catalog.item_id(item).to_owned()).collect();
    let in_stock = ["in_stock".to_owned()];
    let nothing = FilterSpec::default();
    let specs = [
        ("nothing", nothing),
        ("500 seen items", FilterSpec { exclude_seen: &seen, ..nothing }),
        ("a tag and 500 seen items", FilterSpec { exclude_seen: &seen, require_tags: &in_stock, ..nothing }),
        ("500 allowed items", FilterSpec { allow_items: Some(&allow), ..nothing }),
    ];
    let trie = catalog.trie();
    let parents = (0..32).map(|beam| Node { level: 1, index: common::mix(beam) % trie.num_nodes(1) as u32 });
    let ranges: Vec<Range<u32>> = parents
        .flat_map(|parent| trie.children(parent).iter().map(|(_, child)| trie.leaves(child)))
        .collect();
    for (name, spec) in specs {
        c.bench_function(&format!("compose: {name}"), |b| b.iter(|| catalog.filter(black_box(&spec))));
        let filter = catalog.filter(&spec);
        c.bench_function(&format!("ask about {} children: {name}", ranges.len()), |b| {
            b.iter(|| ranges.iter().filter(|range| filter.allows_any((*range).clone())).count());
        });
    }
}

criterion_group!(benches, filter);
criterion_main!(benches);
