"""What can stand in a table of the READMEs; `report.py` calls these with the marker's arguments."""

import csv
import math
from pathlib import Path
from statistics import mean, median, stdev

from dipod import show, spread, summary

RESULTS = Path(__file__).parent
COLUMNS = ("final", "mean", "gap", "alignment")  # of `summary`
STUDENT = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 97.5 %, 1 to 9 degrees


def read(name):
    """{method: {seed: rows}}; all values of a row but "method" are numbers."""
    runs = {}
    with open(RESULTS / f"{name}.csv", newline="") as file:
        for row in csv.DictReader(file):
            numbers = {key: float(value) for key, value in row.items() if key != "method"}
            seeds = runs.setdefault(row["method"], {})
            seeds.setdefault(int(row["seed"]), []).append({"method": row["method"], **numbers})
    return runs


def finished(runs):
    """The runs without those that stopped early, which have no final score."""
    steps = max(rows[-1]["step"] for seeds in runs.values() for rows in seeds.values())
    return {
        method: {seed: rows for seed, rows in seeds.items() if rows[-1]["step"] == steps}
        for method, seeds in runs.items()
    }


def values(name, column, method):
    """{seed: value}; a column that `summary` does not have is that of the last row."""
    runs = finished(read(name))[method].items()
    if column not in COLUMNS:
        return {seed: rows[-1][column] for seed, rows in runs}
    return {seed: summary(rows)[COLUMNS.index(column)].item() for seed, rows in runs}


def average(column, method, name):
    """Mean [lowest..highest seed]."""
    return spread(values(name, column, method).values())


def difference(column, method, other, name):
    """Mean paired difference [95 % interval], and on how many seeds it is above 0."""
    a, b = values(name, column, method), values(name, column, other)
    differences = [a[seed] - b[seed] for seed in a if seed in b]
    n, centre = len(differences), mean(differences)
    half = STUDENT[n - 2] * stdev(differences) / math.sqrt(n)
    above = sum(d > 0 for d in differences)
    return f"{show(centre)} [{show(centre - half)}..{show(centre + half)}], {above} of {n}"


def grid(header, rows):
    """A Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]
    return "\n" + "\n".join(lines) + "\n"


def compare(column, methods, *names):
    """A row for each experiment; the first of METHOD,METHOD... minus each of the others."""
    first, *others = methods.split(",")
    rows = []
    for name in names:
        cells = [average(column, method, name) for method in (first, *others)]
        differences = [difference(column, first, other, name) for other in others]
        rows.append([name, *cells, *differences])
    return grid(["CSV", first, *others, *(f"{first} minus {other}" for other in others)], rows)


def drifts(*names):
    """Gap and alignment of dipod and fpo at the end, and how many times dipod's gap fpo's is."""
    rows = []
    for name in names:
        cells = [average(c, m, name) for c in ("gap", "alignment") for m in ("dipod", "fpo")]
        gaps = values(name, "gap", "dipod")
        times = median(gap / gaps[seed] for seed, gap in values(name, "gap", "fpo").items())
        rows.append([name, *cells, show(times)])
    header = ["gap, dipod", "gap, fpo", "alignment, dipod", "alignment, fpo", "times, median"]
    return grid(["CSV", *header], rows)


def methods(names, *more):
    """A row for each method of NAME,NAME..., with the usual columns and more of the CSVs'."""
    columns = (*COLUMNS, *more)
    rows = []
    for name in names.split(","):
        for method in read(name):
            rows.append([name, method, *(average(c, method, name) for c in columns)])
    return grid(["CSV", "method", *columns], rows)


def first_gaps(*names):
    """Gap in the first row of each method's runs, before any update of the policy gradient."""
    rows = []
    for name in names:
        for method, runs in read(name).items():
            gaps = [rows[0]["gap"] for rows in runs.values()]
            rows.append([name, method, spread(gaps)])
    return grid(["CSV", "method", "gap before training"], rows)


def rates(methods, *pairs):
    """Final score over learning rates, RATE=NAME, and how much the worst of them keeps.

    That is (worst - start) / (best - start) of the means; start is the untrained policy's score.
    """
    names = dict(pair.split("=") for pair in pairs)
    rows = []
    for method in methods.split(","):
        finals = [mean(values(name, "final", method).values()) for name in names.values()]
        runs = read(next(iter(names.values())))[method].values()
        start = mean(first_score(rows) for rows in runs)
        kept = (min(finals) - start) / (max(finals) - start)
        cells = [average("final", method, name) for name in names.values()]
        rows.append([method, *cells, f"{kept:.2f}"])
    return grid(["method", *names, "worst over best"], rows)


def first_score(rows):
    """Return or reward of the first row that has one."""
    scores = [list(row.values())[3] for row in rows]
    return next(score for score in scores if not math.isnan(score))


def cell(name, row, column):
    """A cell of a CSV whose first column names the row."""
    with open(RESULTS / f"{name}.csv", newline="") as file:
        for line in csv.DictReader(file):
            if row in line.values():
                return line[column]
    raise KeyError(f"{row} in {name}.csv")
