"""HTTP calls as other programs send them, to the demo checkpoint."""

import base64
import json
import re

from engine import DEMO


def parse(text):
    """[(method, path, headers, body)]. A call begins with its method; `body:` or the lines that follow hold the body."""
    found = []
    for line in text.splitlines():
        start = re.match(r"(GET|POST|PUT|PATCH|DELETE) (\S+)(.*)", line)
        if start:
            head, _, body = start.group(3).partition("body:")
            named = dict(re.findall(r"([A-Z][A-Za-z-]+): (\S+)", head))
            found.append([start.group(1), start.group(2), named, body.strip()])
        elif line.strip() and found:
            found[-1][3] += line
    return [(method, path, headers, body or None) for method, path, headers, body in found]


def check(folder, engine):
    """Complaints, and None if no word of the right value was understood."""
    text = ""
    for path in folder.ending(".txt"):
        with open(path, encoding="utf-8") as file:
            text += file.read() + "\n"
    calls = parse(text)
    if not calls:
        return None
    if any("/infer" in path for _, path, _, _ in calls):
        with engine.server("--checkpoint", DEMO) as send:
            ready(send)
            return [complaint for one in calls for complaint in inference(send, one)]
    with engine.model_root() as root, engine.server("--model-root", root, "--checkpoint", DEMO) as send:
        ready(send)
        return [complaint for one in calls for complaint in carried_out(send, one)]


def ready(send):
    import time

    for _ in range(1200):
        if send("GET", "/readyz", {}, None)[0] == 200:
            return
        time.sleep(0.05)
    raise RuntimeError("the server is not ready")


def carried_out(send, one):
    """The call is answered, or refused for a reason of the model: not for its headers or parameters."""
    method, path, headers, body = one
    status, said = send(method, path.replace("NAME", "shop"), headers, body)
    where = f"{method} {path} {body or ''}"
    if status == 415 or status >= 500:
        return [f"{where}: {status} {said[:160]}"]
    if status >= 400 and re.search(r"content.type|unknown field|parameters", said, re.IGNORECASE):
        return [f"{where}: {status} {said[:160]}"]
    if path.endswith("/index") and (status != 200 or not isinstance(json.loads(said), list)):
        return [f"{where}: {status}, not a list: {said[:160]}"]
    return []


def inference(send, one):
    """An answer with one BYTES output that holds the slate, or a 404 in the protocol's form."""
    method, path, headers, body = one
    status, said = send(method, path.replace("NAME", "default"), headers, body)
    try:
        answer = json.loads(said)
        if status == 404:
            return [] if isinstance(answer["error"], str) else [f"404, and `error` is no text: {said[:160]}"]
        (output,) = answer["outputs"]
        data = output["data"][0]
        slate = json.loads(data if data.lstrip().startswith("{") else base64.b64decode(data))
        wanted = json.loads(json.loads(body)["inputs"][0]["data"][0]).get("num_items")
        if status != 200 or output["datatype"] != "BYTES" or len(slate["items"]) != wanted:
            return [f"{status}: {said[:160]}"]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        return [f"{status}: {said[:160]} ({error!r})"]
    return []
