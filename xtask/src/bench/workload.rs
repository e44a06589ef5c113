//! The standard workloads: a checkpoint and prompts made by the scripts that every engine uses.
//!
//! `make_checkpoint.py` and `make_prompts.py` know nothing of beamline. The one file added is
//! convention.json, which says how the checkpoint's tokens spell items.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde_json::json;

use super::random::Random;

/// Items by which a history grows between two visits.
pub(super) const NEW_ITEMS: usize = 4;

/// What distinguishes a workload.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) name: &'static str,
    pub(super) codes: usize,
    /// Items of a first visit's history.
    pub(super) history: usize,
}

/// The shapes that run on a CPU.
const SHAPES: [Shape; 2] =
    [Shape { name: "S", codes: 256, history: 64 }, Shape { name: "M", codes: 1024, history: 128 }];

/// Where the scripts are and which Python runs them.
#[derive(Clone, Debug)]
pub(super) struct Tools {
    /// A Python with torch and transformers; not needed if everything was made before.
    pub(super) python: PathBuf,
    /// The directory of the scripts.
    pub(super) scripts: PathBuf,
    /// Where what they make is kept.
    pub(super) work: PathBuf,
}

/// A visit of the prompt file.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Prompt {
    pub(super) user: String,
    pub(super) visit: usize,
    pub(super) history: Vec<String>,
    pub(super) token_ids: Vec<u32>,
}

/// A workload that was made.
#[derive(Clone, Debug)]
pub(super) struct Workload {
    pub(super) shape: Shape,
    pub(super) checkpoint: PathBuf,
    /// The prompts that every engine gets: two visits a user.
    pub(super) prompt_file: PathBuf,
    pub(super) prompts: Vec<Prompt>,
    /// Items in the order of the catalog.
    pub(super) items: Vec<String>,
}

impl Shape {
    /// The shape of that name.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub(super) fn find(name: &str) -> Result<Self> {
        SHAPES
            .into_iter()
            .find(|shape| shape.name == name)
            .with_context(|| format!("no workload {name:?}: S or M"))
    }
}

impl Tools {
    /// Makes a workload, or takes what an earlier run made, with `users` users in the common prompts.
    ///
    /// # Errors
    ///
    /// When a script fails.
    pub(super) fn workload(&self, shape: Shape, users: usize) -> Result<Workload> {
        let checkpoint = self.work.join(format!("{}-checkpoint", shape.name));
        // The catalog is what the script writes last.
        if !checkpoint.join("catalog.jsonl").exists() {
            self.script("make_checkpoint.py", &[&text(&checkpoint), "--shape", shape.name])?;
        }
        fs::write(checkpoint.join("convention.json"), format!("{:#}\n", convention(shape)))?;
        let prompt_file = self.prompt_file(shape, &checkpoint, users, shape.history, 2)?;
        let lines = fs::read_to_string(checkpoint.join("catalog.jsonl"))?;
        let items = lines
            .lines()
            .map(|line| Ok(serde_json::from_str::<CatalogLine>(line)?.item_id))
            .collect::<Result<Vec<_>>>()?;
        Ok(Workload { shape, prompts: read_prompts(&prompt_file)?, prompt_file, checkpoint, items })
    }

    /// Prompts of one visit whose contexts are at least `tokens` long.
    ///
    /// # Errors
    ///
    /// When a script fails.
    pub(super) fn long_prompts(
        &self,
        workload: &Workload,
        users: usize,
        tokens: usize,
    ) -> Result<Vec<Prompt>> {
        // An item is begin, three codes and end.
        let history = tokens.div_ceil(5);
        read_prompts(&self.prompt_file(workload.shape, &workload.checkpoint, users, history, 1)?)
    }

    fn prompt_file(
        &self,
        shape: Shape,
        checkpoint: &Path,
        users: usize,
        history: usize,
        visits: usize,
    ) -> Result<PathBuf> {
        let path = self.work.join(format!("{}-{users}x{visits}-history-{history}.jsonl", shape.name));
        if !path.exists() {
            let (users, history, visits) = (users.to_string(), history.to_string(), visits.to_string());
            let unfinished = path.with_extension("part");
            let options = ["--users", &users, "--history", &history, "--visits", &visits, "--seed", "3"];
            let new = NEW_ITEMS.to_string();
            let (checkpoint, out) = (text(checkpoint), text(&unfinished));
            let mut arguments = vec![checkpoint.as_str(), out.as_str(), "--new", &new];
            arguments.extend(options);
            self.script("make_prompts.py", &arguments)?;
            fs::rename(unfinished, &path)?;
        }
        Ok(path)
    }

    /// Runs one of the scripts.
    ///
    /// # Errors
    ///
    /// When it fails.
    pub(super) fn script(&self, name: &str, arguments: &[&str]) -> Result<()> {
        fs::create_dir_all(&self.work)?;
        let mut command = Command::new(&self.python);
        // Scripts may lie where nothing can be written.
        command.arg("-B").arg(self.scripts.join(name)).args(arguments);
        eprintln!("$ {command:?}");
        let status = command.status().with_context(|| {
            format!("cannot start {}: give --python with torch and transformers", self.python.display())
        })?;
        if !status.success() {
            bail!("{name} failed: {status}");
        }
        Ok(())
    }
}

#[derive(Deserialize)]
struct CatalogLine {
    item_id: String,
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

fn read_prompts(path: &Path) -> Result<Vec<Prompt>> {
    let lines = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    lines.lines().map(|line| serde_json::from_str(line).context("a prompt")).collect()
}

/// How the scripts' checkpoints spell items: the tokens of OpenOneRec without its chat template.
fn convention(shape: Shape) -> serde_json::Value {
    json!({
        "format": 1,
        "levels": 3,
        "level_token_patterns": ["<s_a_{}>", "<s_b_{}>", "<s_c_{}>"],
        "level_code_counts": [shape.codes, shape.codes, shape.codes],
        "item_begin_token": "<|sid_begin|>",
        "item_end_token": "<|sid_end|>",
        "generation_begin": "<|sid_begin|>",
    })
}

/// What a request body says beside its context.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ask<'a> {
    pub(super) tenant: &'a str,
    pub(super) user: &'a str,
    pub(super) beams: usize,
}

impl Ask<'_> {
    /// A body with a history.
    pub(super) fn history(self, items: &[String]) -> Vec<u8> {
        let history: Vec<_> = items.iter().map(|item| json!({"item_id": item})).collect();
        self.body("history", json!(history))
    }

    /// A body with tokens.
    pub(super) fn tokens(self, tokens: &[u32]) -> Vec<u8> {
        self.body("token_ids", json!(tokens))
    }

    fn body(self, field: &str, context: serde_json::Value) -> Vec<u8> {
        // As many items as beams: what the peers return.
        let mut body = json!({
            "user_id": self.user, "tenant": self.tenant, "beam_width": self.beams, "num_items": self.beams,
            "timeout_ms": 60_000,
        });
        body[field] = context;
        body.to_string().into_bytes()
    }
}

/// Users who come back again and again, for load that must not repeat itself.
#[derive(Debug)]
pub(super) struct Population<'a> {
    workload: &'a Workload,
    random: Random,
    histories: Vec<Vec<String>>,
    next_user: usize,
    tenant: String,
    beams: usize,
}

impl<'a> Population<'a> {
    /// `users` users whose histories are as long as a first visit's.
    pub(super) fn new(workload: &'a Workload, users: usize, beams: usize, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let histories = (0..users).map(|_| draw(workload, workload.shape.history, &mut random)).collect();
        Self { workload, random, histories, next_user: 0, tenant: format!("population-{seed}"), beams }
    }

    /// The visits that put every user's context into the cache.
    pub(super) fn first_visits(&self) -> Vec<Vec<u8>> {
        (0..self.histories.len()).map(|user| self.body(user)).collect()
    }

    /// Later visits, users in turn, each with new items. A history that would be twice as long as at
    /// first goes back to its beginning, whose context is cached, and continues with other items. So the
    /// work stays the same and every visit is warm.
    pub(super) fn next_visits(&mut self, count: usize) -> Vec<Vec<u8>> {
        let mut bodies = Vec::with_capacity(count);
        let first = self.workload.shape.history;
        for _ in 0..count {
            let user = self.next_user;
            self.next_user = (user + 1) % self.histories.len();
            if self.histories[user].len() + NEW_ITEMS > 2 * first {
                self.histories[user].truncate(first);
            }
            let new = draw(self.workload, NEW_ITEMS, &mut self.random);
            self.histories[user].extend(new);
            bodies.push(self.body(user));
        }
        bodies
    }

    fn body(&self, user: usize) -> Vec<u8> {
        let name = format!("user-{user}");
        Ask { tenant: &self.tenant, user: &name, beams: self.beams }.history(&self.histories[user])
    }
}

/// Visits of users who were never seen before.
pub(super) fn strangers(workload: &Workload, count: usize, beams: usize, seed: u64) -> Vec<Vec<u8>> {
    let mut random = Random::new(seed);
    let tenant = format!("strangers-{seed}");
    let stranger = |index: usize| {
        let user = format!("stranger-{index}");
        Ask { tenant: &tenant, user: &user, beams }.history(&draw(
            workload,
            workload.shape.history,
            &mut random,
        ))
    };
    (0..count).map(stranger).collect()
}

fn draw(workload: &Workload, count: usize, random: &mut Random) -> Vec<String> {
    (0..count).map(|_| workload.items[random.skewed(workload.items.len())].clone()).collect()
}
