//! A Rust file, parsed once for all rules.
//!
//! Functions and tests need a parser: a scanner of braces stumbles over macros, raw strings and lifetimes.
//! `syn` and `proc-macro2` are in the tree already, because derive macros are built with them. With the
//! features used here they take some ten seconds more of building, and about a second to read the whole
//! workspace. Rules about names look at tokens and not at the syntax tree, so that they see into macros.
//!
//! Invariants: lines count from 1; a line that only a test is built from is told by [`RustFile::is_test`].
//!
//! What this must not know: rules.

use std::ops::{Range, RangeInclusive};

use anyhow::{Context, Result};
use proc_macro2::{LineColumn, Span, TokenStream, TokenTree};

use super::test_lines;

/// A file with its tokens and its syntax tree.
pub(super) struct RustFile<'a> {
    pub(super) path: &'a str,
    pub(super) text: &'a str,
    pub(super) tokens: Vec<Token>,
    pub(super) syntax: syn::File,
    line_starts: Vec<usize>,
    tests: Vec<RangeInclusive<usize>>,
}

/// A piece of the text that is neither blank nor a plain comment.
pub(super) struct Token {
    pub(super) kind: Kind,
    /// Its bytes in the text.
    pub(super) place: Range<usize>,
}

/// What rules ask about a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A name or a keyword.
    Name,
    /// A bracket that opens.
    Open,
    /// A bracket that closes.
    Close,
    /// A doc comment as a whole.
    Doc,
    /// A literal, or one character of punctuation.
    Other,
}

impl<'a> RustFile<'a> {
    pub(super) fn parse(path: &'a str, text: &'a str) -> Result<Self> {
        let stream: TokenStream = text.parse().ok().context("the tokens of the file cannot be told apart")?;
        let after_breaks = text.match_indices('\n').map(|(at, _)| at + 1);
        let line_starts: Vec<usize> = std::iter::once(0).chain(after_breaks).collect();
        let mut tokens = Flattening { text, line_starts: &line_starts, found: Vec::new() };
        tokens.add(stream.clone());
        let tokens = tokens.found;
        let syntax = syn::parse2::<syn::File>(stream)?;
        let tests = test_lines::of(&syntax);
        Ok(Self { path, text, tokens, syntax, line_starts, tests })
    }

    /// The text of a token.
    pub(super) fn source(&self, token: &Token) -> &'a str {
        &self.text[token.place.clone()]
    }

    /// The line of a byte of the text.
    pub(super) fn line(&self, at: usize) -> usize {
        self.line_starts.partition_point(|&start| start <= at)
    }

    /// Whether this line is built for tests only.
    pub(super) fn is_test(&self, line: usize) -> bool {
        is_test_path(self.path) || self.tests.iter().any(|lines| lines.contains(&line))
    }
}

/// Whether a file is part of tests as a whole, by its name.
fn is_test_path(path: &str) -> bool {
    path.split('/').any(|part| part == "tests" || part == "tests.rs")
}

/// Puts the tokens of a file in a row, those in macros as well.
struct Flattening<'a> {
    text: &'a str,
    line_starts: &'a [usize],
    found: Vec<Token>,
}

impl Flattening<'_> {
    fn add(&mut self, stream: TokenStream) {
        for tree in stream {
            if let TokenTree::Group(group) = tree {
                let open = self.place(group.span_open());
                // A doc comment comes as the tokens of an attribute, all of them in the place of the comment.
                if !self.is_in_last_doc(&open) {
                    self.found.push(Token { kind: Kind::Open, place: open });
                    self.add(group.stream());
                    let close = self.place(group.span_close());
                    self.found.push(Token { kind: Kind::Close, place: close });
                }
                continue;
            }
            let place = self.place(tree.span());
            if self.is_in_last_doc(&place) {
                continue;
            }
            let kind = match tree {
                TokenTree::Ident(_) => Kind::Name,
                TokenTree::Punct(_) if place.len() > 1 => Kind::Doc,
                TokenTree::Group(_) | TokenTree::Punct(_) | TokenTree::Literal(_) => Kind::Other,
            };
            self.found.push(Token { kind, place });
        }
    }

    fn is_in_last_doc(&self, place: &Range<usize>) -> bool {
        self.found.last().is_some_and(|last| last.kind == Kind::Doc && place.start < last.place.end)
    }

    fn place(&self, span: Span) -> Range<usize> {
        self.byte(span.start())..self.byte(span.end())
    }

    /// From the characters of a line to a byte. `Span::byte_range` tells the same and takes three times as
    /// long.
    fn byte(&self, at: LineColumn) -> usize {
        let start = at.line.checked_sub(1).and_then(|line| self.line_starts.get(line));
        let start = start.copied().unwrap_or(self.text.len());
        let line = &self.text[start..];
        let before = line.as_bytes().get(..at.column).unwrap_or(line.as_bytes());
        if before.is_ascii() {
            return start + before.len();
        }
        start + line.char_indices().nth(at.column).map_or(line.len(), |(byte, _)| byte)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_tests_are_tests_as_a_whole() {
        for path in ["crates/model/tests/config.rs", "crates/model/src/cpu/tests.rs", "src/tests/mod.rs"] {
            assert!(RustFile::parse(path, "fn a() {}").unwrap().is_test(1), "{path}");
        }
        assert!(!RustFile::parse("src/latests.rs", "fn a() {}").unwrap().is_test(1));
    }

    #[test]
    fn tokens_are_told_by_their_text() {
        let text = "/// Ä doc.\nfn a() {\n    /* é */ \"ü ä\"; b!(c)\n}\n";
        let file = RustFile::parse("src/a.rs", text).unwrap();
        let sources: Vec<&str> = file.tokens.iter().map(|token| file.source(token)).collect();
        let expected = ["/// Ä doc.", "fn", "a", "(", ")", "{", "\"ü ä\"", ";", "b", "!", "(", "c", ")", "}"];
        assert_eq!(sources, expected);
        assert_eq!(file.tokens[0].kind, Kind::Doc);
        assert_eq!(file.line(file.tokens[6].place.start), 3);
    }

    #[test]
    fn what_is_no_rust_is_refused() {
        assert!(RustFile::parse("src/a.rs", "fn a( {").is_err());
        assert!(RustFile::parse("src/a.rs", "fn fn fn").is_err());
    }
}
