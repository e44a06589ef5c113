"""Time on a device that works behind the host's back.

A `Marks` notes moments within one request without waiting for the device; `measure` runs a request often enough and
returns medians. End-to-end times are the host's, between two synchronisations; phases are the device's own (CUDA events).
"""
import statistics
import time

import torch


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Marks:
    """Moments of one request, in order."""

    def __init__(self, device):
        self.device, self.moments = device, []

    def mark(self):
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.moments.append(event)
        else:
            self.moments.append(time.perf_counter())

    def phases_ms(self):
        """Milliseconds between neighbouring marks. The device must have been waited for."""
        pairs = zip(self.moments, self.moments[1:])
        if self.device.type == "cuda":
            return [one.elapsed_time(other) for one, other in pairs]
        return [1e3 * (other - one) for one, other in pairs]


def seconds_of(call, device, budget=0.02):
    """Median seconds of a call, several back to back. For choosing between ways, and for rates."""
    call()
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    repeats = max(1, int(budget / 5 / max(1e-7, time.perf_counter() - start)))
    samples = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        synchronize(device)
        samples.append((time.perf_counter() - start) / repeats)
    return statistics.median(samples)


def percentile(values, share):
    """The smallest value that at least this share of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


def measure(run, device, warmup=3, least=5, most=50, budget=3.0):
    """run(index, marks) serves one request. Returns median_ms, p90_ms, prefill_ms, step_ms, runs.

    Runs until `budget` seconds are spent, but at least `least` and at most `most` times, after `warmup` runs.
    """
    for index in range(warmup):
        run(index, Marks(device))
    whole, phases, began = [], [], time.perf_counter()
    while len(whole) < least or (len(whole) < most and time.perf_counter() - began < budget):
        marks = Marks(device)
        synchronize(device)
        start = time.perf_counter()
        run(warmup + len(whole), marks)
        synchronize(device)
        whole.append(1e3 * (time.perf_counter() - start))
        phases.append(marks.phases_ms())
    medians = [round(statistics.median(column), 4) for column in zip(*phases)]
    return {
        "median_ms": round(statistics.median(whole), 4),
        "p90_ms": round(percentile(whole, 0.9), 4),
        "prefill_ms": medians[0],
        "step_ms": medians[1:],
        "runs": len(whole),
    }
