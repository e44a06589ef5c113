"""Catalog files of others."""

import json

from checkpoints import brief
from folder import counts


def check(folder, engine):
    """Complaints, and None if no word of the right value was understood."""
    items = counts(folder.right, "items")
    paths = counts(folder.right, "(?:semantic IDs|SIDs|paths)")
    if not items:
        return None
    complaints = []
    for catalog in folder.ending(".index.json", "catalog.jsonl", "catalog.parquet"):
        run = engine.run("catalog", "check", "--json", catalog)
        if run.status:
            # A refusal must say what to do, not only what is wrong.
            told = folder.may_be_refused() and ("convert" in run.said or "build_index" in run.said)
            complaints += [] if told else [f"refused: {brief(run.said)}"]
            continue
        report = json.loads(run.said[run.said.index("{"):])
        found = [report.get("items"), report.get("sids", report.get("leaves"))]
        if found[0] != items[0] or (paths and found[1] != paths[0]):
            complaints.append(f"{found[0]} items on {found[1]} semantic IDs")
    return complaints
