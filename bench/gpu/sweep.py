"""Which points are measured, and how a point becomes a line: the frame that both baselines fill.

A point is (batch, beam, context). A point that cannot be measured becomes a line with `skipped`, the reason, so that a
table can tell a gap from a failure. Lines are written one by one.
"""
import argparse
import gc
import itertools
import json
import sys
import time

import torch

from catalog import build_trie, random_codes
from shapes import SHAPES, shape_named
from timing import Marks, measure
from weights import checkpoint_weights, random_weights


def numbers(text):
    return [int(part) for part in text.split(",")]


def parser(description):
    """Flags that every script of this folder has."""
    flags = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--shape", default="qwen3-1.7b", choices=sorted(SHAPES))
    flags.add_argument("--batch", type=numbers, default=[1, 2, 4, 8], help="users served together (default 1,2,4,8)")
    flags.add_argument("--beam", type=numbers, default=[256])
    flags.add_argument("--context", type=numbers, default=[1000, 5000], help="context tokens")
    flags.add_argument("--points", help="BATCHxBEAMxCONTEXT,... instead of all combinations")
    flags.add_argument("--levels", type=int, help="tokens of a semantic ID (default 3)")
    flags.add_argument("--codebook", type=int, help="codes of a level (default 8192)")
    flags.add_argument("--out", help="append JSON lines here as well")
    flags.add_argument(
        "--cpu", action="store_true", help="on the CPU in float32, with the shape `tiny` unless --shape is given: a smoke test"
    )
    return flags


def measuring_flags(flags):
    flags.add_argument("--items", type=int, default=1_500_000)
    flags.add_argument("--seed", type=int, default=0, help="of weights, catalog and contexts")
    flags.add_argument("--dtype", choices=["bfloat16", "float32"], help="default: bfloat16, with --cpu float32")
    flags.add_argument("--checkpoint", help="a directory with *.safetensors of this shape, instead of random weights")
    flags.add_argument("--warmup", type=int, default=3)
    flags.add_argument("--least", type=int, default=5, help="measured runs of a point, at least")
    flags.add_argument("--most", type=int, default=50)
    flags.add_argument("--budget", type=float, default=3.0, help="seconds for a point's measured runs")
    flags.add_argument("--time-limit", type=float, default=float("inf"), help="seconds after which remaining points are skipped")
    flags.add_argument("--answers", help="write leaves and scores of one request per point here, as JSON lines")
    return flags


def parse(flags, arguments=None, device_needed=lambda options: True):
    options = flags.parse_args(arguments)
    if options.cpu and options.shape == flags.get_default("shape"):
        options.shape = "tiny"
    options.device = torch.device("cpu" if options.cpu else "cuda")
    if not options.cpu and device_needed(options) and not torch.cuda.is_available():
        sys.exit("no CUDA device; --cpu runs a smoke test without one")
    options.model = shape_named(options.shape, options.levels, options.codebook)
    if options.points:
        options.grid = [tuple(map(int, point.split("x"))) for point in options.points.split(",")]
    else:
        options.grid = list(itertools.product(options.batch, options.beam, options.context))
    return options


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def append(path, text):
    """A line at the end of a file, if there is a file: what is written survives whatever comes after."""
    if path:
        with open(path, "a", encoding="utf-8") as file:
            print(text, file=file)


def write_line(options, line):
    text = json.dumps(line)
    print(text, flush=True)
    append(options.out, text)


def free_bytes(device):
    """What a point may still take."""
    if device.type != "cuda":
        return float("inf")
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def contexts(shape, users, context, seed, device):
    """[users, context] tokens of items, on the host: what a history looks like. Pinned, so that it is sent without waiting."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(shape.codebook, (users, context), generator=generator)
    tokens = codes + torch.tensor([shape.first_token(at % shape.levels) for at in range(context)])
    return tokens.pin_memory() if device.type == "cuda" else tokens


def prepare(options):
    """(weights, trie on the host) of the options."""
    dtype = getattr(torch, options.dtype or ("float32" if options.cpu else "bfloat16"))
    if options.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what is float32; the products are bf16
    if options.checkpoint:
        weights = checkpoint_weights(options.model, options.checkpoint, options.device, dtype)
    else:
        weights = random_weights(options.model, options.device, dtype, options.seed)
    shape = options.model
    return weights, build_trie(random_codes(options.items, shape.levels, shape.codebook, options.seed), shape)


def run_points(options, engine, session, needs, trie):
    """Measures every point. session(users, beams, context) -> an object with run(tokens, marks) -> (leaves, scores), and
    maybe `details`, a dictionary for the line; needs(users, beams, context) -> bytes it will take at least."""
    began, device = time.perf_counter(), options.device
    for users, beams, context in options.grid:
        line = {
            "engine": engine, "shape": options.shape, "batch": users, "beam": beams, "context": context,
            "levels": options.model.levels, "items": options.items, "torch": torch.__version__, "gpu": device_name(device),
        }
        needed, free = needs(users, beams, context), free_bytes(device)
        current = None
        if time.perf_counter() - began > options.time_limit:
            line["skipped"] = "time limit"
        elif needed > free:
            line["skipped"] = f"needs at least {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
        else:
            try:
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
                prompts = [contexts(options.model, users, context, options.seed + index, device) for index in range(4)]
                current = session(users, beams, context)
                line |= measure(lambda index, marks: current.run(prompts[index % len(prompts)], marks), device,
                                options.warmup, options.least, options.most, options.budget)
                line["peak_bytes"] = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
                line |= getattr(current, "details", {})
                if options.answers:
                    leaves, scores = current.run(prompts[0], Marks(device))
                    point = {key: line[key] for key in ("engine", "shape", "batch", "beam", "context")}
                    append(options.answers, json.dumps(point | {"leaves": leaves.tolist(), "scores": scores.tolist()}))
            except torch.OutOfMemoryError:
                line["skipped"] = "out of memory"
            except RuntimeError as error:
                line["skipped"] = f"failed: {str(error).splitlines()[0][:200]}"
        # The buffers of one point must be gone before those of the next are made.
        current = None
        write_line(options, line)
