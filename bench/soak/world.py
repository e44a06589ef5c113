"""What the clients know: the items of every model in both states of its catalog, the users and their histories, and the
requests they make.

A catalog has two states. `PATCH` with `forward` leads from the first to the second; `whole` is the first as a file. (A patch
could not lead back: the version of a catalog follows from the order of its items, too, and what is added comes last.)
Everything is drawn from one generator in one thread, so requests and their order follow from the seed, but for which is asked
again: that waits for an answer. """

import json

from soak import checkpoints

MODELS = ["decoder", "retrieval", "tokens", "ranking"]
NOW = 1_760_000_000
# Seconds between events, from none to weeks: all kinds of time buckets.
PAUSES = [0, 1, 2, 5, 20, 60, 300, 3_600, 40_000, 86_400, 600_000]
# Share of events and candidates that no catalog has, and of those that only the second state has.
UNKNOWN, ADDED = 0.01, 0.01
# Longest history: longer than the HSTU models take, so that some are cut.
LONGEST = 260
CHANGED = 12


class Shelf:
    """A state of a catalog: items by id, and ids by tag."""

    def __init__(self, items):
        self.items = {item["item_id"]: item for item in items}
        self.tagged = {}
        for item in items:
            for tag in item.get("tags", []):
                self.tagged.setdefault(tag, set()).add(item["item_id"])
        self.version = None

    def allowed(self, body):
        """Ids that the filters of a request allow."""
        filters = body.get("filters") or {}
        found = set(self.items)
        if filters.get("allow_items") is not None:
            found &= set(filters["allow_items"])
        found -= set(filters.get("exclude_items", []))
        if filters.get("exclude_seen"):
            found -= {event["item_id"] for event in body["history"]}
        for tag in filters.get("require_tags", []):
            found &= self.tagged.get(tag, set())
        for tag in filters.get("forbid_tags", []):
            found -= self.tagged.get(tag, set())
        prefix = body.get("sid_prefix")
        if prefix:
            found = {name for name in found if self.items[name]["sid"][: len(prefix)] == prefix}
        return found


class Catalogs:
    """Both states of a model's catalog and the ways between them."""

    def __init__(self, model, items, rng):
        gone, retagged = rng.sample(items, CHANGED), []
        names = {item["item_id"] for item in gone}
        kept = [item for item in items if item["item_id"] not in names]
        sids = [item["sid"] for item in rng.sample(kept, CHANGED)]
        added = [{"item_id": f"{model}-added-{number}", "sid": sid, "tags": ["new"]} for number, sid in enumerate(sids)]
        for item in rng.sample(kept, CHANGED):
            retagged.append((item, [tag for tag in item.get("tags", []) if tag != "in_stock"] + ["sale"]))
        retags = {item["item_id"]: sorted(set(tags)) for item, tags in retagged}
        after = [{**item, "tags": retags.get(item["item_id"], item.get("tags", []))} for item in kept]
        self.shelves = [Shelf(items), Shelf(after + added)]
        self.added = [item["item_id"] for item in added]
        self.ids = [item["item_id"] for item in items]
        self.forward = {
            "remove": sorted(names),
            "retag": [{"item_id": name, "tags": tags} for name, tags in retags.items()],
            "add": added,
        }
        self.whole = "".join(json.dumps(item) + "\n" for item in items).encode()


class User:
    def __init__(self, world, model, name):
        self.world, self.model, self.name = world, model, name
        rng = world.rng
        self.events, self.time = [], NOW + rng.randrange(1_000_000)
        self.features = {
            "user_id": [rng.randrange(checkpoints.USERS)],
            "country": rng.sample(range(checkpoints.COUNTRIES), rng.randint(0, 2)),
        }
        self.more(min(LONGEST, 1 + int(rng.expovariate(1 / 50))))

    def more(self, count):
        """Adds events."""
        for _ in range(count):
            self.time += self.world.rng.choice(PAUSES)
            self.events.append(self.world.event(self.model, self.time))

    def asks(self):
        """What every request of the user has in common."""
        # A timestamp that is the query's own is allowed, too.
        label = "@stable" if self.world.rng.random() < 0.1 else ""
        body = {"model": self.model + label, "user_id": self.name, "history": list(self.events)}
        if self.model != "decoder":
            body["query_time"] = self.time + self.world.rng.choice(PAUSES)
        if self.model == "ranking":
            body["features"] = self.features
        return body


class World:
    """All users, and what they ask for. Used by one thread."""

    RETURNING = 0.6
    USERS = 60

    def __init__(self, items, rng):
        self.rng = rng
        self.catalogs = {model: Catalogs(model, items[model], rng) for model in MODELS}
        self.owner = {
            name: rng.randrange(checkpoints.OWNERS) for name in self.catalogs["ranking"].ids + self.catalogs["ranking"].added
        }
        self.users, self.count = {model: [] for model in MODELS}, 0

    def item(self, model):
        catalogs, drawn = self.catalogs[model], self.rng.random()
        if drawn < UNKNOWN:
            return f"nowhere-{self.rng.randrange(1000)}"
        if drawn < UNKNOWN + ADDED:
            return self.rng.choice(catalogs.added)
        return self.rng.choice(catalogs.ids)

    def event(self, model, time):
        event = {"item_id": self.item(model), "timestamp": time}
        if model == "decoder":
            event["action"] = "view"
        elif model == "tokens":
            event["action"] = str(self.rng.randrange(1, checkpoints.TOKEN_ACTIONS))
        elif model == "ranking":
            event["action"] = str(self.rng.randrange(1, 1 + sum(checkpoints.ACTION_BITS)))
            event["features"] = {"owner_id": self.owner.get(event["item_id"], 0)}
        return event

    def user(self, model):
        """Somebody who comes back with a few new events, or somebody new."""
        users = self.users[model]
        if len(users) >= self.USERS / 4 and self.rng.random() < self.RETURNING:
            user = self.rng.choice(users)
            if len(user.events) < LONGEST:
                user.more(self.rng.randint(0, 6))
                return user
            users.remove(user)
        self.count += 1
        user = User(self, model, f"user-{self.count}")
        # At least one event of the first state, so that a history is never unknown as a whole.
        user.events[0]["item_id"] = next(
            name for name in iter(lambda: self.rng.choice(self.catalogs[model].ids), None) if self.kept(model, name)
        )
        if len(users) >= self.USERS:
            users.pop(self.rng.randrange(len(users)))
        users.append(user)
        return user

    def kept(self, model, name):
        return all(name in shelf.items for shelf in self.catalogs[model].shelves)

    def tenant(self):
        return {"tenant": f"tenant-{self.rng.randrange(3)}"} if self.rng.random() < 0.2 else {}

    def recommend(self, model):
        body = {**self.user(model).asks(), **self.tenant()}
        body["num_items"] = self.rng.choice([1, 5, 10, 10, 20, 50])
        if model != "retrieval":
            body["beam_width"] = max(body["num_items"], self.rng.choice([10, 20, 50, 50, 100]))
            body["normalization"] = self.rng.choice(["full_vocab", "allowed_set"])
            if self.rng.random() < 0.1:
                body["sid_prefix"] = self.catalogs[model].shelves[0].items[self.kept_item(model)]["sid"][: self.rng.randint(1, 2)]
        filters = self.filters(model)
        if filters:
            body["filters"] = filters
        return body

    def kept_item(self, model):
        return next(name for name in iter(lambda: self.rng.choice(self.catalogs[model].ids), None) if self.kept(model, name))

    def filters(self, model):
        rng, filters = self.rng, {}
        if rng.random() < 0.3:
            filters["exclude_seen"] = True
        if rng.random() < 0.2:
            filters["exclude_items"] = [self.item(model) for _ in range(rng.choice([1, 30, 300]))]
        if rng.random() < 0.2:
            filters["require_tags"] = [rng.choice(["in_stock", "sale"])]
        if rng.random() < 0.1:
            filters["forbid_tags"] = [rng.choice(["sale", "new"])]
        if rng.random() < 0.05:
            filters["allow_items"] = [self.item(model) for _ in range(rng.choice([0, 3, 40]))]
        return filters

    def rank(self, model):
        rng = self.rng
        body = {**self.user(model).asks(), **self.tenant()}
        count = (
            rng.choice([1, 8, 64, 255, 256, 257, checkpoints.CANDIDATES]) if model == "ranking" else rng.choice([1, 8, 40, 100])
        )
        names = dict.fromkeys([self.kept_item(model)] + [self.item(model) for _ in range(count - 1)])
        body["candidates"] = [{"item_id": name} for name in names]
        if model != "ranking":
            body["normalization"] = rng.choice(["full_vocab", "allowed_set"])
        else:
            for candidate in body["candidates"]:
                candidate["features"] = {"owner_id": self.owner.get(candidate["item_id"], 1)}
            if rng.random() < 0.5:
                body["task_weights"] = {"click": 1.0, "watch": rng.choice([0.01, -0.5])}
        return body

    def warm(self, model):
        return {**self.user(model).asks(), **self.tenant()}

    def wrong(self):
        """A request that must be refused: method, path, body, what else is odd about it, status and type."""
        made = self.rng.choice(WRONG)
        return made(self)


def changed(path, model, status, kind, /, **change):
    """A good request with fields changed; None takes a field out."""

    def make(world):
        body = {**(world.rank(model) if path == "/v1/rank" else world.recommend(model)), **change}
        return "POST", path, encoded({key: value for key, value in body.items() if value is not None}), {}, status, kind

    return make


def lacking(field, model, path):
    """A good request, one event or candidate of which lacks something that the model reads."""

    def make(world):
        body = world.rank(model) if path == "/v1/rank" else world.recommend(model)
        part = "candidates" if field == "candidate features" else "history"
        event = {**body[part][0]}
        event.pop(field.split()[-1])
        body[part] = [event, *body[part][1:]] if part == "candidates" else [event]
        return "POST", path, encoded(body), {}, 422, "invalid_value"

    return make


def fixed(method, path, body, odd, status, kind):
    return lambda world: (method, path, body, odd, status, kind)


def encoded(body):
    return json.dumps(body).encode()


def backwards(world):
    body = world.recommend("retrieval")
    names = [world.kept_item("retrieval") for _ in range(2)]
    body["history"] = [{"item_id": name, "timestamp": NOW - at} for at, name in enumerate(names)]
    return "POST", "/v1/recommend", encoded(body), {}, 422, "invalid_value"


def twice(world):
    body = world.rank("ranking")
    body["candidates"] = [body["candidates"][0]] * 2
    return "POST", "/v1/rank", encoded(body), {}, 422, "invalid_value"


def beyond(world):
    body = world.rank("ranking")
    body["candidates"] = [{"item_id": body["candidates"][0]["item_id"], "features": {"owner_id": checkpoints.OWNERS}}]
    return "POST", "/v1/rank", encoded(body), {}, 400, "invalid_request"


NOWHERE = [{"item_id": "nowhere", "timestamp": NOW}]
WRONG = [
    fixed("POST", "/v1/recommend", b'{"history": [', {}, 400, "invalid_json"),
    fixed("POST", "/v1/recommend", b"", {"media": "text/plain"}, 415, "unsupported_media_type"),
    fixed("POST", "/v1/recommend", None, {"declared": 3 << 20}, 413, "body_too_large"),
    fixed("GET", "/v1/rank", None, {}, 405, "method_not_allowed"),
    fixed("POST", "/v1/nothing", b"{}", {}, 404, "not_found"),
    fixed("POST", "/v1/models/decoder/load", b"{}", {}, 401, "unauthorized"),
    changed("/v1/recommend", "decoder", 400, "invalid_request", surprise=1),
    changed("/v1/recommend", "decoder", 400, "invalid_request", history="all of it"),
    changed("/v1/recommend", "decoder", 422, "invalid_value", num_items=0),
    changed("/v1/recommend", "decoder", 422, "limit_exceeded", beam_width=100_000),
    changed("/v1/recommend", "decoder", 422, "unknown_sid_prefix", sid_prefix=[7_777]),
    changed("/v1/recommend", "decoder", 422, "token_out_of_range", history=None, filters=None, sid_prefix=None, token_ids=[3, 88]),
    changed("/v1/recommend", "decoder", 422, "context_too_long", history=None, filters=None, sid_prefix=None, token_ids=[3] * 3_000),
    changed("/v1/recommend", "decoder", 422, "unknown_items", history=NOWHERE, strict_history=True),
    changed("/v1/recommend", "retrieval", 422, "no_known_items", history=NOWHERE),
    changed("/v1/recommend", "retrieval", 422, "empty_history", history=[]),
    changed("/v1/recommend", "retrieval", 422, "invalid_value", query_time=None),
    changed("/v1/recommend", "retrieval", 404, "model_not_found", model="nobody"),
    changed("/v1/recommend", "tokens", 404, "model_not_found", model="tokens@nowhere"),
    changed("/v1/recommend", "tokens", 404, "model_not_found", model="tokens@0123456789ab"),
    changed("/v1/recommend", "tokens", 422, "invalid_value", timeout_ms=0),
    changed("/v1/recommend", "ranking", 422, "task_not_supported", beam_width=None, normalization=None, sid_prefix=None),
    changed("/v1/rank", "retrieval", 422, "task_not_supported"),
    changed("/v1/rank", "ranking", 422, "invalid_value", candidates=[]),
    changed("/v1/rank", "ranking", 422, "no_known_candidates", candidates=[{"item_id": "nowhere", "features": {"owner_id": 1}}]),
    changed("/v1/rank", "ranking", 422, "limit_exceeded", candidates=[{"item_id": f"r{number}"} for number in range(5_000)]),
    changed("/v1/rank", "ranking", 422, "invalid_value", task_weights={"smell": 1.0}),
    lacking("timestamp", "retrieval", "/v1/recommend"),
    lacking("action", "tokens", "/v1/recommend"),
    lacking("features", "ranking", "/v1/rank"),
    lacking("candidate features", "ranking", "/v1/rank"),
    backwards,
    twice,
    beyond,
]  # fmt: skip
