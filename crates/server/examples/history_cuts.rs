//! What coarse cuts of long histories are worth: `cargo xtask history-cuts`.
//!
//! Users come back again and again, each time with a few more items, until their histories are ten
//! times as long as the context. Measured is how much of the context the cache holds when histories are
//! cut one item at a time, and in coarser steps; and what the steps cost in kept history. First with
//! the real scheduler and KV cache over a model that computes nothing, then, for the two cuts that can
//! be set, with a running server and a real model.
//!
//! Progress goes to stderr, the figures as JSON to stdout.

#![allow(clippy::expect_used, clippy::print_stdout, reason = "a measurement for people to run")]

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use beamline::service::{coarse_step, dropped_by};
use beamline_kv_cache::{
    CacheConfig, HostMemory, HostPage, MokaTier, Namespace, PageContents, PageId, ReuseClass, SessionKey,
    TransferError,
};
use beamline_model::step::{Plan, Progress, Slot, StepError, StepModel};
use beamline_scheduler::{
    Ending, Event, Micros, Priority, Request, RequestId, Scheduler, SchedulerConfig, Usage,
};
use clap::Parser;
use serde_json::{Value, json};

/// Tokens of an item: a begin token and three codes.
const TOKENS_PER_ITEM: usize = 4;
const PAGE_SIZE: usize = 32;
/// How often a history outgrows the context in a user's life.
const LIFE: usize = 10;

#[derive(Parser)]
struct Options {
    /// Checkpoint for the measurement with a server; without it there is none.
    #[arg(long)]
    checkpoint: Option<PathBuf>,
    /// The beamline binary.
    #[arg(long, default_value = "target/release/beamline")]
    beamline: PathBuf,
}

fn main() {
    let options = Options::parse();
    let mut lives = Vec::new();
    for fit in [64, 256, 1000] {
        for new_items in [1, 4, 16] {
            lives.extend(steps(fit).into_iter().map(|step| one_life(fit, new_items, step)));
        }
    }
    let pressed: Vec<Value> = [(1, false), (coarse_step(64), false), (1, true), (coarse_step(64), true)]
        .into_iter()
        .map(|(step, host)| crowd(step, host))
        .collect();
    let served: Vec<Value> = options
        .checkpoint
        .iter()
        .flat_map(|checkpoint| ["exact", "coarse"].map(|cut| with_server(&options.beamline, checkpoint, cut)))
        .collect();
    let all = json!({
        "what": "cached share of context tokens over users' lives, by how many items a long history is cut at a time",
        "command": "cargo xtask history-cuts",
        "tokens_per_item": TOKENS_PER_ITEM,
        "page_size": PAGE_SIZE,
        "simulated": lives,
        "simulated_crowd": pressed,
        "server": served,
    });
    println!("{all:#}");
}

/// From one item to half of what fits.
fn steps(fit: usize) -> Vec<usize> {
    let mut steps: Vec<usize> = [fit, 32, 16, 8, 4, 2].map(|part| (fit / part).max(1)).into();
    steps.dedup();
    steps
}

/// A generator of random numbers: SplitMix64 (Steele et al. 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// New items of a visit: at least one, `mean` on average, geometric.
    fn new_items(&mut self, mean: usize) -> usize {
        let mut items = 1;
        while !self.next().is_multiple_of(mean as u64) {
            items += 1;
        }
        items
    }
}

/// What visits came to.
#[derive(Default)]
struct Account {
    visits: usize,
    context_tokens: usize,
    cached_tokens: usize,
    /// Of the visits with a history that did not fit.
    cut_visits: usize,
    cut_context_tokens: usize,
    cut_cached_tokens: usize,
    kept_items: usize,
    dropped_beyond_need: usize,
}

impl Account {
    fn count(
        &mut self,
        items: usize,
        fit: usize,
        dropped: usize,
        context_tokens: usize,
        cached_tokens: usize,
    ) {
        self.visits += 1;
        self.context_tokens += context_tokens;
        self.cached_tokens += cached_tokens;
        if items > fit {
            self.cut_visits += 1;
            self.cut_context_tokens += context_tokens;
            self.cut_cached_tokens += cached_tokens;
            self.kept_items += items - dropped;
            self.dropped_beyond_need += dropped - (items - fit);
        }
    }

    fn report(&self, fit: usize) -> Value {
        let mean = |sum: usize| round(sum as f64 / self.cut_visits.max(1) as f64);
        json!({
            "visits": self.visits,
            "hit_rate": round(self.cached_tokens as f64 / self.context_tokens as f64),
            "visits_with_a_cut_history": self.cut_visits,
            "hit_rate_when_cut": round(self.cut_cached_tokens as f64 / self.cut_context_tokens.max(1) as f64),
            "computed_tokens_per_visit_when_cut": mean(self.cut_context_tokens - self.cut_cached_tokens),
            "kept_items_when_cut": mean(self.kept_items),
            "items_dropped_beyond_need": mean(self.dropped_beyond_need),
            "share_of_fitting_items_kept": round(self.kept_items as f64 / (self.cut_visits * fit).max(1) as f64),
        })
    }
}

fn round(value: f64) -> f64 {
    (value * 1e4).round() / 1e4
}

fn merge(mut to: Value, from: Value) -> Value {
    if let (Value::Object(to), Value::Object(from)) = (&mut to, from) {
        to.extend(from);
    }
    to
}

/// A few users, room for everybody: what the cut alone does.
fn one_life(fit: usize, new_items: usize, step: usize) -> Value {
    let users = 4;
    let pages = users * 4 * (fit * TOKENS_PER_ITEM).div_ceil(PAGE_SIZE) + 64;
    let account = live(users, fit, new_items, step, pages, None);
    let report = account.report(fit);
    eprintln!("{fit} items fit, {new_items} new per visit, {step} at a time: {report}");
    let what = json!({
        "items_that_fit": fit, "mean_new_items_per_visit": new_items, "items_cut_at_a_time": step, "users": users,
    });
    merge(what, report)
}

/// Many users, KV memory for a quarter of them.
fn crowd(step: usize, host: bool) -> Value {
    let (users, fit, new_items) = (200, 64, 4);
    let pages_per_user = (fit * TOKENS_PER_ITEM + 1).div_ceil(PAGE_SIZE);
    let pages = users * pages_per_user / 4;
    let host_pages = host.then_some(2 * users * pages_per_user);
    let account = live(users, fit, new_items, step, pages, host_pages);
    let report = account.report(fit);
    eprintln!("a crowd, {step} at a time, host memory {host}: {report}");
    let what = json!({
        "items_that_fit": fit, "mean_new_items_per_visit": new_items, "items_cut_at_a_time": step, "users": users,
        "kv_pages": pages, "pages_of_all_contexts": users * pages_per_user, "host_pages": host_pages,
    });
    merge(what, report)
}

/// Users come in random order until all have lived their lives.
fn live(
    users: usize,
    fit: usize,
    new_items: usize,
    step: usize,
    pages: usize,
    host_pages: Option<usize>,
) -> Account {
    let mut random = Random(7);
    let mut server = Simulated::new(pages, fit * TOKENS_PER_ITEM + 1, host_pages);
    let mut histories = vec![0_usize; users];
    let mut account = Account::default();
    let mut words = Vec::new();
    let mut alive: Vec<usize> = (0..users).collect();
    while !alive.is_empty() {
        let at = random.next() as usize % alive.len();
        let user = alive[at];
        histories[user] += random.new_items(new_items);
        let items = histories[user];
        let dropped = dropped_by(items, fit, step);
        words.clear();
        let item_words =
            |item: usize| (0..TOKENS_PER_ITEM).map(move |part| (item * TOKENS_PER_ITEM + part) as u32);
        words.extend((dropped..items).flat_map(item_words).map(|word| word ^ (user as u32).rotate_left(20)));
        words.push(0);
        let usage = server.answer(user, &words);
        account.count(items, fit, dropped, usage.context_tokens, usage.cached_tokens);
        if items >= LIFE * fit {
            alive.swap_remove(at);
        }
    }
    account
}

/// Scheduler and KV cache over a model that computes nothing.
struct Simulated {
    scheduler: Scheduler<()>,
    model: Nothing,
    namespace: Namespace,
    next_id: u64,
    plan: Plan,
    events: Vec<Event<(), ()>>,
    outcomes: Vec<(Slot, Progress<()>)>,
}

struct Nothing;

impl PageContents for Nothing {
    fn page_bytes(&self) -> usize {
        1
    }

    fn export(&self, _page: PageId, _to: &mut [u8]) -> Result<(), TransferError> {
        Ok(())
    }

    fn import(&mut self, _from: &[u8], _page: PageId) -> Result<(), TransferError> {
        Ok(())
    }
}

impl StepModel for Nothing {
    type Payload = ();
    type Answer = ();

    fn open(&mut self, _slot: Slot, _payload: ()) {}

    fn step(&mut self, plan: &Plan, outcomes: &mut Vec<(Slot, Progress<()>)>) -> Result<(), StepError> {
        for transfer in &plan.transfers {
            transfer.carry_out(self).map_err(|error| StepError(error.to_string()))?;
        }
        outcomes.extend(plan.chunks.iter().map(|chunk| {
            (chunk.slot, if chunk.expand.is_some() { Progress::Finished(()) } else { Progress::Prefilled })
        }));
        Ok(())
    }

    fn close(&mut self, _slot: Slot) {}
}

impl Simulated {
    fn new(pages: usize, context: usize, host_pages: Option<usize>) -> Self {
        let config = SchedulerConfig { max_running: 4, max_context: context, ..SchedulerConfig::default() };
        let cache = CacheConfig {
            pages: pages as u32,
            page_size: PAGE_SIZE as u32,
            words_per_position: 1,
            sessions: 10_000,
            hash_key: [1; 32],
        };
        let mut scheduler = Scheduler::new(config, cache).expect("the sizes are sound");
        if let Some(pages) = host_pages {
            let bytes = pages * HostPage::bytes_of(1, context);
            let tier = Box::new(MokaTier::new(bytes, None));
            scheduler = scheduler.with_host_memory(HostMemory { tier, page_bytes: 1, window: 32 });
        }
        Self {
            scheduler,
            model: Nothing,
            namespace: Namespace::new(b"model", b""),
            next_id: 0,
            plan: Plan::default(),
            events: Vec::new(),
            outcomes: Vec::new(),
        }
    }

    fn answer(&mut self, user: usize, words: &[u32]) -> Usage {
        let id = RequestId(self.next_id);
        self.next_id += 1;
        let request = Request {
            id,
            namespace: self.namespace,
            session: Some(SessionKey::new(&self.namespace, &user.to_string())),
            words: words.into(),
            context_len: words.len(),
            reuse: ReuseClass::CrossRequest,
            shape: beamline_scheduler::ContextShape::Causal,
            beam_width: 32,
            beam_widths: None,
            min_beam_width: 32,
            priority: Priority::Interactive,
            keeps_branches: true,
            generated_steps: 3,
            deadline: None,
            payload: std::sync::Arc::new(()),
        };
        self.scheduler.submit(Micros(0), request).expect("the request fits");
        loop {
            self.scheduler.plan(Micros(0), &mut self.plan, &mut self.events);
            self.model.step(&self.plan, &mut self.outcomes).expect("nothing fails");
            self.scheduler.commit(Micros(0), Micros(1), &mut self.outcomes, &mut self.events);
            for event in self.events.drain(..) {
                if let Event::Ended(ended) = event {
                    assert_eq!(ended.ending, Ending::Finished(()));
                    return ended.usage;
                }
            }
        }
    }
}

/// The same lives, shorter, with a server and its model.
fn with_server(beamline: &Path, checkpoint: &Path, cut: &str) -> Value {
    let (users, new_items, max_context) = (4, 4, 64 * TOKENS_PER_ITEM + 1);
    let server = Served::start(beamline, checkpoint, cut, max_context);
    let fit = server.get("/v1/models")["models"][0]["max_history_items"].as_u64().expect("a number") as usize;
    let text = std::fs::read_to_string(checkpoint.join("catalog.jsonl")).expect("a catalog of JSON lines");
    let catalog: Vec<String> = text
        .lines()
        .map(|line| {
            serde_json::from_str::<Value>(line).expect("JSON")["item_id"].as_str().expect("an id").into()
        })
        .collect();
    let mut random = Random(11);
    let mut histories = vec![Vec::new(); users];
    let (mut account, mut prefill_ms) = (Account::default(), Vec::new());
    while histories.iter().any(|history| history.len() < LIFE * fit) {
        for (user, history) in histories.iter_mut().enumerate() {
            for _ in 0..random.new_items(new_items) {
                let item = &catalog[random.next() as usize % catalog.len()];
                history.push(json!({"item_id": item}));
            }
            let body =
                json!({"user_id": format!("u{user}"), "history": history, "num_items": 10, "beam_width": 32});
            let answer = server.post("/v1/recommend", &body);
            let number = |value: &Value| value.as_u64().expect("a number") as usize;
            let (usage, dropped) = (&answer["usage"], number(&answer["dropped_history"]));
            account.count(
                history.len(),
                fit,
                dropped,
                number(&usage["context_tokens"]),
                number(&usage["cached_tokens"]),
            );
            if history.len() > fit {
                prefill_ms.push(answer["timings_ms"]["prefill"].as_f64().expect("a number"));
            }
        }
    }
    let report = account.report(fit);
    let mean = prefill_ms.iter().sum::<f64>() / prefill_ms.len() as f64;
    eprintln!("server, {cut}: {report}, prefill {mean:.2} ms on average");
    let what = json!({
        "history_cut": cut, "items_that_fit": fit, "mean_new_items_per_visit": new_items, "users": users,
        "mean_prefill_ms_when_cut": round(mean),
    });
    merge(what, report)
}

struct Served {
    child: Child,
    url: String,
    agent: ureq::Agent,
}

impl Served {
    fn start(beamline: &Path, checkpoint: &Path, cut: &str, max_context: usize) -> Self {
        let mut child = Command::new(beamline)
            .args(["serve", "--listen", "127.0.0.1:0", "--log", "error", "--kv-memory", "256MiB"])
            .args(["--max-context", &max_context.to_string(), "--history-cut", cut, "--checkpoint"])
            .arg(checkpoint)
            .stdout(Stdio::piped())
            .spawn()
            .expect("the server starts");
        let mut line = String::new();
        let stdout = child.stdout.take().expect("it is piped");
        BufReader::new(stdout).read_line(&mut line).expect("the server says where it listens");
        let url =
            line.trim().strip_prefix("listening on ").expect("the server says where it listens").to_owned();
        let agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
        let server = Self { child, url, agent };
        while server.status("/readyz") != 200 {
            std::thread::sleep(Duration::from_millis(20));
        }
        server
    }

    fn status(&self, path: &str) -> u16 {
        self.agent.get(format!("{}{path}", self.url)).call().expect("the server answers").status().as_u16()
    }

    fn get(&self, path: &str) -> Value {
        let mut answer = self.agent.get(format!("{}{path}", self.url)).call().expect("the server answers");
        answer.body_mut().read_json().expect("JSON")
    }

    fn post(&self, path: &str, body: &Value) -> Value {
        let request = self.agent.post(format!("{}{path}", self.url)).content_type("application/json");
        let mut answer = request.send(body.to_string()).expect("the server answers");
        assert_eq!(answer.status(), 200);
        answer.body_mut().read_json().expect("JSON")
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
