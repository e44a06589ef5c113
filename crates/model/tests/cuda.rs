//! The CUDA path: the forward pass, the search and the executor, against Hugging Face in double
//! precision and against itself. The device is the CPU unless the feature `cuda` is on and
//! `BEAMLINE_GPU` names a graphics processor.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

mod common;
#[path = "common/emulated.rs"]
mod emulated;
#[path = "common/moved.rs"]
mod moved;

use std::collections::BTreeMap;
use std::sync::Arc;

use beamline_catalog::{Filter, FilterSpec, SetArrays};
use beamline_compute::cuda::device::{Device, Queue};
use beamline_compute::cuda::kernels;
use beamline_compute::cuda::pages::DevicePages;
use beamline_compute::cuda::transfers::PageTransfers;
use beamline_kv_cache::{KvCache, Namespace, PageId, Publish, Transfer};
use beamline_model::cuda::decoder::DeviceDecoder;
use beamline_model::decode::{Hypothesis, Normalization, SearchRequest};
use beamline_model::executor::Executor;
use beamline_model::executor::cuda::DeviceBackend;
use beamline_model::task::{Job, Task};
use common::{CASES, Loaded, Queued, cases, ids, numbers, run, run_together, running, strings};
use emulated::{device, on_gpu};
use serde_json::Value;

/// Most that a single score may be off. Scores are sums of three and more log-probabilities, from logits
/// of up to 15, each rounded to one part in 256 in every layer.
const SCORES: f64 = 0.5;
/// Most that the root mean square of the scores may be off.
const MEAN: f64 = 0.1;
/// Paths of a beam of 50 that are the same.
const OVERLAP: f64 = 0.95;

fn executor(
    device: &Arc<dyn Device>,
    loaded: &Loaded,
    pages: usize,
) -> Executor<DeviceBackend<DeviceDecoder>> {
    let model = DeviceDecoder::load(device, &loaded.checkpoint, 2048).unwrap();
    Executor::on_device(Arc::new(model), pages).unwrap()
}

fn prompts(loaded: &Loaded, record: &Value) -> BTreeMap<String, Vec<u32>> {
    let prompt = |p: &Value| (p["name"].as_str().unwrap().to_owned(), loaded.prompt(&strings(&p["history"])));
    record["prompts"].as_array().unwrap().iter().map(prompt).collect()
}

#[test]
fn beams_are_those_of_hugging_face_to_the_tolerance_of_bf16() {
    let Some(device) = device() else { return };
    for case in CASES {
        let loaded = Loaded::open(case);
        let record = cases(case);
        let prompts = prompts(&loaded, &record);
        let filters: BTreeMap<&str, Vec<String>> = record["filters"]
            .as_array()
            .unwrap()
            .iter()
            .map(|f| (f["name"].as_str().unwrap(), strings(&f["exclude"])))
            .collect();
        let mut executor = executor(&device, &loaded, 512);
        let (mut kept, mut all, mut squares) = (0, 0, 0.0);
        // The emulation is slow; all of them where there is a graphics processor, unless that is a stand-in.
        let every = std::env::var("BEAMLINE_EVERY").map(|every| every.parse().unwrap());
        let step = every.unwrap_or(if on_gpu() { 1 } else { 7 });
        for beam in record["beams"].as_array().unwrap().iter().step_by(step) {
            let what = format!(
                "{case} {} {} {} {}",
                beam["prompt"], beam["normalization"], beam["beam_width"], beam["filter"]
            );
            let normalization = match beam["normalization"].as_str().unwrap() {
                "full_vocab" => Normalization::FullVocab,
                _ => Normalization::AllowedSet,
            };
            let leaves = loaded.catalog.num_leaves();
            let width = beam["beam_width"].as_u64().map_or(leaves, |width| width as usize);
            let exclude = beam["filter"].as_str().map_or(&[][..], |name| &filters[name]);
            let job = loaded.job(prompts[beam["prompt"].as_str().unwrap()].clone(), exclude, normalization);
            let filter = job.search().unwrap().filter.clone();
            let found = run(&mut executor, job, width, 100).unwrap().hypotheses;
            let expected: Vec<Vec<u32>> = beam["tokens"].as_array().unwrap().iter().map(ids).collect();
            let scores = numbers(&beam["scores"]);
            assert_eq!(found.len(), expected.len(), "{what}");
            assert!(found.iter().all(|hypothesis| filter.allows_leaf(hypothesis.leaf)), "{what}: allowed");
            assert!(found.windows(2).all(|pair| pair[0].score >= pair[1].score), "{what}: sorted");
            let paths: Vec<Vec<u32>> = found.iter().map(|h| loaded.tokens_of(h.leaf)).collect();
            for (hypothesis, path) in found.iter().zip(&paths) {
                let Some(place) = expected.iter().position(|other| other == path) else { continue };
                let difference = (hypothesis.score - scores[place]).abs();
                assert!(difference < SCORES, "{what}: {path:?} is off by {difference}");
                squares += difference * difference;
                kept += 1;
            }
            all += expected.len();
            // A prefix that was kept by less than the tolerance may be lost, and the best with it.
            let is_clear = beam["smallest_cut_gap"].as_f64().is_none_or(|gap| gap > SCORES);
            if is_clear && scores.len() > 1 && scores[0] - scores[1] > SCORES {
                assert_eq!(paths[0], expected[0], "{what}: the best");
            }
        }
        let overlap = f64::from(kept) / all as f64;
        let mean = (squares / f64::from(kept)).sqrt();
        println!("{case}: {kept} of {all} paths are the same, scores off by {mean:.3} (root mean square)");
        assert!(overlap >= OVERLAP && mean < MEAN, "{case}: {overlap}, {mean}");
    }
}

/// Whether products round the same whatever shares them. Those of a graphics processor do not: cuBLAS
/// chooses by the number of rows. Those of the emulation do, as do those of the stand-in for a driver.
fn is_exact(device: &dyn Device) -> bool {
    !on_gpu() || device.name().contains("no GPU")
}

/// Two answers to the same request are the same: every bit, or on a graphics processor to its tolerance.
fn assert_same(device: &dyn Device, found: &[Hypothesis], alone: &[Hypothesis], what: &str) {
    if is_exact(device) {
        assert_eq!(found, alone, "{what}");
        return;
    }
    assert_eq!(found.len(), alone.len(), "{what}");
    let mut kept = 0;
    for hypothesis in found {
        if let Some(other) = alone.iter().find(|other| other.leaf == hypothesis.leaf) {
            assert!((hypothesis.score - other.score).abs() < SCORES, "{what}: {hypothesis:?} and {other:?}");
            kept += 1;
        }
    }
    assert!(f64::from(kept) >= OVERLAP * alone.len() as f64, "{what}: {kept} of {}", alone.len());
    if alone.len() > 1 && alone[0].score - alone[1].score > SCORES {
        assert_eq!(found[0].leaf, alone[0].leaf, "{what}: the best");
    }
}

#[test]
fn an_answer_does_not_depend_on_what_shares_its_steps_nor_on_chunks() {
    let Some(device) = device() else { return };
    // `BEAMLINE_ROUNDS=1000` where there is a graphics processor.
    let rounds = std::env::var("BEAMLINE_ROUNDS").map_or(1, |rounds| rounds.parse().unwrap());
    for case in ["qwen3-untied", "llama-lcrec"] {
        let loaded = Loaded::open(case);
        let prompts: Vec<Vec<u32>> = prompts(&loaded, &cases(case)).into_values().collect();
        let mut executor = executor(&device, &loaded, 1024);
        let jobs: Vec<(Job, usize)> = (0..7)
            .map(|index| {
                let normalization =
                    if index % 3 == 0 { Normalization::AllowedSet } else { Normalization::FullVocab };
                let tokens = prompts[index % prompts.len()].clone();
                (loaded.job(tokens, &[], normalization), [1, 50, 7, 20, 33, 64, 16][index])
            })
            .collect();
        let alone: Vec<Vec<Hypothesis>> = jobs
            .iter()
            .map(|(job, width)| run(&mut executor, job.clone(), *width, 1000).unwrap().hypotheses)
            .collect();
        for round in 0..rounds {
            for rows in [1000, 17, 1 + round % 7] {
                // Other neighbours, in other places, every round.
                let mut order: Vec<usize> = (0..jobs.len()).collect();
                order.rotate_left(round % jobs.len());
                order.truncate(jobs.len() - round % 3);
                let queued = |&index: &usize| Queued::of(jobs[index].0.clone(), jobs[index].1);
                let found = run_together(&mut executor, order.iter().map(queued).collect(), rows);
                for (found, &index) in found.iter().zip(&order) {
                    assert_same(
                        &*device,
                        &found.as_ref().unwrap().as_found().unwrap().hypotheses,
                        &alone[index],
                        &format!("{case}: job {index}, round {round}, chunks of {rows}"),
                    );
                }
            }
        }
    }
}

#[test]
fn given_candidates_score_as_they_do_among_all() {
    let Some(device) = device() else { return };
    let loaded = Loaded::open("qwen3-untied");
    let prompts = prompts(&loaded, &cases("qwen3-untied"));
    let mut executor = executor(&device, &loaded, 512);
    let leaves = loaded.catalog.num_leaves();
    for normalization in [Normalization::FullVocab, Normalization::AllowedSet] {
        let job = loaded.job(prompts["h2"].clone(), &[], normalization);
        let all = run(&mut executor, job.clone(), leaves, 100).unwrap().hypotheses;
        let given: Vec<String> = (0..12).map(|at| format!("{}", at * 9)).collect();
        let ids: Vec<String> = given
            .iter()
            .filter_map(|at| loaded.catalog.items().nth(at.parse().unwrap()))
            .map(|item| loaded.catalog.item_id(item).to_owned())
            .collect();
        let mut only = job;
        let mut search = only.search().unwrap().clone();
        let filter = loaded.catalog.filter(&FilterSpec { allow_items: Some(&ids), ..FilterSpec::default() });
        search.normalize_over = Some(Box::new(search.filter.clone()));
        search.filter = filter;
        only.task = Task::Search(Arc::new(search));
        let found = run(&mut executor, only, leaves, 100).unwrap().hypotheses;
        assert_eq!(found.len(), ids.len());
        for hypothesis in found {
            let same = all.iter().find(|other| other.leaf == hypothesis.leaf).unwrap();
            assert_same(&*device, &[hypothesis], &[*same], &format!("{normalization:?}"));
        }
    }
}

#[test]
fn a_filter_leaves_what_it_allows_in_the_same_order_however_it_is_kept() {
    let Some(device) = device() else { return };
    let loaded = Loaded::open("qwen3-collisions");
    let tokens = prompts(&loaded, &cases("qwen3-collisions"))["h2"].clone();
    let mut executor = executor(&device, &loaded, 512);
    let leaves = loaded.catalog.num_leaves();
    let job = loaded.job(tokens, &[], Normalization::FullVocab);
    let all = run(&mut executor, job.clone(), leaves, 100).unwrap().hypotheses;
    let every = |step: usize| -> Vec<String> {
        loaded.catalog.items().step_by(step).map(|item| loaded.catalog.item_id(item).to_owned()).collect()
    };
    // One word for each of the ways in which a filter is kept.
    let kind = |filter: &Filter| match filter.leaf_arrays() {
        SetArrays::All { removed: [] } => "all",
        SetArrays::All { .. } => "all but a few",
        SetArrays::Bits { .. } => "bits",
        SetArrays::Listed { .. } => "listed",
    };
    let (few, many) = (every(149), every(2));
    let specs = [
        FilterSpec::default(),
        FilterSpec { exclude_items: &few, ..FilterSpec::default() },
        FilterSpec { exclude_items: &many, ..FilterSpec::default() },
        FilterSpec { allow_items: Some(&few), ..FilterSpec::default() },
        FilterSpec { allow_items: Some(&many), ..FilterSpec::default() },
    ];
    let mut kinds = Vec::new();
    for spec in specs {
        let filter = loaded.catalog.filter(&spec);
        kinds.push(kind(&filter));
        let mut filtered = job.clone();
        let search = SearchRequest { filter: filter.clone(), ..job.search().unwrap().clone() };
        filtered.task = Task::Search(Arc::new(search));
        let found = run(&mut executor, filtered, leaves, 100).unwrap().hypotheses;
        let expected: Vec<Hypothesis> =
            all.iter().filter(|hypothesis| filter.allows_leaf(hypothesis.leaf)).copied().collect();
        assert!(!expected.is_empty());
        assert_same(&*device, &found, &expected, kinds[kinds.len() - 1]);
    }
    kinds.sort_unstable();
    kinds.dedup();
    assert_eq!(kinds, ["all", "all but a few", "bits", "listed"], "every way was met");
}

#[test]
fn a_context_that_was_moved_away_and_back_changes_no_bit() {
    let Some(device) = device() else { return };
    for case in CASES {
        let loaded = Loaded::open(case);
        let config = loaded.model.config();
        let padded_dim = kernels::padded_dim(config.head_dim).unwrap();
        let page_bytes = DevicePages::bytes_per_page(config.layers, config.kv_heads, [padded_dim; 2]);
        let [cold, warm] =
            moved::cold_and_brought_back(&loaded, page_bytes, |pages| executor(&device, &loaded, pages));
        assert_same(&*device, &warm.hypotheses, &cold.hypotheses, case);
    }
}

/// A cache whose pages are to leave, with the pages of the device, the transfers of the executor, the words
/// of the pages, and what is to be moved. Contents of the pages may still be on their way to the device.
fn leaving_pages(device: &Arc<dyn Device>) -> (DevicePages, PageTransfers, KvCache, Vec<u32>, Vec<Transfer>) {
    let pages = DevicePages::new(device, 3, 2, [16, 32], running::PAGES).unwrap();
    let mut transfers = PageTransfers::new(device, &pages);
    let mut cache = running::cache(pages.page_bytes());
    let words: Vec<u32> = (0..4 * 32).collect();
    let (mut table, mut taken, mut leaving) = (Vec::new(), Vec::new(), Vec::new());
    transfers.begin(&pages, &[]).unwrap();
    cache.allocate(4, &mut table).unwrap();
    for index in 0..4 {
        assert_eq!(cache.publish(&namespace(), &table, index, &words), Publish::Published);
    }
    cache.release_chain(&table);
    for &page in &table {
        let mut at = 0;
        for (address, bytes) in pages.parts(page) {
            device.upload(&contents(page)[at..at + bytes], address).unwrap();
            at += bytes;
        }
    }
    let used: Vec<u32> = table.iter().map(|page| page.0).collect();
    transfers.end(device.keep_pace().unwrap(), &used);
    cache.allocate(running::PAGES, &mut taken).unwrap();
    cache.take_transfers(&mut leaving);
    cache.release_chain(&taken);
    assert_eq!(leaving.len(), 4);
    (pages, transfers, cache, words, leaving)
}

fn namespace() -> Namespace {
    Namespace::new(b"model", b"")
}

fn contents(page: PageId) -> Vec<u8> {
    (0..DevicePages::bytes_per_page(3, 2, [16, 32])).map(|at| (at * 31 + page.0 as usize * 7) as u8).collect()
}

#[test]
fn pages_come_back_into_other_places_bit_for_bit() {
    let Some(device) = device() else { return };
    let (pages, mut transfers, _cache, _, leaving) = leaving_pages(&device);
    transfers.begin(&pages, &leaving).unwrap();
    transfers.end(device.keep_pace().unwrap(), &[]);
    running::wait_for_arrival(&leaving);
    let places = |transfer: &Transfer| (transfer.page(), PageId(transfer.page().0 + 20));
    let back: Vec<Transfer> = leaving
        .iter()
        .map(|transfer| Transfer::Import {
            from: Arc::clone(transfer.leaving().unwrap().1),
            page: places(transfer).1,
        })
        .collect();
    transfers.begin(&pages, &back).unwrap();
    assert_eq!(transfers.arrivals(&[1, 2, 3]).len(), 0, "who reads none of them waits for none");
    let arrivals = transfers.arrivals(&[back[2].page().0]);
    assert_eq!(arrivals.len(), 3, "one mark for each layer");
    device.order(arrivals[2], Queue::Compute).unwrap();
    for (page, place) in leaving.iter().map(places) {
        let mut found = Vec::new();
        for (address, bytes) in pages.parts(place) {
            let mut part = vec![0; bytes];
            device.download(address, &mut part).unwrap();
            found.extend(part);
        }
        assert_eq!(found, contents(page));
    }
}

#[test]
fn a_page_leaves_after_the_last_step_that_used_it() {
    if on_gpu() {
        return;
    }
    let Some(emulated) = emulated::Emulated::new() else { return };
    let device: Arc<dyn Device> = emulated.clone();
    let (pages, mut transfers, _cache, _, leaving) = leaving_pages(&device);
    let later = device.mark(Queue::Compute).unwrap();
    transfers.begin(&pages, &[]).unwrap();
    assert_eq!(emulated.transfers_come_after(), 0, "nothing leaves");
    transfers.begin(&pages, &leaving[..1]).unwrap();
    assert_eq!(
        emulated.transfers_come_after(),
        later.number + 1,
        "the step before began and has not ended: it may have used any page"
    );
    let (pages, mut transfers, _cache, _, leaving) = leaving_pages(&device);
    let later = device.mark(Queue::Compute).unwrap();
    transfers.begin(&pages, &leaving).unwrap();
    assert_eq!(emulated.transfers_come_after(), later.number - 1, "the end of the step that wrote them");
}

#[test]
fn a_page_is_believed_when_its_copy_is_known_to_have_succeeded() {
    if on_gpu() {
        return;
    }
    let Some(emulated) = emulated::Emulated::new() else { return };
    let device: Arc<dyn Device> = emulated.clone();
    for fails in [false, true] {
        let (pages, mut transfers, mut cache, words, leaving) = leaving_pages(&device);
        if fails {
            emulated.fail_transfers();
        }
        transfers.begin(&pages, &leaving).unwrap();
        let mut found = || {
            let mut back = Vec::new();
            cache.match_host(&namespace(), &words, words.len(), &[], &mut back)
        };
        assert_eq!(found(), 0, "it is on its way");
        assert_eq!(found(), if fails { 0 } else { words.len() });
        let import = Transfer::Import { from: Arc::clone(leaving[0].leaving().unwrap().1), page: PageId(9) };
        assert_eq!(transfers.begin(&pages, &[import]).is_err(), fails);
        assert_eq!(found(), if fails { 0 } else { words.len() }, "nothing changes that");
    }
}
