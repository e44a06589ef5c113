"""Is every bug report answered right? Runs a folder of folders, each with inputs and the value that is right, on the binary.

    cargo xtask bugs DIR          # builds, then does what follows
    python3 xtask/bugs/run.py DIR --binary target/release/beamline

A folder holds README.md with the paragraphs **Input.** and **Right value.**, and

    config.json, requests*.jsonl, expected.json    a checkpoint that is served so, or refused if the README allows it
    config.json and no expected.json               a checkpoint that is refused
    requests.jsonl, requests.parquet               requests to the demo checkpoint
    *.inter, rows.jsonl, *.run                     a log to prepare, a run to evaluate
    *.index.json                                   a catalog
    *.txt                                          HTTP calls

Prints `right` or `wrong` per folder, with what is wrong. Exit status: 0 all right, 1 not all, 2 it could not run.
"""

import argparse
import os
import sys
import traceback

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import calls  # noqa: E402
import catalogs  # noqa: E402
import checkpoints  # noqa: E402
import evaluation  # noqa: E402
import requests  # noqa: E402
from engine import ROOT, Engine  # noqa: E402
from folder import Folder  # noqa: E402


def kind(folder):
    """The module that checks such a folder."""
    if folder.checkpoint():
        return checkpoints
    if folder.requests():
        return requests
    if folder.ending(".index.json", "catalog.jsonl", "catalog.parquet"):
        return catalogs
    if folder.ending(".inter", ".csv", ".tsv", ".run", "rows.jsonl", "events.jsonl"):
        return evaluation
    return calls if folder.ending(".txt") else None


def check(path, engine):
    """(verdict, complaints)."""
    try:
        folder = Folder(path)
        module = kind(folder)
        found = module.check(folder, engine) if module else None
    except Exception:  # whatever happens to one folder, the others are still tried
        return "wrong", traceback.format_exc().strip().splitlines()[-3:]
    if found is None:
        return "not understood", ["nothing in its README says what to look at"]
    return ("wrong" if found else "right"), found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder", nargs="?", default=os.environ.get("BEAMLINE_BUGS"), help="folder of bug reports (default: $BEAMLINE_BUGS)"
    )
    parser.add_argument("--binary", default=os.path.join(ROOT, "target", "release", "beamline"))
    parser.add_argument("--only", help="names that contain this")
    arguments = parser.parse_args()
    if not arguments.folder or not os.path.isdir(arguments.folder):
        parser.error("name a folder of bug reports, or set BEAMLINE_BUGS")
    # Some commands run in a folder of their own, where a relative path would name something else.
    folder = os.path.abspath(arguments.folder)
    engine, verdicts = Engine(os.path.abspath(arguments.binary)), {}
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if not os.path.isfile(os.path.join(path, "README.md")) or (arguments.only and arguments.only not in name):
            continue
        verdict, complaints = check(path, engine)
        verdicts.setdefault(verdict, []).append(name)
        print(f"{verdict:14} {name}", flush=True)
        for complaint in complaints[:5]:
            print(f"    {complaint}")
    if not verdicts:
        parser.error(f"{folder} holds no folder with a README.md")
    print(", ".join(f"{len(names)} {verdict}" for verdict, names in verdicts.items()))
    return 0 if list(verdicts) == ["right"] else 1


if __name__ == "__main__":
    sys.exit(main())
