"""A prepared folder, read back."""

import os

from beamline_eval import trec
from beamline_eval.errors import EvalError
from beamline_eval.files import digest, json_lines, read_json
from beamline_eval.values import identifier


class Prepared:
    """What `prepare` wrote; parts are read when they are first asked for."""

    def __init__(self, folder):
        self.folder = folder
        if not os.path.isfile(self.path("prepare.json")):
            raise EvalError(f"{folder}: no prepare.json; make the folder with `beamline-eval prepare ... --out {folder}`")
        self.protocol = read_json(self.path("prepare.json"))
        self.targets = trec.read_qrels(self.path("qrels.txt"))

    def path(self, name):
        return os.path.join(self.folder, name)

    def requests(self):
        """{user: body}."""
        return {str(body["id"]): body for _, body in json_lines(self.path("requests.jsonl"))}

    def histories(self):
        """{user: [item ids oldest first]}."""
        return {user: [event["item_id"] for event in body["history"]] for user, body in self.requests().items()}

    def counts(self):
        """{item: occurrences in the training part}."""
        return {record["item_id"]: record["count"] for _, record in json_lines(self.path("items.jsonl"))}

    def training(self):
        """[[items oldest first]]."""
        return [record["items"] for _, record in json_lines(self.path("train.jsonl"))]

    def digests(self):
        return [digest(self.path(name)) for name in ("prepare.json", "qrels.txt", "requests.jsonl", "items.jsonl")]


class Catalog:
    """Items and semantic IDs of a catalog.jsonl, in catalog order."""

    def __init__(self, path):
        self.path, self.sids = path, {}
        for number, record in json_lines(path):
            self.sids[identifier(record.get("item_id"), f"{path}:{number}, item_id")] = tuple(record.get("sid", ()))

    def __len__(self):
        return len(self.sids)

    def __contains__(self, item):
        return item in self.sids
