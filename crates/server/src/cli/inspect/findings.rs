//! The findings of `inspect`: lines, problems, and notes.

use std::fmt::{Display, Write as _};
use std::io::ErrorKind;

use beamline_model::checkpoint::note::Note;
use beamline_model::error::ModelError;

use crate::runtime::LayoutProblem;

/// The findings, in the order in which they are printed.
#[derive(Default)]
pub(super) struct Findings {
    lines: String,
    layout: Vec<LayoutProblem>,
    problems: Vec<String>,
    notes: Vec<String>,
}

impl Findings {
    /// A property of the checkpoint.
    pub(super) fn line(&mut self, name: &str, value: impl Display) {
        // Writing to a String cannot fail.
        let _ = writeln!(self.lines, "{name:<13} {value}");
    }

    /// Adds lines without a name.
    pub(super) fn paragraph(&mut self, text: &str) {
        let _ = write!(self.lines, "\n{text}");
    }

    /// Adds the problems that names and sizes of files show.
    pub(super) fn layout(&mut self, problems: Vec<LayoutProblem>) {
        problems.iter().for_each(|problem| self.problem(problem));
        self.layout = problems;
    }

    /// Adds a reason why the checkpoint cannot be served, unless an earlier one says the same.
    pub(super) fn problem(&mut self, problem: impl Display) {
        let text = problem.to_string();
        if !self.problems.contains(&text) {
            self.problems.push(text);
        }
    }

    /// Adds an error of the model crate, unless the layout says more about the same file. Every
    /// tensor counts alone.
    pub(super) fn model_error(&mut self, error: &ModelError) {
        match error {
            ModelError::Mismatch(problems) => problems.iter().for_each(|problem| self.problem(problem)),
            error if self.explained(error) => {}
            error => self.problem(error),
        }
    }

    /// Adds notes for the author of the checkpoint.
    pub(super) fn notes(&mut self, notes: &[Note]) {
        self.notes.extend(notes.iter().map(ToString::to_string));
    }

    /// Returns the value of a success, or adds the error as a problem.
    pub(super) fn take<T>(&mut self, result: Result<T, impl Display>) -> Option<T> {
        result.map_err(|error| self.problem(error)).ok()
    }

    /// Whether there are no problems.
    pub(super) fn is_clean(&self) -> bool {
        self.problems.is_empty()
    }

    /// All findings as text. `quick` means that the model was not loaded.
    pub(super) fn text(&self, quick: bool) -> String {
        let mut text = self.lines.clone();
        list(&mut text, "note", &self.notes);
        list(&mut text, "problem", &self.problems);
        if self.is_clean() {
            text.push_str(match quick {
                true => {
                    "\nno problems found in the files; run it without --quick to know whether it serves\n"
                }
                false => "\nno problems found: `beamline serve` serves this checkpoint\n",
            });
        }
        text
    }

    /// Whether a problem of the layout causes this error and says what to do.
    fn explained(&self, error: &ModelError) -> bool {
        let pointer = |name: &str| self.layout.iter().any(|problem| problem.file() == Some(name));
        match error {
            _ if self.layout.is_empty() => false,
            ModelError::Read { path, source } => {
                let name = path.file_name().and_then(|name| name.to_str());
                source.kind() == ErrorKind::NotFound || name.is_some_and(pointer)
            }
            ModelError::Directory(_) => true,
            ModelError::Tensors { file, .. } => pointer(file),
            ModelError::Config(_) => pointer("config.json"),
            ModelError::Tokenizer(_) => pointer("tokenizer.json"),
            _ => false,
        }
    }
}

fn list(text: &mut String, what: &str, lines: &[String]) {
    if lines.is_empty() {
        return;
    }
    let _ = writeln!(text, "\n{} {what}{}:", lines.len(), if lines.len() == 1 { "" } else { "s" });
    for line in lines {
        let _ = writeln!(text, "- {}", line.replace('\n', "\n  "));
    }
}
