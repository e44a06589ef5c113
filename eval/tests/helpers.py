"""What tests share: the package on the path, a folder that goes away, and data small enough to check by hand."""

import json
import os
import sys
import tempfile
import unittest

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))


def has(module):
    try:
        __import__(module)
    except ImportError:
        return False
    return True


def needs(module):
    """Skips, and says so where the test runs: what was not checked should be seen."""
    found = has(module)
    if not found:
        print(f"NOT CHECKED: {module} is not installed (pip install ./eval)", file=sys.stderr)
    return unittest.skipUnless(found, f"{module} is not installed; pip install ./eval")


class Folder(unittest.TestCase):
    """Each test gets `self.at(name)`: a path in an empty folder of its own."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name

    def at(self, name):
        return os.path.join(self.folder, name)

    def put(self, name, text):
        os.makedirs(os.path.dirname(self.at(name)), exist_ok=True)
        with open(self.at(name), "w", encoding="utf-8") as file:
            file.write(text)
        return self.at(name)

    def put_lines(self, name, records):
        return self.put(name, "".join(json.dumps(record) + "\n" for record in records))

    def get_lines(self, name):
        with open(self.at(name), encoding="utf-8") as file:
            return [json.loads(line) for line in file]
