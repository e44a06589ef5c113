//! The fields of all settings, each once: a flag, its environment twin, and a key of the config file.
//!
//! A layer holds the values from one source, so every field is optional. Defaults are applied where
//! layers are combined.

use std::path::PathBuf;

use beamline_model::loaded::KvFormat;
use beamline_model::loaded::WeightFormat;
use serde::Deserialize;

use super::{ByteSize, DeviceChoice, ListenAddress};

/// Declares a layer: every field is optional, readable by clap and from the file, and mergeable.
macro_rules! layer {
    (
        $(#[$meta:meta])*
        pub struct $name:ident {
            $($(#[$field_meta:meta])* pub $field:ident: $type:ty,)*
        }
    ) => {
        #[derive(Clone, Debug, Default, clap::Args, Deserialize)]
        #[serde(deny_unknown_fields, default)]
        $(#[$meta])*
        pub struct $name {
            $($(#[$field_meta])* pub $field: Option<$type>,)*
        }

        impl $name {
            /// This layer, with missing values taken from the `lower` one.
            #[must_use]
            pub fn or(self, lower: Self) -> Self {
                Self { $($field: self.$field.or(lower.$field),)* }
            }
        }
    };
}

layer! {
    /// The model to serve.
    #[command(next_help_heading = "Model")]
    pub struct ModelLayer {
        /// Checkpoint directory in Hugging Face layout: config.json, safetensors, tokenizer.json.
        #[arg(long, value_name = "DIR", env = "BEAMLINE_CHECKPOINT")]
        pub checkpoint: PathBuf,
        /// A config.json to use instead of a checkpoint, only for timing: its weights are random,
        /// so answers are meaningless. Tokenizer, convention and catalog are read from its folder
        /// unless named otherwise. Only with --device cuda.
        #[arg(long, value_name = "CONFIG", env = "BEAMLINE_RANDOM_WEIGHTS")]
        pub random_weights: PathBuf,
        /// Catalog file, .jsonl or .parquet [default: catalog.jsonl or catalog.parquet in the checkpoint].
        #[arg(long, value_name = "FILE", env = "BEAMLINE_CATALOG")]
        pub catalog: PathBuf,
        /// How the checkpoint writes histories and items: a file, or the name of a preset
        /// (openonerec, onereason, onerec-think, minionerec, lc-rec) [default: convention.json in
        /// the checkpoint].
        #[arg(long, value_name = "FILE|PRESET", env = "BEAMLINE_CONVENTION")]
        pub convention: String,
        /// Name of the model in requests [default: default].
        #[arg(long, value_name = "NAME", env = "BEAMLINE_NAME")]
        pub name: String,
    }
}

layer! {
    /// Settings of the engine.
    #[command(next_help_heading = "Engine")]
    pub struct EngineLayer {
        /// Threads of the forward pass [default: all cores].
        #[arg(long, value_name = "N", env = "BEAMLINE_THREADS")]
        pub threads: usize,
        /// Device that runs the model: `cpu`, `cuda` or `cuda:1`. CUDA needs a binary built with
        /// `--features cuda`, and keeps weights, keys and values in bf16 [default: cpu].
        #[arg(long, value_name = "DEVICE", env = "BEAMLINE_DEVICE")]
        pub device: DeviceChoice,
        /// Number format of weights: `f32` as they are; `bf16` needs half the memory; `q8_0`, 8-bit
        /// integers, is the fastest, and answers differ a little [default: f32; bf16 on CUDA].
        #[arg(long, value_name = "f32|bf16|q8_0", env = "BEAMLINE_WEIGHT_FORMAT")]
        pub weight_format: WeightFormat,
        /// Number format of keys and values of contexts: `f32` as computed; `bf16` needs half the
        /// memory and halves the bytes that attention reads, and answers differ a little [default:
        /// f32; bf16 on CUDA].
        #[arg(long, value_name = "f32|bf16", env = "BEAMLINE_KV_FORMAT")]
        pub kv_format: KvFormat,
        /// Memory for the contexts of users, such as 512MiB or 8GiB. Contexts that do not fit are
        /// computed again [default: 512MiB, or what one largest request needs; on CUDA most of what
        /// is free].
        #[arg(long, value_name = "SIZE", env = "BEAMLINE_KV_MEMORY")]
        pub kv_memory: ByteSize,
        /// Host memory for contexts that no longer fit into the KV memory, such as 8GiB: they come
        /// back without being computed again. It is taken only as it fills [default: 0, which keeps
        /// none].
        #[arg(long, value_name = "SIZE", env = "BEAMLINE_KV_HOST_MEMORY")]
        pub kv_host_memory: ByteSize,
        /// Longest time that a context stays in host memory, in seconds; 0 keeps it until room is needed
        /// [default: 3600].
        #[arg(long, value_name = "S", env = "BEAMLINE_KV_HOST_TTL_SECONDS")]
        pub kv_host_ttl_seconds: u64,
        /// Directory for contexts that outlive the process: contexts that no longer fit into memory
        /// are read from there, also after a restart. For one server at a time [default: none].
        #[arg(long, value_name = "DIR", env = "BEAMLINE_KV_DISK")]
        pub kv_disk: PathBuf,
        /// Room on that disk for each loaded version, such as 100GiB [default: none; needed with
        /// --kv-disk].
        #[arg(long, value_name = "SIZE", env = "BEAMLINE_KV_DISK_SIZE")]
        pub kv_disk_size: ByteSize,
        /// Longest time that a context stays on disk, in seconds; 0 keeps it until room is needed
        /// [default: 604800].
        #[arg(long, value_name = "S", env = "BEAMLINE_KV_DISK_TTL_SECONDS")]
        pub kv_disk_ttl_seconds: u64,
        /// Longest time that a request waits for its context to be read from disk, in milliseconds;
        /// 0 waits as long as computing it would take, and does not wait where computing is quicker
        /// [default: 0].
        #[arg(long, value_name = "MS", env = "BEAMLINE_KV_DISK_WAIT_MS")]
        pub kv_disk_wait_ms: u64,
        /// Most tokens of a context, if the model has more positions [default: 16384].
        #[arg(long, value_name = "N", env = "BEAMLINE_MAX_CONTEXT")]
        pub max_context: usize,
        /// Requests that are computed at the same time [default: 128].
        #[arg(long, value_name = "N", env = "BEAMLINE_MAX_RUNNING")]
        pub max_running: usize,
        /// Requests that may wait; more are refused with 429 [default: 1024].
        #[arg(long, value_name = "N", env = "BEAMLINE_MAX_QUEUED")]
        pub max_queued: usize,
        /// Context tokens that one step computes [default: 4096].
        #[arg(long, value_name = "N", env = "BEAMLINE_MAX_STEP_TOKENS")]
        pub max_step_tokens: usize,
        /// How soon after its arrival a request should be answered, in milliseconds. This decides
        /// the order of service and refuses no request [default: 100].
        #[arg(long, value_name = "MS", env = "BEAMLINE_OBJECTIVE_MS")]
        pub objective_ms: u64,
        /// Number of users whose newest context is found without a search [default: 100000].
        #[arg(long, value_name = "N", env = "BEAMLINE_SESSIONS")]
        pub sessions: u32,
        /// How histories that are too long are cut at the old end: `coarse` keeps the same first
        /// item over many visits, so that the cached context stays valid; `exact` keeps as many
        /// items as fit, as offline evaluations do [default: coarse].
        #[arg(long, value_name = "HOW", env = "BEAMLINE_HISTORY_CUT")]
        pub history_cut: HistoryCut,
    }
}

layer! {
    /// Limits of one request.
    #[command(next_help_heading = "Limits of one request")]
    pub struct LimitsLayer {
        /// Beam width of requests that do not give one [default: 50].
        #[arg(long, value_name = "N", env = "BEAMLINE_DEFAULT_BEAM_WIDTH")]
        pub default_beam_width: usize,
        /// Widest beam [default: 512].
        #[arg(long, value_name = "N", env = "BEAMLINE_MAX_BEAM_WIDTH")]
        pub max_beam_width: usize,
        /// Most items of an answer [default: the widest beam].
        #[arg(long, value_name = "N", env = "BEAMLINE_MAX_NUM_ITEMS")]
        pub max_num_items: usize,
        /// Most items of a history, before it is cut to the context [default: 10000].
        #[arg(long, value_name = "N", env = "BEAMLINE_MAX_HISTORY_ITEMS")]
        pub max_history_items: usize,
        /// Longest list in a filter [default: 10000].
        #[arg(long, value_name = "N", env = "BEAMLINE_MAX_LIST_ITEMS")]
        pub max_list_items: usize,
        /// Longest id, tag or name, in bytes [default: 512].
        #[arg(long, value_name = "N", env = "BEAMLINE_MAX_STRING_BYTES")]
        pub max_string_bytes: usize,
        /// Longest prompt, in bytes [default: 262144].
        #[arg(long, value_name = "N", env = "BEAMLINE_MAX_PROMPT_BYTES")]
        pub max_prompt_bytes: usize,
        /// Deadline of requests that do not give one, in milliseconds [default: 10000].
        #[arg(long, value_name = "MS", env = "BEAMLINE_DEFAULT_TIMEOUT_MS")]
        pub default_timeout_ms: u64,
        /// Latest deadline, in milliseconds [default: 60000].
        #[arg(long, value_name = "MS", env = "BEAMLINE_MAX_TIMEOUT_MS")]
        pub max_timeout_ms: u64,
    }
}

layer! {
    /// Settings of the HTTP server.
    #[command(next_help_heading = "HTTP")]
    pub struct HttpLayer {
        /// Address and port, such as 0.0.0.0:8080 for every network. A port alone means this
        /// machine only. Port 0 takes a free one [default: 127.0.0.1:8080].
        #[arg(long, value_name = "ADDR", env = "BEAMLINE_LISTEN")]
        pub listen: ListenAddress,
        /// Largest body, such as 2MiB [default: 2MiB].
        #[arg(long, value_name = "SIZE", env = "BEAMLINE_MAX_BODY_BYTES")]
        pub max_body_bytes: ByteSize,
        /// Longest time for the head of a request, or its body, to arrive, in milliseconds
        /// [default: 30000].
        #[arg(long, value_name = "MS", env = "BEAMLINE_READ_TIMEOUT_MS")]
        pub read_timeout_ms: u64,
        /// Close a connection when its client takes no bytes of its answer, or next to none, for
        /// this many milliseconds [default: 30000].
        #[arg(long, value_name = "MS", env = "BEAMLINE_WRITE_TIMEOUT_MS")]
        pub write_timeout_ms: u64,
        /// Bytes per second at which bodies must arrive, checked every 5 seconds, and at which
        /// answers must be read, checked every --write-timeout-ms [default: 1024].
        #[arg(long, value_name = "SIZE", env = "BEAMLINE_MIN_TRANSFER_RATE")]
        pub min_transfer_rate: ByteSize,
        /// Memory for the bodies of all current requests, beyond 16KiB of each; more are refused
        /// with 429 [default: 256MiB].
        #[arg(long, value_name = "SIZE", env = "BEAMLINE_MAX_BODY_MEMORY")]
        pub max_body_memory: ByteSize,
        /// Connections at a time; fewer if the system allows fewer open files. When all are taken,
        /// an idle one is closed. If none is idle, only health checks and metrics are answered
        /// [default: 4096].
        #[arg(long, value_name = "N", env = "BEAMLINE_MAX_CONNECTIONS")]
        pub max_connections: usize,
        /// Another address, for health checks and metrics alone: /livez, /readyz, /metrics [default: none].
        #[arg(long, value_name = "ADDR", env = "BEAMLINE_HEALTH_LISTEN")]
        pub health_listen: ListenAddress,
        /// After SIGTERM, take requests for this many milliseconds while /readyz reports not ready,
        /// so that load balancers notice [default: 0].
        #[arg(long, value_name = "MS", env = "BEAMLINE_DRAIN_DELAY_MS")]
        pub drain_delay_ms: u64,
        /// After that, wait at most this many milliseconds for requests in flight [default: 30000].
        #[arg(long, value_name = "MS", env = "BEAMLINE_DRAIN_TIMEOUT_MS")]
        pub drain_timeout_ms: u64,
        /// Report failure on /livez when the engine has shown no sign of life for this many
        /// milliseconds [default: 30000].
        #[arg(long, value_name = "MS", env = "BEAMLINE_LIVENESS_TIMEOUT_MS")]
        pub liveness_timeout_ms: u64,
        /// Append a JSON line for every answered /v1/recommend: the request, items and scores, checkpoint and
        /// catalog. `beamline replay` reads it [default: none].
        #[arg(long, value_name = "FILE", env = "BEAMLINE_REQUEST_LOG")]
        pub request_log: PathBuf,
        /// Name users in the request log by a digest of their id instead of the id [default: false].
        #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
              env = "BEAMLINE_REQUEST_LOG_HASH_USERS")]
        pub request_log_hash_users: bool,
    }
}

layer! {
    /// Settings for changing models and catalogs while the server runs.
    #[command(next_help_heading = "Models and catalogs over HTTP")]
    pub struct AdminLayer {
        /// Directory whose checkpoints may be loaded over HTTP: DIR/NAME, or DIR/NAME/ANYTHING for
        /// several of one model. Clients can open nothing outside it [default: none, so none can be
        /// loaded].
        #[arg(long, value_name = "DIR", env = "BEAMLINE_MODEL_ROOT")]
        pub model_root: PathBuf,
        /// Directory that keeps changes made while the server runs: loaded versions, labels,
        /// catalogs. The next start restores them. For one server at a time [default: none, so a
        /// restart forgets such changes].
        #[arg(long, value_name = "DIR", env = "BEAMLINE_STATE")]
        pub state: PathBuf,
        /// Memory for weights, contexts and catalogs of all versions together, such as 16GiB. A
        /// load that does not fit is refused, so leave room for two versions if you want to swap
        /// them [default: three quarters of the machine's memory, or of the container's if that is
        /// limited].
        #[arg(long, value_name = "SIZE", env = "BEAMLINE_MODEL_MEMORY")]
        pub model_memory: ByteSize,
        /// File with the admin key, of at least 16 characters, which clients send as
        /// `Authorization: Bearer KEY`. Or put the key itself into BEAMLINE_ADMIN_KEY. Without a
        /// key, changes are accepted only while listening on a loopback address; set one when a
        /// proxy forwards to that [default: none].
        #[arg(long, value_name = "FILE", env = "BEAMLINE_ADMIN_KEY_FILE")]
        pub admin_key_file: PathBuf,
        /// Largest catalog, or change of one, that is accepted over HTTP [default: 256MiB].
        #[arg(long, value_name = "SIZE", env = "BEAMLINE_MAX_CATALOG_BYTES")]
        pub max_catalog_bytes: ByteSize,
        /// Earlier catalogs of a version that are kept in memory for a rollback [default: 3].
        #[arg(long, value_name = "N", env = "BEAMLINE_KEEP_CATALOGS")]
        pub keep_catalogs: usize,
    }
}

layer! {
    /// Settings of the log.
    #[command(next_help_heading = "Log")]
    pub struct LogLayer {
        /// What to log to stderr: error, warn, info, debug, trace, or per module as in RUST_LOG
        /// [default: info for servers, else warn].
        #[arg(long, value_name = "FILTER", env = "BEAMLINE_LOG")]
        pub log: String,
        /// Format of log lines: text or json [default: text].
        #[arg(long, value_name = "FORMAT", env = "BEAMLINE_LOG_FORMAT")]
        pub log_format: LogFormat,
    }
}

/// How histories that are too long are cut at the old end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum HistoryCut {
    /// In steps of a quarter of the longest history that fits.
    #[default]
    Coarse,
    /// One item at a time.
    Exact,
}

/// The format of log lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Readable text for people.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}
