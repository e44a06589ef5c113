//! Builds a random catalog and reports what it costs: time, memory, filters.
//!
//! ```text
//! cargo run --release -p beamline-catalog --example scale -- --items 20000000 --depth 8 --codes 2048
//! ```
#![allow(clippy::print_stdout, reason = "a report on the terminal is the purpose")]

use std::error::Error;
use std::hint::black_box;
use std::ops::Range;
use std::time::{Duration, Instant};

use beamline_catalog::{
    Catalog, CatalogLimits, Filter, FilterSpec, ItemIndex, ItemRecord, Node, SidPart, WrittenSymbols,
};

fn main() -> Result<(), Box<dyn Error>> {
    let Options { items, depth, codes } = Options::from_args(std::env::args().skip(1))?;
    println!("{items} random SIDs of depth {depth}, {codes} codes per level");

    let started = Instant::now();
    let mut random = SplitMix(1);
    let records = (0..items).map(|i| ItemRecord {
        item_id: format!("item-{i:08}"),
        sid: (0..depth).map(|_| SidPart::Code(random.below(codes))).collect(),
        tags: tags_of(i),
        title: None,
    });
    let limits = CatalogLimits { max_items: u32::MAX, ..CatalogLimits::default() };
    let catalog = Catalog::from_records(records, &WrittenSymbols::codes(), &limits)?;
    println!("built in {:.1} s, generation of the records included", started.elapsed().as_secs_f64());
    print!("{}", catalog.report());
    println!("peak resident memory {} MB, now {} MB", status_mb("VmHWM"), status_mb("VmRSS"));

    measure_filters(&catalog, &mut random);
    Ok(())
}

/// Half of the items are in stock, a hundredth belongs to each of a hundred categories.
fn tags_of(item: u32) -> Vec<String> {
    let category = format!("category-{}", item % 100);
    if item.is_multiple_of(2) { vec![category, "in_stock".to_owned()] } else { vec![category] }
}

fn measure_filters(catalog: &Catalog, random: &mut SplitMix) {
    let num_items = catalog.num_items() as u32;
    let mut some_items =
        |count: usize| -> Vec<ItemIndex> { (0..count).map(|_| ItemIndex(random.below(num_items))).collect() };
    let seen = some_items(500);
    let allow: Vec<String> =
        some_items(10_000).iter().map(|&item| catalog.item_id(item).to_owned()).collect();
    let exclude: Vec<String> = some_items(500).iter().map(|&item| catalog.item_id(item).to_owned()).collect();
    let in_stock = ["in_stock".to_owned()];
    let categories = ["category-7".to_owned(), "category-8".to_owned()];

    let nothing = FilterSpec::default();
    let seen_only = FilterSpec { exclude_seen: &seen, ..nothing };
    let excluded = FilterSpec { exclude_items: &exclude, ..nothing };
    let tagged =
        FilterSpec { exclude_seen: &seen, require_tags: &in_stock, forbid_tags: &categories, ..nothing };
    let allowed = FilterSpec { allow_items: Some(&allow), ..nothing };
    let cases = [
        ("no restriction", nothing),
        ("500 seen items", seen_only),
        ("500 excluded ids", excluded),
        ("tags + 500 seen, first time", tagged),
        ("tags + 500 seen, again", tagged),
        ("10,000 allowed ids", allowed),
    ];

    let children: Vec<Vec<Range<u32>>> =
        (1..=catalog.depth().min(3)).map(|level| ranges(catalog, level as u8, random)).collect();
    println!(
        "{:<28} {:>12} {:>12}   allows_any, ns, for nodes of level 1, 2, 3",
        "filter", "compose", "leaves"
    );
    for (name, spec) in cases {
        let started = Instant::now();
        let filter = catalog.filter(&spec);
        let composing = started.elapsed();
        let times: Vec<String> =
            children.iter().map(|ranges| format!("{:.1}", time_per_query(&filter, ranges))).collect();
        let composing = microseconds(composing);
        println!("{name:<28} {composing:>12} {:>12}   {}", filter.num_leaves_allowed(), times.join(", "));
    }
}

/// Leaf intervals of nodes of one level: runs of siblings under random parents, as a beam search
/// asks for them.
fn ranges(catalog: &Catalog, level: u8, random: &mut SplitMix) -> Vec<Range<u32>> {
    const QUERIES: usize = 1_000_000;
    let trie = catalog.trie();
    let parents = trie.num_nodes(usize::from(level) - 1) as u32;
    let mut ranges = Vec::with_capacity(QUERIES);
    while ranges.len() < QUERIES {
        let parent = Node { level: level - 1, index: random.below(parents) };
        ranges.extend(trie.children(parent).iter().map(|(_, child)| trie.leaves(child)));
    }
    ranges
}

fn time_per_query(filter: &Filter, ranges: &[Range<u32>]) -> f64 {
    let started = Instant::now();
    let allowed = ranges.iter().filter(|range| filter.allows_any((*range).clone())).count();
    black_box(allowed);
    started.elapsed().as_secs_f64() * 1e9 / ranges.len() as f64
}

fn microseconds(duration: Duration) -> String {
    format!("{:.1} us", duration.as_secs_f64() * 1e6)
}

/// A field of `/proc/self/status` in MB; 0 where there is no such file.
fn status_mb(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with(field)).unwrap_or_default();
    let kib: u64 = line.split_whitespace().nth(1).and_then(|number| number.parse().ok()).unwrap_or(0);
    kib * 1024 / 1_000_000
}

struct Options {
    items: u32,
    depth: usize,
    codes: u32,
}

impl Options {
    fn from_args(mut args: impl Iterator<Item = String>) -> Result<Self, Box<dyn Error>> {
        let mut options = Self { items: 1_000_000, depth: 8, codes: 2048 };
        while let Some(name) = args.next() {
            let value = args.next().ok_or_else(|| format!("{name} needs a value"))?;
            match name.as_str() {
                "--items" => options.items = value.parse()?,
                "--depth" => options.depth = value.parse()?,
                "--codes" => options.codes = value.parse()?,
                _ => return Err(format!("unknown option {name}; known: --items, --depth, --codes").into()),
            }
        }
        Ok(options)
    }
}

/// A small generator with a fixed seed, so that runs can be compared.
struct SplitMix(u64);

impl SplitMix {
    fn below(&mut self, limit: u32) -> u32 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^= z >> 31;
        // The high half scaled to the limit: no division, and the bias does not matter here.
        (((z >> 32) * u64::from(limit)) >> 32) as u32
    }
}
