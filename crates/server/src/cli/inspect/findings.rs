//! What `inspect` finds on its way: lines, problems, and notes.

use std::fmt::{Display, Write as _};
use std::io::ErrorKind;

use beamline_model::checkpoint::note::Note;
use beamline_model::error::ModelError;

use crate::runtime::LayoutProblem;

/// What is found, in the order in which it is printed.
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

    /// Lines of their own.
    pub(super) fn paragraph(&mut self, text: &str) {
        let _ = write!(self.lines, "\n{text}");
    }

    /// What the files' names and sizes say.
    pub(super) fn layout(&mut self, problems: Vec<LayoutProblem>) {
        problems.iter().for_each(|problem| self.problem(problem));
        self.layout = problems;
    }

    /// Why the checkpoint cannot be served. What was said before is not said again.
    pub(super) fn problem(&mut self, problem: impl Display) {
        let text = problem.to_string();
        if !self.problems.contains(&text) {
            self.problems.push(text);
        }
    }

    /// An error of the model crate, unless the layout says more about the same file. Every tensor counts alone.
    pub(super) fn model_error(&mut self, error: &ModelError) {
        match error {
            ModelError::Mismatch(problems) => problems.iter().for_each(|problem| self.problem(problem)),
            error if self.explained(error) => {}
            error => self.problem(error),
        }
    }

    /// What the author of the checkpoint should know.
    pub(super) fn notes(&mut self, notes: &[Note]) {
        self.notes.extend(notes.iter().map(ToString::to_string));
    }

    /// Keeps what went well, or notes what went wrong.
    pub(super) fn take<T>(&mut self, result: Result<T, impl Display>) -> Option<T> {
        result.map_err(|error| self.problem(error)).ok()
    }

    /// Whether nothing is wrong.
    pub(super) fn is_clean(&self) -> bool {
        self.problems.is_empty()
    }

    /// All of it. `quick` says that the model was not loaded.
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

    /// Whether a problem of the layout is the cause of this error, and says what to do.
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
