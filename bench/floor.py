"""What this machine could do at best on workloads S and M: matrix rates, memory bandwidth, and the work a request needs.

    python bench/floor.py --out bench/results/floor.json

Needs PyTorch (its CPU build links MKL and oneDNN). For every matrix of the two models and every number of rows that a
step has, each way of multiplying that PyTorch offers is timed, with weights packed beforehand where there is such a
way, and the best rate is kept. Weights rotate over as many copies as the model has layers, as they do when it runs,
so that small matrices do not sit in a core's cache.

The floor of a workload is the sum of its products at those rates, and of its attention at PyTorch's best rate for the
same attention. It counts what has to be computed, no more: in the last layer only rows whose state is wanted go past
keys and values. It leaves out norms, rotations, softmax over the vocabulary, the trie and HTTP.
"""
import argparse
import json
import os
import pathlib
import platform
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

PAGE = 32
LEVELS = 3
TOKENS_PER_ITEM = 5

# The shapes of peers/make_checkpoint.py; `items` is the length of a first visit's history.
WORKLOADS = {
    "S": dict(layers=6, hidden=256, heads=4, kv_heads=2, head_dim=64, ffn=1024, vocab=832, items=64),
    "M": dict(layers=12, hidden=768, heads=12, kv_heads=4, head_dim=64, ffn=2304, vocab=3136, items=128),
}


def matrices(shape):
    """Name -> (inputs, outputs) of a layer's products, and of the output head."""
    q, kv = shape["heads"] * shape["head_dim"], shape["kv_heads"] * shape["head_dim"]
    return {
        "qkv": (shape["hidden"], q + 2 * kv),
        "output": (q, shape["hidden"]),
        "gate_up": (shape["hidden"], 2 * shape["ffn"]),
        "down": (shape["ffn"], shape["hidden"]),
        "head": (shape["hidden"], shape["vocab"]),
    }


def seconds(call, copies, budget):
    """Best of several timings of one call; `call(i)` uses the i-th copy of the weights."""
    for copy in range(min(copies, 2)):
        call(copy)
    # A thread that is put aside for a moment would spoil a single timing.
    once = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        call(0)
        once = min(once, time.perf_counter() - start)
    rounds = max(1, int(budget / 5 / once))
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for index in range(rounds):
            call(index % copies)
        best = min(best, (time.perf_counter() - start) / rounds)
    return best


def multipliers(rows, inputs, outputs, copies):
    """(format, way) -> a call that multiplies with copy i of the weights. Ways this build lacks are left out."""
    x = torch.randn(rows, inputs)
    weights = [torch.randn(outputs, inputs) for _ in range(copies)]
    ways = {("f32", "linear"): lambda i: F.linear(x, weights[i])}

    def attempt(key, make):
        try:
            call = make()
            call(0)
            ways[key] = call
        except (RuntimeError, AttributeError, NotImplementedError, TypeError):
            pass

    def transposed():
        turned = [w.t().contiguous() for w in weights]
        return lambda i: torch.mm(x, turned[i])

    def mkl_packed():
        packed = [torch.ops.mkl._mkl_reorder_linear_weight(w, rows) for w in weights]
        return lambda i: torch.ops.mkl._mkl_linear(x, packed[i], weights[i], None, rows)

    def onednn_packed(dtype):
        def make():
            left = x.to(dtype)
            packed = [torch.ops.mkldnn._reorder_linear_weight(w.to(dtype), rows) for w in weights]
            return lambda i: torch.ops.mkldnn._linear_pointwise(left, packed[i], None, "none", [], "")
        return make

    def bf16():
        left, right = x.bfloat16(), [w.bfloat16() for w in weights]
        return lambda i: F.linear(left, right[i])

    def int8_mm():
        left = torch.randint(-127, 127, (rows, inputs), dtype=torch.int8)
        right = [torch.randint(-127, 127, (inputs, outputs), dtype=torch.int8) for _ in range(copies)]
        return lambda i: torch._int_mm(left, right[i])

    def int8_onednn():
        left = torch.randint(0, 255, (rows, inputs), dtype=torch.uint8)
        scales, zeros = torch.full((outputs,), 0.01), torch.zeros(outputs, dtype=torch.int64)
        packed = [
            torch.ops.onednn.qlinear_prepack(torch.randint(-127, 127, (outputs, inputs), dtype=torch.int8), [rows, inputs])
            for _ in range(copies)
        ]
        return lambda i: torch.ops.onednn.qlinear_pointwise(
            left, 0.02, 128, packed[i], scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )

    attempt(("f32", "mm, transposed weights"), transposed)
    attempt(("f32", "MKL, packed weights"), mkl_packed)
    attempt(("f32", "oneDNN, packed weights"), onednn_packed(torch.float32))
    attempt(("bf16", "linear"), bf16)
    attempt(("bf16", "oneDNN, packed weights"), onednn_packed(torch.bfloat16))
    attempt(("int8", "_int_mm"), int8_mm)
    attempt(("int8", "oneDNN, packed weights"), int8_onednn)
    return ways


def matrix_rates(rows, inputs, outputs, copies, budget):
    """format -> {"gflops", "way", "all"}."""
    best = {}
    for (kind, way), call in multipliers(rows, inputs, outputs, copies).items():
        rate = 2 * rows * inputs * outputs / seconds(call, copies, budget) / 1e9
        entry = best.setdefault(kind, {"gflops": 0.0, "way": "", "all": {}})
        entry["all"][way] = round(rate, 2)
        if rate > entry["gflops"]:
            entry["gflops"], entry["way"] = round(rate, 2), way
    return best


def attention_seconds(shape, rows, seen, causal, budget):
    """Best time of PyTorch's attention for one layer, f32 and bf16. Causal: `rows` new rows at the end of `seen`."""
    heads, kv, dim = shape["heads"], shape["kv_heads"], shape["head_dim"]
    times = {}
    for kind, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):
        q = torch.randn(1, heads, rows, dim, dtype=dtype)
        k, v = (torch.randn(1, kv, seen, dim, dtype=dtype).repeat_interleave(heads // kv, 1) for _ in range(2))
        square = causal and rows == seen
        mask = torch.ones(rows, seen, dtype=torch.bool).tril(seen - rows) if causal and not square else None

        def call(_):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=square)

        times[kind] = seconds(call, 1, budget)
    return times


def bandwidth():
    """GB/s with all threads: sums of one large array (memory), and of one that fits the last-level cache."""
    result = {}
    for name, mib in (("read_512_MiB", 512), ("read_25_MiB", 25), ("read_350_MiB", 350)):
        data = torch.ones(mib << 18)
        result[name] = round((mib << 20) / seconds(lambda _: data.sum(), 1, 0.5) / 1e9, 1)
    source, target = torch.ones(256 << 18), torch.empty(256 << 18)
    result["copy_256_MiB_read_plus_write"] = round(2 * (256 << 20) / seconds(lambda _: target.copy_(source), 1, 0.5) / 1e9, 1)
    return result


def steps(shape, visit, beams):
    """The passes of one request: (new context rows, rows already cached, branch rows, wanted rows)."""
    first = TOKENS_PER_ITEM * shape["items"] + 1
    if visit == "cold":
        context, cached = first, 0
    else:
        # Four new items; whole pages of the first visit are found again.
        context, cached = first + 4 * TOKENS_PER_ITEM, first // PAGE * PAGE
    return context, [(context - cached, cached, 0, 1)] + [(0, context, beams, beams)] * (LEVELS - 1)


def work(shape, visit, beams):
    """Products (name, rows, times), attention (rows, seen, causal, times), FLOPs and bytes of one request."""
    context, passes = steps(shape, visit, beams)
    layers, q, kv = shape["layers"], shape["heads"] * shape["head_dim"], shape["kv_heads"] * shape["head_dim"]
    products, attention, attention_flops, kv_bytes = [], [], 0, 0
    for depth, (new, cached, branch, wanted) in enumerate(passes):
        rows = new + branch
        products.append(("qkv", rows, layers))
        for name in ("output", "gate_up", "down"):
            products.append((name, rows, layers - 1))
            products.append((name, wanted, 1))
        products.append(("head", wanted, 1))
        if new:
            visible = sum(range(cached + 1, cached + new + 1))
            attention_flops += 4 * q * (visible * (layers - 1) + context)
            attention.append((new, cached + new, True, layers - 1))
        else:
            attention_flops += 4 * q * rows * (context + depth) * layers
            attention.append((rows, context + depth, False, layers))
        kv_bytes += 4 * 2 * kv * layers * (rows + (context if branch or cached else 0))
    named = matrices(shape)
    linear_flops = sum(2 * rows * named[name][0] * named[name][1] * times for name, rows, times in products)
    weights = sum(i * o * (layers if name != "head" else 1) for name, (i, o) in named.items())
    return dict(context_tokens=context, products=products, attention=attention, linear_mflop=round(linear_flops / 1e6, 1),
                attention_mflop=round(attention_flops / 1e6, 1), kv_mb=round(kv_bytes / 1e6, 2),
                weight_values=weights, weight_mb_f32=round(4 * weights * len(passes) / 1e6, 1))


def machine():
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()

    def field(name):
        return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "?")

    wanted = (
        "avx2",
        "fma",
        "avx512f",
        "avx512_vnni",
        "avx512_bf16",
        "avx512_fp16",
        "avx_vnni",
        "amx_tile",
        "amx_bf16",
        "amx_int8",
    )
    flags = field("flags").split()
    return dict(cpu=field("model name"), cores=os.cpu_count(), flags=[flag for flag in wanted if flag in flags],
                kernel=platform.release(), python=platform.python_version(), torch=torch.__version__)


def commit():
    try:
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
                              cwd=pathlib.Path(__file__).parent)
        return done.stdout.strip()
    except OSError:
        return ""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="bench/results/floor.json")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workloads", default="S,M")
    parser.add_argument("--beams", default="32,128")
    parser.add_argument("--budget", type=float, default=0.04, help="seconds for each way of a product")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    budget = arguments.budget
    report = dict(command=" ".join(["python", *sys.argv]), commit=commit(), machine=machine(), threads=arguments.threads,
                  bandwidth_gb_s=bandwidth(), large_gflops={}, matrices={}, attention={}, workloads={})
    with torch.inference_mode():
        report["large_gflops"] = matrix_rates(2048, 2048, 2048, 1, 0.5)
        for workload in arguments.workloads.split(","):
            shape = WORKLOADS[workload]
            rates, attended = {}, {}
            for visit in ("cold", "warm"):
                for beams in map(int, arguments.beams.split(",")):
                    need = work(shape, visit, beams)
                    floor = dict.fromkeys(("f32", "bf16", "int8"), 0.0)
                    for name, rows, times in need["products"]:
                        key = f"{name} {rows}"
                        inputs, outputs = matrices(shape)[name]
                        if key not in rates:
                            copies = shape["layers"] if name != "head" else 1
                            rates[key] = dict(rows=rows, inputs=inputs, outputs=outputs,
                                              best=matrix_rates(rows, inputs, outputs, copies, budget))
                        for kind in floor:
                            # A format that cannot be timed falls back on the next wider one.
                            best = rates[key]["best"]
                            rate = max(
                                best[k]["gflops"]
                                for k in best
                                if k in ("f32", "bf16", "int8")[: ("f32", "bf16", "int8").index(kind) + 1]
                            )
                            floor[kind] += times * 2e-6 * rows * inputs * outputs / rate
                    attention_ms = 0.0
                    for rows, seen, causal, times in need["attention"]:
                        key = f"{rows} rows see {seen}{' causally' if causal else ''}"
                        if key not in attended:
                            attended[key] = {
                                kind: round(1e3 * t, 4)
                                for kind, t in attention_seconds(shape, rows, seen, causal, budget).items()
                            }
                        attention_ms += times * attended[key]["f32"]
                    need["floor_ms"] = {kind: round(ms + attention_ms, 3) for kind, ms in floor.items()}
                    need["products_ms"] = {kind: round(ms, 3) for kind, ms in floor.items()}
                    need["attention_ms"] = round(attention_ms, 3)
                    report["workloads"][f"{workload} {visit}, {beams} beams"] = need
            report["matrices"][workload] = rates
            report["attention"][workload] = attended
    out = pathlib.Path(arguments.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({name: value["floor_ms"] for name, value in report["workloads"].items()}, indent=1))
    print(json.dumps(report["bandwidth_gb_s"]), json.dumps({k: v["gflops"] for k, v in report["large_gflops"].items()}))


if __name__ == "__main__":
    main()
