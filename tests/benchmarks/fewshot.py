"""How few pairs suffice on the tiny Flux, and do they leak? python tests/benchmarks/fewshot.py

Distils as the README's demonstration does on 1, 3, 10, 30, 100 and all 180 pairs that the teacher
made, three draws of each. (A draw shuffles the 180, and K pairs are its first K; it is also the
seed.) The 12 held-out captions are those of the demonstration. Distances are on the 8 that are
compared, 8 noises each, as in its table; leakage is on 32 noises each.

Leakage: RMSE from a 3-step sample of a held-out caption to the nearest training image (latents),
over the same from the teacher's 32 steps with the same noise. If it is less than 1, the student is
drawn to what it was trained on, or it is smoother than the teacher and so nearer to everything.
Hence the same ratio for strangers: as many images of the same captions from other noise, which were
not trained on.

"Share 0, 1, 2 words": how many of the 8 captions share so many of their two words, color and shape,
with a caption that is trained on; for each draw. "Error where": of those that share no word or one,
over the error of the student of all pairs on the same captions; for each draw that has some.
"""

import random
import tempfile
from pathlib import Path

import common
import common_flux
import numpy as np
import torch
from torch import Tensor

import flux_distill as fd
import shortcut as sc

COUNTS = (1, 3, 10, 30, 100, 180)
ALL = COUNTS[-1]
STEPS, NOISES = 3, 32

# ------------------------------------------------------------------------------------- measurements


def settings_of(out: Path, pairs: int, draw: int, length: float) -> fd.Settings:
    """The demonstration on the first pairs of a shuffled list."""
    how = dict(steps=(STEPS,), length=length)
    if pairs == ALL:
        return common_flux.demonstration(out / "run", draw, **how)
    lines = (common_flux.TINY / "prompts.txt").read_text().splitlines()
    held_out = common_flux.held_out_captions()
    pool = [line for line in lines if line not in held_out]
    random.Random(draw).shuffle(pool)
    file = out / "prompts.txt"
    file.write_text("\n".join([*pool, *held_out]) + "\n")
    more = ["--prompts", file, "--limit", pairs, "--validate-every", 1000]
    return common_flux.demonstration(out / "run", draw, *more, **how)


def measure(pairs: int, draw: int, length: float) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_of(Path(folder), pairs, draw, length)
        common_flux.distil(settings)
        model = common_flux.MergedStudent(settings)
        return errors_and_leakage(settings, model)


def errors_and_leakage(settings: fd.Settings, model: common_flux.MergedStudent) -> dict:
    cache, data = model.world.cache, model.world.data
    pairs, texts = len(data.pairs), data.comparison
    scale = fd.read_adapter(settings.out)["scales"][STEPS]
    noise = cache.noise([("compare", i, k) for k in range(NOISES) for i in texts])
    cond = cache.conditions(texts * NOISES, settings.guidance)

    def end(scale: float, steps: int, noise=noise, cond=cond) -> Tensor:
        return sc.euler_sample(model.velocity(scale), noise, sc.time_grid(steps), **cond)

    fine = end(0.0, settings.teacher_steps)
    ends = {"teacher": end(0.0, STEPS), "student": end(1.0, STEPS), "scaled": end(scale, STEPS)}
    in_table = settings.noises * len(texts)  # samples of the demonstration's comparison
    error = (ends["student"] - fine)[:in_table].square().mean((1, 2, 3))
    by_caption = error.reshape(settings.noises, len(texts)).mean(0).sqrt()

    trained = cache.read("latent", range(pairs))["latent"]
    copies = max(1, 90 // pairs)
    rows = [(i, k) for k in range(copies) for i in range(pairs)]
    other_cond = cache.conditions([data.pairs[i].text for i, _ in rows], settings.guidance)
    other_noise = cache.noise([("stranger", *row) for row in rows])
    strangers = end(0.0, settings.teacher_steps, other_noise, other_cond).split(pairs)
    return {
        "scale": scale,
        "captions": len({pair.text for pair in data.pairs}),
        "shared": shared_words(data),
        "rmse": {name: fd.rms((x - fine)[:in_table]) for name, x in ends.items()},
        "rmse of captions": by_caption.tolist(),
        "nearest": {
            name: {
                "trained": nearest(x, trained),
                "strangers": float(np.mean([nearest(x, some) for some in strangers])),
            }
            for name, x in {"fine": fine, **ends}.items()
        },
    }


def nearest(samples: Tensor, images: Tensor) -> float:
    """Mean over the samples of the RMS distance to the nearest image, in latents."""
    distances = torch.cdist(samples.flatten(1).double(), images.flatten(1).double())
    return (distances.amin(1).mean() / samples[0].numel() ** 0.5).item()


def shared_words(data: fd.Data) -> list[int]:
    """For each compared caption, how many of its two words, color and shape, were trained on."""
    words = [set(text.split()[1:]) for text in data.texts]
    trained = set().union(*(words[pair.text] for pair in data.pairs))
    return [len(trained & words[i]) for i in data.comparison]


def tasks(flows, seeds) -> dict[str, list[common.Task]]:
    some = [{"pairs": pairs, "draw": draw} for draw in seeds for pairs in COUNTS]
    return {"draws": [common.Task(measure, settings) for settings in some]}


# ------------------------------------------------------------------------------------------- tables


def tables(rows: list[common.Row]) -> list[str]:
    head = ["pairs", "captions", "share 0, 1, 2 words", "scale 1", "scaled", "the scale"]
    head += ["error where 0 are shared", "where 1 is"]
    head += ["nearest trained: teacher", "student", "ratio", "ratio, strangers"]
    of_all = {row.settings["draw"]: row for row in rows if row.settings["pairs"] == ALL}
    lines = []
    for pairs, some in sorted(common.grouped(rows, "pairs").items()):
        shared = [[row.found["shared"].count(k) for k in (0, 1, 2)] for row in some]
        cells = [pairs, ", ".join(str(row.found["captions"]) for row in some)]
        cells.append("; ".join(", ".join(map(str, counts)) for counts in shared))
        cells += [common.mean_text(common.column(some, "rmse", s)) for s in ("student", "scaled")]
        cells.append(f"{common.column(some, 'scale').mean():.2f}")
        for words in (0, 1):
            cells.append(error_where_shared(some, of_all, words))
        student, fine = (
            {kind: common.column(some, "nearest", name, kind) for kind in ("trained", "strangers")}
            for name in ("student", "fine")
        )
        cells += [common.mean_text(x["trained"]) for x in (fine, student)]
        cells += [common.ratio_text(student[kind], fine[kind]) for kind in student]
        lines.append(cells)
    by_draw = {row.settings["draw"]: row.found["rmse"]["teacher"] for row in rows}
    teacher = common.mean_text([*by_draw.values()])
    return [*common.table(head, lines), f"teacher, {STEPS} steps: {teacher}"]


def error_where_shared(rows: list[common.Row], of_all: dict[int, common.Row], words: int) -> str:
    """RMSE over the captions that share so many words, as a multiple of that with all pairs."""
    ratios = []
    for row in rows:
        chosen = np.array(row.found["shared"]) == words
        if not chosen.any() or row.settings["draw"] not in of_all:
            continue
        of_few, of_many = (
            np.square(one.found["rmse of captions"])[chosen].mean() ** 0.5
            for one in (row, of_all[row.settings["draw"]])
        )
        ratios.append(of_few / of_many)
    return ", ".join(f"{ratio:.2f}" for ratio in ratios)


if __name__ == "__main__":
    common.main(__file__, __doc__, tasks, tables, seeds=3)
