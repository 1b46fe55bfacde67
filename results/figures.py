"""The figures in assets/, from the CSVs in results/; `report.py` draws them after its tables."""

import math
from collections import defaultdict
from pathlib import Path
from statistics import mean

import tables
from matplotlib.figure import Figure

import dipod

ROOT = Path(__file__).parent.parent
SWEEPS = {  # panels of learning_rates.png
    "Reacher-v5": ("lr_reacher", "slow_reacher"),
    "Hopper-v5": ("lr_hopper", "slow_hopper"),
    "HalfCheetah-v5": ("lr_halfcheetah", "slow_halfcheetah"),
    "language": ("lr_lm",),
}


def start(panels, width, height):
    """A figure and its axes, with letters that can be read at half the width of a page."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def curves(name, methods, file):
    """Score, gap and alignment of an experiment over steps: each method's mean over its seeds."""
    runs = []
    for method in methods:
        rows = []
        for same_step in zip(*tables.read(name)[method].values()):
            row = {"method": method, "seed": math.nan}
            for column in list(same_step[0])[2:6]:
                known = [seed[column] for seed in same_step if not math.isnan(seed[column])]
                row[column] = mean(known) if known else math.nan
            rows.append(row)
        runs.append({"settings": {"method": method}, "rows": rows})
    dipod.draw(runs, ROOT / "assets" / file)


def learning_rates():
    """Final score over learning rates: mean of the seeds; lowest to highest is shaded."""
    figure = Figure(figsize=(7.2, 6), layout="constrained")
    axes = [*figure.subplots(2, 2).flat]
    for axis, (title, names) in zip(axes, SWEEPS.items()):
        for name in names:
            for method in tables.read(tables.over_rates(name)[0]):
                sweep(axis, name, method)
        rates = [line.partition("/")[2] for line in tables.over_rates(names[0])]
        axis.set(title=title, xscale="log", xlabel="learning rate", ylabel="final score")
        axis.set_xticks([float(rate) for rate in rates], rates, fontsize="small")
        axis.minorticks_off()
    handles = {}
    for axis in axes:
        handles |= {line.get_label(): line for line in axis.lines}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=4)
    figure.savefig(ROOT / "assets" / "learning_rates.png", dpi=140)


def sweep(axis, name, method):
    """One method over the learning rates of NAME/RATE; slow_* is dashed, without the range."""
    finals = {}
    for line in tables.over_rates(name):
        finals[float(line.partition("/")[2])] = tables.values(line, "final", method).values()
    rates = list(finals)
    means = [mean(seeds) for seeds in finals.values()]
    color = dipod.COLORS[method]
    if name.startswith("slow_"):
        axis.plot(rates, means, "--", color=color, label=f"{method}, slow flow")
        return
    axis.plot(rates, means, "o-", color=color, label=method)
    ends = [min(seeds) for seeds in finals.values()], [max(seeds) for seeds in finals.values()]
    axis.fill_between(rates, *ends, color=color, alpha=0.15)


def columns(name, key):
    """{value of key: {column: numbers}} of a CSV that `curves.py` printed."""
    found = defaultdict(lambda: defaultdict(list))
    for row in tables.read_csv(ROOT / "results" / f"{name}.csv"):
        group = found[row.pop(key)]
        for column, value in row.items():
            group[column].append(float(value))
    return found


def two_doors():
    """The bound leaves the likelihood: both over the action axis, and the density of actions."""
    figure, axes = start(2, 6.4, 3.2)
    for axis, method in zip(axes, ("fpo", "dipod")):
        policy = columns("two_doors", "method")[method]
        for column, style in (("log_prob", "-"), ("elbo", ":")):
            color = dipod.COLORS[method]
            axis.plot(policy["action"], policy[column], style, lw=2, color=color, label=column)
        axis.set(xlabel="action", ylabel="nats", xlim=(-1.5, 1.5), ylim=(-10, 3))
        axis.legend(loc="lower center")
        density = axis.twinx()
        heights = [math.exp(value) for value in policy["log_prob"]]
        density.bar(policy["action"], heights, 0.02, color="0.8")
        gaps = [a - b for a, b in zip(policy["log_prob"], policy["elbo"])]
        gap = sum(0.02 * p * x for p, x in zip(heights, gaps) if p > 0)
        axis.set_title(f"{method}, mean gap {gap:.2f} nats")
        density.set_yticks([])
        axis.set_zorder(density.get_zorder() + 1)
        axis.patch.set_visible(False)
    figure.savefig(ROOT / "assets" / "two_doors.png", dpi=140)


def two_token():
    """Gap of AA, alignment and reward of the paper's diagnostic."""
    figure, axes = start(3, 8, 2.6)
    for beta, method in (("0.0", "fpo"), ("0.2", "dipod")):
        curve = columns("two_token", "beta")[beta]
        for axis, column in zip(axes, ("gap_AA", "alignment", "reward")):
            label = f"beta = {float(beta):g}"
            axis.plot(curve["update"], curve[column], color=dipod.COLORS[method], label=label)
            axis.set(xlabel="update", ylabel=column)
    axes[0].legend()
    figure.savefig(ROOT / "assets" / "two_token.png", dpi=140)


def draw_all():
    """Every figure."""
    curves("control_default", ("fpo", "dipod", "ppo"), "control.png")
    curves("lm_main", ("fpo", "dipod", "positives", "exact"), "lm.png")
    learning_rates()
    two_doors()
    two_token()
