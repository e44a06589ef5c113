//! A width for each step: the search against a naive one, on made-up catalogs and on a fixture's own logits.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

mod common;

use std::collections::BTreeSet;
use std::sync::Arc;

use beamline_catalog::{Catalog, CatalogLimits, FilterSpec, ItemRecord, SidPart, SymbolTable};
use beamline_compute::batch::{Batch, ContextRows};
use beamline_compute::cpu::isa::Isa;
use beamline_compute::cpu::kv_format::KvFormat;
use beamline_compute::cpu::pages::{PAGE_SIZE, PageStore};
use beamline_kv_cache::PageId;
use beamline_model::decode::{Normalization, Search, SearchRequest, Step};
use beamline_model::families::decoder::{Workspace, page_shape};
use beamline_model::task::{Answer, Found, Job, Task};
use common::{CASES, Loaded, Queued, run_together};
use proptest::prelude::*;

const VOCAB: usize = 8;

/// Token ids as they are.
struct Ids;

impl SymbolTable for Ids {
    fn depth(&self) -> Option<usize> {
        None
    }

    fn symbol(&self, _level: usize, part: &SidPart) -> Option<u32> {
        match part {
            SidPart::Code(code) => Some(*code),
            SidPart::Token(_) => None,
        }
    }
}

/// Paths that begin like one that is allowed, best first, `widths[i]` of them after step `i`; every path
/// of `paths` is allowed. `logits` are those after a path. Equal scores are ordered by the path. Also
/// returns the least distance of two scores that go back to different beams: rounding may change their
/// order.
fn naive(
    paths: &BTreeSet<Vec<u32>>,
    widths: &[usize],
    mut logits: impl FnMut(&[u32]) -> Vec<f32>,
) -> (Vec<(Vec<u32>, f64)>, f64) {
    let (mut beams, mut nearest) = (vec![(Vec::new(), 0.0)], f64::MAX);
    for (step, &width) in widths.iter().enumerate() {
        let mut next = Vec::new();
        for (path, score) in &beams {
            let logits: Vec<f64> = logits(path).into_iter().map(f64::from).collect();
            let largest = logits.iter().copied().fold(f64::MIN, f64::max);
            let total = logits.iter().map(|x| (x - largest).exp()).sum::<f64>().ln() + largest;
            let begins = |other: &&Vec<u32>| other.starts_with(path);
            let tokens: BTreeSet<u32> = paths.iter().filter(begins).map(|other| other[step]).collect();
            next.extend(tokens.into_iter().map(|token| {
                let path: Vec<u32> = path.iter().copied().chain([token]).collect();
                (path, score + logits[token as usize] - total)
            }));
        }
        next.sort_by(|a, b| b.1.total_cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
        let pairs = next.windows(2).filter(|pair| pair[0].0[..step] != pair[1].0[..step]);
        nearest = pairs.map(|pair| pair[0].1 - pair[1].1).fold(nearest, f64::min);
        next.truncate(width);
        beams = next;
    }
    (beams, nearest)
}

/// A number from 0 to 10 that stands for a path; coarse enough to be the same for two now and then.
fn dice(seed: u64, path: &[u32], token: usize) -> f32 {
    let mix = |x: u64| (x ^ (x >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let hash = path.iter().fold(mix(seed + 1), |hash, &token| mix(hash ^ u64::from(token + 1)));
    ((mix(hash ^ (token as u64) << 32) >> 40) % 80) as f32 / 8.0
}

fn catalog(paths: &BTreeSet<Vec<u32>>) -> Catalog {
    let records = paths.iter().enumerate().map(|(index, path)| ItemRecord {
        item_id: format!("i{index}"),
        sid: path.iter().map(|&token| SidPart::Code(token)).collect(),
        tags: Vec::new(),
        title: None,
    });
    Catalog::from_records(records, &Ids, &CatalogLimits::default()).unwrap()
}

/// What the search finds; `thrifty` offers no more beams than are worthwhile.
fn search(
    catalog: &Arc<Catalog>,
    widths: &[usize],
    width: usize,
    thrifty: bool,
    logits: impl Fn(&[u32]) -> Vec<f32>,
) -> Vec<(Vec<u32>, f64)> {
    let request = SearchRequest {
        catalog: Arc::clone(catalog),
        filter: catalog.filter(&FilterSpec::default()),
        start: catalog.trie().root(),
        steps: vec![Step::Level; widths.len()].into(),
        normalization: Normalization::FullVocab,
        normalize_over: None,
        widths: Some(widths.into()),
    };
    let mut search = Search::new(request, width);
    let mut paths: Vec<Vec<u32>> = vec![Vec::new()];
    while !search.is_over() {
        let mut beam = 0;
        while beam < if thrifty { search.worthwhile() } else { paths.len() } {
            search.offer(Isa::detect(), beam, &logits(&paths[beam])).unwrap();
            beam += 1;
        }
        let step = search.steps_done();
        search.advance();
        assert!(search.beams().len() <= search.width_at(step));
        paths = (0..search.beams().len())
            .map(|beam| {
                let parent = if step == 0 { 0 } else { search.lineage(beam)[step - 1] as usize };
                paths[parent].iter().copied().chain([search.beams()[beam].token]).collect()
            })
            .collect();
    }
    paths.into_iter().zip(search.hypotheses().iter().map(|found| found.score)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn the_best_of_each_step_survive_as_many_as_it_says(
        levels in 1usize..5,
        seed in 0u64..1000,
        paths in prop::collection::btree_set(prop::collection::vec(0u32..VOCAB as u32, 4), 1..120),
        widths in prop::collection::vec(1usize..40, 4),
        most in 1usize..60,
    ) {
        let paths: BTreeSet<Vec<u32>> = paths.into_iter().map(|path| path[..levels].to_vec()).collect();
        let catalog = Arc::new(catalog(&paths));
        let logits = |path: &[u32]| (0..VOCAB).map(|token| dice(seed, path, token)).collect::<Vec<f32>>();
        let narrowed: Vec<usize> = widths[..levels].iter().map(|&width| width.min(most)).collect();
        let (expected, nearest) = naive(&paths, &narrowed, logits);
        prop_assume!(nearest > 1e-4);
        for thrifty in [false, true] {
            let found = search(&catalog, &widths[..levels], most, thrifty, logits);
            prop_assert_eq!(found.len(), expected.len());
            for (found, expected) in found.iter().zip(&expected) {
                prop_assert_eq!(&found.0, &expected.0);
                prop_assert!((found.1 - expected.1).abs() < 1e-5, "{} against {}", found.1, expected.1);
            }
        }
    }

    #[test]
    fn equal_widths_are_one_width_bit_for_bit(
        seed in 0u64..1000,
        paths in prop::collection::btree_set(prop::collection::vec(0u32..VOCAB as u32, 3), 1..120),
        width in 1usize..60,
    ) {
        let catalog = Arc::new(catalog(&paths));
        let logits = |path: &[u32]| (0..VOCAB).map(|token| dice(seed, path, token)).collect::<Vec<f32>>();
        let equal = search(&catalog, &[width; 3], width, true, logits);
        let wide = search(&catalog, &[100; 3], width, true, logits);
        let bits = |found: &[(Vec<u32>, f64)]| -> Vec<(Vec<u32>, u64)> {
            found.iter().map(|(path, score)| (path.clone(), score.to_bits())).collect()
        };
        prop_assert_eq!(bits(&equal), bits(&wide));
    }
}

fn job(loaded: &Loaded, seed: usize, widths: Option<&[usize]>) -> Job {
    let all: Vec<String> =
        loaded.catalog.items().map(|item| loaded.catalog.item_id(item).to_owned()).collect();
    let history: Vec<String> = (0..12).map(|index| all[(seed + 7 * index) % all.len()].clone()).collect();
    let mut job = loaded.job(loaded.prompt(&history), &[], Normalization::FullVocab);
    let mut search = job.search().unwrap().clone();
    search.widths = widths.map(Arc::from);
    job.task = Task::Search(Arc::new(search));
    job
}

fn found(answer: Result<Answer, String>) -> Found {
    answer.unwrap().into_found().unwrap()
}

fn bits(found: &Found) -> Vec<(u32, u64)> {
    found.hypotheses.iter().map(|h| (h.leaf.0, h.score.to_bits())).collect()
}

/// Branch rows of a request with these widths.
fn queued(job: Job, widths: &[usize]) -> Queued<Job> {
    let (widest, rows) = (*widths.iter().max().unwrap(), widths[..widths.len() - 1].iter().sum());
    Queued { branch_rows: rows, ..Queued::of(job, widest) }
}

/// Logits after a path, by a pass over context and path as one context: no branch row is involved.
fn logits_after(loaded: &Loaded, context: &[u32], path: &[u32]) -> Vec<f32> {
    let tokens: Vec<u32> = context.iter().chain(path).copied().collect();
    let table: Vec<PageId> = (0..tokens.len().div_ceil(PAGE_SIZE) as u32).map(PageId).collect();
    let mut pages = PageStore::new(page_shape(loaded.model.config(), KvFormat::F32), table.len()).unwrap();
    let (mut batch, mut workspace) = (Batch::default(), Workspace::default());
    let (first_position, cached) = (0, 0);
    batch.push_context(ContextRows {
        owner: 0,
        tokens: &tokens,
        first_position,
        cached,
        pages: &table,
        wanted: 1,
    });
    batch.check_writes(pages.pages()).unwrap();
    loaded.model.forward(&loaded.cpu, &batch, &mut pages, &mut workspace, &mut |_, _| {});
    let mut logits = Vec::new();
    loaded.model.logits(&loaded.cpu, &workspace.hidden, &mut logits);
    logits
}

#[test]
fn rows_of_beams_of_several_widths_find_their_ancestors() {
    let loaded = Loaded::open(CASES[0]);
    let leaves = (0..loaded.catalog.num_leaves() as u32).map(beamline_catalog::Leaf);
    let paths: BTreeSet<Vec<u32>> = leaves.map(|leaf| loaded.tokens_of(leaf)).collect();
    let all = [vec![3, 40, 12], vec![40, 2, 9], vec![1, 33, 60], vec![7, 7, 7]];
    let jobs = |widths: &[usize], seed| queued(job(&loaded, seed, Some(widths)), widths);
    let together: Vec<Queued<Job>> =
        all.iter().enumerate().map(|(seed, widths)| jobs(widths, seed)).collect();
    let together = run_together(&mut loaded.executor(512), together, 50);
    for (seed, (widths, together)) in all.iter().zip(together).enumerate() {
        let found = found(run_together(&mut loaded.executor(512), vec![jobs(widths, seed)], 9).remove(0));
        assert_eq!(bits(&found), bits(&self::found(together)), "{widths:?}: whatever shares the batch");
        let context = Arc::clone(job(&loaded, seed, None).context.as_tokens().unwrap());
        let (expected, nearest) = naive(&paths, widths, |path| logits_after(&loaded, &context, path));
        assert!(nearest > 0.0);
        assert_eq!(found.hypotheses.len(), expected.len(), "{widths:?}");
        for (found, (path, score)) in found.hypotheses.iter().zip(&expected) {
            // Rows of a context and of a branch round differently: scores that nearly tie may change places.
            assert!((found.score - score).abs() < 1e-3, "{widths:?}: {} against {score}", found.score);
            let known = expected.iter().any(|(path, _)| *path == loaded.tokens_of(found.leaf));
            assert!(known || (expected[expected.len() - 1].1 - score).abs() < 1e-3, "{widths:?}: {path:?}");
        }
    }
    let mut uniform = run_together(&mut loaded.executor(512), vec![Queued::of(job(&loaded, 3, None), 7)], 50);
    let mut equal = run_together(&mut loaded.executor(512), vec![jobs(&[7, 7, 7], 3)], 50);
    assert_eq!(bits(&found(uniform.remove(0))), bits(&found(equal.remove(0))));
}
