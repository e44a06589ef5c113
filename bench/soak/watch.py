"""The server's memory, threads, files and metrics, second by second; and what must hold of them.

A counter never falls. Of the gauges, what requests hold is back at zero when nothing is asked; pages are all there; memory that
is counted is the sum of its parts, to the byte. """

import threading
import time

from soak.answers import RESPONSES
from soak.server import Client, metrics

COUNTERS = ("_total", "_count", "_bucket", "_sum")
PAGES = {state: f'beamline_pages{{state="{state}"}}' for state in ("free", "referenced", "cached")}
HELD = ["beamline_requests_queued", "beamline_requests_running", PAGES["referenced"]]
LOOK_SECONDS = 1.0


class Watch:
    def __init__(self, server):
        self.server, self.client = server, Client(server.address)
        self.looks, self.failures, self.stop = [], [], threading.Event()
        self.before = {}
        # Seconds for which this process itself did not run, because somebody stopped it: latencies of such a time say nothing.
        self.stopped = 0.0

    def look(self):
        """Numbers of this moment; notes counters that fell."""
        series = metrics(self.client)
        for name, value in series.items():
            if name.split("{")[0].endswith(COUNTERS) and value < self.before.get(name, 0.0):
                self.failures.append(f"{name} fell from {self.before[name]} to {value}")
        gone = [name for name in self.before if name not in series]
        self.failures += [f"{name} is not there any more" for name in gone]
        self.before = series
        return series

    def run(self, start):
        while not self.stop.wait(LOOK_SECONDS):
            try:
                series = self.look()
                found = {"at": time.monotonic() - start, **self.server.process_numbers()}
                found |= {"queued": series[HELD[0]], "running": series[HELD[1]]}
                found |= {"cached_pages": series[PAGES["cached"]], "free_pages": series[PAGES["free"]]}
                found |= {"model_memory": series['beamline_model_memory_bytes{kind="used"}'], "series": len(series)}
                found["heartbeat"] = series["beamline_engine_heartbeat_age_seconds"]
                used, capacity = (series[f'beamline_host_bytes{{kind="{kind}"}}'] for kind in ("used", "capacity"))
                # Host memory is taken as it fills, so it is no growth.
                found |= {"host_bytes": used, "besides_host_bytes": found["rss_bytes"] - used}
                if used > capacity:
                    self.failures.append(f"{used} bytes of host memory are used, {capacity} allowed")
                self.looks.append(found)
            except Exception as error:  # a finding, unless the server is gone, which others find
                self.failures.append(f"{type(error).__name__}: {error}")

    def tick(self):
        """Does nothing but notice that it was not woken for a while."""
        before = time.monotonic()
        while not self.stop.wait(0.2):
            now = time.monotonic()
            self.stopped += now - before if now - before > 2 else 0.0
            before = now

    def idle(self, seconds=20.0):
        """Waits until nothing is held and returns the metrics of then, with what did not go."""
        deadline = time.monotonic() + seconds
        while True:
            series = self.look()
            held = {name: series[name] for name in HELD if series[name] != 0}
            if not held or time.monotonic() > deadline:
                return series, held
            time.sleep(0.1)

    def back_to(self, before, seconds=25.0, more=2):
        """Waits until the process has no more threads and files than it had; returns the last numbers, with those that stayed
        above."""
        deadline = time.monotonic() + seconds
        while True:
            now = self.server.process_numbers()
            above = [
                f"{now[name]} {name}, {before[name]} before" for name in ("threads", "files") if now[name] > before[name] + more
            ]
            if not above or time.monotonic() > deadline:
                return now, above
            time.sleep(0.5)


def page_total(series):
    return sum(series[name] for name in PAGES.values())


def memory_parts(client, models):
    """Bytes that are counted, and those of the parts that are listed."""
    listed = client.ask("GET", "/v1/models").json()
    parts = sum(sum(one["memory"].values()) for one in listed["models"])
    for model in models:
        kept = client.ask("GET", f"/v1/models/{model}/catalog").json()["versions"]
        parts += sum(one["memory_bytes"] for one in kept)
    return listed["memory"]["used_bytes"], parts


def engine_problems(series):
    """What the counters of a server at rest must say to each other."""
    ends = {
        end: series[f'beamline_engine_requests_total{{end="{end}"}}']
        for end in ("accepted", "finished", "failed", "expired", "cancelled")
    }
    if ends["accepted"] != ends["finished"] + ends["failed"] + ends["expired"] + ends["cancelled"]:
        yield f"requests that were accepted and those that ended differ: {ends}"
    for name in ('beamline_engine_requests_total{end="failed"}', 'beamline_steps_total{result="failed"}', "beamline_engine_retries_total",
                 "beamline_hash_collisions_total"):  # fmt: skip
        if series[name] != 0:
            yield f"{name} is {series[name]}"


def request_problems(before, after, counted, left, items, left_items):
    """Whether the server counted what the clients did: `counted` by endpoint and outcome, `left` by endpoint where the clients
    went."""
    grown = {name: value - before.get(name, 0.0) for name, value in after.items()}
    prefix = "beamline_requests_total{endpoint="
    found = {
        tuple(part.split('"')[1] for part in name.split(",")): int(value)
        for name, value in grown.items()
        if name.startswith(prefix)
    }
    # What a request that its client left may have become.
    open_ends = ("ok", "cancelled", "invalid_request", "request_timeout", "overloaded")
    for endpoint in sorted({endpoint for endpoint, _ in counted} | set(left)):
        here = {outcome: number for (at, outcome), number in found.items() if at == endpoint}
        mine = {outcome: number for (at, outcome), number in counted.items() if at == endpoint}
        for outcome in sorted(set(here) | set(mine)):
            counts = here.get(outcome, 0), mine.get(outcome, 0)
            if counts[0] < counts[1] or counts[0] > counts[1] and not (left[endpoint] and outcome in open_ends):
                yield f"{endpoint} {outcome}: the server counted {counts[0]}, the clients {counts[1]}"
        # A client that is gone before the handler begins was never counted.
        total, least = sum(here.values()), sum(mine.values())
        if not least <= total <= least + left[endpoint]:
            yield f"{endpoint}: the server counted {total} requests, the clients {least}, and {left[endpoint]} that they left"
    answered = sum(number for (at, outcome), number in found.items() if at in RESPONSES and outcome == "ok")
    timed = grown['beamline_stage_seconds_count{stage="total"}']
    # A client may go after its answer was made and before it was sent.
    if not answered <= timed <= answered + sum(left.values()):
        yield f"{timed} answers were timed, {answered} given"
    if not items <= grown["beamline_items_total"] <= items + left_items:
        yield f"beamline_items_total grew by {grown['beamline_items_total']}, the clients got {items} items"
