//! Tests that need no model: a server that is still loading, and a handler that panics.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::routing::get;
use metrics_exporter_prometheus::PrometheusBuilder;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use super::listen::Connections;
use super::pace::LeastPace;
use super::{App, SharedApp, router, with_layers};
use crate::settings::{Flags, HttpLayer, HttpSettings, Settings};

fn settings() -> HttpSettings {
    Settings::resolve(Flags::default(), HttpLayer::default()).unwrap().http
}

fn app() -> SharedApp {
    let admin = Settings::resolve(Flags::default(), HttpLayer::default()).unwrap().admin;
    Arc::new(App::new(settings(), &admin, PrometheusBuilder::new().build_recorder().handle(), 1))
}

/// Serves a router while `ask` sends requests.
async fn with_server(router: Router, settings: HttpSettings, ask: impl FnOnce(SocketAddr) + Send + 'static) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let asking = tokio::task::spawn_blocking(move || ask(address));
    let connections = Connections::default();
    connections.accept(listener, router, &settings, async { asking.await.unwrap() }).await;
    tokio::time::timeout(Duration::from_secs(10), connections.end()).await.unwrap();
}

fn ask(address: SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    stream
        .write_all(format!("{request} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").as_bytes())
        .unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

#[tokio::test(flavor = "multi_thread")]
async fn while_loading_it_is_alive_and_not_ready() {
    with_server(router(app()), settings(), |address| {
        assert!(ask(address, "GET /livez").starts_with("HTTP/1.1 200"));
        for request in ["GET /readyz", "GET /v1/models", "POST /v1/recommend", "POST /v1/warm"] {
            let text = ask(address, request);
            assert!(text.starts_with("HTTP/1.1 503") && text.contains("\"type\":\"loading\""), "{text}");
            assert!(text.contains("retry-after: 2"), "{text}");
        }
        assert!(ask(address, "GET /metrics").starts_with("HTTP/1.1 200"));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_panic_is_one_requests_own() {
    let routes = Router::new()
        .route(
            "/panic",
            get(|| async {
                if true {
                    panic!("secret")
                }
            }),
        )
        .route("/fine", get(|| async { "fine" }));
    with_server(with_layers(routes), settings(), |address| {
        let text = ask(address, "GET /panic");
        assert!(text.starts_with("HTTP/1.1 500") && text.contains("\"type\":\"internal\""), "{text}");
        assert!(text.contains("x-request-id: ") && !text.contains("secret"), "{text}");
        assert!(ask(address, "GET /fine").ends_with("fine"));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn idle_connections_beyond_the_limit_give_way() {
    let settings = HttpSettings { max_connections: 2, ..settings() };
    with_server(router(app()), settings, |address| {
        let mut idle = [TcpStream::connect(address).unwrap(), TcpStream::connect(address).unwrap()];
        for stream in &mut idle {
            stream.write_all(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
            assert!(stream.read(&mut [0; 1024]).unwrap() > 0);
        }
        // While earlier connections may still send requests, further ones only serve health checks.
        assert!(ask(address, "GET /livez").starts_with("HTTP/1.1 200"));
        let text = ask(address, "GET /v1/models");
        assert!(text.starts_with("HTTP/1.1 503") && text.contains("too_many_connections"), "{text}");
        assert!(text.contains("retry-after: 1") && text.contains("connection: close"), "{text}");
        std::thread::sleep(Duration::from_millis(1100));
        assert!(ask(address, "GET /v1/models").contains("\"type\":\"loading\""));
        let [mut first, _] = idle;
        first.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        assert_eq!(first.read(&mut [0; 16]).unwrap_or(0), 0, "the oldest was closed");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_never_reads_is_closed_and_holds_no_drain() {
    let write_pace = LeastPace::new(Duration::from_millis(500), 1024);
    let settings = HttpSettings { write_pace, ..settings() };
    let large = vec![b'x'; 64 << 20];
    let routes = Router::new().route("/large", get(move || std::future::ready(large.clone())));
    let ask_for_much = |address| {
        let mut silent = TcpStream::connect(address).unwrap();
        silent.write_all(b"GET /large HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
        silent
    };
    with_server(with_layers(routes), settings, move |address| {
        let mut silent = ask_for_much(address);
        std::thread::sleep(Duration::from_secs(2));
        let mut text = Vec::new();
        let _ = silent.read_to_end(&mut text);
        assert!(text.len() < 64 << 20, "it was closed before it had all");
        // Another connection, which the drain meets; `with_server` waits for the end.
        std::mem::forget(ask_for_much(address));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_half_closed_client_gets_its_answer_and_one_that_is_gone_ends_its_handler() {
    let ended = Arc::new(Semaphore::new(0));
    let work = {
        let ended = Arc::clone(&ended);
        move |millis: u64| async move {
            struct End(Arc<Semaphore>);
            impl Drop for End {
                fn drop(&mut self) {
                    self.0.add_permits(1);
                }
            }
            let _end = End(ended);
            tokio::time::sleep(Duration::from_millis(millis)).await;
            "answer"
        }
    };
    let (quick, slow) = (work.clone(), work);
    let routes =
        Router::new().route("/quick", get(move || quick(100))).route("/slow", get(move || slow(60_000)));
    with_server(with_layers(routes), settings(), move |address| {
        let half_close = |path: &str| {
            let mut stream = TcpStream::connect(address).unwrap();
            stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n").as_bytes()).unwrap();
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            let mut text = String::new();
            stream.read_to_string(&mut text).unwrap();
            text
        };
        assert!(half_close("/quick").ends_with("answer"));
        assert_eq!(half_close("/slow"), "");
        // The second handler is dropped with its connection, a moment after its client sees the
        // end.
        let start = std::time::Instant::now();
        while ended.available_permits() < 2 {
            assert!(start.elapsed() < Duration::from_secs(10), "a handler goes on");
            std::thread::sleep(Duration::from_millis(10));
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_early_refusal_is_read_by_a_client_that_sends_on() {
    with_server(router(app()), settings(), |address| {
        for path in ["/nothing", "/v1/recommend", "/v1/models/x/load"] {
            let mut stream = TcpStream::connect(address).unwrap();
            let body = vec![b' '; 5 << 20];
            let head = format!(
                "POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
                body.len()
            );
            stream.write_all(head.as_bytes()).unwrap();
            stream.write_all(&body).unwrap();
            let mut text = String::new();
            stream.read_to_string(&mut text).unwrap();
            assert!(text.starts_with("HTTP/1.1 ") && text.contains("connection: close"), "{path}: {text}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn methods_are_named_and_hosts_are_one() {
    with_server(router(app()), settings(), |address| {
        let text = ask(address, "DELETE /v1/recommend");
        assert!(text.starts_with("HTTP/1.1 405") && text.contains("allow: POST"), "{text}");
        assert!(text.contains("does not take DELETE: use POST"), "{text}");
        for hosts in ["host: x\r\nhost: y\r\n", "host: x\r\nhost: x\r\n", ""] {
            let mut stream = TcpStream::connect(address).unwrap();
            let request = format!("GET /livez HTTP/1.1\r\n{hosts}connection: close\r\n\r\n");
            stream.write_all(request.as_bytes()).unwrap();
            let mut text = String::new();
            stream.read_to_string(&mut text).unwrap();
            assert!(text.starts_with("HTTP/1.1 400") && text.contains("`host`"), "{text}");
        }
    })
    .await;
}
