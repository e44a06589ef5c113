"""HSTU over HTTP against the same model in PyTorch, on this machine, in one run, with two threads each.

    python bench/hstu.py --binary target/release/beamline --out bench/results/hstu

Needs PyTorch, numpy and safetensors. Makes two random checkpoints, starts `beamline serve` on each, and measures

- retrieval (research variant): a user of 200 or 2,000 events, and the same user's next visit with 5 new events;
- ranking (NVIDIA's variant): 256, 1,024 or 4,096 candidates after 1,024 events, and the next visit with 5 new events.

A *cold* visit is one of a tenant that was never seen, a *warm* one is the next visit of a tenant that was; every answer's
`cached_tokens` is checked, and the run fails where a visit is not what it is called. It fails as well when the two sides
do not compute the same: the ten items, scores and predictions within 1e-4.

Beamline's times are the client's: HTTP, JSON, looking up item ids. PyTorch's begin with tensors of row numbers and end
with the scores of the answer, so everything around the model is left out. PyTorch is measured in several ways and the
fastest of each case counts:

- `plain`: the whole mask at once, precomputed. Ranking is one pass over history and candidates with the target mask.
- `tuned`: causal attention in blocks of rows that stop at the diagonal, candidates in micro-batches against the keys and
  values of the history, the last layer only for rows that are asked for.
- `compiled`: `tuned`, with what lies between the products fused by `torch.compile`.
- `cached`: as the best of the last two, with keys and values of the returning user kept in tensors of this one user.
"""
import argparse
import contextlib
import http.client
import json
import math
import os
import pathlib
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F

WIDTH, LAYERS, HEADS, HEAD = 256, 4, 4, 64
VALUES = HEADS * HEAD
ITEMS, LONGEST, TASKS, ACTIONS = 20_000, 2_048, 8, 8
POSITIONS = LONGEST + 11
DIVISOR = {"research": POSITIONS, "nvidia": 2 * LONGEST}
NEW_EVENTS, TOP = 5, 10
HISTORIES, RANK_HISTORY, CANDIDATES = (200, 2_000), 1_024, (256, 1_024, 4_096)
PAGE = 32
TOLERANCE = 1e-4
TARGETS = {"warm": 5.0, "cold": 2.0}


def say(text):
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


# Checkpoints ----------------------------------------------------------------------------------------------------------


def stack_config(variant):
    research = variant == "research"
    return {
        "model_dim": WIDTH, "layers": LAYERS, "heads": HEADS, "key_dim": HEAD, "value_dim": HEAD,
        "input_norm": {"affine": not research, "eps": 1e-6 if research else 1e-5},
        "uvqk_bias": not research, "uvqk_layout": "in_out", "silu": "uvqk",
        "logit_scale": 1.0 if research else "inverse_sqrt_key_dim", "attention_divisor": DIVISOR[variant],
        "relative_bias": {"positions": POSITIONS, "time_buckets": 128, "time_divisor": 0.301} if research else None,
        "mask": {"contextual_len": 0, "max_attention_len": 0, "min_full_attention_len": 0},
        "output_norm": {"kind": "layer", "affine": not research, "eps": 1e-6 if research else 1e-5},
        "output_parts": "gated", "output_bias": research,
        "output_layout": "out_in" if research else "in_out", "residual": True,
    }


def research_config():
    return {
        "model_type": "hstu", "hstu_variant": "research", "stack": stack_config("research"),
        "input": {
            "num_items": ITEMS, "padding_id": 0, "max_sequence_length": LONGEST,
            "position": {"direction": "forward", "rows": POSITIONS, "scale": "sqrt_model_dim"}, "actions": None,
        },
        "output": {"normalization": {"kind": "l2", "eps": 1e-6}, "head": {"kind": "items", "eps": 1e-6}},
    }


def nvidia_config():
    return {
        "model_type": "hstu", "hstu_variant": "nvidia", "stack": stack_config("nvidia"),
        "input": {
            "tables": [
                {"name": "item", "rows": ITEMS + 1, "unknown_ids": "refuse"},
                {"name": "action", "rows": ACTIONS, "unknown_ids": "refuse"},
            ],
            "item_table": "item", "action_table": "action", "contextual": [],
            "position": {"direction": "forward", "rows": 2 * LONGEST + 1, "scale": "sqrt_model_dim"},
            "preprocessing_mlp": None, "time_encoding": False,
            "max_history": LONGEST, "max_candidates": CANDIDATES[-1],
        },
        "output": {
            "normalization": {"kind": "l2", "eps": 1e-6}, "head": [512, TASKS], "head_bias": True,
            "activation": "relu", "prediction": "sigmoid", "tasks": [f"task{task}" for task in range(TASKS)],
        },
    }


def tensors(variant):
    """Random weights, of a size at which every part of the model matters to the result."""
    make = torch.Generator().manual_seed(1 if variant == "research" else 2)

    def normal(*shape, scale):
        return torch.randn(*shape, generator=make) * scale

    found = {}
    if variant == "research":
        found["_embedding_module._item_emb.weight"] = normal(ITEMS + 1, WIDTH, scale=1 / 16)
        found["_input_features_preproc._pos_emb.weight"] = normal(POSITIONS, WIDTH, scale=0.2)
    else:
        tables = "_embedding_collection._data_parallel_embedding_collection.embeddings."
        found[f"{tables}item.weight"] = normal(ITEMS + 1, WIDTH, scale=1 / 16)
        found[f"{tables}action.weight"] = normal(ACTIONS, WIDTH, scale=1 / 16)
        positions = "_hstu_block._preprocessor._positional_encoder._position_embeddings_weight"
        found[positions] = normal(2 * LONGEST + 1, WIDTH, scale=0.2)
        found["_mlp._mlp.0.weight"], found["_mlp._mlp.0.bias"] = normal(512, WIDTH, scale=1.0), normal(512, scale=0.1)
        found["_mlp._mlp.2.weight"] = normal(TASKS, 512, scale=1 / 12)
        found["_mlp._mlp.2.bias"] = normal(TASKS, scale=0.1)
    for layer in range(LAYERS):
        matrix = normal(WIDTH, 4 * VALUES, scale=1 / 16)
        if variant == "research":
            prefix = f"_hstu._attention_layers.{layer}."
            found[f"{prefix}_uvqk"] = matrix
            found[f"{prefix}_o.weight"] = normal(WIDTH, VALUES, scale=1 / 16)
            found[f"{prefix}_o.bias"] = normal(WIDTH, scale=0.1)
            found[f"{prefix}_rel_attn_bias._ts_w"] = normal(129, scale=0.5)
            found[f"{prefix}_rel_attn_bias._pos_w"] = normal(2 * POSITIONS - 1, scale=0.5)
            continue
        prefix = f"_hstu_block._attention_layers.{layer}."
        found[f"{prefix}_linear_uvqk_weight"] = matrix
        found[f"{prefix}_linear_uvqk_bias"] = normal(4 * VALUES, scale=0.1)
        found[f"{prefix}_linear_proj_weight"] = normal(VALUES, WIDTH, scale=1 / 16)
        for norm, width in (("input", WIDTH), ("output", VALUES)):
            found[f"{prefix}_{norm}_layernorm_weight"] = 1 + normal(width, scale=0.2)
            found[f"{prefix}_{norm}_layernorm_bias"] = normal(width, scale=0.1)
    return found


def write_checkpoint(directory, variant):
    directory.mkdir(parents=True, exist_ok=True)
    config = research_config() if variant == "research" else nvidia_config()
    (directory / "config.json").write_text(json.dumps(config))
    weights = tensors(variant)
    safetensors.torch.save_file(weights, str(directory / "model.safetensors"))
    rows = range(1, ITEMS + 1)
    lines = (json.dumps({"item_id": f"i{row}", "sid": [row]}) for row in rows)
    (directory / "catalog.jsonl").write_text("\n".join(lines) + "\n")
    return weights


# Users ----------------------------------------------------------------------------------------------------------------


class User:
    """Events of a user who comes in sessions: seconds within one, days between; and candidates for them."""

    def __init__(self, number, events):
        draw = np.random.default_rng(1_000_003 * events + number)
        self.items = draw.integers(1, ITEMS + 1, events + 1)
        gaps = np.where(draw.random(events + 1) < 1 / 17, draw.integers(30_000, 400_000, events + 1),
                        draw.integers(1, 90, events + 1))
        self.times = 1_700_000_000 + np.cumsum(gaps)
        self.actions = draw.integers(0, ACTIONS, events + 1)
        self.candidates = draw.permutation(ITEMS)[: CANDIDATES[-1]] + 1

    def recommend(self, events, tenant):
        history = [{"item_id": f"i{item}", "timestamp": int(when)}
                   for item, when in zip(self.items[:events], self.times[:events])]
        return {"history": history, "query_time": int(self.times[events]), "num_items": TOP, "tenant": tenant}

    def rank(self, events, candidates, tenant):
        history = [{"item_id": f"i{item}", "action": str(action)}
                   for item, action in zip(self.items[:events], self.actions[:events])]
        given = [{"item_id": f"i{item}"} for item in self.candidates[:candidates]]
        return {"history": history, "candidates": given, "tenant": tenant}


# PyTorch --------------------------------------------------------------------------------------------------------------


def between_biased(scores, position, time_weights, buckets):
    """What stands between the two products of attention with relative bias, to be fused."""
    return F.silu(scores + position + time_weights[buckets])


def between(scores, scale):
    return F.silu(scores * scale)


class Torch:
    """A stack of layers, and what both variants have in common."""

    BLOCK = 256

    def __init__(self, variant, weights):
        self.research = variant == "research"
        self.eps = 1e-6 if self.research else 1e-5
        self.scale = 1.0 if self.research else 1 / math.sqrt(HEAD)
        self.divisor = DIVISOR[variant]
        self.fused = None
        rows = LONGEST if self.research else 2 * LONGEST
        self.layers = []
        for layer in range(LAYERS):
            if self.research:
                prefix = f"_hstu._attention_layers.{layer}."
                position = weights[f"{prefix}_rel_attn_bias._pos_w"]
                # [i, j] -> position[N - 1 + j - i], the same for every request.
                difference = torch.arange(LONGEST)[None, :] - torch.arange(LONGEST)[:, None] + POSITIONS - 1
                self.layers.append({
                    "norm": (None, None), "uvqk": weights[f"{prefix}_uvqk"].t().contiguous(), "uvqk_bias": None,
                    "output_norm": (None, None), "output": weights[f"{prefix}_o.weight"],
                    "output_bias": weights[f"{prefix}_o.bias"], "position": position[difference],
                    "time": weights[f"{prefix}_rel_attn_bias._ts_w"],
                })
                continue
            prefix = f"_hstu_block._attention_layers.{layer}."
            norm = {part: (weights[f"{prefix}_{part}_layernorm_weight"], weights[f"{prefix}_{part}_layernorm_bias"])
                    for part in ("input", "output")}
            self.layers.append({
                "norm": norm["input"], "uvqk": weights[f"{prefix}_linear_uvqk_weight"].t().contiguous(),
                "uvqk_bias": weights[f"{prefix}_linear_uvqk_bias"], "output_norm": norm["output"],
                "output": weights[f"{prefix}_linear_proj_weight"].t().contiguous(), "output_bias": None,
            })
        # Keys and values of the one user that is remembered.
        self.keys = torch.zeros(LAYERS, HEADS, rows + 1, HEAD)
        self.values = torch.zeros(LAYERS, HEADS, rows + 1, HEAD)
        if self.research:
            table = weights["_embedding_module._item_emb.weight"]
            self.items, self.positions = table, weights["_input_features_preproc._pos_emb.weight"]
            self.unit = F.normalize(table, eps=1e-6)
            self.mask = torch.ones(LONGEST, LONGEST).tril_()
        else:
            tables = "_embedding_collection._data_parallel_embedding_collection.embeddings."
            self.items, self.actions = weights[f"{tables}item.weight"], weights[f"{tables}action.weight"]
            self.positions = weights["_hstu_block._preprocessor._positional_encoder._position_embeddings_weight"]
            self.head = [(weights[f"_mlp._mlp.{i}.weight"], weights[f"_mlp._mlp.{i}.bias"]) for i in (0, 2)]
            self.masks = {}

    def compile(self):
        """Fuses what stands between the products of attention."""
        self.fused = torch.compile(between_biased if self.research else between, dynamic=True)

    def heads(self, rows):
        return rows.view(-1, HEADS, HEAD).transpose(0, 1)

    def project(self, layer, x):
        h = F.layer_norm(x, (WIDTH,), *layer["norm"], eps=self.eps)
        return F.silu(F.linear(h, layer["uvqk"], layer["uvqk_bias"]), inplace=True).split(VALUES, dim=1)

    def leave(self, layer, x, u, attended):
        attended = attended.transpose(0, 1).reshape(-1, VALUES) / self.divisor
        gated = F.layer_norm(attended, (VALUES,), *layer["output_norm"], eps=self.eps).mul_(u)
        return F.linear(gated, layer["output"], layer["output_bias"]).add_(x)

    def weigh(self, layer, q, k, rows, buckets):
        """silu of logits; q are rows of the context, k are keys from the first on."""
        keys = k.transpose(1, 2)
        if not self.research:
            if self.fused:
                return self.fused(torch.bmm(q, keys), self.scale)
            shape = (HEADS, q.shape[1], k.shape[1])
            return F.silu(torch.baddbmm(q.new_empty(()).expand(shape), q, keys, beta=0, alpha=self.scale), inplace=True)
        position = layer["position"][rows, : k.shape[1]]
        if self.fused:
            return self.fused(torch.bmm(q, keys), position, layer["time"], buckets)
        return F.silu(torch.bmm(q, keys).add_(position + layer["time"][buckets]), inplace=True)

    def causal(self, layer, q, k, v, first, buckets):
        """Attention of rows from `first` on, in blocks that stop at the diagonal."""
        count = q.shape[1]
        out = q.new_empty(HEADS, count, HEAD)
        for start in range(0, count, self.BLOCK):
            end = min(start + self.BLOCK, count)
            past = first + start
            near = None if buckets is None else buckets[start:end, : first + end]
            weights = self.weigh(layer, q[:, start:end], k[:, : first + end], slice(past, first + end), near)
            weights[:, :, past:].tril_()
            torch.bmm(weights, v[:, : first + end], out=out[:, start:end])
        return out

    def buckets(self, times, first):
        """Buckets of time differences, the same in every layer."""
        difference = (times[first + 1 :, None] - times[None, :-1]).abs_().clamp_(min=1)
        return (difference.float().log_() / 0.301).long().clamp_(0, 128)

    # Retrieval.

    def retrieve(self, items, times, way, first=0):
        """Scores and items of a history; rows before `first` are remembered."""
        count = len(items)
        x = self.items[items[first:]] * math.sqrt(WIDTH) + self.positions[first:count]
        buckets = self.buckets(times, first)
        for index, layer in enumerate(self.layers):
            u, v, q, k = self.project(layer, x)
            if way == "plain":
                weights = self.weigh(layer, self.heads(q), self.heads(k), slice(0, count), buckets)
                x = self.leave(layer, x, u, torch.bmm(weights.mul_(self.mask[:count, :count]), self.heads(v)))
                continue
            keys, values = self.keys[index], self.values[index]
            keys[:, first:count], values[:, first:count] = self.heads(k), self.heads(v)
            at, near = first, buckets
            if index + 1 == LAYERS:
                at, x, u, q, near = count - 1, x[-1:], u[-1:], q[-1:], buckets[-1:]
            x = self.leave(layer, x, u, self.causal(layer, self.heads(q), keys, values, at, near))
        user = F.normalize(x[-1], dim=0, eps=1e-6)
        scores = self.unit[1:] @ user
        best = torch.topk(scores, TOP)
        return best.values, best.indices + 1

    # Ranking.

    def interleaved(self, items, actions, first):
        x = torch.stack((self.items[items[first // 2 :]], self.actions[actions[first // 2 :]]), dim=1)
        return x.view(-1, WIDTH) * math.sqrt(WIDTH) + self.positions[first : 2 * len(items)]

    def predict(self, x):
        x = F.normalize(x, eps=1e-6)
        (first, first_bias), (second, second_bias) = self.head
        return F.linear(F.relu(F.linear(x, first, first_bias), inplace=True), second, second_bias).sigmoid_()

    def target_mask(self, history, candidates):
        if (history, candidates) not in self.masks:
            mask = torch.ones(history + candidates, history + candidates).tril_()
            mask[history:, history:] = torch.eye(candidates)
            self.masks = {(history, candidates): mask}
        return self.masks[history, candidates]

    def rank(self, items, actions, candidates, way, first=0):
        """Predictions of candidates; rows of the history before `first` are remembered."""
        count = 2 * len(items)
        targets = self.items[candidates] * math.sqrt(WIDTH) + self.positions[min(count, 2 * LONGEST)]
        x = torch.cat((self.interleaved(items, actions, first), targets))
        fresh = count - first
        for index, layer in enumerate(self.layers):
            u, v, q, k = self.project(layer, x)
            q, k, v = self.heads(q), self.heads(k), self.heads(v)
            if way == "plain":
                weights = self.weigh(layer, q, k, None, None).mul_(self.target_mask(count, len(candidates)))
                x = self.leave(layer, x, u, torch.bmm(weights, v))
                del weights
                continue
            keys, values = self.keys[index], self.values[index]
            keys[:, first:count], values[:, first:count] = k[:, :fresh], v[:, :fresh]
            last = index + 1 == LAYERS
            parts = [] if last else [self.causal(layer, q[:, :fresh], keys, values, first, None)]
            own = F.silu((q[:, fresh:] * k[:, fresh:]).sum(-1, keepdim=True) * self.scale) * v[:, fresh:]
            for start in range(0, len(candidates), self.BLOCK):
                part = slice(start, start + self.BLOCK)
                weights = self.weigh(layer, q[:, fresh:][:, part], keys[:, :count], None, None)
                parts.append(torch.baddbmm(own[:, part], weights, values[:, :count]))
            if last:
                x, u = x[fresh:], u[fresh:]
            x = self.leave(layer, x, u, torch.cat(parts, dim=1))
        return self.predict(x[-len(candidates) :])


@contextlib.contextmanager
def limit(seconds):
    def over(*_):
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# The server -----------------------------------------------------------------------------------------------------------


class Server:
    def __init__(self, binary, checkpoint, arguments):
        command = [binary, "serve", "--checkpoint", str(checkpoint), "--listen", "127.0.0.1:0", *arguments]
        self.command = " ".join(["beamline", "serve", "--checkpoint", "DIR", *command[4:]])
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        line = self.process.stdout.readline()
        if not line.startswith("listening on http://"):
            raise SystemExit(f"the server did not start: {line!r}; {self.command}")
        host, port = line.strip().removeprefix("listening on http://").rsplit(":", 1)
        self.connection = http.client.HTTPConnection(host, int(port), timeout=60)
        self.connection.connect()
        self.connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.used = time.monotonic()
        deadline = time.monotonic() + 60
        while not self.ready():
            if time.monotonic() > deadline:
                raise SystemExit("the server does not get ready")
            time.sleep(0.05)

    def wake(self):
        """An idle connection may have been closed: opens it again, before the clock starts."""
        if time.monotonic() - self.used > 5:
            self.connection.close()
            self.connection.connect()
            self.connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.ready()

    def ready(self):
        self.connection.request("GET", "/readyz")
        response = self.connection.getresponse()
        response.read()
        self.used = time.monotonic()
        return response.status == 200

    def post(self, path, request):
        """Milliseconds from sending to the last byte, and the answer."""
        body = json.dumps(request).encode()
        self.wake()
        start = time.perf_counter()
        self.connection.request("POST", path, body, {"content-type": "application/json"})
        response = self.connection.getresponse()
        answer = response.read()
        took = 1e3 * (time.perf_counter() - start)
        self.used = time.monotonic()
        if response.status != 200:
            raise SystemExit(f"{path}: {response.status} {answer[:500]!r}")
        return took, json.loads(answer)

    def stop(self):
        self.connection.close()
        self.process.terminate()
        self.process.wait()


def check_cached(answer, kind, wanted):
    cached = answer["usage"]["cached_tokens"]
    if answer["dropped_history"] or answer["unknown_items"]:
        raise SystemExit(f"events were dropped: {answer['dropped_history']} {answer['unknown_items'][:3]}")
    if cached != 0 if kind != "warm" else cached < wanted:
        raise SystemExit(f"a visit called {kind} had {cached} of {answer['usage']['context_tokens']} tokens cached")


def median(values):
    return statistics.median(values)


class Case:
    """Times of one case, in milliseconds by name, and those of the server's own clock."""

    def __init__(self):
        self.times, self.inside = {}, {}

    def add(self, name, took, answer=None):
        self.times.setdefault(name, []).append(took)
        if answer is not None:
            self.inside.setdefault(name, []).append(answer["timings_ms"])

    def result(self):
        found = {name: {"median_ms": round(median(times), 3), "least_ms": round(min(times), 3),
                        "most_ms": round(max(times), 3), "repetitions": len(times)}
                 for name, times in self.times.items()}
        for name, all_timings in self.inside.items():
            found[name]["server_ms"] = {key: round(median([t[key] for t in all_timings]), 3) for key in all_timings[0]}
        return found


# Measuring ------------------------------------------------------------------------------------------------------------


def timed(call):
    start = time.perf_counter()
    result = call()
    return 1e3 * (time.perf_counter() - start), result


def measure_torch(case, ways, cached_ways, options):
    """Times every way; each is a function of the number of a user that returns what is to be timed."""
    for name, prepare in {**ways, **cached_ways}.items():
        # A slow way that is far from the best need not be waited for so often.
        for number in range(2):
            prepare(number)()
        for number in range(options.repetitions):
            case.add(name, timed(prepare(number))[0])
    medians = {name: median(case.times[name]) for name in {**ways, **cached_ways}}
    say("   PyTorch, ms: " + ", ".join(f"{name} {took:.1f}" for name, took in medians.items()))


def measure_server(case, visit, compare, numbers, warm_up):
    """Visits of users: `visit(number, kind, tenant)` asks. Answers are compared afterwards: PyTorch's threads, which stay
    awake for a while after they had work, would stand in the server's way."""
    answers = []
    for number in numbers:
        tenant = f"t{number}"
        for kind, name, who in (("cold", "cold", tenant), ("warm", "warm", tenant), ("again", "recomputed", f"r{number}")):
            took, answer = visit(number, kind, who)
            if number >= warm_up:
                case.add(name, took, answer)
            answers.append((number, kind, answer))
    for answer in answers:
        compare(*answer)


def interleave(case, visit, compare, torch_part, options):
    """The server before and after PyTorch, so that neither has the machine's better half minute."""
    total, warm_up = options.repetitions + 3, 3
    half = warm_up + (options.repetitions + 1) // 2
    measure_server(case, visit, compare, range(half), warm_up)
    time.sleep(0.3)
    torch_part()
    time.sleep(0.3)
    # Three visits that do not count wake the server up again.
    measure_server(case, visit, compare, range(1000, 1003), 2000)
    measure_server(case, visit, compare, range(half, total), warm_up)
    found = {name: median(case.times[name]) for name in ("cold", "warm", "recomputed")}
    say("   beamline, ms: " + ", ".join(f"{name} {took:.1f}" for name, took in found.items()))


def ways_of(model_eager, model_compiled):
    ways = {"torch plain": (model_eager, "plain"), "torch tuned": (model_eager, "tuned")}
    if model_compiled is not None:
        ways["torch compiled"] = (model_compiled, "tuned")
    return ways


def retrieval(server, models, events, options):
    case, worst = Case(), 0.0
    users = {}

    def user(number):
        if number not in users:
            users[number] = User(number, events + NEW_EVENTS)
        return users[number]

    def inputs(number, count):
        who = user(number)
        return torch.from_numpy(who.items[:count]), torch.from_numpy(who.times[: count + 1])

    def visit(number, kind, tenant):
        count = events if kind == "cold" else events + NEW_EVENTS
        took, answer = server.post("/v1/recommend", user(number).recommend(count, f"{events}-{tenant}"))
        check_cached(answer, kind, (events - 1) // PAGE * PAGE)
        return took, answer

    def compare(number, kind, answer):
        nonlocal worst
        count = events if kind == "cold" else events + NEW_EVENTS
        scores, items = models[0].retrieve(*inputs(number, count), "tuned")
        found = [int(item["item_id"][1:]) for item in answer["items"]]
        if found != items.tolist():
            raise SystemExit(f"other items, {kind}: {found} {items.tolist()} {scores.tolist()}")
        worst = max(worst, max(abs(item["score"] - score) for item, score in zip(answer["items"], scores.tolist())))
        if worst > TOLERANCE:
            raise SystemExit(f"scores differ by {worst}")

    def whole(model, way):
        def prepare(number):
            given = inputs(number, events + NEW_EVENTS)
            return lambda: model.retrieve(*given, way)
        return prepare

    def cached(model):
        def prepare(number):
            before = model.retrieve(*inputs(number, events), "tuned")
            assert before is not None
            given = inputs(number, events + NEW_EVENTS)
            # The last row of the first visit saw the time of that query, so it is computed again.
            return lambda: model.retrieve(*given, "tuned", first=events - 1)
        return prepare

    # All ways of PyTorch agree with each other before anything is timed.
    given = inputs(0, events + NEW_EVENTS)
    expected = models[0].retrieve(*given, "plain")
    for name, (model, way) in ways_of(*models).items():
        scores, items = model.retrieve(*given, way)
        kept, kept_items = cached(model)(0)()
        if items.tolist() != expected[1].tolist() or kept_items.tolist() != items.tolist():
            raise SystemExit(f"{name} finds other items")
        worst = max(worst, (scores - expected[0]).abs().max().item(), (kept - expected[0]).abs().max().item())
    ways = {name: whole(model, way) for name, (model, way) in ways_of(*models).items()}
    cached_ways = {name.replace("torch", "torch cached,"): cached(model)
                   for name, (model, way) in ways_of(*models).items() if way == "tuned"}
    interleave(case, visit, compare, lambda: measure_torch(case, ways, cached_ways, options), options)
    return summary(case, worst, floors_retrieval(events), None)


def ranking(server, models, candidates, options):
    case, worst = Case(), 0.0
    users = {}

    def user(number):
        if number not in users:
            users[number] = User(number, RANK_HISTORY + NEW_EVENTS)
        return users[number]

    def inputs(number, count):
        who = user(number)
        parts = who.items[:count], who.actions[:count], who.candidates[:candidates]
        return [torch.from_numpy(part) for part in parts]

    expected = {}

    def visit(number, kind, tenant):
        count = RANK_HISTORY if kind == "cold" else RANK_HISTORY + NEW_EVENTS
        took, answer = server.post("/v1/rank", user(number).rank(count, candidates, f"{candidates}-{tenant}"))
        check_cached(answer, kind, (2 * RANK_HISTORY - 1) // PAGE * PAGE)
        return took, answer

    def compare(number, kind, answer):
        nonlocal worst
        count = RANK_HISTORY if kind == "cold" else RANK_HISTORY + NEW_EVENTS
        if (number, count) not in expected:
            expected.clear()
            expected[number, count] = models[0].rank(*inputs(number, count), "tuned")
        tasks = [f"task{task}" for task in range(TASKS)]
        found = torch.tensor([[one["predictions"][task] for task in tasks] for one in answer["candidates"]])
        ids = [int(one["item_id"][1:]) for one in answer["candidates"]]
        if ids != user(number).candidates[:candidates].tolist():
            raise SystemExit("the candidates come in another order")
        worst = max(worst, (found - expected[number, count]).abs().max().item())
        if worst > TOLERANCE:
            raise SystemExit(f"predictions differ by {worst}")

    def whole(model, way):
        def prepare(number):
            given = inputs(number, RANK_HISTORY + NEW_EVENTS)
            return lambda: model.rank(*given, way)
        return prepare

    def cached(model):
        def prepare(number):
            model.rank(*inputs(number, RANK_HISTORY)[:2], torch.arange(1, 9), "tuned")
            given = inputs(number, RANK_HISTORY + NEW_EVENTS)
            return lambda: model.rank(*given, "tuned", first=2 * RANK_HISTORY)
        return prepare

    given = inputs(0, RANK_HISTORY + NEW_EVENTS)
    plain = models[0].rank(*given, "plain")
    for model, way in ways_of(*models).values():
        worst = max(worst, (model.rank(*given, way) - plain).abs().max().item())
        worst = max(worst, (cached(model)(0)() - plain).abs().max().item())
    if worst > TOLERANCE:
        raise SystemExit(f"predictions of PyTorch's ways differ by {worst}")
    ways = {name: whole(model, way) for name, (model, way) in ways_of(*models).items()}
    cached_ways = {name.replace("torch", "torch cached,"): cached(model)
                   for name, (model, way) in ways_of(*models).items() if way == "tuned"}
    interleave(case, visit, compare, lambda: measure_torch(case, ways, cached_ways, options), options)
    return summary(case, worst, floors_ranking(candidates), candidates)


# Floors ---------------------------------------------------------------------------------------------------------------


def flops(rows, last_rows, pairs, last_pairs):
    """Of the stack: rows through every layer and pairs of a query and a key, the last layer apart."""
    products = (LAYERS * rows * WIDTH * 2 * VALUES + ((LAYERS - 1) * rows + last_rows) * (WIDTH * 2 * VALUES + VALUES * WIDTH)) * 2
    attention = ((LAYERS - 1) * pairs + last_pairs) * 2 * VALUES * 2
    return products, attention


def causal_pairs(first, end):
    return (first + 1 + end) * (end - first) // 2


def floor(products, attention):
    return {"products_mflop": round(products / 1e6, 1), "attention_mflop": round(attention / 1e6, 1),
            "floor_ms": round((products + attention) / RATE / 1e6, 3)}


def floors_retrieval(events):
    end = events + NEW_EVENTS

    def of(first):
        products, attention = flops(end - first, 1, causal_pairs(first, end), end)
        return floor(products + 2 * ITEMS * WIDTH, attention)

    return {"recomputed": of(0), "warm": of(events - 1)}


def floors_ranking(candidates):
    end = 2 * (RANK_HISTORY + NEW_EVENTS)

    def of(first):
        seen = candidates * (end + 1)
        products, attention = flops(end - first + candidates, candidates, causal_pairs(first, end) + seen, seen)
        return floor(products + 2 * candidates * (WIDTH * 512 + 512 * TASKS), attention)

    return {"recomputed": of(0), "warm": of(2 * RANK_HISTORY)}


# Results --------------------------------------------------------------------------------------------------------------


def summary(case, worst, floors, candidates):
    times = case.result()
    whole = {name: t["median_ms"] for name, t in times.items() if name.startswith("torch") and "cached" not in name}
    cached = {name: t["median_ms"] for name, t in times.items() if "cached" in name}
    best, best_cached = min(whole, key=whole.get), min(cached, key=cached.get)
    warm, recomputed = times["warm"]["median_ms"], times["recomputed"]["median_ms"]
    ratio = {
        "warm_against_own_recomputing": round(recomputed / warm, 2),
        "cold_against_torch": round(whole[best] / recomputed, 2),
        "warm_against_torch_recomputing": round(whole[best] / warm, 2),
        "warm_against_torch_cached": round(cached[best_cached] / warm, 2),
        "cold_against_torch_plain": round(whole["torch plain"] / recomputed, 2),
        "warm_against_torch_plain": round(whole["torch plain"] / warm, 2),
        "floor_cold_against_torch": round(whole[best] / floors["recomputed"]["floor_ms"], 2),
        "floor_warm_against_torch": round(whole[best] / floors["warm"]["floor_ms"], 2),
    }
    found = {"times": times, "best_torch": best, "best_torch_cached": best_cached, "ratios": ratio,
             "targets_met": {
                 "cold": ratio["cold_against_torch"] >= TARGETS["cold"],
                 "warm": ratio["warm_against_torch_recomputing"] >= TARGETS["warm"],
                 "cold, plain PyTorch": ratio["cold_against_torch_plain"] >= TARGETS["cold"],
                 "warm, plain PyTorch": ratio["warm_against_torch_plain"] >= TARGETS["warm"],
             },
             "floors": floors, "largest_difference": worst}
    if candidates:
        named = {"beamline cold": recomputed, "beamline warm": warm, "torch": whole[best],
                 "torch cached": cached[best_cached], "torch plain": whole["torch plain"]}
        found["candidates_per_second"] = {name: round(1e3 * candidates / took) for name, took in named.items()}
    return found


def table(results):
    """Markdown."""
    cases = results["cases"]

    def rows(header, cells):
        return ["", "| " + " | ".join(header) + " |", "| " + " | ".join(["---"] * len(header)) + " |"] + [
            "| " + " | ".join([name, *cells(case)]) + " |" for name, case in cases.items() if cells(case)]

    def times(case):
        at, floors = case["times"], case["floors"]
        return [f"{at['recomputed']['median_ms']:.1f}", f"{at['warm']['median_ms']:.2f}",
                *(f"{at['torch ' + way]['median_ms']:.1f}" if "torch " + way in at else "" for way in ("plain", "tuned", "compiled")),
                f"{at[case['best_torch_cached']]['median_ms']:.2f}",
                f"{floors['recomputed']['floor_ms']:.1f}", f"{floors['warm']['floor_ms']:.2f}"]

    def ratios(case):
        return [f"{case['ratios'][key]:.2f}" for key in (
            "warm_against_own_recomputing", "cold_against_torch_plain", "warm_against_torch_plain", "cold_against_torch",
            "warm_against_torch_recomputing", "warm_against_torch_cached", "floor_cold_against_torch", "floor_warm_against_torch")]

    def rates(case):
        found = case.get("candidates_per_second")
        return found and [f"{found[key]:,}" for key in found]

    lines = [
        "# HSTU: serving against PyTorch", "",
        f"`{results['command']}`: {results['machine']['cpu']}, {results['threads']} threads each, PyTorch "
        f"{results['machine']['torch']}. Medians of {results['repetitions']}, ms. Cold and warm visits have the same history; "
        "warm, all but its last 5 events were seen in an earlier visit. Beamline's times are a client's, HTTP included; "
        "PyTorch's are the model's alone. \"Best\" is the fastest of its ways that recompute everything; \"cached\" keeps "
        f"keys and values of one user. Floors count the work of the model at {results['floor_gflops']:.0f} GFLOP/s.",
    ]
    lines += rows(["ms", "beamline cold", "beamline warm", "PyTorch plain", "tuned", "compiled", "cached", "floor cold", "floor warm"],
                  times)
    lines += rows(["times faster", "warm than own cold", "cold than plain", "warm than plain", "cold than best", "warm than best",
                   "warm than cached", "floor cold than best", "floor warm than best"], ratios)
    lines += rows(["candidates per second", "beamline cold", "beamline warm", "PyTorch best", "PyTorch cached", "PyTorch plain"], rates)
    return "\n".join(lines) + "\n"


def machine():
    cpu = pathlib.Path("/proc/cpuinfo").read_text()
    name = next(line.split(":", 1)[1].strip() for line in cpu.splitlines() if line.startswith("model name"))
    return {"cpu": name, "cores": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version(),
            "torch": torch.__version__, "numpy": np.__version__}


def commit():
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=pathlib.Path(__file__).parent)
    return found.stdout.strip() or None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", default="target/release/beamline")
    parser.add_argument("--work", type=pathlib.Path, help="where checkpoints are made (default: a temporary folder)")
    parser.add_argument("--out", type=pathlib.Path, help="writes OUT.json and OUT.md (default: the table on stdout)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--no-compile", action="store_true", help="do not try torch.compile")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    results = {
        "command": "python bench/hstu.py " + " ".join(argument for argument in (
            f"--repetitions {options.repetitions}", "--no-compile" if options.no_compile else "") if argument),
        "commit": commit(), "machine": machine(), "threads": options.threads, "repetitions": options.repetitions,
        "floor_gflops": RATE, "model": {"width": WIDTH, "layers": LAYERS, "heads": HEADS, "head": HEAD, "items": ITEMS},
        "targets": TARGETS, "cases": {},
    }
    with contextlib.ExitStack() as stack, torch.inference_mode():
        work = options.work or pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for variant, cases, measure in (("research", HISTORIES, retrieval), ("nvidia", CANDIDATES, ranking)):
            say(f"{variant}: making the checkpoint")
            weights = write_checkpoint(work / variant, variant)
            models = [Torch(variant, weights), None]
            if not options.no_compile:
                models[1] = compiled(variant, weights, results)
            server = Server(options.binary, work / variant, ["--threads", str(options.threads), "--kv-memory", "2GiB"])
            results["serve"] = server.command
            try:
                for size in cases:
                    name = f"retrieval, {size:,} events" if variant == "research" else f"ranking, {size:,} candidates"
                    say(f"{name}, then {NEW_EVENTS} new events")
                    results["cases"][name] = measure(server, models, size, options)
            finally:
                server.stop()
    if options.out:
        options.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(table(results))
    print(table(results))


def compiled(variant, weights, results):
    """A model that compiles what it fuses, or none where that does not work within a minute."""
    model = Torch(variant, weights)
    try:
        with limit(60):
            model.compile()
            user = User(0, 700)
            for events in (300, 700):
                items, times = torch.from_numpy(user.items[:events]), torch.from_numpy(user.times[: events + 1])
                if variant == "research":
                    model.retrieve(items, times, "tuned")
                    model.retrieve(items, times, "tuned", first=events - 6)
                else:
                    actions = torch.from_numpy(user.actions[:events])
                    model.rank(items, actions, torch.arange(1, 300), "tuned")
                    model.rank(items, actions, torch.arange(1, 300), "tuned", first=2 * events - 10)
    except Exception as error:  # whatever the compiler finds wrong, the other ways are measured
        say(f"torch.compile does not work here: {type(error).__name__}: {str(error)[:300]}")
        results["compile_error"] = f"{type(error).__name__}: {str(error)[:300]}"
        return None
    return model


def rate():
    """GFLOP/s of a large product in single precision on the machine of floor.json."""
    found = json.loads((pathlib.Path(__file__).parent / "results" / "floor.json").read_text())
    return found["large_gflops"]["f32"]["gflops"]


RATE = rate()

if __name__ == "__main__":
    main()
