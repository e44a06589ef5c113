#!/usr/bin/env python3
"""A long time of mixed traffic against one server that holds four models.

    python3 bench/mixed_soak.py --seconds 600 --out bench/results/mixed-soak

Needs python3 and a built server, nothing else. Makes its checkpoints (`soak/checkpoints.py`), starts `beamline serve` on one of
them, loads the others over HTTP, and sends requests at a given rate, whatever becomes of those before:

- recommend by a decoder of semantic IDs (the demo), an HSTU that retrieves and one with a token head; rank by an HSTU of the
dlrm variant, by the
  decoder and by the token head; warm. Users come back with a few new events or are new; histories are cut; filters, tenants,
  forced prefixes;
- deadlines too short, clients that go after half a request or while they wait, bodies that come in two parts, requests that
must be refused, and now
  and then two dozen requests at once;
- every `--swap-every` seconds a change: a checkpoint swapped for another, a catalog patched or rolled back, changes that must
be refused.

It fails (exit status 1) unless

- every answer has the shape that /openapi.json gives, the items that filters and catalog allow, as many as there are, in order;
every error is
  the one that was expected;
- requests that are asked again get the same bytes for the same checkpoint and catalog: while others run, when all is quiet,
from the cache and
  computed anew, and by /v1/rank the scores that /v1/recommend gave;
- a request after a change is answered by what the change put in place;
- at rest no page, request or counted byte is held that should not be, and the server's counters are what the clients counted;
- resident memory, threads and files do not grow beyond the bounds in the flags, and SIGTERM ends the server with 0.

The KV memory is small on purpose: pages are evicted, go to host memory and come back.
"""

import argparse
import json
import os
import pathlib
import platform
import random
import shlex
import subprocess
import sys
import tempfile
import threading
import time

from soak import checkpoints, report
from soak.answers import Judge, model_of
from soak.changes import Operator
from soak.server import Schema, Server
from soak.traffic import Planner, Samples, Traffic, ask_all
from soak.watch import Watch, engine_problems, memory_parts, page_total, request_problems
from soak.world import MODELS, World

HERE = pathlib.Path(__file__).resolve().parent
KEY = "soak-key-0123456789"
# Long, so that nothing runs out when the whole machine is stopped for a while; how long answers take has a bound of its own.
PATIENCE_MS, SLOWEST_S = "300000", 20


def say(text):
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


class Checks:
    """What held and what did not."""

    def __init__(self):
        self.found = {}

    def hold(self, name, problems, found=""):
        """`problems` is empty where the check held; `found` is a number or a word worth reading in any case."""
        problems = [str(problem)[:2_000] for problem in problems]
        self.found[name] = {"held": not problems, "found": found or "", "problems": problems[:20], "count": len(problems)}
        for problem in problems[:5]:
            say(f"  FAILED {name}: {problem[:400]}")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default=str(HERE.parent / "target/release/beamline"), metavar="BIN", help="the binary")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--rate", type=float, default=40.0, help="arrivals a second (default 40)")
    parser.add_argument(
        "--swap-every", type=float, default=5.0, metavar="S", help="seconds between changes; 0 for none (default 5)"
    )
    parser.add_argument("--senders", type=int, default=16, help="threads that send (default 16)")
    parser.add_argument("--threads", type=int, default=2, help="threads of the server (default 2)")
    parser.add_argument("--kv-memory", default="8MiB", help="of each model (default 8MiB)")
    parser.add_argument("--kv-host-memory", default="4MiB", help="of each model (default 4MiB)")
    parser.add_argument("--samples", type=int, default=200, help="requests that are asked again, about (default 200)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rss-growth-mib", type=float, default=48, help="how much the highest resident memory of the last third of the time, less "
                        "what is used of host memory, may lie above that of the first third (default 48)")  # fmt: skip
    parser.add_argument("--thread-growth", type=int, default=24, help="the same for threads (default 24)")
    parser.add_argument("--file-growth", type=int, default=24, help="the same for open files (default 24)")
    parser.add_argument("--server-args", default="", help="whatever else `beamline serve` understands")
    parser.add_argument(
        "--work", type=pathlib.Path, help="where checkpoints and the server's log are put (default: a temporary folder)"
    )
    parser.add_argument("--out", type=pathlib.Path, help="writes OUT.json and OUT.md (default: the page on stdout)")
    return parser.parse_args()


def growth(looks, seconds, name, allowed, unit=1):
    """The highest of the last third against the highest of the first."""
    first = [look[name] for look in looks if look["at"] < seconds / 3]
    last = [look[name] for look in looks if look["at"] >= 2 * seconds / 3]
    if not first or not last:
        return ["too few looks"], ""
    grown = (max(last) - max(first)) / unit
    found = f"{max(first) / unit:.0f} to {max(last) / unit:.0f}"
    return [f"{found}: {grown:.0f} more, {allowed:.0f} allowed"] if grown > allowed else [], found


def during(options, server, traffic, watch, operator):
    """The traffic, with changes and looks beside it."""
    start = time.monotonic()
    beside = [threading.Thread(target=watch.run, args=(start,)), threading.Thread(target=watch.tick)]
    if options.swap_every:
        beside.append(threading.Thread(target=operator.run, args=(options.swap_every, start)))
    for thread in beside:
        thread.start()
    try:
        traffic.run(options.seconds, options.rate)
    finally:
        operator.stop.set()
        watch.stop.set()
        for thread in beside:
            thread.join()


def afterwards(samples, operator, judge, failures):
    """Asks every sample again with every checkpoint and catalog that it was answered by."""
    counted = {}
    for version in checkpoints.VERSIONS:
        for state in (0, 1):
            for model in MODELS:
                at = operator.digests.get((model, version)), operator.world.catalogs[model].shelves[state].version
                wanted = lambda asked, key, model=model, at=at: asked == model and key == at  # noqa: E731
                if any(wanted(model_of(sample.body), key) for sample in samples.all for key in sample.essences):
                    operator.settle(model, version, state)
                    name = f"at the end, {version}{state}"
                    counted[f"{model} {name}"] = sum(ask_all(samples, operator.stranger, judge, wanted, name, failures).values())
    return counted


def run(options, work):
    checks, rng = Checks(), random.Random(options.seed)
    say(f"making checkpoints in {work}")
    root = work / "models"
    items = checkpoints.write_root(root, HERE.parent / "weights/demo/checkpoint", options.seed)
    (work / "key").write_text(KEY + "\n")
    fixed = ["--name", "decoder", "--threads", str(options.threads), "--kv-memory", options.kv_memory, "--kv-host-memory", options.kv_host_memory,
             "--max-context", "1024", "--max-beam-width", "128", "--default-timeout-ms", PATIENCE_MS, "--max-timeout-ms", PATIENCE_MS,
             "--read-timeout-ms", PATIENCE_MS, "--model-memory", "1GiB"]  # fmt: skip
    fixed += shlex.split(options.server_args)
    given = ["--checkpoint", str(root / "decoder/a"), "--model-root", str(root), "--admin-key-file", str(work / "key")]
    server = Server(options.server, given + fixed, work / "server.log")
    try:
        found = soak(options, server, World(items, rng), rng, checks)
    finally:
        status = server.stop()
    checks.hold("SIGTERM ends the server with 0", [f"status {status}"] if status != 0 else [])
    log = [
        line for line in (work / "server.log").read_text(errors="replace").splitlines() if " ERROR " in line or "panicked" in line
    ]
    checks.hold("nothing is logged as an error", log)
    found["server"] = shlex.join(
        ["beamline", "serve", "--checkpoint", "ROOT/decoder/a", "--model-root", "ROOT", "--admin-key-file", "KEY", *fixed]
    )
    return {**found, "checks": checks.found, "failed": [name for name, check in checks.found.items() if not check["held"]]}


def soak(options, server, world, rng, checks):
    operator, watch, samples = Operator(server, KEY, world), Watch(server), Samples()
    operator.learn()
    operator.learn_others()
    operator.prepare_probes()
    listed = operator.client.ask("GET", "/v1/models").json()["models"]
    longest = {one["name"]: one["max_history_items"] for one in listed}
    digests = {model: {operator.digests[model, version] for version in checkpoints.VERSIONS} for model in MODELS}
    schema = Schema(operator.client.ask("GET", "/openapi.json").json())
    judge = Judge(schema, world, digests, longest)
    share = min(1.0, options.samples / max(1.0, 0.7 * options.rate * options.seconds))
    traffic = Traffic(server, judge, Planner(world, samples, rng, share), samples, options.senders)
    for model in MODELS:
        operator.probe(model)

    memory_before, _ = memory_parts(operator.client, MODELS)
    before, _ = watch.idle()
    pages_before, numbers_before = page_total(before), server.process_numbers()
    operator.client.counted.clear()
    operator.stranger.counted.clear()
    operator.items = 0
    say(f"{options.seconds:.0f} s of {options.rate} requests a second; {numbers_before['rss_bytes'] >> 20} MiB resident")
    started = time.time()
    during(options, server, traffic, watch, operator)
    if server.process.poll() is not None:
        raise SystemExit(
            f"the server ended by itself with status {server.process.poll()}; the end of its log:\n{server.log_end()}"
        )
    after, held = watch.idle()
    failures = list(traffic.failures)
    say("quiet again; asking the samples again")

    checks.hold(
        "every request was answered as it should be", [f"{one['kind']} {one['path']}: {one['problem']}" for one in failures]
    )
    wrong = [f"{one['change']} of {one['model']}: {one['problem']}" for one in operator.failures]
    checks.hold("every change did what it should, and the next request saw it", wrong)
    checks.hold("nothing is held at rest: queued, running, pages", [held] if held else [])
    counted, left = traffic.counted + operator.counted(), traffic.left
    items = traffic.items + operator.items
    checks.hold(
        "the server counted what the clients did", request_problems(before, after, counted, left, items, traffic.left_items)
    )
    checks.hold("the engines' counters add up, none failed", engine_problems(after))
    telling = (
        "beamline_prefix_tokens_total",
        "beamline_page_evictions_total",
        "beamline_engine_requests_total",
        "beamline_host_",
    )
    grown = {name: after[name] - before[name] for name in after if name.startswith(telling)}

    quiet = []
    afterwards_counts = afterwards(samples, operator, judge, quiet)
    failures += quiet
    checks.hold("every answer at rest is as it should be", [f"{one['kind']} {one['path']}: {one['problem']}" for one in quiet])
    differ = [f"{one['when']} {one['path']}: {one['before'][:200]} / {one['now'][:200]}" for one in samples.differences]
    checks.hold("the same request gets the same bytes", differ, f"{sum(samples.compared.values())} compared")
    # Only what both versions were answered by was asked; now back to where everything began.
    for model in MODELS:
        operator.settle(model, "b" if operator.loaded[model][0] == "a" else "a", 0)
        operator.settle(model, "a", 0)
    last, held = watch.idle()
    checks.hold("nothing is held at the end", [held] if held else [])
    pages = page_total(last)
    checks.hold("all pages are there", [f"{pages}, {pages_before} before"] if pages != pages_before else [], f"{pages:.0f}")
    used, parts = memory_parts(operator.client, MODELS)
    wrong = (
        [f"{used} bytes are counted, the parts are {parts}, before it were {memory_before}"]
        if not used == parts == memory_before
        else []
    )
    checks.hold("memory that is counted is what is loaded, to the byte, as before", wrong, f"{used} bytes")
    checks.hold("counters never fall, and the metrics can always be read", watch.failures)
    numbers, above = watch.back_to(numbers_before)
    oldest = max((look["heartbeat"] for look in watch.looks), default=0.0)
    late = [f"{oldest:.1f} s without"] if oldest > 5 + watch.stopped else []
    checks.hold("the engines come round", late, f"{oldest:.2f} s at most between two rounds")
    slowest = max((one.server_ms for one in traffic.outcomes if one.server_ms is not None), default=0.0) / 1e3
    late = [f"{slowest:.1f} s"] if slowest > SLOWEST_S + watch.stopped else []
    checks.hold(f"no answer takes longer than {SLOWEST_S} s in the server", late, f"{slowest:.2f} s at most")
    checks.hold("threads and files are given back", above, f"{numbers['threads']} threads, {numbers['files']} files")
    problems, found = growth(watch.looks, options.seconds, "besides_host_bytes", options.rss_growth_mib, report.MIB)
    found = found and f"without host memory in use, most of the first and last third: {found} MiB"
    checks.hold("resident memory does not grow", problems, found)
    for name, allowed in (("threads", options.thread_growth), ("files", options.file_growth)):
        problems, found = growth(watch.looks, options.seconds, name, allowed)
        checks.hold(f"{name} do not grow", problems, found and f"most of the first and last third: {found}")
    return {
        "started": int(started), "seconds": options.seconds, "rate": options.rate, "requests": len(traffic.outcomes),
        "settings": {name: str(value) if isinstance(value, pathlib.Path) else value for name, value in vars(options).items()
                     if name not in ("work", "out", "server")},
        "models": [{name: one[name] for name in ("name", "family", "parameters", "context_limit", "tasks", "catalog", "memory")} for one in listed],
        "process": {"before": numbers_before, "after": numbers},
        "minutes": report.by_minute(traffic.outcomes, watch.looks, options.seconds), "kinds": report.by_kind(traffic.outcomes),
        "metrics_grew_by": grown, "stopped_s": round(watch.stopped, 1),
        "changes": {"count": len(operator.log), "log": operator.log, "failures": operator.failures},
        "samples": {"count": len(samples.all), "compared": dict(samples.compared), "differences": len(samples.differences),
                    "found": samples.differences[:20], "asked_at_the_end": afterwards_counts},
        "failures": failures[:50] + operator.failures[:50],
    }  # fmt: skip


def machine():
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    return {
        "cpu": names[0] if names else "?",
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def commit():
    found = subprocess.run(["git", "describe", "--always", "--dirty=+", "--exclude=*"], capture_output=True, text=True, cwd=HERE)
    return found.stdout.strip() or None


def main():
    options = arguments()
    shown = [f"--{name.replace('_', '-')} {value:g}" for name, value in (
        ("seconds", options.seconds), ("rate", options.rate), ("swap_every", options.swap_every), ("seed", options.seed))]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        work = options.work or pathlib.Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        result = {
            "command": "python3 bench/mixed_soak.py " + " ".join(shown),
            "commit": commit(),
            "machine": machine(),
            **run(options, work),
        }
    page = report.markdown(result)
    if options.out:
        options.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(page)
    print(page)
    say("every check held" if not result["failed"] else f"failed: {'; '.join(result['failed'])}")
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
