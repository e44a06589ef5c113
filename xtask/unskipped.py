#!/usr/bin/env python3
"""Runs the tests of a folder, and fails if one is skipped for want of a package.

    python xtask/unskipped.py FOLDER

A test that lacks data may be skipped. Its reason begins with "no ": "no weights/demo/checkpoint".
"""

import sys
import unittest


def unexcused(skipped):
    """Of [(test, reason)], those whose reason is not absent data."""
    return [(test, reason) for test, reason in skipped if not reason.startswith("no ")]


def run(folder):
    """Whether all tests of a folder passed, and none was left out."""
    result = unittest.TextTestRunner(stream=sys.stderr).run(unittest.TestLoader().discover(folder, top_level_dir=folder))
    for test, reason in result.skipped:
        print(f"SKIPPED: {test}: {reason}", file=sys.stderr)
    missed = unexcused(result.skipped)
    if missed:
        print(f"{folder}: {len(missed)} tests were skipped for want of a package", file=sys.stderr)
    if result.testsRun == 0:
        print(f"{folder}: no tests", file=sys.stderr)
    return result.wasSuccessful() and not missed and result.testsRun > 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(0 if run(sys.argv[1]) else 1)
