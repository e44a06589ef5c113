"""Logs as people have them: every format, the same events from each, and messages that say the next step."""

import json
import unittest

from helpers import Folder, needs

from beamline_eval import sources
from beamline_eval.errors import EvalError
from beamline_eval.prepare import prepare
from beamline_eval.prepared import Prepared
from beamline_eval.sources import delimited, json_rows
from beamline_eval.values import identifier, seconds


def told(users):
    """What a source says, for comparison."""
    return [(user.id, user.items) for user in users]


class Values(unittest.TestCase):
    def test_ids_are_text_and_whole_numbers_are_their_digits(self):
        self.assertEqual([identifier(value, "x") for value in ("7", 7, 7.0, "a b", "007")], ["7", "7", "7", "a b", "007"])
        for wrong in (None, "", True, 1.5, float("nan"), float("inf"), [1]):
            with self.assertRaisesRegex(EvalError, "x: .* is not an id"):
                identifier(wrong, "x")

    def test_times_are_seconds_however_they_are_written(self):
        for value in (
            86400,
            86400.0,
            "86400",
            "86400.0",
            "1970-01-02",
            "1970-01-02T00:00:00",
            "1970-01-02 00:00:00Z",
            "1970-01-02T02:00:00+02:00",
        ):
            self.assertEqual(seconds(value, "x"), 86400, value)
        self.assertEqual(seconds("1970-01-01T00:00:00.25Z", "x"), 0.25)
        self.assertEqual(seconds("1969-12-31T23:59:59Z", "x"), -1)
        for wrong in (float("nan"), "nan", "inf", "-Infinity", None, True, "", "yesterday", "31/01/2026"):
            with self.assertRaisesRegex(EvalError, "x: .* is not a time; give seconds"):
                seconds(wrong, "x")

    def test_large_whole_numbers_stay_exact(self):
        self.assertEqual(seconds("1700000000000000001", "x"), 1700000000000000001)


class Lists(Folder):
    def test_sequences_with_offset(self):
        path = self.put("s.txt", "7 1 2 3\n\n8 4\n9\n")
        self.assertEqual(told(sources.read(path, offset=-1)), [("7", ["0", "1", "2"]), ("8", ["3"])])

    def test_offset_on_names_is_an_error_with_its_line(self):
        with self.assertRaisesRegex(EvalError, r"s\.txt:2"):
            sources.read(self.put("s.txt", "7 1 2\n8 shoe\n"), offset=1)

    def test_rows_of_both_kinds(self):
        path = self.put_lines("r.jsonl", [{"user_id": "A", "history": ["1", 2], "target": 3}])
        user = sources.read(path)[0]
        self.assertEqual((user.items, user.target), (["1", "2"], "3"))
        path = self.put_lines("w.jsonl", [{"user_id": "A", "items": ["1", "2"]}])
        self.assertIsNone(sources.read(path)[0].target)

    def test_one_object_of_users_as_lc_rec_writes_it(self):
        value = {"0": [3, 1, 2], "7": [5]}
        for text in (json.dumps(value), json.dumps(value, indent=2), "\ufeff" + json.dumps(value)):
            self.assertEqual(told(sources.read(self.put("Games.inter.json", text))), [("0", ["3", "1", "2"]), ("7", ["5"])])
        with self.assertRaisesRegex(EvalError, "one JSON object of lists"):
            sources.read(self.put("x.inter.json", "[1,\n2]"))
        with self.assertRaisesRegex(EvalError, "user 0: None is not an id"):
            sources.read(self.put("x.inter.json", '{"0": [null]}'))

    def test_a_byte_order_mark_changes_nothing(self):
        self.assertEqual(told(sources.read(self.put("s.txt", "\ufeff7 1 2\r\n8 4\r\n"))), [("7", ["1", "2"]), ("8", ["4"])])


class Events(Folder):
    """The same four events from every format."""

    expected = [("1", ["a", "b", "d"]), ("2", ["z"])]
    rows = [("1", "b", 5, 20), ("1", "a", 2, 10), ("2", "z", 5, 1), ("1", "d", 5, 20)]

    def text(self, separator, header, end="\n"):
        return separator.join(header) + end + "".join(separator.join(str(cell) for cell in row) + end for row in self.rows)

    def test_csv(self):
        header = ("user_id", "item_id", "rating", "timestamp")
        for separator in ",\t;":
            for mark, end in (("", "\n"), ("\ufeff", "\r\n")):
                self.assertEqual(told(sources.read(self.put("e.csv", mark + self.text(separator, header, end)))), self.expected)
        self.assertEqual(told(sources.read(self.put("e.tsv", self.text("\t", header)))), self.expected)
        typed = ("user_id:token", "item_id:token", "rating:float", "timestamp:float")
        self.assertEqual(told(sources.read(self.put("e.csv", self.text(",", typed)))), self.expected)
        self.assertEqual(told(sources.read(self.at("e.csv"), min_rating=3)), [("1", ["b", "d"]), ("2", ["z"])])

    def test_csv_columns_of_other_names(self):
        path = self.put("e.csv", self.text(",", ("userId", "movieId", "rating", "when")))
        with self.assertRaisesRegex(
            EvalError,
            "no column user_id, item_id, timestamp; the columns are userId, movieId, rating, when.*--columns user,item,time",
        ):
            sources.read(path)
        self.assertEqual(told(sources.read(path, columns="userId,movieId,when")), self.expected)
        with self.assertRaisesRegex(EvalError, "no column what; the columns are"):
            sources.read(path, columns="userId,what,when")
        # Two names: the file's order is the order of events.
        users = sources.read(path, columns="userId,movieId")
        self.assertEqual((told(users), users[0].times), ([("1", ["b", "a", "d"]), ("2", ["z"])], None))
        for wrong in ("userId", "a,b,c,d", "a,,c"):
            with self.assertRaisesRegex(EvalError, "three names.*or two"):
                sources.read(path, columns=wrong)

    def test_a_column_that_could_be_meant_twice_is_asked_for(self):
        path = self.put("e.csv", "user_id,item_id,timestamp,ts\n1,a,1,2\n")
        with self.assertRaisesRegex(EvalError, "both timestamp and ts"):
            sources.read(path)
        self.assertEqual(sources.read(path, columns="user_id,item_id,ts")[0].times, [2])
        with self.assertRaisesRegex(EvalError, "two columns are called ts"):
            sources.read(self.put("e.csv", "user_id,item_id,ts,ts\n1,a,1,2\n"))

    def test_csv_quotes_and_broken_lines(self):
        path = self.put("e.csv", 'user_id,item_id,title,timestamp\n1,"a,b","two\nlines",3\n')
        self.assertEqual(told(sources.read(path)), [("1", ["a,b"])])
        for text, why in (
            ("1,a\n", r"e\.csv:2: 2 columns, the header has 3"),
            ("1,a,soon\n", r"e\.csv:2, timestamp: 'soon' is not a time"),
            ("1,a,nan\n", "is not a time"),
            (",a,1\n", "user_id: '' is not an id"),
            ('1,"a,1\n', r"e\.csv:\d"),
        ):
            with self.assertRaisesRegex(EvalError, why):
                sources.read(self.put("e.csv", "user_id,item_id,timestamp\n" + text))
        with self.assertRaisesRegex(EvalError, "the first line must name the columns"):
            sources.read(self.put("e.csv", ""))

    def test_recbole(self):
        path = self.put("m.inter", self.text("\t", ("user_id:token", "item_id:token", "rating:float", "timestamp:float")))
        self.assertEqual(told(sources.read(path)), self.expected)
        self.assertEqual(told(sources.read(path, min_rating=3)), [("1", ["b", "d"]), ("2", ["z"])])
        with self.assertRaisesRegex(EvalError, "no column timestamp"):
            sources.read(self.put("m.inter", "user_id:token\titem_id:token\n1\t2\n"))

    def test_times_that_float32_cannot_tell_apart_keep_their_order(self):
        text = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n196\t242\t3\t881250949\n196\t11\t5\t881250940\n196\t7\t4\t881250940\n"
        self.assertEqual(told(sources.read(self.put("e.inter", text))), [("196", ["11", "7", "242"])])

    def test_event_lines(self):
        lines = [
            {"user_id": user, "item_id": item, "rating": rating, "timestamp": time} for user, item, rating, time in self.rows
        ]
        path = self.put_lines("e.jsonl", lines)
        self.assertEqual(json_rows.guess(path), "events")
        self.assertEqual(told(sources.read(path)), self.expected)
        self.assertEqual(told(sources.read(path, min_rating=3)), [("1", ["b", "d"]), ("2", ["z"])])
        path = self.put_lines("e.jsonl", [{"u": 1, "i": 5, "t": "2026-01-02"}, {"u": 1, "i": 4, "t": "2026-01-01"}])
        self.assertEqual(told(sources.read(path, columns="u,i,t")), [("1", ["4", "5"])])
        with self.assertRaisesRegex(EvalError, "no column user_id.*--columns"):
            sources.read(path)
        for line, why in (
            ({"user_id": 1, "item_id": 2}, "timestamp is missing"),
            ({"user_id": 1, "item_id": 2, "timestamp": None}, "timestamp is missing"),
            ({"user_id": 1.5, "item_id": 2, "timestamp": 1}, "1.5 is not an id"),
        ):
            with self.assertRaisesRegex(EvalError, rf"e\.jsonl:2.*{why}"):
                sources.read(self.put_lines("e.jsonl", [{"user_id": 1, "item_id": 2, "timestamp": 3}, line]))
        with self.assertRaisesRegex(EvalError, "is not a time"):
            sources.read(self.put("e.jsonl", '{"user_id": 1, "item_id": 2, "timestamp": NaN}\n'))

    @needs("pyarrow")
    def test_parquet_in_any_unit(self):
        import pyarrow
        import pyarrow.parquet

        moment = 1_700_000_000
        for unit, scale in (("s", 1), ("ms", 1000), ("us", 10**6), ("ns", 10**9)):
            for zone in (None, "UTC", "Asia/Tokyo"):
                times = pyarrow.array([(moment + late) * scale for late in (20, 10, 5)], pyarrow.timestamp(unit, zone))
                table = pyarrow.table(
                    {"user_id": [1, 1, 2], "item_id": ["b", "a", "c"], "timestamp": times, "price": [1.0, 2.0, 3.0]}
                )
                pyarrow.parquet.write_table(table, self.at("e.parquet"))
                users = sources.read(self.at("e.parquet"))
                self.assertEqual((told(users), users[0].times), ([("1", ["a", "b"]), ("2", ["c"])], [moment + 10, moment + 20]))

    @needs("pyarrow")
    def test_parquet_nanoseconds_are_told_apart(self):
        import pyarrow
        import pyarrow.parquet

        times = pyarrow.array([1_700_000_000_000_000_001, 1_700_000_000_000_000_000], pyarrow.timestamp("ns"))
        pyarrow.parquet.write_table(
            pyarrow.table({"user_id": [1, 1], "item_id": ["b", "a"], "timestamp": times}), self.at("e.parquet")
        )
        self.assertEqual(told(sources.read(self.at("e.parquet"))), [("1", ["a", "b"])])

    @needs("pyarrow")
    def test_parquet_messages_are_one_line_and_name_the_option(self):
        import pyarrow
        import pyarrow.parquet

        def write(**columns):
            pyarrow.parquet.write_table(pyarrow.table(columns), self.at("e.parquet"))
            return self.at("e.parquet")

        path = write(who=[1.0, 2.0], what=["b", "a"], when=[20, 10])
        with self.assertRaisesRegex(
            EvalError,
            r"no column user_id, item_id, timestamp; the columns are who, what, when.*--columns user,item,time$"
            r"|--columns user,item,time, or",
        ):
            sources.read(path)
        self.assertEqual(told(sources.read(path, columns=("who", "what", "when"))), [("1", ["b"]), ("2", ["a"])])
        for columns, why in (
            ({"user_id": [1.5], "item_id": [1], "ts": [1]}, "row 1: 1.5 is not an id"),
            ({"user_id": [1], "item_id": [None], "ts": [1]}, "item_id has 1 nulls"),
            ({"user_id": [1], "item_id": [1], "ts": [float("nan")]}, "row 1, ts: nan is not a time"),
            ({"user_id": [1], "item_id": [1], "ts": ["?"]}, "is not a time"),
        ):
            with self.assertRaisesRegex(EvalError, why):
                sources.read(write(**columns))
        with self.assertRaises(EvalError) as refused:
            sources.read(self.put("e.parquet", "not a table"))
        self.assertNotIn("\n", str(refused.exception))

    @needs("pandas")
    def test_parquet_of_pandas(self):
        import pandas

        frame = pandas.DataFrame(
            {
                "user_id": [1, 1, 2],
                "item_id": [7, 8, 9],
                "timestamp": pandas.to_datetime([20, 10, 5], unit="s").astype("datetime64[ns]"),
            }
        )
        frame[frame.item_id > 7].to_parquet(self.at("e.parquet"))
        self.assertEqual(told(sources.read(self.at("e.parquet"))), [("1", ["8"]), ("2", ["9"])])
        frame.to_csv(self.at("e.csv"))
        self.assertEqual(told(sources.read(self.at("e.csv"))), [("1", ["8", "7"]), ("2", ["9"])])

    def test_an_unknown_ending_names_the_formats(self):
        with self.assertRaisesRegex(EvalError, r"--format sequences\|rows\|events\|lists\|recbole\|csv\|parquet"):
            sources.read(self.put("e.dat", "x"))


class SplitRows(Folder):
    """Files whose rows come with their target."""

    def asked(self, source, **settings):
        prepare(source, self.at("data"), **settings)
        prepared = Prepared(self.at("data"))
        return [(user, prepared.histories()[user], items) for user, items in prepared.targets.items()]

    def test_list_columns_of_recbole_and_lc_rec(self):
        path = self.put(
            "x.train.inter", "user_id:token\titem_id_list:token_seq\titem_id:token\n0\t1 2 3\t4\n0\t1 2 3 4\t5\n1\t9\t8\n"
        )
        self.assertEqual(
            self.asked(path), [("0", ["1", "2", "3"], ["4"]), ("0:2", ["1", "2", "3", "4"], ["5"]), ("1", ["9"], ["8"])]
        )

    def test_test_sets_of_minionerec(self):
        header = "user_id,history_item_title,item_title,history_item_id,item_id,history_item_sid,item_sid\n"
        path = self.put(
            "Office.csv",
            header
            + "A1,\"['Pen, blue']\",Ink,\"[12, 7]\",3,\"['<a_1><b_2>']\",<a_3><b_4>\nA1,[],Ink,\"['x y', 'z']\",3,[],<a_3>\n",
        )
        self.assertEqual(self.asked(path), [("A1", ["12", "7"], ["3"]), ("A1:2", ["x y", "z"], ["3"])])
        with self.assertRaisesRegex(EvalError, r"Office\.csv:2, history_item_id: not a list of items"):
            sources.read(self.put("Office.csv", 'user_id,history_item_id,item_id\nA,"[1, f()]",3\n'))

    def test_a_list_is_read_and_never_run(self):
        for text in ("[__import__('os').getpid()]", "[1" + "]" * 5, "[" * 100_000):
            with self.assertRaises(EvalError):
                delimited.listed(text, "x")

    @needs("pyarrow")
    def test_parquet(self):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(
            pyarrow.table({"user_id": [1, 2], "item_id_list": [[1, 2], [3]], "item_id": [9, 8]}), self.at("x.parquet")
        )
        self.assertEqual(self.asked(self.at("x.parquet")), [("1", ["1", "2"], ["9"]), ("2", ["3"], ["8"])])

    def test_a_rating_has_no_place_in_them(self):
        path = self.put("x.inter", "user_id:token\titem_id_list:token_seq\titem_id:token\trating:float\n0\t1 2 3\t4\t1\n")
        with self.assertRaisesRegex(EvalError, "--min-rating is for events"):
            sources.read(path, min_rating=2)


if __name__ == "__main__":
    unittest.main()
