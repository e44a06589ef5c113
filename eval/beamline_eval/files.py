"""Files: JSON lines, JSON, digests. Everything is written beside its place and moved there, so a half-written file has no
name."""

import contextlib
import hashlib
import json
import os

from beamline_eval.errors import EvalError


def unreadable(path, error):
    """The system's words without its numbers."""
    if isinstance(error, OSError):
        return f"{path}: {error.strerror or error}"
    return f"{path}: not JSON: {error}" if isinstance(error, json.JSONDecodeError) else f"{path}: not UTF-8 text: {error}"


@contextlib.contextmanager
def opened(path):
    """A text file to read, without the byte order mark that some programs write first. Line ends are left as they are."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            yield file
    except (OSError, UnicodeDecodeError) as error:
        raise EvalError(unreadable(path, error)) from error


def lines(path):
    """(line number, text) of the non-blank lines."""
    with opened(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line


def json_lines(path):
    """(line number, object) of a JSON-lines file."""
    for number, line in lines(path):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise EvalError(f"{path}:{number}: not JSON: {error}") from error
        if not isinstance(record, dict):
            raise EvalError(f"{path}:{number}: expected a JSON object")
        yield number, record


def read_json(path):
    try:
        with opened(path) as file:
            return json.load(file)
    except json.JSONDecodeError as error:
        raise EvalError(unreadable(path, error)) from error


@contextlib.contextmanager
def writing(path):
    """A text file that appears under `path` only when the block has ended well."""
    directory = os.path.dirname(path)
    if directory:
        os.makedirs(directory, exist_ok=True)
    unfinished = f"{path}.{os.getpid()}.unfinished"
    try:
        with open(unfinished, "w", encoding="utf-8", newline="\n") as file:
            yield file
        os.replace(unfinished, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(unfinished)
        raise


def write_json_lines(path, records):
    with writing(path) as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n")


def write_json(path, value):
    with writing(path) as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")


def short(path):
    """The last two parts of a path: results and reports name no machine."""
    return "/".join(os.path.abspath(path).split(os.sep)[-2:])


def digest(path):
    """{"file", "sha256"}: what an input was."""
    found = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                found.update(block)
    except OSError as error:
        raise EvalError(unreadable(path, error)) from error
    return {"file": short(path), "sha256": found.hexdigest()}
