"""What can stand in a table of the READMEs; `report.py` calls these with the marker's arguments."""

import csv
import functools
import math
from pathlib import Path
from statistics import mean, median, stdev

from dipod import show, spread, summary

RESULTS = Path(__file__).parent
COLUMNS = ("final", "mean", "gap", "alignment")  # of `summary`
# 97.5 % quantile of Student's t, by number of pairs.
STUDENT = {5: 2.776, 10: 2.262, 15: 2.145, 17: 2.120, 19: 2.101, 20: 2.093}


def read_csv(path):
    """The rows of a CSV, as text."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@functools.cache
def read(name):
    """{method: {seed: rows}} of NAME or NAME/CASE; all values but "method" are numbers."""
    name, _, case = name.partition("/")
    runs = {}
    for row in read_csv(RESULTS / f"{name}.csv"):
        if row.pop("case", "") != case:
            continue
        numbers = {key: float(value) for key, value in row.items() if key != "method"}
        seeds = runs.setdefault(row["method"], {})
        seeds.setdefault(int(row["seed"]), []).append({"method": row["method"], **numbers})
    return runs


def values(name, column, method):
    """{seed: value} of a column of `summary`, of the first row ("first_gap"), or of the last.

    A run that stopped early counts with its values up to there.
    """
    runs = read(name)[method].items()
    if column in COLUMNS:
        return {seed: summary(rows)[COLUMNS.index(column)].item() for seed, rows in runs}
    if column.startswith("first_"):
        return {seed: rows[0][column.removeprefix("first_")] for seed, rows in runs}
    return {seed: rows[-1][column] for seed, rows in runs}


def average(column, method, name):
    """Mean [lowest..highest seed]."""
    return spread(values(name, column, method).values())


def paired(column, method, other, name, other_name=None):
    """{seed: method minus other} of a column, for the seeds that both have."""
    a, b = values(name, column, method), values(other_name or name, column, other)
    return {seed: a[seed] - b[seed] for seed in a if seed in b}


def half_width(differences):
    """Half of the 95 % interval of their mean (Student's t)."""
    n = len(differences)
    return STUDENT[n] * stdev(differences) / math.sqrt(n)


def difference(column, method, other, name, other_name=None):
    """Mean paired difference ± half its 95 % interval, and the number of pairs above 0."""
    pairs = paired(column, method, other, name, other_name).values()
    above = sum(d > 0 for d in pairs)
    return f"{show(mean(pairs))} ± {show(half_width(pairs))}, {above} of {len(pairs)}"


def lowest(method, other, name, other_name=None):
    """The lowest paired difference of the final scores."""
    return show(min(paired("final", method, other, name, other_name).values()))


def stopped_seeds(name, method):
    """The seeds of the runs that stopped before their last step."""
    last = {seed: rows[-1]["step"] for seed, rows in read(name)[method].items()}
    end = max(rows[-1]["step"] for runs in read(name).values() for rows in runs.values())
    return [seed for seed, step in last.items() if step < end]


def above_0(which, method, other, *names):
    """On how many of the names the interval of method minus other, final, lies above 0.

    which: "all", "finished" without the pairs of runs that stopped, or "added", seeds from 110 on.
    """
    count = 0
    for name in names:
        pairs = paired("final", method, other, name)
        left_out = {"all": [], "finished": stopped_seeds(name, other), "added": range(100, 110)}
        differences = [pairs[seed] for seed in pairs if seed not in left_out[which]]
        count += mean(differences) - half_width(differences) > 0
    return f"{count} of {len(names)}"


def cases(name):
    """All NAME/CASE of a CSV for NAME/*; any other name stands for itself."""
    if not name.endswith("/*"):
        return [name]
    name = name.removesuffix("/*")
    found = {row["case"] for row in read_csv(RESULTS / f"{name}.csv")}
    return [f"{name}/{case}" for case in sorted(found)]


def opened(method, *names):
    """How many runs of how many end, or stop, with a gap above 1 nat; names as in `cases`."""
    gaps = []
    for name in names:
        for line in cases(name):
            gaps += values(line, "gap", method).values()
    return f"{sum(gap > 1 for gap in gaps)} of {len(gaps)}"


def kept(name, method):
    """{seed: share of its best gain that a run has at its end}.

    The gain is over the first score; the end is the last tenth of the run's steps.
    """
    finals = values(name, "final", method)
    shares = {}
    for seed, rows in read(name)[method].items():
        start, best = first_score(rows), max(scores(rows))
        shares[seed] = (finals[seed] - start) / (best - start)
    return shares


def lost(method, *names):
    """How many runs of how many end, or stop, with less than half of their best gain."""
    shares = []
    for name in names:
        shares += kept(name, method).values()
    return f"{sum(share < 0.5 for share in shares)} of {len(shares)}"


def lost_open(method, *names):
    """In how many runs of those that `lost` counts the gap is above 1 nat at the end."""
    gaps = []
    for name in names:
        at_end = values(name, "gap", method)
        gaps += [at_end[seed] for seed, share in kept(name, method).items() if share < 0.5]
    return f"{sum(gap > 1 for gap in gaps)} of {len(gaps)}"


def tight_falls(method, *names):
    """In how many runs that `lost` counts the gap is below 0.25 nats when the score falls.

    That is at the first row whose gain over the first score is less than half of the best before.
    """
    gaps = []
    for name in names:
        for seed, share in kept(name, method).items():
            if share < 0.5:
                gaps.append(gap_of_fall(read(name)[method][seed]))
    return f"{sum(gap < 0.25 for gap in gaps)} of {len(gaps)}"


def gap_of_fall(rows):
    """The gap at the first row with less than half of the gain that the rows before it reached."""
    start = best = first_score(rows)
    for row in rows:
        score = list(row.values())[3]
        if score - start < 0.5 * (best - start):
            return row["gap"]
        best = max(best, score)
    return math.nan


def grid(header, rows):
    """A Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]
    return "\n" + "\n".join(lines) + "\n"


def compare(methods, *names):
    """Final scores of METHOD,METHOD..., the first minus the others, and the drift of the first two.

    The drift: how many runs have a gap above 1 nat at the end, the median gap, and the alignment.
    """
    first, *others = methods.split(",")
    pairs = [(column, other) for column in ("final", "mean") for other in others]
    rows = []
    for name in names:
        row = [name, *(average("final", method, name) for method in (first, *others))]
        row += [difference(column, first, other, name) for column, other in pairs]
        for method in (first, others[0]):
            gap = median(values(name, "gap", method).values())
            row += [f"{opened(method, name)}, {show(gap)}", average("alignment", method, name)]
        rows.append(row)
    header = ["CSV", first, *others]
    header += [f"{column}, {first} minus {other}" for column, other in pairs]
    for method in (first, others[0]):
        header += [f"gap above 1 and median, {method}", f"alignment, {method}"]
    return grid(header, rows)


def methods(names):
    """A row for each method of NAME,NAME..., or that of NAME:METHOD."""
    rows = []
    for item in names.split(","):
        name, _, method = item.partition(":")
        for chosen in [method] if method else read(name):
            rows.append([name, chosen, *(average(c, chosen, name) for c in COLUMNS)])
    return grid(["CSV", "method", *COLUMNS], rows)


def by_method(methods, *columns):
    """Rows METHOD,METHOD..., a column for each COLUMN:NAME, of NAME/* the best case."""
    rows = []
    for method in methods.split(","):
        cells = []
        for item in columns:
            column, name = item.split(":")
            lines = [line for line in cases(name) if method in read(line)]
            lines.sort(key=lambda line: mean(values(line, "final", method).values()))
            cells.append(average(column, method, lines[-1]) if lines else "-")
        rows.append([method, *cells])
    return grid(["method", *(item.replace(":", ", ") for item in columns)], rows)


def over_rates(name):
    """NAME/RATE of each learning rate, the lowest first."""
    return sorted(cases(f"{name}/*"), key=lambda line: float(line.partition("/")[2]))


def rates(methods, *names):
    """How much the worst learning rate of NAME/RATE keeps, and which rates are best and worst.

    That is (worst - start) / (best - start) of the means; start is the untrained policy's score.
    """
    rows = []
    for name in names:
        lines = over_rates(name)
        cells = []
        for method in methods.split(","):
            if method not in read(lines[0]):
                cells.append("-")
                continue
            finals = {mean(values(x, "final", method).values()): x for x in lines}
            worst, best = min(finals), max(finals)
            start = mean(first_score(run) for run in read(lines[0])[method].values())
            kept = (worst - start) / (best - start)
            ends = [finals[end].partition("/")[2] for end in (worst, best)]
            cells.append(f"{kept:.2f} ({ends[0]}, {ends[1]})")
        rows.append([name, *cells])
    return grid(["CSV", *methods.split(",")], rows)


def scores(rows):
    """Return or reward of the rows that have one."""
    known = [list(row.values())[3] for row in rows]
    return [score for score in known if not math.isnan(score)]


def first_score(rows):
    """The first return or reward of a run, about that of the untrained policy."""
    return scores(rows)[0]


def cell(name, row, column):
    """A cell of a CSV whose first column names the row."""
    lines = read_csv(RESULTS / f"{name}.csv")
    return next(line[column] for line in lines if row in line.values())
