"""report: one HTML page that can be mailed, archived and opened in ten years: no script, no link to anything, light or dark as
the reader likes.

Takes the JSON files of `evaluate` (the first is the subject, the others stand beside it), of `compare` and of `replay`, and the
list of beam widths that `run` writes.

  beamline-eval report metrics.json popularity.json co-occurrence.json --comparison comparison.json --out report.html
"""

import html
import os
import shlex
import sys

from beamline_eval import __version__, svg
from beamline_eval.errors import EvalError
from beamline_eval.files import read_json, short, writing
from beamline_eval.replay import FORMAT as REPLAY
from beamline_eval.replay import PASSED_OVER, describe

HELP = "one self-contained HTML page"

STYLE = """
:root{color-scheme:light dark;--bg:#fbfaf8;--fg:#1d1d1f;--dim:#5c5f66;--line:#d9d7d2;--card:#fff;--s0:#1c5cab;--s1:#b4610a;--s2:#2f7d4f;--s3:#8a4fa8;--s4:#a8324a;--s5:#5f6b76}
@media(prefers-color-scheme:dark){:root{--bg:#15171a;--fg:#e8e6e1;--dim:#a0a4ab;--line:#363a40;--card:#1c1f23;--s0:#6ea8f0;--s1:#e79a4b;--s2:#6cc28f;--s3:#c493de;--s4:#ec8297;--s5:#9aa7b3}}
*{box-sizing:border-box}body{margin:0 auto;max-width:64rem;padding:2rem 1.25rem 4rem;background:var(--bg);color:var(--fg);font:16px/1.55 system-ui,sans-serif}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 .4rem}h2{font-size:1.2rem;margin:2.6rem 0 .6rem}p{max-width:46rem}.dim,.legend,figcaption{color:var(--dim)}
.scroll{overflow-x:auto}.caption{color:var(--dim);margin:1rem 0 .4rem}code{overflow-wrap:anywhere}table{border-collapse:collapse;font-size:.92rem;font-variant-numeric:tabular-nums;width:100%}
th,td{padding:.35rem .5rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}thead th{white-space:normal;vertical-align:bottom}th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:var(--bg)}thead th{font-weight:600}
tr.subject td{font-weight:650}.warning{border-left:4px solid var(--s4);background:var(--card);padding:.7rem 1rem;margin:1rem 0;max-width:46rem}.warning ul{margin:.3rem 0 0;padding-left:1.2rem}figure{margin:1rem 0;background:var(--card);border:1px solid var(--line);border-radius:8px;padding:1rem;overflow-x:auto}svg{width:100%;min-width:26rem;height:auto;display:block}
svg text{fill:var(--dim);paint-order:stroke;stroke:var(--card);stroke-width:4px;font:12px system-ui,sans-serif}.grid{stroke:var(--line)}.curve{fill:none;stroke:var(--s0);stroke-width:2}.dot{fill:var(--s0)}
.s0{fill:var(--s0);background:var(--s0)}.s1{fill:var(--s1);background:var(--s1)}.s2{fill:var(--s2);background:var(--s2)}.s3{fill:var(--s3);background:var(--s3)}.s4{fill:var(--s4);background:var(--s4)}.s5{fill:var(--s5);background:var(--s5)}
.legend{margin:.6rem 0 0}.legend span{display:inline-block;margin-right:1.2rem}.legend i{display:inline-block;width:.8em;height:.8em;margin-right:.4em;border-radius:2px}
pre,code{font:13px/1.5 ui-monospace,monospace}pre{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.8rem 1rem;overflow-x:auto}
.head{display:flex;flex-wrap:wrap;gap:.6rem 2.4rem;margin:1.2rem 0}.head div b{display:block;font-size:1.5rem;line-height:1.2}
"""


def add_arguments(parser):
    parser.add_argument("metrics", nargs="+", help="JSON files of `evaluate`; the first is the subject of the page")
    parser.add_argument("--comparison", action="append", default=[], help="JSON of `compare` (repeatable)")
    parser.add_argument("--replay", action="append", default=[], help="JSON of `replay` (repeatable)")
    parser.add_argument("--frontier", help="JSON list of beam widths with quality and latency, as `run` writes")
    parser.add_argument(
        "--price-per-hour", type=float, help="price of the machine per hour, in any currency: adds cost per million requests"
    )
    parser.add_argument("--currency", default="USD", help="name of that currency (default %(default)s)")
    parser.add_argument("--title", default="Offline evaluation")
    parser.add_argument("--out", required=True, help="the page")


def cell(value):
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4f}"
    return html.escape(f"{value:,}" if isinstance(value, int) else str(value))


def table(head, rows, caption="", subject=None):
    """`rows` of values; row number `subject` is set off."""
    body = "".join(
        f"<tr{' class=subject' if place == subject else ''}>" + "".join(f"<td>{cell(value)}</td>" for value in row) + "</tr>"
        for place, row in enumerate(rows)
    )
    titles = "".join(f"<th scope=col>{html.escape(name)}</th>" for name in head)
    # Above the table and not a caption of it: a wide table scrolls, and its description must not.
    above = f"<p class=caption>{html.escape(caption)}</p>" if caption else ""
    return f"{above}<div class=scroll><table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>"


def deepest(result, wanted=10):
    """The cut-off at which the page compares: 10 if it was measured."""
    return wanted if wanted in result["cut_offs"] else max(result["cut_offs"])


def protocol_sentence(result):
    p = result["protocol"]
    split = {
        "leave-one-out": f"leave-one-out, {p.get('part')} target",
        "temporal": f"temporal split at {p.get('cut')}, target {p.get('targets')}",
        "given": "split as given by the source",
    }[p["split"]]
    seen = (
        "items of the history are excluded from the slate"
        if p["exclude_seen"]
        else "items of the history may be recommended again"
    )
    sampled = f" {result['users']:,} of {p['questions']:,} questions." if result["sampled"] else ""
    return (
        f"Full ranking over {result['catalog_items']:,} items; {split}; {seen}; {p['targets_in_history']:,} of {p['questions']:,} targets are in their own "
        f"history. Users without an answer count as misses.{sampled}"
    )


# What each measure says, for the line above its table.
MEANINGS = {
    "HR": "HR, the share of users whose target is among the first places",
    "NDCG": "NDCG, which counts a hit more the higher it stands",
    "MRR": "MRR, the mean of 1 / rank of the target",
}


def quality(results):
    cuts = [k for k in results[0]["cut_offs"] if all(k in other["cut_offs"] for other in results)] or [
        min(results[0]["cut_offs"])
    ]
    parts = [unanswered(results)]
    # A table a measure, so that each fits on a phone and none hides behind a scroll bar.
    for name, meaning in MEANINGS.items():
        rows = [[r["name"], *[r["metrics"].get(f"{name}@{k}") for k in cuts]] for r in results]
        parts.append(table(["", *[f"{name}@{k}" for k in cuts]], rows, f"{meaning}: means over users", 0))
    return "".join(parts)


def unanswered(results):
    """What pulls the means down without being the model's opinion, said before them."""
    parts = []
    for r in results:
        errors, types = r["run_notes"].get("errors", 0), r["run_notes"].get("error_types", {})
        if errors or r["users_without_answer"]:
            kinds = ", ".join(f"{count:,} {name}" for name, count in sorted(types.items()))
            parts.append(
                f"<li>{html.escape(r['name'])}: {r['users_without_answer']:,} users without an answer, {errors:,} errors{html.escape(f' ({kinds})' if kinds else '')}</li>"
            )
    return (
        f"<div class=warning><b>Some users got no slate and count as misses.</b><ul>{''.join(parts)}</ul></div>" if parts else ""
    )


def beyond(results):
    k = deepest(results[0])
    names = [
        ("coverage", "coverage"),
        ("gini", "Gini"),
        ("novelty_bits", "novelty, bits"),
        ("valid_share", "valid items"),
        ("full_slates", "full slates"),
        ("seen_share", "seen before"),
    ]
    rows = [[r["name"], *[r["metrics"].get(f"{key}@{k}") for key, _ in names]] for r in results]
    return table(["", *[label for _, label in names]], rows, f"First {k} places", 0)


def by_history(results):
    k = deepest(results[0])
    key = f"NDCG@{k}"
    labels = [bucket["bucket"] for bucket in results[0]["by_history_length"]]
    found = [{bucket["bucket"]: bucket for bucket in r["by_history_length"]} for r in results]
    groups = [(label, [buckets.get(label, {}).get(key, 0.0) for buckets in found]) for label in labels]
    picture = svg.bars(groups, [r["name"] for r in results], "items in the history", key, f"{key} by history length")
    rows = []
    for label in labels:
        first = found[0][label]
        rows.append(
            [
                label,
                first["users"],
                *[buckets.get(label, {}).get(key) for buckets in found],
                first.get(f"HR@{k}"),
                first.get(f"coverage@{k}"),
                first.get(f"novelty_bits@{k}"),
                first.get(f"valid_share@{k}"),
            ]
        )
    subject = results[0]["name"]
    head = [
        "history",
        "users",
        *[f"{key}: {r['name']}" for r in results],
        f"HR@{k}: {subject}",
        "coverage",
        "novelty, bits",
        "valid items",
    ]
    return f"<figure>{picture}</figure>" + table(head, rows)


def per_million(timing, price):
    """Cost of a million requests if the machine does nothing else."""
    speed = timing.get("users_per_second")
    return None if not price or not speed else f"{price / 3600 / speed * 1e6:.2f}"


def speed(results, price, currency):
    timed = [r for r in results if r.get("timing")]
    if not timed:
        return ""
    rows = []
    for r in timed:
        t, late = r["timing"], r["timing"].get("latency_ms", {})
        rows.append(
            [
                r["name"],
                t.get("beam_width"),
                t.get("threads"),
                *[None if late.get(p) is None else f"{late[p]:.1f}" for p in ("p50", "p90", "p99")],
                None if not t.get("users_per_second") else f"{t['users_per_second']:.1f}",
                None if t.get("cpu_s") is None else f"{1000 * t['cpu_s'] / t['requests']:.2f}",
                per_million(t, price),
            ]
        )
    cost = f"{currency} per million" if price else "cost (no price given)"
    head = ["", "beam", "threads", "p50 ms", "p90 ms", "p99 ms", "requests/s", "CPU ms/request", cost]
    note = "Latency is one request at a time and nothing cached; requests/s is the whole file at once, start included."
    return (
        "<h2>Latency and cost</h2>"
        + table(head, rows, note + (f" Machine at {price:g} {currency} an hour, fully used." if price else ""), 0)
        + busy([r["timing"] for r in timed])
    )


def busy(timings):
    """A warning where the clock was not to be trusted."""
    loaded = [t for t in timings if t.get("cores") and t.get("load_average_before", 0) > 0.5 * t["cores"]]
    if not loaded:
        return ""
    worst = max(t["load_average_before"] for t in loaded)
    return (
        f"<p class=warning><b>The machine was busy with other work</b> (load {worst:.1f} on {loaded[0]['cores']} cores before a measurement): latencies and requests/s are too pessimistic "
        "and not comparable with each other; CPU time per request is steadier.</p>"
    )


def frontier_part(points, price, currency):
    if not points:
        return ""
    key = points[0]["measure"]
    marks = [
        (
            p["latency_ms"]["p50"],
            p[key],
            f"beam {p['beam_width']}",
            f"beam {p['beam_width']}: {key} {p[key]:.4f}, {p['latency_ms']['p50']:.2f} ms",
        )
        for p in points
    ]
    rows = [
        [
            p["beam_width"],
            p["users"],
            p["HR"],
            p[key],
            f"{p['latency_ms']['p50']:.2f}",
            f"{p['latency_ms']['p99']:.2f}",
            f"{p['users_per_second']:.1f}",
            f"{p['cpu_ms_per_request']:.2f}",
            per_million(p, price),
        ]
        for p in points
    ]
    k = key.split("@")[1]
    cost = f"{currency} per million" if price else "cost (no price given)"
    return (
        "<h2>Quality against latency</h2><p>Each point is a beam width, over the same users. To the upper left is better; where the curve is flat, a wider beam only costs.</p>"
        f"<figure>{svg.curve(marks, 'median latency of one request, ms', key, key + ' against latency')}</figure>"
        + table(["beam", "users", f"HR@{k}", key, "p50 ms", "p99 ms", "requests/s", "CPU ms/request", cost], rows)
        + busy(points)
    )


AGREEMENT = {
    "overlap": "{:.1%} of the first {} places hold items of both",
    "rbo_0.9": "rank-biased overlap of the first {1} is {0:.3f} (p = 0.9; 1: the same order)",
    "identical_slates": "{:.1%} of users see the same first {}",
}


def alike(agreement):
    """The agreement of two runs in words."""
    parts = []
    for key, value in agreement.items():
        name, _, depth = key.partition("@")
        parts.append(AGREEMENT[name].format(value, depth) if name in AGREEMENT else f"{key} {value:.3f}")
    return "; ".join(parts)


def comparison_part(found):
    if not found:
        return ""
    parts = [
        "<h2>Is the difference real?</h2><p>Differences are paired by user. The interval is a bootstrap over users, p a randomisation test, and the last p is adjusted for "
        "looking at several measures (Holm).</p>"
    ]
    for c in found:
        rows = [
            [
                r["measure"],
                r["a"],
                r["b"],
                f"{r['difference']:+.4f}",
                f"[{r['interval_95'][0]:+.4f}, {r['interval_95'][1]:+.4f}]",
                r["p"],
                r["p_holm"],
                r["users_won"],
                r["users_lost"],
            ]
            for r in c["measures"]
        ]
        parts.append(
            table(
                ["", "a", "b", "b − a", "95 % interval", "p", "p (Holm)", "users won", "users lost"],
                rows,
                f"a = {c['a']}, b = {c['b']}, {c['users']:,} users",
            )
        )
        parts.append(
            f"<p class=dim>How alike the slates are: {html.escape(alike(c['agreement']))}. {c['resamples']:,} resamples, {c['permutations']:,} permutations, seed {c['seed']}.</p>"
        )
    return "".join(parts)


def replay_part(found):
    if not found:
        return ""
    parts = [
        "<h2>Same answers online and offline</h2><p>Logged online requests were answered again by <code>beamline replay</code>. Identical means the same items in the "
        "same order with the same bits of their scores.</p>"
    ]
    head = ["log", "compared", "identical", "different", *(label for label in PASSED_OVER.values())]
    rows = [
        [
            r["inputs"][0]["file"],
            r["identical"] + r["different"],
            r["identical"],
            r["different"],
            *(r[name] for name in PASSED_OVER),
        ]
        for r in found
    ]
    parts.append(table(head, rows, "Answers; the last columns were passed over"))
    for r in found:
        listed = "\n\n".join(describe(difference) for difference in r["first_differences"])
        if listed:
            left = r["different"] - len(r["first_differences"])
            parts.append(f"<pre>{html.escape(listed)}{f'{chr(10)}{chr(10)}and {left:,} more' if left else ''}</pre>")
    return "".join(parts)


def made(results, commands, replays=()):
    inputs = {(entry["file"], entry["sha256"]) for r in results for entry in [*r["inputs"], *r["protocol"].get("sources", [])]}
    inputs |= {(entry["file"], entry["sha256"]) for r in replays for entry in r["inputs"]}
    model = sorted({r["run_notes"]["model_sha256"] for r in results if r["run_notes"].get("model_sha256")})
    rows = sorted(inputs)
    notes = "".join(f"<p>Model sha256 <code>{html.escape(found)}</code></p>" for found in model)
    shown = f"<pre>{html.escape(chr(10).join(commands))}</pre>" if commands else ""
    files = "".join(f"<tr><td>{html.escape(name)}</td><td><code>{sha}</code></td></tr>" for name, sha in rows)
    engine = ", ".join(sorted({r["computed_by"] for r in results}))
    return (
        "<h2>How this was made</h2>"
        + shown
        + notes
        + f"<p class=dim>beamline-eval {__version__}; metrics computed by {html.escape(engine)}.</p>"
        f"<div class=scroll><table><thead><tr><th scope=col>file</th><th scope=col>sha256</th></tr></thead><tbody>{files}</tbody></table></div>"
    )


def page(results, comparisons=(), frontier=(), price=None, currency="USD", title="Offline evaluation", commands=(), replays=()):
    """The page as text."""
    subject = results[0]
    if len({r["protocol"]["exclude_seen"] for r in results}) > 1 or len({r["protocol"]["split"] for r in results}) > 1:
        raise EvalError(
            "these results have different protocols (split or exclude_seen); numbers of one table must answer the same question"
        )
    k = deepest(subject)
    late = (subject.get("timing") or {}).get("latency_ms", {})
    head = [
        (f"HR@{k}", f"{subject['metrics'][f'HR@{k}']:.4f}"),
        (f"NDCG@{k}", f"{subject['metrics'][f'NDCG@{k}']:.4f}"),
        ("users", f"{subject['users']:,}"),
    ]
    head += [("median latency", f"{late['p50']:.1f} ms")] if late.get("p50") is not None else []
    tiles = "".join(f"<div><b>{value}</b><span class=dim>{name}</span></div>" for name, value in head)
    collisions = subject.get("if_semantic_ids_counted")
    note = ""
    if collisions:
        note = (
            f"<p class=dim>{subject['items_sharing_a_semantic_id']:,} items share a semantic ID with another. If finding the target's semantic ID counted as finding it, "
            f"HR@{k} would be {collisions[f'HR@{k}']:.4f} and NDCG@{k} {collisions[f'NDCG@{k}']:.4f}; an item hits only as itself here.</p>"
        )
    return (
        f"<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width,initial-scale=1'><title>{html.escape(title)}</title>"
        f"<style>{STYLE}</style></head><body><h1>{html.escape(title)}: {html.escape(subject['name'])}</h1><p class=dim>{html.escape(protocol_sentence(subject))}</p>"
        f"<div class=head>{tiles}</div><h2>Quality</h2>{quality(results)}{note}<h2>By history length</h2>{by_history(results)}"
        f"<h2>Beyond accuracy</h2><p>Coverage is the share of the catalog that anybody was shown; Gini is 0 when all items are shown equally often; novelty is the mean "
        f"self-information of an item in the training part.</p>{beyond(results)}{speed(results, price, currency)}{frontier_part(frontier, price, currency)}"
        f"{comparison_part(comparisons)}{replay_part(replays)}{made(results, commands, replays)}</body></html>\n"
    )


def typed():
    """The command of this process as one would type it, without the places of this machine."""
    return shlex.join(["beamline-eval", *map(without_machine, sys.argv[1:])])


def without_machine(argument):
    """An argument whose absolute path, alone or after `--flag=`, has only its last two parts."""
    flag, equals, value = argument.partition("=") if argument.startswith("-") else ("", "", argument)
    return f"{flag}{equals}{short(value)}" if os.path.isabs(value) else argument


def write(path, text):
    with writing(path) as file:
        file.write(text)


def main(arguments):
    results = [read_json(path) for path in arguments.metrics]
    comparisons, replays = ([read_json(path) for path in paths] for paths in (arguments.comparison, arguments.replay))
    kinds = (
        ("evaluate", "beamline-eval/metrics/", arguments.metrics, results),
        ("compare", "beamline-eval/comparison/", arguments.comparison, comparisons),
        ("replay", REPLAY, arguments.replay, replays),
    )
    for command, kind, paths, found in kinds:
        for path, result in zip(paths, found):
            if not isinstance(result, dict) or not str(result.get("format", "")).startswith(kind):
                raise EvalError(f"{path}: not a result of `beamline-eval {command}`")
    frontier = read_json(arguments.frontier) if arguments.frontier else []
    write(
        arguments.out,
        page(results, comparisons, frontier, arguments.price_per_hour, arguments.currency, arguments.title, [typed()], replays),
    )
    print(arguments.out)
