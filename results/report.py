"""Writes the tables and figures of both READMEs from the CSVs in results/.

    python results/report.py                   # all tables and figures
    python results/report.py --run lm_main     # first run this line of experiments.txt again
    python results/report.py --check           # only say whether the tables are what the CSVs say

A line of experiments.txt is NAME: COMMAND or NAME/CASE: COMMAND. results/NAME.csv has the rows of
the runs of all its cases, or what a script prints. A table stands between
`<!-- table: FUNCTION ARGUMENTS -->` and `<!-- end -->`, and the functions are those of tables.py.
"""

import argparse
import csv
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import tables
from tables import RESULTS, read_csv

EVIDENCE = ROOT / "runs" / "evidence"
READMES = (ROOT / "README.md", RESULTS / "README.md")
MARKERS = re.compile(r"(<!-- table: (\w+) ([^>]*)-->).*?(<!-- end -->)", re.DOTALL)


def experiments():
    """{line: command} of experiments.txt, where a line is NAME or NAME/CASE."""
    lines = (RESULTS / "experiments.txt").read_text().splitlines()
    return dict(line.split(": ", 1) for line in lines)


def run(line, command):
    """Runs a line, or what is left of it in runs/evidence, and writes its rows into its CSV.

    What is left includes runs that stopped with an error: delete their records to start anew.
    """
    words = [sys.executable, *command.split()[1:]]
    if words[1].startswith("results/"):
        printed = subprocess.check_output(words, cwd=ROOT, text=True)
        replace(line, list(csv.DictReader(printed.splitlines())))
        return
    status = subprocess.call([*words, "--out", str(EVIDENCE / line), "--resume"], cwd=ROOT)
    if status > 1:  # 1: some run stopped, and its rows up to there belong to the CSV
        sys.exit(status)
    rows = []
    for path in sorted((EVIDENCE / line).glob("*.csv")):
        rows += read_csv(path)
    if not rows:
        sys.exit(f"{line}: every run stopped before its first row")
    replace(line, rows)


def replace(line, rows):
    """Writes the rows of a line into its CSV, in place of those that it has there."""
    name, _, case = line.partition("/")
    target = RESULTS / f"{name}.csv"
    if case:
        others = [row for row in read_csv(target) if row["case"] != case] if target.exists() else []
        rows = others + [{"case": case} | row for row in rows]
        rows.sort(key=lambda row: row["case"])
    with open(target, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def written(path):
    """The lines of experiments.txt whose rows are in a CSV."""
    cases = {row.get("case") for row in read_csv(path)}
    return {f"{path.stem}/{case}" if case else path.stem for case in cases}


def fill(match):
    """The marker, its table as the CSVs are now, and the end."""
    start, function, arguments, end = match.groups()
    return start + getattr(tables, function)(*arguments.split()) + end


def dangling_links(text):
    """Links into results/README.md that lead to none of its headings."""
    headings = re.findall("^## (.*)", READMES[1].read_text(), re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return set(re.findall(r"results/README\.md#([\w-]+)", text)) - anchors


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", nargs="+", choices=experiments(), default=[], metavar="LINE")
    parser.add_argument("--check", action="store_true", help="exit 1 if a table is not up to date")
    args = parser.parse_args()
    for line in args.run:
        run(line, experiments()[line])
    unmatched = set(experiments())
    for path in RESULTS.glob("*.csv"):
        unmatched ^= written(path)
    if unmatched:
        parser.exit(1, f"a CSV without a line, or a line without a CSV: {sorted(unmatched)}\n")
    for path in READMES:
        old = path.read_text()
        new = MARKERS.sub(fill, old)
        if args.check and new != old:
            parser.exit(1, f"{path.relative_to(ROOT)}: its tables are not what the CSVs say\n")
        if re.search("(?m)^[* ]*<!-- table.*<!-- end", old):
            parser.exit(1, f"{path.relative_to(ROOT)}: a line starts with a value, so it is HTML\n")
        if dangling := dangling_links(old):
            parser.exit(1, f"{path.relative_to(ROOT)}: no such headings: {sorted(dangling)}\n")
        if not args.check:
            path.write_text(new)
    if not args.check:
        import figures  # needs matplotlib

        figures.draw_all()


if __name__ == "__main__":
    main()
