//! Other engines on the same checkpoint and the same prompts, each by its script, in turn, with the same
//! threads.
//!
//! An engine that is not installed is left out, loudly. Hugging Face searches the same trie;
//! CTranslate2, OpenVINO and vLLM search without one, which is less work.

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use super::record::{Percentiles, Record};
use super::workload::{Tools, Workload};

/// One way to run a peer.
#[derive(Clone, Copy, Debug)]
enum Peer {
    HuggingFace { dtype: &'static str },
    CTranslate2 { compute: &'static str },
    OpenVino { weights: Weights },
    Vllm { dtype: &'static str },
}

/// The weights of an OpenVINO export. Activations are in single precision with both.
#[derive(Clone, Copy, Debug)]
enum Weights {
    F32,
    Int8,
}

impl Weights {
    /// As the results call it.
    fn label(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Int8 => "int8",
        }
    }

    /// As `optimum-cli` calls it.
    fn exported(self) -> &'static str {
        match self {
            Self::F32 => "fp32",
            Self::Int8 => "int8",
        }
    }
}

/// Which peers there are to compare with.
#[derive(Clone, Debug)]
pub(super) struct Peers {
    /// The Python with vLLM, if there is one.
    pub(super) vllm: Option<PathBuf>,
    /// The Python with OpenVINO GenAI and optimum-intel, if there is one.
    pub(super) openvino: Option<PathBuf>,
    pub(super) threads: usize,
    /// Only peers whose name contains one of these.
    pub(super) only: Vec<String>,
    /// Longest time that one may take.
    pub(super) patience: Duration,
}

/// What a script prints.
#[derive(Debug, Deserialize)]
struct Line {
    peer: String,
    cold_ms: Option<f64>,
    warm_ms: Option<f64>,
    requests: usize,
    prompt_tokens: u64,
}

impl Peers {
    /// Runs every peer at one beam width.
    ///
    /// # Errors
    ///
    /// Never for a peer that cannot run: that is said and passed over.
    pub(super) fn measure(&self, tools: &Tools, workload: &Workload, beams: usize) -> Result<Vec<Record>> {
        let all = [
            Peer::CTranslate2 { compute: "int8" },
            Peer::CTranslate2 { compute: "float32" },
            Peer::OpenVino { weights: Weights::F32 },
            Peer::OpenVino { weights: Weights::Int8 },
            Peer::HuggingFace { dtype: "bfloat16" },
            Peer::HuggingFace { dtype: "float32" },
            Peer::Vllm { dtype: "bfloat16" },
            Peer::Vllm { dtype: "float32" },
        ];
        let mut records = Vec::new();
        for peer in all {
            let name = peer.name();
            let wanted = if self.only.is_empty() {
                !peer.is_optional()
            } else {
                self.only.iter().any(|wanted| name.contains(wanted.as_str()))
            };
            if !wanted {
                continue;
            }
            match self.run(peer, tools, workload, beams) {
                Ok(line) => records.extend(line.records(workload, beams)),
                Err(error) => {
                    eprintln!("WARNING: no figures of {name} on {}: {error:#}", workload.shape.name)
                }
            }
        }
        Ok(records)
    }

    fn run(&self, peer: Peer, tools: &Tools, workload: &Workload, beams: usize) -> Result<Line> {
        let (beams, threads) = (beams.to_string(), self.threads.to_string());
        let (python, script) = match peer {
            Peer::HuggingFace { .. } => (&tools.python, "peer_hf.py"),
            Peer::CTranslate2 { .. } => (&tools.python, "peer_ctranslate2.py"),
            Peer::OpenVino { .. } => (self.openvino()?, "peer_openvino.py"),
            Peer::Vllm { .. } => (self.vllm.as_ref().context("give --vllm-python")?, "peer_vllm.py"),
        };
        let mut command = Command::new(python);
        command.arg("-B").arg(script).current_dir(&tools.scripts);
        match peer {
            Peer::HuggingFace { .. } | Peer::Vllm { .. } => command.arg(&workload.checkpoint),
            Peer::CTranslate2 { .. } => command.arg(&workload.checkpoint).arg(converted(tools, workload)?),
            Peer::OpenVino { weights } => command.arg(self.exported(tools, workload, weights)?),
        };
        command.arg(&workload.prompt_file).args(["--beams", &beams]);
        match peer {
            Peer::HuggingFace { dtype } => command.args(["--threads", &threads, "--dtype", dtype]),
            Peer::CTranslate2 { compute } => command.args(["--threads", &threads, "--compute", compute]),
            Peer::OpenVino { weights } => command.args(["--threads", &threads, "--label", weights.label()]),
            Peer::Vllm { dtype } => {
                let cores = format!("0-{}", self.threads.saturating_sub(1));
                command.env("OMP_NUM_THREADS", &threads).env("VLLM_CPU_OMP_THREADS_BIND", cores);
                command.args(["--dtype", dtype])
            }
        };
        eprintln!("$ {command:?}");
        let (ended, stdout, stderr) = self.watch(&mut command, &tools.work)?;
        let line = stdout.lines().rev().find(|line| line.starts_with("{\"peer\""));
        let Some(line) = line.filter(|_| ended.is_some_and(|status| status.success())) else {
            let said = stderr.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
            let how = ended.map_or_else(|| "took too long".to_owned(), |status| format!("failed, {status}"));
            bail!("{script} {how}: {said}");
        };
        eprintln!("  {line}");
        serde_json::from_str(line).with_context(|| format!("{script} printed {line}"))
    }
}

impl Peers {
    /// Runs a command until it ends or its time is over. Its output goes through files, and it gets a
    /// process group of its own: engines leave helpers behind that would hold a pipe open.
    fn watch(&self, command: &mut Command, work: &Path) -> Result<(Option<ExitStatus>, String, String)> {
        let (stdout, stderr) = (work.join("peer.out"), work.join("peer.err"));
        command.stdout(File::create(&stdout)?).stderr(File::create(&stderr)?).process_group(0);
        let mut child = command.spawn().with_context(|| format!("cannot start {command:?}"))?;
        let started = Instant::now();
        let mut ended = None;
        while ended.is_none() && started.elapsed() < self.patience {
            std::thread::sleep(Duration::from_millis(50));
            ended = child.try_wait()?;
        }
        let group = format!("-{}", child.id());
        let _ = Command::new("kill").args(["-KILL", "--", &group]).stderr(Stdio::null()).status();
        child.wait()?;
        let read = |path| std::fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        Ok((ended, read(stdout)?, read(stderr)?))
    }
}

impl Peer {
    /// Whether it runs only when asked for by name: much slower than its sibling, so it cannot be the
    /// fastest peer.
    fn is_optional(self) -> bool {
        matches!(self, Self::HuggingFace { dtype: "float32" })
    }

    fn name(self) -> String {
        match self {
            Self::HuggingFace { dtype } => format!("hf-{dtype}"),
            Self::CTranslate2 { compute } => format!("ctranslate2-{compute}"),
            Self::OpenVino { weights } => format!("openvino-genai-{}", weights.label()),
            Self::Vllm { dtype } => format!("vllm-{dtype}"),
        }
    }
}

/// The checkpoint in CTranslate2's own format.
fn converted(tools: &Tools, workload: &Workload) -> Result<PathBuf> {
    let target = std::path::absolute(tools.work.join(format!("{}-ctranslate2", workload.shape.name)))?;
    if !target.join("model.bin").exists() {
        let mut command = beside(&tools.python, "ct2-transformers-converter");
        command.arg("--force").arg("--model").arg(&workload.checkpoint).arg("--output_dir").arg(&target);
        convert(command)?;
    }
    Ok(target)
}

impl Peers {
    fn openvino(&self) -> Result<&PathBuf> {
        self.openvino.as_ref().context("give --openvino-python")
    }

    /// The checkpoint in OpenVINO's own format.
    fn exported(&self, tools: &Tools, workload: &Workload, weights: Weights) -> Result<PathBuf> {
        let name = format!("{}-openvino-{}", workload.shape.name, weights.label());
        let target = std::path::absolute(tools.work.join(name))?;
        if !target.join("openvino_model.bin").exists() {
            let mut command = beside(self.openvino()?, "optimum-cli");
            command.args(["export", "openvino", "--task", "text-generation-with-past"]);
            command.args(["--weight-format", weights.exported()]);
            command.arg("--model").arg(&workload.checkpoint).arg(&target);
            convert(command)?;
        }
        Ok(target)
    }
}

/// A program of the environment that this Python belongs to.
fn beside(python: &Path, program: &str) -> Command {
    Command::new(python.parent().unwrap_or(Path::new("")).join(program))
}

fn convert(mut command: Command) -> Result<()> {
    eprintln!("$ {command:?}");
    let done = command.output().with_context(|| format!("cannot start {command:?}"))?;
    if !done.status.success() {
        bail!("{command:?}: {}", String::from_utf8_lossy(&done.stderr));
    }
    Ok(())
}

impl Line {
    fn records(&self, workload: &Workload, beams: usize) -> Vec<Record> {
        let visits = [("cold", self.cold_ms), ("warm", self.warm_ms)];
        let record = |(visit, ms): (&str, Option<f64>)| {
            let ms = Percentiles { p50: ms?, ..Percentiles::default() };
            Some(Record {
                workload: workload.shape.name.into(),
                section: "visits".into(),
                engine: self.peer.clone(),
                visit: visit.into(),
                beams,
                context_tokens: self.prompt_tokens,
                concurrency: 1,
                requests: self.requests / 2,
                ms,
                ..Record::default()
            })
        };
        visits.into_iter().filter_map(record).collect()
    }
}
