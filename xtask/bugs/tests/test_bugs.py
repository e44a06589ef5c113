"""The reader of bug reports: what it understands, and that it calls wrong what is wrong. With a stand-in for the program."""

import json
import os
import sys
import tempfile
import unittest

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import calls  # noqa: E402
import checkpoints  # noqa: E402
import requests  # noqa: E402
import run  # noqa: E402
from engine import Run  # noqa: E402
from folder import Folder, counts, quoted  # noqa: E402


class StandIn:
    """A program that says what a test tells it to say."""

    def __init__(self, inspected=(0, ""), answers=(), batch=(0, "")):
        self.inspected, self.answers, self.ended = Run(*inspected), list(answers), Run(*batch)

    def run(self, *_):
        return self.inspected

    def batch(self, *_):
        return self.ended, self.answers


class Reports(unittest.TestCase):
    def folder(self, right, given="x", **files):
        place = tempfile.TemporaryDirectory()
        self.addCleanup(place.cleanup)
        files["README.md"] = f"# x\n\n**Input.** {given}\n\n**Right value.** {right}\n"
        for name, text in files.items():
            with open(os.path.join(place.name, name), "w", encoding="utf-8") as file:
                file.write(text if isinstance(text, str) else json.dumps(text))
        return Folder(place.name)

    def answer(self, name, *items, **more):
        slate = [{"item_id": item, "score": -float(rank)} for rank, item in enumerate(items, 1)]
        return {"id": name, "items": slate, "usage": {"context_tokens": 7}, **more}

    def test_words(self):
        self.assertEqual(counts("3, 0 and 0 items, with `reason`", "items"), [3, 0, 0])
        self.assertEqual(counts("A catalog of three items on two semantic IDs", "items"), [3])
        self.assertIsNone(counts("an answer", "items"))
        self.assertEqual(quoted("`inspect` names `a.b` and `model.safetensors`; `expected.json`"), ["a.b", "model.safetensors"])

    def test_a_checkpoint_that_is_served(self):
        wanted = [{"id": "r", "context_tokens": 7, "items": [{"item_id": "a", "score": -1.0}, {"item_id": "b", "score": -2.0}]}]
        folder = self.folder(
            "Items equal, scores within 3e-4.", **{"config.json": "{}", "requests.jsonl": "", "expected.json": wanted}
        )
        self.assertEqual(checkpoints.check(folder, StandIn(answers=[self.answer("r", "a", "b", "c")])), [])
        self.assertIn("stands where", checkpoints.check(folder, StandIn(answers=[self.answer("r", "z", "b")]))[0])
        self.assertIn("no answers", checkpoints.check(folder, StandIn())[0])
        # Not a word of the README allows a refusal.
        self.assertIn("refused", checkpoints.check(folder, StandIn(inspected=(1, "no")))[0])

    def test_a_checkpoint_that_is_refused(self):
        folder = self.folder(
            "Refused: `factor` is missing (or `factr` is not known).", **{"config.json": "{}", "requests.jsonl": ""}
        )
        refused = StandIn((1, "unknown field factr"), batch=(1, "error"))
        self.assertEqual(checkpoints.check(folder, refused), [])
        self.assertIn("does not name", checkpoints.check(folder, StandIn((1, "bad config"), batch=(1, "")))[0])
        self.assertEqual(
            checkpoints.check(folder, StandIn(answers=[self.answer("r", "a")])), ["inspect finds nothing wrong", "batch runs"]
        )

    def test_both_names_where_both_are_asked_for(self):
        folder = self.folder(
            "A refusal that names `one_field` and `another.field` is right too.", **{"config.json": "{}", "expected.json": []}
        )
        self.assertEqual(checkpoints.check(folder, StandIn((1, "one_field and another.field"))), [])
        self.assertIn("another.field", checkpoints.check(folder, StandIn((1, "one_field")))[0])

    def test_claims_about_answers(self):
        asked = '{"id": "a", "num_items": 3, "filters": {"allow_items": ["x", "y"]}}\n{"id": "b", "num_items": 1}\n'
        folder = self.folder("2 and 0 items, with `reason`; only allowed items, without repeats.", **{"requests.jsonl": asked})
        good = [self.answer("a", "x", "y", reason="few"), self.answer("b", reason="none")]
        self.assertEqual(requests.check(folder, StandIn(answers=good)), [])
        for wrong in (
            [self.answer("a", "x", "z", reason="few"), good[1]],
            [good[0], self.answer("b")],
            [self.answer("a", "x", "x", reason="few"), good[1]],
        ):
            self.assertTrue(requests.check(folder, StandIn(answers=wrong)))

    def test_claims_about_errors(self):
        folder = self.folder("a and b: `too_long`; c: an answer.", **{"requests.jsonl": ""})
        answers = [{"id": "a", "error": {"type": "too_long"}}, {"id": "b", "error": {"type": "too_long"}}, self.answer("c", "x")]
        self.assertEqual(requests.check(folder, StandIn(answers=answers)), [])
        for missing in range(3):
            self.assertTrue(requests.check(folder, StandIn(answers=answers[:missing] + answers[missing + 1 :])))

    def test_what_is_not_understood_is_not_right(self):
        folder = self.folder("It works.", **{"requests.jsonl": ""})
        self.assertIsNone(requests.check(folder, StandIn()))
        self.assertEqual(run.check(folder.path, StandIn())[0], "not understood")

    def test_calls(self):
        text = 'POST /v2/x/load  no Content-Type header   body: {"a": 1}\nGET /y  Accept: text/plain\nPOST /z  Content-Type: application/json\n{"b": 2}\n'
        self.assertEqual(
            calls.parse(text),
            [
                ("POST", "/v2/x/load", {}, '{"a": 1}'),
                ("GET", "/y", {"Accept": "text/plain"}, None),
                ("POST", "/z", {"Content-Type": "application/json"}, '{"b": 2}'),
            ],
        )

    def test_a_folder_that_is_named_from_where_one_stands(self):
        report = self.folder("Refused.")
        seen = []

        def check(path, engine):
            seen.append(path)
            return "right", []

        before, arguments, checks = os.getcwd(), sys.argv, run.check
        os.chdir(os.path.dirname(report.path))
        try:
            sys.argv, run.check = ["run.py", "."], check
            run.main()
        finally:
            os.chdir(before)
            sys.argv, run.check = arguments, checks
        self.assertTrue(seen and all(os.path.isabs(path) for path in seen), seen)


if __name__ == "__main__":
    unittest.main()
