"""The program under test: the binary on the command line, a server of it, and the evaluation package."""

import contextlib
import http.client
import json
import os
import shutil
import subprocess
import sys
import tempfile

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
DEMO = os.path.join(ROOT, "weights", "demo", "checkpoint")
PATIENCE_S = 120


class Run:
    """How a command ended, and everything it said."""

    def __init__(self, status, said):
        self.status, self.said = status, said


class Engine:
    def __init__(self, binary):
        self.binary = binary
        # The settings of the person who runs this must not matter.
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("BEAMLINE")}

    def run(self, *arguments):
        return self.command([self.binary, *arguments])

    def command(self, command, folder=None):
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=PATIENCE_S, env=self.environment, cwd=folder, errors="replace"
            )
        except subprocess.TimeoutExpired:
            return Run(124, f"no end within {PATIENCE_S} s")
        return Run(done.returncode, done.stdout + done.stderr)

    def batch(self, checkpoint, requests, *flags):
        """(how it ended, answers); no answers if it did not start."""
        with tempfile.TemporaryDirectory() as folder:
            out = os.path.join(folder, "answers.jsonl")
            run = self.run("batch", "--checkpoint", checkpoint, "--history-cut", "exact", *flags, requests, out)
            if not os.path.isfile(out):
                return run, []
            with open(out, encoding="utf-8") as file:
                text = file.read()
        return run, [json.loads(line) for line in text.splitlines()]

    def evaluation(self, *arguments):
        return self.command([sys.executable, "-m", "beamline_eval", *arguments], os.path.join(ROOT, "eval"))

    @contextlib.contextmanager
    def server(self, *flags):
        """A server on a free port; gives a function (method, path, headers, body) -> (status, text)."""
        command = [self.binary, "serve", "--listen", "127.0.0.1:0", "--log", "error", "--kv-memory", "64MiB", *flags]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=self.environment)
        try:
            address = process.stdout.readline().rpartition("http://")[2].strip()
            if not address:
                raise RuntimeError("the server did not start")
            yield lambda method, path, headers, body: call(address, method, path, headers, body)
        finally:
            process.kill()
            process.wait()
            process.stdout.close()

    @contextlib.contextmanager
    def model_root(self):
        """A folder of models with a version `one` of a model `shop`: the demo checkpoint."""
        with tempfile.TemporaryDirectory() as folder:
            shutil.copytree(DEMO, os.path.join(folder, "shop", "one"))
            yield folder


def call(address, method, path, headers, body):
    """One request with these headers and no others (urllib would add a content type of its own)."""
    connection = http.client.HTTPConnection(address, timeout=PATIENCE_S)
    try:
        connection.request(method, path, body.encode() if body is not None else None, headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()
