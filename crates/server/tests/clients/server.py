"""Starts the server for tests that talk to it with other projects' clients.

`cargo xtask test` runs these tests with the packages of xtask/requirements.txt and $BEAMLINE set to the built binary. By
hand: cargo build --release && target/venv/bin/python -m unittest discover -s crates/server/tests/clients
"""

import importlib
import os
import subprocess
import sys
import time
import unittest
import urllib.error
import urllib.request

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), *[os.pardir] * 4))
DEMO = os.path.join(ROOT, "weights", "demo", "checkpoint")
PATIENCE_S = 60


def beamline():
    """Path of the binary under test."""
    return os.environ.get("BEAMLINE") or os.path.join(ROOT, "target", "release", "beamline")


def needs(*modules):
    """Skips a test whose packages are missing, and says so: what was not checked should be seen."""

    def lacks(module):
        try:
            importlib.import_module(module)
        except ImportError:
            return True
        return False

    missing = [module for module in modules if lacks(module)]
    if missing:
        print(f"SKIPPED: {', '.join(missing)} not installed (pip install -r xtask/requirements.txt)", file=sys.stderr)
    return unittest.skipIf(missing, f"{', '.join(missing)} not installed")


def environment():
    """The environment without settings of whoever runs the tests."""
    return {name: value for name, value in os.environ.items() if not name.startswith("BEAMLINE")}


class Server:
    """A server on a free port of the loopback address. `with Server() as server: server.url, server.address`."""

    def __init__(self, *flags, checkpoint=DEMO):
        chosen = ["--checkpoint", checkpoint] if checkpoint else []
        command = [beamline(), "serve", "--listen", "127.0.0.1:0", "--log", "error", "--kv-memory", "32MiB", *chosen, *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
        first = self.process.stdout.readline()
        if "http://" not in first:
            self.close()
            raise RuntimeError(f"{' '.join(command)} ended with {self.process.returncode}")
        self.address = first.split("http://", 1)[1].strip()
        self.url = f"http://{self.address}"
        if checkpoint:
            self.wait_until_ready()

    def wait_until_ready(self):
        """Returns once /readyz says 200."""
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/readyz", timeout=PATIENCE_S) as answer:
                    if answer.status == 200:
                        return
            except urllib.error.URLError:
                time.sleep(0.05)
        self.close()
        raise RuntimeError("the server is not ready")

    def close(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
