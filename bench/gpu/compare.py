"""One markdown report from the JSON lines of all engines: times, ratios, shares of the floor, phases.

    python compare.py beamline.jsonl baselines.jsonl floor.jsonl published.jsonl > report.md

Lines meet in a point: shape, levels, batch, beam, context. Ratios are to --reference (an engine's name, `beamline`): 2.00x is
twice its time. The share of the floor is floor / time. Both are given only between lines of one GPU. A point that an
engine skipped shows a footnote with the reason, one it has no line for shows a dash. If an engine has several lines for
a point, the last one counts. Lines with `published` were measured by others elsewhere, and get no ratio. Needs no torch.
"""
import argparse
import json
import sys

KEY = ("shape", "levels", "batch", "beam", "context")
MISSING = "—"


def read(paths):
    """(key -> engine -> line, [rates lines], how many lines were superseded, what lines say of a rehearsal)."""
    points, rates, superseded, rehearsals = {}, [], 0, set()
    for path in paths:
        with open(path, encoding="utf-8") as file:
            for number, text in enumerate(file, 1):
                if not text.strip():
                    continue
                try:
                    line = json.loads(text)
                    if "rehearsal" in line:
                        rehearsals.add(line["rehearsal"])
                    if "section" in line:
                        continue  # beamline's other measurements: its floor, profiles, load
                    if line["engine"] == "rates":
                        rates.append(line)
                        continue
                    engines = points.setdefault(tuple(line[name] for name in KEY), {})
                    superseded += line["engine"] in engines
                    engines[line["engine"]] = line
                except (ValueError, KeyError, TypeError) as error:
                    sys.exit(f"{path}:{number}: not a line of a measurement ({error!r})")
    return points, rates, superseded, rehearsals


class Report:
    """Text and footnotes."""

    def __init__(self, points, reference):
        self.points, self.reference, self.notes = points, reference, []
        found = {engine for engines in points.values() for engine in engines}
        measured = sorted(found - {reference, "floor"}, key=lambda engine: (self._published(engine), engine))
        self.engines = [reference] + measured

    def _published(self, engine):
        return any(engines.get(engine, {}).get("published") for engines in self.points.values())

    def note(self, text):
        if text not in self.notes:
            self.notes.append(text)
        return f"[{self.notes.index(text) + 1}]"

    def time(self, line):
        """A measured line's median, or None."""
        return None if line is None or "skipped" in line else line.get("median_ms")

    def same_gpu(self, one, other):
        return self.time(one) is not None and self.time(other) is not None and one["gpu"] == other["gpu"]

    def gap(self, line):
        return MISSING if line is None else self.note(line.get("skipped", "no time in the line"))

    def time_cell(self, engines, engine):
        line, reference = engines.get(engine), engines.get(self.reference)
        if self.time(line) is None:
            return self.gap(line)
        text = f"{line['median_ms']:.2f}" + (f" ({line['p90_ms']:.2f})" if line.get("p90_ms") is not None else "")
        if line.get("published"):
            return text + " " + self.note(f"published, not measured here: {line['gpu']}, {line['published']}")
        if engine != self.reference and self.time(reference) is not None:
            if self.same_gpu(line, reference):
                return text + f", {line['median_ms'] / reference['median_ms']:.2f}x"
            return text + " " + self.note(f"on another GPU than {self.reference}: {line['gpu']}")
        return text

    def share_cell(self, engines, engine):
        line, floor = engines.get(engine), engines.get("floor")
        if self.time(line) is None:
            return self.gap(line)
        return f"{100 * floor['median_ms'] / line['median_ms']:.0f}%" if self.same_gpu(line, floor) else MISSING

    def phase_cell(self, engines, engine):
        line = engines.get(engine)
        if self.time(line) is None or line.get("prefill_ms") is None:
            return self.gap(line) if self.time(line) is None else MISSING
        return " + ".join(f"{ms:.2f}" for ms in [line["prefill_ms"], *line["step_ms"]])

    def table(self, keys, engines, cell):
        lines = ["| batch | beam | context | " + " | ".join(engines) + " |", "| ---: " * (3 + len(engines)) + "|"]
        for key in keys:
            cells = [cell(self.points[key], engine) for engine in engines]
            lines.append("| " + " | ".join([*map(str, key[2:]), *cells]) + " |")
        return lines

    def text(self):
        out = []
        for shape, levels in sorted({key[:2] for key in self.points}):
            keys = sorted(key for key in self.points if key[:2] == (shape, levels))
            with_floor = [*self.engines, "floor"]
            out += [
                f"## {shape}, {levels} tokens",
                "",
                f"End to end: median (90th percentile) in ms, and times {self.reference}'s.",
                "",
            ]
            out += self.table(keys, with_floor, self.time_cell)
            out += ["", "Share of the floor: how much of the time no implementation could save.", ""]
            out += self.table(keys, [e for e in self.engines if not self._published(e)], self.share_cell)
            out += ["", "Prefill + branch steps, medians in ms.", ""]
            out += self.table(keys, [e for e in with_floor if not self._published(e)], self.phase_cell) + [""]
        return out


def environment(points, rates):
    """What ran where: one line per engine."""
    seen = {}
    for engines in points.values():
        for engine, line in engines.items():
            where = (line.get("gpu"), line.get("torch"), line.get("items"))
            seen.setdefault(engine, set()).add(where)
    out = []
    for engine in sorted(seen):
        for gpu, torch, items in sorted(seen[engine], key=str):
            parts = [f"on {gpu}", f"torch {torch}" if torch else "", f"{items:,} items" if items else ""]
            out.append(f"- {engine}: " + ", ".join(part for part in parts if part))
    for line in rates:
        out.append(f"- rates of {line['gpu']}: {line['tflops']} TFLOP/s, {line['gbps']} GB/s")
    items = {line["items"] for engines in points.values() for line in engines.values() if line.get("items")}
    if len(items) > 1:
        out.append("- The engines' catalogs differ in size: ratios compare different searches.")
    return out


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--reference", default="beamline")
    options = parser.parse_args(arguments)
    points, rates, superseded, rehearsals = read(options.files)
    report = Report(points, options.reference)
    title = "# Beam search on one GPU" if not rehearsals else "# A rehearsal: " + "; ".join(sorted(rehearsals))
    print("\n".join([title, "", *environment(points, rates), "", *report.text()]))
    for number, note in enumerate(report.notes, 1):
        print(f"[{number}] {note}  ")
    if superseded:
        print(f"\n{superseded} lines were superseded by later ones of the same engine and point.")


if __name__ == "__main__":
    main()
