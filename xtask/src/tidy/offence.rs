//! What breaks a rule: where, which rule, and what to do about it.
//!
//! Invariant: the name of a rule is what `xtask/tidy-known.txt` calls it, so it does not change lightly.

use std::fmt::{self, Display, Formatter};

/// A rule of the house.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Rule {
    /// A documented command line of `beamline` that it would not understand.
    BeamlineCommand,
    /// A documented command line of `cargo xtask` that it would not understand.
    Command,
    /// A path of one machine, or a word that means something to its author alone.
    Private,
    /// A use of what a module must not know.
    Layers,
    /// A link in Markdown that leads nowhere.
    Links,
    /// A function that does not fit on a screen.
    LongFunction,
    /// A paragraph that nobody reads to its end.
    LongParagraph,
    /// A phrase with a plainer wording.
    Phrases,
    /// A doc comment that says too little.
    ShortDoc,
    /// A Rust file that cannot be parsed.
    Syntax,
    /// Unsafe code outside its folders.
    Unsafe,
    /// A comment that is wider than a screen.
    WideComment,
}

impl Rule {
    /// The name in messages and in the list of known offences.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::BeamlineCommand => "beamline-command",
            Self::Command => "command",
            Self::Private => "private",
            Self::Layers => "layers",
            Self::Links => "links",
            Self::LongFunction => "long-function",
            Self::LongParagraph => "long-paragraph",
            Self::Phrases => "phrases",
            Self::ShortDoc => "short-doc",
            Self::Syntax => "syntax",
            Self::Unsafe => "unsafe",
            Self::WideComment => "wide-comment",
        }
    }
}

/// One place that breaks one rule.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Offence {
    pub(super) path: String,
    pub(super) line: usize,
    pub(super) rule: Rule,
    /// What to do, in the imperative.
    pub(super) advice: String,
}

impl Offence {
    pub(super) fn new(rule: Rule, path: &str, line: usize, advice: impl Into<String>) -> Self {
        Self { path: path.to_owned(), line, rule, advice: advice.into() }
    }
}

impl Display for Offence {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}: {}", self.path, self.line, self.rule.name(), self.advice)
    }
}
