//! Settings: flag, else environment, else config file, else default.
//!
//! Place in the flow: read once at start-up. Flags and environment are one layer (clap reads both),
//! the file is the other. [`layers`] holds their fields. [`Settings::resolve`] combines them and
//! applies defaults.
//!
//! Invariant: an unknown key of the file is an error, so that a misspelt key is noticed.

mod device;
pub mod environment;
pub(crate) mod key;
pub mod layers;
mod listen;
pub mod size;
#[cfg(test)]
mod tests;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use beamline_model::loaded::KvFormat;
use beamline_model::loaded::WeightFormat;
use clap::Args;
use serde::Deserialize;

pub use device::DeviceChoice;
pub use key::AdminKey;
pub use layers::{
    AdminLayer, EngineLayer, HistoryCut, HttpLayer, LimitsLayer, LogFormat, LogLayer, ModelLayer,
};
pub use listen::ListenAddress;
pub use size::ByteSize;

use crate::http::pace::LeastPace;
use crate::request_log::RequestLogSettings;

/// Upper bound for the number of requests that may wait, and for those that may run.
const MAX_REQUESTS: usize = 1 << 20;

/// Window in which the pace of a body is checked: the server waits this long for a client that
/// sends nothing.
const BODY_WINDOW: Duration = Duration::from_secs(5);

/// Largest config file that is read, in bytes.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Why the settings cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// A file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// Path of the file.
        path: PathBuf,
        /// The error of the operating system.
        source: std::io::Error,
    },
    /// The config file is not valid.
    #[error("config file {}: {message}", path.display())]
    Parse {
        /// Path of the config file.
        path: PathBuf,
        /// What is wrong, with the number of the line.
        message: String,
    },
    /// The admin key is too short, or too long.
    #[error("the admin key {0}")]
    Key(String),
    /// A setting must be at least one.
    #[error("{0} must be at least 1")]
    Zero(&'static str),
    /// Two settings contradict each other.
    #[error("{0}")]
    Contradiction(String),
    /// A setting has no default and was not given.
    #[error(
        "no checkpoint: give --checkpoint DIR, set BEAMLINE_CHECKPOINT, or put `checkpoint` under [model] in the config file; \
         `beamline demo` serves the demo"
    )]
    NoCheckpoint,
}

/// The flags of a subcommand, with their environment variables.
#[derive(Clone, Debug, Default, Args)]
pub struct Flags {
    /// Config file (TOML) with the tables model, engine, limits, http, admin and log. Its keys are
    /// the names of the flags, with underscores. Flags and environment variables override it.
    #[arg(long, value_name = "FILE", env = "BEAMLINE_CONFIG")]
    pub config: Option<PathBuf>,
    /// Flags of the model.
    #[command(flatten)]
    pub model: ModelLayer,
    /// Flags of the engine.
    #[command(flatten)]
    pub engine: EngineLayer,
    /// Flags for the limits of one request.
    #[command(flatten)]
    pub limits: LimitsLayer,
    /// Flags of the log.
    #[command(flatten)]
    pub log: LogLayer,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct File {
    model: ModelLayer,
    engine: EngineLayer,
    limits: LimitsLayer,
    http: HttpLayer,
    admin: AdminLayer,
    log: LogLayer,
}

/// All settings, resolved.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The checkpoint, if one was named.
    pub model: ModelSettings,
    /// Settings of the engine.
    pub engine: EngineSettings,
    /// The disk for contexts that outlive the process, if there is one.
    pub kv_disk: Option<DiskSettings>,
    /// Limits of one request.
    pub limits: RequestLimits,
    /// Settings of the HTTP server.
    pub http: HttpSettings,
    /// The log of requests and answers, if it is enabled.
    pub request_log: Option<RequestLogSettings>,
    /// Settings for changing models and catalogs over HTTP.
    pub admin: AdminSettings,
    /// Settings of the log.
    pub log: LogSettings,
}

/// The model to serve.
#[derive(Clone, Debug)]
pub struct ModelSettings {
    /// The directory of the checkpoint.
    pub checkpoint: Option<PathBuf>,
    /// A config.json to use instead of a checkpoint, with random weights.
    pub random_weights: Option<PathBuf>,
    /// The catalog, if it does not lie beside the checkpoint.
    pub catalog: Option<PathBuf>,
    /// A file or the name of a preset, if convention.json does not lie beside the checkpoint.
    pub convention: Option<String>,
    /// Name of the model in requests.
    pub name: String,
}

impl ModelSettings {
    /// The directory of the checkpoint, or of the config.json for random weights.
    ///
    /// # Errors
    ///
    /// When none was named.
    pub fn checkpoint(&self) -> Result<&Path, SettingsError> {
        let folder = self.random_weights.as_deref().map(|config| config.parent().unwrap_or(Path::new("")));
        folder.or(self.checkpoint.as_deref()).ok_or(SettingsError::NoCheckpoint)
    }
}

/// Settings of the engine.
#[derive(Clone, Copy, Debug)]
pub struct EngineSettings {
    /// Number of threads of the forward pass.
    pub threads: usize,
    /// The device that runs the model.
    pub device: DeviceChoice,
    /// Number format of weights in memory.
    pub weight_format: WeightFormat,
    /// Number format of keys and values in pages.
    pub kv_format: KvFormat,
    /// Memory of all KV pages; `None` means 512 MiB or what one largest request needs.
    pub kv_memory: Option<ByteSize>,
    /// Host memory for evicted KV pages; 0 means none.
    pub kv_host_memory: ByteSize,
    /// How long evicted pages stay in host memory; `None` means until room is needed.
    pub kv_host_ttl: Option<Duration>,
    /// Most tokens of a context, if the model has more positions.
    pub max_context: usize,
    /// Most requests that run at the same time.
    pub max_running: usize,
    /// Most requests that wait for admission.
    pub max_queued: usize,
    /// Most context rows of a step.
    pub max_step_tokens: usize,
    /// How soon after its arrival a request should be answered.
    pub objective: Duration,
    /// Number of users whose newest context is remembered.
    pub sessions: u32,
    /// How histories that are too long are cut.
    pub history_cut: HistoryCut,
}

/// The disk for contexts that outlive the process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskSettings {
    /// The directory of the files.
    pub directory: PathBuf,
    /// Room for the contexts of one version.
    pub size: ByteSize,
    /// How long contexts stay on disk; `None` means until room is needed.
    pub ttl: Option<Duration>,
    /// How long a request waits for the disk; `None` means as long as computing would take.
    pub wait: Option<Duration>,
    /// Whether only the memory is counted, and the disk is not used.
    pub count_only: bool,
}

/// Limits of one request.
#[derive(Clone, Copy, Debug)]
pub struct RequestLimits {
    /// Beam width of a request that gives none.
    pub default_beam_width: usize,
    /// Largest beam width of a request.
    pub max_beam_width: usize,
    /// Most items of an answer.
    pub max_num_items: usize,
    /// Most items of a history, before it is cut.
    pub max_history_items: usize,
    /// Longest list in a filter.
    pub max_list_items: usize,
    /// Longest id, tag, name or the like, in bytes.
    pub max_string_bytes: usize,
    /// Longest prompt, in bytes.
    pub max_prompt_bytes: usize,
    /// Deadline of a request that gives none.
    pub default_timeout: Duration,
    /// Latest deadline of a request.
    pub max_timeout: Duration,
}

/// Settings of the HTTP server.
#[derive(Clone, Copy, Debug)]
pub struct HttpSettings {
    /// The address to listen on.
    pub listen: SocketAddr,
    /// Largest body of a request, in bytes.
    pub max_body_bytes: usize,
    /// Longest time that a body, or the head of a request, may take to arrive.
    pub read_timeout: Duration,
    /// The minimum pace at which a body must arrive.
    pub body_pace: LeastPace,
    /// The minimum pace at which an answer must be read.
    pub write_pace: LeastPace,
    /// Most bytes of the bodies of all current requests.
    pub max_body_memory: usize,
    /// Most connections at a time.
    pub max_connections: usize,
    /// Another address that only serves health checks and metrics.
    pub health_listen: Option<SocketAddr>,
    /// How long requests are still taken after SIGTERM, while /readyz reports not ready.
    pub drain_delay: Duration,
    /// How long requests in flight may take to finish after that.
    pub drain_timeout: Duration,
    /// Age of the engine's last sign of life at which /livez reports failure.
    pub liveness_timeout: Duration,
}

/// Settings for changing models and catalogs over HTTP.
#[derive(Clone, Debug)]
pub struct AdminSettings {
    /// The directory from which checkpoints may be loaded.
    pub model_root: Option<PathBuf>,
    /// The directory that keeps changes over a restart.
    pub state: Option<PathBuf>,
    /// Memory for all versions; `None` means a share of the machine's.
    pub model_memory: Option<ByteSize>,
    /// The key that clients must send for changes; `None` allows them only over loopback.
    pub key: Option<AdminKey>,
    /// Largest catalog that is accepted, in bytes.
    pub max_catalog_bytes: usize,
    /// Number of earlier catalogs of a version that are kept.
    pub keep_catalogs: usize,
}

/// Settings of the log.
#[derive(Clone, Debug)]
pub struct LogSettings {
    /// The filter, as in `RUST_LOG`; if `None`, the subcommand decides.
    pub filter: Option<String>,
    /// The format of log lines.
    pub format: LogFormat,
}

impl Settings {
    /// Combines flags and file, and applies the defaults.
    ///
    /// # Errors
    ///
    /// When the file is unreadable or has unknown keys, or the settings contradict each other.
    pub fn resolve(flags: Flags, http: HttpLayer) -> Result<Self, SettingsError> {
        Self::resolve_server(flags, http, AdminLayer::default())
    }

    /// Like [`Settings::resolve`], for a server whose models can be changed.
    ///
    /// # Errors
    ///
    /// Like [`Settings::resolve`], and when the admin key cannot be read.
    pub fn resolve_server(flags: Flags, http: HttpLayer, admin: AdminLayer) -> Result<Self, SettingsError> {
        let file = flags.config.as_deref().map(read_file).transpose()?.unwrap_or_default();
        let limits = limits(flags.limits.or(file.limits))?;
        let http = http.or(file.http);
        let engine = flags.engine.or(file.engine);
        let kv_disk = kv_disk(&engine)?;
        let engine = self::engine(engine)?;
        let (model, admin) =
            (model(flags.model.or(file.model), engine.device)?, self::admin(admin.or(file.admin))?);
        if admin.state.is_some() && model.random_weights.is_some() {
            let message = "random-weights are for timing and leave nothing to keep: give no state with them";
            return Err(SettingsError::Contradiction(message.into()));
        }
        Ok(Self {
            request_log: request_log(&http),
            model,
            engine,
            kv_disk,
            limits,
            http: self::http(http)?,
            admin,
            log: log(flags.log.or(file.log)),
        })
    }
}

fn read_file(path: &Path) -> Result<File, SettingsError> {
    let read = |source| SettingsError::Read { path: path.to_owned(), source };
    if std::fs::metadata(path).map_err(read)?.len() > MAX_FILE_BYTES {
        return Err(read(std::io::Error::other("too large for a config file")));
    }
    let text = std::fs::read_to_string(path).map_err(read)?;
    toml::from_str(&text).map_err(|error| {
        let message = beamline_wording::plain(error.to_string().trim_end());
        SettingsError::Parse { path: path.to_owned(), message }
    })
}

fn model(layer: ModelLayer, device: DeviceChoice) -> Result<ModelSettings, SettingsError> {
    let contradiction = |message: &str| Err(SettingsError::Contradiction(message.into()));
    match (&layer.random_weights, &layer.checkpoint, device) {
        (Some(_), Some(_), _) => {
            return contradiction("random-weights takes the place of a checkpoint: give one of them");
        }
        // A CPU's speed depends on the values, and a checkpoint to measure it with is always at
        // hand.
        (Some(_), None, DeviceChoice::Cpu) => {
            return contradiction("random-weights are for timing a GPU: they need device cuda");
        }
        _ => {}
    }
    Ok(ModelSettings {
        checkpoint: layer.checkpoint,
        random_weights: layer.random_weights,
        catalog: layer.catalog,
        convention: layer.convention,
        name: layer.name.unwrap_or_else(|| "default".into()),
    })
}

fn engine(layer: EngineLayer) -> Result<EngineSettings, SettingsError> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let device = layer.device.unwrap_or_default();
    let weight_format = format_on(device, "weight-format", layer.weight_format, WeightFormat::Bf16)?;
    let kv_format = format_on(device, "kv-format", layer.kv_format, KvFormat::Bf16)?;
    Ok(EngineSettings {
        threads: positive("threads", layer.threads, cores)?,
        device,
        weight_format,
        kv_format,
        kv_memory: layer.kv_memory,
        kv_host_memory: layer.kv_host_memory.unwrap_or(ByteSize(0)),
        kv_host_ttl: match layer.kv_host_ttl_seconds.unwrap_or(3600) {
            0 => None,
            seconds => Some(Duration::from_secs(seconds.min(MAX_HOST_TTL_SECONDS))),
        },
        max_context: positive("max-context", layer.max_context, 16_384)?,
        max_running: at_most("max-running", MAX_REQUESTS, positive("max-running", layer.max_running, 128)?)?,
        max_queued: at_most("max-queued", MAX_REQUESTS, positive("max-queued", layer.max_queued, 1024)?)?,
        max_step_tokens: positive("max-step-tokens", layer.max_step_tokens, 4096)?,
        objective: millis(positive("objective-ms", layer.objective_ms, 100)?),
        sessions: layer.sessions.unwrap_or(100_000),
        history_cut: layer.history_cut.unwrap_or_default(),
    })
}

fn kv_disk(layer: &EngineLayer) -> Result<Option<DiskSettings>, SettingsError> {
    let (directory, size) = match (&layer.kv_disk, layer.kv_disk_size) {
        (None, None) => return Ok(None),
        (Some(directory), Some(size)) => (directory.clone(), size),
        (Some(_), None) => {
            let message = "kv-disk says where contexts are kept and nothing how many: give kv-disk-size too";
            return Err(SettingsError::Contradiction(message.into()));
        }
        (None, Some(_)) => {
            let message = "kv-disk-size says how much is kept and nothing where: give kv-disk too";
            return Err(SettingsError::Contradiction(message.into()));
        }
    };
    let unless_zero = |count: u64, time: fn(u64) -> Duration| (count > 0).then(|| time(count));
    let seconds = layer.kv_disk_ttl_seconds.unwrap_or(DISK_TTL_SECONDS).min(MAX_HOST_TTL_SECONDS);
    Ok(Some(DiskSettings {
        directory,
        size,
        ttl: unless_zero(seconds, Duration::from_secs),
        wait: unless_zero(layer.kv_disk_wait_ms.unwrap_or(0), Duration::from_millis),
        count_only: false,
    }))
}

/// One week, in seconds.
const DISK_TTL_SECONDS: u64 = 7 * 24 * 3600;

/// The number format to use. CUDA only has the format `cuda`, so another `given` format is an error
/// there.
fn format_on<F: Default + PartialEq + std::fmt::Display>(
    device: DeviceChoice,
    name: &str,
    given: Option<F>,
    cuda: F,
) -> Result<F, SettingsError> {
    match (device, given) {
        (DeviceChoice::Cpu, given) => Ok(given.unwrap_or_default()),
        (DeviceChoice::Cuda(_), Some(other)) if other != cuda => Err(SettingsError::Contradiction(format!(
            "{name} is {other}, but device {device} has {cuda} only"
        ))),
        (DeviceChoice::Cuda(_), _) => Ok(cuda),
    }
}

/// One century, in seconds: a longer time means for ever.
const MAX_HOST_TTL_SECONDS: u64 = 100 * 366 * 24 * 3600;

fn limits(layer: LimitsLayer) -> Result<RequestLimits, SettingsError> {
    let max_beam_width = positive("max-beam-width", layer.max_beam_width, 512)?;
    // Lowering the limit should not make every start fail because of the default.
    let default_beam_width = match layer.default_beam_width {
        Some(width) => positive("default-beam-width", Some(width), width)?,
        None => 50.min(max_beam_width),
    };
    let limits = RequestLimits {
        default_beam_width,
        max_beam_width,
        max_num_items: positive("max-num-items", layer.max_num_items, max_beam_width)?,
        max_history_items: positive("max-history-items", layer.max_history_items, 10_000)?,
        max_list_items: positive("max-list-items", layer.max_list_items, 10_000)?,
        max_string_bytes: positive("max-string-bytes", layer.max_string_bytes, 512)?,
        max_prompt_bytes: positive("max-prompt-bytes", layer.max_prompt_bytes, 256 << 10)?,
        default_timeout: millis(positive("default-timeout-ms", layer.default_timeout_ms, 10_000)?),
        max_timeout: millis(positive("max-timeout-ms", layer.max_timeout_ms, 60_000)?),
    };
    let ordered = [
        (
            "default-beam-width",
            limits.default_beam_width as u128,
            "max-beam-width",
            limits.max_beam_width as u128,
        ),
        ("max-num-items", limits.max_num_items as u128, "max-beam-width", limits.max_beam_width as u128),
        (
            "default-timeout-ms",
            limits.default_timeout.as_millis(),
            "max-timeout-ms",
            limits.max_timeout.as_millis(),
        ),
    ];
    match ordered.into_iter().find(|(_, small, _, large)| small > large) {
        Some((a, small, b, large)) => {
            Err(SettingsError::Contradiction(format!("{a} ({small}) is more than {b} ({large})")))
        }
        None => Ok(limits),
    }
}

fn http(layer: HttpLayer) -> Result<HttpSettings, SettingsError> {
    let max_body_bytes = layer.max_body_bytes.map_or(2 << 20, |size| size.0);
    let read_timeout = millis(positive("read-timeout-ms", layer.read_timeout_ms, 30_000)?);
    let write_timeout = millis(positive("write-timeout-ms", layer.write_timeout_ms, 30_000)?);
    let rate = layer.min_transfer_rate.map_or(1 << 10, |size| size.0) as u64;
    let body_memory = layer.max_body_memory.map_or(256 << 20, |size| size.0);
    let listen = layer.listen.map_or_else(|| (Ipv4Addr::LOCALHOST, 8080).into(), |listen| listen.0);
    if layer.health_listen.is_some_and(|health| health.0 == listen && listen.port() != 0) {
        let message = "health-listen is the address of listen: give it another port";
        return Err(SettingsError::Contradiction(message.into()));
    }
    Ok(HttpSettings {
        listen,
        health_listen: layer.health_listen.map(|listen| listen.0),
        max_body_bytes: positive("max-body-bytes", Some(max_body_bytes), max_body_bytes)?,
        read_timeout,
        body_pace: LeastPace::new(BODY_WINDOW.min(read_timeout), rate),
        write_pace: LeastPace::new(write_timeout, rate),
        max_body_memory: positive("max-body-memory", Some(body_memory), body_memory)?,
        max_connections: positive("max-connections", layer.max_connections, 4096)?,
        drain_delay: millis(layer.drain_delay_ms.unwrap_or(0)),
        drain_timeout: millis(layer.drain_timeout_ms.unwrap_or(30_000)),
        liveness_timeout: millis(positive("liveness-timeout-ms", layer.liveness_timeout_ms, 30_000)?),
    })
}

fn request_log(layer: &HttpLayer) -> Option<RequestLogSettings> {
    let hash_users = layer.request_log_hash_users.unwrap_or(false);
    layer.request_log.clone().map(|file| RequestLogSettings { file, hash_users })
}

fn admin(layer: AdminLayer) -> Result<AdminSettings, SettingsError> {
    Ok(AdminSettings {
        model_root: layer.model_root,
        state: layer.state,
        model_memory: layer.model_memory,
        key: AdminKey::read(layer.admin_key_file.as_deref())?,
        max_catalog_bytes: layer.max_catalog_bytes.map_or(256 << 20, |size| size.0),
        keep_catalogs: layer.keep_catalogs.unwrap_or(3),
    })
}

fn log(layer: LogLayer) -> LogSettings {
    LogSettings { filter: layer.log, format: layer.log_format.unwrap_or_default() }
}

fn positive<T: Default + PartialEq>(
    name: &'static str,
    value: Option<T>,
    default: T,
) -> Result<T, SettingsError> {
    let value = value.unwrap_or(default);
    if value == T::default() { Err(SettingsError::Zero(name)) } else { Ok(value) }
}

/// Checks an upper bound: memory is reserved for everything that may exist at the same time.
fn at_most(name: &str, most: usize, value: usize) -> Result<usize, SettingsError> {
    if value <= most {
        return Ok(value);
    }
    Err(SettingsError::Contradiction(format!("{name} is {value}: give at most {most}")))
}

fn millis(count: u64) -> Duration {
    Duration::from_millis(count)
}
