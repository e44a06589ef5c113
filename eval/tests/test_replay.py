"""Replay: what is listed, what is counted, the exit status; with a stand-in for the binary, and with the binary itself if it is
built."""

import contextlib
import io
import json
import os
import subprocess
import sys
import unittest
import urllib.request

from helpers import Folder

from beamline_eval import cli, engine, replay, report
from beamline_eval.errors import EvalError

COUNTS = {
    "model_sha256": "ab",
    "catalog_version": "cd",
    "beamline_version": "0",
    "identical": 7,
    "different": 0,
    "other_model": 0,
    "other_catalog": 0,
    "degraded": 0,
    "unreadable": 0,
}


def items(*pairs):
    return [{"item_id": item, "score": score} for item, score in pairs]


def difference(line, logged, replayed, first_rank, user="u"):
    return {
        "line": line,
        "request_id": f"r{line}",
        "user_id": user,
        "first_rank": first_rank,
        "logged": items(*logged),
        "replayed": items(*replayed),
    }


SCORES = difference(2, [("a", -1.0), ("b", -2.0)], [("a", -1.0), ("b", -2.0000000000000004)], 2, "ada")
ORDER = difference(3, [("a", -1.0), ("b", -2.0)], [("b", -1.0), ("a", -2.0)], 1)
ITEMS = difference(5, [("a", -1.0), ("b", -2.0)], [("a", -1.0)], 2)
FAILS = {
    "line": 9,
    "request_id": "r9",
    "logged": items(("a", -1.0)),
    "error": {"type": "limit_exceeded", "message": "`beam_width`: 900 beams", "param": None},
}


class Listing(unittest.TestCase):
    def test_kinds(self):
        self.assertEqual([replay.kind(one) for one in (SCORES, ORDER, ITEMS, FAILS)], ["scores", "order", "items", "fails"])

    def test_who_where_and_both_slates(self):
        self.assertEqual(replay.describe(ITEMS).splitlines(), [
            "line 5, user u (request r5): other items, from rank 2 on",
            "     rank  logged  score  replayed  score",
            "        1  a        -1.0  a          -1.0",
            "  *     2  b        -2.0  –",
        ])
        self.assertEqual(
            replay.describe(FAILS), "line 9, a request without user_id (request r9): fails now: `beam_width`: 900 beams"
        )

    def test_scores_that_differ_never_look_the_same(self):
        text = replay.describe(SCORES)
        self.assertIn("user ada", text)
        self.assertIn("-2.0 ", text)
        self.assertIn("-2.0000000000000004", text)

    def test_a_long_slate_is_shown_from_before_the_difference(self):
        long = [(f"i{place}", -float(place)) for place in range(50)]
        text = replay.describe(difference(1, long, [*long[:30], ("x", -30.0), *long[31:]], 31), 4)
        self.assertIn("ranks 30 to 33 of 50", text)
        self.assertEqual(text.count("\n"), 6)
        self.assertIn("i0 ", replay.describe(difference(1, long, [*long[:30], ("x", -30.0), *long[31:]], 31), 0))

    def test_distance_of_scores(self):
        self.assertEqual(replay.furthest(ORDER), 1.0)
        self.assertEqual(replay.furthest(FAILS), 0.0)


class StandIn(Folder):
    """A program that is called as `beamline replay` is, writes what it was told to, and keeps its arguments."""

    def setUp(self):
        super().setUp()
        self.log = self.put("log.jsonl", "{}\n")

    def program(self, counts, differences, status):
        text = (
            f"#!{sys.executable}\nimport json, sys\nargs = sys.argv[1:]\njson.dump(args, open({self.at('args.json')!r}, 'w'))\n"
            f"after = lambda flag: open(args[args.index(flag) + 1], 'w')\n"
            f"counts = json.loads({json.dumps(counts)!r})\n"
            "if counts is not None:\n    json.dump(counts, after('--summary'))\n"
            f"    after('--out').write({''.join(json.dumps(one) + chr(10) for one in differences)!r})\nsys.exit({status})\n"
        )
        path = self.put("beamline", text)
        os.chmod(path, 0o755)
        return path

    def ask(self, counts, differences=(), status=0, *flags):
        program = self.program(counts, differences, status)
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main(
                ["replay", self.log, "--checkpoint", "ck", "--beamline", program, "--out", self.at("replay.json"), *flags]
            )
        return code, out.getvalue(), err.getvalue()

    def test_all_identical(self):
        code, out, _ = self.ask(COUNTS, (), 0, "--flags", "--history-cut exact", "--threads", "3")
        self.assertEqual((code, out), (0, "7 answers compared: 7 identical, 0 different\npassed over: none\n"))
        with open(self.at("args.json"), encoding="utf-8") as file:
            arguments = json.load(file)
        self.assertEqual(
            (arguments[:3], arguments[-5:]),
            (["replay", "--checkpoint", "ck"], ["--threads", "3", "--history-cut", "exact", self.log]),
        )

    def test_differences_are_listed_counted_and_kept(self):
        counts = {**COUNTS, "identical": 3, "different": 4, "degraded": 1, "other_model": 2}
        code, out, err = self.ask(
            counts, [SCORES, ORDER, ITEMS, FAILS], 1, "--show", "2", "--differences", self.at("d/all.jsonl")
        )
        self.assertEqual(code, 1)
        self.assertIn("line 2, user ada", out)
        self.assertNotIn("line 5", out)
        self.assertIn("2 more differences are not listed", err)
        self.assertIn("7 answers compared: 3 identical, 4 different", out)
        self.assertIn(
            "1 other items, 1 the same items in another order, 1 the same slate with other scores, 1 no answer now", out
        )
        self.assertIn("passed over: 2 of another checkpoint, 1 degraded", out)
        self.assertEqual(self.get_lines("d/all.jsonl"), [SCORES, ORDER, ITEMS, FAILS])
        with open(self.at("replay.json"), encoding="utf-8") as file:
            summary = json.load(file)
        self.assertEqual((summary["kinds"]["order"], summary["largest_score_distance"]), (1, 1.0))
        page = report.replay_part([summary])
        self.assertIn("line 2, user ada", page)
        self.assertIn("and 2 more", page)

    def test_nothing_to_compare_is_not_success(self):
        code, out, err = self.ask({**COUNTS, "identical": 0, "other_catalog": 7}, (), 1)
        self.assertEqual(code, 2)
        self.assertIn("passed over: 7 of another catalog", out)
        self.assertIn("no answer of this checkpoint and catalog", err)

    def test_a_program_that_fails(self):
        code, _, err = self.ask(None, (), 3)
        self.assertEqual(code, 2)
        self.assertRegex(err, r"error: beamline replay ended with status 3")
        with self.assertRaisesRegex(EvalError, "no such file"):
            replay.replay(self.at("nothing.jsonl"), "ck", "beamline")

    def test_a_page_takes_only_what_replay_wrote(self):
        wrong = self.put("wrong.json", "[]")
        metrics = self.put("m.json", json.dumps({"format": "beamline-eval/metrics/1"}))
        err = io.StringIO()
        with contextlib.redirect_stderr(err):
            self.assertEqual(cli.main(["report", metrics, "--replay", wrong, "--out", self.at("r.html")]), 2)
        self.assertIn("not a result of `beamline-eval replay`", err.getvalue())


class RealThing(Folder):
    """From a server's log to the listing, with the binary of this repository."""

    def test_serve_log_replay(self):
        program = os.path.join(engine.ROOT, "target", "release", "beamline")
        if not os.access(program, os.X_OK):
            print("NOT CHECKED: target/release/beamline is not built (cargo build --release)", file=sys.stderr)
            self.skipTest("no binary")
        checkpoint = os.path.join(engine.ROOT, "weights", "demo", "checkpoint")
        catalog = os.path.join(checkpoint, "catalog.jsonl")
        with open(catalog, encoding="utf-8") as file:
            known = [json.loads(next(file))["item_id"] for _ in range(8)]
        log = self.at("log.jsonl")
        server = subprocess.Popen(
            [
                program,
                "serve",
                "--listen",
                "127.0.0.1:0",
                "--kv-memory",
                "64MiB",
                "--checkpoint",
                checkpoint,
                "--request-log",
                log,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.addCleanup(server.stdout.close)
        self.addCleanup(server.stderr.close)
        self.addCleanup(server.kill)
        url = server.stdout.readline().split()[-1]
        for line in server.stderr:
            if " ready " in f"{line.strip()} ":
                break
        for count in range(1, 7):
            body = json.dumps(
                {"user_id": f"u{count}", "history": [{"item_id": item} for item in known[:count]], "num_items": 5}
            ).encode()
            request = urllib.request.Request(f"{url}/v1/recommend", body, {"content-type": "application/json"})
            with urllib.request.urlopen(request, timeout=60) as answer:
                self.assertEqual(answer.status, 200)
        server.terminate()
        server.communicate(timeout=60)
        logged = self.get_lines("log.jsonl")
        self.assertEqual(len(logged), 6)

        def ask():
            out, err = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = cli.main(["replay", log, "--checkpoint", checkpoint, "--beamline", program, "--flags=--kv-memory 64MiB"])
            return code, out.getvalue()

        self.assertEqual(ask(), (0, "6 answers compared: 6 identical, 0 different\npassed over: none\n"))
        one, other = logged[3]["items"][1:3]
        logged[3]["items"][1:3] = [other, one]
        self.put_lines("log.jsonl", logged)
        code, out = ask()
        self.assertEqual(code, 1)
        self.assertIn("line 4, user u4", out)
        self.assertIn("the same items in another order, from rank 2 on", out)


if __name__ == "__main__":
    unittest.main()
