"""Tables as pandas and pyarrow write them, in batches and as catalogs: every layout answers like the JSON lines."""

import json
import os
import subprocess
import tempfile
import unittest

from server import DEMO, beamline, environment, needs

START = 1_702_254_317
UNITS = ["s", "ms", "us", "ns"]


def run(*arguments):
    """Runs the binary and returns its status, standard output and standard error."""
    command = [beamline(), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    return done.returncode, done.stdout, done.stderr


def catalog_rows():
    with open(os.path.join(DEMO, "catalog.jsonl"), encoding="utf-8") as file:
        return [json.loads(line) for line in file]


class Folder(unittest.TestCase):
    """A test in a folder of its own."""

    def setUp(self):
        made = tempfile.TemporaryDirectory()
        self.addCleanup(made.cleanup)
        self.folder = made.name

    def path(self, name):
        return os.path.join(self.folder, name)

    def write(self, name, text, encoding="utf-8"):
        with open(self.path(name), "w", encoding=encoding, newline="") as file:
            file.write(text)
        return self.path(name)

    def batch(self, name, *flags, checkpoint=DEMO):
        """Answers of a batch without errors."""
        output = self.path(f"{name}.out")
        flags = ["--kv-memory", "32MiB", "--threads", "1", "--restart", *flags]
        status, _, errors = run("batch", "--checkpoint", checkpoint, *flags, self.path(name), output)
        self.assertEqual(status, 0, errors)
        with open(output, encoding="utf-8") as file:
            answers = [json.loads(line) for line in file]
        for answer in answers:
            self.assertNotIn("error", answer)
        return [[item["item_id"] for item in answer["items"]] for answer in answers]

    def lines(self, name, requests):
        return self.write(name, "".join(json.dumps(request) + "\n" for request in requests))


@needs("pandas", "pyarrow")
class Requests(Folder):
    def setUp(self):
        super().setUp()
        ids = [row["item_id"] for row in catalog_rows()[:12]]
        self.histories = [ids[:3], ids[3:8], ids[8:12]]

    def expected(self):
        requests = [{"id": f"q{n}", "history": history, "num_items": 3 + n} for n, history in enumerate(self.histories)]
        self.lines("lines.jsonl", requests)
        return self.batch("lines.jsonl")

    def frame(self):
        import pandas

        return pandas.DataFrame(
            {"id": ["q0", "q1", "q2"], "history": self.histories, "num_items": [3, 4, 5]}
        )

    def test_an_index_column_is_passed_over(self):
        table = self.frame()
        table.index = [7, 3, 9]
        table.to_parquet(self.path("index.parquet"))
        self.assertEqual(self.batch("index.parquet"), self.expected())

    def test_nullable_integers_and_floats_with_gaps_are_numbers(self):
        import pandas

        expected = self.expected()
        for kind in ["Int64", "float64", "int32", "uint8"]:
            table = self.frame()
            table["num_items"] = table["num_items"].astype(kind)
            if kind in ("Int64", "float64"):
                table["beam_width"] = pandas.Series([None, None, None], dtype=kind)
            table.to_parquet(self.path("numbers.parquet"))
            self.assertEqual(self.batch("numbers.parquet"), expected, kind)

    def test_categories_large_and_plain_strings_are_text(self):
        import pyarrow
        import pyarrow.parquet

        expected = self.expected()
        table = self.frame()
        table["id"] = table["id"].astype("category")
        table.to_parquet(self.path("categories.parquet"))
        self.assertEqual(self.batch("categories.parquet"), expected)
        for kind in [
            pyarrow.list_(pyarrow.large_string()),
            pyarrow.large_list(pyarrow.string()),
            pyarrow.list_(pyarrow.dictionary(pyarrow.int32(), pyarrow.string())),
            pyarrow.list_(pyarrow.struct([("item_id", pyarrow.string())])),
        ]:
            struct = pyarrow.types.is_struct(kind.value_type)
            rows = [[{"item_id": item} for item in history] if struct else history for history in self.histories]
            columns = {
                "id": pyarrow.array(["q0", "q1", "q2"], pyarrow.large_string()),
                "history": pyarrow.array(rows, kind),
                "num_items": pyarrow.array([3, 4, 5]),
            }
            pyarrow.parquet.write_table(pyarrow.table(columns), self.path("kinds.parquet"))
            self.assertEqual(self.batch("kinds.parquet"), expected, str(kind))

    def refused(self, name, *parts):
        status, _, errors = run("batch", "--checkpoint", DEMO, self.path(name), self.path("refused.out"))
        self.assertNotEqual(status, 0)
        for part in parts:
            self.assertIn(part, errors)

    def test_a_unit_where_no_time_belongs_is_refused_by_name(self):
        import pandas

        table = self.frame()
        table["num_items"] = pandas.to_datetime([1, 2, 3], unit="s")
        table.to_parquet(self.path("times.parquet"))
        self.refused("times.parquet", "`num_items`", "is not a time")

    def test_an_unknown_column_is_refused_with_the_one_that_was_meant(self):
        self.frame().rename(columns={"num_items": "num_item"}).to_parquet(self.path("typo.parquet"))
        self.refused("typo.parquet", "num_item", "did you mean `num_items`?", "--ignore-unknown-columns")

    def test_other_tables_are_refused_by_name(self):
        self.write("test.csv", "user_id,item_id\nu,a\n")
        self.refused("test.csv", "test.csv", "JSON lines or Parquet")
        self.write("test.inter", "user_id:token\titem_id:token\nu\ta\n")
        self.refused("test.inter", "test.inter", "beamline-eval prepare")

    def test_utf_16_is_refused_and_utf_8_with_a_mark_is_read(self):
        line = json.dumps({"history": self.histories[0], "num_items": 3}) + "\r\n"
        self.write("sixteen.jsonl", line, "utf-16")
        self.refused("sixteen.jsonl", "save it as UTF-8")
        self.write("mark.jsonl", line, "utf-8-sig")
        self.assertEqual(self.batch("mark.jsonl"), self.expected()[:1])


@needs("pandas", "pyarrow")
class Times(Folder):
    """A model that reads times gives the same answers whatever unit they come in."""

    CHECKPOINT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "fixtures", "hstu-semantic-ids")

    def requests(self):
        with open(os.path.join(self.CHECKPOINT, "catalog.jsonl"), encoding="utf-8") as file:
            ids = [json.loads(line)["item_id"] for line in file][:6]
        gaps = [0, 60, 3600, 86400, 604800, 604801]
        made = []
        for shift in range(3):
            events = [
                {"item_id": ids[n], "timestamp": START + gap, "action": n % 5} for n, gap in enumerate(gaps[shift:], shift)
            ]
            made.append({"history": events, "query_time": START + 700000 + shift, "num_items": 5})
        return made

    def write_table(self, requests, time_type, value):
        import pyarrow
        import pyarrow.parquet

        event = pyarrow.struct([("item_id", pyarrow.string()), ("timestamp", time_type), ("action", pyarrow.int64())])
        history = [
            [{**one, "timestamp": value(one["timestamp"])} for one in request["history"]] for request in requests
        ]
        columns = {
            "history": pyarrow.array(history, pyarrow.list_(event)),
            "query_time": pyarrow.array([value(request["query_time"]) for request in requests], time_type),
            "num_items": pyarrow.array([request["num_items"] for request in requests]),
        }
        pyarrow.parquet.write_table(pyarrow.table(columns), self.path("times.parquet"))
        return columns

    def test_every_unit_and_zone_is_converted(self):
        import pyarrow
        import pyarrow.parquet

        requests = self.requests()
        self.lines("lines.jsonl", requests)
        expected = self.batch("lines.jsonl", checkpoint=self.CHECKPOINT)
        factors = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
        for unit in UNITS:
            for zone in [None, "UTC", "Asia/Tokyo"]:
                factor = factors[unit]
                self.write_table(requests, pyarrow.timestamp(unit, zone), lambda second, factor=factor: second * factor)
                found = self.batch("times.parquet", checkpoint=self.CHECKPOINT)
                self.assertEqual(found, expected, f"{unit} {zone}")
        for kind in [pyarrow.int64(), pyarrow.float64()]:
            self.write_table(requests, kind, lambda second: second)
            self.assertEqual(self.batch("times.parquet", checkpoint=self.CHECKPOINT), expected, str(kind))
        columns = self.write_table(requests, pyarrow.timestamp("ns"), lambda second: second * 10**9)
        table = pyarrow.table(columns)
        pyarrow.parquet.write_table(table, self.path("times.parquet"), use_deprecated_int96_timestamps=True)
        self.assertEqual(self.batch("times.parquet", checkpoint=self.CHECKPOINT), expected, "INT96")

    def test_plain_numbers_in_another_unit_are_named(self):
        import pyarrow

        self.write_table(self.requests(), pyarrow.int64(), lambda second: second * 10**9)
        arguments = ["batch", "--checkpoint", self.CHECKPOINT, self.path("times.parquet"), self.path("out")]
        status, _, errors = run(*arguments)
        self.assertNotEqual(status, 0, "no request was answered")
        with open(self.path("out"), encoding="utf-8") as file:
            self.assertIn("Divide nanoseconds", json.loads(file.readline())["error"]["message"])
        self.assertIn("0 answered, 3 errors", errors)


@needs("pandas", "pyarrow")
class Catalogs(Folder):
    def check(self, name):
        status, output, errors = run("catalog", "check", "--checkpoint", DEMO, "--json", self.path(name))
        return status, output, errors

    def version(self, name):
        status, output, errors = self.check(name)
        self.assertEqual(status, 0, errors)
        return json.loads(output)["version"]

    def test_tables_of_pandas_are_the_same_catalog(self):
        import pandas

        rows = catalog_rows()[:50]
        for number, row in enumerate(rows):
            row["item_id"] = number
        self.lines("numbers.jsonl", rows)
        self.lines("texts.jsonl", [{**row, "item_id": str(row["item_id"])} for row in rows])
        expected = self.version("texts.jsonl")
        self.assertEqual(self.version("numbers.jsonl"), expected)
        frame = pandas.DataFrame(rows)
        frame.index = range(100, 150)
        frame["price"] = 1.5
        for kind in ["int64", "Int64", "uint16", "str", "category"]:
            frame["item_id"] = frame["item_id"].astype(str if kind == "category" else kind).astype(kind)
            frame.to_parquet(self.path("table.parquet"))
            self.assertEqual(self.version("table.parquet"), expected, kind)
            frame["item_id"] = range(50)

    def test_a_float_is_no_id(self):
        import pandas

        rows = [{**row, "item_id": float(number)} for number, row in enumerate(catalog_rows()[:3])]
        pandas.DataFrame(rows).to_parquet(self.path("floats.parquet"))
        self.lines("floats.jsonl", rows)
        for name in ["floats.parquet", "floats.jsonl"]:
            status, _, errors = self.check(name)
            self.assertNotEqual(status, 0)
            self.assertIn("1.0 is a float", errors)

    def test_an_object_of_items_and_tokens_is_a_catalog(self):
        levels = "abc"
        rows = catalog_rows()[:20]
        tokens = {
            row["item_id"]: [f"<s_{level}_{code}>" for level, code in zip(levels, row["sid"], strict=True)] for row in rows
        }
        self.write("items.index.json", json.dumps(tokens))
        self.lines("rows.jsonl", [{"item_id": row["item_id"], "sid": row["sid"]} for row in rows])
        self.assertEqual(self.version("items.index.json"), self.version("rows.jsonl"))

    def test_a_csv_table_is_refused_with_the_way_out(self):
        self.write("items.csv", "item_id,sid\na,1\n")
        status, _, errors = self.check("items.csv")
        self.assertNotEqual(status, 0)
        self.assertIn(".parquet", errors)


if __name__ == "__main__":
    unittest.main()
