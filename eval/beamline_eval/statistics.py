"""Is the difference real? Paired tests over users, for all measures at once.

Bootstrap: users are drawn again with replacement, as pairs, and the spread of the mean difference is the interval.
Randomisation: if both systems were the same, each user's difference might as well have the other sign; the share of random sign
patterns with a mean at least as far from 0 is p. Both use the same draws for every measure, so that measures stay comparable.
Everything follows from the seed. """

from beamline_eval.errors import EvalError


def numpy():
    try:
        import numpy as found
    except ImportError as error:
        raise EvalError("comparing runs needs numpy: pip install ./eval") from error
    return found


def bootstrap(differences, resamples=2000, seed=0, level=0.95):
    """(low, high) per measure for a [users, measures] array of differences: the percentile interval of the mean."""
    np = numpy()
    differences = np.asarray(differences, dtype=np.float64)
    users, rng = len(differences), np.random.default_rng(seed)
    means = np.empty((resamples, differences.shape[1]))
    for number in range(resamples):
        means[number] = np.bincount(rng.integers(0, users, users), minlength=users) @ differences / users
    edge = (1 - level) / 2
    return np.quantile(means, edge, axis=0), np.quantile(means, 1 - edge, axis=0)


def randomisation(differences, permutations=10000, seed=0):
    """Two-sided p per measure. The observed arrangement counts as one of those tried, so p is never 0."""
    np = numpy()
    differences = np.asarray(differences, dtype=np.float64)
    # Users without a difference add 0 whatever their sign.
    moving = differences[np.any(differences != 0, axis=1)]
    observed = np.abs(moving.sum(axis=0))
    rng, extreme, left = np.random.default_rng(seed), np.zeros(differences.shape[1]), permutations
    while left:
        block = min(left, max(1, 4_000_000 // max(len(moving), 1)))
        signs = rng.integers(0, 2, (block, len(moving)), dtype=np.int8) * 2.0 - 1.0
        # The tolerance keeps exact ties (common with 0/1 measures) on the side of `at least as far`, whatever the rounding.
        extreme += (np.abs(signs @ moving) >= observed - 1e-9).sum(axis=0)
        left -= block
    return (extreme + 1) / (permutations + 1)


def holm(p_values):
    """Holm's adjusted p: the chance of any false alarm among all of them is held, not of each."""
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    adjusted, floor = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = floor
    return adjusted
