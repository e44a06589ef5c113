//! The beam search alone, on given logits: ties within and at the cut, filters, tail tokens, large
//! logits. The folder is that of `BEAMLINE_CONFORMANCE`.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

mod common;

use std::collections::HashMap;
use std::sync::Arc;

use beamline_catalog::{Catalog, CatalogLimits, FilterSpec, ItemRecord, SidPart, SymbolTable};
use beamline_compute::cpu::isa::Isa;
use beamline_model::decode::{Normalization, Search, SearchRequest, Step};
use common::{folder, ids, numbers, strings};
use serde_json::Value;

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

/// A table with its last `tail` tokens generated as fixed steps instead of levels.
struct Table<'a> {
    catalog: Arc<Catalog>,
    steps: Arc<[Step]>,
    logits: HashMap<Vec<u32>, Vec<f32>>,
    value: &'a Value,
}

impl<'a> Table<'a> {
    fn new(value: &'a Value, tail: &[u32]) -> Self {
        let items = value["catalog"].as_array().unwrap();
        let records = items.iter().map(|item| {
            let path = ids(&item["path"]);
            ItemRecord {
                item_id: item["item_id"].as_str().unwrap().to_owned(),
                sid: path[..path.len() - tail.len()].iter().map(|&token| SidPart::Code(token)).collect(),
                tags: Vec::new(),
                title: None,
            }
        });
        let catalog = Catalog::from_records(records, &Ids, &CatalogLimits::default()).unwrap();
        let levels = value["generated_steps"].as_u64().unwrap() as usize - tail.len();
        let steps =
            std::iter::repeat_n(Step::Level, levels).chain(tail.iter().map(|&token| Step::Fixed(token)));
        let logits = value["logits"].as_array().unwrap().iter();
        let logits =
            logits.map(|row| (ids(&row["prefix"]), numbers(&row["row"]).iter().map(|&x| x as f32).collect()));
        Self { catalog: Arc::new(catalog), steps: steps.collect(), logits: logits.collect(), value }
    }

    /// `thrifty` offers the best beams first, and no more of them than are worthwhile.
    fn search(&self, beam: &Value, thrifty: bool) -> (Vec<Vec<u32>>, Vec<f64>, Vec<Vec<String>>) {
        let exclude = strings(&beam["exclude"]);
        let filter = self.catalog.filter(&FilterSpec { exclude_items: &exclude, ..FilterSpec::default() });
        let normalization = match beam["normalization"].as_str().unwrap() {
            "full_vocab" => Normalization::FullVocab,
            _ => Normalization::AllowedSet,
        };
        let request = SearchRequest {
            catalog: Arc::clone(&self.catalog),
            filter: filter.clone(),
            start: self.catalog.trie().root(),
            steps: Arc::clone(&self.steps),
            normalize_over: None,
            widths: None,
            normalization,
        };
        let width = beam["beam_width"].as_u64().map_or(self.catalog.num_leaves(), |width| width as usize);
        let mut search = Search::new(request, width);
        let mut paths: Vec<Vec<u32>> = search.beams().iter().map(|_| Vec::new()).collect();
        while !search.is_over() {
            if thrifty {
                let mut beam = 0;
                while beam < search.worthwhile() {
                    search.offer(Isa::detect(), beam, &self.logits[&paths[beam]]).unwrap();
                    beam += 1;
                }
            } else {
                // Offered in reverse: the order must not matter.
                for (beam, path) in paths.iter().enumerate().rev() {
                    search.offer(Isa::detect(), beam, &self.logits[path]).unwrap();
                }
            }
            let step = search.steps_done();
            search.advance();
            // A beam's own path, rebuilt from the rows of its ancestors.
            let parents = |beam: usize| -> usize {
                if step == 0 { 0 } else { search.lineage(beam)[step - 1] as usize }
            };
            paths = (0..search.beams().len())
                .map(|beam| {
                    let mut path = paths[parents(beam)].clone();
                    path.push(search.beams()[beam].token);
                    path
                })
                .collect();
        }
        let found = search.hypotheses();
        let items = found.iter().map(|hypothesis| {
            let items =
                self.catalog.items_of(hypothesis.leaf).iter().filter(|item| filter.allows_item(**item));
            items.map(|item| self.catalog.item_id(*item).to_owned()).collect()
        });
        (paths, found.iter().map(|hypothesis| hypothesis.score).collect(), items.collect())
    }

    fn check(&self) {
        let largest = self.logits.values().flatten().fold(0.0f32, |max, x| max.max(x.abs()));
        for beam in self.value["beams"].as_array().unwrap() {
            let what = format!(
                "{} {} {} {}",
                self.value["name"], beam["normalization"], beam["beam_width"], beam["exclude"]
            );
            let found = self.search(beam, false);
            assert_eq!(found, self.search(beam, true), "{what}: with and without what is not worthwhile");
            let (paths, scores, items) = found;
            let expected: Vec<Vec<u32>> = beam["tokens"].as_array().unwrap().iter().map(ids).collect();
            assert_eq!(paths, expected, "{what}");
            let expected: Vec<Vec<String>> = beam["items"].as_array().unwrap().iter().map(strings).collect();
            assert_eq!(items, expected, "{what}");
            for (score, expected) in scores.iter().zip(numbers(&beam["scores"])) {
                let tolerance = 2e-6 * expected.abs().max(1.0) + 1e-7 * f64::from(largest);
                assert!((score - expected).abs() <= tolerance, "{what}: {score} against {expected}");
            }
        }
    }
}

#[test]
fn lists_are_equal_ties_included() {
    let Some(path) = folder::find("hf/beam-tables/cases.json") else { return };
    for table in folder::read_json(&path)["tables"].as_array().unwrap() {
        Table::new(table, &[]).check();
        // The same with the tokens that end every path taken as fixed steps.
        let paths: Vec<Vec<u32>> =
            table["catalog"].as_array().unwrap().iter().map(|item| ids(&item["path"])).collect();
        let common = (0..paths[0].len() - 1)
            .take_while(|back| {
                paths.iter().all(|path| path[path.len() - 1 - back] == paths[0][paths[0].len() - 1 - back])
            })
            .count();
        if common > 0 {
            Table::new(table, &paths[0][paths[0].len() - common..]).check();
        }
    }
}
