//! A Markdown file, read once for all rules: its prose, headings, links and code.
//!
//! `pulldown-cmark` reads it, so that tables, nested lists and links by reference are what a reader sees.
//!
//! Invariants: lines count from 1; the anchors of headings are those that GitHub makes.
//!
//! What this must not know: rules.

use std::collections::{BTreeMap, BTreeSet};

use pulldown_cmark::{Event, Options, Parser, Tag, TagEnd};

/// What rules look at.
#[derive(Debug, Default)]
pub(super) struct Markdown {
    /// Paragraphs and items of lists, each with its first line. Tables and code are none.
    pub(super) paragraphs: Vec<(usize, String)>,
    /// What `#anchor` may name.
    pub(super) anchors: BTreeSet<String>,
    /// Where links and images lead.
    pub(super) links: Vec<(usize, String)>,
    /// Lines of code, in blocks and in running text.
    pub(super) code: Vec<(usize, String)>,
}

impl Markdown {
    pub(super) fn read(text: &str) -> Self {
        let after_breaks = text.match_indices('\n').map(|(at, _)| at + 1);
        let line_starts: Vec<usize> = std::iter::once(0).chain(after_breaks).collect();
        let mut reader = Reader::default();
        let options = Options::ENABLE_TABLES | Options::ENABLE_FOOTNOTES | Options::ENABLE_TASKLISTS;
        for (event, place) in Parser::new_ext(text, options).into_offset_iter() {
            reader.take(event, line_starts.partition_point(|&start| start <= place.start));
        }
        reader.read
    }
}

#[derive(Default)]
struct Reader {
    read: Markdown,
    /// The paragraph or heading at hand.
    prose: Option<(usize, String)>,
    in_code: bool,
    in_table: bool,
    slugs: BTreeMap<String, usize>,
}

impl Reader {
    fn take(&mut self, event: Event<'_>, line: usize) {
        match event {
            Event::Start(tag) => self.enter(tag, line),
            Event::End(tag) => self.leave(tag),
            Event::Text(text) if self.in_code => {
                self.read
                    .code
                    .extend(text.lines().enumerate().map(|(index, code)| (line + index, code.to_owned())));
            }
            Event::Text(text) => self.say(&text),
            Event::Code(code) => {
                self.say(&code);
                self.read.code.push((line, code.into_string()));
            }
            Event::SoftBreak | Event::HardBreak => self.say(" "),
            Event::Html(html) | Event::InlineHtml(html) => {
                for (index, part) in html.lines().enumerate() {
                    self.read.links.extend(html_links(part).map(|link| (line + index, link.to_owned())));
                }
            }
            _ => {}
        }
    }

    fn enter(&mut self, tag: Tag<'_>, line: usize) {
        match tag {
            Tag::Paragraph | Tag::Heading { .. } | Tag::Item => {
                self.end_prose();
                self.prose = Some((line, String::new()));
            }
            // The items of a nested list are counted each for itself.
            Tag::List(_) => self.end_prose(),
            Tag::CodeBlock(_) => {
                self.end_prose();
                self.in_code = true;
            }
            Tag::Table(_) => {
                self.end_prose();
                self.in_table = true;
            }
            Tag::Link { dest_url, .. } | Tag::Image { dest_url, .. } => {
                self.read.links.push((line, dest_url.into_string()));
            }
            _ => {}
        }
    }

    fn leave(&mut self, tag: TagEnd) {
        match tag {
            TagEnd::Heading(_) => {
                if let Some((_, text)) = self.prose.take() {
                    self.anchor(&text);
                }
            }
            TagEnd::Paragraph | TagEnd::Item => self.end_prose(),
            TagEnd::CodeBlock => self.in_code = false,
            TagEnd::Table => self.in_table = false,
            _ => {}
        }
    }

    fn say(&mut self, text: &str) {
        if let Some((_, prose)) = self.prose.as_mut()
            && !self.in_table
        {
            prose.push_str(text);
        }
    }

    fn end_prose(&mut self) {
        self.read.paragraphs.extend(self.prose.take().filter(|(_, text)| !text.is_empty()));
    }

    /// Remembers the anchor of a heading. The second heading of the same words is told by a number.
    fn anchor(&mut self, heading: &str) {
        let kept = heading.chars().filter(|&c| c.is_alphanumeric() || " -_".contains(c));
        let slug: String =
            kept.flat_map(char::to_lowercase).map(|c| if c == ' ' { '-' } else { c }).collect();
        let before = self.slugs.entry(slug.clone()).or_insert(0);
        let anchor = if *before == 0 { slug } else { format!("{slug}-{before}") };
        *before += 1;
        self.read.anchors.insert(anchor);
    }
}

/// Where the attributes of a piece of HTML lead.
fn html_links(html: &str) -> impl Iterator<Item = &str> {
    let starts = ["href=\"", "src=\"", "srcset=\""];
    starts
        .into_iter()
        .flat_map(move |start| html.split(start).skip(1).filter_map(|rest| rest.split('"').next()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prose_is_told_from_tables_and_code() {
        let text = "# A title\n\nOne *two*\n`three four`.\n\n- five\n  - six [seven](x.md)\n\n| a | b |\n| - | - |\n| c | d |\n\n\
                    ```sh\nbeamline serve\n```\n\nEight.\n";
        let read = Markdown::read(text);
        let expected = [(3, "One two three four."), (6, "five"), (7, "six seven"), (17, "Eight.")]
            .map(|(line, text)| (line, text.to_owned()));
        assert_eq!(read.paragraphs, expected);
        assert_eq!(read.code, [(4, "three four".to_owned()), (14, "beamline serve".to_owned())]);
        assert_eq!(read.links, [(7, "x.md".to_owned())]);
    }

    #[test]
    fn anchors_are_those_of_github() {
        let read = Markdown::read("# What `--flag` does, and why: 2 × x_y\n\n## Same\n\n## Same\n");
        assert_eq!(
            read.anchors.iter().collect::<Vec<_>>(),
            ["same", "same-1", "what---flag-does-and-why-2--x_y"]
        );
    }

    #[test]
    fn links_of_all_kinds_are_found() {
        let text = "[a](b.md) ![c](d.png) [e][f]\n\n<img\n  src=\"g.svg\">\n\n[f]: h.md#i\n";
        let links: Vec<String> = Markdown::read(text).links.into_iter().map(|(_, link)| link).collect();
        assert_eq!(links, ["b.md", "d.png", "h.md#i", "g.svg"]);
    }
}
