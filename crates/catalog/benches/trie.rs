//! What the beam search needs from the trie: the children of its beams, and where a child leads.
#![allow(missing_docs, reason = "criterion's macro makes public items")]
#![allow(clippy::expect_used, reason = "a measurement for people to run")]

mod common;

use std::hint::black_box;

use beamline_catalog::Node;
use criterion::{Criterion, criterion_group, criterion_main};

fn trie(c: &mut Criterion) {
    let catalog = common::catalog();
    let trie = catalog.trie();
    for level in 0..3u8 {
        // As many parents as a beam is wide, spread over the level.
        let count = trie.num_nodes(usize::from(level)) as u32;
        let parents: Vec<Node> =
            (0..32).map(|beam| Node { level, index: common::mix(beam) % count }).collect();
        c.bench_function(&format!("children of 32 nodes of level {level}, with their leaves"), |b| {
            b.iter(|| {
                let mut sum = 0;
                for &parent in &parents {
                    for (symbol, child) in trie.children(parent).iter() {
                        sum += u64::from(symbol) + u64::from(trie.leaves(child).start);
                    }
                }
                black_box(sum)
            });
        });
    }
    let mut path = Vec::new();
    trie.path(catalog.leaf_of(catalog.item("item-0012345").expect("it is there")), &mut path);
    c.bench_function("walk a whole SID", |b| b.iter(|| trie.walk(black_box(&path))));
}

criterion_group!(benches, trie);
criterion_main!(benches);
