//! What names a catalog: its content version, and symbols given by a table.
#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

use beamline_catalog::{
    BadRecord, Catalog, CatalogError, CatalogLimits, Filter, ItemRecord, Leaf, Place, RecordProblem,
    RecordUnit, SidPart, SymbolTable, WrittenSymbols,
};
use proptest::prelude::*;

fn item(id: &str, sid: &[&str], tags: &[&str]) -> ItemRecord {
    ItemRecord {
        item_id: id.to_owned(),
        sid: sid.iter().map(|&token| SidPart::from(token)).collect(),
        tags: tags.iter().map(|&tag| tag.to_owned()).collect(),
        title: None,
    }
}

fn build(records: &[ItemRecord]) -> Catalog {
    let symbols = WrittenSymbols::scan_records(records);
    Catalog::from_records(records.to_vec(), &symbols, &CatalogLimits::default()).unwrap()
}

#[test]
fn the_version_is_of_the_content() {
    let records = [item("a", &["x", "y"], &["t", "u"]), item("b", &["x", "z"], &[])];
    let catalog = build(&records);
    assert_eq!(catalog.version(), "d4dca552a388f578", "stable across runs, machines and releases");
    assert_eq!(catalog.version(), build(&records).version());

    let titled = ItemRecord { title: Some("A".to_owned()), ..records[0].clone() };
    let retagged = item("a", &["x", "y"], &["u", "t", "u"]);
    for same in [titled, retagged] {
        assert_eq!(build(&[same, records[1].clone()]).version(), catalog.version());
    }
    let others = [
        vec![records[1].clone(), records[0].clone()],
        vec![records[0].clone()],
        vec![item("c", &["x", "y"], &["t", "u"]), records[1].clone()],
        vec![item("a", &["x", "y"], &["tu"]), records[1].clone()],
        vec![item("a", &["x", "z"], &["t", "u"]), item("b", &["x", "y"], &[])],
    ];
    for other in others {
        assert_ne!(build(&other).version(), catalog.version(), "{other:?}");
    }
}

/// Maps codes and tokens to symbols as a tokenizer might: in its own order, with a gap between
/// levels.
struct Reversed;

impl SymbolTable for Reversed {
    fn depth(&self) -> Option<usize> {
        Some(2)
    }

    fn symbol(&self, level: usize, part: &SidPart) -> Option<u32> {
        let SidPart::Code(code) = *part else { return None };
        let code = if code == 77 { 7 } else { code };
        (code < 10).then(|| 1000 * (level as u32 + 1) - code)
    }
}

fn coded(id: &str, sid: &[u32]) -> ItemRecord {
    ItemRecord { sid: sid.iter().copied().map(SidPart::Code).collect(), ..item(id, &[], &[]) }
}

fn problem(records: &[ItemRecord]) -> RecordProblem {
    match Catalog::from_records(records.to_vec(), &Reversed, &CatalogLimits::default()) {
        Err(CatalogError::BadRecords { listed, .. }) => listed[0].problem.clone(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn symbols_decide_the_order_and_parts_are_written_back() {
    let records = [coded("a", &[1, 1]), coded("b", &[2, 9]), coded("c", &[2, 3])];
    let catalog = Catalog::from_records(records.clone(), &Reversed, &CatalogLimits::default()).unwrap();
    let ids: Vec<&str> = (0..3).map(|leaf| catalog.item_id(catalog.items_of(Leaf(leaf))[0])).collect();
    assert_eq!(ids, ["b", "c", "a"]);
    assert_eq!(catalog.trie().children(catalog.trie().root()).symbols(), [998, 999]);
    for (item, record) in catalog.items().zip(&records) {
        assert_eq!(catalog.sid_parts(catalog.leaf_of(item)), record.sid);
    }
}

#[test]
fn a_table_that_confuses_codes_is_refused() {
    let other = SidPart::Code(7);
    assert_eq!(
        problem(&[coded("a", &[7, 7]), coded("b", &[7, 77])]),
        RecordProblem::AmbiguousCode { level: 1, part: SidPart::Code(77), other, symbol: 1993 }
    );
    assert_eq!(problem(&[coded("a", &[1])]), RecordProblem::WrongDepth { expected: 2, got: 1 });
    assert_eq!(
        problem(&[coded("a", &[1, 10])]),
        RecordProblem::UnknownCode { level: 1, part: SidPart::Code(10), advice: None }
    );
}

proptest! {
    #[test]
    fn a_repeated_id_is_refused_and_both_places_named(len in 2_usize..50, a: prop::sample::Index, b: prop::sample::Index) {
        let (first, second) = (a.index(len), b.index(len));
        prop_assume!(first < second);
        let mut records: Vec<ItemRecord> = (0..len).map(|i| coded(&i.to_string(), &[i as u32 % 10, 0])).collect();
        records[second].item_id = first.to_string();
        let place = |position: usize| Place { unit: RecordUnit::Record, number: position as u64 + 1 };
        let error = Catalog::from_records(records, &Reversed, &CatalogLimits::default());
        let Err(CatalogError::BadRecords { listed, omitted: 0 }) = error else { panic!("{error:?}") };
        let problem = RecordProblem::DuplicateItemId { item_id: first.to_string(), first: place(first) };
        prop_assert_eq!(listed, [BadRecord { place: place(second), problem, alike: 0 }]);
    }
}

#[test]
fn snapshots_and_filters_go_to_other_threads() {
    fn shareable<T: Send + Sync + 'static>() {}
    shareable::<Catalog>();
    shareable::<Filter>();
}

#[test]
fn the_report_is_readable_and_serializable() {
    let catalog =
        build(&[item("a", &["x", "y"], &[]), item("b", &["x", "y"], &[]), item("c", &["x", "z"], &["t"])]);
    let report = catalog.report();
    let text = report.to_string();
    assert!(text.contains("3 items on 2 SIDs of 2 levels, 1 distinct tags"), "{text}");
    assert!(text.contains("1 SIDs are shared by 2 items, at most 2 by one SID"), "{text}");
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["levels"][1]["branching"]["mean"], 2.0);
    assert_eq!(json["levels"][1]["codes"], 2);
    assert_eq!(json["collisions"]["items"], 2);
}
