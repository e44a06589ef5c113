"""Whether an answer is what its request asked for: its shape, its items, its order, its numbers; and the part of it that must
never change.

An answer says which checkpoint and which catalog it is of. What it holds beside times and what was cached is a function of
those two and the request, so `essence` of two answers to one request must be the same bytes whenever they agree in `key`. """

import json
import math

RESPONSES = {"/v1/recommend": "RecommendResponse", "/v1/rank": "RankResponse", "/v1/warm": "WarmResponse"}
# What depends on when and beside whom a request was computed.
PASSING = ["request_id", "timings_ms", "usage"]


def essence(body):
    """The part of an answer that must not change, with every number in the digits that were sent."""
    answer = json.loads(body, parse_float=lambda digits: f"number {digits}")
    for name in PASSING:
        answer.pop(name)
    return json.dumps(answer, sort_keys=True)


def key(answer):
    """Checkpoint and catalog."""
    return answer["model"]["sha256"], answer.get("catalog_version")


def model_of(body):
    """The name of the model that a request asks, without a label."""
    return body["model"].partition("@")[0]


class Judge:
    """Checks answers; used by many threads."""

    def __init__(self, schema, world, digests, longest):
        """`digests` are those of every model, `longest` the most events that its context holds."""
        self.schema, self.digests, self.longest = schema, digests, longest
        self.shelves = {(model, shelf.version): shelf for model, catalogs in world.catalogs.items() for shelf in catalogs.shelves}

    def problems(self, path, body, reply):
        """What is wrong with an answer of status 200."""
        try:
            answer = reply.json()
        except ValueError:
            return [f"not JSON: {reply.body[:200]!r}"], None
        found = self.schema.problems(RESPONSES[path], answer)
        if not found:
            found = list(self.common(body, reply, answer))
        if not found and path != "/v1/warm":
            shelf = self.shelves.get((model_of(body), answer["catalog_version"]))
            if shelf is None:
                return [f"a catalog that was never there: {answer['catalog_version']}"], answer
            found = list((self.slate if path == "/v1/recommend" else self.ranking)(body, answer, shelf))
            found += self.history(body, answer, shelf)
        return found, answer

    def refusal(self, reply):
        """What is wrong with an error."""
        try:
            answer = reply.json()
        except ValueError:
            return [f"an error that is not JSON: {reply.body[:200]!r}"]
        return self.schema.problems("ErrorBody", answer) + (
            [] if reply.headers.get("x-request-id") else ["an error without x-request-id"]
        )

    def common(self, body, reply, answer):
        model = model_of(body)
        if answer["model"]["name"] != model or answer["model"]["sha256"] not in self.digests[model]:
            yield f"answered by {answer['model']}, asked was {body['model']}"
        if reply.headers.get("x-request-id") != answer["request_id"]:
            yield "request_id and x-request-id differ"
        usage, timings = answer["usage"], answer["timings_ms"]
        if usage["cached_tokens"] > usage["context_tokens"]:
            yield f"more cached than there is: {usage}"
        if not all(math.isfinite(ms) and ms >= 0 for ms in timings.values()):
            yield f"times: {timings}"

    def history(self, body, answer, shelf):
        events = [event["item_id"] for event in body["history"]]
        unknown = list(dict.fromkeys(name for name in events if name not in shelf.items))
        if answer["unknown_items"] != unknown:
            yield f"unknown_items are {answer['unknown_items']}, should be {unknown}"
        if body.get("sid_prefix"):
            return
        most = self.longest[model_of(body)]
        known, step = sum(name in shelf.items for name in events), max(1, most // 4)
        dropped = -(-max(0, known - most) // step) * step
        if answer["dropped_history"] != dropped:
            yield f"dropped_history is {answer['dropped_history']}, should be {dropped}"

    def slate(self, body, answer, shelf):
        items, wanted = answer["items"], body["num_items"]
        names, allowed = [item["item_id"] for item in items], shelf.allowed(body)
        if len(set(names)) != len(names) or not allowed.issuperset(names):
            yield f"items twice, or that are not allowed: {sorted(set(names) - allowed) or names}"
        # The search is exact: a filter costs no place, and nothing that is allowed is missing.
        if len(names) != min(wanted, len(allowed)):
            yield f"{len(names)} items, {wanted} asked for and {len(allowed)} allowed"
        if (answer["items_requested"], answer["items_returned"]) != (wanted, len(names)):
            yield f"counts {answer['items_requested']} and {answer['items_returned']} of {wanted} and {len(names)}"
        reason = None if len(names) == wanted else "fewer_items_than_requested" if names else "filters_leave_nothing"
        if answer.get("reason") != reason:
            yield f"reason is {answer.get('reason')!r}, should be {reason!r}"
        if [item["rank"] for item in items] != list(range(1, len(items) + 1)):
            yield "ranks are not 1, 2, 3"
        scores = [item["score"] for item in items]
        if not all(map(math.isfinite, scores)) or scores != sorted(scores, reverse=True):
            yield f"scores are not finite, or run upwards: {scores}"
        if model_of(body) != "retrieval" and any(score > 0 for score in scores):
            yield f"log-probabilities above 0: {scores}"
        if any(item["sid"] != shelf.items[item["item_id"]]["sid"] for item in items if item["item_id"] in shelf.items):
            yield "a semantic ID that is not the catalog's"
        if answer.get("normalization") != body.get("normalization"):
            yield f"normalization is {answer.get('normalization')!r}"
        degraded = answer.get("degraded")
        if degraded and not body.get("allow_degraded"):
            yield "degraded without leave"

    def ranking(self, body, answer, shelf):
        asked = [candidate["item_id"] for candidate in body["candidates"]]
        known = [name for name in asked if name in shelf.items]
        found = [candidate["item_id"] for candidate in answer["candidates"]]
        if answer["unknown_candidates"] != [name for name in asked if name not in shelf.items]:
            yield f"unknown_candidates are {answer['unknown_candidates']}"
        ranked = model_of(body) == "ranking"
        tasks = {"click", "like", "watch"} if ranked else {"log_probability"}
        weights = body.get("task_weights") if ranked else {"log_probability": 1.0}
        if (sorted(found) if weights else found) != (sorted(known) if weights else known):
            yield "other candidates, or in another order, than were asked about"
        for candidate in answer["candidates"]:
            predictions = candidate["predictions"]
            if set(predictions) != tasks or not all(map(math.isfinite, predictions.values())):
                yield f"predictions are {predictions}"
                return
            if (
                ranked
                and not (0 <= predictions["click"] <= 1 and 0 <= predictions["like"] <= 1)
                or not ranked
                and predictions["log_probability"] > 0
            ):
                yield f"no probabilities: {predictions}"
            score = weights and sum(weight * predictions[task] for task, weight in weights.items())
            if weights and not abs(candidate["score"] - score) <= 1e-9 or not weights and candidate.get("score") is not None:
                yield f"score {candidate.get('score')} of {predictions}"
        scores = [candidate.get("score") for candidate in answer["candidates"]]
        if weights and scores != sorted(scores, reverse=True):
            yield "scores run upwards"
        ranks = [candidate.get("rank") for candidate in answer["candidates"]]
        if ranks != ([*range(1, len(found) + 1)] if weights else [None] * len(found)):
            yield f"ranks are {ranks[:5]}"
