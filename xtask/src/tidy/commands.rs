//! Documents name commands that exist, with flags that exist.
//!
//! Results of measurements are excused: they say what was typed then.

use std::collections::BTreeMap;

use super::command_line;
use super::markdown::Markdown;
use super::offence::{Offence, Rule};
use super::program::Program;

/// Records of commands that were run once.
const RECORDS: &str = "bench/results/";

/// Checks every command line of Markdown that begins with `name`.
pub(super) fn check(
    files: &BTreeMap<&str, Markdown>,
    name: &str,
    program: &Program,
    rule: Rule,
    offences: &mut Vec<Offence>,
) {
    for (&path, markdown) in files.iter().filter(|(path, _)| !path.starts_with(RECORDS)) {
        for command in command_line::find(&markdown.code, name) {
            if let Some(wrong) = program.misunderstands(&command.words) {
                let advice = format!("ask `{name} --help`: {wrong}");
                offences.push(Offence::new(rule, path, command.line, advice));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn planted_commands_are_found_in_blocks_and_in_text() {
        let text = "Run `cargo xtask test` or `cargo xtask tset`.\n\n```sh\ncargo xtask bench --quick\n\
                    cargo xtask bench --quik # no\ncargo build --quik\n```\n";
        let files =
            BTreeMap::from([("a.md", Markdown::read(text)), ("bench/results/a.md", Markdown::read(text))]);
        let mut offences = Vec::new();
        let chores = Program::of_clap(&crate::Chore::command());
        check(&files, "cargo xtask", &chores, Rule::Command, &mut offences);
        let places: Vec<_> = offences.iter().map(|offence| (offence.path.as_str(), offence.line)).collect();
        assert_eq!(places, [("a.md", 1), ("a.md", 5)]);
    }
}
