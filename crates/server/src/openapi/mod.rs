//! The description of the API from which clients generate code. It is made from the types and
//! handlers themselves.
//!
//! | module | one idea |
//! | --- | --- |
//! | [`statuses`] | the errors that an operation can answer with |
//! | [`examples`] | a request and an answer of each operation |
//!
//! A copy is committed as `openapi.json` beside the manifest. Tests keep it up to date, compare it
//! with the router, and check it with a third-party validator.

mod examples;
mod statuses;

use std::sync::LazyLock;

use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityScheme};
use utoipa::{Modify, OpenApi, ToSchema};

use self::examples::Examples;
use self::statuses::Statuses;
use crate::http::{catalogs, handlers, infer, models, oip};

#[derive(OpenApi)]
#[openapi(
    info(
        title = "beamline",
        description = "Serving engine for generative recommenders: send a user's history, get items, ranked."
    ),
    paths(
        handlers::recommend,
        handlers::rank,
        handlers::warm,
        models::list,
        models::load,
        models::unload,
        models::set_label,
        models::remove_label,
        catalogs::list,
        catalogs::replace,
        catalogs::patch,
        catalogs::roll_back,
        oip::server,
        oip::live,
        oip::ready,
        oip::model,
        oip::model_ready,
        oip::version,
        oip::version_ready,
        oip::index,
        oip::load,
        oip::unload,
        infer::infer,
        infer::infer_version,
        handlers::livez,
        handlers::readyz,
        handlers::metrics,
        handlers::openapi
    ),
    components(schemas(ProtocolError)),
    servers((url = "/", description = "The server that gives this description.")),
    modifiers(&AdminScheme, &Statuses, &Examples)
)]
struct Api;

/// Describes how the admin key is sent.
struct AdminScheme;

impl Modify for AdminScheme {
    fn modify(&self, openapi: &mut utoipa::openapi::OpenApi) {
        let mut http = Http::new(HttpAuthScheme::Bearer);
        http.description = Some(
            "The admin key. A server without one takes changes only while it listens on a loopback address."
                .into(),
        );
        let components = openapi.components.get_or_insert_default();
        components.add_security_scheme("admin_key", SecurityScheme::Http(http));
    }
}

/// An error under `/v2`.
#[derive(ToSchema)]
#[expect(dead_code, reason = "it describes what is written as JSON elsewhere")]
struct ProtocolError {
    /// The message, for people.
    error: String,
}

/// The description as pretty-printed JSON with a line end. It is built once.
///
/// # Errors
///
/// When it cannot be written as JSON, which a test rules out.
pub fn json() -> Result<&'static str, &'static str> {
    static TEXT: LazyLock<Result<String, String>> = LazyLock::new(|| {
        let text = Api::openapi().to_pretty_json().map_err(|error| error.to_string())?;
        Ok(text + "\n")
    });
    TEXT.as_deref().map_err(String::as_str)
}
