//! A model root with two checkpoints that answer differently, and traffic that checks every answer.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use serde_json::{Value, json};

use crate::harness::{Random, Server, fixture, history, items};
use crate::loading::edit;

pub(crate) const CASE: &str = "qwen3-untied";
/// Histories that traffic uses.
const HISTORIES: usize = 12;

/// `shop/a`, `shop/b`, and room for more.
pub(crate) struct Root {
    directory: tempfile::TempDir,
}

impl Root {
    pub(crate) fn new() -> Self {
        let root = Self { directory: tempfile::tempdir().unwrap() };
        root.add("shop/a");
        let b = root.add("shop/b");
        perturb(&b.join("model.safetensors"));
        root
    }

    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }

    pub(crate) fn text(&self) -> &str {
        self.path().to_str().unwrap()
    }

    /// A copy of the fixture.
    pub(crate) fn add(&self, name: &str) -> PathBuf {
        let made = self.path().join(name);
        std::fs::create_dir_all(&made).unwrap();
        for entry in std::fs::read_dir(fixture(CASE)).unwrap() {
            let path = entry.unwrap().path();
            std::fs::copy(&path, made.join(path.file_name().unwrap())).unwrap();
        }
        made
    }

    /// A server with `shop/a` as `shop`, and the rest to be loaded.
    pub(crate) fn serve(&self, flags: &[&str]) -> Server {
        self.serve_with(flags, &[])
    }

    pub(crate) fn serve_with(&self, flags: &[&str], environment: &[(&str, &str)]) -> Server {
        let checkpoint = self.path().join("shop/a");
        let flags = [&["--name", "shop", "--model-root", self.text()], flags].concat();
        Server::start_with(&checkpoint, &flags, environment)
    }
}

/// Other weights: the last rows of the data, turned round.
fn perturb(path: &Path) {
    edit(path.to_owned(), |bytes| {
        let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        for value in bytes[8 + header..].chunks_exact_mut(4).skip(1).step_by(3) {
            let changed = f32::from_le_bytes(value.try_into().unwrap()) * -0.75;
            value.copy_from_slice(&changed.to_le_bytes());
        }
    });
}

pub(crate) fn bodies() -> Vec<Value> {
    let all = items(CASE);
    (0..HISTORIES)
        .map(|index| json!({"history": history(&all[index * 9..index * 9 + 8]), "num_items": 10}))
        .collect()
}

pub(crate) fn slate(answer: &Value) -> Slate {
    let items = answer["items"].as_array().unwrap().iter();
    items
        .map(|item| (item["item_id"].as_str().unwrap().to_owned(), item["score"].as_f64().unwrap().to_bits()))
        .collect()
}

/// Item ids, and the bits of their scores.
type Slate = Vec<(String, u64)>;

/// What every version answers, by sha256 and catalog version, to every body.
#[derive(Default)]
pub(crate) struct Reference(HashMap<(String, String), Vec<Slate>>);

impl Reference {
    /// Asks a version.
    pub(crate) fn learn(&mut self, server: &Server, model: &str) {
        let answers: Vec<Value> = bodies()
            .into_iter()
            .map(|mut body| {
                body["model"] = json!(model);
                server.recommend(&body).ok()
            })
            .collect();
        self.0.insert(key(&answers[0]), answers.iter().map(slate).collect());
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    #[track_caller]
    pub(crate) fn check(&self, index: usize, answer: &Value) {
        let known = self.0.get(&key(answer)).unwrap_or_else(|| panic!("an unknown version: {answer}"));
        assert_eq!(slate(answer), known[index], "{answer}");
    }
}

fn key(answer: &Value) -> (String, String) {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    (text(&answer["model"]["sha256"]), text(&answer["catalog_version"]))
}

/// Asks from several threads until `work` is done, and checks every answer. Returns how many there were,
/// and the result of `work`.
pub(crate) fn under_load<T>(server: &Server, reference: &Reference, work: impl FnOnce() -> T) -> (usize, T) {
    let (over, answered) = (AtomicBool::new(false), AtomicUsize::new(0));
    let bodies = bodies();
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..3)
            .map(|seed| {
                let (over, answered, bodies) = (&over, &answered, &bodies);
                scope.spawn(move || {
                    let mut random = Random(seed);
                    while !over.load(Ordering::Relaxed) {
                        let index = random.below(bodies.len());
                        let answer = server.recommend(&bodies[index]);
                        reference.check(index, &answer.ok());
                        answered.fetch_add(1, Ordering::Relaxed);
                    }
                })
            })
            .collect();
        // A failure of `work` must end the threads, too.
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        over.store(true, Ordering::Relaxed);
        for thread in threads {
            thread.join().unwrap();
        }
        let result = result.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        (answered.load(Ordering::Relaxed), result)
    })
}
