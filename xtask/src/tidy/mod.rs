//! `cargo xtask tidy`: rules of the house that neither the compiler nor clippy knows.
//!
//! | module | one idea |
//! | --- | --- |
//! | [`layers`], [`imports`] | what each module must not know, as a table; where unsafe code may stand |
//! | [`functions`] | functions fit on a screen |
//! | [`comment_rules`] | comments are no wider than code, and doc comments say something |
//! | [`phrases`] | phrases with plainer wordings |
//! | [`markdown_rules`] | paragraphs are short, links lead somewhere |
//! | [`commands`] | documented commands exist |
//! | [`private`] | nothing speaks of one machine |
//! | [`known`] | the list of what is not yet so, which only gets shorter |
//!
//! The other modules read files for them. Place in the flow: `.ci/run` calls it first, because it needs no
//! build but its own; `cargo xtask test` calls [`check_commands`] last, because then there is a binary to
//! ask.
//!
//! Invariants: nothing is changed but the list, and that only with `--update`; the same tree gives the same
//! messages in the same order; it takes under three seconds.

mod command_line;
mod commands;
mod comment_rules;
mod comments;
mod each_file;
mod functions;
mod imports;
mod known;
mod layers;
mod markdown;
mod markdown_rules;
mod offence;
mod phrases;
mod private;
mod program;
mod rust_file;
mod rust_paths;
mod test_lines;
mod tree;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::CommandFactory;

use known::Known;
use markdown::Markdown;
use offence::{Offence, Rule};
use program::Program;
use tree::Tree;

/// Options of the chore.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Lower xtask/tidy-known.txt to what is left. Where there is no such file, write it anew.
    #[arg(long)]
    update: bool,
    /// A built `beamline`, to hold the documented command lines against.
    #[arg(long, value_name = "FILE")]
    beamline: Option<PathBuf>,
}

/// Checks the whole tree, and fails where a rule is broken more often than is known.
pub(crate) fn run(args: &Args) -> Result<()> {
    let texts = Tree::open(&crate::root())?;
    let offences = check(&texts, args.beamline.as_deref())?;
    let path = crate::root().join(known::PATH);
    let known = match std::fs::read_to_string(&path) {
        Ok(text) => Known::parse(&text)?,
        Err(_) if args.update => Known::of(&offences),
        Err(error) => return Err(error).context("cannot read xtask/tidy-known.txt; --update writes it"),
    };
    let known = if args.update {
        let lowered = known.lowered(&offences);
        std::fs::write(&path, lowered.written())
            .with_context(|| format!("cannot write {}", path.display()))?;
        lowered
    } else {
        known
    };
    let verdict = known.judge(&offences);
    let messages = verdict.too_many.iter().map(ToString::to_string).chain(verdict.too_high);
    report(messages.collect())?;
    eprintln!("tidy: nothing new, {} known", known.total());
    Ok(())
}

/// Holds the documented command lines of `beamline` against what this binary understands.
pub(crate) fn check_commands(beamline: &Path) -> Result<()> {
    let texts = Tree::open(&crate::root())?.texts()?;
    let mut offences = Vec::new();
    ask_beamline(&markdown_of(&texts), beamline, &mut offences)?;
    report(offences.iter().map(ToString::to_string).collect())
}

fn report(messages: Vec<String>) -> Result<()> {
    if messages.is_empty() {
        return Ok(());
    }
    for message in &messages {
        eprintln!("{message}");
    }
    bail!("tidy: {} to mend", messages.len());
}

/// Every offence of the tree, in the order of paths and lines.
fn check(tree: &Tree, beamline: Option<&Path>) -> Result<Vec<Offence>> {
    let texts = tree.texts()?;
    let mut offences = Vec::new();
    imports::check_tables(tree, &mut offences);
    offences.extend(each_file::check(&texts));
    let markdown = markdown_of(&texts);
    markdown_rules::check(&markdown, tree, &mut offences);
    let chores = Program::of_clap(&crate::Chore::command());
    commands::check(&markdown, "cargo xtask", &chores, Rule::Command, &mut offences);
    if let Some(beamline) = beamline {
        ask_beamline(&markdown, beamline, &mut offences)?;
    }
    offences.sort();
    Ok(offences)
}

fn markdown_of(texts: &[(String, String)]) -> BTreeMap<&str, Markdown> {
    let markdown = texts.iter().filter(|(path, _)| path.ends_with(".md"));
    markdown.map(|(path, text)| (path.as_str(), Markdown::read(text))).collect()
}

fn ask_beamline(
    markdown: &BTreeMap<&str, Markdown>,
    beamline: &Path,
    offences: &mut Vec<Offence>,
) -> Result<()> {
    let program = Program::of_binary(beamline)?;
    commands::check(markdown, "beamline", &program, Rule::BeamlineCommand, offences);
    Ok(())
}
