"""replay: does the engine give offline what it gave online? Drives `beamline replay` over a request log and lists what differs.

LOG is what `beamline serve --request-log LOG` has written. Each logged request is answered again; an answer is identical if it
has the same items in the same order with the same bits of their scores. Lines of another checkpoint or catalog, degraded
answers and unreadable lines are passed over and counted.

  beamline serve --checkpoint DIR --request-log log.jsonl
  beamline-eval replay log.jsonl --checkpoint DIR --out replay.json
  beamline-eval report metrics.json --replay replay.json --out report.html

Exit status: 0 all identical, 1 something differs, 2 nothing could be compared, or it did not run.
"""

import os
import shlex
import subprocess
import sys
import tempfile

from beamline_eval import __version__, engine
from beamline_eval.errors import EvalError
from beamline_eval.files import digest, json_lines, read_json, write_json
from beamline_eval.progress import say

HELP = "a log of online requests gives the same slates offline; differences listed"
FORMAT = "beamline-eval/replay/1"
# What `beamline replay` counts, in the order in which it is shown, and what people call it.
PASSED_OVER = {
    "other_model": "of another checkpoint",
    "other_catalog": "of another catalog",
    "degraded": "degraded",
    "unreadable": "unreadable",
}
KINDS = {
    "items": "other items",
    "order": "the same items in another order",
    "scores": "the same slate with other scores",
    "fails": "no answer now",
}


def add_arguments(parser):
    parser.add_argument("log", help="request log of `beamline serve --request-log`")
    parser.add_argument("--checkpoint", required=True, help="the checkpoint that answered")
    parser.add_argument("--catalog", help="the catalog that it had, if it is not the one in the checkpoint's directory")
    parser.add_argument("--beamline", help="the binary (default: $BEAMLINE, target/release/beamline, the PATH)")
    parser.add_argument("--show", type=int, default=20, help="differences to list in full (default %(default)s); all are counted")
    parser.add_argument(
        "--ranks",
        type=int,
        default=10,
        help="of each, ranks from the one before the first that differs (default %(default)s; 0: all)",
    )
    parser.add_argument("--differences", metavar="FILE", help="write all differences as JSON lines")
    parser.add_argument("--out", help="write the summary as JSON, for `report --replay`")
    parser.add_argument("--threads", type=int, help="of the engine (default: all cores)")
    parser.add_argument("--in-flight", type=int, help="requests in flight at a time")
    parser.add_argument(
        "--flags",
        default="",
        metavar="TEXT",
        help="more flags for `beamline replay`, such as --flags='--history-cut exact --max-beam-width 1000': those limits that the server had",
    )


def slate(items):
    """[(item, score)] of one side."""
    return [(str(item["item_id"]), item["score"]) for item in items]


def kind(difference):
    """Which of KINDS it is."""
    if "replayed" not in difference:
        return "fails"
    then, now = ([item for item, _ in slate(difference[side])] for side in ("logged", "replayed"))
    return "scores" if then == now else "order" if sorted(then) == sorted(now) else "items"


def furthest(difference):
    """The largest distance between scores of an item that both slates have."""
    then, now = dict(slate(difference["logged"])), dict(slate(difference.get("replayed", [])))
    return max((abs(then[item] - now[item]) for item in then.keys() & now.keys()), default=0.0)


def describe(difference, ranks=10):
    """One difference for people: who, where it begins, and both slates side by side."""
    who = f"user {difference['user_id']}" if difference.get("user_id") is not None else "a request without user_id"
    head = f"line {difference['line']}, {who} (request {difference['request_id']})"
    if "replayed" not in difference:
        return f"{head}: fails now: {difference['error']['message']}"
    first, then, now = difference["first_rank"], slate(difference["logged"]), slate(difference["replayed"])
    begin = 0 if not ranks else max(first - 2, 0)
    longest = max(len(then), len(now))
    end = longest if not ranks else min(begin + ranks, longest)
    # repr keeps every bit, so that scores which differ never look the same.
    rows = [("", "rank", "logged", "score", "replayed", "score")]
    for place in range(begin, end):
        left, right = (side[place] if place < len(side) else None for side in (then, now))
        rows.append(
            (
                "*" if left != right else "",
                str(place + 1),
                *((left[0], repr(left[1])) if left else ("–", "")),
                *((right[0], repr(right[1])) if right else ("–", "")),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    lines = [
        (
            "  "
            + "  ".join(
                cell.rjust(width) if column in (1, 3, 5) else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths))
            )
        ).rstrip()
        for row in rows
    ]
    if begin or end < longest:
        lines.append(f"     ranks {begin + 1} to {end} of {longest}")
    return "\n".join([f"{head}: {KINDS[kind(difference)]}, from rank {first} on", *lines])


def replay(log, checkpoint, program, catalog=None, differences=None, threads=None, in_flight=None, flags=(), keep=20):
    """Runs it. Returns (summary, the first `keep` differences)."""
    if not os.path.isfile(log):
        raise EvalError(f"{log}: no such file; `beamline serve --request-log FILE` writes one")
    with tempfile.TemporaryDirectory() as folder:
        counted, found = os.path.join(folder, "counts.json"), differences or os.path.join(folder, "differences.jsonl")
        if os.path.dirname(found):
            os.makedirs(os.path.dirname(found), exist_ok=True)
        command = [program, "replay", "--checkpoint", checkpoint, "--show", "0", "--out", found, "--summary", counted]
        command += ["--catalog", catalog] if catalog else []
        command += ["--threads", str(threads)] if threads else []
        command += ["--in-flight", str(in_flight)] if in_flight else []
        # Its progress bar and its complaints go where this program's go.
        done = subprocess.run([*command, *flags, log])
        if not os.path.isfile(counted):
            raise EvalError(f"beamline replay ended with status {done.returncode} and compared nothing; see above")
        counts = read_json(counted)
        kinds, distance, shown = dict.fromkeys(KINDS, 0), 0.0, []
        for _, difference in json_lines(found):
            kinds[kind(difference)] += 1
            distance = max(distance, furthest(difference))
            if len(shown) < keep:
                shown.append(difference)
    summary = {
        "format": FORMAT, "version": __version__, **counts, "kinds": kinds, "largest_score_distance": distance,
        "first_differences": shown, "inputs": [digest(log)],
    }
    return summary, shown


def summary_lines(summary):
    """What it came to, as sentences."""
    compared = summary["identical"] + summary["different"]
    lines = [f"{compared:,} answers compared: {summary['identical']:,} identical, {summary['different']:,} different"]
    if summary["different"]:
        parts = [f"{count:,} {KINDS[name]}" for name, count in summary["kinds"].items() if count]
        lines.append(
            f"of the different: {', '.join(parts)}; scores of one item differ by at most {summary['largest_score_distance']:.3g}"
        )
    passed = [f"{summary[name]:,} {label}" for name, label in PASSED_OVER.items() if summary[name]]
    lines.append("passed over: " + (", ".join(passed) or "none"))
    return lines


def main(arguments):
    if arguments.show < 0 or arguments.ranks < 0:
        raise EvalError("--show and --ranks: not less than 0")
    summary, shown = replay(
        arguments.log,
        arguments.checkpoint,
        engine.binary(arguments.beamline),
        arguments.catalog,
        arguments.differences,
        arguments.threads,
        arguments.in_flight,
        shlex.split(arguments.flags),
        arguments.show,
    )
    for difference in shown:
        print(describe(difference, arguments.ranks), end="\n\n")
    if summary["different"] > len(shown):
        say(
            f"{summary['different'] - len(shown):,} more differences are not listed"
            + ("" if arguments.differences else "; --differences FILE keeps all of them")
        )
    print("\n".join(summary_lines(summary)))
    if arguments.out:
        write_json(arguments.out, summary)
    if summary["identical"] + summary["different"] == 0:
        print("error: the log holds no answer of this checkpoint and catalog", file=sys.stderr)
        return 2
    return 1 if summary["different"] else 0
