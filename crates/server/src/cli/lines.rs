//! Lines of bounded length.

use std::io::{self, BufRead, Read};

use crate::error::Error;

/// A line, without its end, or why it cannot be read as one.
pub(super) type Line = Result<Vec<u8>, Error>;

/// Reads lines one by one.
pub(super) struct Lines {
    reader: Box<dyn BufRead>,
    limit: usize,
}

impl Lines {
    /// Lines of at most `limit` bytes.
    pub(super) fn new(reader: Box<dyn BufRead>, limit: usize) -> Self {
        Self { reader, limit }
    }

    /// The next line; one over the limit is passed over and is an error of its own.
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
        Ok(Some(Ok(line)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
