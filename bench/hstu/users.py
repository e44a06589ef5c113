"""Users with histories and candidates, and their requests."""
import numpy as np

from shapes import ACTIONS, CANDIDATES, ITEMS, TOP


class User:
    """Events of a user who comes in sessions: seconds within one, days between; and candidates for them."""

    def __init__(self, number, events, items=ITEMS):
        draw = np.random.default_rng(1_000_003 * events + number)
        self.items = draw.integers(1, items + 1, events + 1)
        gaps = np.where(draw.random(events + 1) < 1 / 17, draw.integers(30_000, 400_000, events + 1),
                        draw.integers(1, 90, events + 1))
        self.times = 1_700_000_000 + np.cumsum(gaps)
        self.actions = draw.integers(0, ACTIONS, events + 1)
        self.candidates = draw.permutation(items)[: CANDIDATES[-1]] + 1

    def recommend(self, events, tenant):
        history = [{"item_id": f"i{item}", "timestamp": int(when)}
                   for item, when in zip(self.items[:events], self.times[:events])]
        return {"history": history, "query_time": int(self.times[events]), "num_items": TOP, "tenant": tenant}

    def rank(self, events, candidates, tenant):
        history = [{"item_id": f"i{item}", "action": str(action)}
                   for item, action in zip(self.items[:events], self.actions[:events])]
        given = [{"item_id": f"i{item}"} for item in self.candidates[:candidates]]
        return {"history": history, "candidates": given, "tenant": tenant}
