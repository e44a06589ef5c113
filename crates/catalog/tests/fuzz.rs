//! Damaged catalog files: an error or a sound catalog, never a panic.
#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

use beamline_catalog::{Catalog, CatalogLimits, WrittenSymbols};
use proptest::prelude::*;

/// Four valid lines, with both forms of a SID.
const LINES: [&str; 4] = [
    r#"{"item_id": "a", "sid": [1, 2, 3], "tags": ["x", "y"], "title": "A"}"#,
    r#"{"item_id": "b", "sid": [1, 2, 4], "tags": []}"#,
    r#"{"item_id": "c", "sid": ["<a_1>", "<b_2>"], "other": {"deep": [1, {"er": null}]}}"#,
    r#"{"item_id": "\u00e4\ud83d\ude00", "sid": [4294967295, 0, 7]}"#,
];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn whatever_the_bytes_reading_ends(
        lines in prop::collection::vec(0usize..LINES.len(), 0..6),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        cut in any::<prop::sample::Index>(), cuts in any::<bool>(),
    ) {
        let mut bytes = lines.iter().map(|&line| LINES[line]).collect::<Vec<_>>().join("\n").into_bytes();
        if !bytes.is_empty() {
            for (place, byte) in &damage {
                let place = place.index(bytes.len());
                bytes[place] = *byte;
            }
            if cuts {
                bytes.truncate(cut.index(bytes.len()));
            }
        }
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("catalog.jsonl");
        std::fs::write(&path, bytes).unwrap();
        let limits = CatalogLimits::default();
        let Ok(symbols) = WrittenSymbols::scan_path(&path, &limits) else { return Ok(()) };
        if let Ok(catalog) = Catalog::read_path(&path, &symbols, &limits) {
            prop_assert!(catalog.num_items() >= catalog.num_leaves() && catalog.num_leaves() > 0);
            for item in catalog.items() {
                prop_assert_eq!(catalog.item(catalog.item_id(item)), Some(item));
                prop_assert!(catalog.items_of(catalog.leaf_of(item)).contains(&item));
            }
        }
    }
}
