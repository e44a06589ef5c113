"""Checkpoints: served as expected.json says, or refused by the name of what is wrong."""

import os
import re

from folder import quoted

DEFAULT_TOLERANCE = 3e-4
# What a refusal must hold when the README says that it names this.
SHAPES = (
    (r"naming the type", r"F8|FP8|float8|E4M3|E5M2", "the type"),
    (r"the id\b", r"\d", "the id"),
    (r"naming a code", r"<[^>\s]+>", "a code"),
)


def check(folder, engine):
    """Complaints; nothing if the folder is right."""
    checkpoint, expected = folder.checkpoint(), folder.expected()
    inspected = engine.run("inspect", checkpoint)
    if expected is None or inspected.status != 0:
        return refused(folder, engine, inspected, expected)
    complaints = []
    for requests in folder.requests():
        run, answers = engine.batch(checkpoint, requests)
        for complaint in (
            differences(answers, expected, folder.tolerance(DEFAULT_TOLERANCE)) if answers else [f"no answers: {last_line(run)}"]
        ):
            complaints.append(f"{os.path.basename(requests)}: {complaint}")
    return complaints + parity(folder, engine, checkpoint, expected)


def refused(folder, engine, inspected, expected):
    """Complaints about a refusal, or about the lack of one."""
    if expected is not None and not folder.may_be_refused():
        return [f"refused: {last_line(inspected)}"]
    complaints = []
    if inspected.status == 0:
        complaints.append("inspect finds nothing wrong")
    else:
        complaints += [f"inspect: {complaint}" for complaint in unnamed(folder, inspected.said)]
    for requests in folder.requests()[:1]:
        run, answers = engine.batch(folder.checkpoint(), requests)
        if run.status == 0 or any("error" not in answer for answer in answers):
            complaints.append("batch runs")
        elif "panicked" in run.said:
            complaints.append("batch panics")
    return complaints


def unnamed(folder, said):
    """What a refusal should name and does not."""
    sentences = [
        sentence
        for sentence in re.split(r"(?<=[.;])\s", folder.right)
        if re.search(r"refus|message|error|missing|naming", sentence, re.IGNORECASE)
    ]
    names = quoted(" ".join(sentences))
    if names:
        every = re.search(r"` and `", " ".join(sentences))
    else:
        shapes = [(shape, what) for asked, shape, what in SHAPES if re.search(asked, folder.right)]
        if shapes:
            return [f"does not name {what}: {brief(said)}" for shape, what in shapes if not re.search(shape, said)]
        names, every = quoted(folder.input), folder.says("both")
    missing = [name for name in names if name not in said]
    if not names or (missing and (every or len(missing) == len(names))):
        return [f"does not name {', '.join(missing) or 'anything'}: {brief(said)}"]
    return []


def differences(answers, expected, tolerance):
    """What is wrong with answers, by their order."""
    if len(answers) != len(expected):
        return [f"{len(answers)} answers, not {len(expected)}"]
    complaints = []
    for answer, wanted in zip(answers, expected):
        who = wanted.get("id", "?")
        if "error" in answer:
            complaints.append(f"{who}: {answer['error']}")
            continue
        tokens = answer["usage"].get("context_tokens")
        if wanted.get("context_tokens") not in (None, tokens):
            complaints.append(f"{who}: {tokens} context tokens, not {wanted['context_tokens']}")
        complaints += [f"{who}: {complaint}" for complaint in slate(answer["items"], wanted["items"], tolerance)]
    return complaints


def slate(items, wanted, tolerance):
    if len(items) < len(wanted):
        return [f"{len(items)} items, not {len(wanted)}"]
    complaints = []
    for item, right in zip(items, wanted):
        off = abs(item["score"] - right["score"])
        # Items whose scores are closer than the tolerance may stand in either order.
        tied = [other["item_id"] for other in wanted if abs(other["score"] - right["score"]) <= tolerance]
        if off > tolerance:
            complaints.append(
                f"{item['item_id']} scores {item['score']:.5f}, the item of that rank should score {right['score']:.5f}"
            )
        elif item["item_id"] not in tied and right is not wanted[-1]:
            complaints.append(f"{item['item_id']} stands where {right['item_id']} should")
    return complaints


def parity(folder, engine, checkpoint, expected):
    """The parity tool, where the README calls it; needs torch and transformers."""
    if "hf_reference.py" not in folder.input:
        return []
    import json
    import sys
    import tempfile

    from engine import ROOT

    if engine.command([sys.executable, "-c", "import torch, transformers"]).status:
        # What needs no torch is how the tool reads the convention.
        run = engine.command(
            [
                sys.executable,
                "-c",
                "import sys; sys.path.insert(0, sys.argv[1]); import hf_reference; hf_reference.Convention(sys.argv[2]).prompt([])",
                os.path.join(ROOT, "weights", "tools"),
                checkpoint,
            ]
        )
        print("    the parity tool reads the convention; its answers are not checked: torch or transformers is not installed")
        return [f"parity tool: {last_line(run)}"] if run.status else []
    with tempfile.TemporaryDirectory() as place:
        out = os.path.join(place, "out.jsonl")
        tool = os.path.join(ROOT, "weights", "tools", "hf_reference.py")
        run = engine.command([sys.executable, tool, checkpoint, "--requests", folder.requests()[0], "--out", out])
        if run.status:
            return [f"parity tool: {last_line(run)}"]
        with open(out, encoding="utf-8") as file:
            answers = [json.loads(line) for line in file]
    complaints = []
    for answer, wanted in zip(answers, expected):
        items = [{"item_id": item, "score": score} for items, score in zip(answer["items"], answer["scores"]) for item in items]
        complaints += [
            f"parity tool: {complaint}" for complaint in slate(items, wanted["items"], folder.tolerance(DEFAULT_TOLERANCE))
        ]
    return complaints


def last_line(run):
    lines = [line for line in run.said.splitlines() if line.strip()]
    return lines[-1] if lines else f"exit status {run.status}, not a word"


def brief(said):
    """The end of a message, where problems are listed."""
    return " ".join(said.split())[-200:]
