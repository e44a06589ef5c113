//! Phrases that have plainer wordings, in comments and in Markdown.
//!
//! A phrase is found over the end of a line, too. Code is not looked at.

use super::offence::{Offence, Rule};

/// A phrase, and what to write instead.
const PHRASES: [(&[&str], &str); 5] = [
    (&["whoever"], "name who it is"),
    (&["what", "of", "it"], "name the thing, and say \"which part of\""),
    (&["so", "many"], "give the number, or say \"that number of\""),
    (&["so", "much"], "give the amount, or say \"that amount of\""),
    (&["but", "for"], "say \"except\""),
];

/// Looks through lines that belong together, each with its number.
pub(super) fn check<'a>(
    path: &str,
    lines: impl IntoIterator<Item = (usize, &'a str)>,
    offences: &mut Vec<Offence>,
) {
    let words: Vec<(usize, &str)> = lines
        .into_iter()
        .flat_map(|(number, line)| line.split_whitespace().map(move |word| (number, word)))
        .collect();
    for start in 0..words.len() {
        for (phrase, instead) in PHRASES {
            if begins_with(&words[start..], phrase) {
                let advice = format!("reword \"{}\": {instead}", phrase.join(" "));
                offences.push(Offence::new(Rule::Phrases, path, words[start].0, advice));
            }
        }
    }
}

fn begins_with(words: &[(usize, &str)], phrase: &[&str]) -> bool {
    let is_punctuation = |c: char| !c.is_alphanumeric();
    words.len() >= phrase.len()
        && phrase.iter().zip(words).enumerate().all(|(index, (wanted, (_, word)))| {
            // Punctuation may stand around a phrase, and not within.
            let word = if index == 0 { word.trim_start_matches(is_punctuation) } else { word };
            let last = index + 1 == phrase.len();
            let word = if last { word.trim_end_matches(is_punctuation) } else { word };
            word.eq_ignore_ascii_case(wanted)
        })
}

/// The lines of Markdown outside fenced code, with their numbers.
pub(super) fn prose(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut in_code = false;
    text.lines().enumerate().filter_map(move |(index, line)| {
        let fence = line.trim_start().starts_with("```");
        in_code ^= fence;
        (!in_code && !fence).then_some((index + 1, line))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(text: &str) -> Vec<usize> {
        let mut offences = Vec::new();
        check("a.md", prose(text), &mut offences);
        offences.iter().map(|offence| offence.line).collect()
    }

    #[test]
    fn each_phrase_is_found() {
        for (phrase, _) in PHRASES {
            let phrase = phrase.join(" ");
            assert_eq!(found(&format!("Here it is: ({phrase}).\n")), [1], "{phrase}");
            assert_eq!(found(&phrase.to_uppercase()), [1], "{phrase}");
        }
    }

    #[test]
    fn a_phrase_goes_on_in_the_next_line() {
        assert_eq!(found("None is left but\nfor one. So\nmany."), [1, 2]);
    }

    #[test]
    fn other_words_and_code_are_left_alone() {
        assert_eq!(
            found("So, many came, but, for once, also much. Butfor.\n```sh\nso many\n```\nEnd."),
            [] as [usize; 0]
        );
    }
}
