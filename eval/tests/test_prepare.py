"""Splits and prepared folders."""

import json
import unittest

from helpers import Folder

from beamline_eval import sources, splits
from beamline_eval.errors import EvalError
from beamline_eval.prepare import prepare
from beamline_eval.prepared import Prepared


class Splits(unittest.TestCase):
    def test_leave_one_out(self):
        users = [sources.User("u", list("abcd")), sources.User("v", list("xy")), sources.User("w", ["z"])]
        cases, training, notes = splits.leave_one_out(users)
        self.assertEqual([(c.user, c.history, c.targets) for c in cases], [("u", ["a", "b", "c"], ["d"]), ("v", ["x"], ["y"])])
        self.assertEqual((training, notes), ([["a", "b"], [], []], {"users_too_short": 1}))
        cases, training, _ = splits.leave_one_out(users, "valid")
        self.assertEqual([(c.user, c.history, c.targets) for c in cases], [("u", ["a", "b"], ["c"])])
        self.assertEqual(training, [["a", "b"], [], []])

    def test_temporal(self):
        users = [sources.User("u", list("abca"), [1, 2, 8, 9]), sources.User("new", ["a"], [9]), sources.User("gone", ["a"], [1])]
        cases, training, notes = splits.temporal(users, "5", "all")
        self.assertEqual([(c.user, c.history, c.targets) for c in cases], [("u", ["a", "b"], ["c", "a"])])
        self.assertEqual(training, [["a", "b"], ["a"]])
        self.assertEqual(notes, {"cut": 5.0, "targets": "all", "users_without_history": 1, "targets_unknown_before_cut": 1})
        self.assertEqual(splits.temporal(users, "5")[0][0].targets, ["c"])

    def test_share_as_cut(self):
        users = [sources.User("u", list("abcdefghij"), list(range(10)))]
        self.assertEqual(splits.moment(users, "80%"), 8)
        for wrong in ("100%", "x", "x%"):
            with self.assertRaises(EvalError):
                splits.moment(users, wrong)

    def test_no_times_no_temporal_split(self):
        with self.assertRaisesRegex(EvalError, "times"):
            splits.temporal([sources.User("u", ["a"])], "5")

    def test_questions_of_one_user_get_names(self):
        cases = [splits.Case("u", [], ["a"]), splits.Case("u", [], ["b"])]
        self.assertEqual([c.user for c in splits.unique_ids(cases)], ["u", "u:2"])
        with self.assertRaises(EvalError):
            splits.unique_ids([splits.Case("u", [], ["a"]), splits.Case("u", [], ["b"]), splits.Case("u:2", [], ["c"])])


class PreparedFolder(Folder):
    def test_everything_that_is_written(self):
        source = self.put("s.txt", "7 1 2 3 1\n8 4 5\n9 6\n")
        protocol = prepare(source, self.at("data"), offset=-1, exclude_seen=True, num_items=5, beam_width=8)
        requests = self.get_lines("data/requests.jsonl")
        self.assertEqual(
            requests[0],
            {
                "id": "7",
                "history": [{"item_id": "0"}, {"item_id": "1"}, {"item_id": "2"}],
                "num_items": 5,
                "beam_width": 8,
                "normalization": "full_vocab",
                "filters": {"exclude_seen": True},
            },
        )
        self.assertEqual(
            self.get_lines("data/users.jsonl"),
            [{"id": "7", "history_length": 3, "target_seen": True}, {"id": "8", "history_length": 1, "target_seen": False}],
        )
        self.assertEqual(self.get_lines("data/items.jsonl"), [{"item_id": "0", "count": 1}, {"item_id": "1", "count": 1}])
        self.assertEqual(
            (protocol["questions"], protocol["users_too_short"], protocol["targets_in_history"], protocol["exclude_seen"]),
            (2, 1, 1, True),
        )
        prepared = Prepared(self.at("data"))
        self.assertEqual(prepared.targets, {"7": ["0"], "8": ["4"]})
        self.assertEqual(prepared.histories()["7"], ["0", "1", "2"])
        self.assertEqual(prepared.training(), [["0", "1"]])
        # Results name no machine: of a path only the last two parts stay.
        self.assertNotIn(self.folder, json.dumps(protocol))

    def test_given_rows_and_training_of_their_own(self):
        rows = self.put_lines(
            "r.jsonl", [{"user_id": "A", "history": ["1"], "target": "2"}, {"user_id": "A", "history": ["1", "2"], "target": "3"}]
        )
        train = self.put_lines("t.jsonl", [{"user_id": "B", "items": ["1", "2"]}])
        protocol = prepare(rows, self.at("data"), train=[train])
        self.assertEqual((protocol["split"], protocol["training_interactions"]), ("given", 2))
        self.assertEqual(list(Prepared(self.at("data")).targets), ["A", "A:2"])

    def test_a_width_for_each_level(self):
        protocol = prepare(self.put("s.txt", "1 2 3\n"), self.at("data"), num_items=5, beam_widths=[4, 20, 8])
        (request,) = self.get_lines("data/requests.jsonl")
        self.assertEqual((request.get("beam_width"), request["beam_widths"]), (None, [4, 20, 8]))
        self.assertEqual((protocol["beam_width"], protocol["beam_widths"]), (20, [4, 20, 8]))

    def test_what_cannot_be_written_or_asked(self):
        with self.assertRaisesRegex(EvalError, "blanks"):
            prepare(self.put_lines("r.jsonl", [{"user_id": "A B", "history": ["1"], "target": "2"}]), self.at("data"))
        with self.assertRaisesRegex(EvalError, "beam"):
            prepare(self.put("s.txt", "1 2 3\n"), self.at("data"), num_items=10, beam_width=5)
        with self.assertRaisesRegex(EvalError, "last"):
            prepare(self.put("s.txt", "1 2 3\n"), self.at("data"), num_items=10, beam_widths=[50, 9])
        with self.assertRaisesRegex(EvalError, "no user"):
            prepare(self.put("s.txt", "1 2\n"), self.at("data"))


if __name__ == "__main__":
    unittest.main()
