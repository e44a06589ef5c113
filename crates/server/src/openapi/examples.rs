//! Examples of requests and answers, of the demo shop: a test sends each request to a server.

use serde_json::{Value, json};
use utoipa::Modify;
use utoipa::openapi::path::{Operation, PathItem};
use utoipa::openapi::{Content, OpenApi, RefOr};

/// Adds the examples to the description.
pub(super) struct Examples;

impl Modify for Examples {
    fn modify(&self, openapi: &mut OpenApi) {
        for (path, item) in &mut openapi.paths.paths {
            if let Some(request) = request(path)
                && let Some(RefOr::T(body)) =
                    changes(item).and_then(|operation| operation.request_body.as_mut())
            {
                set(body.content.values_mut(), &request);
            }
            if let Some(answer) = answer(path)
                && let Some(operation) = changes(item)
                && let Some(RefOr::T(response)) = operation.responses.responses.get_mut("200")
            {
                set(response.content.values_mut(), &answer);
            }
        }
    }
}

fn set<'a>(contents: impl Iterator<Item = &'a mut RefOr<Content>>, example: &Value) {
    for content in contents {
        if let RefOr::T(content) = content {
            content.example = Some(example.clone());
        }
    }
}

/// The operation of a path that takes a body.
fn changes(item: &mut PathItem) -> Option<&mut Operation> {
    item.post.as_mut().or(item.patch.as_mut()).or(item.put.as_mut())
}

fn request(path: &str) -> Option<Value> {
    let history = json!(["soft-baby-blanket-dogs", "bagged-green-tea-raspberry", "soft-night-light-circus"]);
    Some(match path {
        "/v1/recommend" => json!({
            "user_id": "ada", "history": history, "num_items": 3,
            "filters": {"exclude_seen": true, "require_tags": ["in_stock"]}
        }),
        "/v1/rank" => json!({
            "user_id": "ada", "history": history,
            "candidates": ["family-stamp-kit-music", "soft-night-light-music"]
        }),
        "/v1/warm" => json!({"user_id": "ada", "history": history}),
        "/v1/models/{name}/load" => json!({"directory": "2026-11-30", "label": "canary"}),
        "/v1/models/{name}/unload" | "/v1/models/{name}/labels/{label}" => json!({"version": "75b8b78f1f09"}),
        "/v1/models/{name}/catalog/rollback" => json!({"version": "e8fbe0b6d9ad6043"}),
        "/v1/models/{name}/catalog" => json!({
            "add": [{"item_id": "soft-night-light-stars", "sid": [40, 0, 22], "tags": ["in_stock"]}],
            "remove": ["family-stamp-kit-music"],
            "retag": [{"item_id": "soft-baby-blanket-dogs", "tags": ["dept:kids", "sold_out"]}]
        }),
        "/v2/models/{name}/infer" | "/v2/models/{name}/versions/{version}/infer" => json!({
            "inputs": [{"name": "request", "datatype": "BYTES", "shape": [1], "data": ["{\"history\": [], \"num_items\": 3}"]}]
        }),
        _ => return None,
    })
}

fn answer(path: &str) -> Option<Value> {
    let sha256 = "75b8b78f1f09264559714c90026f42e96555443fe4e4db8ff8e4281a09b6643b";
    let model = json!({"name": "default", "version": "75b8b78f1f09", "sha256": sha256, "weight_format": "f32", "kv_format": "f32"});
    let usage = json!({"context_tokens": 13, "cached_tokens": 0, "beam_width": 50, "steps": 3});
    let timings = json!({"queue": 0.09, "prefill": 1.0, "decode": 3.6, "total": 4.8});
    Some(match path {
        "/v1/recommend" => json!({
            "request_id": "7a5eee7f71b25729-00000000", "model": model, "catalog_version": "e8fbe0b6d9ad6043",
            "items": [{
                "item_id": "family-stamp-kit-music", "sid": [41, 5, 21], "score": -1.954_610_072_935_713_2, "rank": 1,
                "title": "Family stamp kit, music"
            }],
            "items_requested": 1, "items_returned": 1, "unknown_items": [], "unknown_tags": [],
            "unknown_filter_items": [], "dropped_history": 0, "degraded": null, "reason": null,
            "normalization": "full_vocab", "usage": usage, "timings_ms": timings
        }),
        "/v1/rank" => json!({
            "request_id": "7a5eee7f71b25729-00000001", "model": model, "catalog_version": "e8fbe0b6d9ad6043",
            "candidates": [{
                "item_id": "family-stamp-kit-music", "rank": 1, "score": -1.954_610_072_935_713_2,
                "predictions": {"log_probability": -1.954_610_072_935_713_2}
            }],
            "unknown_candidates": [], "unknown_items": [], "dropped_history": 0, "usage": usage, "timings_ms": timings
        }),
        "/v1/warm" => json!({
            "request_id": "7a5eee7f71b25729-00000002", "model": model, "unknown_items": [], "dropped_history": 0,
            "usage": usage, "timings_ms": timings
        }),
        _ => return None,
    })
}
