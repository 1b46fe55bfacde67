"""Writes the tables and figures of both READMEs from the CSVs in results/.

    python results/report.py                   # all tables and figures
    python results/report.py --run lm_main     # first run this line of experiments.txt again
    python results/report.py --check           # only say whether the tables are what the CSVs say

A line of experiments.txt is NAME: COMMAND, and results/NAME.csv has the rows of its runs, or what a
script prints. A table stands between `<!-- table: FUNCTION ARGUMENTS -->` and `<!-- end -->`, and
the functions are those of tables.py.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import tables

RESULTS = ROOT / "results"
READMES = (ROOT / "README.md", RESULTS / "README.md")
MARKERS = re.compile(r"(<!-- table: (\w+) ([^>]*)-->).*?(<!-- end -->)", re.DOTALL)


def experiments():
    """{name: command} of experiments.txt."""
    lines = (RESULTS / "experiments.txt").read_text().splitlines()
    return dict(line.split(": ", 1) for line in lines)


def run(name, command):
    """Runs a line of experiments.txt, or what is left in runs/evidence, and writes its CSV.

    What is left includes runs that stopped with an error: delete their records to start anew.
    """
    words = [sys.executable, *command.split()[1:]]
    target = RESULTS / f"{name}.csv"
    if words[1].startswith("results/"):
        printed = subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
        target.write_bytes(printed)
        return
    out = ROOT / "runs" / "evidence" / name
    status = subprocess.call([*words, "--out", str(out), "--resume"], cwd=ROOT)
    if status > 1:  # 1: some run stopped, and its rows up to there belong to the CSV
        sys.exit(status)
    with open(target, "w", newline="") as file:
        for i, path in enumerate(sorted(out.glob("*.csv"))):
            lines = path.read_text().splitlines(keepends=True)
            file.writelines(lines[min(i, 1) :])  # one header


def fill(match):
    """The marker, its table as the CSVs are now, and the end."""
    start, function, arguments, end = match.groups()
    return start + getattr(tables, function)(*arguments.split()) + end


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", nargs="+", choices=experiments(), default=[], metavar="NAME")
    parser.add_argument("--check", action="store_true", help="exit 1 if a table is not up to date")
    args = parser.parse_args()
    for name in args.run:
        run(name, experiments()[name])
    unmatched = {path.stem for path in RESULTS.glob("*.csv")} ^ set(experiments())
    if unmatched:
        parser.exit(1, f"a CSV without a line, or a line without a CSV: {sorted(unmatched)}\n")
    for path in READMES:
        old = path.read_text()
        new = MARKERS.sub(fill, old)
        if args.check and new != old:
            parser.exit(1, f"{path.relative_to(ROOT)}: its tables are not what the CSVs say\n")
        if not args.check:
            path.write_text(new)
    if not args.check:
        import figures  # needs matplotlib

        figures.draw_all()


if __name__ == "__main__":
    main()
