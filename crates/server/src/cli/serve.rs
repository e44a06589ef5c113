//! `beamline serve`: listen, load, answer, drain.
//!
//! The address is bound first, so that a port in use is reported at once. While the model loads,
//! /livez answers and all other routes report that loading is in progress.

use std::io;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow};
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tracing::{info, warn};

use super::signals::{Reopen, Stop};
use super::{files, output, tokio_runtime};
use crate::http::listen::Connections;
use crate::http::{App, SharedApp, admin, health_router, router};
use crate::metrics;
use crate::registry::Registry;
use crate::request_log::RequestLog;
use crate::settings::{AdminLayer, Flags, HttpLayer, HttpSettings, Settings};

/// Most connections that wait to be accepted; the system may allow fewer. Beyond that, clients
/// retry after a second.
const BACKLOG: u32 = 16_384;
/// Most connections of the listener for health checks.
const HEALTH_CONNECTIONS: usize = 64;
/// How often samples are moved into histograms if no client reads the metrics.
const METRICS_UPKEEP: Duration = Duration::from_secs(5);

/// Flags of `serve`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Try it:
  beamline serve --checkpoint DIR
  beamline serve --checkpoint DIR --model-root DIR    and load others while it runs: see docs/OPERATIONS.md
  curl -s http://127.0.0.1:8080/v1/recommend -H 'content-type: application/json' \\
       -d '{\"history\": [{\"item_id\": \"an item of your catalog\"}], \"num_items\": 5}'

The first line on stdout is `listening on http://ADDRESS`, once the checkpoint was opened; the log goes to stderr.
SIGTERM, SIGINT or SIGQUIT stops taking requests, finishes those in flight and exits with 0; a second one exits at once.
SIGHUP or SIGUSR1 opens the request log again, as after a rotation.")]
pub(super) struct Args {
    #[command(flatten)]
    flags: Flags,
    #[command(flatten)]
    http: HttpLayer,
    #[command(flatten)]
    admin: AdminLayer,
}

pub(super) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let settings = Settings::resolve_server(args.flags, args.http, args.admin)?;
    // With a model root or a state, the server may start without a model.
    if settings.admin.model_root.is_none() && settings.admin.state.is_none() {
        settings.model.checkpoint()?;
    }
    super::start_log(&settings.log, "info")?;
    serve(settings, |_, _| Ok(()))
}

/// Serves until a signal comes. Calls `announce` when the model is ready.
pub(super) fn serve(
    settings: Settings,
    announce: impl FnOnce(&Registry, SocketAddr) -> io::Result<()>,
) -> anyhow::Result<ExitCode> {
    let tokio = tokio_runtime()?;
    let result = tokio.block_on(serve_async(settings, announce));
    // Loading cannot be interrupted, and after a second signal the process does not wait for it.
    tokio.shutdown_background();
    result.map(|()| ExitCode::SUCCESS)
}

async fn serve_async(
    mut settings: Settings,
    announce: impl FnOnce(&Registry, SocketAddr) -> io::Result<()>,
) -> anyhow::Result<()> {
    let mut signals = Stop::new().context("cannot wait for signals")?;
    let reopen = Reopen::new().context("cannot wait for signals")?;
    settings.http.max_connections = files::raise_limit(settings.http.max_connections);
    let listener = bind(settings.http.listen)?;
    let health = settings.http.health_listen.map(bind).transpose()?;
    let address = listener.local_addr().context("the listener has no address")?;
    let metrics = metrics::start()?;

    let request_log = settings.request_log.as_ref().map(RequestLog::start).transpose()?;
    let requests = settings.engine.max_running.saturating_add(settings.engine.max_queued);
    let app: SharedApp = Arc::new(App::new(settings.http, &settings.admin, metrics.clone(), requests));
    if let Some(log) = request_log {
        // This is the only call that sets it.
        let _ = app.request_log.set(log);
    }
    if admin::is_open(&app) {
        warn!(
            "anyone on this machine can change models and catalogs: set a key with --admin-key-file to prevent it"
        );
    }
    let reopening = tokio::spawn(reopen_logs(reopen, Arc::clone(&app)));
    let health = health.map(|listener| serve_health(listener, &app, &settings.http)).transpose()?;
    let connections = Arc::new(Connections::default());
    let stop = Arc::new(Notify::new());
    let accepting = tokio::spawn({
        let (connections, stop, router) =
            (Arc::clone(&connections), Arc::clone(&stop), router(Arc::clone(&app)));
        let http = settings.http;
        async move { connections.accept(listener, router, &http, stop.notified()).await }
    });
    let upkeep = tokio::spawn(async move {
        loop {
            tokio::time::sleep(METRICS_UPKEEP).await;
            metrics.run_upkeep();
        }
    });

    let patience = settings.http.drain_timeout;
    let delay = settings.http.drain_delay;
    // People and scripts wait for this line. It comes when the checkpoint was opened, so a
    // checkpoint that cannot be read is reported without it.
    let opened = move || {
        // Serving does not depend on a reader of this line.
        if let Err(error) = output::print(&format!("listening on http://{address}\n")) {
            warn!(%error, "cannot write to stdout");
        }
        info!(%address, "listening");
    };
    let loading = tokio::task::spawn_blocking(move || Registry::start_with(settings, opened));
    let registry = tokio::select! {
        loaded = loading => loaded.context("loading ended in an internal error")??,
        () = signals.next() => {
            info!("stopped while loading");
            return Ok(());
        }
    };
    let registry = Arc::new(registry);
    app.set_ready(Arc::clone(&registry));
    info!(%address, "ready");
    if let Err(error) = announce(&registry, address) {
        warn!(%error, "cannot write to stdout");
    }

    signals.next().await;
    info!("draining");
    app.set_draining();
    let drained = async {
        tokio::time::sleep(delay).await;
        stop.notify_one();
        let _ = accepting.await;
        let finished = finish(registry, connections, patience).await;
        close_request_log(&app, patience).await;
        finished
    };
    let result = tokio::select! {
        result = drained => result,
        () = signals.next() => {
            warn!("a second signal: leaving at once");
            Ok(())
        }
    };
    upkeep.abort();
    reopening.abort();
    health.inspect(JoinHandle::abort);
    info!("stopped");
    result
}

/// Waits for requests in flight to finish.
async fn finish(
    registry: Arc<Registry>,
    connections: Arc<Connections>,
    patience: Duration,
) -> anyhow::Result<()> {
    // Requests that have arrived are still answered. Connections close after their current request.
    if let Some(connections) = Arc::into_inner(connections)
        && tokio::time::timeout(patience, connections.end()).await.is_err()
    {
        warn!("some requests did not finish in time");
    }
    let drained = tokio::task::spawn_blocking(move || registry.drain(Duration::ZERO));
    drained.await.context("draining panicked")?.context("the engine died")
}

/// Writes the remaining lines of the request log. A disk that hangs does not keep the process from
/// ending.
async fn close_request_log(app: &SharedApp, patience: Duration) {
    let app = Arc::clone(app);
    let close = move || app.request_log.get().is_none_or(|log| log.close(patience));
    if !tokio::task::spawn_blocking(close).await.unwrap_or(false) {
        warn!("the request log was not written to its end in time");
    }
}

/// Serves health checks and metrics at their own address, until the process ends.
fn serve_health(
    listener: TcpListener,
    app: &SharedApp,
    http: &HttpSettings,
) -> anyhow::Result<JoinHandle<()>> {
    let address = listener.local_addr().context("the listener for health checks has no address")?;
    info!(%address, "listening for health checks");
    let settings = HttpSettings { max_connections: HEALTH_CONNECTIONS, ..*http };
    let router = health_router(Arc::clone(app));
    Ok(tokio::spawn(async move {
        Connections::default().accept(listener, router, &settings, std::future::pending()).await;
    }))
}

/// Reopens the request log whenever a signal asks for it.
async fn reopen_logs(mut reopen: Reopen, app: SharedApp) {
    loop {
        reopen.next().await;
        match app.request_log.get() {
            Some(log) => {
                log.reopen();
                info!("opening the request log again");
            }
            None => info!("nothing to open again: there is no request log"),
        }
    }
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    // A restart must not wait until the system has forgotten the connections of the last process.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

fn bind(address: SocketAddr) -> anyhow::Result<TcpListener> {
    listen(address).map_err(|error| match error.kind() {
        io::ErrorKind::AddrInUse => anyhow!(
            "port {} is in use on {}: is another server running? Choose another with --listen {}:PORT",
            address.port(),
            address.ip(),
            address.ip()
        ),
        _ => anyhow!(error).context(format!("cannot listen on {address}")),
    })
}
