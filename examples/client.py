#!/usr/bin/env python3
"""Asks a running server for items, ranks them, and waits where the server says that it is busy. Standard library only.

    python3 examples/client.py http://127.0.0.1:8080 ITEM..          the oldest item first
"""

import json
import sys
import time
import urllib.error
import urllib.request

PATIENCE_S = 30
"""Longest time for all tries of a request together, in seconds."""


def post(server, path, body):
    """Sends JSON and reads JSON.

    429 and 503 say in Retry-After, in seconds, when another try makes sense; every other error is final."""
    end = time.monotonic() + PATIENCE_S
    data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
    while True:
        try:
            call = urllib.request.Request(server + path, data, headers)
            with urllib.request.urlopen(call, timeout=PATIENCE_S) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                seconds, text = error.headers.get("Retry-After"), error.read().decode()
            again = error.code in (429, 503) and seconds is not None and time.monotonic() + float(seconds) < end
            if not again:
                raise SystemExit(f"{path}: {error.code} {text}") from None
            time.sleep(float(seconds))


def main():
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    server, history = sys.argv[1].rstrip("/"), sys.argv[2:]
    items = post(server, "/v1/recommend", {"history": history, "num_items": 5})["items"]
    for item in items:
        print(f"{item['score']:.4f}  {item['item_id']}")

    # Candidates from elsewhere are given scores by the same model.
    candidates = [item["item_id"] for item in reversed(items)]
    asked = {"history": history, "candidates": candidates, "task_weights": {"log_probability": 1.0}}
    for candidate in post(server, "/v1/rank", asked)["candidates"]:
        print(f"{candidate['rank']}  {candidate['item_id']}")


if __name__ == "__main__":
    main()
