//! What needs no model: a server that is still loading, and a handler that panics.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::routing::get;
use metrics_exporter_prometheus::PrometheusBuilder;
use tokio::net::TcpListener;

use super::listen::Connections;
use super::{App, SharedApp, router, with_layers};
use crate::settings::{Flags, HttpLayer, HttpSettings, Settings};

fn settings() -> HttpSettings {
    Settings::resolve(Flags::default(), HttpLayer::default()).unwrap().http
}

fn app() -> SharedApp {
    let admin = Settings::resolve(Flags::default(), HttpLayer::default()).unwrap().admin;
    Arc::new(App::new(settings(), &admin, PrometheusBuilder::new().build_recorder().handle(), 1))
}

/// Serves a router while `ask` asks.
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
    with_server(with_layers(routes).with_state(app()), settings(), |address| {
        let text = ask(address, "GET /panic");
        assert!(text.starts_with("HTTP/1.1 500") && text.contains("\"type\":\"internal\""), "{text}");
        assert!(text.contains("x-request-id: ") && !text.contains("secret"), "{text}");
        assert!(ask(address, "GET /fine").ends_with("fine"));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_beyond_the_limit_wait() {
    let settings = HttpSettings { max_connections: 2, ..settings() };
    with_server(router(app()), settings, |address| {
        let idle = [TcpStream::connect(address).unwrap(), TcpStream::connect(address).unwrap()];
        // Both are accepted once they have been answered.
        for mut stream in &idle {
            stream.write_all(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
            assert!(stream.read(&mut [0; 1024]).unwrap() > 0);
        }
        let mut third = TcpStream::connect(address).unwrap();
        third.write_all(b"GET /livez HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
        third.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        assert!(third.read(&mut [0; 16]).is_err(), "there is no place for it");
        drop(idle);
        third.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        assert!(third.read(&mut [0; 16]).unwrap() > 0);
    })
    .await;
}
