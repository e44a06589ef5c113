"""Leave-one-out evaluation of a running server: hit rate and NDCG over all users of a sequence file.

Each user's last item is the target, everything before it the history. Ranking is over the whole catalog, nothing is
sampled, and nothing is removed from the slate (items of the history may be recommended again). A user whose answer
is an error counts as a miss and is reported.

    beamline serve --checkpoint DIR
    python3 eval/leave_one_out.py --sequences sequences.txt --item-offset -1 --beam-width 50

Sequence files have one line per user, `user item item ...`, oldest item first (the S3-Rec / SASRec form). Standard
library only.
"""

import argparse
import http.client
import json
import math
import sys
import threading
import time
import urllib.parse


def read_sequences(path, item_offset=0):
    """[(user, [item ids])]. `item_offset` is added to every item number to get the catalog's item id."""
    users = []
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            user, *items = line.split() or [""]
            if not items:
                continue
            try:
                users.append((user, [str(int(item) + item_offset) if item_offset else item for item in items]))
            except ValueError as error:
                raise SystemExit(f"{path}:{number}: {error}") from error
    return users


def rank_of(target, items):
    """0-based place of the target, or None."""
    return items.index(target) if target in items else None


def metrics(ranks, cut_offs):
    """Hit rate and NDCG (one relevant item: 1 / log2(rank + 2)) at each cut-off; None is a miss."""
    result = {}
    for k in cut_offs:
        hits = [rank for rank in ranks if rank is not None and rank < k]
        result[f"HR@{k}"] = len(hits) / len(ranks) if ranks else 0.0
        result[f"NDCG@{k}"] = sum(1 / math.log2(rank + 2) for rank in hits) / len(ranks) if ranks else 0.0
    return result


class Client:
    """One keep-alive connection."""

    def __init__(self, server):
        parts = urllib.parse.urlsplit(server)
        self.address, self.connection = (parts.hostname, parts.port), None

    def recommend(self, body):
        """The answer, or {"error": ...}."""
        for attempt in (0, 1, 2, 3):
            try:
                if self.connection is None:
                    self.connection = http.client.HTTPConnection(*self.address, timeout=120)
                self.connection.request("POST", "/v1/recommend", json.dumps(body), {"Content-Type": "application/json"})
                response = self.connection.getresponse()
                answer = json.loads(response.read())
                if response.status not in (429, 503) or attempt == 3:
                    return answer
                time.sleep(float(response.getheader("Retry-After", "1")))
            except (OSError, http.client.HTTPException) as error:
                self.connection = None
                if attempt == 3:
                    return {"error": {"type": "connection", "message": str(error)}}
        return None


def replay(server, requests, concurrency):
    """Answers in the order of the requests, with progress on standard error."""
    answers, lock, place, begun = [None] * len(requests), threading.Lock(), iter(range(len(requests))), time.time()

    def work():
        client = Client(server)
        while True:
            with lock:
                index = next(place, None)
                if index is not None and index % 500 == 0:
                    rate = index / max(time.time() - begun, 1e-9)
                    left = (len(requests) - index) / rate if rate else 0
                    print(f"\r{index}/{len(requests)}  {rate:.0f}/s  {left:.0f} s left ", end="", file=sys.stderr)
            if index is None:
                return
            answers[index] = client.recommend(requests[index])

    threads = [threading.Thread(target=work, daemon=True) for _ in range(concurrency)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(f"\r{len(requests)} requests in {time.time() - begun:.1f} s" + " " * 30, file=sys.stderr)
    return answers


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="http://127.0.0.1:8080")
    parser.add_argument("--sequences", required=True)
    parser.add_argument("--item-offset", type=int, default=0, help="added to item numbers to get item ids")
    parser.add_argument("--beam-width", type=int, default=50)
    parser.add_argument("--normalization", default="full_vocab", choices=["full_vocab", "allowed_set"])
    parser.add_argument("--cut-offs", default="5,10")
    parser.add_argument("--users", type=int, help="only the first N users")
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--out", help="write metrics and settings as JSON")
    arguments = parser.parse_args()
    cut_offs = [int(k) for k in arguments.cut_offs.split(",")]
    users = [user for user in read_sequences(arguments.sequences, arguments.item_offset) if len(user[1]) > 1]
    users = users[: arguments.users]
    requests = [
        {
            "history": [{"item_id": item} for item in items[:-1]],
            "num_items": max(cut_offs),
            "beam_width": arguments.beam_width,
            "normalization": arguments.normalization,
        }
        for _, items in users
    ]
    begun = time.time()
    answers = replay(arguments.server, requests, arguments.concurrency)
    seconds = time.time() - begun
    errors = [(user, answer["error"]) for (user, _), answer in zip(users, answers) if "error" in answer]
    ranks = [
        rank_of(items[-1], [item["item_id"] for item in answer.get("items", [])])
        for (_, items), answer in zip(users, answers)
    ]
    first = next((answer for answer in answers if "error" not in answer), {})
    result = {
        "users": len(users),
        **{name: round(value, 6) for name, value in metrics(ranks, cut_offs).items()},
        "errors": len(errors),
        "seconds": round(seconds, 1),
        "requests_per_second": round(len(users) / seconds, 1),
        "beam_width": arguments.beam_width,
        "normalization": arguments.normalization,
        "model_sha256": first.get("model", {}).get("sha256"),
        "catalog_version": first.get("catalog_version"),
        "command": " ".join(["python3 eval/leave_one_out.py", *sys.argv[1:]]),
    }
    print(json.dumps(result, indent=2))
    for user, error in errors[:5]:
        print(f"user {user}: {error}", file=sys.stderr)
    if arguments.out:
        with open(arguments.out, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=2)
            file.write("\n")


if __name__ == "__main__":
    main()
