"""The forward pass of HSTU in double precision, written a second time: plain numpy, one user at a time, no cache, no tricks.

Place in the flow: `check.py` runs it on a converted directory. It reads config.json and the safetensors files and nothing else,
so a wrong constant or a wrongly laid out tensor shows. Every constant is the configuration's; what is implemented for one value
only is refused. What must not be here: the files it is compared with.

    u, v, q, k = split(norm(x) W (+ b)), SiLU on all, on u, or on none
    a          = mask * silu(q.k * logit_scale + bias) / divisor  @ v
    x          = (x +) parts(u, a, norm(a)) Wo (+ bo)
"""

import glob
import json
import math
import os

import numpy as np
from safetensors import safe_open

# The smallest difference of each time bucket from 1 on: clamp(trunc(ln(max(|d|, 1)) / 0.301), 0, ..) in single precision, as
# the reference steps. Two single-precision logarithms disagree at isolated differences, so the steps are written down.
BUCKET_STARTS = np.array(
    """2 2 3 4 5 7 9 12 16 21 28 38 51 68 92 124 167 226 305 412 557 752 1016 1372 1854 2505 3385 4574 6180 8350 11283 15245 20600 27834
    37610 50818 68666 92782 125367 169397 228891 309280 417901 564672 762990 1030959 1393042 1882290 2543367 3436623 4643595 6274467 8478123
    11455710 15479070 20915478 28261151 38186755 51598331 69720053 94206437 127292700 171999177 232406601 314030161 424319920 573345376 774710112
    1046794145 1414438848 1911204161 2582433664 3489410432 4714926848 6370844929 8608349696 11631690241 15716857344 21236737025""".split(),
    dtype=np.int64,
)
LARGEST_DIFFERENCE = 28_000_000_000

PREFIX = {
    "research": "_hstu._attention_layers.",
    "dlrm": "_hstu_transducer._stu_module._stu_layers.",
    "nvidia": "_hstu_block._attention_layers.",
}
PREPROCESSOR = "_hstu_transducer._input_preprocessor."
ENCODER = "_hstu_transducer._positional_encoder."
POSTPROCESSOR = "_hstu_transducer._output_postprocessor."
DLRM_TABLES = "_embedding_collection.embeddings."
NVIDIA_TABLES = "_embedding_collection._data_parallel_embedding_collection.embeddings."
NVIDIA_POSITIONS = "_hstu_block._preprocessor._positional_encoder._position_embeddings_weight"


def layer_norm(x, eps, weight=None, bias=None):
    centred = x - x.mean(-1, keepdims=True)
    y = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    return y if weight is None else y * weight + bias


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def unit(x, eps):
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), eps)


def time_bucket(difference, highest):
    magnitude = np.abs(difference)
    if magnitude.size and magnitude.max() > LARGEST_DIFFERENCE:
        raise SystemExit("time differences beyond 28e9: not in this check's table")
    return np.minimum(np.searchsorted(BUCKET_STARTS, magnitude, side="right"), highest)


def mask(length, targets, config):
    """Who sees whom, [rows, columns]; the last `targets` rows are candidates."""
    contextual, window, full = config["contextual_len"], config["max_attention_len"], config["min_full_attention_len"]
    ids, most = np.arange(length), length
    if contextual:
        ids, most = np.maximum(ids - contextual + 1, 0), length - contextual + 1
    most -= targets
    ids = np.minimum(ids, most)
    distance = ids[:, None] - ids[None, :]
    seen = np.eye(length, dtype=bool) | (distance > 0)
    if window:
        seen &= (distance <= window) | ((full > 0) & (ids[:, None] >= most - full))
    if contextual:
        seen |= (ids[:, None] == 0) & (ids[None, :] < most)
    return seen


class Model:
    """A converted directory."""

    def __init__(self, directory):
        with open(os.path.join(directory, "config.json"), encoding="utf-8") as file:
            self.config = json.load(file)
        self.variant, self.stack = self.config["hstu_variant"], self.config["stack"]
        self.input, self.output = self.config["input"], self.config["output"]
        self.files = {}
        for path in glob.glob(os.path.join(directory, "*.safetensors")):
            opened = safe_open(path, "pt")
            self.files.update({name: opened for name in opened.keys()})

    def rows(self, name, ids):
        """Some rows of a table, so that a large one need not be widened."""
        return self.files[name].get_tensor(name)[np.asarray(ids, dtype=np.int64)].double().numpy()

    def of(self, name):
        return self.files[name].get_tensor(name).double().numpy()

    def scale(self, value):
        if value == "sqrt_model_dim":
            return math.sqrt(self.stack["model_dim"])
        return 1 / math.sqrt(self.stack["key_dim"]) if value == "inverse_sqrt_key_dim" else float(value)

    def names(self):
        if self.variant == "research":
            return {"uvqk": "_uvqk", "output": "_o.weight", "output_bias": "_o.bias"}
        if self.variant == "dlrm":
            names = {"uvqk": "_uvqk_weight", "uvqk_bias": "_uvqk_beta", "output": "_output_weight"}
            return {**names, "input_norm": "_input_norm_", "output_norm": "_output_norm_"}
        mark = "_" if self.stack["uvqk_layout"] == "in_out" else "."
        names = {
            "uvqk": f"_linear_uvqk{mark}weight",
            "uvqk_bias": f"_linear_uvqk{mark}bias",
            "output": f"_linear_proj{mark}weight",
        }
        return {**names, "input_norm": "_input_layernorm_", "output_norm": "_output_layernorm_"}

    def relative_bias(self, layer, times):
        """[n, n] from the times of n rows and of the query; row i uses the time of event i + 1."""
        bias, n = self.stack["relative_bias"], len(times) - 1
        if bias["time_divisor"] != 0.301:
            raise SystemExit("this check has the time buckets of the divisor 0.301 only")
        prefix = f"{PREFIX[self.variant]}{layer}._rel_attn_bias."
        rows, columns = np.arange(n)[:, None], np.arange(n)[None, :]
        positions = np.clip(bias["positions"] - 1 + columns - rows, 0, 2 * bias["positions"] - 2)
        buckets = time_bucket(times[1:, None] - times[None, :-1], bias["time_buckets"])
        return self.of(prefix + "_pos_w")[positions] + self.of(prefix + "_ts_w")[buckets]

    def layers(self, x, targets, times=None):
        """The rows of one user after each layer."""
        stack, names, n = self.stack, self.names(), len(x)
        heads, values, keys = stack["heads"], stack["heads"] * stack["value_dim"], stack["heads"] * stack["key_dim"]
        seen, after = mask(n, targets, stack["mask"]), []
        for layer in range(stack["layers"]):
            prefix = f"{PREFIX[self.variant]}{layer}."

            def of(name):
                return self.of(prefix + names[name])

            def affine(name):
                return [self.of(prefix + names[name] + part) for part in ("weight", "bias")] if stack[name]["affine"] else []

            weight = of("uvqk") if stack["uvqk_layout"] == "in_out" else of("uvqk").T
            z = layer_norm(x, stack["input_norm"]["eps"], *affine("input_norm")) @ weight
            if stack["uvqk_bias"]:
                z = z + of("uvqk_bias")
            silu_columns = {"uvqk": z.shape[1], "u": values, "none": 0}[stack["silu"]]
            z[:, :silu_columns] = silu(z[:, :silu_columns])
            u, v, q, k = np.split(z, np.cumsum([values, values, keys]), axis=1)
            v, q, k = (part.reshape(n, heads, -1) for part in (v, q, k))
            logits = np.einsum("ihd,jhd->hij", q, k) * self.scale(stack["logit_scale"])
            if stack["relative_bias"]:
                logits = logits + self.relative_bias(layer, times)
            weights = silu(logits) / stack["attention_divisor"] * seen
            a = np.einsum("hij,jhd->ihd", weights, v)
            eps, norm = stack["output_norm"]["eps"], affine("output_norm")
            if stack["output_norm"]["kind"] == "group":
                g = layer_norm(a, eps, *(part[:, None] for part in norm)).reshape(n, values)
            else:
                g = layer_norm(a.reshape(n, values), eps, *norm)
            a = a.reshape(n, values)
            y = {"gated": [u * g], "concat_raw": [u, a, u * g], "concat_normed": [u, g, u * g]}[stack["output_parts"]]
            weight = of("output") if stack["output_layout"] == "in_out" else of("output").T
            y = np.concatenate(y, axis=1) @ weight
            if stack["output_bias"]:
                y = y + of("output_bias")
            x = x + y if stack["residual"] else y
            after.append(x)
        return after

    def normalized(self, x, normalization):
        kind = normalization["kind"]
        return x if kind == "none" else unit(x, normalization["eps"]) if kind == "l2" else layer_norm(x, normalization["eps"])

    # Research.

    def research_rows(self, items, actions=None):
        known = self.input["actions"]
        if known is not None and (actions is None or known["combine"] != "add"):
            raise SystemExit("of actions of the research variant this check has added ones only, and they must be given")
        items = np.asarray(items)
        x = self.rows("_embedding_module._item_emb.weight", items)
        if known is not None:
            x = x + self.rows("_embedding_module._action_emb.weight", actions)
        x = x * self.scale(self.input["position"]["scale"])
        x = x + self.of("_input_features_preproc._pos_emb.weight")[: len(items)]
        return x * (items != self.input["padding_id"])[:, None]

    def items(self):
        """Vectors of all items, from 1 on."""
        return unit(self.of("_embedding_module._item_emb.weight")[1:], self.output["head"]["eps"])

    # Production.

    def swish_mlp(self, prefix, x, eps):
        of = lambda name: self.of(f"{prefix}.{name}")  # noqa: E731
        h = x @ of("0.weight").T + of("0.bias")
        h = h * sigmoid(layer_norm(h, eps, of("1.weight"), of("1.bias")))
        y = h @ of("2.weight").T + of("2.bias")
        return layer_norm(y, eps, of("3.weight"), of("3.bias")) if f"{prefix}.3.weight" in self.files else y

    def table(self, name, ids):
        table = next(table for table in self.input["tables"] if table["name"] == name)
        prefix = DLRM_TABLES if self.variant == "dlrm" else NVIDIA_TABLES
        ids = np.asarray(ids, dtype=np.int64)
        if table["unknown_ids"] == "clamp":
            ids = np.minimum(ids, table["rows"] - 1)
        return self.rows(f"{prefix}{name}.weight", ids)

    def dlrm_rows(self, features, actions, times, contextual, candidates):
        """Rows of one user: `features` by name over history and candidates, `actions` of the history, `times` of both,
        `contextual` values by name. Returns (before position and time, after)."""
        config, eps = self.input, self.input["norm_eps"]
        count = len(times)
        embedded = [self.table(feature["table"], features[feature["name"]]) for feature in config["features"]]
        x = self.swish_mlp(PREPROCESSOR + "_content_embedding_mlp", embedded[0], eps)
        others = np.concatenate(embedded[1:], axis=1) if embedded[1:] else np.zeros((count, 0))
        x = x + self.swish_mlp(PREPROCESSOR + "_additional_embedding_mlp", others, eps)
        table = self.of(PREPROCESSOR + "_action_encoder._action_embedding_table")
        bits = (np.asarray(actions)[:, None] & np.array(config["action_weights"])) > 0
        done = (bits[:, :, None] * table).reshape(len(actions), -1)
        target = self.of(PREPROCESSOR + "_action_encoder._target_action_embedding_table").reshape(1, -1)
        x = x + self.swish_mlp(PREPROCESSOR + "_action_embedding_mlp", np.concatenate([done, target.repeat(candidates, 0)]), eps)
        slots = []
        for feature in config["contextual"]:
            values = contextual[feature["name"]][: feature["slots"]] if count >= feature["min_tokens"] else []
            rows = np.zeros((feature["slots"], config["embedding_dim"]))
            if len(values):
                rows[: len(values)] = self.table(feature["table"], values)
            slots.append(rows)
        if slots:
            weight, bias = (self.of(PREPROCESSOR + f"_batched_contextual_linear_{part}") for part in ("weights", "bias"))
            x = np.concatenate([np.einsum("se,sed->sd", np.concatenate(slots), weight) + bias, x])
        size = len(x) - count
        before, n = x, len(x)
        high, index = n - candidates, np.arange(n)
        position = np.minimum(high - np.minimum(index, high) + size, config["position"]["rows"] - 1)
        position[:size] = index[:size]
        times = np.concatenate([np.zeros(size, dtype=np.int64), times])
        age = np.maximum((times[-1] - times).astype(np.float32), np.float32(1e-6))
        highest = config["time"]["rows"] - 1 if config["time"]["clamp"] == "rows" else self.stack["model_dim"] - 1
        bucket = np.clip(np.sqrt(age / np.float32(config["time"]["divisor"])).astype(np.int64), 0, highest)
        x = x * self.scale(config["position"]["scale"]) + self.of(ENCODER + "_position_embeddings_weight")[position]
        return before, x + self.of(ENCODER + "_timestamp_embeddings_weight")[bucket]

    def dlrm_users(self, states, times):
        post = self.output["postprocessor"]
        of = lambda name: self.of(POSTPROCESSOR + name)  # noqa: E731
        norm = lambda x: layer_norm(x, post["eps"], of("_layer_norm.weight"), of("_layer_norm.bias"))  # noqa: E731
        if post["kind"] == "l2":
            return unit(states, post["eps"])
        if post["kind"] == "layer_norm":
            return norm(states)
        seconds, parts = np.asarray(times).astype(np.float32), []
        for period, units in post["periods"]:
            part = np.mod(np.floor(seconds / np.float32(period)), np.float32(units))
            angle = (part / np.float32(units) * np.float32(post["cycle"])).astype(np.float64)
            parts += [np.cos(angle), np.sin(angle)]
        x = np.concatenate([states, np.stack(parts, axis=1)], axis=1)
        return norm(x @ of("_time_feature_combiner.weight").T + of("_time_feature_combiner.bias"))

    def dlrm_items(self, features):
        tower, tables = self.output["item_tower"], {feature["name"]: feature["table"] for feature in self.input["features"]}
        x = np.concatenate([self.table(tables[name], features[name]) for name in tower["features"]], axis=1)
        return self.swish_mlp("_item_embedding_mlp", x, tower["norm_eps"])

    def dlrm_predictions(self, users, items):
        y = self.swish_mlp("_multitask_module._prediction_module", users * items, self.output["prediction_norm_eps"])
        binary = np.array([task["kind"] == "binary" for task in self.output["tasks"]])
        return np.where(binary, sigmoid(y), y)

    # NVIDIA.

    def nvidia_rows(self, contextual, items, actions, candidates):
        config = self.input
        rows = [self.table(feature["table"], contextual[feature["name"]]) for feature in config["contextual"]]
        history = self.table(config["item_table"], items)
        if config["action_table"] is not None:
            history = np.stack([history, self.table(config["action_table"], actions)], axis=1).reshape(-1, history.shape[1])
        rows += [history, self.table(config["item_table"], candidates)]
        x = np.concatenate(rows)
        position = np.minimum(np.arange(len(x)), min(len(x) - len(candidates), config["position"]["rows"] - 1))
        return x * self.scale(config["position"]["scale"]) + self.of(NVIDIA_POSITIONS)[position]

    def nvidia_logits(self, states):
        x = self.normalized(states, self.output["normalization"])
        erf = np.vectorize(math.erf, otypes=[float])
        for layer in range(len(self.output["head"])):
            if layer:
                x = np.maximum(x, 0) if self.output["activation"] == "relu" else x * 0.5 * (1 + erf(x / math.sqrt(2)))
            x = x @ self.of(f"_mlp._mlp.{2 * layer}.weight").T
            if self.output["head_bias"]:
                x = x + self.of(f"_mlp._mlp.{2 * layer}.bias")
        return x

    def nvidia_predictions(self, logits):
        if self.output["prediction"] == "sigmoid":
            return sigmoid(logits)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        return weights / weights.sum(-1, keepdims=True)
