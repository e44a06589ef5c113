//! Comments are no wider than code, and doc comments say something.
//!
//! A line that cannot be cut is excused: the row of a table, and an address.

use super::comments::Comment;
use super::offence::{Offence, Rule};
use super::rust_file::RustFile;

/// Characters of a line, as `max_width` of rustfmt.toml says for code.
const MOST_CHARACTERS: usize = 110;
/// Words that say less than this repeat the name below them.
const FEWEST_WORDS: usize = 3;

pub(super) fn check(file: &RustFile<'_>, comments: &[Comment], offences: &mut Vec<Offence>) {
    let lines: Vec<&str> = file.text.lines().collect();
    for comment in comments {
        if comment.is_doc() && comment.words() < FEWEST_WORDS {
            let advice = format!("say it in a sentence, of {FEWEST_WORDS} words at least");
            offences.push(Offence::new(Rule::ShortDoc, file.path, comment.line, advice));
        }
        for (number, said) in comment.numbered() {
            let width = number
                .checked_sub(1)
                .and_then(|index| lines.get(index))
                .map_or(0, |line| line.chars().count());
            if width > MOST_CHARACTERS && !cannot_be_cut(said) {
                let advice = format!("wrap the comment: {width} characters, {MOST_CHARACTERS} at most");
                offences.push(Offence::new(Rule::WideComment, file.path, number, advice));
            }
        }
    }
}

fn cannot_be_cut(said: &str) -> bool {
    said.trim_start().starts_with('|') || said.contains("://")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tidy::comments;

    fn found(text: &str) -> Vec<(Rule, usize)> {
        let file = RustFile::parse("src/a.rs", text).unwrap();
        let mut offences = Vec::new();
        check(&file, &comments::of_rust(&file), &mut offences);
        offences.iter().map(|offence| (offence.rule, offence.line)).collect()
    }

    #[test]
    fn short_documentation_is_found() {
        assert_eq!(found("/// Which.\nfn a() {}\n"), [(Rule::ShortDoc, 1)]);
        assert_eq!(found("/// Who asks.\nfn a() {}\n// Why.\nfn b() {}\n"), [(Rule::ShortDoc, 1)]);
        assert_eq!(found("/// Who asks\n/// here.\nfn a() {}\n"), []);
        assert_eq!(found("struct A {\n    /// -- of it --\n    b: u8,\n}\n"), [(Rule::ShortDoc, 2)]);
    }

    #[test]
    fn wide_comments_are_found_and_wide_code_is_not() {
        let wide = "x ".repeat(55);
        assert_eq!(found(&format!("// {wide}\n")), [(Rule::WideComment, 1)]);
        assert_eq!(
            found(&format!("/// {wide}\n/// {wide}\nfn a() {{}}\n")),
            [(Rule::WideComment, 1), (Rule::WideComment, 2)]
        );
        assert_eq!(found(&format!("fn a() {{}} // {wide}\n")), [(Rule::WideComment, 1)]);
        assert_eq!(found(&format!("const A: &str = \"{wide}\";\n")), []);
        assert_eq!(found(&format!("// | {wide} |\n// https://example.org/{}\n", "x".repeat(110))), []);
        assert_eq!(found(&format!("// {}\n", "é".repeat(107))), []);
    }
}
