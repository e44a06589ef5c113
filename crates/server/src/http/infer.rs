//! Inference of the Open Inference Protocol: a request for items and its answer, as JSON text in
//! tensors of one element.
//!
//! ```text
//! in    request  BYTES [1]   the body of a POST /v1/recommend
//! out   answer   BYTES [1]   its answer
//! ```
//!
//! A tensor is in the JSON, or behind it (a binary tensor of the protocol). In that case the header
//! `inference-header-content-length` says where the JSON ends.

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Extension, Path, Request, State};
use axum::http::{HeaderMap, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Value, json};

use super::middleware::RequestId;
use super::models::component;
use super::{SharedApp, body, handlers};
use crate::api::{self, RecommendRequest, RecommendResponse};
use crate::error::Error;

/// Name of the only input.
pub(super) const INPUT: &str = "request";
/// Name of the only output.
pub(super) const OUTPUT: &str = "answer";
const JSON_LENGTH: &str = "inference-header-content-length";
/// Size of the length that begins a binary element, in bytes.
const LENGTH_BYTES: usize = 4;

/// The body of an inference request. Fields without a meaning here are ignored, as the protocol
/// asks.
#[derive(Debug, Deserialize)]
struct Inference {
    #[serde(default)]
    id: Option<String>,
    #[serde(default)]
    parameters: BinaryOutput,
    inputs: Vec<Tensor>,
    #[serde(default)]
    outputs: Option<Vec<Requested>>,
}

#[derive(Debug, Deserialize)]
struct Tensor {
    name: String,
    datatype: String,
    shape: Vec<u64>,
    #[serde(default)]
    parameters: BinaryInput,
    #[serde(default)]
    data: Value,
}

#[derive(Debug, Default, Deserialize)]
struct BinaryInput {
    #[serde(default)]
    binary_data_size: Option<usize>,
}

/// The wanted form of all outputs.
#[derive(Debug, Default, Deserialize)]
struct BinaryOutput {
    #[serde(default)]
    binary_data_output: bool,
}

#[derive(Debug, Deserialize)]
struct Requested {
    name: String,
    #[serde(default)]
    parameters: RequestedBinary,
}

#[derive(Debug, Default, Deserialize)]
struct RequestedBinary {
    #[serde(default)]
    binary_data: bool,
}

/// Recommend items: the request as JSON text in the input `request`, its answer as JSON text in the
/// output `answer`.
#[utoipa::path(
    post, path = "/v2/models/{name}/infer", tag = "open inference protocol", operation_id = "protocol_infer",
    params(("name" = String, Path, description = "The model, `name@label` or `name@version`.")),
    request_body(
        content = Value,
        example = json!({"inputs": [{"name": "request", "datatype": "BYTES", "shape": [1], "data": ["{\"history\": []}"]}]})
    ),
    responses((status = 200, description = "The answer as JSON text in a BYTES tensor."))
)]
pub async fn infer(
    State(app): State<SharedApp>,
    Extension(RequestId(id)): Extension<RequestId>,
    path: Result<Path<String>, PathRejection>,
    headers: HeaderMap,
    request: Request,
) -> Result<Response, Error> {
    answer(&app, id, component(path)?, &headers, request).await
}

/// Like the same request without a version.
#[utoipa::path(
    post, path = "/v2/models/{name}/versions/{version}/infer", tag = "open inference protocol",
    operation_id = "protocol_infer_version",
    params(
        ("name" = String, Path, description = "The model."),
        ("version" = String, Path, description = "The version, or a label."),
    ),
    request_body(content = Value),
    responses((status = 200, description = "The answer as JSON text in a BYTES tensor."))
)]
pub async fn infer_version(
    State(app): State<SharedApp>,
    Extension(RequestId(id)): Extension<RequestId>,
    path: Result<Path<(String, String)>, PathRejection>,
    headers: HeaderMap,
    request: Request,
) -> Result<Response, Error> {
    let (name, version) = component(path)?;
    answer(&app, id, format!("{name}@{version}"), &headers, request).await
}

async fn answer(
    app: &SharedApp,
    request_id: String,
    model: String,
    headers: &HeaderMap,
    request: Request,
) -> Result<Response, Error> {
    app.registry()?;
    let json_length = json_length(headers)?;
    let body::Received { bytes, held: _held } = body::read_any(app, request).await?;
    let _place = app.take_place()?;
    let (json, binary) = split(&bytes, json_length)?;
    let inference: Inference = api::parse(json)?;
    let is_binary = wants_binary(&inference)?;
    let mut request: RecommendRequest = api::parse(&element(&inference.inputs, binary)?)?;
    if request.model.replace(model).is_some() {
        return Err(refuse("model", "the model is in the path; leave it out of the request"));
    }
    let answer = handlers::answer(app, request, request_id).await?;
    write(inference.id, &answer, is_binary)
}

fn refuse(param: &str, message: &str) -> Error {
    Error::InvalidRequest { message: format!("`{param}`: {message}"), param: Some(param.to_owned()) }
}

fn json_length(headers: &HeaderMap) -> Result<Option<usize>, Error> {
    let Some(value) = headers.get(JSON_LENGTH) else { return Ok(None) };
    let length = value.to_str().ok().and_then(|value| value.parse().ok());
    length.map(Some).ok_or_else(|| refuse(JSON_LENGTH, "give the bytes of the JSON as a whole number"))
}

/// Splits the body into the JSON and the binary data behind it.
fn split(body: &[u8], json_length: Option<usize>) -> Result<(&[u8], &[u8]), Error> {
    body.split_at_checked(json_length.unwrap_or(body.len()))
        .ok_or_else(|| refuse(JSON_LENGTH, "is longer than the body"))
}

/// Whether the client wants the answer behind the JSON.
fn wants_binary(inference: &Inference) -> Result<bool, Error> {
    match inference.outputs.as_deref() {
        None | Some([]) => Ok(inference.parameters.binary_data_output),
        Some([Requested { name, parameters }]) if name == OUTPUT => Ok(parameters.binary_data),
        Some(_) => Err(refuse("outputs", "there is one output, `answer`")),
    }
}

/// The only element of the only input.
fn element(inputs: &[Tensor], binary: &[u8]) -> Result<Vec<u8>, Error> {
    let [Tensor { name, datatype, shape, parameters, data }] = inputs else {
        return Err(refuse("inputs", "give one input, `request`"));
    };
    if name != INPUT || datatype != "BYTES" || shape.iter().any(|length| *length != 1) {
        return Err(refuse("inputs", "give one input, `request`, of datatype BYTES and shape [1]"));
    }
    let Some(size) = parameters.binary_data_size else { return text(data) };
    let bytes = binary.get(..size).ok_or_else(|| refuse("binary_data_size", "is more than was sent"))?;
    let too_short = || refuse("binary_data_size", "an element is its length in four bytes, and its bytes");
    let (length, bytes) = bytes.split_first_chunk::<LENGTH_BYTES>().ok_or_else(too_short)?;
    match u32::from_le_bytes(*length) as usize == bytes.len() {
        true => Ok(bytes.to_vec()),
        false => Err(too_short()),
    }
}

/// The only text in a nested list.
fn text(data: &Value) -> Result<Vec<u8>, Error> {
    match data {
        Value::String(text) => Ok(text.clone().into_bytes()),
        Value::Array(one) if one.len() == 1 => text(&one[0]),
        _ => Err(refuse("data", "give the JSON of one request as text")),
    }
}

fn write(id: Option<String>, answer: &RecommendResponse, is_binary: bool) -> Result<Response, Error> {
    let text = serde_json::to_string(answer).map_err(Error::internal)?;
    let mut output = json!({"name": OUTPUT, "datatype": "BYTES", "shape": [1]});
    if is_binary {
        output["parameters"] = json!({"binary_data_size": LENGTH_BYTES + text.len()});
    } else {
        output["data"] = json!([text]);
    }
    let model = &answer.model;
    let mut body = json!({"model_name": model.name, "model_version": model.version, "outputs": [output]});
    if let Some(id) = id {
        body["id"] = id.into();
    }
    if !is_binary {
        return Ok(Json(body).into_response());
    }
    let mut bytes = serde_json::to_vec(&body).map_err(Error::internal)?;
    let json_length = bytes.len();
    let length = u32::try_from(text.len()).map_err(Error::internal)?;
    bytes.extend_from_slice(&length.to_le_bytes());
    bytes.extend_from_slice(text.as_bytes());
    let mut response = bytes.into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    headers.insert(JSON_LENGTH, HeaderValue::from(json_length));
    Ok(response)
}
