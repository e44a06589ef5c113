//! `cargo xtask disk-tier`: what a disk of KV pages is worth after kill -9, and whether an answer is
//! ever wrong.
//!
//! Many users visit a server of little memory twice. It is killed with -9 during those visits and
//! started again, and all of them return. Then bytes of the files are flipped, and some return once
//! more. Every answer is compared with that of a server on which nothing of the user is cached: item by
//! item, and scores bit by bit.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::client::{Answer, Item, Slate};
use super::machine;
use super::random::Random;
use super::server::{Launch, Server};
use crate::root;

/// Beams, and items of an answer.
const BEAMS: usize = 10;
/// One user in this number returns after the damage.
const AFTER_DAMAGE: usize = 5;
/// One block in this number of the files is damaged.
const DAMAGED_BLOCKS: usize = 50;
const BLOCK: usize = 4096;

/// Flags of `cargo xtask disk-tier`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Number of users.
    #[arg(long, default_value_t = 10_000)]
    users: usize,
    /// Size of the disk tier.
    #[arg(long, default_value = "2GiB")]
    size: String,
    /// Items of a history, at the first visit.
    #[arg(long, default_value_t = 20)]
    items: usize,
    /// Requests at a time.
    #[arg(long, default_value_t = 4)]
    connections: usize,
    /// KV memory, and host memory.
    #[arg(long, default_value = "64MiB")]
    memory: String,
    /// The checkpoint, with its catalog.
    #[arg(long, value_name = "DIR")]
    checkpoint: Option<PathBuf>,
    /// Where the pages go [default: a temporary directory under target].
    #[arg(long, value_name = "DIR")]
    directory: Option<PathBuf>,
    /// Threads of the forward pass.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Further arguments of `beamline serve`, in one word.
    #[arg(long, default_value = "", allow_hyphen_values = true)]
    server_args: String,
    /// Where the results go.
    #[arg(long, default_value = "bench/results/disk-tier.json")]
    out: PathBuf,
}

/// Users with histories that grow.
struct Crowd {
    catalog: Vec<String>,
    histories: Vec<Vec<String>>,
    random: Random,
}

/// All visits of one kind.
struct Visits {
    slates: Vec<Slate>,
    latencies_ms: Vec<f64>,
    seconds: f64,
}

/// Measures and writes the results.
///
/// # Errors
///
/// When something cannot be built, started, measured or written, or an answer is wrong.
pub(crate) fn run(args: &Args) -> Result<()> {
    crate::build(&["--bin", "beamline"])?;
    let checkpoint = args.checkpoint.clone().unwrap_or_else(|| root().join("weights/demo/checkpoint"));
    let work = root().join("target/disk-tier");
    fs::create_dir_all(&work)?;
    let temporary = tempfile::tempdir_in(&work)?;
    let directory = args.directory.clone().unwrap_or_else(|| temporary.path().to_owned());
    let launch = Launch {
        binary: root().join("target/release/beamline"),
        threads: args.threads,
        arguments: args.server_args.split_whitespace().map(str::to_owned).collect(),
        logs: work.clone(),
    };
    let small = ["--kv-memory", &args.memory, "--max-context", "1024", "--max-beam-width", "64"];
    let place = directory.to_str().context("the directory's name is no text")?;
    let disk = ["--kv-host-memory", &args.memory, "--kv-disk", place, "--kv-disk-size", &args.size];
    let flags = [&small[..], &disk].concat();
    let mut measured =
        Measured { reference: launch.start(&checkpoint, &small)?, args, compared: 0, wrong: 0 };

    let mut crowd = Crowd::new(&checkpoint, args)?;
    let server = launch.start(&checkpoint, &flags)?;
    let first = measured.visit(&server, &crowd.bodies(0, 1), "first")?;
    crowd.grow();
    let before = measured.visit(&server, &crowd.bodies(1, 1), "before")?;
    let written = disk_metrics(&server)?;
    server.kill()?;

    crowd.grow();
    let start = Instant::now();
    let server = launch.start(&checkpoint, &flags)?;
    let ready = start.elapsed().as_secs_f64();
    let found = server.metric("beamline_disk_pages")?;
    let after = measured.visit(&server, &crowd.bodies(2, 1), "after")?;
    let restarted = disk_metrics(&server)?;
    server.kill()?;

    crowd.grow();
    let flipped = damage(&directory)?;
    let server = launch.start(&checkpoint, &flags)?;
    let damaged = measured.visit(&server, &crowd.bodies(3, AFTER_DAMAGE), "damaged")?;
    let repaired = disk_metrics(&server)?;
    let Measured { compared, wrong, .. } = measured;

    let results = json!({
        "what": "users who return to a server with KV pages on disk, before and after kill -9; every answer compared with an uncached one",
        "command": super::command_line(),
        "commit": machine::commit(&root()),
        "machine": machine::describe(),
        "users": args.users,
        "size": args.size,
        "memory": args.memory,
        "items": args.items,
        "visits": {
            "first": first.summary(), "before_the_kill": before.summary(), "after_the_kill": after.summary(),
            "after_damage": damaged.summary(),
        },
        "restart": {"ready_seconds": ready, "pages_found": found},
        "flipped_bytes": flipped,
        "metrics": {"before_the_kill": written, "after_the_kill": restarted, "after_damage": repaired},
        "compared": compared,
        "wrong": wrong,
    });
    let out = if args.out.is_absolute() { args.out.clone() } else { root().join(&args.out) };
    if let Some(parent) = out.parent() {
        fs::create_dir_all(parent)?;
    }
    fs::write(&out, format!("{results:#}\n"))?;
    eprintln!(
        "{:#}\n{compared} answers compared, {wrong} wrong; results: {}",
        results["visits"],
        out.display()
    );
    ensure!(wrong == 0, "{wrong} of {compared} answers differ from those of a server without a cache");
    Ok(())
}

/// What compares answers.
struct Measured<'a> {
    reference: Server,
    args: &'a Args,
    compared: usize,
    wrong: usize,
}

impl Measured<'_> {
    /// Sends the requests, and compares the answers with those of the reference, where each has a tenant
    /// of its own.
    fn visit(&mut self, server: &Server, bodies: &[Value], name: &str) -> Result<Visits> {
        let visits = send(server, bodies, self.args.connections)?;
        let cold: Vec<Value> = bodies
            .iter()
            .enumerate()
            .map(|(number, body)| {
                let mut body = body.clone();
                body["tenant"] = json!(format!("{name} {number}"));
                body
            })
            .collect();
        let expected = send(&self.reference, &cold, self.args.connections)?;
        for ((slate, expected), body) in visits.slates.iter().zip(&expected.slates).zip(bodies) {
            ensure!(expected.usage.cached_tokens == 0, "the reference has cached something");
            self.compared += 1;
            if !same(&slate.items, &expected.items) {
                self.wrong += 1;
                eprintln!("WRONG: {body}\n{:?}\n{:?}", slate.items, expected.items);
            }
        }
        let (users, tokens) = visits.shares();
        eprintln!(
            "{name}: {:.1} % of {} visits found {:.1} % of their tokens, in {:.0} s",
            100.0 * users,
            bodies.len(),
            100.0 * tokens,
            visits.seconds
        );
        Ok(visits)
    }
}

fn same(a: &[Item], b: &[Item]) -> bool {
    let bits = |items: &[Item]| -> Vec<(String, u64)> {
        items.iter().map(|item| (item.item_id.clone(), item.score.to_bits())).collect()
    };
    bits(a) == bits(b)
}

impl Crowd {
    fn new(checkpoint: &Path, args: &Args) -> Result<Self> {
        let file = checkpoint.join("catalog.jsonl");
        let text = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        let id = |line: &str| -> Result<String> {
            let item: Value = serde_json::from_str(line)?;
            Ok(item["item_id"].as_str().context("an item without an id")?.to_owned())
        };
        let catalog: Vec<String> = text.lines().map(id).collect::<Result<_>>()?;
        let mut random = Random::new(1);
        let mut history = || (0..args.items).map(|_| catalog[random.below(catalog.len())].clone()).collect();
        let histories = (0..args.users).map(|_| history()).collect();
        Ok(Self { histories, random, catalog })
    }

    /// Every user has one or two items more.
    fn grow(&mut self) {
        for history in &mut self.histories {
            for _ in 0..1 + self.random.below(2) {
                history.push(self.catalog[self.random.below(self.catalog.len())].clone());
            }
        }
    }

    /// The requests of every `every`-th user, in an order of their own.
    fn bodies(&self, seed: u64, every: usize) -> Vec<Value> {
        let mut order: Vec<usize> = (0..self.histories.len()).step_by(every).collect();
        let mut random = Random::new(seed);
        for index in (1..order.len()).rev() {
            order.swap(index, random.below(index + 1));
        }
        let body = |user: usize| {
            let history: Vec<Value> =
                self.histories[user].iter().map(|item| json!({"item_id": item})).collect();
            json!({"user_id": format!("u{user}"), "history": history, "num_items": BEAMS, "beam_width": BEAMS})
        };
        order.into_iter().map(body).collect()
    }
}

impl Visits {
    /// Of the visits, and of their context tokens, those that found something cached, and that were.
    fn shares(&self) -> (f64, f64) {
        let (mut found, mut cached, mut tokens) = (0, 0, 0);
        for Slate { usage, .. } in &self.slates {
            found += usize::from(usage.cached_tokens > 0);
            cached += usage.cached_tokens;
            tokens += usage.context_tokens;
        }
        (found as f64 / self.slates.len().max(1) as f64, cached as f64 / tokens.max(1) as f64)
    }

    fn summary(&self) -> Value {
        let (visits_with_a_hit, tokens_cached) = self.shares();
        let mut sorted = self.latencies_ms.clone();
        sorted.sort_by(f64::total_cmp);
        let at = |share: f64| sorted.get((sorted.len() as f64 * share) as usize).copied();
        json!({
            "visits": self.slates.len(),
            "visits_with_a_hit": visits_with_a_hit,
            "tokens_cached": tokens_cached,
            "p50_ms": at(0.5),
            "p99_ms": at(0.99),
            "per_second": self.slates.len() as f64 / self.seconds,
        })
    }
}

/// Sends all requests, some at a time. The answers are in the order of the requests.
fn send(server: &Server, bodies: &[Value], connections: usize) -> Result<Visits> {
    let next = AtomicUsize::new(0);
    let answers = Mutex::new(BTreeMap::new());
    let start = Instant::now();
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..connections)
            .map(|_| {
                scope.spawn(|| -> Result<()> {
                    let client = server.client();
                    loop {
                        let index = next.fetch_add(1, Ordering::Relaxed);
                        let Some(body) = bodies.get(index) else { return Ok(()) };
                        let reply = client.recommend(body.to_string().as_bytes())?;
                        let Answer::Slate(slate) = reply.read()? else { bail!("a request was refused") };
                        let Ok(mut answers) = answers.lock() else { bail!("another thread panicked") };
                        answers.insert(index, (slate, 1e3 * reply.elapsed.as_secs_f64()));
                    }
                })
            })
            .collect();
        for thread in threads {
            thread.join().unwrap_or_else(|_| bail!("a client panicked"))?;
        }
        anyhow::Ok(())
    })?;
    let seconds = start.elapsed().as_secs_f64();
    let Ok(answers) = answers.into_inner() else { bail!("a client panicked") };
    let (slates, latencies_ms) = answers.into_values().unzip();
    Ok(Visits { slates, latencies_ms, seconds })
}

/// What the server counts of its disk.
fn disk_metrics(server: &Server) -> Result<Value> {
    let names = [
        "pages",
        "bytes{kind=\"used\"}",
        "hits_total",
        "misses_total",
        "written_pages_total",
        "writes_waiting",
        "dropped_writes_total",
        "dropped_pages_total",
        "checksum_failures_total",
        "errors_total",
    ];
    let metric = |name: &str| Ok((name.to_owned(), json!(server.metric(&format!("beamline_disk_{name}"))?)));
    names.into_iter().map(metric).collect::<Result<serde_json::Map<_, _>>>().map(Value::Object)
}

/// Flips a bit in one of many blocks of every file. Returns how many.
fn damage(directory: &Path) -> Result<usize> {
    let mut random = Random::new(9);
    let mut flipped = 0;
    for pool in fs::read_dir(directory)? {
        let pool = pool?.path();
        if !pool.is_dir() {
            continue;
        }
        for file in fs::read_dir(&pool)? {
            let file = file?.path();
            let mut bytes = fs::read(&file)?;
            for block in 1..bytes.len() / BLOCK {
                if random.below(DAMAGED_BLOCKS) == 0 {
                    bytes[block * BLOCK + random.below(BLOCK)] ^= 1 << random.below(8);
                    flipped += 1;
                }
            }
            fs::write(&file, bytes)?;
        }
    }
    Ok(flipped)
}
