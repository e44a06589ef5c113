//! A request must name its host once, and state in one way how its body ends. Two statements would
//! let a proxy and the server behind it read one request differently.

use axum::http::uri::Authority;
use axum::http::{HeaderMap, Version, header};

use crate::error::Error;

/// Checks the headers that every request must state only once.
///
/// # Errors
///
/// When a header is missing, repeated or contradictory.
pub fn check(version: Version, headers: &HeaderMap) -> Result<(), Error> {
    host(version, headers)?;
    encoding(headers)
}

/// Checks the `Host` headers as RFC 9112 section 3.2 asks: one in HTTP/1.1, at most one before, and
/// a valid host.
fn host(version: Version, headers: &HeaderMap) -> Result<(), Error> {
    let mut hosts = headers.get_all(header::HOST).iter();
    let message = match (hosts.next(), hosts.next()) {
        (None, _) if version < Version::HTTP_11 => return Ok(()),
        (None, _) => "the request has no `host` header: send one",
        (Some(_), Some(_)) => "the request has more than one `host` header: send one",
        (Some(host), None) if host.is_empty() || Authority::try_from(host.as_bytes()).is_ok() => {
            return Ok(());
        }
        (Some(_), None) => {
            "the `host` header is not a host: send a name or an address, with a port if needed"
        }
    };
    Err(Error::InvalidRequest { message: message.into(), param: None })
}

/// Checks the `Transfer-Encoding` headers: hyper accepts all that end in `chunked`, other servers
/// may not.
fn encoding(headers: &HeaderMap) -> Result<(), Error> {
    let mut encodings = headers.get_all(header::TRANSFER_ENCODING).iter();
    let chunked = encodings.next().is_none_or(|first| first.as_bytes().eq_ignore_ascii_case(b"chunked"));
    if chunked && encodings.next().is_none() {
        return Ok(());
    }
    let message =
        "send the body with `transfer-encoding: chunked` or with its `content-length`, and nothing else";
    Err(Error::InvalidRequest { message: message.into(), param: None })
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;

    #[test]
    fn a_request_is_for_one_host() {
        let ask = |version, hosts: &[&str]| {
            let mut headers = HeaderMap::new();
            for host in hosts {
                headers.append(header::HOST, HeaderValue::from_str(host).unwrap());
            }
            check(version, &headers).is_ok()
        };
        for good in ["x", "127.0.0.1:8080", "[::1]:8080", "shop.example", ""] {
            assert!(ask(Version::HTTP_11, &[good]), "{good}");
        }
        for bad in [&["x", "y"][..], &["x", "x"], &[], &["a b"], &["x/y"]] {
            assert!(!ask(Version::HTTP_11, bad), "{bad:?}");
        }
        assert!(ask(Version::HTTP_10, &[]) && !ask(Version::HTTP_10, &["x", "y"]));
    }

    #[test]
    fn a_body_ends_in_one_way() {
        let ask = |encodings: &[&str]| {
            let mut headers = HeaderMap::new();
            headers.insert(header::HOST, HeaderValue::from_static("x"));
            for encoding in encodings {
                headers.append(header::TRANSFER_ENCODING, HeaderValue::from_str(encoding).unwrap());
            }
            check(Version::HTTP_11, &headers).is_ok()
        };
        assert!(ask(&[]) && ask(&["chunked"]) && ask(&["Chunked"]));
        for bad in [&["chunked, chunked"][..], &["chunked", "chunked"], &["gzip, chunked"], &["xchunked"]] {
            assert!(!ask(bad), "{bad:?}");
        }
    }
}
