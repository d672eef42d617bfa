"""How few pairs suffice on the tiny Flux, and do they leak? python tests/benchmarks/fewshot.py

Distils as the README's demonstration does on 1, 3, 10, 30, 100 and all 180 pairs that the teacher
made, three draws of each (a draw shuffles the 180, and K pairs are its first K; it is also the
seed). The 12 held-out captions are those of the demonstration; distances are on the 8 that are
compared, 8 noises each, as in its table, leakage on 32 noises each.

Leakage: RMSE from a 3-step sample of a held-out caption to the nearest training picture (latents),
over the same from the teacher's 32 steps with the same noise. Less than 1: the student is drawn to
what it was trained on, or smoother than the teacher, which is nearer to everything. So the same
ratio for strangers: as many pictures of the same captions from other noise, not trained on.
"""

import toy as bench  # isort: skip; tests/benchmarks/toy.py: it sets threads before torch starts

import argparse
import json
import os
import random
import tempfile
from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import flux as demo
import quality
import torch
from torch import Tensor

import flux_distill as fd

COUNTS = (1, 3, 10, 30, 100, 180)
ALL, STEPS, NOISES = COUNTS[-1], 3, 32


def distilled(out: Path, pairs: int, draw: int, length: float) -> Namespace:
    if pairs == ALL:
        return quality.distilled(out, f"all-pairs-{draw}", draw, length=length)
    lines = (demo.TINY / "prompts.txt").read_text().splitlines()
    held_out = list(dict.fromkeys(lines))[-12:]
    pool = [line for line in lines if line not in held_out]
    random.Random(draw).shuffle(pool)
    out.mkdir(parents=True, exist_ok=True)
    (file := out / f"draw-{draw}-{pairs}.txt").write_text("\n".join([*pool, *held_out]) + "\n")
    more = ["--prompts", file, "--limit", pairs, "--validate-every", 1000]
    how = dict(steps=(STEPS,), length=length)
    return quality.distilled(out, f"{pairs}-pairs-{draw}", draw, *more, **how)


def nearest(samples: Tensor, pictures: Tensor) -> float:
    """Mean over samples of the RMS distance to the nearest picture, latents."""
    apart = torch.cdist(samples.flatten(1).double(), pictures.flatten(1).double())
    return (apart.min(1).values.mean() / samples[0].numel() ** 0.5).item()


def shared(args: Namespace) -> list[int]:
    """For every compared caption, how many of its two parts, colour and shape, were trained."""
    parts = [set(args.texts[pair.text].split()[1:]) for pair in args.pairs]
    trained = set().union(*parts)
    return [len(trained & set(args.texts[i].split()[1:])) for i in args.comparison]


def measure(out: Path, pairs: int, draw: int, length: float = 1.0) -> dict:
    torch.set_num_threads(1)
    args = distilled(out, pairs, draw, length)
    model = quality.Model(args)
    scale = fd.read_adapter(args)["scales"][STEPS]
    cond, noise = quality.draws(args, args.comparison, NOISES, "compare")
    table = args.noises * len(args.comparison)  # samples of the demonstration's table

    def end(scale: float, steps: int, cond=cond, noise=noise) -> Tensor:
        return quality.sample(quality.euler, model.velocity(scale), cond, noise, steps)

    fine, students = end(0.0, fd.FINE), {1.0: end(1.0, STEPS), scale: end(scale, STEPS)}
    ends = {"teacher": end(0.0, STEPS), "student": students[1.0], "scaled": students[scale]}
    result = {"pairs": pairs, "draw": draw, "scale": scale, "shared": shared(args)}
    result["captions"] = len({pair.text for pair in args.pairs})
    result["rmse"] = {name: fd.rms((x - fine)[:table]) for name, x in ends.items()}
    apart = (ends["student"] - fine).square().mean((1, 2)).reshape(NOISES, -1)[: args.noises]
    result["rmse of captions"] = apart.mean(0).sqrt().tolist()

    trained = fd.read(args, "latent", range(pairs))["latent"].flatten(1, 2)
    texts, copies = [pair.text for pair in args.pairs], max(1, 90 // pairs)
    rows = [(i, k) for k in range(copies) for i in range(pairs)]
    other = fd.read(args, "text", [texts[i] for i, _ in rows])
    other["guidance"] = torch.full((len(rows),), args.guidance)
    other = end(0.0, fd.FINE, other, fd.noises(args, [("stranger", *row) for row in rows]))
    strangers = other.split(pairs)
    result["nearest"] = {
        name: {
            "trained": nearest(x, trained),
            "strangers": sum(nearest(x, some) for some in strangers) / copies,
        }
        for name, x in {"fine": fine, **ends}.items()
    }
    return json.loads(json.dumps(result))


def markdown(runs: list[dict]) -> str:
    head = ["pairs", "captions", "share 0, 1, 2 parts", "scale 1", "scaled", "the scale"]
    head += ["nothing shared", "nearest trained: teacher", "student", "ratio", "ratio, strangers"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    teacher = {run["draw"]: run["rmse"]["teacher"] for run in runs}
    for pairs in sorted({run["pairs"] for run in runs}):
        group = [run for run in runs if run["pairs"] == pairs]
        parts = [[run["shared"].count(k) for k in (0, 1, 2)] for run in group]
        alone = [
            (sum(x * x for x in some) / len(some)) ** 0.5
            for run in group
            if (some := [
                x for x, k in zip(run["rmse of captions"], run["shared"]) if k == 0
            ])
        ]  # fmt: skip
        near = [run["nearest"] for run in group]
        errors = {name: [run["rmse"][name] for run in group] for name in ("student", "scaled")}
        ratios = [
            bench.ratio([x["student"][kind] for x in near], [x["fine"][kind] for x in near])
            for kind in ("trained", "strangers")
        ]
        cells = [
            str(pairs), ", ".join(str(run["captions"]) for run in group),
            "; ".join(", ".join(map(str, some)) for some in parts),
            *(quality.cell(numbers, 3) for numbers in errors.values()),
            f"{bench.interval([run['scale'] for run in group])[0]:.2f}",
            ", ".join(f"{x:.3f}" for x in alone),
            *(quality.cell([x[name]["trained"] for x in near], 3) for name in ("fine", "student")),
            *ratios,
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"teacher, 3 steps: {quality.cell([*teacher.values()], 3)}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("? ")[0])
    parser.add_argument("--pairs", type=int, nargs="+", choices=COUNTS, default=COUNTS)
    parser.add_argument("--seeds", type=int, default=3, help="draws 0 to this, exclusive (3)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes of one thread")
    parser.add_argument("--length", type=float, default=1.0, help="scales all trainings (1)")
    parser.add_argument("--out", type=Path, help="keep the students in this folder, and go on")
    parser.add_argument("--raw", type=Path, help="file of the numbers: read what it has, add to it")
    args = parser.parse_args()
    runs = json.loads(args.raw.read_text()) if args.raw and args.raw.exists() else []
    done = {(run["pairs"], run["draw"]) for run in runs}
    todo = [(k, d) for d in range(args.seeds) for k in args.pairs if (k, d) not in done]
    with tempfile.TemporaryDirectory() as scratch, ProcessPoolExecutor(args.jobs) as pool:
        out = args.out or Path(scratch)
        for job in [pool.submit(measure, out, k, d, args.length) for k, d in todo]:
            runs.append(job.result())
            if args.raw:
                args.raw.write_text(json.dumps(runs))
    print(markdown(runs))


if __name__ == "__main__":
    main()
