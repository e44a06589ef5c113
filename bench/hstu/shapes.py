"""The shapes that are measured, and what both sides are held to."""
import dataclasses
import sys
import time


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a model."""

    width: int = 256
    layers: int = 4
    heads: int = 4
    head: int = 64
    items: int = 20_000
    longest: int = 2_048

    @property
    def values(self):
        return self.heads * self.head

    @property
    def positions(self):
        return self.longest + 11

    def divisor(self, variant):
        return self.positions if variant == "research" else 2 * self.longest


SIZES = Sizes()
WIDTH, LAYERS, HEADS, HEAD, VALUES = SIZES.width, SIZES.layers, SIZES.heads, SIZES.head, SIZES.values
ITEMS, LONGEST, POSITIONS = SIZES.items, SIZES.longest, SIZES.positions
TASKS, ACTIONS = 8, 8
NEW_EVENTS, TOP = 5, 10
HISTORIES, RANK_HISTORY, CANDIDATES = (200, 2_000), 1_024, (256, 1_024, 4_096)
PAGE = 32
TOLERANCE = 1e-4
TARGETS = {"warm": 5.0, "cold": 2.0}


def say(text):
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)
