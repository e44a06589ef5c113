//! Command lines as documents write them, cut into words.
//!
//! What a reader would type is understood as far as documents go: quotes, comments, a prompt, variables
//! before the command, lines that go on after a backslash, and `[--optional]` parts.
//!
//! What this must not know: which commands exist.

/// A command that a document tells to type.
#[derive(Debug, PartialEq)]
pub(super) struct CommandLine {
    pub(super) line: usize,
    /// Its words without quotes.
    pub(super) words: Vec<Word>,
}

/// A word of a command, and whether it was quoted.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Word {
    pub(super) text: String,
    pub(super) quoted: bool,
}

/// The commands of these lines that begin with the words of `program`, without these words.
pub(super) fn find(code: &[(usize, String)], program: &str) -> Vec<CommandLine> {
    let mut found = Vec::new();
    let mut lines = code.iter();
    while let Some((line, text)) = lines.next() {
        let mut whole = text.clone();
        while let Some(cut) = whole.trim_end().strip_suffix('\\') {
            let Some((_, next)) = lines.next() else { break };
            whole = format!("{cut} {next}");
        }
        for words in commands(&whole) {
            let wanted: Vec<&str> = program.split(' ').collect();
            let begins = words.len() >= wanted.len()
                && wanted.iter().zip(&words).all(|(wanted, word)| !word.quoted && word.text == *wanted);
            if begins && words.len() > wanted.len() {
                found.push(CommandLine { line: *line, words: words[wanted.len()..].to_vec() });
            }
        }
    }
    found
}

/// The commands of a line: what stands between pipes, and up to a comment.
fn commands(line: &str) -> Vec<Vec<Word>> {
    let mut commands = vec![Vec::new()];
    for word in split(line) {
        let last = commands.len() - 1;
        match word.text.as_str() {
            "|" | "&" | "&&" | ";" | "||" if !word.quoted => commands.push(Vec::new()),
            // A prompt, or a variable for the command alone.
            "$" if commands[last].is_empty() => {}
            text if commands[last].is_empty() && !word.quoted && is_assignment(text) => {}
            _ => commands[last].push(word),
        }
    }
    commands
}

fn is_assignment(word: &str) -> bool {
    word.split_once('=').is_some_and(|(name, _)| {
        !name.is_empty() && name.chars().all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_')
    })
}

/// The words of a line, up to a comment.
fn split(line: &str) -> Vec<Word> {
    let mut words: Vec<Word> = Vec::new();
    let mut word: Option<Word> = None;
    let mut quote = None;
    for c in line.chars() {
        match (quote, c) {
            (Some(open), _) if c == open => quote = None,
            (Some(_), _) => word.get_or_insert_default().text.push(c),
            (None, '"' | '\'') => {
                word.get_or_insert_default().quoted = true;
                quote = Some(c);
            }
            (None, '#') if word.is_none() => break,
            (None, '[' | ']') => words.extend(word.take()),
            (None, _) if c.is_whitespace() => words.extend(word.take()),
            (None, _) => word.get_or_insert_default().text.push(c),
        }
    }
    words.extend(word);
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(code: &str) -> Vec<String> {
        let lines: Vec<(usize, String)> = code.lines().map(str::to_owned).enumerate().collect();
        let texts = |words: Vec<Word>| words.into_iter().map(|word| word.text).collect::<Vec<_>>().join("+");
        find(&lines, "cargo xtask").into_iter().map(|command| texts(command.words)).collect()
    }

    #[test]
    fn commands_are_found_where_a_line_begins_with_them() {
        assert_eq!(found("cargo xtask bench --quick   # a look, cargo xtask no"), ["bench+--quick"]);
        assert_eq!(found("$ cargo xtask bench\nA=b cargo xtask test"), ["bench", "test"]);
        assert_eq!(found("ls | cargo xtask fuzz && cargo xtask test"), ["fuzz", "test"]);
        assert_eq!(
            found("run cargo xtask bench\ncargo xtask\ncargo build\n'cargo' xtask a"),
            [] as [&str; 0]
        );
    }

    #[test]
    fn words_are_cut_as_a_shell_cuts_them() {
        assert_eq!(found("cargo xtask bench --a 'b c' [--d E] --f=\"g\""), ["bench+--a+b c+--d+E+--f=g"]);
        assert_eq!(found("cargo xtask bench \\\n  --quick\ncargo xtask test"), ["bench+--quick", "test"]);
    }
}
