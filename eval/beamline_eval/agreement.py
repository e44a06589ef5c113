"""How alike are two slates, whatever the targets?"""


def overlap(one, other, k):
    """Share of the first k places that both lists fill with the same items. Two empty lists agree."""
    size = max(len(one[:k]), len(other[:k]))
    return len(set(one[:k]) & set(other[:k])) / size if size else 1.0


def rbo(one, other, p=0.9):
    """Rank-biased overlap, extrapolated (Webber, Moffat, Zobel 2010, equation 32), for lists of any lengths: 1 for the same
    list, 0 for disjoint ones. The top counts most; with p = 0.9 the first ten places carry 86 % of the weight."""
    short, long = sorted((one, other), key=len)
    s, depth = len(short), len(long)
    if not depth:
        return 1.0
    if not s:
        return 0.0
    left, right, common, total, common_at_s = set(), set(), 0, 0.0, 0
    for d in range(1, depth + 1):
        item = long[d - 1]
        left.add(item)
        if d <= s:
            mate = short[d - 1]
            right.add(mate)
            common += (item in right) + (mate in left) - (item == mate)
        else:
            common += item in right
        if d == s:
            common_at_s = common
        total += common / d * p**d
        if d > s:
            total += common_at_s * (d - s) / (s * d) * p**d
    return (1 - p) / p * total + ((common - common_at_s) / depth + common_at_s / s) * p**depth
