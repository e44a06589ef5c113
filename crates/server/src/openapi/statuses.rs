//! The errors that any operation can answer with, added to those that an operation describes
//! itself.
//!
//! They follow from the operation's traits: whether it reads a body, changes models, uses a model,
//! or has a name in its path.

use utoipa::Modify;
use utoipa::openapi::path::Operation;
use utoipa::openapi::{ContentBuilder, OpenApi, Ref, RefOr, ResponseBuilder};

/// Adds these errors to the description.
pub(super) struct Statuses;

/// The traits of an operation that decide its errors.
struct Traits {
    reads_body: bool,
    needs_json: bool,
    changes: bool,
    asks_model: bool,
    is_named: bool,
    needs_registry: bool,
}

impl Traits {
    fn of(path: &str, operation: &Operation) -> Self {
        let asks_model =
            ["/v1/recommend", "/v1/rank", "/v1/warm"].contains(&path) || path.ends_with("/infer");
        Self {
            reads_body: operation.request_body.is_some() || path.starts_with("/v2/repository"),
            needs_json: operation.request_body.is_some() && path.starts_with("/v1/"),
            changes: operation.security.is_some(),
            asks_model,
            is_named: path.contains('{') || asks_model,
            needs_registry: path.starts_with("/v1/")
                || path.starts_with("/v2/models")
                || path.starts_with("/v2/repository"),
        }
    }

    fn statuses(&self) -> Vec<(&'static str, &'static str)> {
        let all = [
            (
                self.reads_body,
                "400",
                "The body is not JSON, or not this request; the message names the field.",
            ),
            (self.changes, "401", "No admin key, or a wrong one."),
            (self.changes, "403", "Changes are disabled."),
            (self.is_named, "404", "There is no such model, version, label or catalog."),
            (self.reads_body, "408", "The body did not arrive in time."),
            (self.changes, "409", "It collides with another change, with a label, or with the memory limit."),
            (self.reads_body, "413", "The body is too large."),
            (self.needs_json, "415", "The body is of another type, or encoded."),
            (self.reads_body, "422", "A value means nothing, is over its limit, or is not in the catalog."),
            (self.reads_body, "429", "Too many requests; `retry-after` says when to try again."),
            (self.needs_registry, "500", "A bug, or the model could not compute this request."),
            (
                self.needs_registry,
                "503",
                "Loading, shutting down or unhealthy; `retry-after` says when to try again.",
            ),
            (self.asks_model, "504", "The deadline came first."),
        ];
        all.into_iter().filter(|(occurs, ..)| *occurs).map(|(_, status, text)| (status, text)).collect()
    }
}

impl Modify for Statuses {
    fn modify(&self, openapi: &mut OpenApi) {
        for (path, item) in &mut openapi.paths.paths {
            let operations =
                [&mut item.get, &mut item.put, &mut item.post, &mut item.delete, &mut item.patch];
            for operation in operations.into_iter().flatten() {
                describe(path, operation);
            }
        }
    }
}

fn describe(path: &str, operation: &mut Operation) {
    let body = if path.starts_with("/v2") { "ProtocolError" } else { "ErrorBody" };
    let content = || ContentBuilder::new().schema(Some(Ref::from_schema_name(body))).build();
    for (status, text) in Traits::of(path, operation).statuses() {
        let made = || {
            RefOr::T(ResponseBuilder::new().description(text).content("application/json", content()).build())
        };
        operation.responses.responses.entry(status.to_owned()).or_insert_with(made);
    }
    for (status, response) in &mut operation.responses.responses {
        if let RefOr::T(response) = response
            && !status.starts_with('2')
        {
            response.content.entry("application/json".to_owned()).or_insert_with(|| RefOr::T(content()));
        }
    }
}
