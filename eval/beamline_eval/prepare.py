"""prepare: an interaction log becomes requests for `beamline batch`, the right answers, and what baselines may learn from.

Writes into --out:
  requests.jsonl   bodies of POST /v1/recommend with an `id`: `beamline batch --checkpoint DIR requests.jsonl answers.jsonl`
  qrels.txt        the right answers, TREC form
  users.jsonl      {"id", "history_length", "target_seen"} per question
  items.jsonl      {"item_id", "count"}: how often each item occurs in the training part (popularity, novelty)
  train.jsonl      {"items": [...]}: the training part, oldest first, for the co-occurrence baseline
  prepare.json     the protocol: every choice made here, with digests of the sources

  beamline-eval prepare events.csv --out data
  beamline-eval prepare sequences.txt --item-offset -1 --out data
  beamline-eval prepare ml.inter --split temporal --cut 90% --out data
  beamline-eval prepare test.jsonl --split given --train train.jsonl --out data
"""

import collections
import os

from beamline_eval import sources, splits, trec
from beamline_eval.errors import EvalError
from beamline_eval.files import digest, write_json, write_json_lines
from beamline_eval.progress import say, track

HELP = "interaction log -> requests, right answers, training counts"


def add_arguments(parser):
    parser.add_argument(
        "source",
        help="the log: events as CSV, JSON lines or Parquet; S3-Rec/SASRec sequences (.txt); RecBole, LC-Rec (.inter, .inter.json); MiniOneRec (.csv, .jsonl)",
    )
    parser.add_argument("--out", required=True, help="folder for the prepared files")
    parser.add_argument("--format", choices=sources.FORMATS, help="default: by the file's name")
    parser.add_argument(
        "--split", choices=["leave-one-out", "temporal", "given"], help="default: given for rows with targets, else leave-one-out"
    )
    parser.add_argument(
        "--part",
        choices=["test", "valid"],
        default="test",
        help="leave-one-out: target is the last item, or the one before (default %(default)s)",
    )
    parser.add_argument(
        "--cut", default="80%", help="temporal: a time of the source, or a share of all events (default %(default)s)"
    )
    parser.add_argument(
        "--targets", choices=["next", "all"], default="next", help="temporal: what after the cut is right (default %(default)s)"
    )
    parser.add_argument(
        "--train",
        action="append",
        default=[],
        help="training sequences in a file of their own (repeatable); default: from the source",
    )
    parser.add_argument("--item-offset", type=int, default=0, help="added to item numbers to get the catalog's item ids")
    parser.add_argument(
        "--columns",
        help="events: names of the user, item and time column (default: user_id, item_id, and timestamp, ts or time); two names if the file's order is the order of events",
    )
    parser.add_argument("--min-rating", type=float, help="events: keep ratings of at least this")
    parser.add_argument(
        "--exclude-seen", action="store_true", help="ask for items that are not in the history; stated in every result"
    )
    parser.add_argument("--num-items", type=int, default=50, help="length of a slate (default %(default)s)")
    parser.add_argument("--beam-width", type=int, default=50, help="(default %(default)s)")
    parser.add_argument(
        "--beam-widths", type=numbers, help="instead of --beam-width: a width for each level of the semantic ID, as in 10,50,80"
    )
    parser.add_argument(
        "--normalization", choices=["full_vocab", "allowed_set"], default="full_vocab", help="(default %(default)s)"
    )
    parser.add_argument(
        "--max-history",
        type=int,
        help="keep only the newest N items of a history (default: all; the engine cuts to the model's context)",
    )
    parser.add_argument("--sample", type=int, help="N questions evenly spaced over the file instead of all")


def numbers(text):
    """1,2,3"""
    return [int(part) for part in text.split(",")]


def request(case, num_items, beam_width, normalization="full_vocab", exclude_seen=False, beam_widths=None):
    """A body of POST /v1/recommend, without a deadline: offline, whether one passes would depend on the machine, and a miss
    would look like the model's."""
    body = {
        "id": case.user,
        "history": [{"item_id": item} for item in case.history],
        "num_items": num_items,
        **({"beam_widths": beam_widths} if beam_widths else {"beam_width": beam_width}),
        "normalization": normalization,
    }
    if exclude_seen:
        body["filters"] = {"exclude_seen": True}
    return body


def write_requests(path, cases, **settings):
    write_json_lines(path, (request(case, **settings) for case in track(cases, "requests")))


def prepare(
    source,
    out,
    form=None,
    split=None,
    part="test",
    cut="80%",
    targets="next",
    train=(),
    offset=0,
    columns=None,
    min_rating=None,
    exclude_seen=False,
    num_items=50,
    beam_width=50,
    normalization="full_vocab",
    max_history=None,
    sample=None,
    beam_widths=None,
):
    """All of it; returns the protocol that prepare.json holds."""
    if num_items < 1 or beam_width < num_items:
        raise EvalError(f"--beam-width {beam_width} must be at least --num-items {num_items}, and that at least 1")
    if beam_widths and (min(beam_widths) < 1 or beam_widths[-1] < num_items):
        raise EvalError(f"--beam-widths {beam_widths} must be at least 1, and the last at least --num-items {num_items}")
    read = {"offset": offset, "columns": sources.Columns.given(columns), "min_rating": min_rating}
    users = sources.read(source, form, **read)
    split = split or ("given" if users and users[0].target is not None else "leave-one-out")
    if split == "given":
        cases, training, notes = splits.as_given(users)
    elif any(user.target is not None for user in users):
        raise EvalError(f"{source}: these rows already have targets; use --split given")
    elif split == "temporal":
        cases, training, notes = splits.temporal(users, cut, targets)
    else:
        cases, training, notes = splits.leave_one_out(users, part)
    if train:
        training = [
            user.items + ([user.target] if user.target is not None else [])
            for path in train
            for user in sources.read(
                path, None if form is None or os.path.splitext(path)[1] != os.path.splitext(source)[1] else form, **read
            )
        ]
    splits.unique_ids(cases)
    asked = len(cases)
    if sample:
        from beamline_eval.runs import sample as evenly

        cases = evenly(cases, sample)
    if not cases:
        raise EvalError(f"{source}: no user is left to ask about ({notes})")
    if max_history:
        for case in cases:
            case.history = case.history[-max_history:]

    counts = collections.Counter(item for items in training for item in items)
    at = {
        name: os.path.join(out, name)
        for name in ("requests.jsonl", "qrels.txt", "users.jsonl", "items.jsonl", "train.jsonl", "prepare.json")
    }
    trec.write_qrels(at["qrels.txt"], {case.user: case.targets for case in cases})
    write_requests(
        at["requests.jsonl"],
        cases,
        num_items=num_items,
        beam_width=beam_width,
        normalization=normalization,
        exclude_seen=exclude_seen,
        beam_widths=beam_widths,
    )
    write_json_lines(
        at["users.jsonl"],
        (
            {
                "id": case.user,
                "history_length": len(case.history),
                "target_seen": any(item in case.history for item in case.targets),
            }
            for case in cases
        ),
    )
    write_json_lines(
        at["items.jsonl"],
        ({"item_id": item, "count": count} for item, count in sorted(counts.items(), key=lambda x: (-x[1], x[0]))),
    )
    write_json_lines(at["train.jsonl"], ({"items": items} for items in training if items))
    protocol = {
        "format": "beamline-eval/protocol/1",
        "split": split,
        **({"part": part} if split == "leave-one-out" else {}),
        **notes,
        "questions": len(cases),
        "questions_before_sampling": asked,
        "exclude_seen": exclude_seen,
        "targets_in_history": sum(any(item in case.history for item in case.targets) for case in cases),
        "item_offset": offset,
        "min_rating": min_rating,
        "max_history": max_history,
        "training_interactions": sum(counts.values()),
        "training_items": len(counts),
        "num_items": num_items,
        "beam_width": max(beam_widths or [beam_width]),
        **({"beam_widths": beam_widths} if beam_widths else {}),
        "normalization": normalization,
        "sources": [digest(source), *(digest(path) for path in train)],
    }
    write_json(at["prepare.json"], protocol)
    say(f"{len(cases)} questions, {sum(counts.values())} training interactions over {len(counts)} items, into {out}")
    if exclude_seen and protocol["targets_in_history"]:
        say(f"{protocol['targets_in_history']} targets are in their own history: with --exclude-seen nobody can find them")
    return protocol


def main(arguments):
    prepare(
        arguments.source,
        arguments.out,
        arguments.format,
        arguments.split,
        arguments.part,
        arguments.cut,
        arguments.targets,
        arguments.train,
        arguments.item_offset,
        arguments.columns,
        arguments.min_rating,
        arguments.exclude_seen,
        arguments.num_items,
        arguments.beam_width,
        arguments.normalization,
        arguments.max_history,
        arguments.sample,
        arguments.beam_widths,
    )
