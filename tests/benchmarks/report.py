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
import fewshot
import flux
import fusion
import gpu
import guidance
import iterations
import klein
import lookahead
import oracle
import quality
import readme
import speed
import toy

PAGE = Path(__file__).with_name("README.md")
BEGIN = "<!-- rendered by report.py: begin -->"
END = "<!-- rendered by report.py: end -->"
SECTIONS = {  # file of results: title, the script that made it
    "readme": ("What the README's commands print", readme),
    "toy": ("2-D flows", toy),
    "baselines": ("Other ways to few steps", baselines),
    "ablations": ("What each choice is worth", ablations),
    "iterations": ("How long until a quality is reached", iterations),
    "lookahead": ("Does the theory hold?", lookahead),
    "fusion": ("Training from scratch", fusion),
    "guidance": ("A guided teacher", guidance),
    "flux": ("The tiny Flux", flux),
    "quality": ("Quality against network calls on the tiny Flux", quality),
    "fewshot": ("Few pairs on the tiny Flux", fewshot),
    "oracle": ("How near a student of the tiny Flux can come", oracle),
    "klein": ("The tiny klein", klein),
    "gpu": ("A GPU", gpu),
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
    "baselines": """In 3 steps ours, direct regression and progressive distillation are level: no
ratio between them is far from one. At one and two steps a student of 3 steps loses by far to
networks that were trained for these, or are told their step, even with its scale; a student that
is distilled for them does not. With a full budget, direct regression from 8 teacher calls is as
good as ours for 3 and 4 steps and better for 2 and, at shift 3 by far, for one: there our teacher's
part, one midpoint step, is too coarse. With a tenth of the budget ours is better at shift 1, where
fewer teacher calls are too inexact and more leave too few iterations, and level with the best at
shift 3. On the tiny Flux ours is somewhat nearer than direct regression and level with the others.
Bootstrapping saves teacher calls; that is all it does.""",
    "iterations": """The paper's recipe is as fast as ours to a coarse level, and passes its best
soon after. To that best ours needs half to a third of the calls, and it goes on to errors several
times lower. What makes runs short is the EMA: with the paper's own decays its recipe takes tens of
times as many calls as with EMAs that are warmed up. Small batches reach a level in fewer calls.""",
    "lookahead": """With a table in place of a network the code follows the prediction. Networks
follow it too with matched windows, and with the paper's at a teacher fraction of a half or more.
Long look-aheads come out shorter than predicted: each window loses a few percent of it, for its
middle lies off the teacher's path, and the losses add up. On the tiny Flux they are about a third,
for its student falls short of its targets in the middle of the path. lam* is the best scale at the
student's own number of steps; at others it is only near, and the search around it finds the
best.""",
    "flux": """In 3 steps the student is half as far from the teacher's end as the teacher in 3,
at each shift, and level with its 6 steps. More was set as a target: 9 steps, and 8 and 12 for 4, is
missed. Ten pairs do as well as all. A LoRA on all layers comes nearer, but a tool that drops those
outside the blocks loses nearly all of its gain, so the default is inside the blocks. The paper's
windows end farther from the teacher.""",
    "quality": """In one to three calls the student is nearer to the teacher's end than any solver
that needs no training. At four the best of them is level with the scaled student, and its Fréchet
distance is lower, as it is in three; from six on it is ahead in both. The student keeps the
diversity of the teacher's many steps.""",
    "klein": """In 3 plain calls the student is within the bound of distance. It shows its caption
far more often than the teacher without guidance, but less often than the guided teacher in 8 steps:
that bound is missed. A student that learns exact targets from the same captions ends at about the
same distance and misses it, too; only one that learns the captions on which it is judged comes near
it. So half of what is missing is not the method's. The modulation matters: a LoRA inside the blocks
alone is farther off. The scale, searched for each number of steps, gains little at others.""",
    "fusion": """Training from scratch with shortcuts has the same trade-off as distillation. Few
steps gain as many lose: recipes whose look-ahead suits few steps are worse in 32 steps than plain
flow matching, by one to two orders of magnitude. The paper says that quality in many steps does
not fall. A large fraction of data rows costs nothing there, and gains little in 3 steps.""",
    "guidance": """A guided teacher can be distilled. The student's 3 plain calls are nearer to its
many guided steps than 8 guided steps, which take 16 calls. A warm start on the guided velocity
helps a little where there is no guidance to learn; with guidance it does not, or does harm. The
scale is no dial for other numbers of steps, for it changes the guidance, too.""",
    "fewshot": """Ten pairs do nearly as well as all on the tiny Flux, unlike on the 2-D flows; one
pair costs a quarter. Captions that share no word with those trained on suffer most. Nothing leaks,
as far as can be seen: the student is no nearer to trained images than to strangers.""",
    "oracle": """Students on exact targets end somewhat nearer than the demonstration's, after
twenty times its iterations. On the way errors rise and fall by a third; only the last ones, at a
falling rate, compare. It makes no clear difference whether all weights are trained or a LoRA, nor
whether the held-out captions are among those it learns: what is left lies in the network, which in
one call can't tell where a third of the path leads. That may also be why the look-ahead that was
measured on the tiny Flux falls short of the prediction; it was not tried.""",
    "gpu": """cuDNN's attention has right velocities and wrong gradients; the other kernels agree
with plain attention. Compiled, a step reaches six tenths of the rate of a large matrix product,
eager one half: between the matrix products an eager step runs norms, gates, rotations and
conversions one by one, and these are a third of its kernels' time. At batch 1 the processor is too
slow for the card. Ratios are of two timed steps; those below one are noise.""",
}


FIGURES = {  # which its script draws with --figure: file in assets, what it shows
    "lookahead": (
        "lookahead.png",
        "Predicted against measured look-ahead, a dot for a student and a time of the grid;"
        " look-ahead along the path",
    ),
    "quality": ("steps.png", "Distance, Fréchet distance and diversity over network calls"),
}


def section(name: str, rows: list[common.Row]) -> list[str]:
    title, script = SECTIONS[name]
    first, what = script.__doc__.strip().split("\n\n", 1)
    form = r"(.+[:?]) (python [^(]+?)(?: \((.+)\))?"
    question, command, time = re.fullmatch(form, " ".join(first.split())).groups()
    took = f" takes {time}" if time else ""
    made = " / ".join(speed.made_on(rows))
    lines = [f"## {title}", "", f"{question} `{command}`{took}.", ""]
    lines += [f"`results/{name}.json`, {made}.", "", what, ""]
    if name in FINDINGS:
        lines += [f"**What it says.** {FINDINGS[name]}", ""]
    if name in FIGURES:
        file, shown = FIGURES[name]
        lines += [f"![{shown}](../../assets/{file})", ""]
        lines += [f"*{shown}. Drawn with `--figure assets/{file}`.*", ""]
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
    on_flows = [row for row in rows if "flow" in row.settings or row.part == "table"]
    others = [row for row in rows if row not in on_flows]
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
