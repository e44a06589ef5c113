//! The comments of a file, as blocks of lines that belong together.
//!
//! In Rust, a comment is what lies between two tokens, and a doc comment is a token of its own: so no
//! string that holds `//` is taken for one. In other languages only comments that have a line for
//! themselves are seen.
//!
//! Invariant: the lines of a block follow each other and carry the same mark.
//!
//! What this must not know: rules.

use super::rust_file::{Kind, RustFile};

/// Lines of a comment that follow each other.
#[derive(Debug, PartialEq)]
pub(super) struct Comment {
    /// Its first line, from 1.
    pub(super) line: usize,
    /// What its lines say, without marks.
    pub(super) lines: Vec<String>,
    mark: &'static str,
}

impl Comment {
    /// Whether it documents something.
    pub(super) fn is_doc(&self) -> bool {
        ["///", "//!", "/**", "/*!"].contains(&self.mark)
    }

    /// Its lines with their numbers.
    pub(super) fn numbered(&self) -> impl Iterator<Item = (usize, &str)> {
        self.lines.iter().enumerate().map(|(index, text)| (self.line + index, text.as_str()))
    }

    pub(super) fn words(&self) -> usize {
        let words = self.lines.iter().flat_map(|line| line.split_whitespace());
        words.filter(|word| word.contains(char::is_alphanumeric)).count()
    }
}

/// The comments of a Rust file.
pub(super) fn of_rust(file: &RustFile<'_>) -> Vec<Comment> {
    let mut blocks = Blocks::default();
    let mut end = 0;
    for token in &file.tokens {
        blocks.between(file, end, token.place.start);
        if token.kind == Kind::Doc {
            blocks.between(file, token.place.start, token.place.end);
        }
        end = token.place.end;
    }
    blocks.between(file, end, file.text.len());
    blocks.0
}

/// The comments of a file of another language, by its ending. None where the language is not known.
pub(super) fn of_lines(path: &str, text: &str) -> Vec<Comment> {
    let ending = path.rsplit(['/', '.']).next().unwrap_or(path);
    let mark = match ending {
        "py" | "toml" | "yml" | "yaml" | "sh" | "run" => "#",
        "cu" | "cuh" | "cpp" | "hpp" => "//",
        _ => return Vec::new(),
    };
    let mut blocks = Blocks::default();
    for (index, line) in text.lines().enumerate() {
        if let Some(said) = line.trim_start().strip_prefix(mark) {
            blocks.push(index + 1, mark, vec![said.to_owned()]);
        }
    }
    blocks.0
}

/// Comments as they are found, those that belong together joined.
#[derive(Default)]
struct Blocks(Vec<Comment>);

impl Blocks {
    /// Takes the comments of a part of a file that holds nothing else.
    fn between(&mut self, file: &RustFile<'_>, mut at: usize, end: usize) {
        while let Some(offset) = file.text[at..end].find('/') {
            at += offset;
            let rest = &file.text[at..end];
            let mark = mark_of(rest);
            let length = if mark.starts_with("//") {
                rest.find('\n').unwrap_or(rest.len())
            } else {
                block_comment_length(rest)
            };
            let said = rest[..length].strip_prefix(mark).unwrap_or_default();
            let said = if mark.starts_with("/*") { said.trim_end_matches("*/") } else { said };
            self.push(file.line(at), mark, said.split('\n').map(str::to_owned).collect());
            at += length.max(1);
        }
    }

    fn push(&mut self, line: usize, mark: &'static str, lines: Vec<String>) {
        match self.0.last_mut() {
            Some(last) if last.mark == mark && last.line + last.lines.len() == line => {
                last.lines.extend(lines)
            }
            _ => self.0.push(Comment { line, lines, mark }),
        }
    }
}

fn mark_of(comment: &str) -> &'static str {
    // Longer rows of slashes and stars are decoration, and no documentation.
    if comment.starts_with("////") {
        return "//";
    }
    ["///", "//!", "//", "/**", "/*!", "/*"].into_iter().find(|mark| comment.starts_with(mark)).unwrap_or("/")
}

/// The length of a comment that begins with `/*`. Such comments nest.
fn block_comment_length(comment: &str) -> usize {
    let (mut depth, mut at) = (0_usize, 0);
    while at < comment.len() {
        let rest = &comment.as_bytes()[at..];
        if rest.starts_with(b"/*") {
            (depth, at) = (depth + 1, at + 2);
        } else if rest.starts_with(b"*/") {
            (depth, at) = (depth.saturating_sub(1), at + 2);
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    comment.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(text: &str) -> Vec<(usize, usize, bool)> {
        let file = RustFile::parse("src/a.rs", text).unwrap();
        of_rust(&file).iter().map(|comment| (comment.line, comment.lines.len(), comment.is_doc())).collect()
    }

    #[test]
    fn comments_are_found_and_strings_are_not() {
        let text = "//! Of the file.\n//! Two lines.\n\n/// Of é and a function.\nfn a() { // one\n    let s = \"// no\";\n\
                    /* a\n /* nested */ b */ let t = r#\"/// no\"#; // last\n}\n";
        let expected = [(1, 2, true), (4, 1, true), (5, 1, false), (7, 2, false), (8, 1, false)];
        assert_eq!(found(text), expected);
    }

    #[test]
    fn comments_in_macros_are_found() {
        let text = "macro_rules! m {\n    () => {\n        /// Short.\n        fn a() {} // why\n    };\n}\n";
        assert_eq!(found(text), [(3, 1, true), (4, 1, false)]);
    }

    #[test]
    fn what_it_says_comes_without_marks() {
        let file = RustFile::parse("src/a.rs", "/// One two.\n/// -- three\nfn a() {}\n").unwrap();
        let comments = of_rust(&file);
        assert_eq!(comments[0].lines, [" One two.", " -- three"]);
        assert_eq!(comments[0].words(), 3);
        assert_eq!(comments[0].numbered().last(), Some((2, " -- three")));
    }

    #[test]
    fn other_languages_have_comments_on_lines_of_their_own() {
        let comments = of_lines("a/b.py", "# one\n# two\nx = 1  # not this\n  # three\n");
        assert_eq!(comments.iter().map(|comment| comment.line).collect::<Vec<_>>(), [1, 4]);
        assert_eq!(of_lines("k.cu", "// one\n").len(), 1);
        assert_eq!(of_lines(".ci/run", "# one\n").len(), 1);
        assert_eq!(of_lines("a.json", "# one\n").len(), 0);
    }
}
