"""Requests arriving at a given rate, whatever becomes of those before them; who sends them; and what came of each.

One thread draws requests from the world and puts them into a queue when they are due, many send them. A request's latency
counts from the time it was due, so waiting for a free sender is never hidden. """

import collections
import json
import queue
import random
import threading
import time

from soak.answers import essence, key, model_of
from soak.server import Client, hang_up
from soak.world import encoded

# How often what arrives, in parts of the sum.
MIX = {
    "recommend, decoder": 22, "recommend, retrieval": 22, "recommend, tokens": 14, "rank, ranking": 14, "rank, decoder": 5, "rank, tokens": 5,
    "warm": 6, "asked again": 12, "wrong": 6,
}  # fmt: skip
# Shares of good requests: with a deadline that may be too short, of clients that go, and of bodies that come in two parts.
HASTY, GOING, SLOW = 0.05, 0.04, 0.02
# Clients that go: after half of the head, half of the body, or while the answer is made.
GO = ["head", "body", "answer", "answer", "answer"]
# One arrival in BURST_EVERY is BURST arrivals at the same moment.
BURST_EVERY, BURST = 200, 24
LATE = (504, "deadline_exceeded")


class Request:
    def __init__(self, kind, method, path, body, data=None, odd=None, refusals=(), good=True):
        self.kind, self.method, self.path, self.body = kind, method, path, body
        self.data = encoded(body) if data is None and body is not None else data
        self.odd = odd or {}
        # What may come of it: an answer of status 200 if `good`, and these errors.
        self.refusals, self.good = set(refusals), good
        self.due, self.going, self.sample = 0.0, None, None


class Sample:
    """A request that is asked again, and its answers by checkpoint and catalog."""

    def __init__(self, path, body):
        self.path, self.body, self.essences = path, body, {}


class Samples:
    """All of them; used by many threads."""

    def __init__(self):
        self.lock, self.all, self.compared, self.differences = threading.Lock(), [], collections.Counter(), []

    def note(self, sample, answer, body, when):
        """Remembers an answer, or compares it with the one that was given before."""
        found, at = essence(body), key(answer)
        with self.lock:
            before = sample.essences.setdefault(at, found)
            if before is found:
                return
            self.compared[when] += 1
            if before != found:
                self.differences.append({"when": when, "path": sample.path, "body": sample.body, "before": before, "now": found})

    def any(self, rng):
        with self.lock:
            answered = [sample for sample in self.all if sample.essences]
        return rng.choice(answered) if answered else None


class Planner:
    """Draws what arrives."""

    def __init__(self, world, samples, rng, sample_share):
        self.world, self.samples, self.rng, self.sample_share = world, samples, rng, sample_share
        # Which is asked again depends on what was answered. That must not change what is drawn after it.
        self.again = random.Random(rng.random())

    def draw(self):
        """The next request, or none if it was to be asked again and nothing was answered yet."""
        rng, world = self.rng, self.world
        kind = rng.choices(list(MIX), MIX.values())[0]
        if kind == "wrong":
            method, path, data, odd, status, error = world.wrong()
            return Request(kind, method, path, None, data=data or b"", odd=odd, refusals=[(status, error)], good=False)
        if kind == "asked again":
            sample, again = self.samples.any(self.again), self.again
            if sample is None:
                return None
            # Half of the time of another tenant, whose pages do not have it.
            body = {**sample.body, "tenant": f"again-{again.randrange(1 << 30)}"} if again.random() < 0.5 else sample.body
            request = Request(kind, "POST", sample.path, body)
            request.sample = sample
            return request
        what, _, model = kind.partition(", ")
        body = world.warm(rng.choice(["decoder", "retrieval", "tokens"])) if what == "warm" else getattr(world, what)(model)
        path, drawn = f"/v1/{what}", rng.random()
        if drawn < HASTY:
            body["timeout_ms"] = rng.choice([1, 1, 2, 3, 5, 10, 20])
            if what == "recommend" and model != "retrieval" and rng.random() < 0.5:
                body["allow_degraded"] = True
            return Request(f"{what}, hasty", "POST", path, body, refusals=[LATE])
        request = Request(kind, "POST", path, body)
        if drawn < HASTY + GOING:
            request.kind, request.going = "going", rng.choice(GO)
            request.odd = {"pause": rng.choice([0.0, 0.001, 0.005, 0.02])}
        elif drawn < HASTY + GOING + SLOW:
            request.kind = "in two parts"
            request.odd = {"send_after": rng.choice([0.02, 0.2])}
        elif what != "warm" and rng.random() < self.sample_share:
            request.sample = Sample(path, body)
            with self.samples.lock:
                self.samples.all.append(request.sample)
        return request


class Outcome:
    """What came of one request."""

    __slots__ = ("at", "kind", "ms", "server_ms", "outcome", "context", "cached", "late_ms")

    def __init__(self, at, kind, ms, outcome, late_ms, answer=None):
        self.at, self.kind, self.ms, self.outcome, self.late_ms = at, kind, ms, outcome, late_ms
        usage = answer["usage"] if answer else {"context_tokens": 0, "cached_tokens": 0}
        self.context, self.cached = usage["context_tokens"], usage["cached_tokens"]
        self.server_ms = answer["timings_ms"]["total"] if answer else None


class Traffic:
    def __init__(self, server, judge, planner, samples, threads):
        self.server, self.judge, self.planner, self.samples = server, judge, planner, samples
        self.queue, self.lock = queue.Queue(), threading.Lock()
        self.outcomes, self.failures = [], []
        # What the server must have counted: by endpoint and outcome, and requests that ended as only the server knows.
        self.counted, self.left, self.items, self.left_items = collections.Counter(), collections.Counter(), 0, 0
        self.start = None
        self.senders = [threading.Thread(target=self.send, name=f"sender {number}") for number in range(threads)]

    def run(self, seconds, rate):
        """Sends for so long; ends when every request has ended."""
        rng = random.Random(self.planner.rng.random())
        self.start = time.monotonic()
        for sender in self.senders:
            sender.start()
        due, together = 0.0, 0
        # Bursts are part of the rate.
        rate /= 1 + (BURST - 1) / BURST_EVERY
        while True:
            if together == 0:
                due += rng.expovariate(rate)
                together = BURST if rng.random() < 1 / BURST_EVERY else 1
            together -= 1
            if due >= seconds:
                break
            request = self.planner.draw()
            if request is None:
                continue
            request.due = self.start + due
            time.sleep(max(0.0, request.due - time.monotonic()))
            self.queue.put(request)
        for _ in self.senders:
            self.queue.put(None)
        for sender in self.senders:
            sender.join()

    def send(self):
        client = Client(self.server.address)
        while (request := self.queue.get()) is not None:
            began = time.monotonic()
            try:
                self.one(client, request, began)
            except Exception as error:  # whatever goes wrong with one request is a finding, and the next must be sent
                self.fail(request, f"{type(error).__name__}: {error}")
        client.close()
        with self.lock:
            self.counted += client.counted

    def fail(self, request, problem):
        with self.lock:
            self.failures.append({
                "at_s": round(time.monotonic() - self.start, 3), "kind": request.kind, "method": request.method, "path": request.path,
                "body": (request.data or b"").decode(errors="replace"), "problem": problem,
            })  # fmt: skip

    def one(self, client, request, began):
        if request.going:
            seen = hang_up(self.server.address, request.path, request.data, request.going, request.odd["pause"])
            with self.lock:
                if seen:
                    self.left[request.path] += 1
                    self.left_items += request.body.get("num_items", len(request.body.get("candidates", [])))
                self.outcomes.append(Outcome(request.due - self.start, request.kind, None, f"went in the {request.going}", None))
            return
        reply = client.ask(request.method, request.path, request.data, **request.odd)
        now, answer = time.monotonic(), None
        if reply.status == 200:
            outcome = "ok"
            problems, answer = (
                self.judge.problems(request.path, request.body, reply) if request.good else (["was answered"], None)
            )
        else:
            outcome = reply.error()
            problems = self.judge.refusal(reply)
            if (reply.status, outcome) not in request.refusals:
                problems.append(f"{reply.status} {outcome}: {reply.body[:300].decode(errors='replace')}")
        for problem in problems[:3]:
            self.fail(request, problem)
        if answer and request.sample and not problems:
            self.samples.note(request.sample, answer, reply.body, "during")
        with self.lock:
            if answer:
                self.items += len(answer.get("items", answer.get("candidates", [])))
            self.outcomes.append(
                Outcome(
                    request.due - self.start,
                    request.kind,
                    1e3 * (now - request.due),
                    outcome,
                    1e3 * (began - request.due),
                    answer,
                )
            )


def ask_all(samples, client, judge, wanted, when, failures):
    """Asks samples again, one after the other, and each of a tenant that was never seen as well. `wanted` tells which by
    checkpoint and catalog. For those of a model of semantic IDs, what `/v1/rank` says of the items must be their scores, digit
    by digit. Returns how
    many were asked."""
    asked = collections.Counter()

    def get(path, body, what):
        reply = client.post(path, body)
        asked[path] += 1
        problems, answer = (
            judge.problems(path, body, reply) if reply.status == 200 else ([f"{reply.status} {reply.error()}"], None)
        )
        failures.extend({"kind": what, "path": path, "body": json.dumps(body), "problem": problem} for problem in problems)
        return None if problems else (answer, reply.body)

    for number, sample in enumerate(list(samples.all)):
        if not any(wanted(model_of(sample.body), at) for at in sample.essences):
            continue
        for tenant in ({}, {"tenant": f"{when}-{number}"}):
            found = get(sample.path, {**sample.body, **tenant}, when)
            if found:
                samples.note(sample, *found, f"{when}, {'recomputed' if tenant else 'same tenant'}")
        if (
            found
            and sample.path == "/v1/recommend"
            and found[0].get("normalization") == "full_vocab"
            and not sample.body.get("sid_prefix")
        ):
            check_scores(sample, found[0], get, samples, when)
    return asked


def check_scores(sample, answer, get, samples, when):
    scores = {item["item_id"]: item["score"] for item in answer["items"]}
    if not scores:
        return
    shared = {name: value for name, value in sample.body.items() if name in ("model", "history", "query_time", "normalization")}
    found = get("/v1/rank", {**shared, "candidates": [{"item_id": name} for name in scores]}, f"{when}, ranked")
    if found:
        ranked = {candidate["item_id"]: candidate["predictions"]["log_probability"] for candidate in found[0]["candidates"]}
        samples.compared[f"{when}, scores of /v1/rank"] += 1
        if ranked != scores:
            difference = {"path": sample.path, "body": sample.body, "before": str(scores), "now": str(ranked)}
            samples.differences.append({"when": f"{when}, scores of /v1/rank", **difference})
