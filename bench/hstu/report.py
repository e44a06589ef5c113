"""Ratios, and the tables they go into."""
import importlib.metadata
import os
import pathlib
import platform
import subprocess

import numpy as np
import torch

from shapes import TARGETS


def summary(case, worst, floors, candidates):
    times = case.result()
    own = ("cold", "warm", "recomputed")
    everything = {name: t["median_ms"] for name, t in times.items() if name not in own and "cached" not in name}
    whole = {name: took for name, took in everything.items() if name.startswith("torch")}
    fastest = min(everything, key=everything.get)
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
    if "openvino" in times:
        ratio["cold_against_openvino"] = round(times["openvino"]["median_ms"] / recomputed, 2)
        ratio["cold_against_fastest"] = round(everything[fastest] / recomputed, 2)
    found = {"times": times, "fastest": fastest, "best_torch": best, "best_torch_cached": best_cached, "ratios": ratio,
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
                *(f"{at[way]['median_ms']:.1f}" if way in at else ""
                  for way in ("torch plain", "torch tuned", "torch compiled", "openvino")),
                f"{at[case['best_torch_cached']]['median_ms']:.2f}",
                f"{floors['recomputed']['floor_ms']:.1f}", f"{floors['warm']['floor_ms']:.2f}"]

    def ratios(case):
        return [
            f"{case['ratios'][key]:.2f}" if key in case["ratios"] else ""
            for key in (
                "warm_against_own_recomputing",
                "cold_against_torch_plain",
                "warm_against_torch_plain",
                "cold_against_torch",
                "warm_against_torch_recomputing",
                "warm_against_torch_cached",
                "cold_against_openvino",
                "floor_cold_against_torch",
                "floor_warm_against_torch",
            )
        ]

    def rates(case):
        found = case.get("candidates_per_second")
        return found and [f"{found[key]:,}" for key in found]

    lines = [
        "# HSTU: serving against PyTorch",
        "",
        f"`{results['command']}`: {results['machine']['cpu']}, {results['threads']} threads each, PyTorch "
        f"{results['machine']['torch']}. Medians of {results['repetitions']}, ms. Cold and warm visits have the same history; "
        "warm, all but its last 5 events were seen in an earlier visit. Beamline's times are a client's, HTTP included; "
        'PyTorch\'s are the model\'s alone. "Best" is the fastest of its ways that recompute everything; OpenVINO runs the plain way, converted for the shape of the case; "cached" keeps '
        f"keys and values of one user. Floors count the work of the model at {results['floor_gflops']:.0f} GFLOP/s, what a large product reached in this run.",
    ]
    lines += rows(
        [
            "ms",
            "beamline cold",
            "beamline warm",
            "PyTorch plain",
            "tuned",
            "compiled",
            "OpenVINO",
            "PyTorch cached",
            "floor cold",
            "floor warm",
        ],
        times,
    )
    lines += rows(["times faster", "warm than own cold", "cold than plain", "warm than plain", "cold than best", "warm than best",
                   "warm than cached", "cold than OpenVINO", "floor cold than best", "floor warm than best"], ratios)
    lines += rows(
        ["candidates per second", "beamline cold", "beamline warm", "PyTorch best", "PyTorch cached", "PyTorch plain"], rates
    )
    return "\n".join(lines) + "\n"


def machine():
    cpu = pathlib.Path("/proc/cpuinfo").read_text()
    name = next(line.split(":", 1)[1].strip() for line in cpu.splitlines() if line.startswith("model name"))
    return {"cpu": name, "cores": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version(),
            "torch": torch.__version__, "numpy": np.__version__, "openvino": version("openvino")}


def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit():
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=pathlib.Path(__file__).parent
    )
    return found.stdout.strip() or None
