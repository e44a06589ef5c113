"""Two kinds of picture, as inline SVG that needs nothing: no script, no font, no network. Colours come from the page's
variables."""

from html import escape

# For renderers that do not apply the page's styles inside pictures; where they do, the styles win.
FALLBACK = ("#1c5cab", "#b4610a", "#2f7d4f", "#8a4fa8", "#a8324a", "#5f6b76")
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 640, 300, 64, 46, 16, 24


def nice_ticks(low, high, count=5):
    """Round numbers that cover the range."""
    span = (high - low) or abs(high) or 1.0
    raw = span / count
    size = 10 ** len(str(int(1 / raw))) if raw < 1 else 1
    step = next((s / size * m for m in (1, 10, 100, 1000, 10000) for s in (1, 2, 5) if s / size * m >= raw), raw)
    first = int(low / step) - (low < 0)
    ticks = []
    while first * step < high + step * 0.999:
        ticks.append(round(first * step, 10))
        first += 1
    return ticks


def text(x, y, what="", anchor="middle", extra=""):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{escape(str(what))}</text>'


def frame(x_ticks, y_ticks, x_at, y_at, x_label, y_label):
    parts = []
    for tick in y_ticks:
        parts.append(
            f'<line class="grid" stroke="#d9d7d2" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y_at(tick):.1f}" y2="{y_at(tick):.1f}"/>'
        )
        parts.append(text(LEFT - 8, y_at(tick) + 4, f"{tick:g}", "end"))
    for tick in x_ticks:
        parts.append(text(x_at(tick), HEIGHT - BOTTOM + 18, f"{tick:g}" if isinstance(tick, (int, float)) else tick))
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_label))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(text(14, middle, y_label, extra=f' transform="rotate(-90 14 {middle:.1f})"'))
    return parts


def curve(points, x_label, y_label, title):
    """`points`: (x, y, label, hover text), joined in the order given: that of the setting, whatever the clock did."""
    if not points:
        return ""
    x_ticks = nice_ticks(0, max(point[0] for point in points))
    lowest, highest = min(point[1] for point in points), max(point[1] for point in points)
    y_ticks = nice_ticks(lowest, highest) if highest > lowest else nice_ticks(0, highest)

    def x_at(x):
        return LEFT + (x - x_ticks[0]) / ((x_ticks[-1] - x_ticks[0]) or 1) * (WIDTH - LEFT - RIGHT)

    def y_at(y):
        return HEIGHT - BOTTOM - (y - y_ticks[0]) / ((y_ticks[-1] - y_ticks[0]) or 1) * (HEIGHT - BOTTOM - TOP)

    parts = frame(x_ticks, y_ticks, x_at, y_at, x_label, y_label)
    parts.append(
        '<polyline class="curve" fill="none" stroke="#1c5cab" points="'
        + " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y, *_ in points)
        + '"/>'
    )
    for place, (x, y, label, hover) in enumerate(points):
        parts.append(
            f'<circle class="dot" fill="#1c5cab" cx="{x_at(x):.1f}" cy="{y_at(y):.1f}" r="4.5"><title>{escape(hover)}</title></circle>'
        )
        parts.append(text(*beside([(x_at(one[0]), y_at(one[1])) for one in points], place), what=label))
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'


def beside(points, place):
    """Where the label of a point is off the curve: (x, y). Coordinates grow to the right and downwards.

    Above the point, unless a neighbour stands steeply above it: then the curve goes through there, and the label goes below.
    """
    x, y = points[place]
    near = [points[other] for other in (place - 1, place + 1) if 0 <= other < len(points)]
    steep = any(y - other_y > abs(other_x - x) for other_x, other_y in near)
    below = (steep or y <= TOP + 14) and y + 18 < HEIGHT - BOTTOM - 2
    half = 26
    return min(max(x, LEFT + half), WIDTH - RIGHT - half), y + 18 if below else y - 10


def bars(groups, series, x_label, y_label, title):
    """`groups`: [(label, [value per series])]; one colour a series, named in a legend under the picture."""
    if not groups:
        return ""
    y_ticks = nice_ticks(0, max((value for _, values in groups for value in values), default=1) or 1)

    def y_at(y):
        return HEIGHT - BOTTOM - y / (y_ticks[-1] or 1) * (HEIGHT - BOTTOM - TOP)

    room = (WIDTH - LEFT - RIGHT) / len(groups)
    wide = min(room * 0.8 / max(len(series), 1), 34)
    centre = {label: LEFT + (place + 0.5) * room for place, (label, _) in enumerate(groups)}
    parts = frame([label for label, _ in groups], y_ticks, centre.get, y_at, x_label, y_label)
    for label, values in groups:
        for place, value in enumerate(values):
            x = centre[label] + (place - len(values) / 2) * wide
            hover = escape(f"{series[place]}, {label}: {value:.4f}")
            parts.append(
                f'<rect class="s{place % 6}" fill="{FALLBACK[place % 6]}" x="{x:.1f}" y="{y_at(value):.1f}" width="{wide - 2:.1f}" height="{HEIGHT - BOTTOM - y_at(value):.1f}">'
                f"<title>{hover}</title></rect>"
            )
    legend = "".join(f'<span><i class="s{place % 6}"></i>{escape(name)}</span>' for place, name in enumerate(series))
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg><p class="legend">{legend}</p>'
