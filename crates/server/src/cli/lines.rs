//! Reads lines of bounded length. A byte order mark before the first line is skipped.

use std::io::{self, BufRead, Read};

use beamline_catalog::text;

use crate::error::Error;

/// A line without its line end, or why it cannot be read.
pub(super) type Line = Result<Vec<u8>, Error>;

/// Reads lines one by one.
pub(super) struct Lines {
    reader: Box<dyn BufRead>,
    limit: usize,
    at_start: bool,
}

impl Lines {
    /// Reads lines of at most `limit` bytes.
    pub(super) fn new(reader: Box<dyn BufRead>, limit: usize) -> Self {
        Self { reader, limit, at_start: true }
    }

    /// Reads the next line. A line over the limit is skipped and reported as an error.
    pub(super) fn next(&mut self) -> io::Result<Option<Line>> {
        let mut line = Vec::new();
        let limit = self.limit as u64 + 1;
        if self.reader.by_ref().take(limit).read_until(b'\n', &mut line)? == 0 {
            return Ok(None);
        }
        if line.last() == Some(&b'\n') {
            line.pop();
        } else if line.len() as u64 == limit {
            self.reader.skip_until(b'\n')?;
            return Ok(Some(Err(Error::BodyTooLarge { limit: self.limit })));
        }
        if std::mem::take(&mut self.at_start) {
            // Otherwise every line of a file in another encoding would be an error.
            line = text::skip_mark(&line).map_err(io::Error::other)?.to_owned();
        }
        Ok(Some(Ok(line)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_order_mark_is_skipped_once_and_utf_16_is_refused() {
        let text = |text: &'static [u8]| Lines::new(Box::new(io::Cursor::new(text)), 9);
        let mut lines = text(b"\xEF\xBB\xBFa\n\xEF\xBB\xBFb\n");
        assert_eq!(lines.next().unwrap(), Some(Ok(b"a".to_vec())));
        assert_eq!(lines.next().unwrap(), Some(Ok(b"\xEF\xBB\xBFb".to_vec())));
        let error = text(b"\xFF\xFEa\0\n\0").next().unwrap_err();
        assert!(error.to_string().contains("UTF-8"), "{error}");
    }

    #[test]
    fn lines_over_the_limit_are_errors_and_the_next_is_read() {
        let mut lines = Lines::new(Box::new(io::Cursor::new("abcd\nabcde\n\nx")), 4);
        let mut next = || lines.next().unwrap();
        assert_eq!(next(), Some(Ok(b"abcd".to_vec())));
        assert_eq!(next(), Some(Err(Error::BodyTooLarge { limit: 4 })));
        assert_eq!(next(), Some(Ok(Vec::new())));
        assert_eq!(next(), Some(Ok(b"x".to_vec())));
        assert_eq!(next(), None);
    }
}
