"""The physical limit of every point: what has to be computed and read (`counts.py`) at the rates this GPU was measured at.

    python floor.py --shape qwen3-1.7b --batch 1,2,4,8 --beam 256 --context 1000,5000 --out results.jsonl
    python floor.py --tflops 700 --gbps 4000      no measurement, rates as given
    python floor.py --cpu                         smoke test: rates of the CPU, tiny shape

Rates: the best bf16 product over the matrices of the shape with 256 to 32,768 rows and over large squares, each repeated
without pause for --seconds, so that clocks are those of sustained load; the best of reading a large tensor (a sum) and of
copying one. First comes a line with all rates (engine "rates"), then one per point (engine "floor"): the sum over phases
of the longer of arithmetic and memory, which is not always reachable, since attention does not run at the rate of products.
"""
import statistics
import time

import torch

import counts
import sweep
from timing import seconds_of, synchronize


def sustained_seconds(call, device, seconds):
    """Median seconds of a call over repetitions without pause that last `seconds` together. The first fifth warms up."""
    once = seconds_of(call, device, budget=seconds / 10)
    group = max(1, int(seconds / 20 / once))
    samples = []
    for _ in range(20):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(group):
            call()
        synchronize(device)
        samples.append((time.perf_counter() - start) / group)
    return statistics.median(samples[4:])


def matrices(shape):
    """Name -> (inputs, outputs), joined as the engines join them."""
    return {
        "qkv": (shape.hidden, shape.queries + 2 * shape.keys),
        "output": (shape.queries, shape.hidden),
        "gate_up": (shape.hidden, 2 * shape.intermediate),
        "down": (shape.intermediate, shape.hidden),
        "head": (shape.hidden, shape.vocabulary),
    }


def product_rates(shape, row_counts, squares, device, dtype, seconds):
    """Name of a product -> TFLOP/s. Values are normal: those of zeros would draw less power and run faster."""
    sizes = {f"{name} {rows}": (rows, *size) for name, size in matrices(shape).items() for rows in row_counts}
    # Logits of many rows are not made at once by anyone.
    sizes = {name: size for name, size in sizes.items() if size[0] * size[2] <= 1 << 31}
    sizes |= {f"square {n}": (n, n, n) for n in squares}
    rates = {}
    for name, (rows, inputs, outputs) in sizes.items():
        x = torch.randn(rows, inputs, device=device, dtype=dtype)
        weight = torch.randn(outputs, inputs, device=device, dtype=dtype)
        out = torch.empty(rows, outputs, device=device, dtype=dtype)
        seconds_each = sustained_seconds(lambda: torch.mm(x, weight.t(), out=out), device, seconds)
        rates[name] = round(2e-12 * rows * inputs * outputs / seconds_each, 4)
        x = weight = out = None  # gives their memory back before the next are made
    return rates


def bandwidths(size, device, seconds):
    """GB/s: reading `size` bytes (sums), and copying half of that, where both directions count."""
    data = torch.ones(size // 4, device=device, dtype=torch.float32)
    half = data[: len(data) // 2]
    other = data[len(data) - len(half) :]
    return {
        "read": round(1e-9 * 4 * len(data) / sustained_seconds(lambda: data.sum(), device, seconds), 1),
        "copy": round(1e-9 * 8 * len(half) / sustained_seconds(lambda: other.copy_(half), device, seconds), 1),
    }


def floor_line(options, rates, users, beams, context):
    phases = counts.request(options.model, users, beams, context, value_bytes=4 if options.cpu else 2)
    times = [counts.floor_ms(work, rates["tflops"], rates["gbps"]) for work in phases]
    return {
        "engine": "floor",
        "shape": options.shape,
        "batch": users,
        "beam": beams,
        "context": context,
        "levels": options.model.levels,
        "items": None,
        "median_ms": round(sum(times), 4),
        "p90_ms": None,
        "prefill_ms": round(times[0], 4),
        "step_ms": [round(t, 4) for t in times[1:]],
        "peak_bytes": None,
        "torch": torch.__version__,
        "gpu": rates["gpu"],
        "tflops": rates["tflops"],
        "gbps": rates["gbps"],
        "phases": [
            {
                "products": w.products,
                "attention": w.attention,
                "head": w.head,
                "bytes": w.bytes,
                "bound": "arithmetic" if w.operations / (rates["tflops"] * 1e3) > w.bytes / rates["gbps"] else "memory",
            }
            for w in phases
        ],
    }


def main(arguments=None):
    flags = sweep.parser(__doc__)
    flags.add_argument("--tflops", type=float, help="matrix rate, instead of measuring")
    flags.add_argument("--gbps", type=float, help="bandwidth in GB/s, instead of measuring")
    flags.add_argument("--seconds", type=float, default=0.5, help="how long each product is repeated")
    options = sweep.parse(flags, arguments, device_needed=lambda options: not (options.tflops and options.gbps))
    if options.tflops and options.gbps:
        rates = {"gpu": "as given", "tflops": options.tflops, "gbps": options.gbps}
    else:
        device, small = options.device, options.cpu
        dtype = torch.float32 if small else torch.bfloat16
        with torch.inference_mode():
            products = product_rates(options.model, (64,) if small else (256, 512, 1024, 2048, 4096, 8192, 16_384, 32_768),
                                     (256,) if small else (4096, 8192, 16_384), device, dtype, options.seconds)
            memory = bandwidths(1 << 24 if small else 4 << 30, device, options.seconds)
        rates = {"engine": "rates", "shape": options.shape, "gpu": sweep.device_name(device), "torch": torch.__version__,
                 "tflops": options.tflops or max(products.values()), "gbps": options.gbps or max(memory.values()),
                 "best_of_shape_tflops": max(rate for name, rate in products.items() if not name.startswith("square")),
                 "best_square_tflops": max(rate for name, rate in products.items() if name.startswith("square")),
                 "products_tflops": products, "bandwidth_gbps": memory}
        sweep.write_line(options, rates)
    for point in options.grid:
        sweep.write_line(options, floor_line(options, rates, *point))


if __name__ == "__main__":
    main()
