#!/usr/bin/env python3
"""Checks and times beamline on this machine's GPU: run.py --out FOLDER [--quick] [--only STEP,..] [--seconds N]
Or goes through the same steps without a GPU: run.py --out FOLDER --rehearse FOLDER-OF-THE-STAND-IN

Place in the flow: `cargo xtask gpu` packs binaries, fixtures, baselines and this script; here they run, correctness first: if
that fails, nothing is timed. Needs a driver, the CUDA 13 libraries and python3; for floor and baselines, PyTorch (they are
skipped, and said to be, without).

    correctness   every conformance case on the GPU, answers in mixed batches (BEAMLINE_ROUNDS, 1000), pages to the host and back;
                  HSTU's fixtures, and its requests against the CPU's
    sanitizer     the same under compute-sanitizer, memcheck and racecheck, if it is installed
    serve         the real binary answers a file of requests, and requests over HTTP, on the GPU as on the CPU
    bench         gpu_bench: floor, points, reuse, host, profile, beams, load, expansion; the server on random weights over HTTP
    baselines     floor.py, shared_prefix_baseline.py, hf_baseline.py
    report        compare.py

Writes FOLDER/summary.json (what passed, what was skipped and why, seconds) and one log per step. Steps go on after one
that failed, except that nothing is timed after a failed correctness. The exit status is 1 if any step failed.

A rehearsal (`cargo xtask gpu --rehearse`) puts a stand-in in the place of driver and GPU, takes a tiny shape, few beams and one
round, and leaves out what needs a GPU in any case: sanitizer and baselines. It shows that everything starts, runs and fits
together; it is no GPU, and no time in its results means anything. Everything it writes says so."""

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
STEPS = ["correctness", "sanitizer", "serve", "bench", "baselines", "report"]
# What a rehearsal takes: of the beams of the conformance cases every so manieth, and the sizes of gpu_bench.
REHEARSED_BEAMS = 29
REHEARSED_BENCH = ["--shape", "tiny", "--items", "300", "--repetitions", "2", "--quick"]
# What is checked before anything is timed.
CHECKS = {"correctness": "cuda", "correctness, HSTU": "cuda_hstu", "correctness, requests of HSTU": "cuda_hstu_requests"}
REHEARSAL = "a rehearsal: a stand-in took the place of driver and GPU, and no time here means anything"
LIBRARIES = ["libcublas.so.13", "libcublasLt.so.13"]


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
    def __init__(self, folder, out, seconds, stand_in):
        self.folder, self.out, self.until, self.rehearses = folder, out, time.time() + seconds, stand_in is not None
        self.summary = {"steps": {}, "command": " ".join(sys.argv)}
        if self.rehearses:
            self.summary["rehearsal"] = REHEARSAL
        self.environment = dict(os.environ)
        # What somebody named comes before what was found.
        named = [path for path in os.environ.get("LD_LIBRARY_PATH", "").split(":") if path]
        paths = [os.path.abspath(stand_in)] if self.rehearses else named + library_folders()
        self.environment["LD_LIBRARY_PATH"] = ":".join(paths)

    def binary(self, name):
        return os.path.join(self.folder, "bin", name)

    def note(self, step, **what):
        self.summary["steps"][step] = what
        with open(os.path.join(self.out, "summary.json"), "w", encoding="utf-8") as file:
            json.dump(self.summary, file, indent=1)
        print(step, what, flush=True)

    def run(self, step, command, output=None, **environment):
        """Runs a command with what time is left, its output in a log or a file of that name; says whether it succeeded."""
        left = self.until - time.time()
        if left < 5:
            self.note(step, status="skipped", why="no time left")
            return False
        start, log = time.time(), os.path.join(self.out, step.replace(",", "").replace(" ", "-") + ".log")
        try:
            with open(log, "wb") as file, open(output or os.devnull, "wb") as results:
                done = subprocess.run(
                    command,
                    stdout=results if output else file,
                    stderr=subprocess.STDOUT if not output else file,
                    env={**self.environment, **environment},
                    cwd=self.folder,
                    timeout=left,
                    check=False,
                )
            status, why = ("passed", None) if done.returncode == 0 else ("failed", f"exit status {done.returncode}")
        except subprocess.TimeoutExpired:
            status, why = "failed", "ran out of time"
        except OSError as error:
            status, why = "failed", str(error)
        with open(log, "rb") as file:
            tail = file.read()[-1500:].decode(errors="replace")
        # How long a rehearsal took is nobody's time but its own.
        what = {"status": status, "rehearsal_seconds" if self.rehearses else "seconds": round(time.time() - start, 1)}
        self.note(step, **what, **({"why": why, "tail": tail} if why else {}))
        return status == "passed"

    def failed(self):
        return any(what["status"] == "failed" for what in self.summary["steps"].values())


def correctness(runner, rounds):
    fixtures = os.path.join(runner.folder, "fixtures")
    few = {"BEAMLINE_EVERY": str(REHEARSED_BEAMS)} if runner.rehearses else {}
    passed = [runner.run(step, [runner.binary(binary), "--test-threads", "1", "--nocapture"], BEAMLINE_GPU="0",
                         BEAMLINE_FIXTURES=fixtures, BEAMLINE_ROUNDS=str(rounds), **few) for step, binary in CHECKS.items()]
    return all(passed)


def sanitizer(runner):
    tool = shutil.which("compute-sanitizer") or next(iter(glob.glob("/usr/local/cuda*/bin/compute-sanitizer")), None)
    if tool is None:
        runner.note("sanitizer", status="skipped", why="compute-sanitizer is not installed")
        return
    fixtures = os.path.join(runner.folder, "fixtures")
    for kind in ("memcheck", "racecheck"):
        for step, binary in CHECKS.items():
            runner.run(step.replace("correctness", f"sanitizer {kind}"),
                       [tool, "--tool", kind, "--error-exitcode", "9", runner.binary(binary), "--test-threads", "1"],
                       BEAMLINE_GPU="0", BEAMLINE_FIXTURES=fixtures, BEAMLINE_ROUNDS="1")


def bench(runner, quick, shape):
    command = [runner.binary("gpu_bench"), "measure"]
    command += (
        ["--shape", shape] + (["--quick", "--repetitions", "10"] if quick else []) if not runner.rehearses else REHEARSED_BENCH
    )
    for section in ("floor", "points", "reuse", "host", "profile", "beams", "load", "expansion"):
        out = os.path.join(runner.out, f"beamline-{section}.jsonl")
        runner.run(f"bench {section}", command + ["--sections", section, "--out", out])
    # What belongs to this script lies in the bundle, and was put on the path.
    import serving
    serving.timed(runner, *(("tiny", 300, 120) if runner.rehearses else (shape, 1_500_000, 3000)))


def baselines(runner, quick, shape):
    try:
        import torch
    except ImportError:
        runner.note("baselines", status="skipped", why="no PyTorch")
        return
    if runner.rehearses or not torch.cuda.is_available():
        runner.note("baselines", status="skipped", why="PyTorch sees no GPU")
        return
    scripts = os.path.join(runner.folder, "bench")
    out = os.path.join(runner.out, "baselines.jsonl")
    python = [sys.executable]
    points = ["--points", "1x256x1000,4x256x1000"] if quick else []
    runner.run("baseline floor", python + [os.path.join(scripts, "floor.py"), "--shape", shape, "--out", out] + points)
    runner.run(
        "baseline shared prefix",
        python + [os.path.join(scripts, "shared_prefix_baseline.py"), "--shape", shape, "--out", out] + points,
    )
    few = ["--points", "1x32x512,4x32x1000"]
    runner.run("baseline Hugging Face", python + [os.path.join(scripts, "hf_baseline.py"), "--shape", shape, "--out", out] + few)


def report(runner):
    scripts = os.path.join(runner.folder, "bench")
    found = sorted(glob.glob(os.path.join(runner.out, "beamline-*.jsonl"))) + [os.path.join(runner.out, "baselines.jsonl")]
    lines = [path for path in found if os.path.exists(path) and os.path.getsize(path)]
    if not lines:
        runner.note("report", status="skipped", why="nothing was measured")
        return
    command = [sys.executable, os.path.join(scripts, "compare.py"), *lines, os.path.join(scripts, "published.jsonl")]
    runner.run("report", command, output=os.path.join(runner.out, "report.md"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder for results")
    parser.add_argument("--bundle", default=os.path.join(HERE, "bundle.tar.xz"))
    parser.add_argument("--only", default=",".join(STEPS), help=f"steps, of {', '.join(STEPS)}")
    parser.add_argument("--shape", default="qwen3-1.7b")
    parser.add_argument("--rounds", type=int, default=1000, help="mixed batches of the correctness step")
    parser.add_argument("--seconds", type=float, default=3600, help="stop after so long")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rehearse", metavar="FOLDER", help="folder of the stand-in for driver and GPU")
    options = parser.parse_args()
    rounds = 1 if options.rehearse else options.rounds
    out = os.path.abspath(options.out)
    folder = os.path.join(out, "unpacked")
    os.makedirs(folder, exist_ok=True)
    if not os.path.exists(os.path.join(folder, "bin")):
        with tarfile.open(options.bundle) as tar:
            tar.extractall(folder, filter="data")
    # What belongs to this script lies in the bundle.
    sys.path.insert(0, os.path.join(folder, "bench"))
    import serving
    runner = Runner(folder, out, options.seconds, options.rehearse)
    runner.summary["libraries"] = {
        name: any(os.path.exists(os.path.join(place, name)) for place in library_folders()) for name in LIBRARIES
    }
    steps = options.only.split(",")
    passed = correctness(runner, rounds) if "correctness" in steps else True
    if "sanitizer" in steps and not options.rehearse:
        sanitizer(runner)
    if "serve" in steps:
        serving.check(runner)
    if not passed:
        runner.note("timing", status="skipped", why="correctness failed: times of wrong answers mean nothing")
    else:
        if "bench" in steps:
            bench(runner, options.quick, options.shape)
        if "baselines" in steps:
            baselines(runner, options.quick, options.shape)
        if "report" in steps:
            report(runner)
    sys.exit(1 if runner.failed() else 0)


if __name__ == "__main__":
    main()
