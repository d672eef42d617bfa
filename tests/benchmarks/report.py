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
    "toy": """In 3 steps the student is better than the teacher in 16, at shift 3 better than in
12. With its calibrated scale it also beats longer runs of the teacher in 2 and 4 steps, and in
8; on gaussians the bound for 8 steps was the teacher in 8, which it beats. Matched windows end
near their best; the paper's pass through theirs and leave it. The calibration, which sees no
data, comes near the best scale; in 3 steps it gains nothing, and on checkerboard and spirals
the error is a little larger with it. A student of ten points is far better than the teacher in
3 steps, but on three of the four flows it misses the bound of twice the error with all data,
and much depends on the draw. Training from scratch with matched windows gains 3-step quality
and loses 32-step quality.""",
    "ablations": """Matched windows are level with direct regression from 8 teacher calls. They
are near the oracle on moons; on gaussians the oracle has half of their error, and at shift 3
about a quarter. From a quarter to three eighths of the step, how much the teacher covers
matters little; half of it is worse on gaussians, and all of it is too coarse for one midpoint
step. An EMA as slow as the paper's stalls in runs as short as these. What counts is the
distribution of the look-ahead, not its mean alone: equal halves have the right mean and are far
worse at shift 3. At the paper's shifts, 2.5 to 4.5, windows are matched to 3.5, and sampling at
3 costs more than was expected: so flux_distill.py trains at 2 to 4. On gaussians in 2 steps
direct regression and the paper's and the authors' windows at the paper's teacher fraction, all
calibrated, have half of our error or less. A constant EMA decay that is short enough does as
well as our warm-up.""",
    "baselines": """On the flows in 3 steps ours, direct regression and progressive distillation
are level: no ratio between them is far from one. In one and two steps a student of 3 steps
loses by far to networks that were trained for these or are told their step, even with its
scale; one that is distilled for them loses by less, on half their budget. In four steps, too,
the student of 3 steps with its scale is mostly somewhat behind these, and in eight steps it has
up to twice their error. In 3 steps it is level with the distilled shortcut model, or better. So
whoever needs several numbers of steps is better served by a network that is told its step, or
by one network for each. With a full budget and a student for each number of steps, ours and
direct regression from 8 teacher calls are level in 3 and 4 steps; in one and two direct
regression is somewhat better. With a tenth of the budget ours is better at shift 1 in 2 to 4
steps, and else level with the best number of calls or somewhat behind. Direct regression from 4
teacher calls has nearly as many iterations as ours, and at shift 1 on a full budget it is as
good in two to four steps; on a tenth it is behind. So the calls that bootstrapping saves can't
be the whole reason; what else is was not tried. On the tiny Flux ours is nearer than direct
regression and level with the others.""",
    "iterations": """To coarse levels the paper's recipe is about as fast as ours; but on
checkerboard and spirals it takes three times as many calls to twice its own least error, for
batches of 64 do not get there with every seed, and it passes its best soon after. To that best
ours needs a half to a fifth of the calls, and it goes on to errors two to eight times lower.
This is ours with tuned settings: as toy_2d.py trains, with batches of 512, it takes 1.3 to 8
times as many calls to a coarse level as the tuned recipe of the paper, and more calls to the
paper's best on all flows but gaussians. With its own EMA decays from the start, and half the
rate, the paper's recipe takes some fifteen to a hundred times as many calls as ours to a coarse
level; the two causes were not separated. On the tiny Flux, at scale 1, ours takes a quarter to
a half of the calls of the tuned recipe of the paper to each level that both reach, as shipped
nearly as many to the coarsest; with scales the two are level to coarse levels. Ours ends about
a quarter nearer, with scales by a seventh. The paper's own decays, with batches of 8, do as
well there as its tuned settings, in as many calls.""",
    "lookahead": """With a table in place of a network the code follows the prediction. Networks
follow it too with matched windows, nearly everywhere within a tenth. With the paper's at a
teacher fraction of a half or more they follow it in the first two thirds of the path, and
nearer to the data often deviate by a fifth and more. Long look-aheads come out shorter than
predicted: each window loses a few percent of it, for its middle lies off the teacher's path,
and the losses add up. On the tiny Flux measured look-aheads are about a third below the
predicted; in the middle of the path its student falls short of its targets. Near the data the
fit explains little of its change. lam* is the best scale at the student's own number of steps;
at others it can be off by nearly four tenths, with several times the least error, and the
search around it finds the best.""",
    "flux": """In 3 steps the student is half as far from the teacher's end as the teacher in 3,
at each shift. Twice as many steps of the teacher are harder. In 2 steps the student is nearer
than the teacher in 4 at shift 1, and level with it at shifts 2 and 3. In 3 steps it is level
with the teacher in 6 at shift 1, and its mean error is somewhat larger at shifts 2 and 3. In 4
steps its mean error is larger than the teacher's in 8 at each shift. So what must hold fails in
4 steps at every shift, and in 3 steps at shifts 2 and 3. No target of three times as many steps
is met. Ten pairs do nearly as well as all. A LoRA on all layers comes nearer, but a tool that
drops those outside the blocks loses nearly all of its gain, so the default is inside the
blocks. In 3 steps the paper's windows end farther from the teacher; with their scale the
difference is within the interval. Students for one, two or four steps are half as far from the
teacher's end as the teacher in as many, the one for eight about seven tenths as far. In two
steps the student for three, with its scale, is somewhat nearer than one that was distilled for
two; in four and eight the two are level.""",
    "quality": """In one to three calls the student is nearer to the teacher's end than the best
solver, and its Fréchet distance is lower, at three calls only by as much as the intervals are
wide. In captions shown it gains over the teacher's plain steps only in one and two calls; from
four calls on it shows them slightly less often, within the intervals. From three calls on the
solver's images show them more often than the student's. At four calls the solver is level with
the student in distance; from six on it is ahead in distance to the teacher's steps, in Fréchet
distances and in captions, while in distance to the end of the path the intervals overlap. From
six calls on the student's Fréchet distance to rendered images is no lower than that of the
teacher's plain steps. From two calls on its diversity is within a tenth of the teacher's in 32
steps.""",
    "klein": """In 3 plain calls the student is within the bound of distance, and 1,500 iterations
bring it nearer than 200; with the LoRA inside the blocks it is not. It shows its caption far more
often than the teacher without guidance or the guided teacher in 3 steps, but less often than that
in 8: this bound is missed, by three images in a hundred after 200 iterations and by one after
1,500. It leaves no room for errors, for the 32 steps that the student learns from show hardly more
captions than it asks for. The gap is no smaller on captions that were trained on, so it does not
come from captions being new. More iterations close it slowly: eight times as many take a fifth off
the error of the first step, which is the largest, and leave four tenths of the gap. At shift 3 the
first step is easier and the last one harder: the student ends nearer, but shows fewer captions.
The scale hardly matters in 2 and 3 steps; in 8 the student is farther off than the teacher in as
many.""",
    "fusion": """Training from scratch with shortcuts has the same trade-off as distillation:
what is gained in few steps is lost in many. Recipes whose look-ahead suits few steps are worse
in 32 steps than plain flow matching, by one to two orders of magnitude. In 3 steps matched
windows have by far the least error on moons; on gaussians they are level with the paper's
windows at a third of data rows, which lose less in 16 and 32 steps. With nine tenths or three
quarters of data rows, errors in 3, 8 and 16 steps fall and in 32 steps hardly change: there it
holds, as the paper says, that many steps lose nothing, but the error in 3 steps stays far above
that of matched windows. On the tiny Flux, in a fifth of its teacher's iterations, shortcuts from
scratch lose in all that was measured, in 3 steps too: matched windows most, three quarters of data
rows less.""",
    "guidance": """A guided teacher can be distilled. The student's 3 plain calls are nearer to
its many guided steps than 8 guided steps, which take 16 calls. A long warm start on the guided
velocity helps a little where there is no guidance to learn; with guidance it does not, or does
harm. Without guidance the scale adapts the student to other numbers of steps. With guidance it
hardly does from four steps on, for it changes the guidance, too; in 8 steps such a student is
then worse than the guided teacher in 8.""",
    "fewshot": """Ten pairs, which cover seven to ten of the 18 captions, do nearly as well as
all on the tiny Flux, unlike on the 2-D flows; with one pair the error is a quarter larger. With
ten pairs, captions of which one word was not trained on are worse, in one of three draws by
half. Captions that share no word with those trained on suffer most. The student is nearer to
trained images than to strangers by less than one percent: no sign of copying.""",
    "oracle": """On one seed, students on exact targets end a quarter to somewhat more than a
third nearer than the demonstration's, after twenty times as many iterations; after about as
many, three of the four have most of this gain. The LoRA on the captions of the demonstration,
on three seeds, ends a quarter nearer than it on average, and on one of them no nearer. Errors
rise and fall on the way, by up to four tenths where the held-out captions are learned, so it
can't be told whether that helps, or training all weights. What limits these students was not
found.""",
    "gpu": """cuDNN's attention has right velocities and wrong gradients; the other kernels
agree with plain attention. At full size bfloat16 with random weights deviates from float32 by a
tenth. Compiled, a step reaches six tenths of the rate of a large matrix product, eager one
half: between the matrix products an eager step runs norms, gates, rotations, copies and
conversions one by one, and in a profile that another job disturbed these are four tenths of its
kernels' time. At batch 1 and 512 pixels a step reaches an eighth of that rate, probably because
the processor is too slow for the card. Seconds are medians of two or three steps, uncertain by a
tenth; ratios below one are noise. The steps are from two cards: the first two lines are compared
with the first matrix product, the others, which an earlier version of the code made, with the
second. A klein of 4 billion parameters trains in less than 14 GiB, so that a card of 24 GB should
do.""",
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
