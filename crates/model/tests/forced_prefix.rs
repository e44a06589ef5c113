//! A forced SID prefix is part of the context: the search below it finds the same items as the whole
//! search finds there. The scores differ by the log-probability of the prefix.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

mod common;

use std::sync::Arc;

use std::collections::HashMap;

use beamline_model::decode::{Normalization, steps_from};
use beamline_model::task::{Job, Task};
use common::{CASES, Loaded, run};

#[test]
fn the_search_below_a_prefix_is_part_of_the_whole_search() {
    for case in CASES {
        let loaded = Loaded::open(case);
        let trie = loaded.catalog.trie();
        let history: Vec<String> =
            loaded.catalog.items().take(5).map(|item| loaded.catalog.item_id(item).to_owned()).collect();
        let prompt = loaded.prompt(&history);
        let mut executor = loaded.executor(512);
        let whole = loaded.job(prompt.clone(), &[], Normalization::FullVocab);
        let whole = run(&mut executor, whole, loaded.catalog.num_leaves(), 50).unwrap();
        let scores: HashMap<_, _> = whole.hypotheses.iter().map(|h| (h.leaf, h.score)).collect();

        for (first, level_one) in trie.children(trie.root()).iter().take(3) {
            for (second, level_two) in trie.children(level_one).iter().take(2) {
                for (prefix, node) in [(vec![first], level_one), (vec![first, second], level_two)] {
                    let job =
                        loaded.job([prompt.clone(), prefix.clone()].concat(), &[], Normalization::FullVocab);
                    let mut search = job.search().unwrap().clone();
                    search.start = node;
                    search.steps = search.steps[steps_from(&search.steps, prefix.len()).unwrap()].into();
                    let job = Job { task: Task::Search(Arc::new(search)), ..job };
                    let found = run(&mut executor, job, loaded.catalog.num_leaves(), 50).unwrap().hypotheses;
                    assert_eq!(found.len(), trie.leaves(node).len(), "{case}: every leaf below {prefix:?}");
                    let differences: Vec<f64> = found.iter().map(|h| scores[&h.leaf] - h.score).collect();
                    assert!(
                        differences.iter().all(|d| (d - differences[0]).abs() < 2e-4),
                        "{case} {differences:?}"
                    );
                    assert!(differences[0] < 0.0);
                }
            }
        }
    }
}
