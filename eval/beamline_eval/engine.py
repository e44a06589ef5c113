"""Running `beamline batch`, with a clock on it."""

import os
import resource
import shutil
import subprocess
import time

from beamline_eval.errors import EvalError
from beamline_eval.files import json_lines, write_json_lines

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))


def binary(given=None):
    """--beamline, else $BEAMLINE, else the release build of this repository, else the PATH."""
    for place in (given, os.environ.get("BEAMLINE")):
        if place:
            found = shutil.which(place)
            if not found:
                raise EvalError(f"{place}: no such program")
            return found
    built = os.path.join(ROOT, "target", "release", "beamline")
    found = built if os.access(built, os.X_OK) else shutil.which("beamline")
    if not found:
        raise EvalError("no beamline binary: build it with `cargo build --release`, or name it with --beamline or $BEAMLINE")
    return found


def batch(program, checkpoint, requests, answers, threads=None, in_flight=None, timings=False):
    """Runs it; returns {"wall_s", "cpu_s", ...}. Start and loading of the checkpoint are part of the wall clock."""
    command = [program, "batch", "--checkpoint", checkpoint, "--history-cut", "exact"]
    command += ["--threads", str(threads)] if threads else []
    command += ["--in-flight", str(in_flight)] if in_flight else []
    command += ["--timings"] if timings else []
    # Answers of an earlier evaluation are made anew.
    command += ["--restart"] if os.path.isfile(answers) else []
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([*command, requests, answers], stderr=subprocess.PIPE, text=True)
    wall, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    # Status 1 with an answers file means that some answers are errors; `evaluate` counts those. Without a file nothing was done.
    if done.returncode not in (0, 1) or not os.path.isfile(answers):
        raise EvalError(f"beamline batch ended with status {done.returncode}:\n{done.stderr.strip()[-2000:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    # As one would type it in a clone; results do not name machines.
    inside = os.path.abspath(checkpoint).startswith(ROOT + os.sep)
    command[3] = os.path.relpath(checkpoint, ROOT) if inside else os.path.basename(os.path.normpath(checkpoint))
    shown = ["beamline", *command[1:], os.path.basename(requests), os.path.basename(answers)]
    return {"wall_s": round(wall, 3), "cpu_s": round(cpu, 3), "command": " ".join(shown)}


def with_beam(source, out, beam_width, num_items, users=None):
    """The same requests at another beam width; slates no longer than the beam."""
    wanted = None if users is None else set(users)

    def bodies():
        for _, body in json_lines(source):
            if wanted is None or str(body["id"]) in wanted:
                body.pop("beam_widths", None)
                yield {**body, "beam_width": beam_width, "num_items": min(num_items, beam_width)}

    write_json_lines(out, bodies())


def percentiles(values, shares=(("p50", 0.5), ("p90", 0.9), ("p99", 0.99))):
    """Nearest-rank percentiles, {"p50": ...}."""
    ordered = sorted(values)
    return (
        {name: round(ordered[min(int(len(ordered) * share), len(ordered) - 1)], 3) for name, share in shares} if ordered else {}
    )


def latencies(answers):
    """timings_ms.total of the answers that have one."""
    return [answer["timings_ms"]["total"] for _, answer in json_lines(answers) if "timings_ms" in answer]
