//! Markdown is read to its end and leads somewhere: short paragraphs, links to what exists.
//!
//! A relative link names a file or folder of the tree; behind `#` stands a heading of that file. Addresses
//! on the web are not asked for: they need a network.

use std::collections::BTreeMap;

use super::markdown::Markdown;
use super::offence::{Offence, Rule};
use super::tree::Tree;

const MOST_WORDS: usize = 80;

/// Checks every Markdown file of the tree.
pub(super) fn check(files: &BTreeMap<&str, Markdown>, tree: &Tree, offences: &mut Vec<Offence>) {
    for (&path, markdown) in files {
        for (line, text) in &markdown.paragraphs {
            let words = text.split_whitespace().count();
            if words > MOST_WORDS {
                let advice = format!("cut the paragraph: {words} words, {MOST_WORDS} at most");
                offences.push(Offence::new(Rule::LongParagraph, path, *line, advice));
            }
        }
        for (line, link) in &markdown.links {
            if let Some(advice) = broken(path, link, files, tree) {
                offences.push(Offence::new(Rule::Links, path, *line, advice));
            }
        }
    }
}

fn broken(path: &str, link: &str, files: &BTreeMap<&str, Markdown>, tree: &Tree) -> Option<String> {
    if link.contains("://") || link.starts_with("mailto:") {
        return None;
    }
    let (file, anchor) = link.split_once('#').map_or((link, None), |(file, anchor)| (file, Some(anchor)));
    let target = if file.is_empty() { Some(path.to_owned()) } else { joined(path, file) };
    let Some(target) = target.filter(|target| tree.has(target)) else {
        return Some(format!("mend the link: {file} does not exist"));
    };
    let anchor = anchor?;
    let markdown = files.get(target.as_str())?;
    (!markdown.anchors.contains(anchor)).then(|| format!("mend the link: {target} has no heading #{anchor}"))
}

/// Where a link leads, from the root. Nothing if that is outside of the tree.
fn joined(path: &str, link: &str) -> Option<String> {
    let folder =
        if link.starts_with('/') { "" } else { path.rsplit_once('/').map_or("", |(folder, _)| folder) };
    let mut parts: Vec<&str> = folder.split('/').filter(|part| !part.is_empty()).collect();
    for part in link.split('/') {
        match part {
            "" | "." => {}
            ".." => _ = parts.pop()?,
            name => parts.push(name),
        }
    }
    Some(parts.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(files: &[(&str, &str)]) -> Vec<(Rule, String, usize)> {
        let names: Vec<&str> = files.iter().map(|&(path, _)| path).collect();
        let markdown = files.iter().filter(|(path, _)| path.ends_with(".md"));
        let files = markdown.map(|&(path, text)| (path, Markdown::read(text))).collect();
        let mut offences = Vec::new();
        check(&files, &Tree::of_names(&names), &mut offences);
        offences.into_iter().map(|offence| (offence.rule, offence.path, offence.line)).collect()
    }

    #[test]
    fn long_paragraphs_are_found() {
        let (fits, long) = ("word ".repeat(80), "word ".repeat(81));
        assert_eq!(found(&[("a.md", &fits)]), []);
        assert_eq!(
            found(&[("a.md", &format!("# A\n\n{long}"))]),
            [(Rule::LongParagraph, "a.md".to_owned(), 3)]
        );
        assert_eq!(
            found(&[("a.md", &format!("- {fits}\n- b\n- {long}"))]),
            [(Rule::LongParagraph, "a.md".to_owned(), 3)]
        );
        assert_eq!(found(&[("a.md", &format!("| a |\n| - |\n| {long} |\n\n```\n{long}\n```\n"))]), []);
    }

    #[test]
    fn dead_links_are_found() {
        let other = ("docs/b.md", "# Here\n\n[up](../a.md) [folder](.) [self](#here) [code](c/d.rs#L10)");
        let code = ("docs/c/d.rs", "");
        assert_eq!(
            found(&[("a.md", "[b](docs/b.md#here) [c](docs/c) <https://example.org/#x>"), other, code]),
            []
        );
        for planted in ["docs/x.md", "docs/b.md#there", "#a", "../outside.md", "docs/b.md/"] {
            let text = format!("# Title\n\nText\n[b]({planted})");
            let expected = usize::from(planted != "docs/b.md/");
            assert_eq!(found(&[("a.md", &text), other, code]).len(), expected, "{planted}");
        }
        assert_eq!(found(&[("a.md", "# A\n\n<img src=\"x.png\">")]), [(Rule::Links, "a.md".to_owned(), 3)]);
    }
}
