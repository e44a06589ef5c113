"""What accuracy does not say: how much of the catalog is shown, how evenly, how obvious it is, and whether it exists."""

import collections
import math


def gini(counts, total_items):
    """Inequality of exposure over the whole catalog: 0 if all items are shown equally often, towards 1 if one has it all."""
    shown = sum(counts)
    if not shown or not total_items:
        return 0.0
    ordered = [0] * (total_items - len(counts)) + sorted(counts)
    weighted = sum((place + 1) * count for place, count in enumerate(ordered))
    return 2 * weighted / (total_items * shown) - (total_items + 1) / total_items


def self_information(counts, catalog_size):
    """item -> bits: -log2 of its share of training interactions, with one added to each item so that an unseen one is finite."""
    total = sum(counts.values()) + catalog_size
    return lambda item: -math.log2((counts.get(item, 0) + 1) / total)


def beyond(users, slates, k, catalog, counts, histories=None):
    """Measures of the first k places of these users' slates. `catalog`: the items that exist (any container with a length)."""
    exposure, known, places, full, seen, bits = collections.Counter(), 0, 0, 0, 0, 0.0
    information = self_information(counts, len(catalog))
    for user in users:
        slate = slates.get(user, [])[:k]
        valid = [item for item in slate if item in catalog]
        places += len(slate)
        known += len(valid)
        full += len(slate) == k
        exposure.update(valid)
        bits += math.fsum(information(item) for item in valid)
        if histories is not None:
            history = set(histories.get(user, ()))
            seen += sum(item in history for item in slate)
    return {
        f"coverage@{k}": len(exposure) / len(catalog) if len(catalog) else 0.0,
        f"gini@{k}": gini(list(exposure.values()), len(catalog)),
        f"novelty_bits@{k}": bits / known if known else 0.0,
        f"valid_share@{k}": known / places if places else 0.0,
        f"full_slates@{k}": full / len(users) if users else 0.0,
        **({f"seen_share@{k}": seen / places if places else 0.0} if histories is not None else {}),
    }
