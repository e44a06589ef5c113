//! The server: from an HTTP request, a line of a file or the command line to a slate.
//!
//! Place in the flow: at the top. It loads a checkpoint with its convention and catalog, starts the
//! engine, and turns requests into engine requests and their answers into slates. Reading order:
//!
//! | module | one idea |
//! | --- | --- |
//! | [`settings`] | flags, environment, config file and defaults, in this order |
//! | [`budget`] | memory that all versions of a process may take together |
//! | [`runtime`] | from files on disk to a running engine |
//! | [`registry`] | several versions of several models, and how one replaces another |
//! | [`api`] | requests and answers, as JSON |
//! | [`service`] | check, resolve, cut, submit, slate: the same for HTTP, batch and the command line |
//! | [`error`] | every error of a request, with its type and status, in one table |
//! | [`http`] | routes, bodies, request ids, connections, draining |
//! | [`request_log`] | requests and answers, line by line, for replay |
//! | [`line_writer`] | lines for a file or a pipe that may be slow, full or gone |
//! | [`metrics`], [`logging`], [`openapi`] | information for operators and clients |
//! | [`cli`] | subcommands |
//!
//! Invariants: limits are checked before work is done; no request can end the process; nothing that
//! a client sees holds a path or an internal message.
//!
//! What this crate must not know: tensors, pages, tries from the inside.

#![forbid(unsafe_code)]

pub mod api;
pub mod budget;
pub mod cli;
pub mod error;
pub mod http;
pub mod line_writer;
pub mod logging;
pub mod metrics;
pub mod openapi;
pub mod registry;
pub mod request_log;
pub mod runtime;
pub mod service;
pub mod settings;
