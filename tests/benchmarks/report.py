"""Render results/*.json into the page beside this script: python tests/benchmarks/report.py

The page's part between the two marks is written from the numbers alone, never by hand. The script
prints which sections are of sources that have changed since.
"""

import re
import sys
from pathlib import Path

import ablations
import baselines
import common
import flux
import gpu
import lookahead
import oracle
import readme
import toy

PAGE = Path(__file__).with_name("README.md")
BEGIN = "<!-- rendered by report.py: begin -->"
END = "<!-- rendered by report.py: end -->"
SECTIONS = {  # file of results: title, the script that made it
    "readme": ("What the README's commands print", readme),
    "toy": ("2-D flows", toy),
    "baselines": ("Other ways to few steps", baselines),
    "ablations": ("What each choice is worth", ablations),
    "lookahead": ("Look-ahead of a table in place of a network", lookahead),
    "oracle": ("How near a student of the tiny Flux can come", oracle),
    "gpu": ("A GPU", gpu),
    "layers": ("LoRA on all linear layers, or inside the blocks", flux),
}

FINDINGS = {  # in words alone, since numbers would go stale
    "toy": """In 3 steps the student is better than the teacher in 16. With its calibrated scale it
also beats longer runs of the teacher in 2, 4 and 8 steps. Matched windows end where they are best;
the paper's pass through their best and leave it. The calibration, which sees no data, is near the
best scale. Ten points do for 3 steps, but not as well as all data; some draws are much worse.
Training from scratch gains 3-step quality and loses 32-step quality, unlike in the paper.""",
    "ablations": """Matched windows are within their intervals of direct regression and near the
oracle. How much of a step the teacher covers matters little from a quarter to a half of it; all of
it is too coarse for one midpoint step. An EMA as slow as the paper's stalls in runs as short as
these. What counts is the distribution of the look-ahead, not its mean alone: equal halves have the
right mean and are far worse at shift 3. At the paper's shifts, 2.5 to 4.5, windows are matched to
3.5, and sampling at 3 costs more than was expected: so flux_distill.py trains at 2 to 4.""",
    "baselines": """With a full budget, direct regression from 8 teacher calls is as good as ours
for 3 and 4 steps and better for 2 and, at shift 3 by far, for one: there our teacher's part, one
midpoint step, is too coarse. With a tenth of the budget ours is better at shift 1, where fewer
teacher calls are too inexact and more leave too few iterations, and level with the best at shift
3. Bootstrapping saves teacher calls; that is all it does.""",
}


ABOUT = {  # instead of a script's docstring, where the file has only some of its parts
    "baselines": """What does bootstrapping buy? python tests/benchmarks/baselines.py --parts direct
tune_direct (half an hour on 1 core)

Direct regression: the student learns the teacher's mean velocity over its coming step, from K
teacher calls (2, 4 and 8 by midpoint steps, 16 by Euler steps), without an EMA. Ours: matched
windows. Students for 1 to 4 steps, at shifts 1 and 3, with as many network calls: those of our
1,000 iterations of 512 rows, or a tenth. The learning rate is tuned for each method, shift and
budget on another seed, in 3 steps: of four rates that with the least geometric mean over two flows,
or 2e-3 if that is within 5 %. ± is half of a 95 % interval over the seeds.""",
}


def made_on(rows: list[common.Row]) -> str:
    """Machines and versions, in one line."""
    told = []
    for row in rows:
        versions = [f"{name} {number}" for name, number in row.origin["versions"].items()]
        line = f"{row.origin['machine']}; {', '.join(versions)}"
        if row.origin.get("note"):
            line += f"; {row.origin['note']}"
        if line not in told:
            told.append(line)
    return " / ".join(told)


def section(name: str, rows: list[common.Row]) -> list[str]:
    title, script = SECTIONS[name]
    first, what = ABOUT.get(name, script.__doc__).strip().split("\n\n", 1)
    form = r"(.+[:?]) (python [^(]+?)(?: \((.+)\))?"
    question, command, time = re.fullmatch(form, " ".join(first.split())).groups()
    took = f" takes {time}" if time else ""
    lines = [f"## {title}", "", f"{question} `{command}`{took}.", ""]
    lines += [f"`results/{name}.json`, {made_on(rows)}.", "", what, ""]
    if name in FINDINGS:
        lines += [f"**What it says.** {FINDINGS[name]}", ""]
    return [*lines, *script.tables(rows), ""]


def render() -> str:
    """The text between the marks."""
    contents, sections = [], []
    for name, (title, _) in SECTIONS.items():
        rows = common.load(common.RESULTS / f"{name}.json")
        if rows:
            contents.append(f"- [{title}](#{anchor(title)})")
            sections += section(name, rows)
    return "\n".join([*contents, "", *sections]).strip()


def anchor(title: str) -> str:
    """What a heading is linked by."""
    return re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-")


def split(page: str) -> tuple[str, str, str]:
    """What stands before the marks, between them, and after them."""
    before, rest = page.split(BEGIN)
    between, after = rest.split(END)
    return before, between.strip(), after


FLUX = {"flux_distill.py", "tests/benchmarks/common_flux.py", "tests/make_tiny_flux.py"}


def stale(rows: list[common.Row]) -> set[str]:
    """Files that may change these numbers and have changed since. FLUX can't, on the 2-D flows."""
    on_flows = [row for row in rows if "flow" in row.settings]
    others = [row for row in rows if "flow" not in row.settings]
    changed = set(common.changed_sources(on_flows)) - FLUX
    return changed | set(common.changed_sources(others))


def main() -> None:
    before, _, after = split(PAGE.read_text())
    PAGE.write_text(f"{before}{BEGIN}\n\n{render()}\n\n{END}{after}")
    for name in SECTIONS:
        changed = stale(common.load(common.RESULTS / f"{name}.json"))
        if changed:
            print(f"{name}: since measured, {', '.join(sorted(changed))} changed", file=sys.stderr)


if __name__ == "__main__":
    main()
