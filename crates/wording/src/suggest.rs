//! The known word that a misspelt one most likely stands for.
//!
//! One rule for fields, settings, items, tags and labels, so that every message suggests alike.
//!
//! Invariant: the work is bounded for any input: long words are not compared, and at most
//! [`MAX_WORDS`] known words are tried.

/// Most known words that are compared.
pub const MAX_WORDS: usize = 10_000;
/// Longest word that is compared, in bytes.
const MAX_LENGTH: usize = 128;

/// The known word closest to `word`, if one is close enough to be what was meant.
///
/// Upper and lower case, `-`, `_` and blanks count as equal. Of two words that are equally close
/// the first wins.
pub fn suggest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    if word.is_empty() || word.len() > MAX_LENGTH {
        return None;
    }
    let folded = fold(word);
    let limit = max_distance(&folded);
    let near = known.into_iter().take(MAX_WORDS).filter_map(|candidate| {
        // Every edit changes the length by at most one character, which has at most four bytes.
        if candidate.is_empty() || candidate.len().abs_diff(word.len()) > limit.saturating_mul(4) {
            return None;
        }
        let distance = strsim::osa_distance(&folded, &fold(candidate));
        (distance <= limit && distance < folded.chars().count()).then_some((distance, candidate))
    });
    near.min_by_key(|(distance, _)| *distance).map(|(_, candidate)| candidate)
}

/// The suggestion as the end of a message: "; did you mean `stable`?", or nothing.
pub fn did_you_mean<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> String {
    suggest(word, known).map_or(String::new(), |meant| format!("; did you mean `{meant}`?"))
}

/// Most edits at which a word counts as misspelt: one in four characters, and always at least one.
fn max_distance(word: &str) -> usize {
    (word.chars().count() / 4).max(1)
}

fn fold(word: &str) -> String {
    let alike = |character: char| if matches!(character, '-' | ' ') { '_' } else { character };
    word.chars().map(alike).flat_map(char::to_lowercase).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIELDS: [&str; 5] = ["history", "num_items", "filters", "exclude_seen", "in_stock"];

    #[test]
    fn a_misspelt_word_finds_the_one_that_was_meant() {
        for (word, meant) in [
            ("histroy", "history"),
            ("num_item", "num_items"),
            ("numItems", "num_items"),
            ("num-items", "num_items"),
            ("Filter", "filters"),
            ("excludeSeen", "exclude_seen"),
            ("in-stock", "in_stock"),
            ("IN STOCK", "in_stock"),
        ] {
            assert_eq!(suggest(word, FIELDS), Some(meant), "{word}");
        }
        assert_eq!(did_you_mean("histroy", FIELDS), "; did you mean `history`?");
    }

    #[test]
    fn a_word_that_resembles_none_finds_none() {
        for word in ["", "temperature", "x", "seen", &"history".repeat(100)] {
            assert_eq!(suggest(word, FIELDS), None, "{word}");
        }
        assert_eq!(suggest("a", ["b"]), None);
        assert_eq!(did_you_mean("temperature", FIELDS), "");
        assert_eq!(suggest("histroy", []), None);
    }

    #[test]
    fn the_closest_wins_and_the_work_is_bounded() {
        assert_eq!(suggest("stable", ["stables", "stable", "sable"]), Some("stable"));
        let many = std::iter::repeat_n("other", MAX_WORDS).chain(["histroy"]);
        assert_eq!(suggest("histroy", many), None);
        assert_eq!(suggest("übersich", ["übersicht"]), Some("übersicht"));
    }
}
