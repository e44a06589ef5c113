"""baselines: what a model has to beat, as TREC runs beside it.

  popularity      the items most frequent in the training part, the same for everybody
  repeat-last     the items of the user's own history, newest first
  co-occurrence   the items that followed the history's last item most often in the training part; ties and the rest by popularity
  hf              Hugging Face `generate` on the same checkpoint (see `--help` of the options below); slow, so usually on a --sample

The first three need nothing installed and take seconds. They obey exclude_seen if the data was prepared with it.

  beamline-eval baselines data --out runs
  beamline-eval baselines data --out runs --only hf --checkpoint DIR --sample 300
"""

import collections
import os

from beamline_eval import runs, trec
from beamline_eval.errors import EvalError
from beamline_eval.prepared import Prepared
from beamline_eval.progress import say, track

HELP = "popularity, repeat-last, co-occurrence and Hugging Face generate, as runs"
PLAIN = ("popularity", "repeat-last", "co-occurrence")


def add_arguments(parser):
    parser.add_argument("data", help="folder that `prepare` wrote")
    parser.add_argument("--out", required=True, help="folder for the runs: NAME.run")
    parser.add_argument("--only", default=",".join(PLAIN), help="which ones, separated by commas (default %(default)s)")
    parser.add_argument("--sample", type=int, help="only N users, evenly spaced; for hf")
    parser.add_argument("--checkpoint", help="hf: checkpoint directory")
    parser.add_argument("--threads", type=int, default=1, help="hf: threads of torch (default %(default)s)")
    parser.add_argument("--beam-width", type=int, help="hf: default as prepared")
    parser.add_argument("--hf-tool", help="hf: path of weights/tools/hf_reference.py (default: in this repository)")


def by_count(counts):
    """Most frequent first; equal counts in order of item id, so that the order is stated and not an accident of hashing."""
    return [item for item, _ in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))]


def fill(slate, ranked, banned, length):
    """`slate` completed from `ranked`, without repeats and banned items."""
    taken = set(slate)
    for item in ranked:
        if len(slate) >= length:
            break
        if item not in taken and item not in banned:
            slate.append(item)
            taken.add(item)
    return slate


def popularity(histories, counts, length, exclude_seen, **_):
    ranked = by_count(counts)
    return {user: fill([], ranked, set(history) if exclude_seen else (), length) for user, history in histories.items()}


def repeat_last(histories, length, exclude_seen, **_):
    if exclude_seen:
        # Everything it could say is excluded. Empty slates are the honest answer.
        return {user: [] for user in histories}
    return {user: list(dict.fromkeys(reversed(history)))[:length] for user, history in histories.items()}


def co_occurrence(histories, counts, training, length, exclude_seen, **_):
    following = collections.defaultdict(collections.Counter)
    for items in training:
        for one, other in zip(items, items[1:]):
            following[one][other] += 1
    ranked = by_count(counts)
    slates = {}
    for user, history in track(histories.items(), "co-occurrence", len(histories)):
        banned = set(history) if exclude_seen else ()
        after = following[history[-1]] if history and history[-1] in following else {}
        near = sorted(after, key=lambda item: (-after[item], -counts.get(item, 0), item))
        slates[user] = fill([item for item in near if item not in banned][:length], ranked, banned, length)
    return slates


MAKERS = {"popularity": popularity, "repeat-last": repeat_last, "co-occurrence": co_occurrence}


def write(prepared, out, only=PLAIN):
    """{name: path of the run}."""
    counts, training = prepared.counts(), prepared.training()
    if not training and set(only) & {"popularity", "co-occurrence"}:
        raise EvalError(
            f"{prepared.folder} has no training part (rows that come split have none); prepare it with --train FILE, or use --only repeat-last"
        )
    context = {"histories": prepared.histories(), "counts": counts, "training": training,
               "length": prepared.protocol["num_items"], "exclude_seen": prepared.protocol["exclude_seen"]}
    paths = {}
    for name in only:
        paths[name] = os.path.join(out, f"{name}.run")
        trec.write_run(paths[name], MAKERS[name](**context), name)
        say(f"{name}: {paths[name]}")
    return paths


def main(arguments):
    prepared = Prepared(arguments.data)
    names = arguments.only.split(",")
    unknown = set(names) - set(MAKERS) - {"hf"}
    if unknown:
        raise EvalError(f"no baseline is called {', '.join(sorted(unknown))}; there are {', '.join([*MAKERS, 'hf'])}")
    plain = [name for name in names if name != "hf"]
    if plain:
        write(prepared, arguments.out, plain)
    if "hf" in names:
        from beamline_eval import hf

        if not arguments.checkpoint:
            raise EvalError("the hf baseline needs --checkpoint DIR")
        users = runs.sample(prepared.targets, arguments.sample)
        hf.write(prepared, arguments.checkpoint, users, arguments.out, arguments.threads, arguments.beam_width, arguments.hf_tool)
