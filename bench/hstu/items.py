"""Exact retrieval from many items: latency over HTTP against the number of items, and the memory of the server.

    python bench/hstu/items.py --items 1000000,10000000 --out bench/results/hstu-items

A research checkpoint of width 64 and four layers with random weights, a user of 200 events, the ten best of all items by
inner product, nobody excluded. One request at a time, then several at once: requests that arrive together share one pass
over the items, and must give what each got alone. (That the search is exact is for the tests to show.) The floor counts one
read of the item table as it is kept at the bandwidth given, and the work at the rate given. Needs what bench/hstu needs."""

import argparse
import concurrent.futures
import http.client
import json
import pathlib
import re
import statistics
import tempfile
import time

from checkpoint import write_checkpoint
from server import Server
from shapes import Sizes, say
from users import User

HISTORY, AT_ONCE = 200, 8
BYTES = {"f32": 4, "bf16": 2, "q8_0": 34 / 32}


def memory(process):
    status = pathlib.Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
    return {name: int(re.search(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE)[1]) * 1024 for name in ("VmRSS", "VmHWM")}


def post(host, port, body):
    connection = http.client.HTTPConnection(host, port, timeout=120)
    connection.request("POST", "/v1/recommend", body, {"content-type": "application/json"})
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    if answer.status != 200:
        raise SystemExit(f"{answer.status} {text[:300]!r}")
    return json.loads(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", default="target/release/beamline")
    parser.add_argument("--items", default="1000000,10000000")
    parser.add_argument("--formats", default="f32,bf16,q8_0")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--gflops", type=float, default=334.0)
    parser.add_argument("--gb-per-second", type=float, default=26.0)
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    results = []
    for items in map(int, options.items.split(",")):
        sizes = Sizes(width=64, head=16, items=items, longest=256)
        with tempfile.TemporaryDirectory() as folder:
            directory = pathlib.Path(folder) / "checkpoint"
            say(f"making {items} items")
            write_checkpoint(directory, "research", sizes)
            for weight_format in options.formats.split(","):
                start = time.monotonic()
                arguments = ["--threads", "2", "--weight-format", weight_format]
                server = Server(options.binary, directory, arguments)
                loaded = time.monotonic() - start
                users = [User(number, HISTORY, items) for number in range(AT_ONCE)]
                alone, slates = [], {}
                for repetition in range(options.repetitions + 1):
                    took, answer = server.post("/v1/recommend", users[repetition % AT_ONCE].recommend(HISTORY, f"a{repetition}"))
                    alone.append(took)
                    slates[repetition % AT_ONCE] = answer["items"]
                host, port = server.connection.address
                together = []
                for repetition in range(options.repetitions):
                    bodies = [json.dumps(user.recommend(HISTORY, f"t{repetition}")).encode() for user in users]
                    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
                        start = time.perf_counter()
                        answers = list(pool.map(lambda body: post(host, port, body), bodies))
                        together.append(1e3 * (time.perf_counter() - start))
                    if any(answers[user]["items"] != slate for user, slate in slates.items()):
                        raise SystemExit("together, a user got other items than alone")
                bytes_read, flops = items * sizes.width * BYTES[weight_format], 2 * items * sizes.width
                results.append({
                    "items": items, "format": weight_format, "load_seconds": round(loaded, 1),
                    "one_ms": statistics.median(alone[1:]), "eight_together_ms": statistics.median(together),
                    "floor_one_ms": 1e3 * max(bytes_read / options.gb_per_second / 1e9, flops / options.gflops / 1e9),
                    "floor_eight_ms": 1e3 * max(bytes_read / options.gb_per_second / 1e9, AT_ONCE * flops / options.gflops / 1e9),
                    **memory(server.process),
                })
                say(json.dumps(results[-1]))
                server.stop()
    out = pathlib.Path(options.out)
    out.with_suffix(".json").write_text(json.dumps({"command": f"python bench/hstu/items.py --items {options.items}", "width": 64,
                                                    "history": HISTORY, "results": results}, indent=1) + "\n", encoding="utf-8")
    lines = [
        "# Exact retrieval from many items",
        "",
        "One user of 200 events, width 64, ten items, two threads; ms over HTTP, medians.",
        "",
        "| items | format | one request | eight at once | floor, one | floor, eight | server, GB | loaded in, s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {r['items']:,} | {r['format']} | {r['one_ms']:.1f} | {r['eight_together_ms']:.1f} | {r['floor_one_ms']:.1f} | {r['floor_eight_ms']:.1f} | "
        f"{r['VmRSS'] / 1e9:.1f} | {r['load_seconds']} |"
        for r in results
    ]
    out.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
