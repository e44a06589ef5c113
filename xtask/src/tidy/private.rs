//! Nothing in the tree speaks of one machine: no path into somebody's home, and no word that only its
//! author understands.

use super::offence::{Offence, Rule};

/// Folders of a machine that no reader has.
const FOLDERS: [&str; 3] = ["work", "root", "home"];
/// Words that mean something on one machine only, or that ask for another look before a change is made. In
/// pieces, so that this file may hold them.
const WORDS: [&str; 4] =
    [concat!("../", "shared"), concat!("FIX", "ME"), concat!("XX", "X"), concat!("NOCOM", "MIT")];

pub(super) fn check(path: &str, text: &str, offences: &mut Vec<Offence>) {
    for (index, line) in text.lines().enumerate() {
        if let Some(folder) = FOLDERS.into_iter().find(|folder| names_folder(line, folder)) {
            let advice = format!("write a path that every reader has, instead of one under /{folder}");
            offences.push(Offence::new(Rule::Private, path, index + 1, advice));
        }
        for word in WORDS.into_iter().filter(|word| line.contains(word)) {
            let advice = format!("remove {word}: it means nothing to others");
            offences.push(Offence::new(Rule::Private, path, index + 1, advice));
        }
    }
}

/// Whether a line holds the absolute path of this folder, or of something in it.
fn names_folder(line: &str, folder: &str) -> bool {
    let within = |c: char| c.is_alphanumeric() || "_-.~/*}>".contains(c);
    line.match_indices('/').any(|(at, _)| {
        let rest = &line[at + 1..];
        let after = rest.strip_prefix(folder).map(|rest| rest.chars().next());
        let ends =
            after.is_some_and(|next| !next.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == '-'));
        ends && !line[..at].chars().next_back().is_some_and(within)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(text: &str) -> Vec<usize> {
        let mut offences = Vec::new();
        check("a.py", text, &mut offences);
        offences.iter().map(|offence| offence.line).collect()
    }

    #[test]
    fn paths_of_a_machine_are_found() {
        for folder in FOLDERS {
            for planted in [
                format!("/{folder}/x"),
                format!("a = \"/{folder}\""),
                format!("`cd /{folder}`, b"),
                format!("X=/{folder}/y"),
            ] {
                assert_eq!(found(&format!("first\n{planted}\n")), [2], "{planted}");
            }
        }
    }

    #[test]
    fn other_paths_are_left_alone() {
        for folder in FOLDERS {
            for other in [
                format!("a/{folder}/b"),
                format!("/{folder}s/x"),
                format!("/srv/{folder}"),
                format!("./{folder}/x"),
            ] {
                assert_eq!(found(&other), [] as [usize; 0], "{other}");
            }
        }
    }

    #[test]
    fn words_are_found() {
        for word in WORDS {
            assert_eq!(found(&format!("# {word}: later")), [1], "{word}");
        }
    }
}
