//! Access control for changes of models and catalogs.
//!
//! With an admin key, a client must send it. Without one, every client that reaches the server may
//! make changes, provided that the server listens on a loopback address only; otherwise no client
//! may. Without the key, a page in a browser is never admitted, because it may come from anywhere.
//! Neither is a request that came through a proxy, because any client may stand behind it. The key
//! is checked before anything else in the request.

use axum::http::{HeaderMap, HeaderName, header};

use super::App;
use crate::error::Error;

/// Checks that the sender of these headers may make changes.
///
/// # Errors
///
/// [`Error::Unauthorized`] without the right key; [`Error::AdminDisabled`] and
/// [`Error::AdminProxied`] when the server has no key.
pub fn check(app: &App, headers: &HeaderMap) -> Result<(), Error> {
    let Some(key) = &app.admin_key else {
        if !is_open(app) || headers.contains_key(header::ORIGIN) {
            return Err(Error::AdminDisabled);
        }
        return proxy_header(headers).map_or(Ok(()), |name| Err(Error::AdminProxied(name)));
    };
    let given = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok()).and_then(bearer);
    if given.is_some_and(|given| key.is(given)) { Ok(()) } else { Err(Error::Unauthorized) }
}

/// Whether a client without a key may change models and catalogs.
pub fn is_open(app: &App) -> bool {
    app.admin_key.is_none() && app.settings.listen.ip().to_canonical().is_loopback()
}

/// The name of a header that proxies add, if the request has one.
fn proxy_header(headers: &HeaderMap) -> Option<String> {
    let added = |name: &&HeaderName| {
        let name = name.as_str();
        ["forwarded", "via", "x-real-ip"].contains(&name) || name.starts_with("x-forwarded-")
    };
    headers.keys().find(added).map(|name| name.as_str().chars().take(32).collect())
}

fn bearer(value: &str) -> Option<&str> {
    let (scheme, key) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(key.trim())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::{AdminKey, Flags, HttpLayer, Settings};
    use axum::http::HeaderValue;
    use metrics_exporter_prometheus::PrometheusBuilder;

    fn ask(listen: &str, key: Option<&str>, header: Option<&str>) -> Result<(), Error> {
        let mut settings = Settings::resolve(Flags::default(), HttpLayer::default()).unwrap();
        settings.http.listen = listen.parse().unwrap();
        settings.admin.key = key.map(|key| AdminKey::new(key).unwrap());
        let app =
            App::new(settings.http, &settings.admin, PrometheusBuilder::new().build_recorder().handle(), 1);
        let mut headers = HeaderMap::new();
        if let Some(value) = header {
            headers.insert(header::AUTHORIZATION, HeaderValue::from_str(value).unwrap());
        }
        check(&app, &headers)
    }

    #[test]
    fn without_a_key_only_a_loopback_listener_is_open() {
        for local in ["127.0.0.1:80", "[::1]:80", "[::ffff:127.0.0.1]:80"] {
            assert_eq!(ask(local, None, None), Ok(()));
        }
        for open in ["0.0.0.0:80", "[::]:80", "192.168.1.1:80"] {
            assert_eq!(ask(open, None, Some("Bearer x")), Err(Error::AdminDisabled));
        }
    }

    #[test]
    fn what_came_through_a_proxy_is_refused_without_a_key() {
        let settings = Settings::resolve(Flags::default(), HttpLayer::default()).unwrap();
        let metrics = PrometheusBuilder::new().build_recorder().handle();
        let app = App::new(settings.http, &settings.admin, metrics, 1);
        for name in ["forwarded", "x-forwarded-for", "x-forwarded-anything", "via", "x-real-ip"] {
            let headers =
                HeaderMap::from_iter([(name.parse().unwrap(), HeaderValue::from_static("1.2.3.4"))]);
            assert_eq!(check(&app, &headers), Err(Error::AdminProxied(name.to_owned())));
        }
    }

    #[test]
    fn with_a_key_the_key_is_needed_everywhere() {
        let key = Some("0123456789abcdef");
        for address in ["127.0.0.1:80", "0.0.0.0:80"] {
            assert_eq!(ask(address, key, Some("Bearer 0123456789abcdef")), Ok(()));
            assert_eq!(ask(address, key, Some("bearer 0123456789abcdef")), Ok(()));
            for wrong in [
                None,
                Some("Bearer 0123456789abcdeg"),
                Some("Basic 0123456789abcdef"),
                Some("Bearer"),
                Some(""),
            ] {
                assert_eq!(ask(address, key, wrong), Err(Error::Unauthorized), "{wrong:?}");
            }
        }
    }
}
