"""The server under test as a process, and a client of it that keeps its connection and holds every answer to what the server
says of itself."""

import collections
import http.client
import json
import os
import re
import socket
import subprocess
import time

# An idle connection may be closed by the server at any time; one that was used this short a time ago may not.
IDLE_SECONDS = 5
# Refusals that are given before the body of a request was read. The server then closes the connection without saying so:
# nothing is sent after one.
UNREAD = {"not_found", "method_not_allowed", "unauthorized", "unsupported_media_type", "body_too_large"}
# Paths and their labels in the server's metrics.
ROUTES = {re.compile(re.escape(route).replace(r"\{\}", "[^/]+")): route for route in (
    "/v1/recommend", "/v1/rank", "/v1/warm", "/v1/models", "/v1/models/{}/load", "/v1/models/{}/unload", "/v1/models/{}/labels/{}",
    "/v1/models/{}/catalog", "/v1/models/{}/catalog/rollback")}  # fmt: skip


def endpoint(path):
    return next((route for pattern, route in ROUTES.items() if pattern.fullmatch(path)), "other")


class Server:
    def __init__(self, binary, arguments, log):
        self.arguments = arguments
        self.log = open(log, "wb")
        self.process = subprocess.Popen(
            [binary, "serve", "--listen", "127.0.0.1:0", *arguments], stdout=subprocess.PIPE, stderr=self.log, text=True
        )
        line = self.process.stdout.readline()
        if not line.startswith("listening on http://"):
            raise SystemExit(f"the server did not start: {line!r}; its log is {log}")
        host, port = line.strip().removeprefix("listening on http://").rsplit(":", 1)
        self.address = (host, int(port))
        client, deadline = Client(self.address), time.monotonic() + 60
        while client.ask("GET", "/readyz").status != 200:
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise SystemExit(f"the server does not get ready; its log is {log}")
            time.sleep(0.05)
        client.close()

    def process_numbers(self):
        """Resident bytes, those among them that no file backs, threads and open files."""
        with open(f"/proc/{self.process.pid}/status", encoding="ascii") as file:
            status = dict(line.split(":", 1) for line in file)
        files = len(os.listdir(f"/proc/{self.process.pid}/fd"))
        kib = {name: 1024 * int(status[key].split()[0]) for name, key in (("rss_bytes", "VmRSS"), ("anonymous_bytes", "RssAnon"))}
        return {**kib, "threads": int(status["Threads"]), "files": files}

    def log_end(self):
        with open(self.log.name, encoding="utf-8", errors="replace") as file:
            return "".join(file.readlines()[-20:])

    def stop(self):
        """Ends it as operators do; returns the exit status."""
        self.process.terminate()
        try:
            return self.process.wait(40)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return f"did not end within 40 s of SIGTERM: killed, {self.process.wait()}"
        finally:
            self.log.close()


class Reply:
    def __init__(self, status, headers, body):
        self.status, self.headers, self.body = status, headers, body

    def json(self):
        return json.loads(self.body)

    def error(self):
        """The type of an error."""
        try:
            return self.json()["error"]["type"]
        except (ValueError, KeyError, TypeError):
            return f"not an error body: {self.body[:200]!r}"


class Client:
    """One connection. Not for several threads at once."""

    def __init__(self, address, key=None):
        self.address, self.key = address, key
        self.connection, self.used = None, 0.0
        # Requests by endpoint and outcome, as the server should count them.
        self.counted = collections.Counter()

    def ask(self, method, path, body=None, media="application/json", send_after=0.0, declared=None):
        """Sends a request and waits for the whole answer. With `send_after` the second half of the body comes so many seconds
        later; with `declared` a length is announced and no body sent."""
        connection = self.open()
        headers = {"content-type": media} if body is not None or declared else {}
        if self.key:
            headers["authorization"] = f"Bearer {self.key}"
        if declared:
            headers["content-length"] = str(declared)
        try:
            if send_after:
                headers["content-length"] = str(len(body))
                connection.request(method, path, halves(body, send_after), headers)
            else:
                connection.request(method, path, body, headers)
            response = connection.getresponse()
            reply = Reply(response.status, response.headers, response.read())
        except BaseException:
            self.close()
            raise
        outcome = "ok" if reply.status < 300 else reply.error()
        if outcome in UNREAD:
            self.close()
        self.used = time.monotonic()
        self.counted[endpoint(path), outcome] += 1
        return reply

    def post(self, path, value):
        return self.ask("POST", path, json.dumps(value).encode())

    def open(self):
        if self.connection is not None and time.monotonic() - self.used > IDLE_SECONDS:
            self.close()
        if self.connection is None:
            self.connection = http.client.HTTPConnection(*self.address, timeout=330)
            self.connection.connect()
            self.connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self.connection

    def close(self):
        if self.connection is not None:
            self.connection.close()
            self.connection = None


def halves(body, pause):
    yield body[: len(body) // 2]
    time.sleep(pause)
    yield body[len(body) // 2 :]


def hang_up(address, path, body, how, pause):
    """Sends a request, or a part of it, waits, and goes. Whether the server got to see a request: all of its head."""
    head = f"POST {path} HTTP/1.1\r\nhost: soak\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    sent = {"head": head[: len(head) // 2], "body": head + body[: len(body) // 2], "answer": head + body}[how]
    with socket.create_connection(address, timeout=30) as connection:
        connection.sendall(sent)
        time.sleep(pause)
    return how != "head"


def metrics(client):
    """Every series by its name and labels."""
    found = {}
    for line in client.ask("GET", "/metrics").body.decode().splitlines():
        if line and not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            found[name] = float(value)
    return found


class Schema:
    """Checks values against the server's own /openapi.json, as far as that uses JSON Schema."""

    def __init__(self, document):
        self.schemas = document["components"]["schemas"]

    def problems(self, name, value):
        return list(self.walk({"$ref": f"#/components/schemas/{name}"}, value, name))

    def walk(self, schema, value, where):
        if "$ref" in schema:
            schema = self.schemas[schema["$ref"].rsplit("/", 1)[1]]
        for some in ("oneOf", "anyOf"):
            if some in schema:
                tried = [list(self.walk(option, value, where)) for option in schema[some]]
                if all(tried):
                    yield min(tried, key=len)[0]
                return
        if "enum" in schema and value not in schema["enum"]:
            yield f"{where} is {value!r}, not one of {schema['enum']}"
        types = schema.get("type", [])
        types = [types] if isinstance(types, str) else types
        if types and not any(KINDS[kind](value) for kind in types):
            yield f"{where} is {str(value)[:80]!r}, not {' or '.join(types)}"
            return
        if isinstance(value, (int, float)) and "minimum" in schema and value < schema["minimum"]:
            yield f"{where} is {value}, less than {schema['minimum']}"
        if isinstance(value, list) and "items" in schema:
            for index, one in enumerate(value):
                yield from self.walk(schema["items"], one, f"{where}[{index}]")
        if isinstance(value, dict):
            known, others = schema.get("properties", {}), schema.get("additionalProperties")
            yield from (f"{where} lacks {name}" for name in schema.get("required", []) if name not in value)
            for name, one in value.items():
                if name in known:
                    yield from self.walk(known[name], one, f"{where}.{name}")
                elif isinstance(others, dict):
                    yield from self.walk(others, one, f"{where}.{name}")
                elif known:
                    yield f"{where} has {name!r}, which is not described"


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


KINDS = {
    "object": lambda value: isinstance(value, dict), "array": lambda value: isinstance(value, list), "string": lambda value: isinstance(value, str),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool), "number": is_number,
    "boolean": lambda value: isinstance(value, bool), "null": lambda value: value is None,
}  # fmt: skip
