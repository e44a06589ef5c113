"""Progress on standard error: a line that rewrites itself on a terminal, and a line every ten seconds elsewhere."""

import sys
import time


def track(items, label, total=None):
    """Yields `items` and reports how far it is, how fast, and what is left."""
    total = total if total is not None else len(items)
    terminal = sys.stderr.isatty()
    begun = shown = time.monotonic()
    for number, item in enumerate(items):
        yield item
        now = time.monotonic()
        if now - shown >= (0.2 if terminal else 10):
            shown, rate = now, (number + 1) / (now - begun)
            text = f"{label}: {number + 1}/{total}, {rate:.{0 if rate >= 10 else 2}f}/s, {(total - number - 1) / rate:.0f} s left"
            print(f"\r{text}  " if terminal else text, end="" if terminal else "\n", file=sys.stderr, flush=True)
    if terminal and shown != begun:
        print("\r" + " " * 78 + "\r", end="", file=sys.stderr, flush=True)


def say(text):
    """A line of news on standard error; standard output is for results."""
    print(text, file=sys.stderr, flush=True)
