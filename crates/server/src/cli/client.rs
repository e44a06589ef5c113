//! Requests to a running server, for subcommands that change models and catalogs.
//!
//! Invariant: names are checked before they become part of a URL, and the key is only sent in a
//! header.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use serde_json::Value;

use crate::api::ErrorBody;
use crate::registry::name::{Reference, is_name};
use crate::settings::key;

/// Longest time to connect to a server. An answer may take as long as loading takes.
const CONNECT: Duration = Duration::from_secs(10);
/// Largest answer that is read, in bytes.
const MAX_ANSWER_BYTES: u64 = 64 << 20;

/// The address of the server, and the key for it.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Server")]
pub(super) struct ServerArgs {
    /// URL of the server. Only http: use a tunnel for a server behind TLS.
    #[arg(long, value_name = "URL", env = "BEAMLINE_SERVER", default_value = "http://127.0.0.1:8080")]
    server: String,
    /// File with the admin key, if the server has one. Or put the key itself into
    /// BEAMLINE_ADMIN_KEY.
    #[arg(long, value_name = "FILE", env = "BEAMLINE_ADMIN_KEY_FILE")]
    admin_key_file: Option<PathBuf>,
}

/// The model as a flag, as an alternative to the first argument.
#[derive(Debug, clap::Args)]
pub(super) struct ModelFlag {
    /// The model, instead of the first argument.
    #[arg(long, value_name = "MODEL")]
    model: Option<String>,
}

impl ModelFlag {
    /// Splits the arguments into the model and the others. `names` describes them for an error, and
    /// `usage` is a correct command line.
    ///
    /// # Errors
    ///
    /// When there are too many or too few arguments.
    pub(super) fn split<'a, const N: usize>(
        &'a self,
        words: &'a [String],
        names: [&str; N],
        usage: &str,
    ) -> anyhow::Result<(&'a str, [&'a str; N])> {
        let mut given = self.model.iter().chain(words).map(String::as_str);
        let model = given.next();
        let rest: Vec<&str> = given.collect();
        match (model, <[&str; N]>::try_from(rest)) {
            (Some(model), Ok(rest)) => Ok((model, rest)),
            _ => {
                let wanted: Vec<&str> = std::iter::once("MODEL").chain(names).collect();
                bail!("give {}, for example: {usage}", wanted.join(" "))
            }
        }
    }
}

/// The body of a request.
pub(super) enum Payload<'a> {
    /// An empty body.
    None,
    /// A JSON body.
    Json(Value),
    /// A body of JSON lines, from a file.
    Lines(&'a [u8]),
}

impl ServerArgs {
    /// A server that is only read from, without a key.
    pub(super) fn at(server: String) -> Self {
        Self { server, admin_key_file: None }
    }

    /// Sends a request and reads the answer; `null` when the answer is empty.
    ///
    /// # Errors
    ///
    /// When the server cannot be reached, or refuses; the error then holds the server's reason.
    pub(super) fn call(&self, method: &str, path: &str, payload: Payload<'_>) -> anyhow::Result<Value> {
        let base = self.server.trim_end_matches('/');
        if !base.starts_with("http://") {
            bail!("{base} is not a server's address: write http://HOST:PORT, such as http://127.0.0.1:8080");
        }
        let (media, body) = match payload {
            Payload::None => (None, Vec::new()),
            Payload::Json(value) => (Some("application/json"), value.to_string().into_bytes()),
            Payload::Lines(lines) => (Some("application/x-ndjson"), lines.to_vec()),
        };
        let mut request = ureq::http::Request::builder().method(method).uri(format!("{base}{path}"));
        if let Some(media) = media {
            request = request.header("content-type", media);
        }
        if let Some(key) = key::text(self.admin_key_file.as_deref())? {
            request = request.header("authorization", format!("Bearer {}", key.trim()));
        }
        let config =
            ureq::Agent::config_builder().http_status_as_error(false).timeout_connect(Some(CONNECT)).build();
        let agent = ureq::Agent::new_with_config(config);
        // The original error would quote the key.
        let unsendable = |_| anyhow!("the request cannot be written: is the admin key printable?");
        let sent = match media {
            Some(_) => agent.run(request.body(body).map_err(unsendable)?),
            None => agent.run(request.body(()).map_err(unsendable)?),
        };
        let mut answer = sent.with_context(|| {
            format!("no answer from {base}: is the server running? Name it with --server URL")
        })?;
        let text = answer.body_mut().with_config().limit(MAX_ANSWER_BYTES).read_to_string()?;
        let status = answer.status();
        if !status.is_success() {
            return Err(match serde_json::from_str::<ErrorBody>(&text) {
                Ok(ErrorBody { error }) => {
                    let cure = match error.kind.as_str() {
                        "unauthorized" => "; name the file that holds it with --admin-key-file FILE",
                        _ => "",
                    };
                    anyhow!("{}{cure} ({}, {})", error.message, error.kind, status.as_u16())
                }
                Err(_) => anyhow!("{base} answered {status}: is it a beamline server?"),
            });
        }
        if text.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_str(&text).with_context(|| format!("{base} did not answer with JSON"))
    }
}

/// Checks a name that becomes part of a URL.
pub(super) fn name<'a>(what: &str, text: &'a str) -> anyhow::Result<&'a str> {
    if is_name(text) {
        Ok(text)
    } else {
        bail!("{what} {text:?} is not a valid name: use letters, digits, `_`, `.` and `-`")
    }
}

/// Checks a reference to a model, with or without a label or version.
pub(super) fn reference(text: &str) -> anyhow::Result<&str> {
    let Reference { name: model, at } = Reference::parse(text);
    name("model", model)?;
    at.map_or(Ok(""), |at| name("label or version", at))?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_model_is_the_first_word_or_a_flag() {
        let words = |texts: &[&str]| texts.iter().map(|&text| text.to_owned()).collect::<Vec<_>>();
        let (flag, none) = (ModelFlag { model: Some("shop".into()) }, ModelFlag { model: None });
        let usage = "beamline catalog push shop catalog.jsonl";
        for (flag, words) in [(&none, words(&["shop", "file"])), (&flag, words(&["file"]))] {
            assert_eq!(flag.split(&words, ["FILE"], usage).unwrap(), ("shop", ["file"]));
        }
        for (flag, words) in
            [(&none, words(&["file"])), (&flag, words(&["shop", "file"])), (&none, words(&[]))]
        {
            let error = flag.split(&words, ["FILE"], usage).unwrap_err().to_string();
            assert_eq!(error, format!("give MODEL FILE, for example: {usage}"));
        }
    }
}
