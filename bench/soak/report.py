"""What a run found, by the minute and by kind, as JSON and as a page."""

import collections
import math

MIB = 1 << 20
SERIES = [
    "rss_bytes",
    "anonymous_bytes",
    "host_bytes",
    "besides_host_bytes",
    "threads",
    "files",
    "queued",
    "running",
    "cached_pages",
]
SERIES += ["model_memory", "series"]


def percentiles(values):
    if not values:
        return {}
    ordered = sorted(values)
    at = lambda share: round(ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)], 2)  # noqa: E731
    return {"count": len(ordered), "p50": at(0.5), "p90": at(0.9), "p99": at(0.99), "most": round(ordered[-1], 2)}


def by_kind(outcomes):
    """Latency of answers and refusals by kind, from the time a request was due, beside the server's own time of answers."""
    kinds = {}
    for kind in sorted({outcome.kind for outcome in outcomes}):
        here = [outcome for outcome in outcomes if outcome.kind == kind]
        kinds[kind] = {
            "requests": len(here), "ms": percentiles([one.ms for one in here if one.ms is not None]),
            "server_ms": percentiles([one.server_ms for one in here if one.server_ms is not None]),
            "outcomes": dict(sorted(collections.Counter(one.outcome for one in here).items())),
            "context_tokens": sum(one.context for one in here), "cached_tokens": sum(one.cached for one in here),
        }  # fmt: skip
    return kinds


def by_minute(outcomes, looks, seconds):
    minutes = []
    for minute in range(math.ceil(seconds / 60)):
        inside = [one for one in outcomes if 60 * minute <= one.at < 60 * (minute + 1)]
        seen = [look for look in looks if 60 * minute <= look["at"] < 60 * (minute + 1)]
        # Bodies in two parts take as long as their client does.
        prompt = [one.ms for one in inside if one.ms is not None and one.kind != "in two parts"]
        found = {"minute": minute + 1, "requests": len(inside), "ms": percentiles(prompt)}
        found["waited_for_a_sender_ms"] = percentiles([one.late_ms for one in inside if one.late_ms is not None])
        found["not_ok"] = dict(sorted(collections.Counter(one.outcome for one in inside if one.outcome != "ok").items()))
        for name in SERIES:
            values = [look[name] for look in seen]
            if values:
                found[name] = {"least": min(values), "most": max(values), "last": values[-1]}
        minutes.append(found)
    return minutes


def check(name, one):
    return f"- {'held' if one['held'] else 'FAILED'}: {name}" + (f" ({one['found']})" if one["found"] else "")


def markdown(result):
    machine = result["machine"]
    lines = [
        "# Mixed soak", "", "Written by `bench/mixed_soak.py`; do not edit.", "",
        f"`{result['command']}`, commit {result['commit']}, {machine['cpu']}, {machine['cores']} cores, client and server on the same ones. "
        f"Server: `{result['server']}`.", "",
        f"{result['requests']} requests in {result['seconds']:.0f} s, {result['changes']['count']} changes of checkpoints and catalogs. "
        f"{result['samples']['count']} requests were asked again, {sum(result['samples']['compared'].values())} answers compared with those given "
        f"before: {result['samples']['differences']} differ.", "",
        "**" + ("Every check held." if not result["failed"] else f"{len(result['failed'])} checks failed.") + "**", "",
        *([f"The clients were stopped from outside for {result['stopped_s']} s: latencies of then say nothing.", ""] if result["stopped_s"] else []),
        *(check(name, one) for name, one in result["checks"].items()),
        "", "| minute | requests | P50 ms | P99 ms | resident MiB | threads | files | too late | went | refused |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for one in result["minutes"]:
        if not one["ms"] or "rss_bytes" not in one:
            continue
        late, went = (
            one["not_ok"].get("deadline_exceeded", 0),
            sum(count for name, count in one["not_ok"].items() if name.startswith("went ")),
        )
        refused = sum(one["not_ok"].values()) - late - went
        span = lambda name, unit=1, one=one: f"{one[name]['least'] / unit:.0f} to {one[name]['most'] / unit:.0f}"  # noqa: E731
        lines.append(
            f"| {one['minute']} | {one['requests']} | {one['ms']['p50']} | {one['ms']['p99']} | {span('rss_bytes', MIB)} | {span('threads')} "
            f"| {span('files')} | {late} | {went} | {refused} |"
        )
    lines += [
        "", "| kind | requests | P50 ms | P90 ms | P99 ms | in the server P50, P99 ms | context from cache | outcomes |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for kind, one in result["kinds"].items():
        ms, inside = one["ms"], one["server_ms"]
        cached = f"{100 * one['cached_tokens'] / one['context_tokens']:.0f} %" if one["context_tokens"] else ""
        outcomes = ", ".join(f"{name} {count}" for name, count in one["outcomes"].items())
        shown = [f"{ms[at]}" if ms else "" for at in ("p50", "p90", "p99")]
        lines.append(f"| {kind} | {one['requests']} | {' | '.join(shown)} | {inside['p50']}, {inside['p99']} | {cached} | {outcomes} |" if inside
                     else f"| {kind} | {one['requests']} | {' | '.join(shown)} | | {cached} | {outcomes} |")  # fmt: skip
    if result["failures"]:
        short = [str({**one, "body": one.get("body", "")[:80]})[:600] for one in result["failures"][:20]]
        lines += ["", "The first failures (more are in the JSON):", "", *(f"- {one}" for one in short)]
    return "\n".join(lines) + "\n"
