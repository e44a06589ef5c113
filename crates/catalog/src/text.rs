//! The possible beginnings of a text file: a UTF-8 byte order mark, which is skipped, or the mark
//! of another encoding.

/// The mark that some programs put before UTF-8.
const UTF_8_MARK: &[u8] = b"\xEF\xBB\xBF";
/// The marks of UTF-16, which PowerShell and Excel write.
const UTF_16_MARKS: [&[u8]; 2] = [b"\xFF\xFE", b"\xFE\xFF"];

/// The error for a text in another encoding than UTF-8.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this is UTF-16 text; save it as UTF-8")]
pub struct NotUtf8;

/// The beginning of a text without its byte order mark.
///
/// # Errors
///
/// When the mark is that of UTF-16.
pub fn skip_mark(start: &[u8]) -> Result<&[u8], NotUtf8> {
    if UTF_16_MARKS.iter().any(|mark| start.starts_with(mark)) {
        return Err(NotUtf8);
    }
    Ok(start.strip_prefix(UTF_8_MARK).unwrap_or(start))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_mark_is_skipped_and_utf_16_is_named() {
        assert_eq!(skip_mark(b"\xEF\xBB\xBF{}"), Ok(&b"{}"[..]));
        assert_eq!(skip_mark(b"{}"), Ok(&b"{}"[..]));
        assert_eq!(skip_mark(b""), Ok(&b""[..]));
        assert_eq!(skip_mark(b"\xEF\xBB\xBF\xEF\xBB\xBF"), Ok(&b"\xEF\xBB\xBF"[..]));
        assert_eq!(skip_mark(b"\xFF\xFE{\0}\0"), Err(NotUtf8));
        assert_eq!(skip_mark(b"\xFE\xFF\0{\0}"), Err(NotUtf8));
    }
}
