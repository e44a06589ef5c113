"""Hugging Face `generate` as a baseline: what the same checkpoint says without beamline, and how long it takes.

The generation itself is weights/tools/hf_reference.py (float32, exact trie through prefix_allowed_tokens_fn, everything that
would bend the beam search switched off); here are only the sample, the filter for seen items, the run file and the clock. """

import importlib.util
import os
import time

from beamline_eval import trec
from beamline_eval.errors import EvalError
from beamline_eval.files import digest, write_json
from beamline_eval.progress import say, track


def load_tool(path=None):
    path = path or os.path.join(os.path.dirname(__file__), "..", "..", "weights", "tools", "hf_reference.py")
    if not os.path.isfile(path):
        raise EvalError(
            f"{os.path.basename(path)} not found; give its place in the repository with --hf-tool weights/tools/hf_reference.py"
        )
    spec = importlib.util.spec_from_file_location("hf_reference", path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def write(prepared, checkpoint, users, out, threads=1, beam_width=None, tool=None):
    """Writes hf.run and hf.timing.json for these users; returns both paths."""
    tool = load_tool(tool)
    width, length = beam_width or prepared.protocol["beam_width"], prepared.protocol["num_items"]
    exclude_seen = prepared.protocol["exclude_seen"]
    if prepared.protocol.get("normalization", "full_vocab") != "full_vocab":
        raise EvalError(
            "Hugging Face's generate scores over the full vocabulary; prepare the data with --normalization full_vocab"
        )
    try:
        reference = tool.Reference(checkpoint, width, threads)
    except ImportError as error:
        raise EvalError(f"{error}; pip install 'beamline-eval[hf]'") from error
    requests, everything, slates, walls, cpu = prepared.requests(), reference.items_of, {}, [], 0.0
    for user in track(users, "generate"):
        body = requests[user]
        if exclude_seen:
            # The same search over a smaller catalog: a path stays if one of its items may be shown.
            seen = {event["item_id"] for event in body["history"]}
            left = {path: [item for item in items if item not in seen] for path, items in everything.items()}
            reference.items_of = {path: items for path, items in left.items() if items}
            reference.allowed = tool.exact_trie(reference.items_of)
        begun, spent = time.perf_counter(), time.process_time()
        answer = reference.answer(body)
        walls.append(answer.get("wall_s", time.perf_counter() - begun))
        cpu += time.process_time() - spent
        slates[user] = [item for items in answer["items"] for item in items][:length]
    run, timing = os.path.join(out, "hf.run"), os.path.join(out, "hf.timing.json")
    load = os.getloadavg()[0]
    trec.write_run(run, slates, "hf")
    walls.sort()
    write_json(
        timing,
        {
            "system": "Hugging Face generate, float32, one request at a time",
            "requests": len(walls),
            "beam_width": width,
            "threads": threads,
            "wall_s": round(sum(walls), 3),
            "cpu_s": round(cpu, 3),
            "cpu_ms_per_request": round(1000 * cpu / len(walls), 3),
            "load_average_after": round(load, 2),
            "cores": os.cpu_count(),
            "users_per_second": round(len(walls) / sum(walls), 3),
            "latency_ms": {
                name: round(1000 * walls[min(int(len(walls) * share), len(walls) - 1)], 2)
                for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))
            },
            "checkpoint": digest(os.path.join(checkpoint, "config.json")),
        },
    )
    say(f"hf: {run}, {sum(walls) / len(walls) * 1000:.0f} ms per user, {cpu / len(walls) * 1000:.0f} ms of CPU")
    return run, timing
