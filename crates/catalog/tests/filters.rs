//! Catalogs and their filters, compared with a naive reference: a list of items that is searched
//! item by item.
#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

use std::collections::{BTreeMap, BTreeSet};

use beamline_catalog::{
    Catalog, CatalogLimits, FilterSpec, ItemIndex, ItemRecord, Leaf, Node, SidPart, WrittenSymbols,
};
use proptest::prelude::*;
use proptest::sample::subsequence;

const TAGS: [&str; 5] = ["in_stock", "new", "toys", "books", "adult"];

fn build(records: &[ItemRecord]) -> Catalog {
    Catalog::from_records(records.to_vec(), &WrittenSymbols::codes(), &CatalogLimits::default()).unwrap()
}

fn record(number: usize, path: &[u32], tags: &[&str]) -> ItemRecord {
    ItemRecord {
        item_id: format!("item {number}"),
        sid: path.iter().copied().map(SidPart::Code).collect(),
        tags: tags.iter().map(|&tag| tag.to_owned()).collect(),
        title: (!number.is_multiple_of(3)).then(|| format!("title {number}")),
    }
}

fn path_of(record: &ItemRecord) -> Vec<u32> {
    let code = |part: &SidPart| match part {
        SidPart::Code(code) => *code,
        SidPart::Token(_) => unreachable!("these catalogs are written in codes"),
    };
    record.sid.iter().map(code).collect()
}

/// Items from crowded (collisions, full branches) to sparse, each with some tags.
fn records() -> impl Strategy<Value = Vec<ItemRecord>> {
    let shape = (1_usize..5, prop_oneof![Just(2_u32), Just(4), Just(30)]);
    let items = shape.prop_flat_map(|(depth, codes)| {
        let item = (proptest::collection::vec(0..codes, depth), subsequence(TAGS.to_vec(), 0..=TAGS.len()));
        proptest::collection::vec(item, 1..150)
    });
    items.prop_map(|items| {
        items.iter().enumerate().map(|(number, (path, tags))| record(number, path, tags)).collect()
    })
}

/// A request with owned lists. Item numbers past the end of the catalog stand for unknown items.
#[derive(Clone, Debug)]
struct Request {
    exclude: Vec<String>,
    seen: Vec<ItemIndex>,
    require: Vec<String>,
    forbid: Vec<String>,
    allow: Option<Vec<String>>,
}

impl Request {
    fn spec(&self) -> FilterSpec<'_> {
        FilterSpec {
            exclude_items: &self.exclude,
            exclude_seen: &self.seen,
            require_tags: &self.require,
            forbid_tags: &self.forbid,
            allow_items: self.allow.as_deref(),
        }
    }

    fn allows(&self, item: ItemIndex, record: &ItemRecord) -> bool {
        !self.exclude.contains(&record.item_id)
            && !self.seen.contains(&item)
            && self.require.iter().all(|tag| record.tags.contains(tag))
            && !self.forbid.iter().any(|tag| record.tags.contains(tag))
            && self.allow.as_ref().is_none_or(|allow| allow.contains(&record.item_id))
    }
}

fn requests() -> impl Strategy<Value = Request> {
    let ids = |longest| {
        proptest::collection::vec((0_usize..170).prop_map(|number| format!("item {number}")), 0..longest)
    };
    // Mostly no tags, so that the other restrictions are seen alone too; "gone" is a tag that no item has.
    let tags = || {
        let known = subsequence(TAGS.to_vec(), 0..3);
        let tags = prop_oneof![4 => Just(Vec::new()), 4 => known, 1 => Just(vec!["gone"])];
        tags.prop_map(|tags| tags.into_iter().map(str::to_owned).collect::<Vec<_>>())
    };
    let seen = proptest::collection::vec((0_u32..170).prop_map(ItemIndex), 0..60);
    let allow = prop_oneof![2 => Just(None), 1 => ids(80).prop_map(Some)];
    (prop_oneof![ids(4), ids(120)], seen, tags(), tags(), allow)
        .prop_map(|(exclude, seen, require, forbid, allow)| Request { exclude, seen, require, forbid, allow })
}

fn check_filter(catalog: &Catalog, records: &[ItemRecord], request: &Request) {
    let filter = catalog.filter(&request.spec());
    let allowed: Vec<&ItemRecord> = catalog
        .items()
        .zip(records)
        .filter(|&(item, record)| request.allows(item, record))
        .map(|(_, r)| r)
        .collect();
    for (item, record) in catalog.items().zip(records) {
        assert_eq!(filter.allows_item(item), request.allows(item, record), "{}", record.item_id);
    }
    assert!(!filter.allows_item(ItemIndex(records.len() as u32)));
    assert_eq!(filter.num_items_allowed(), allowed.len());

    // Exact at every level: a node is allowed exactly when an allowed item lies below it.
    let trie = catalog.trie();
    let paths: BTreeSet<Vec<u32>> = allowed.iter().map(|record| path_of(record)).collect();
    assert_eq!(filter.num_leaves_allowed(), paths.len());
    for level in 0..=catalog.depth() {
        for index in 0..trie.num_nodes(level) as u32 {
            let leaves = trie.leaves(Node { level: level as u8, index });
            let mut prefix = Vec::new();
            trie.path(Leaf(leaves.start), &mut prefix);
            prefix.truncate(level);
            let below = paths.iter().filter(|path| path.starts_with(&prefix)).count();
            assert_eq!(filter.allows_any(leaves.clone()), below > 0, "{prefix:?}");
            assert_eq!(filter.count(leaves), below, "{prefix:?}");
        }
    }
    assert!(
        (0..catalog.num_leaves() as u32)
            .all(|leaf| filter.allows_leaf(Leaf(leaf)) == filter.allows_any(leaf..leaf + 1))
    );
    if filter.is_unrestricted() {
        assert_eq!(allowed.len(), records.len());
    }

    let known: BTreeSet<&String> = records.iter().map(|record| &record.item_id).collect();
    let named: BTreeSet<&String> = request.exclude.iter().chain(request.allow.iter().flatten()).collect();
    assert_eq!(filter.unknown_items().len(), named.difference(&known).count());
    assert!(filter.unknown_items().iter().all(|id| named.contains(id) && !known.contains(id)));
    let in_use: BTreeSet<&String> = records.iter().flat_map(|record| &record.tags).collect();
    let asked: BTreeSet<&String> = request.require.iter().chain(&request.forbid).collect();
    assert!(
        filter.unknown_tags().iter().collect::<BTreeSet<_>>() == asked.difference(&in_use).copied().collect()
    );
}

proptest! {
    #[test]
    fn filters_agree_with_asking_every_item(
        records in records(),
        requests in proptest::collection::vec(requests(), 1..6),
    ) {
        let catalog = build(&records);
        for request in &requests {
            // Checked twice: the second time the tags are remembered.
            check_filter(&catalog, &records, request);
            check_filter(&catalog, &records, request);
        }
    }

    #[test]
    fn items_keep_everything_they_came_with(records in records()) {
        let catalog = build(&records);
        let mut by_path: BTreeMap<Vec<u32>, Vec<ItemIndex>> = BTreeMap::new();
        for (item, record) in catalog.items().zip(&records) {
            by_path.entry(path_of(record)).or_default().push(item);
            prop_assert_eq!(catalog.item(&record.item_id), Some(item));
            prop_assert_eq!(catalog.item_id(item), &record.item_id);
            prop_assert_eq!(catalog.title(item), record.title.as_deref());
            prop_assert!(catalog.tags(item).collect::<BTreeSet<_>>() == record.tags.iter().map(String::as_str).collect());
            prop_assert_eq!(&catalog.sid_parts(catalog.leaf_of(item)), &record.sid);
        }
        prop_assert_eq!(catalog.item("nobody"), None);
        prop_assert_eq!(catalog.num_items(), records.len());
        prop_assert_eq!(catalog.num_leaves(), by_path.len());
        for (leaf, (path, items)) in by_path.iter().enumerate() {
            prop_assert_eq!(catalog.items_of(Leaf(leaf as u32)), &items[..]);
            let node = catalog.trie().walk(path).unwrap();
            prop_assert_eq!(catalog.trie().leaf(node), Some(Leaf(leaf as u32)));
        }
        let report = catalog.report();
        prop_assert_eq!(report.collisions.largest, by_path.values().map(Vec::len).max().unwrap());
        prop_assert_eq!(report.collisions.leaves, by_path.values().filter(|items| items.len() > 1).count());
        prop_assert_eq!(report.memory_bytes, catalog.memory_bytes());
    }
}

#[test]
fn the_default_restricts_nothing() {
    let catalog = build(&[record(0, &[1, 2], &[]), record(1, &[1, 3], &["new"])]);
    let filter = catalog.filter(&FilterSpec::default());
    assert!(filter.is_unrestricted());
    let unknown = ["nobody".to_owned(), "nobody".to_owned()];
    let filter = catalog.filter(&FilterSpec { exclude_items: &unknown, ..FilterSpec::default() });
    assert!(filter.is_unrestricted());
    assert_eq!(filter.unknown_items(), ["nobody"]);
}

#[test]
fn a_collision_is_allowed_until_its_last_item_is_excluded() {
    let catalog = build(&[record(0, &[1, 2], &[]), record(1, &[1, 2], &[]), record(2, &[3, 4], &[])]);
    assert_eq!(catalog.num_leaves(), 2);
    let excluding = |seen: &[u32]| {
        let seen: Vec<ItemIndex> = seen.iter().map(|&item| ItemIndex(item)).collect();
        catalog.filter(&FilterSpec { exclude_seen: &seen, ..FilterSpec::default() })
    };
    let one = excluding(&[0]);
    assert!(one.allows_any(0..1) && !one.allows_item(ItemIndex(0)) && one.allows_item(ItemIndex(1)));
    assert!(!one.is_unrestricted());
    let both = excluding(&[1, 0, 1]);
    assert!(!both.allows_any(0..1) && both.allows_any(0..2) && both.num_leaves_allowed() == 1);
    let all = excluding(&[0, 1, 2, 99]);
    assert!(!all.allows_any(0..2) && all.num_items_allowed() == 0);
}

#[test]
fn an_allow_list_may_be_empty_and_a_required_tag_unknown() {
    let catalog = build(&[record(0, &[1], &["new"]), record(1, &[2], &[])]);
    let none = catalog.filter(&FilterSpec { allow_items: Some(&[]), ..FilterSpec::default() });
    assert!(!none.allows_any(0..2) && !none.is_unrestricted());
    let tags = ["gone".to_owned()];
    let require = catalog.filter(&FilterSpec { require_tags: &tags, ..FilterSpec::default() });
    assert!(!require.allows_any(0..2) && !require.allows_item(ItemIndex(0)));
    assert_eq!(require.unknown_tags(), ["gone"]);
    let forbid = catalog.filter(&FilterSpec { forbid_tags: &tags, ..FilterSpec::default() });
    assert!(forbid.is_unrestricted() && forbid.unknown_tags() == ["gone"]);
}
