"""Timing both sides in one run."""
import statistics
import time

from shapes import say


def median(values):
    return statistics.median(values)


class Case:
    """Times of one case, in milliseconds by name, and those of the server's own clock."""

    def __init__(self):
        self.times, self.inside = {}, {}

    def add(self, name, took, answer=None):
        self.times.setdefault(name, []).append(took)
        if answer is not None:
            self.inside.setdefault(name, []).append(answer["timings_ms"])

    def result(self):
        found = {name: {"median_ms": round(median(times), 3), "least_ms": round(min(times), 3),
                        "most_ms": round(max(times), 3), "repetitions": len(times)}
                 for name, times in self.times.items()}
        for name, all_timings in self.inside.items():
            found[name]["server_ms"] = {key: round(median([t[key] for t in all_timings]), 3) for key in all_timings[0]}
        return found


def timed(call):
    start = time.perf_counter()
    result = call()
    return 1e3 * (time.perf_counter() - start), result


def measure_peers(case, ways, cached_ways, options):
    """Times every way; each is a function of the number of a user that returns what is to be timed."""
    for name, prepare in {**ways, **cached_ways}.items():
        # A slow way that is far from the best need not be waited for so often.
        for number in range(2):
            prepare(number)()
        for number in range(options.repetitions):
            case.add(name, timed(prepare(number))[0])
    medians = {name: median(case.times[name]) for name in {**ways, **cached_ways}}
    say("   peers, ms: " + ", ".join(f"{name} {took:.1f}" for name, took in medians.items()))


def measure_server(case, visit, compare, numbers, warm_up):
    """Visits of users: `visit(number, kind, tenant)` asks. Answers are compared afterwards: PyTorch's threads, which stay
    awake for a while after they had work, would stand in the server's way."""
    answers = []
    for number in numbers:
        tenant = f"t{number}"
        for kind, name, who in (("cold", "cold", tenant), ("warm", "warm", tenant), ("again", "recomputed", f"r{number}")):
            took, answer = visit(number, kind, who)
            if number >= warm_up:
                case.add(name, took, answer)
            answers.append((number, kind, answer))
    for answer in answers:
        compare(*answer)


def interleave(case, visit, compare, peers, options):
    """The server before and after the peers, so that neither has the machine's better half minute."""
    total, warm_up = options.repetitions + 3, 3
    half = warm_up + (options.repetitions + 1) // 2
    measure_server(case, visit, compare, range(half), warm_up)
    time.sleep(0.3)
    peers()
    time.sleep(0.3)
    # Three visits that do not count wake the server up again.
    measure_server(case, visit, compare, range(1000, 1003), 2000)
    measure_server(case, visit, compare, range(half, total), warm_up)
    found = {name: median(case.times[name]) for name in ("cold", "warm", "recomputed")}
    say("   beamline, ms: " + ", ".join(f"{name} {took:.1f}" for name, took in found.items()))
