//! The catalog of this crate's benches: 200 thousand items of three levels with 1024 codes, half of
//! them in stock.

use beamline_catalog::{Catalog, CatalogLimits, ItemRecord, SidPart, WrittenSymbols};

const ITEMS: u32 = 200_000;
const CODES: u32 = 1024;

pub(crate) fn catalog() -> Catalog {
    let records = (0..ITEMS).map(|item| {
        let code = |level: u32| SidPart::Code(mix(3 * item + level) % CODES);
        ItemRecord {
            item_id: format!("item-{item:07}"),
            sid: vec![code(0), code(1), code(2)],
            tags: if item.is_multiple_of(2) { vec!["in_stock".to_owned()] } else { Vec::new() },
            title: None,
        }
    });
    Catalog::from_records(records, &WrittenSymbols::codes(), &CatalogLimits::default())
        .expect("the records are sound")
}

/// A number that looks random and is always the same for one `x`.
pub(crate) fn mix(x: u32) -> u32 {
    let x = (x ^ (x >> 16)).wrapping_mul(0x7feb_352d);
    let x = (x ^ (x >> 15)).wrapping_mul(0x846c_a68b);
    x ^ (x >> 16)
}
