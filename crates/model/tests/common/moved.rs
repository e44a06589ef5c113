//! A context that was computed, moved to host memory while somebody else took its pages, and brought back.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "every test uses its own part")]

use beamline_model::decode::Normalization;
use beamline_model::step::StepModel;
use beamline_model::task::{Answer, Found, Job};

use crate::common::running::{PAGES, brought_back};
use crate::common::{Loaded, Queued, run};

const WIDTH: usize = 20;

fn job(loaded: &Loaded, first: usize, items: usize) -> Job {
    let catalog = &loaded.catalog;
    let all: Vec<String> = catalog.items().map(|item| catalog.item_id(item).to_owned()).collect();
    let history: Vec<String> = (0..items).map(|item| all[(first + item * 7) % all.len()].clone()).collect();
    loaded.job(loaded.prompt(&history), &[], Normalization::FullVocab)
}

/// Results for a context that was never seen, and for one that was mostly moved away and back.
/// `executor` makes one with a number of pages, of `page_bytes` bytes each.
pub fn cold_and_brought_back<M: StepModel<Payload = Job, Answer = Answer>>(
    loaded: &Loaded,
    page_bytes: usize,
    executor: impl Fn(usize) -> M,
) -> [Found; 2] {
    let (visit, again) = (job(loaded, 3, 40), job(loaded, 3, 42));
    let cold = run(&mut executor(PAGES), again.clone(), WIDTH, usize::MAX >> 1).unwrap();
    let words = [&visit, &again].map(|job| job.context.as_tokens().unwrap().to_vec());
    let visits = [visit, again, job(loaded, 5, 40)].map(|job| Queued::of(job, WIDTH));
    let back = brought_back(&mut executor(2 * PAGES), page_bytes, visits, [&words[0], &words[1]]);
    [cold, back.into_found().unwrap()]
}
