"""A folder of a bug report: what goes in, and which value is right, in the words of its README.

    # title

    **Input.** What the files are and how to run them.

    **Right value.** What a correct program gives; often with a second way to be right, such as a refusal.
"""

import json
import os
import re

NUMBERS = {
    word: number for number, word in enumerate("zero one two three four five six seven eight nine ten eleven twelve".split())
}
NUMBERS |= {"no": 0, "none": 0}
# Words in code quotes that are commands of the program, and so name nothing in a message.
COMMANDS = {"inspect", "serve", "batch", "recommend"}


class Folder:
    def __init__(self, path):
        self.path, self.name = path, os.path.basename(os.path.normpath(path))
        with open(self.at("README.md"), encoding="utf-8") as file:
            text = file.read()
        self.input = paragraph(text, "Input")
        self.right = paragraph(text, "Right value")
        self.files = sorted(os.listdir(path))

    def at(self, name):
        return os.path.join(self.path, name)

    def ending(self, *endings):
        return [self.at(name) for name in self.files if name.endswith(endings)]

    def checkpoint(self):
        """The checkpoint that the folder is or has."""
        for place in (self.path, self.at("checkpoint")):
            if os.path.isfile(os.path.join(place, "config.json")):
                return place
        return None

    def requests(self):
        """Files of requests, JSON lines first."""
        found = [path for path in self.ending(".jsonl", ".parquet") if os.path.basename(path).startswith(("requests", "prompts"))]
        return sorted(found, key=lambda path: (path.endswith(".parquet"), path))

    def expected(self):
        """The answers of expected.json, or nothing."""
        if "expected.json" not in self.files:
            return None
        with open(self.at("expected.json"), encoding="utf-8") as file:
            return json.load(file)

    def says(self, pattern):
        """Whether the right value speaks of this."""
        return re.search(pattern, self.right, re.IGNORECASE)

    def tolerance(self, default):
        found = re.search(r"within (\d[\d.e-]*\d)", self.right)
        return float(found.group(1)) if found else default

    def may_be_refused(self):
        return bool(self.says(r"refus|one message|or an error|or one error"))


def paragraph(text, title):
    found = re.search(rf"\*\*{title}\.\*\*\s*(.*?)(?=\n\*\*|\Z)", text, re.DOTALL)
    return " ".join(found.group(1).split()) if found else ""


def quoted(text):
    """Names in code quotes, without files and commands."""
    names = [name.strip() for name in re.findall(r"`([^`]+)`", text)]
    return [
        name for name in names if name not in COMMANDS and not re.search(r"\.(jsonl?|parquet|inter|run|txt)$|^\S+ \S+ \S", name)
    ]


def number(word):
    """A number as digits or as a word."""
    return int(word) if word.isdigit() else NUMBERS.get(word.lower())


def counts(text, noun):
    """The numbers before a noun: `3, 0 and 0 items` gives [3, 0, 0]."""
    words = r"(?:\d+|" + "|".join(NUMBERS) + ")"
    found = re.search(rf"\b({words}(?:(?:, | and |, and ){words})*) {noun}\b", text, re.IGNORECASE)
    return [number(word) for word in re.split(r", and |, | and ", found.group(1))] if found else None
