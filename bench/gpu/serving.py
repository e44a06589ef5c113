"""The real binary on the GPU against itself on the CPU: a file of requests, and requests over HTTP with pages that go to host
memory and back.

Place in the flow: the step `serve` of run.py, after correctness. Lists of items must overlap as far as bf16 lets them; what the
server says of itself over HTTP (reuse, pages brought back) must be there. Standard library."""

import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request

# Of the items of the CPU's answers, as many must be in the GPU's: what lies at the end of a list may be another by bf16.
OVERLAP = 0.9
# Room for one largest request and little else, so that every user displaces the others.
TINY = ["--kv-memory", "1MiB", "--max-context", "1024", "--max-beam-width", "128", "--kv-host-memory", "64MiB"]
READY_SECONDS = 120


def compare(runner, step, ours, theirs, **more):
    """Notes how far lists of items agree."""
    overlap = sum(len(set(a) & set(b)) for a, b in zip(ours, theirs)) / max(1, sum(map(len, theirs)))
    agrees = len(ours) == len(theirs) > 0 and overlap >= OVERLAP
    runner.note(step, status="passed" if agrees else "failed", overlap=round(overlap, 4),
                same_first=sum(a[:1] == b[:1] for a, b in zip(ours, theirs)), requests=len(ours), **more)


def items_of(answer):
    return [item["item_id"] for item in answer["items"]]


def batch(runner, step, checkpoint, bodies):
    """A file of requests."""
    requests, answers = (os.path.join(runner.out, f"{step.replace(' ', '-')}-{what}.jsonl") for what in ("requests", "answers"))
    with open(requests, "w", encoding="utf-8") as file:
        for index, body in enumerate(bodies):
            file.write(json.dumps({"id": str(index), **body}) + "\n")
    for path in (answers, answers + ".cpu"):
        if os.path.exists(path):
            os.remove(path)
    command = [runner.binary("beamline"), "batch", "--checkpoint", checkpoint]
    if not (runner.run(step, command + ["--device", "cuda:0", requests, answers]) and
            runner.run(f"{step} on the CPU", command + [requests, answers + ".cpu"])):
        return
    lists = []
    for path in (answers, answers + ".cpu"):
        with open(path, encoding="utf-8") as file:
            lists.append([items_of(json.loads(line)) for line in file])
    compare(runner, f"{step} compared", *lists)


class Server:
    """`beamline serve`, to be ended by the signal that an operator sends."""

    def __init__(self, runner, step, command):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"http://127.0.0.1:{probe.getsockname()[1]}"
        self.log = open(os.path.join(runner.out, step.replace(" ", "-") + ".log"), "wb")
        self.process = subprocess.Popen(command + ["--listen", self.address.removeprefix("http://")], stdout=self.log,
                                        stderr=subprocess.STDOUT, env=runner.environment, cwd=runner.folder)

    def ask(self, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read().decode()

    def wait(self):
        until = time.time() + READY_SECONDS
        while time.time() < until and self.process.poll() is None:
            try:
                self.ask("/readyz")
                return True
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        return False

    def metric(self, name):
        return sum(float(value) for value in re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", self.ask("/metrics"), re.M))

    def end(self):
        """Its exit status, after it was asked to end."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return "it did not end"
        finally:
            self.log.close()


def visits(items):
    """Twelve users who come in turns, each with a longer history than before."""
    for visit in range(3):
        for user in range(12):
            history = [{"item_id": items[(7 * user + 3 * at) % len(items)]} for at in range(60 + 4 * user + visit)]
            yield {"user_id": f"u{user}", "history": history, "num_items": 10, "beam_width": 60}


def http(runner, checkpoint, items):
    answers, what = {}, {}
    for step, device in (("serve HTTP", ["--device", "cuda:0"]), ("serve HTTP on the CPU", [])):
        command = [runner.binary("beamline"), "serve", "--checkpoint", checkpoint, *device, *TINY]
        server, why = Server(runner, step, command), None
        try:
            if server.wait():
                answers[step] = [json.loads(server.ask("/v1/recommend", body)) for body in visits(items)]
                restored = server.metric("beamline_host_restored_pages_total")
                what[step] = {
                    "cached_tokens": sum(answer["usage"]["cached_tokens"] for answer in answers[step]),
                    "restored_pages": restored,
                }
                why = None if restored > 0 else "no page came back from host memory"
            else:
                why = "it was not ready"
        except (urllib.error.URLError, OSError, ValueError, KeyError) as error:
            why = f"it did not answer: {error}"
        status = server.end()
        why = why or (f"exit status {status}" if status != 0 else None)
        runner.note(step, status="failed" if why else "passed", **what.get(step, {}), **({"why": why} if why else {}))
    if len(answers) == 2:
        compare(runner, "serve HTTP compared", *[[items_of(answer) for answer in each] for each in answers.values()])


def timed(runner, shape, items, context):
    """Times requests over HTTP on random weights, one after the other: users who are new, and the same users again with three
    items more."""
    folder = os.path.join(runner.out, "random-weights")
    if not runner.run(
        "serve random weights, folder",
        [runner.binary("gpu_bench"), "measure", "--shape", shape, "--items", str(items), "--folder", folder],
    ):
        return
    step = "serve random weights"
    command = [runner.binary("beamline"), "serve", "--random-weights", os.path.join(folder, "config.json"), "--device", "cuda:0"]
    server, times, why = Server(runner, step, command), {"new": [], "again": []}, None
    try:
        if server.wait():
            for user in range(24):
                for visit, more in (("new", 0), ("again", 3)):
                    history = [{"item_id": f"item-{(101 * user + at) % items}"} for at in range(context // 3 + more)]
                    body = {"user_id": f"u{user}", "history": history, "num_items": 10, "beam_width": 64}
                    start = time.perf_counter()
                    answer = json.loads(server.ask("/v1/recommend", body))
                    times[visit].append((time.perf_counter() - start) * 1e3)
                    if len(answer["items"]) != 10 or (visit == "again") != (answer["usage"]["cached_tokens"] > 0):
                        why = f"user {user}, {visit}: {len(answer['items'])} items, {answer['usage']['cached_tokens']} cached tokens"
        else:
            why = "it was not ready"
    except (urllib.error.URLError, OSError, ValueError, KeyError) as error:
        why = f"it did not answer: {error}"
    status = server.end()
    why = why or (f"exit status {status}" if status != 0 else None)
    # The first users warm everything up.
    medians = {f"{visit}_median_ms": round(sorted(all[4:])[len(all[4:]) // 2], 3) for visit, all in times.items() if len(all) > 4}
    runner.note(step, status="failed" if why else "passed", context_tokens=context, shape=shape,
                **({} if runner.rehearses else medians), **({"why": why} if why else {}))


def check(runner):
    checkpoint = os.path.join(runner.folder, "fixtures", "hf", "qwen3-untied")
    with open(os.path.join(checkpoint, "catalog.jsonl"), encoding="utf-8") as file:
        items = [json.loads(line)["item_id"] for line in file]
    histories = [[{"item_id": item} for item in items[:length]] for length in range(1, 12)]
    batch(runner, "serve", checkpoint, [{"history": history, "num_items": 10, "beam_width": 50} for history in histories])
    hstu = os.path.join(runner.folder, "fixtures", "served", "hstu-semantic-ids")
    with open(os.path.join(hstu, "reference.json"), encoding="utf-8") as file:
        batch(runner, "serve HSTU", hstu, [case["body"] for case in json.load(file)["recommend"]])
    http(runner, checkpoint, items)
