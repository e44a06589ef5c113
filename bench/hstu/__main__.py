"""HSTU over HTTP against the same model in PyTorch, on this machine, in one run, with two threads each.

    python bench/hstu --binary target/release/beamline --out bench/results/hstu

Needs PyTorch, numpy and safetensors; with openvino in the same Python, OpenVINO is measured as well. Makes two random
checkpoints, starts `beamline serve` on each, and measures

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
- `openvino`: the plain way, converted by OpenVINO for the shape of the case, where the package is installed.
- `cached`: as the best of the last two, with keys and values of the returning user kept in tensors of this one user.
"""
import argparse
import contextlib
import json
import os
import pathlib
import tempfile

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import torch

from cases import ranking, retrieval
from checkpoint import write_checkpoint
from floors import rate
from model import Torch, compiled
from openvino_model import available
from report import commit, machine, table
from server import Server
from shapes import CANDIDATES, HEAD, HEADS, HISTORIES, ITEMS, LAYERS, NEW_EVENTS, TARGETS, WIDTH, say


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", default="target/release/beamline")
    parser.add_argument("--work", type=pathlib.Path, help="where checkpoints are made (default: a temporary folder)")
    parser.add_argument("--out", type=pathlib.Path, help="writes OUT.json and OUT.md (default: the table on stdout)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--no-openvino", action="store_true", help="leave OpenVINO out")
    parser.add_argument("--no-compile", action="store_true", help="do not try torch.compile")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    options.openvino = available() and not options.no_openvino
    if not options.openvino:
        say("OpenVINO is left out")
    options.gflops = round(rate(), 1)

    results = {
        "command": "python bench/hstu " + " ".join(argument for argument in (
            f"--repetitions {options.repetitions}", "--no-compile" if options.no_compile else "") if argument),
        "commit": commit(), "machine": machine(), "threads": options.threads, "repetitions": options.repetitions,
        "floor_gflops": options.gflops, "model": {"width": WIDTH, "layers": LAYERS, "heads": HEADS, "head": HEAD, "items": ITEMS},
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


if __name__ == "__main__":
    main()
