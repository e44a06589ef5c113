#!/usr/bin/env python3
"""Overload and neighbours against a running binary: what is answered in time, and who waits for whom.

    python3 bench/overload.py --binary target/release/beamline --checkpoint DIR --out bench/results/overload.json

Needs python3 and a built server, nothing else. DIR is a decoder's checkpoint with its catalog (`cargo xtask bench` leaves
workload S in its
--work folder). Every request is of a user that was never seen, so nothing is cached. Measured are

- capacity: requests answered a second by eight clients without a pause;
- overload: Poisson arrivals of 2, 4 and 10 times that for --seconds each, with the defaults of the server. By windows of five
seconds: answers
  a second, P50 and P99 of the answers; then what became of the rest, how long whoever was not answered waited, and the P99 of a
  calm client in the seconds after the overload. A refusal is right when a request that comes after its Retry-After is taken;
- neighbours: small requests, 15 a second, alone and beside 1 and 16 clients that ask for the longest history and 512 beams
without a
  pause, except that they honour Retry-After, all of one tenant; and a tenant beside 1,500 clients of another, who come back at
  once.

The client shares the cores with the server. Nothing else should run meanwhile.
"""

import argparse
import asyncio
import json
import pathlib
import platform
import random
import subprocess
import threading
import time
import urllib.error
import urllib.request

WINDOW = 5


def percentile(times, percent):
    times = sorted(times)
    return round(times[(len(times) - 1) * percent // 100] * 1e3, 1) if times else None


class Server:
    """The binary, on a free port."""

    def __init__(self, options):
        command = [options.binary, "serve", "--listen", "127.0.0.1:0", "--log", "error", "--checkpoint", options.checkpoint]
        command += options.server_args.split()
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        address = self.process.stdout.readline().split("//")[1].strip()
        self.host, port = address.split(":")
        self.port = int(port)
        self.wait_until_ready()
        lines = pathlib.Path(options.checkpoint, "catalog.jsonl").read_text().splitlines()
        self.quoted = [json.dumps(json.loads(line)["item_id"]) for line in lines]

    def wait_until_ready(self):
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://{self.host}:{self.port}/readyz").close()
                return
            except urllib.error.HTTPError:
                time.sleep(0.1)
        raise SystemExit("the server did not become ready within a minute")

    def stop(self):
        self.process.terminate()
        self.process.wait(60)

    def body(self, seed, items, beams, tenant, timeout_ms=None):
        """A request of a user that nobody else is."""
        history = ",".join(random.Random(seed).choices(self.quoted, k=items))
        timeout = f',"timeout_ms":{timeout_ms}' if timeout_ms else ""
        return (
            f'{{"history":[{history}],"num_items":{min(beams, 10)},"beam_width":{beams},"tenant":"{tenant}"{timeout}}}'.encode()
        )

    async def ask(self, body):
        """Status, seconds, and Retry-After. 0 when the connection failed."""
        start = time.perf_counter()
        try:
            reader, writer = await asyncio.open_connection(self.host, self.port)
            head = "POST /v1/recommend HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\nconnection: close\r\n"
            writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            answer = await asyncio.wait_for(reader.read(-1), 120)
            writer.close()
            lines = answer.split(b"\r\n\r\n", 1)[0].decode().lower().split("\r\n")
            retry = next((line.split(":")[1].strip() for line in lines if line.startswith("retry-after:")), None)
            return int(lines[0].split()[1]), time.perf_counter() - start, retry
        except (TimeoutError, OSError, ValueError, IndexError):
            return 0, time.perf_counter() - start, None


def loop_of_a_thread():
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop


LOOP = loop_of_a_thread()
# A client that is measured beside a crowd must not wait for the crowd's tasks.
OTHER_LOOP = loop_of_a_thread()


class Load:
    """Requests of one kind, and what became of them. All clients are tasks of one thread: the client shares the cores with the
    server, so it has to cost little."""

    def __init__(self, server, items, beams, tenant, seed, timeout_ms=None, loop=LOOP):
        self.loop = loop
        self.server, self.items, self.beams, self.tenant = server, items, beams, tenant
        self.seed, self.timeout_ms = seed, timeout_ms
        self.done, self.tasks = [], []

    async def one(self, number):
        body = self.server.body(f"{self.seed} {number}", self.items, self.beams, self.tenant, self.timeout_ms)
        at = time.perf_counter()
        status, took, retry_after = await self.server.ask(body)
        self.done.append((at, status, took, retry_after))
        return status == 429, retry_after

    def start(self, coroutine):
        task = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        self.tasks.append(task)
        return task

    def open_loop(self, rate, seconds):
        """Poisson arrivals, whatever becomes of those before. Returns when the last has been sent."""

        async def arrivals():
            dice, end, due, number, sent = random.Random(self.seed), time.perf_counter() + seconds, time.perf_counter(), 0, []
            while due < end:
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                sent.append(asyncio.ensure_future(self.one(number)))
                due, number = due + dice.expovariate(rate), number + 1
            return sent

        async def all_of(sent):
            await asyncio.gather(*sent)

        self.start(all_of(self.start(arrivals()).result()))

    def closed_loop(self, clients, seconds, patient=False):
        """Clients without a pause, unless they are patient: then they come back when a refusal tells them to."""
        end = time.perf_counter() + seconds

        async def client(index):
            number = 0
            while time.perf_counter() < end:
                refused, retry_after = await self.one(f"{index} {number}")
                number += 1
                if patient and refused:
                    await asyncio.sleep(max(0.0, min(int(retry_after or 1), end - time.perf_counter())))

        for index in range(clients):
            self.start(client(index))

    def join(self):
        for task in self.tasks:
            task.result()
        return self

    def answered(self, after=0.0):
        return [took for at, status, took, _ in self.done if status == 200 and at >= after]

    def summary(self):
        times, statuses = self.answered(), {}
        for _, status, _, _ in self.done:
            statuses[str(status)] = statuses.get(str(status), 0) + 1
        lost = [took for _, status, took, _ in self.done if status != 200]
        return {
            "requests": len(self.done),
            "by_status": statuses,
            "p50_ms": percentile(times, 50),
            "p99_ms": percentile(times, 99),
            "within_100_ms": sum(took <= 0.1 for took in times),
            "longest_unanswered_ms": percentile(lost, 100),
        }


def windows(load, start, seconds):
    rows = []
    for index in range(seconds // WINDOW):
        begin = start + index * WINDOW
        ends = [(at + took, took) for at, status, took, _ in load.done if status == 200]
        took = [took for end, took in ends if begin <= end < begin + WINDOW]
        rows.append(
            {"answered_per_s": round(len(took) / WINDOW, 1), "p50_ms": percentile(took, 50), "p99_ms": percentile(took, 99)}
        )
    return rows


def overload(server, options, capacity, factor):
    load = Load(server, options.items, 32, "busy", factor, options.timeout_ms)
    start = time.perf_counter()
    load.open_loop(capacity * factor, options.seconds)
    end = time.perf_counter()
    calm = Load(server, options.items, 32, "busy", factor + 100, options.timeout_ms)
    calm.open_loop(capacity * 0.2, 10)
    load.join()
    calm.join()
    rows = windows(load, start, options.seconds)
    retries = [int(value) for _, status, _, value in load.done if status == 429 and value]
    return {
        "times_capacity": factor,
        "timeout_ms": options.timeout_ms,
        **load.summary(),
        "least_of_capacity": round(min(row["answered_per_s"] for row in rows[1:]) / capacity, 2),
        "retry_after_s": {"least": min(retries, default=None), "most": max(retries, default=None)},
        "calm_after_one_second": {
            "p50_ms": percentile(calm.answered(end + 1), 50),
            "p99_ms": percentile(calm.answered(end + 1), 99),
            "not_answered": sum(status != 200 for _, status, _, _ in calm.done),
        },
        "windows": rows,
    }


def neighbours(server, options, heavy):
    small = Load(server, 8, 32, "shop", 1)
    others = Load(server, options.heavy_items, 512, "shop", 2)
    others.closed_loop(heavy, options.seconds, patient=True)
    time.sleep(1 if heavy else 0)
    small.open_loop(15, options.seconds - 2)
    small.join()
    row = {"heavy_clients": heavy, "small": small.summary(), "heavy": others.join().summary()}
    return row


def tenants(server, options):
    greedy = Load(server, options.items, 32, "greedy", 3)
    greedy.closed_loop(1500, options.seconds)
    time.sleep(2)
    small = Load(server, 8, 32, "polite", 4, loop=OTHER_LOOP)
    small.open_loop(5, options.seconds - 4)
    small.join()
    return {"greedy_clients": 1500, "polite": small.summary(), "greedy": greedy.join().summary()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--binary", default="target/release/beamline")
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--server-args", default="")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--items", type=int, default=64, help="history of an ordinary request")
    parser.add_argument("--heavy-items", type=int, default=1300, help="history of a heavy request")
    parser.add_argument("--timeout-ms", type=int, help="deadline of the requests under overload; the server's default without it")
    parser.add_argument("--factors", default="2,4,10")
    parser.add_argument("--only", choices=["overload", "neighbours"])
    parser.add_argument("--out")
    options = parser.parse_args()
    server = Server(options)
    try:
        busy = Load(server, options.items, 32, "busy", 0)
        busy.closed_loop(8, 5)
        busy.join()
        busy.done.clear()
        busy.closed_loop(8, 15)
        capacity = len(busy.join().answered()) / 15
        alone = Load(server, options.items, 32, "busy", 5)
        alone.closed_loop(1, 8)
        alone.join()
        result = {
            "machine": platform.processor() or platform.machine(),
            "arguments": vars(options),
            "capacity_per_s": round(capacity, 1),
            "alone": alone.summary(),
            "overload": [],
            "neighbours": [],
            "tenants": [],
        }
        print(json.dumps({key: result[key] for key in ("capacity_per_s", "alone")}), flush=True)
        if options.only != "neighbours":
            for factor in map(float, options.factors.split(",")):
                result["overload"].append(overload(server, options, capacity, factor))
                print(json.dumps({key: value for key, value in result["overload"][-1].items() if key != "windows"}), flush=True)
        if options.only != "overload":
            for heavy in (0, 1, 16):
                result["neighbours"].append(neighbours(server, options, heavy))
                print(json.dumps(result["neighbours"][-1]), flush=True)
            result["tenants"].append(tenants(server, options))
            print(json.dumps(result["tenants"][-1]), flush=True)
    finally:
        server.stop()
    if options.out:
        pathlib.Path(options.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
