//! `cargo xtask bench`: a server of its own, measured over HTTP on workloads S and M.
//!
//! Flow: [`workload`] has the checkpoints and prompts made; each section starts a server ([`server`]),
//! sends requests ([`load`]) and gives [`record::Record`]s; [`peers`] measures other engines on the same
//! prompts; [`report`] and [`plot`] write what was found. Sections do not know of files, and the report
//! does not know how to measure.
//!
//! The client shares the machine with the server, as the peers' callers do; nothing else should run
//! meanwhile.

mod catalogs;
mod client;
mod contexts;
pub(crate) mod disk_tier;
mod load;
mod machine;
mod open_loop;
mod pages;
mod peers;
mod plot;
mod random;
mod rates;
mod record;
mod report;
mod server;
mod soak;
mod usable;
mod visits;
mod workload;

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use self::peers::Peers;
use self::record::Record;
use self::report::{Report, Run};
use self::server::Launch;
use self::workload::{Shape, Tools, Workload};
use crate::root;

/// Beams that the peers are compared at.
const COMPARED_BEAMS: [usize; 2] = [32, 128];
/// The width of sections that vary something else.
const BEAMS: usize = 32;

/// Flags of `cargo xtask bench`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Sections:
  visits       first and later visits of the same users, 32 and 128 beams; with --peers other engines too
  beams        the same at 8, 32, 128 and 512 beams
  contexts     64 to 4096 tokens
  concurrency  1 to 16 requests at once
  open-loop    Poisson arrivals: 10, 30 and 50 % of what back-to-back requests leave room for, and the highest rate
               with P99 under 100 ms, beside an M/D/1 queue. S takes a quarter of an hour
  catalogs     10 thousand to 20 million items (not in the default list: it takes minutes and gigabytes)
  pages        an empty, a half full and a full page pool (not in the default list)

  cargo xtask bench --python VENV/bin/python --peers
  cargo xtask bench --workloads S --sections visits --quick --server-args '--max-running 16'
  cargo xtask bench --soak 600 --rate 20 --workloads S")]
pub(crate) struct Args {
    /// Workloads, S and M.
    #[arg(long, value_delimiter = ',', default_value = "S,M")]
    workloads: Vec<String>,
    /// What to measure.
    #[arg(long, value_delimiter = ',', default_value = "visits,beams,contexts,concurrency,open-loop")]
    sections: Vec<String>,
    /// Fewer points and requests.
    #[arg(long)]
    quick: bool,
    /// Measure the other engines on the same prompts, in the same run.
    #[arg(long)]
    peers: bool,
    /// Only peers whose names contain one of these: ctranslate2-int8, ctranslate2-float32,
    /// openvino-genai-f32, openvino-genai-int8, hf-bfloat16, vllm-bfloat16, vllm-float32, and
    /// hf-float32, which is slow and runs only when named.
    #[arg(long, value_delimiter = ',')]
    only_peers: Vec<String>,
    /// Longest time that one peer may take, in seconds.
    #[arg(long, default_value_t = 900)]
    peer_seconds: u64,
    /// A Python with torch, transformers and ctranslate2.
    #[arg(long, default_value = "python3")]
    python: PathBuf,
    /// A Python with vLLM; without it vLLM is left out.
    #[arg(long)]
    vllm_python: Option<PathBuf>,
    /// A Python with openvino, openvino-genai and optimum-intel; without it OpenVINO is left out.
    #[arg(long)]
    openvino_python: Option<PathBuf>,
    /// Directory of make_checkpoint.py, make_prompts.py and the peers' scripts, if not `bench/peers`.
    #[arg(long)]
    scripts: Option<PathBuf>,
    /// Beam widths of section `visits`.
    #[arg(long, value_delimiter = ',')]
    beams: Vec<usize>,
    /// Users in the common prompts; each visits twice.
    #[arg(long, default_value_t = 8)]
    users: usize,
    /// Threads of every engine.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Further arguments of `beamline serve`, in one string.
    #[arg(long, default_value = "", allow_hyphen_values = true)]
    server_args: String,
    /// A built `beamline`; without it, it is built.
    #[arg(long)]
    binary: Option<PathBuf>,
    /// Where checkpoints, prompts and logs are kept.
    #[arg(long)]
    work: Option<PathBuf>,
    /// Name of the results: NAME.json, NAME.md and NAME.svg.
    #[arg(long, default_value = "bench/results/bench")]
    out: PathBuf,
    /// Name of this run in the results.
    #[arg(long, default_value = "")]
    label: String,
    /// Add this run to those already in the results, instead of starting over.
    #[arg(long)]
    add: bool,
    /// Instead of sections: load for this number of seconds, watching memory and latency.
    #[arg(long, value_name = "SECONDS")]
    soak: Option<u64>,
    /// Arrivals a second of --soak.
    #[arg(long, default_value_t = 20.0)]
    rate: f64,
    /// Requests of a point of section `open-loop`: 1000, or 200 with --quick.
    #[arg(long)]
    point_requests: Option<usize>,
    /// Longest time of a point of section `open-loop`, in seconds; slow models get fewer requests.
    #[arg(long, default_value_t = 300)]
    point_seconds: u64,
    /// Sizes of section `catalogs`.
    #[arg(long, value_delimiter = ',', default_value = "10000,100000,1000000,5000000,20000000")]
    catalog_items: Vec<usize>,
}

/// What the sections need.
struct Bench<'a> {
    args: &'a Args,
    tools: Tools,
    launch: Launch,
    peers: Peers,
}

/// Measures and writes the results.
///
/// # Errors
///
/// When something cannot be built, started, measured or written.
pub(crate) fn run(args: Args) -> Result<()> {
    let absolute = |path: &PathBuf| std::path::absolute(path).unwrap_or_else(|_| path.clone());
    let work = args.work.as_ref().map_or_else(|| root().join("target/bench"), absolute);
    let scripts = args.scripts.as_ref().map_or_else(|| root().join("bench/peers"), absolute);
    ensure!(
        scripts.join("make_checkpoint.py").exists(),
        "no make_checkpoint.py in {}: give --scripts",
        scripts.display()
    );
    let binary = match &args.binary {
        Some(binary) => absolute(binary),
        None => {
            crate::build(&["--bin", "beamline"])?;
            root().join("target/release/beamline")
        }
    };
    let out = if args.out.is_absolute() { args.out.clone() } else { root().join(&args.out) };
    let started = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    let bench = Bench {
        tools: Tools { python: args.python.clone(), scripts, work: work.clone() },
        launch: Launch {
            binary: binary.clone(),
            threads: args.threads,
            arguments: args.server_args.split_whitespace().map(str::to_owned).collect(),
            logs: work,
        },
        peers: Peers {
            vllm: args.vllm_python.clone(),
            openvino: args.openvino_python.clone(),
            threads: args.threads,
            only: args.only_peers.clone(),
            patience: Duration::from_secs(args.peer_seconds),
        },
        args: &args,
    };
    let mut records = Vec::new();
    for name in &args.workloads {
        let workload = bench.tools.workload(Shape::find(name)?, args.users)?;
        bench.measure(&workload, &mut records)?;
    }
    let mut pythons: Vec<&std::path::Path> = Vec::new();
    if args.peers {
        pythons.push(&args.python);
        pythons.extend(args.vllm_python.as_deref());
        pythons.extend(args.openvino_python.as_deref());
    }
    let run = Run {
        command: command_line(),
        label: args.label.clone(),
        commit: machine::commit(&root()),
        started,
        threads: args.threads,
        server_arguments: bench.launch.arguments.clone(),
        machine: machine::describe(),
        versions: machine::versions(&binary, &pythons),
        usable: usable::usable(&records),
        records,
    };
    write(&out, run, args.add)
}

impl Bench<'_> {
    fn measure(&self, workload: &Workload, records: &mut Vec<Record>) -> Result<()> {
        if let Some(seconds) = self.args.soak {
            records.extend(soak::measure(&self.launch, workload, seconds, self.args.rate, BEAMS)?);
            return Ok(());
        }
        for section in &self.args.sections {
            eprintln!("{}: {section}", workload.shape.name);
            match section.as_str() {
                "visits" => self.visits(workload, records)?,
                "beams" => self.beams(workload, records)?,
                "contexts" => self.contexts(workload, records)?,
                "concurrency" => {
                    let levels: &[usize] = if self.args.quick { &[1, 4, 16] } else { &[1, 2, 4, 8, 16] };
                    let server = self.launch.start(&workload.checkpoint, &[])?;
                    let window = Duration::from_secs(if self.args.quick { 2 } else { 5 });
                    let plan = rates::Plan { beams: BEAMS, window };
                    records.extend(rates::concurrency(&server, workload, levels, plan)?);
                }
                "open-loop" => {
                    let server = self.launch.start(&workload.checkpoint, &[])?;
                    records.extend(open_loop::measure(&server, workload, self.open_loop())?);
                }
                "catalogs" => {
                    let sizes = &self.args.catalog_items;
                    records.extend(catalogs::measure(
                        &self.launch,
                        &self.tools.work,
                        workload,
                        sizes,
                        BEAMS,
                    )?);
                }
                "pages" => records.extend(pages::measure(&self.launch, workload, BEAMS)?),
                other => bail!("no section {other:?}; see --help"),
            }
        }
        Ok(())
    }

    fn open_loop(&self) -> open_loop::Plan {
        let (requests, bisections) = if self.args.quick { (200, 1) } else { (1000, 3) };
        let requests = self.args.point_requests.unwrap_or(requests);
        let longest = Duration::from_secs(self.args.point_seconds);
        open_loop::Plan { beams: BEAMS, requests, longest, bisections }
    }

    /// beamline, the peers, and beamline again, so that a machine that changed meanwhile is noticed.
    fn visits(&self, workload: &Workload, records: &mut Vec<Record>) -> Result<()> {
        let widths = if self.args.beams.is_empty() { &COMPARED_BEAMS[..] } else { &self.args.beams };
        let passes = if self.args.quick { 1 } else { 3 };
        let own = |records: &mut Vec<Record>, run: &str| -> Result<()> {
            let server = self.launch.start(&workload.checkpoint, &[])?;
            visits::check_spelling(&server, workload)?;
            for &beams in widths {
                for record in visits::measure(&server, workload, "visits", beams, passes, run)? {
                    let server_ms = record.server_ms.map_or(0.0, |times| times.total);
                    eprintln!(
                        "  {}, {beams} beams: P50 {:.2} ms ({server_ms:.2} in the server), {} of {} tokens cached",
                        record.visit, record.ms.p50, record.cached_tokens, record.context_tokens
                    );
                    records.push(record);
                }
            }
            Ok(())
        };
        own(records, "before")?;
        if !self.args.peers {
            return Ok(());
        }
        for &beams in widths {
            records.extend(self.peers.measure(&self.tools, workload, beams)?);
        }
        own(records, "after")?;
        let all: Vec<&Record> =
            records.iter().filter(|r| r.section == "visits" && r.workload == workload.shape.name).collect();
        for line in report::compare(&all) {
            let (fastest, ms) = &line.others[0];
            let ratio = ms / line.own;
            eprintln!(
                "{} {}, {} beams: {:.2} ms, {ratio:.1} times as fast as {fastest} ({ms:.1} ms)",
                line.workload, line.visit, line.beams, line.own
            );
        }
        Ok(())
    }

    fn beams(&self, workload: &Workload, records: &mut Vec<Record>) -> Result<()> {
        let server = self.launch.start(&workload.checkpoint, &[])?;
        for beams in [8, 32, 128, 512] {
            records.extend(visits::measure(&server, workload, "beams", beams, 1, "")?);
        }
        Ok(())
    }

    fn contexts(&self, workload: &Workload, records: &mut Vec<Record>) -> Result<()> {
        let (users, lengths): (usize, &[usize]) =
            if self.args.quick { (3, &[64, 512, 4096]) } else { (6, &[64, 128, 256, 512, 1024, 2048, 4096]) };
        let longest = lengths.last().copied().unwrap_or(0);
        let prompts = self.tools.long_prompts(workload, users, longest)?;
        let server = self.launch.start(&workload.checkpoint, &[])?;
        for &tokens in lengths {
            records.extend(contexts::measure(&server, workload, &prompts, tokens, BEAMS)?);
        }
        Ok(())
    }
}

/// This command, as it could be typed again. Of paths only the last part is kept, because where files
/// lie is private.
fn command_line() -> String {
    let word = |word: String| match word.strip_prefix('/').and_then(|path| path.rsplit('/').next()) {
        Some(name) => format!(".../{name}"),
        None if word.contains(' ') => format!("'{word}'"),
        None => word,
    };
    let words: Vec<String> = std::env::args().skip(1).map(word).collect();
    format!("cargo xtask {}", words.join(" "))
}

fn write(out: &std::path::Path, run: Run, add: bool) -> Result<()> {
    let json = out.with_extension("json");
    let mut report = Report::default();
    if add && json.exists() {
        report = serde_json::from_slice(&fs::read(&json)?)
            .with_context(|| format!("{} is damaged", json.display()))?;
    }
    report.runs.push(run);
    if let Some(directory) = out.parent() {
        fs::create_dir_all(directory)?;
    }
    // Through a value, so that keys are in one order.
    let value: Value = serde_json::to_value(&report)?;
    fs::write(&json, format!("{}\n", serde_json::to_string_pretty(&value)?))?;
    fs::write(out.with_extension("md"), report::markdown(&report))?;
    if let Some(picture) = plot::svg(&report) {
        fs::write(out.with_extension("svg"), picture)?;
    }
    eprintln!("results: {}, .md, .svg", json.display());
    Ok(())
}
