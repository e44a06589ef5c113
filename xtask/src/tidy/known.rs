//! The list that only gets shorter: how often a file may still break a rule.
//!
//! A line is `rule path count`. A file that is not listed may not break a rule at all. A file that breaks
//! it less often than its line says is an error too, so that the list is lowered by the change that mended
//! something.
//!
//! What this must not know: what the rules are about.

use std::collections::BTreeMap;
use std::fmt::Write;

use anyhow::{Context, Result, ensure};

use super::offence::{Offence, Rule};

/// Where the list is.
pub(super) const PATH: &str = "xtask/tidy-known.txt";
const HEADER: &str = "\
# How often a file may still break a rule of `cargo xtask tidy`: rule, path, count. What is not here may not at all.
# Lower a count by mending something, then run `cargo xtask tidy --update`. It raises nothing.
";

/// Counts of offences per rule and file.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Known(BTreeMap<(String, String), usize>);

/// What the list says about the present offences.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Verdict<'a> {
    /// Offences of files that have more of them than they may. Which of them are new cannot be told.
    pub(super) too_many: Vec<&'a Offence>,
    /// Lines of the list that are too high.
    pub(super) too_high: Vec<String>,
}

impl Known {
    /// The counts of the present offences.
    pub(super) fn of(offences: &[Offence]) -> Self {
        let mut counts = BTreeMap::new();
        for offence in offences.iter().filter(|offence| may_be_listed(offence.rule)) {
            *counts.entry((offence.rule.name().to_owned(), offence.path.clone())).or_insert(0) += 1;
        }
        Self(counts)
    }

    pub(super) fn parse(text: &str) -> Result<Self> {
        let mut counts = BTreeMap::new();
        for (index, line) in text.lines().enumerate() {
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let parts = line.split_once(' ').and_then(|(rule, rest)| Some((rule, rest.rsplit_once(' ')?)));
            let (rule, (path, count)) =
                parts.with_context(|| format!("{PATH}:{}: write `rule path count`", index + 1))?;
            let count = count
                .parse::<usize>()
                .with_context(|| format!("{PATH}:{}: the count is not a number", index + 1))?;
            ensure!(count > 0, "{PATH}:{}: remove the line, its count is 0", index + 1);
            let twice = counts.insert((rule.to_owned(), path.to_owned()), count);
            ensure!(twice.is_none(), "{PATH}:{}: remove one of two lines for the same file", index + 1);
        }
        Ok(Self(counts))
    }

    pub(super) fn written(&self) -> String {
        let mut text = HEADER.to_owned();
        for ((rule, path), count) in &self.0 {
            // Writing to a string does not fail.
            let _ = writeln!(text, "{rule} {path} {count}");
        }
        text
    }

    /// This list, where the present offences are fewer lowered to them.
    pub(super) fn lowered(&self, offences: &[Offence]) -> Self {
        let now = Self::of(offences);
        let both = self.0.iter().filter_map(|(key, &count)| Some((key.clone(), count.min(*now.0.get(key)?))));
        Self(both.collect())
    }

    pub(super) fn judge<'a>(&self, offences: &'a [Offence]) -> Verdict<'a> {
        let now = Self::of(offences);
        let too_many = offences.iter().filter(|offence| {
            let key = (offence.rule.name().to_owned(), offence.path.clone());
            now.0.get(&key).is_none_or(|&count| count > self.0.get(&key).copied().unwrap_or(0))
        });
        let too_high = self.0.iter().filter_map(|(key, &count)| {
            let present = now.0.get(key).copied().unwrap_or(0);
            let (rule, path) = key;
            (present < count).then(|| {
                format!(
                    "{path}:1: {rule}: run cargo xtask tidy --update: {count} are listed, {present} are left"
                )
            })
        });
        Verdict { too_many: too_many.collect(), too_high: too_high.collect() }
    }

    /// How many offences are on the list.
    pub(super) fn total(&self) -> usize {
        self.0.values().sum()
    }
}

/// A command line that `beamline` would not understand is never listed: most runs have no binary to ask,
/// and would find the list too high.
fn may_be_listed(rule: Rule) -> bool {
    rule != Rule::BeamlineCommand
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offence(rule: Rule, path: &str, line: usize) -> Offence {
        Offence::new(rule, path, line, "mend it")
    }

    #[test]
    fn a_fresh_file_starts_at_zero() {
        let offences = [offence(Rule::Phrases, "a.md", 3)];
        let verdict = Known::default().judge(&offences);
        assert_eq!(verdict.too_many, [&offences[0]]);
        assert!(verdict.too_high.is_empty());
    }

    #[test]
    fn as_many_as_listed_pass_and_one_more_shows_all_of_them() {
        let known = Known::parse("phrases a.md 2\n").unwrap();
        let mut offences = vec![offence(Rule::Phrases, "a.md", 3), offence(Rule::Phrases, "a.md", 5)];
        assert_eq!(known.judge(&offences), Verdict::default());
        offences.push(offence(Rule::Phrases, "a.md", 9));
        assert_eq!(known.judge(&offences).too_many.len(), 3);
        assert_eq!(known.lowered(&offences), known, "the list is never raised");
    }

    #[test]
    fn fewer_than_listed_is_an_error_that_an_update_mends() {
        let known = Known::parse("links b.md 1\nphrases a.md 2\n").unwrap();
        let offences = [offence(Rule::Phrases, "a.md", 3)];
        let verdict = known.judge(&offences);
        assert!(verdict.too_many.is_empty());
        assert_eq!(verdict.too_high.len(), 2);
        assert!(verdict.too_high[0].contains("cargo xtask tidy --update"), "{:?}", verdict.too_high);
        let lowered = known.lowered(&offences);
        assert_eq!(lowered, Known::parse("phrases a.md 1").unwrap());
        assert_eq!(lowered.judge(&offences), Verdict::default());
    }

    #[test]
    fn what_is_written_is_sorted_and_read_again() {
        let offences = [offence(Rule::Phrases, "b c.md", 3), offence(Rule::Links, "z.md", 1)];
        let known = Known::of(&offences);
        let text = known.written();
        assert!(text.ends_with("\nlinks z.md 1\nphrases b c.md 1\n"), "{text}");
        assert_eq!(Known::parse(&text).unwrap(), known);
        assert_eq!(known.total(), 2);
    }

    #[test]
    fn nonsense_is_refused() {
        for nonsense in ["phrases", "phrases a.md", "phrases a.md x", "phrases a.md 0", "l a 1\nl a 2"] {
            assert!(Known::parse(nonsense).is_err(), "{nonsense}");
        }
    }

    #[test]
    fn commands_of_beamline_are_never_listed() {
        let offences = [offence(Rule::BeamlineCommand, "a.md", 3)];
        assert_eq!(Known::of(&offences), Known::default());
        assert_eq!(Known::default().judge(&offences).too_many.len(), 1);
    }
}
