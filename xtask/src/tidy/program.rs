//! What a program understands: subcommands and their flags.
//!
//! `cargo xtask` is asked in this process, through its clap definition; `beamline` by the text of `--help`,
//! so that it need not be built for this.
//!
//! What this must not know: Markdown.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::command_line::Word;

/// A program or a subcommand.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Program {
    names: Vec<String>,
    /// With their dashes.
    flags: Vec<String>,
    subcommands: Vec<Self>,
    /// Whether it hands what follows to another program, whose flags are not known here.
    passes_on: bool,
}

impl Program {
    /// As clap describes it.
    pub(super) fn of_clap(command: &clap::Command) -> Self {
        let mut flags = vec!["-h".to_owned(), "--help".to_owned()];
        for argument in command.get_arguments() {
            let longs = argument.get_long_and_visible_aliases().unwrap_or_default();
            flags.extend(longs.into_iter().map(|long| format!("--{long}")));
            flags.extend(argument.get_short().map(|short| format!("-{short}")));
        }
        let mut names = vec![command.get_name().to_owned()];
        names.extend(command.get_all_aliases().map(str::to_owned));
        let passes_on = command.get_arguments().any(clap::Arg::is_trailing_var_arg_set);
        Self { names, flags, subcommands: command.get_subcommands().map(Self::of_clap).collect(), passes_on }
    }

    /// As a binary describes itself and its subcommands.
    pub(super) fn of_binary(binary: &Path) -> Result<Self> {
        Self::of_help(binary, &[])
    }

    fn of_help(binary: &Path, path: &[&str]) -> Result<Self> {
        let mut command = Command::new(binary);
        let output = command.args(path).arg("--help").output();
        let output = output.with_context(|| format!("cannot start {}", binary.display()))?;
        ensure!(output.status.success(), "{command:?}: {}", output.status);
        let help = String::from_utf8_lossy(&output.stdout);
        let subcommands = subcommands_in(&help).into_iter().map(|name| {
            let path: Vec<&str> = path.iter().copied().chain([name]).collect();
            Self::of_help(binary, &path)
        });
        let subcommands = subcommands.collect::<Result<_>>()?;
        let names = path.last().map(|&name| name.to_owned()).into_iter().collect();
        Ok(Self { names, flags: flags_in(&help), subcommands, passes_on: false })
    }

    /// What is wrong with a command line. Values are not looked at, nor is whether all that is needed was
    /// given.
    pub(super) fn misunderstands(&self, words: &[Word]) -> Option<String> {
        let mut program = self;
        for word in words {
            let text = word.text.as_str();
            if word.quoted {
                continue;
            }
            if text == "--" {
                return None;
            }
            let flag = text.split_once('=').map_or(text, |(flag, _)| flag);
            if flag.starts_with('-') && flag.contains(char::is_alphabetic) {
                if !program.passes_on && !program.flags.iter().any(|known| known == flag) {
                    return Some(format!("there is no flag {flag}"));
                }
            } else if !program.subcommands.is_empty() && !is_placeholder(text) {
                let named = |program: &&Self| program.names.iter().any(|name| name == text);
                let Some(subcommand) = program.subcommands.iter().find(named) else {
                    return Some(format!("there is no subcommand {text}"));
                };
                program = subcommand;
            }
        }
        None
    }
}

/// Whether a word stands for others: `DIR`, `<DIR>`, `...`.
fn is_placeholder(word: &str) -> bool {
    word.starts_with('<') || !word.contains(|c: char| c.is_lowercase())
}

/// The subcommands that a help text lists. That `help` exists is of no interest.
fn subcommands_in(help: &str) -> Vec<&str> {
    let after = help.lines().skip_while(|line| line.trim_end() != "Commands:").skip(1);
    // Names are set in by two blanks, descriptions that go on by more.
    let names = after
        .take_while(|line| line.is_empty() || line.starts_with(' '))
        .filter_map(|line| line.strip_prefix("  ").filter(|rest| !rest.starts_with(' ')))
        .filter_map(|rest| rest.split_whitespace().next());
    names.filter(|&name| name != "help").collect()
}

/// The flags that a help text describes, which stand where their line begins.
fn flags_in(help: &str) -> Vec<String> {
    let described = help.lines().map(str::trim_start).filter(|line| line.starts_with('-'));
    let flags = described.flat_map(|line| {
        let names = line.split("  ").next().unwrap_or(line);
        let words = names.split([' ', ',', '=', '[', '<']);
        words.filter(|word| word.starts_with('-')).map(|word| word.trim_end_matches('.').to_owned())
    });
    flags.collect()
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    const HELP: &str = "\
A server

Usage: beamline [OPTIONS] <COMMAND>

Commands:
  serve   Serve models
            and more
  models  Manage them
  help    Print this

Options:
  -q, --quiet...       Say less. See --loud
      --listen <ADDR>  Where
      --color[=<WHEN>]
  -h, --help           Print help
";

    fn check(program: &Program, line: &str) -> Option<String> {
        let words = line.split_whitespace().map(|word| Word { text: word.to_owned(), quoted: false });
        program.misunderstands(&words.collect::<Vec<_>>())
    }

    #[test]
    fn a_help_text_tells_flags_and_subcommands() {
        assert_eq!(subcommands_in(HELP), ["serve", "models"]);
        assert_eq!(flags_in(HELP), ["-q", "--quiet", "--listen", "--color", "-h", "--help"]);
    }

    #[test]
    fn planted_mistakes_are_found() {
        let list = Program { names: vec!["list".to_owned()], flags: flags_in(HELP), ..Program::default() };
        let models =
            Program { names: vec!["models".to_owned()], subcommands: vec![list], ..Program::default() };
        let program = Program { flags: flags_in(HELP), subcommands: vec![models], ..Program::default() };
        for right in [
            "models list",
            "--quiet models list --listen=x",
            "models list any thing",
            "--help",
            "COMMAND --x -1",
        ] {
            let wrong = check(&program, right);
            assert!(wrong.is_none() || right.starts_with("COMMAND"), "{right}: {wrong:?}");
        }
        assert_eq!(check(&program, "model list").unwrap(), "there is no subcommand model");
        assert_eq!(check(&program, "models lists").unwrap(), "there is no subcommand lists");
        assert_eq!(check(&program, "models list --lisen x").unwrap(), "there is no flag --lisen");
        assert_eq!(check(&program, "models --quiet list").unwrap(), "there is no flag --quiet");
    }

    #[test]
    fn chores_are_understood_as_clap_describes_them() {
        let chores = Program::of_clap(&crate::Chore::command());
        for right in [
            "test --python",
            "bench --quick",
            "soak --swaps 400",
            "fuzz --seconds 5 config",
            "tidy --update",
            "CHORE",
        ] {
            assert_eq!(check(&chores, right), None, "{right}");
        }
        for wrong in ["tests", "test --ruby", "bench --quickly", "tidy --raise"] {
            assert!(check(&chores, wrong).is_some(), "{wrong}");
        }
    }
}
