//! Text that others wrote, made safe to print.
//!
//! Names of tensors, types and fields come from the checkpoint. Printed unchanged, a line break forges a
//! line of the log and an escape sequence moves the cursor of a terminal. So control characters are
//! written as `\u{..}`, as are characters that change the order of what follows them.

use std::fmt::{self, Display, Write};

/// Prints what it holds with every control character spelled out.
#[derive(Clone, Copy, Debug)]
pub struct Escaped<T>(pub T);

impl<T: Display> Display for Escaped<T> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(Escaping(formatter), "{}", self.0)
    }
}

/// A formatter that spells control characters out.
pub(crate) struct Escaping<'a, 'b>(pub(crate) &'a mut fmt::Formatter<'b>);

impl Write for Escaping<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let mut rest = text;
        while let Some((at, character)) = rest.char_indices().find(|&(_, character)| is_hidden(character)) {
            self.0.write_str(&rest[..at])?;
            write!(self.0, "{}", character.escape_default())?;
            rest = &rest[at + character.len_utf8()..];
        }
        self.0.write_str(rest)
    }
}

/// Whether a character does something to what is around it instead of being seen.
fn is_hidden(character: char) -> bool {
    character.is_control()
        || matches!(character, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_hidden_and_the_rest_is_as_it_was() {
        let text = Escaped("a\r\nERROR \u{1b}[31m\u{202e}é 漢字\u{7f}").to_string();
        assert_eq!(text, r"a\r\nERROR \u{1b}[31m\u{202e}é 漢字\u{7f}");
    }
}
