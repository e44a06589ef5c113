#!/usr/bin/env python3
"""Checks and times beamline on this machine's GPU: run.py --out FOLDER [--quick] [--only STEP,..] [--seconds N]

Place in the flow: `cargo xtask gpu` packs binaries, fixtures, baselines and this script; here they run, correctness first: if that
fails, nothing is timed. Needs a driver, the CUDA 13 libraries and python3; for floor and baselines, PyTorch (they are
skipped, and said to be, without).

    correctness   every conformance case on the GPU, answers in mixed batches (BEAMLINE_ROUNDS, 1000), pages to the host and back
    sanitizer     the same under compute-sanitizer, memcheck and racecheck, if it is installed
    serve         the real binary answers a file of requests on the GPU
    bench         gpu_bench: floor, points, reuse, profile, expansion, beams, load
    baselines     floor.py, shared_prefix_baseline.py, hf_baseline.py, compare.py

Writes FOLDER/summary.json (what passed, what was skipped and why, seconds) and one log per step. Steps go on after one
that failed, except that nothing is timed after a failed correctness. The exit status is 1 if any step failed."""

import argparse
import glob
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
STEPS = ["correctness", "sanitizer", "serve", "bench", "baselines"]
LIBRARIES = ["libcudart.so.13", "libcublas.so.13", "libcublasLt.so.13", "libcurand.so.10", "libnvrtc.so.13"]


def library_folders():
    """Where the CUDA libraries lie that came with Python packages."""
    places = {sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]}
    found = []
    for place in sorted(places):
        for pattern in ("nvidia/cu13/lib", "nvidia/*/lib", "torch/lib"):
            found += sorted(glob.glob(os.path.join(place, pattern)))
    found += sorted(glob.glob("/usr/local/cuda*/lib64"))
    return found


class Runner:
    def __init__(self, folder, out, seconds):
        self.folder, self.out, self.until = folder, out, time.time() + seconds
        self.summary = {"steps": {}, "command": " ".join(sys.argv)}
        self.environment = dict(os.environ)
        paths = library_folders() + [path for path in os.environ.get("LD_LIBRARY_PATH", "").split(":") if path]
        self.environment["LD_LIBRARY_PATH"] = ":".join(paths)

    def binary(self, name):
        return os.path.join(self.folder, "bin", name)

    def note(self, step, **what):
        self.summary["steps"][step] = what
        with open(os.path.join(self.out, "summary.json"), "w", encoding="utf-8") as file:
            json.dump(self.summary, file, indent=1)
        print(step, what, flush=True)

    def run(self, step, command, **environment):
        """Runs a command with what time is left; says whether it succeeded."""
        left = self.until - time.time()
        if left < 5:
            self.note(step, status="skipped", why="no time left")
            return False
        start, log = time.time(), os.path.join(self.out, step.replace(" ", "-") + ".log")
        try:
            with open(log, "wb") as file:
                done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env={**self.environment, **environment},
                                      cwd=self.folder, timeout=left, check=False)
            status, why = ("passed", None) if done.returncode == 0 else ("failed", f"exit status {done.returncode}")
        except subprocess.TimeoutExpired:
            status, why = "failed", "ran out of time"
        except OSError as error:
            status, why = "failed", str(error)
        with open(log, "rb") as file:
            tail = file.read()[-1500:].decode(errors="replace")
        what = {"status": status, "seconds": round(time.time() - start, 1)}
        self.note(step, **what, **({"why": why, "tail": tail} if why else {}))
        return status == "passed"

    def failed(self):
        return any(what["status"] == "failed" for what in self.summary["steps"].values())


def correctness(runner, rounds):
    fixtures = os.path.join(runner.folder, "fixtures")
    return runner.run("correctness", [runner.binary("cuda"), "--test-threads", "1", "--nocapture"], BEAMLINE_GPU="0",
                      BEAMLINE_FIXTURES=fixtures, BEAMLINE_ROUNDS=str(rounds))


def sanitizer(runner):
    tool = shutil.which("compute-sanitizer") or next(iter(glob.glob("/usr/local/cuda*/bin/compute-sanitizer")), None)
    if tool is None:
        runner.note("sanitizer", status="skipped", why="compute-sanitizer is not installed")
        return
    fixtures = os.path.join(runner.folder, "fixtures")
    for kind in ("memcheck", "racecheck"):
        runner.run(f"sanitizer {kind}", [tool, "--tool", kind, "--error-exitcode", "9", runner.binary("cuda"), "--test-threads", "1"],
                   BEAMLINE_GPU="0", BEAMLINE_FIXTURES=fixtures, BEAMLINE_ROUNDS="1")


def serve(runner):
    checkpoint = os.path.join(runner.folder, "fixtures", "qwen3-untied")
    with open(os.path.join(checkpoint, "catalog.jsonl"), encoding="utf-8") as file:
        items = [json.loads(line)["item_id"] for line in file][:12]
    requests, answers = os.path.join(runner.out, "requests.jsonl"), os.path.join(runner.out, "answers.jsonl")
    with open(requests, "w", encoding="utf-8") as file:
        for length in range(1, len(items)):
            history = [{"item_id": item} for item in items[:length]]
            file.write(json.dumps({"id": str(length), "history": history, "num_items": 10, "beam_width": 50}) + "\n")
    for path in (answers, answers + ".cpu"):
        if os.path.exists(path):
            os.remove(path)
    command = [runner.binary("beamline"), "batch", "--checkpoint", checkpoint]
    if not (runner.run("serve", command + ["--device", "cuda:0", requests, answers]) and
            runner.run("serve on the CPU", command + [requests, answers + ".cpu"])):
        return
    lists = []
    for path in (answers, answers + ".cpu"):
        with open(path, encoding="utf-8") as file:
            lists.append([[item["item_id"] for item in json.loads(line)["items"]] for line in file])
    overlap = sum(len(set(a) & set(b)) for a, b in zip(*lists)) / max(1, sum(map(len, lists[1])))
    runner.note("serve compared", status="passed" if overlap >= 0.9 else "failed", overlap=round(overlap, 4),
                same_first=sum(a[:1] == b[:1] for a, b in zip(*lists)), requests=len(lists[0]))


def bench(runner, quick, shape):
    command = [runner.binary("gpu_bench"), "measure", "--shape", shape]
    quick = ["--quick", "--repetitions", "10"] if quick else []
    for section in ("floor", "points", "reuse", "profile", "expansion", "beams", "load"):
        out = os.path.join(runner.out, f"beamline-{section}.jsonl")
        runner.run(f"bench {section}", command + ["--sections", section, "--out", out] + quick)


def baselines(runner, quick, shape):
    try:
        import torch
    except ImportError:
        runner.note("baselines", status="skipped", why="no PyTorch")
        return
    if not torch.cuda.is_available():
        runner.note("baselines", status="skipped", why="PyTorch sees no GPU")
        return
    scripts = os.path.join(runner.folder, "bench")
    out = os.path.join(runner.out, "baselines.jsonl")
    python = [sys.executable]
    points = ["--points", "1x256x1000,4x256x1000"] if quick else []
    runner.run("baseline floor", python + [os.path.join(scripts, "floor.py"), "--shape", shape, "--out", out] + points)
    runner.run("baseline shared prefix", python + [os.path.join(scripts, "shared_prefix_baseline.py"), "--shape", shape, "--out", out] + points)
    few = ["--points", "1x32x512,4x32x1000"]
    runner.run("baseline Hugging Face", python + [os.path.join(scripts, "hf_baseline.py"), "--shape", shape, "--out", out] + few)
    ours = [path for path in sorted(glob.glob(os.path.join(runner.out, "beamline-*.jsonl"))) if os.path.getsize(path)]
    runner.run("report", python + [os.path.join(scripts, "compare.py"), *ours, out, os.path.join(scripts, "published.jsonl")])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder for results")
    parser.add_argument("--bundle", default=os.path.join(HERE, "bundle.tar.xz"))
    parser.add_argument("--only", default=",".join(STEPS), help=f"steps, of {', '.join(STEPS)}")
    parser.add_argument("--shape", default="qwen3-1.7b")
    parser.add_argument("--rounds", type=int, default=1000, help="mixed batches of the correctness step")
    parser.add_argument("--seconds", type=float, default=3600, help="stop after so long")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    out = os.path.abspath(options.out)
    folder = os.path.join(out, "unpacked")
    os.makedirs(folder, exist_ok=True)
    if not os.path.exists(os.path.join(folder, "bin")):
        with tarfile.open(options.bundle) as tar:
            tar.extractall(folder, filter="data")
    runner = Runner(folder, out, options.seconds)
    runner.summary["libraries"] = {name: any(os.path.exists(os.path.join(place, name)) for place in library_folders()) for name in LIBRARIES}
    steps = options.only.split(",")
    passed = correctness(runner, options.rounds) if "correctness" in steps else True
    if "sanitizer" in steps:
        sanitizer(runner)
    if "serve" in steps:
        serve(runner)
    if not passed:
        runner.note("timing", status="skipped", why="correctness failed: times of wrong answers mean nothing")
    else:
        if "bench" in steps:
            bench(runner, options.quick, options.shape)
        if "baselines" in steps:
            baselines(runner, options.quick, options.shape)
    sys.exit(1 if runner.failed() else 0)


if __name__ == "__main__":
    main()
