"""A directory of checkpoints to load over HTTP, made without any package: `ROOT/MODEL/a`, `ROOT/MODEL/b`, and one that must be
refused.

    decoder     the demo of this repository; b has its final norm halved, so the logits and every score differ
    retrieval   HSTU, research variant, head over all items
    tokens      HSTU, research variant with actions, head over the tokens of semantic IDs of three levels
    ranking     HSTU, dlrm variant: features of events, candidates and users, three tasks

Weights of HSTU models are random and follow from a seed; they are large enough that every part of the model matters to an
answer. Models a and b of a name have the same catalog, configuration and shapes, so they take the same memory. """

import array
import json
import math
import random
import shutil
import struct
import sys

DIM, LAYERS, HEADS, HEAD = 64, 4, 4, 16
ITEMS, EVENTS = 2_000, 200
LEVELS = [16, 16, 16]
TOKEN_ACTIONS, GENERATED_ACTION = 5, 0
EMBEDDING, OWNERS, USERS, COUNTRIES = 32, 100, 1_000, 20
ACTION_BITS = [1, 2, 4]
CANDIDATES = 512
TASKS = [("click", "binary"), ("like", "binary"), ("watch", "regression")]
TAGS = ["in_stock", "sale", "new"]
VERSIONS = ["a", "b"]
BROKEN = "broken"


def stack(research):
    """Constants of the layers: those of the research repository, or of its production model."""
    positions = EVENTS + 11
    return {
        "model_dim": DIM, "layers": LAYERS, "heads": HEADS, "key_dim": HEAD, "value_dim": HEAD,
        "input_norm": {"affine": not research, "eps": 1e-6}, "uvqk_bias": not research, "uvqk_layout": "in_out",
        "silu": "uvqk" if research else "u", "logit_scale": 1.0 if research else "inverse_sqrt_key_dim", "attention_divisor": positions,
        "relative_bias": {"positions": positions, "time_buckets": 128, "time_divisor": 0.301} if research else None,
        "mask": {"contextual_len": 0, "max_attention_len": 0, "min_full_attention_len": 0},
        "output_norm": {"kind": "layer", "affine": not research, "eps": 1e-6},
        "output_parts": "gated" if research else "concat_raw", "output_bias": research,
        "output_layout": "out_in" if research else "in_out", "residual": True,
    }  # fmt: skip


def research_config(items, most, actions, output):
    position = {"direction": "forward", "rows": EVENTS + 11, "scale": "sqrt_model_dim"}
    given = {"num_items": items, "padding_id": 0, "max_sequence_length": most, "position": position, "actions": actions}
    return {"model_type": "hstu", "hstu_variant": "research", "stack": stack(True), "input": given, "output": output}


def retrieval_config():
    output = {"normalization": {"kind": "l2", "eps": 1e-6}, "head": {"kind": "items", "eps": 1e-6}}
    return research_config(ITEMS, EVENTS, None, output)


def tokens_config():
    levels = [{"first_token": 1 + sum(LEVELS[:level]), "codes": codes} for level, codes in enumerate(LEVELS)]
    head = {"kind": "tokens", "vocab_size": 1 + sum(LEVELS), "tied": True, "logit_scale": 10.0, "semantic_id_levels": levels}
    actions = {"count": TOKEN_ACTIONS, "dim": DIM, "combine": "add", "generated": GENERATED_ACTION}
    most = EVENTS // len(LEVELS) * len(LEVELS)
    return research_config(sum(LEVELS), most, actions, {"normalization": {"kind": "l2", "eps": 1e-6}, "head": head})


def ranking_config():
    table = lambda name, rows, unknown: {"name": name, "rows": rows, "unknown_ids": unknown}  # noqa: E731
    return {
        "model_type": "hstu", "hstu_variant": "dlrm", "stack": stack(False),
        "input": {
            "embedding_dim": EMBEDDING,
            "tables": [table("video_id", ITEMS + 1, "refuse"), table("owner_id", OWNERS, "refuse"),
                       table("user_id", USERS, "clamp"), table("country", COUNTRIES, "refuse")],
            "features": [{"name": "video_id", "table": "video_id"}, {"name": "owner_id", "table": "owner_id"}],
            "contextual": [{"name": "user_id", "table": "user_id", "slots": 1, "min_tokens": 5},
                           {"name": "country", "table": "country", "slots": 2, "min_tokens": 0}],
            "action_weights": ACTION_BITS, "action_dim": 8, "hidden_dim": DIM, "norm_eps": 1e-5,
            "position": {"direction": "backward", "rows": 1_024, "scale": "sqrt_model_dim"},
            "time": {"rows": 513, "divisor": 60.0, "clamp": "rows"},
            "max_history": EVENTS, "max_candidates": CANDIDATES,
        },
        "output": {
            "postprocessor": {"kind": "timestamp_layer_norm", "periods": [[3600, 24], [86400, 7]], "cycle": 6.28, "eps": 1e-5},
            "item_tower": {"features": ["video_id", "owner_id"], "hidden_dim": DIM, "norm_eps": 1e-5},
            "prediction_hidden_dim": DIM, "prediction_norm_eps": 1e-5,
            "tasks": [{"name": name, "kind": kind} for name, kind in TASKS],
        },
    }  # fmt: skip


def expected(config):
    """Names of the tensors, with their shapes and the deviation of their values; a norm's weight lies about one, everything
    else about zero."""
    found, research = {}, config["hstu_variant"] == "research"
    values = HEADS * HEAD

    def add(name, *shape, deviation):
        found[name] = (list(shape), deviation)

    def norm(weight, bias, width):
        add(weight, width, deviation=0.2)
        add(bias, width, deviation=0.1)

    def mlp(prefix, inputs, hidden, outputs, normed=True):
        for number, (rows, columns) in ((0, (hidden, inputs)), (2, (outputs, hidden))):
            add(f"{prefix}.{number}.weight", rows, columns, deviation=1 / math.sqrt(columns))
            add(f"{prefix}.{number}.bias", rows, deviation=0.1)
        for number, width in ((1, hidden), (3, outputs))[: 1 + normed]:
            norm(f"{prefix}.{number}.weight", f"{prefix}.{number}.bias", width)

    for layer in range(LAYERS):
        prefix = f"_hstu._attention_layers.{layer}." if research else f"_hstu_transducer._stu_module._stu_layers.{layer}."
        if research:
            positions = config["stack"]["relative_bias"]["positions"]
            add(f"{prefix}_uvqk", DIM, 4 * values, deviation=1 / math.sqrt(DIM))
            add(f"{prefix}_o.weight", DIM, values, deviation=1 / math.sqrt(values))
            add(f"{prefix}_o.bias", DIM, deviation=0.1)
            add(f"{prefix}_rel_attn_bias._ts_w", 129, deviation=0.5)
            add(f"{prefix}_rel_attn_bias._pos_w", 2 * positions - 1, deviation=0.5)
            continue
        add(f"{prefix}_uvqk_weight", DIM, 4 * values, deviation=1 / math.sqrt(DIM))
        add(f"{prefix}_uvqk_beta", 4 * values, deviation=0.1)
        add(f"{prefix}_output_weight", 3 * values, DIM, deviation=1 / math.sqrt(3 * values))
        norm(f"{prefix}_input_norm_weight", f"{prefix}_input_norm_bias", DIM)
        norm(f"{prefix}_output_norm_weight", f"{prefix}_output_norm_bias", values)
    given = config["input"]
    if research:
        add("_embedding_module._item_emb.weight", given["num_items"] + 1, DIM, deviation=1 / math.sqrt(DIM))
        add("_input_features_preproc._pos_emb.weight", given["position"]["rows"], DIM, deviation=0.2)
        if given["actions"]:
            add("_embedding_module._action_emb.weight", given["actions"]["count"], DIM, deviation=1 / math.sqrt(DIM))
        return found
    for table in given["tables"]:
        add(f"_embedding_collection.embeddings.{table['name']}.weight", table["rows"], EMBEDDING, deviation=1.0)
    entry, bits = "_hstu_transducer._input_preprocessor.", len(ACTION_BITS) * given["action_dim"]
    mlp(f"{entry}_content_embedding_mlp", EMBEDDING, given["hidden_dim"], DIM)
    mlp(f"{entry}_additional_embedding_mlp", (len(given["features"]) - 1) * EMBEDDING, given["hidden_dim"], DIM)
    mlp(f"{entry}_action_embedding_mlp", bits, given["hidden_dim"], DIM)
    add(f"{entry}_action_encoder._action_embedding_table", len(ACTION_BITS), given["action_dim"], deviation=0.5)
    add(f"{entry}_action_encoder._target_action_embedding_table", 1, bits, deviation=0.5)
    slots = sum(feature["slots"] for feature in given["contextual"])
    add(f"{entry}_batched_contextual_linear_weights", slots, EMBEDDING, DIM, deviation=1 / math.sqrt(EMBEDDING))
    add(f"{entry}_batched_contextual_linear_bias", slots, DIM, deviation=0.1)
    add("_hstu_transducer._positional_encoder._position_embeddings_weight", given["position"]["rows"], DIM, deviation=0.2)
    add("_hstu_transducer._positional_encoder._timestamp_embeddings_weight", given["time"]["rows"], DIM, deviation=0.2)
    leave = "_hstu_transducer._output_postprocessor."
    wide = DIM + 2 * len(config["output"]["postprocessor"]["periods"])
    add(f"{leave}_time_feature_combiner.weight", DIM, wide, deviation=1 / math.sqrt(wide))
    add(f"{leave}_time_feature_combiner.bias", DIM, deviation=0.1)
    norm(f"{leave}_layer_norm.weight", f"{leave}_layer_norm.bias", DIM)
    mlp(
        "_item_embedding_mlp",
        len(config["output"]["item_tower"]["features"]) * EMBEDDING,
        config["output"]["item_tower"]["hidden_dim"],
        DIM,
    )
    mlp("_multitask_module._prediction_module", DIM, config["output"]["prediction_hidden_dim"], len(TASKS), normed=False)
    return found


def random_tensors(config, seed):
    rng, found = random.Random(seed), {}
    for name, (shape, deviation) in sorted(expected(config).items()):
        about = 1.0 if len(shape) == 1 and name.endswith("weight") else 0.0
        found[name] = (shape, array.array("f", (rng.gauss(about, deviation) for _ in range(math.prod(shape)))))
    return found


def write_safetensors(path, tensors):
    """Single precision, in the order of the names: length of the header, header, values."""
    header, end = {}, 0
    for name, (shape, values) in tensors.items():
        start, end = end, end + 4 * len(values)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, values in tensors.values():
            if sys.byteorder == "big":
                values = array.array("f", values)
                values.byteswap()
            file.write(values.tobytes())


def halve(path, name):
    """Divides a bf16 tensor of a file by two: one off every exponent."""
    data = bytearray(path.read_bytes())
    (length,) = struct.unpack_from("<Q", data)
    entry = json.loads(data[8 : 8 + length])[name]
    if entry["dtype"] != "BF16":
        raise SystemExit(f"{name} of the demo checkpoint is {entry['dtype']}, expected BF16")
    start, end = (8 + length + offset for offset in entry["data_offsets"])
    for at in range(start, end, 2):
        (bits,) = struct.unpack_from("<H", data, at)
        struct.pack_into("<H", data, at, bits - (1 << 7) if bits >> 7 & 0xFF else bits)
    path.write_bytes(data)


def made_items(model, rng):
    """Items of an HSTU model: rows of its table, or paths, some of them shared."""
    items, tags = [], lambda: sorted(tag for tag in TAGS if rng.random() < 0.6)
    for number in range(1, ITEMS + 1):
        sid = [number] if model != "tokens" else [rng.randrange(codes) for codes in LEVELS]
        items.append({"item_id": f"{model[0]}{number}", "sid": sid, "tags": tags()})
    return items


def write_root(root, demo, seed):
    """Writes all checkpoints; returns the items by model."""
    items = {}
    for version in VERSIONS:
        shutil.copytree(demo, root / "decoder" / version)
    halve(root / "decoder" / "b" / "model.safetensors", "model.norm.weight")
    with open(demo / "catalog.jsonl", encoding="utf-8") as file:
        items["decoder"] = [json.loads(line) for line in file]
    configs = {"retrieval": retrieval_config(), "tokens": tokens_config(), "ranking": ranking_config()}
    for model, config in configs.items():
        items[model] = made_items(model, random.Random(f"{seed} items of {model}"))
        for version in VERSIONS:
            write_hstu(root / model / version, config, random_tensors(config, f"{seed} {model} {version}"), items[model])
    tensors = random_tensors(configs["retrieval"], seed)
    tensors.pop("_input_features_preproc._pos_emb.weight")
    write_hstu(root / "retrieval" / BROKEN, configs["retrieval"], tensors, items["retrieval"])
    return items


def write_hstu(directory, config, tensors, items):
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    write_safetensors(directory / "model.safetensors", tensors)
    (directory / "catalog.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
