//! A context that was moved to host memory and back is the one that was computed, bit for bit.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

mod common;
#[path = "common/moved.rs"]
mod moved;

use beamline_kv_cache::PageContents;
use beamline_model::cpu::pages::PageStore;
use beamline_model::executor::Found;
use common::{CASES, Loaded};

fn bits(found: &Found) -> Vec<(u32, u64)> {
    found.hypotheses.iter().map(|h| (h.leaf.0, h.score.to_bits())).collect()
}

#[test]
fn a_context_that_was_moved_away_and_back_changes_no_bit() {
    for case in CASES {
        let loaded = Loaded::open(case);
        let config = loaded.model.config();
        let page_bytes = PageStore::bytes_per_page(config.layers, config.kv_heads, config.head_dim);
        let store =
            PageStore::new(config.layers, config.kv_heads, config.head_dim, config.head_dim, 1).unwrap();
        assert_eq!(store.page_bytes(), page_bytes);
        let [cold, warm] = moved::cold_and_brought_back(&loaded, page_bytes, |pages| loaded.executor(pages));
        assert_eq!(bits(&cold), bits(&warm), "{case}");
    }
}
