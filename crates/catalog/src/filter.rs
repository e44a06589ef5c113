//! The items that one request allows: exclusions, seen items, tags and an allow list, ANDed into
//! one set of leaves and one of items.
//!
//! A filter is composed once per request. The beam search asks it once per candidate child in every
//! step, always about an interval of leaves. It owns what it needs and may outlive the borrow of
//! its catalog.
//!
//! With collisions a leaf is allowed while at least one of its items is; [`Filter::allows_item`]
//! then tells which.

use std::ops::Range;

use hashbrown::HashSet;

use crate::index_set::{IndexSet, SetArrays};
use crate::tag_filter::TagRule;
use crate::{Catalog, ItemIndex, Leaf, narrow};

/// The restrictions of a request. The default allows everything.
#[derive(Clone, Copy, Debug, Default)]
pub struct FilterSpec<'a> {
    /// Ids of items that must not be returned. Unknown ids have no effect.
    pub exclude_items: &'a [String],
    /// Items that must not be returned because the user has seen them, already looked up.
    pub exclude_seen: &'a [ItemIndex],
    /// An item must have all of these tags. A tag that no item has allows nothing.
    pub require_tags: &'a [String],
    /// An item must have none of these tags. A tag that no item has has no effect.
    pub forbid_tags: &'a [String],
    /// If given, only these items may be returned. Unknown ids have no effect.
    pub allow_items: Option<&'a [String]>,
}

/// The leaves and items of one catalog that one request allows.
#[derive(Clone, Debug)]
pub struct Filter {
    leaves: IndexSet,
    items: IndexSet,
    unknown_items: Vec<String>,
    unknown_tags: Vec<String>,
}

impl Filter {
    /// Composes the filter. The work is proportional to the length of the request's lists. A
    /// combination of tags that was not used lately costs one pass over the items as well.
    pub(crate) fn compose(catalog: &Catalog, spec: &FilterSpec<'_>) -> Self {
        let mut unknown_items = Unknown::default();
        let mut unknown_tags = Unknown::default();

        let mut excluded = unknown_items.look_up(spec.exclude_items, |id| catalog.item(id));
        excluded.extend(spec.exclude_seen.iter().filter(|item| (item.0 as usize) < catalog.num_items()));
        excluded.sort_unstable();
        excluded.dedup();
        let allowed = spec.allow_items.map(|ids| unknown_items.look_up(ids, |id| catalog.item(id)));

        let require = unknown_tags.look_up(spec.require_tags, |tag| catalog.tag_table().find(tag));
        let satisfiable = require.len() == spec.require_tags.len();
        let forbid = unknown_tags.look_up(spec.forbid_tags, |tag| catalog.tag_table().find(tag));

        let (leaves, items) = if satisfiable {
            let tagged = by_tags(catalog, TagRule::new(require, forbid));
            match allowed {
                Some(allowed) => among(catalog, allowed, &tagged.1, &excluded),
                None => excluding(catalog, tagged, &excluded),
            }
        } else {
            (IndexSet::empty(narrow(catalog.num_leaves())), IndexSet::empty(narrow(catalog.num_items())))
        };
        Self { leaves, items, unknown_items: unknown_items.names, unknown_tags: unknown_tags.names }
    }

    /// Whether an interval of leaves, such as [`Trie::leaves`](crate::Trie::leaves) of a child,
    /// holds an allowed leaf.
    #[inline]
    pub fn allows_any(&self, leaves: Range<u32>) -> bool {
        self.leaves.any(leaves)
    }

    /// The raw arrays of the set of allowed leaves.
    pub fn leaf_arrays(&self) -> SetArrays<'_> {
        self.leaves.arrays()
    }

    /// Whether a leaf holds an allowed item.
    pub fn allows_leaf(&self, leaf: Leaf) -> bool {
        self.leaves.contains(leaf.0)
    }

    /// Whether an item may be returned.
    pub fn allows_item(&self, item: ItemIndex) -> bool {
        self.items.contains(item.0)
    }

    /// How many leaves of an interval are allowed.
    pub fn count(&self, leaves: Range<u32>) -> usize {
        self.leaves.count(leaves) as usize
    }

    /// How many leaves are allowed in all.
    pub fn num_leaves_allowed(&self) -> usize {
        self.leaves.len() as usize
    }

    /// How many items are allowed in all.
    pub fn num_items_allowed(&self) -> usize {
        self.items.len() as usize
    }

    /// Whether the filter restricts nothing and can be skipped.
    pub fn is_unrestricted(&self) -> bool {
        self.items.is_all() && self.leaves.is_all()
    }

    /// Excluded and allowed ids that the catalog does not have, in order of first mention.
    pub fn unknown_items(&self) -> &[String] {
        &self.unknown_items
    }

    /// Required and forbidden tags that no item of the catalog has, in order of first mention.
    pub fn unknown_tags(&self) -> &[String] {
        &self.unknown_tags
    }
}

/// Leaves and items, in this order.
type Sets = (IndexSet, IndexSet);

fn by_tags(catalog: &Catalog, rule: TagRule) -> Sets {
    if rule.is_empty() {
        return (IndexSet::all(narrow(catalog.num_leaves())), IndexSet::all(narrow(catalog.num_items())));
    }
    let selection = catalog.tag_selection(rule);
    (IndexSet::bits(selection.leaves.clone()), IndexSet::bits(selection.items.clone()))
}

/// The items of `allowed` that are in `tagged` and not in `excluded`, which is sorted.
fn among(catalog: &Catalog, mut allowed: Vec<ItemIndex>, tagged: &IndexSet, excluded: &[ItemIndex]) -> Sets {
    allowed.retain(|item| tagged.contains(item.0) && excluded.binary_search(item).is_err());
    allowed.sort_unstable();
    allowed.dedup();
    let leaves = leaves_of(catalog, &allowed);
    let items = allowed.into_iter().map(|item| item.0).collect();
    (
        IndexSet::listed(leaves, narrow(catalog.num_leaves())),
        IndexSet::listed(items, narrow(catalog.num_items())),
    )
}

/// The sets without `excluded`, which is sorted and without repetitions.
fn excluding(catalog: &Catalog, (leaves, items): Sets, excluded: &[ItemIndex]) -> Sets {
    let excluded: Vec<ItemIndex> = excluded.iter().copied().filter(|item| items.contains(item.0)).collect();
    let items = items.without(excluded.iter().map(|item| item.0).collect());
    let mut emptied = leaves_of(catalog, &excluded);
    emptied.retain(|&leaf| !catalog.items_of(Leaf(leaf)).iter().any(|item| items.contains(item.0)));
    (leaves.without(emptied), items)
}

/// The leaves of `items`, sorted, without repetitions.
fn leaves_of(catalog: &Catalog, items: &[ItemIndex]) -> Vec<u32> {
    let mut leaves: Vec<u32> = items.iter().map(|&item| catalog.leaf_of(item).0).collect();
    leaves.sort_unstable();
    leaves.dedup();
    leaves
}

/// Names that were not found, each once.
#[derive(Default)]
struct Unknown<'a> {
    names: Vec<String>,
    seen: HashSet<&'a str>,
}

impl<'a> Unknown<'a> {
    fn look_up<T>(&mut self, names: &'a [String], find: impl Fn(&str) -> Option<T>) -> Vec<T> {
        let mut found = Vec::with_capacity(names.len());
        for name in names {
            match find(name) {
                Some(value) => found.push(value),
                None if self.seen.insert(name) => self.names.push(name.clone()),
                None => {}
            }
        }
        found
    }
}
