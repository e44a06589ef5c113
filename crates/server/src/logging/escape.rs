//! One event is one line: text that an event quotes must not end the line or control a terminal.

/// The text of an event with its control characters escaped, except the line end. Where the log has
/// `colours`, colour sequences stay, because quoted ones can only change colours.
pub(super) fn line(event: &[u8], colours: bool) -> Vec<u8> {
    let text = String::from_utf8_lossy(event);
    let text = text.strip_suffix('\n').unwrap_or(&text);
    let mut line = String::with_capacity(text.len() + 1);
    let mut rest = text;
    while let Some(next) = rest.chars().next() {
        let taken = match paint(rest) {
            Some(length) if colours => {
                line.push_str(&rest[..length]);
                length
            }
            _ => {
                match next {
                    '\t' => line.push(next),
                    // Besides control characters: characters that reorder text or end lines in
                    // other programs.
                    '\u{2028}' | '\u{2029}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => {
                        line.extend(next.escape_unicode());
                    }
                    next if next.is_control() => line.extend(next.escape_default()),
                    next => line.push(next),
                }
                next.len_utf8()
            }
        };
        rest = &rest[taken..];
    }
    line.push('\n');
    line.into_bytes()
}

/// The length of a colour sequence, if the text begins with one.
fn paint(text: &str) -> Option<usize> {
    let parameters = text.strip_prefix("\u{1b}[")?;
    let end = parameters.find(|next: char| !next.is_ascii_digit() && next != ';')?;
    parameters[end..].starts_with('m').then_some(2 + end + 1)
}

#[cfg(test)]
mod tests {
    use super::line;

    fn text(event: &str, colours: bool) -> String {
        String::from_utf8(line(event.as_bytes(), colours)).unwrap()
    }

    #[test]
    fn an_event_stays_one_line() {
        assert_eq!(text("INFO fine ä\tb\n", false), "INFO fine ä\tb\n");
        assert_eq!(text("a\r\nERROR forged \u{1b}[31m\n", false), "a\\r\\nERROR forged \\u{1b}[31m\n");
        assert_eq!(text("bell\u{7} \u{9b}2J\u{202e}x", false), "bell\\u{7} \\u{9b}2J\\u{202e}x\n");
        assert_eq!(String::from_utf8(line(b"\xff\n", false)).unwrap(), "\u{fffd}\n");
    }

    #[test]
    fn on_a_terminal_colours_stay_and_nothing_else_does() {
        assert_eq!(text("\u{1b}[2mINFO\u{1b}[0m x\n", true), "\u{1b}[2mINFO\u{1b}[0m x\n");
        assert_eq!(text("\u{1b}[2J\u{1b}]0;title\u{7}\ny\n", true), "\\u{1b}[2J\\u{1b}]0;title\\u{7}\\ny\n");
    }
}
