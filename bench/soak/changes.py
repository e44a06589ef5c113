"""What operators do while requests come: checkpoints swapped, catalogs patched, pushed and rolled back, and changes that must
be refused.

Every change is followed by a request, which must be answered by what was just put in place.
"""

import json
import threading
import time

from soak import checkpoints
from soak.server import Client
from soak.world import MODELS


class Unexpected(Exception):
    """The server did something else than it should."""


class Operator:
    """Changes things, one after the other. Knows at any time what is loaded."""

    def __init__(self, server, key, world):
        self.client, self.stranger, self.world = Client(server.address, key), Client(server.address), world
        self.loaded = {model: ["a", 0] for model in MODELS}
        self.digests, self.log, self.failures, self.items = {}, [], [], 0
        self.stop = threading.Event()

    def admin(self, method, path, body, status=200):
        lines = isinstance(body, bytes)
        reply = self.client.ask(
            method, path, body if lines else json.dumps(body).encode(), "application/x-ndjson" if lines else "application/json"
        )
        if reply.status != status:
            raise Unexpected(f"{method} {path} {str(body)[:200]}: {reply.status} {reply.body[:300]!r}, expected {status}")
        return reply

    def load(self, model, version):
        """Loads a version beside what is there; without a label, unless it is the model's first."""
        return self.admin("POST", f"/v1/models/{model}/load", {"directory": version}).json()

    def learn(self):
        """Before the traffic: loads all models, and visits both states of every catalog and both versions to know their names."""
        for model in MODELS:
            if model != MODELS[0]:
                self.digests[model, "a"] = self.load(model, "a")["sha256"]
            else:
                listed = self.client.ask("GET", "/v1/models").json()["models"]
                self.digests[model, "a"] = next(one["sha256"] for one in listed if one["name"] == model)
            catalogs = self.world.catalogs[model]
            for state in (0, 1):
                catalogs.shelves[state].version = self.current(model)
                self.toggle(model)
            if self.current(model) != catalogs.shelves[0].version:
                raise Unexpected(f"the same file gives another version of the catalog of {model}")

    def learn_others(self):
        """The digests of the other versions."""
        for model in MODELS:
            self.swap(model)
            self.swap(model)

    def current(self, model):
        return self.client.ask("GET", f"/v1/models/{model}/catalog").json()["current"]

    def toggle(self, model):
        """Patches the catalog to its second state, or pushes the first."""
        state, catalogs = self.loaded[model][1], self.world.catalogs[model]
        if state:
            self.admin("PUT", f"/v1/models/{model}/catalog", catalogs.whole)
        else:
            self.admin("PATCH", f"/v1/models/{model}/catalog", catalogs.forward)
        self.loaded[model][1] = 1 - state

    def roll_back(self, model):
        """To the other state, if that is kept."""
        state = 1 - self.loaded[model][1]
        version = self.world.catalogs[model].shelves[state].version
        kept = self.client.ask("GET", f"/v1/models/{model}/catalog").json()["versions"]
        if all(one["version"] != version for one in kept):
            return self.toggle(model)
        self.admin("POST", f"/v1/models/{model}/catalog/rollback", {"version": version})
        self.loaded[model][1] = state

    def swap(self, model):
        """Loads the other version, moves the label, unloads the one that was there."""
        before = self.loaded[model][0]
        after = "b" if before == "a" else "a"
        self.digests[model, after] = self.load(model, after)["sha256"]
        self.admin("PUT", f"/v1/models/{model}/labels/stable", {"version": self.digests[model, after][:12]})
        self.loaded[model] = [after, 0]
        self.admin("POST", f"/v1/models/{model}/unload", {"version": self.digests[model, before][:12]})

    def refused(self, model):
        """Changes that must fail and change nothing."""
        for path, body, status, kind in [
            ("/v1/models/retrieval/load", {"directory": checkpoints.BROKEN}, 422, "tensors_mismatch"),
            (f"/v1/models/{model}/load", {"directory": self.loaded[model][0]}, 409, "already_loaded"),
            (f"/v1/models/{model}/load", {"directory": ".."}, 422, "invalid_name"),
            (f"/v1/models/{model}/unload", {"version": self.digests[model, self.loaded[model][0]][:12]}, 409, "version_labelled"),
            (f"/v1/models/{model}/catalog/rollback", {"version": "0123456789abcdef"}, 404, "catalog_not_found"),
        ]:
            reply = self.admin("POST", path, body, status)
            if reply.error() != kind:
                raise Unexpected(f"POST {path} {body}: {reply.error()}, expected {kind}")

    def probe(self, model):
        """A request that begins now must be answered by what is there now."""
        body = self.probes[model]
        reply = self.stranger.post("/v1/rank" if model == "ranking" else "/v1/recommend", body)
        answer = reply.json()
        self.items += len(answer.get("items", answer.get("candidates", [])))
        version, state = self.loaded[model]
        wanted = (self.digests[model, version], self.world.catalogs[model].shelves[state].version)
        found = (answer.get("model", {}).get("sha256"), answer.get("catalog_version"))
        if found != wanted:
            said = f"{reply.status} {reply.body[:200]!r}"
            raise Unexpected(f"after a change of {model} a new request was answered by {found}, expected {wanted}: {said}")

    def prepare_probes(self):
        """Draws the requests that follow a change."""
        self.probes = {}
        for model in MODELS:
            body = self.world.warm(model)
            if model == "ranking":
                body["candidates"] = [{"item_id": self.world.kept_item(model), "features": {"owner_id": 1}}]
            self.probes[model] = body

    def counted(self):
        """What the server must have counted of it."""
        return self.client.counted + self.stranger.counted

    def run(self, every, start):
        """One change every so many seconds, until told to stop."""
        number = 0
        while not self.stop.wait(max(0.0, start + every * (number + 1) - time.monotonic())):
            model = MODELS[number // 4 % len(MODELS)]
            what = ["toggle", "swap", "toggle", "roll_back"][number % 4]
            if number % 8 == 7:
                what = "refused"
            number += 1
            self.change(what, model, start)

    def change(self, what, model, start):
        began = time.monotonic()
        try:
            getattr(self, what)(model)
            self.probe(model)
        except Exception as error:  # a finding; the traffic goes on
            self.failures.append(
                {"at_s": round(began - start, 3), "change": what, "model": model, "problem": f"{type(error).__name__}: {error}"}
            )
        self.log.append(
            {"at_s": round(began - start, 3), "change": what, "model": model, "ms": round(1e3 * (time.monotonic() - began), 1)}
        )

    def settle(self, model, version, state):
        """Brings a model to a version and a state of its catalog."""
        if self.loaded[model][0] != version:
            self.swap(model)
        if self.loaded[model][1] != state:
            self.toggle(model)
