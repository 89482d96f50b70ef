"""Samples a checkpoint for Negative DPO.

    python -m emv3_jax.training.negatives --config configs/NAME.py --weights DIR --out DIR

Clips of the training data are made anew from their prompts, voices and first frames, by the weights that Negative DPO
will refer to. They lie in a review folder: a video each to look at (python -m emv3_jax.training.review FOLDER), and
the arrays that training needs. Clips of puppets may be judged by the measures of the small world instead:
--judge metrics; what a person said of them stays. A run that was interrupted goes on when the same command is given
again; plan.json says what the clips are made of, and another plan is refused.
"""

import dataclasses
import hashlib
import json
import pathlib
import sys
import zipfile
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from emv3_jax import command_line, conditioning, pipeline, weight_files
from emv3_jax.config import Preset
from emv3_jax.data import builder, examples
from emv3_jax.data.dataset import Dataset
from emv3_jax.data.examples import Example
from emv3_jax.errors import UserError, short_of_memory
from emv3_jax.files import PathLike, atomic_path, check_writable
from emv3_jax.options import SamplingOptions
from emv3_jax.puppets import clips, evaluation, metrics
from emv3_jax.training import distributed, verdicts

FORMAT = "emv3_jax clips for review 1"
METRICS = "metrics"  # who says a verdict that is no person's
TRUE = "true_latents"  # of the clip that a sample was made after, for paired preferences

# How the small world's measures say what a reviewer would: of puppets, the larger the worse.
JUDGES: dict[str, Callable[[dict[str, float]], float]] = {
    "lips": lambda scores: -scores["sync"],
    "motion": lambda scores: -scores["motion"] - 0.01 * scores["psnr"],
    "identity": lambda scores: scores["identity"],
    "background": lambda scores: scores["drift"],
}


class Negatives:
    """Examples that were rejected, by number. A batch is of one size, which is drawn as often as it has clips.

    Args:
      rows: rejected samples, with `true_latents` beside `latents`.
      names: the task of each.
      ids: what they are called.
    """

    def __init__(self, rows: Sequence[Example], names: Sequence[str], ids: Sequence[str]):
        self.rows, self.names, self._ids = rows, names, ids
        sizes: dict[tuple[int, ...], list[int]] = {}
        for number, row in enumerate(rows):
            sizes.setdefault(row["latents"].shape, []).append(number)
        self._sizes = list(sizes.values())

    @classmethod
    def read(cls, folder: str, issue: str) -> "Negatives":
        """Those of a review folder that were rejected; issue: for this alone, or "" for any.

        Raises:
          UserError: no such folder, nothing was rejected, or arrays are missing or damaged.
        """
        if not (chosen := rejected(folder, issue)):
            what = f"for {issue}" if issue else "at all"
            raise UserError(
                f"nothing in {folder} was rejected {what}: review it (python -m emv3_jax.training.review {folder})"
            )
        rows = [_read(pathlib.Path(folder) / f"{row['id']}.npz") for row in chosen]
        return cls(rows, [row["task"] for row in chosen], [row["id"] for row in chosen])

    def _picked(self, seed: int, step: int, size: int) -> np.ndarray:
        shares = np.array([len(some) for some in self._sizes]) / len(self.rows)
        some = np.array(self._sizes[np.random.default_rng([seed, step, 0x51]).choice(len(shares), p=shares)])
        return np.random.default_rng([seed, step, 0x4E]).choice(some, size, replace=size > len(some))

    def ids(self, seed: int, step: int, size: int) -> list[str]:
        """Of a step's batch."""
        return [self._ids[k] for k in self._picked(seed, step, size)]

    def examples(self, seed: int, step: int, size: int, paired: bool) -> tuple[list[Example], list[str]]:
        """A step's negatives and their tasks; paired: after the true clips that they were made after."""
        rows = [self.rows[k] for k in self._picked(seed, step, size)]
        names = [self.names[k] for k in self._picked(seed, step, size)]
        if paired:
            return [{**row, "latents": row[TRUE]} for row in rows] + rows, names * 2
        return rows, names

    def notes(self, frames: int, preset: Preset) -> list[str]:
        """A line where clips are shorter than `frames`, the longest batch: what was rejected is never left out."""
        lengths = [preset.vae.video_frames(len(row["latents"])) for row in self.rows]
        if not (short := [length for length in lengths if length < frames]):
            return []
        return [
            f"{len(short)} of the {len(lengths)} rejected clips are shorter than the {frames} frames of a batch, down"
            f" to {min(short)}: they are taken whole (config key stages)"
        ]


def rejected(folder: PathLike, issue: str) -> list[dict[str, Any]]:
    """The rows of a review folder's clips that were rejected; issue: for this alone, or "" for any."""
    judged = verdicts.read_verdicts(folder)
    return [
        row for row in verdicts.read_clips(folder)
        if (verdict := judged.get(row["id"])) and verdict.verdict == "reject" and issue in ("", verdict.issue)
    ]  # fmt: skip


def _read(path: pathlib.Path) -> dict[str, Any]:
    try:
        with np.load(path) as arrays:
            return {name: arrays[name] if arrays[name].ndim else arrays[name].item() for name in arrays.files}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"{path} is missing or damaged ({error}): sample the clips again after deleting it; the others are kept"
        ) from error


def is_made(folder: pathlib.Path, name: str) -> bool:
    """Whether a clip's arrays and its video are there, and not cut off. (Arrays are gigabytes in all, and are read when
    they are trained on.)"""
    video = folder / f"{name}.mp4"
    return zipfile.is_zipfile(folder / f"{name}.npz") and video.exists() and video.stat().st_size > 0


def inputs(preset: Preset, some: Sequence[Example], task: str, words: Any) -> tuple[conditioning.Prepared, np.ndarray]:
    """What `Pipeline.sample_latents` is given to make examples of one size anew."""
    batch = examples.batch(some, [task] * len(some), preset.vae.video_frames(len(some[0]["latents"])), preset)
    ids, mask = words.encode([examples.text_of(example["caption"]) for example in some])
    pixels = np.stack([example["image"] for example in some]).astype(np.float32) / 127.5 - 1.0
    prepared = conditioning.Prepared(ids, mask, pixels, batch["has_image"], batch["audio"], batch["face_mask"])
    return prepared, batch["given"]


def generate(
    pipe: pipeline.Pipeline, options: SamplingOptions, some: Sequence[Example], task: str, seeds: Sequence[int]
) -> np.ndarray:
    """Latents [B, T, h, w, 16] float16 of examples of one size, made anew; seeds: of the noise of each."""
    prepared, given = inputs(pipe.preset, some, task, pipe.words)
    size = tuple(8 * side for side in some[0]["latents"].shape[1:3])
    frames = pipe.preset.vae.video_frames(len(some[0]["latents"]))
    noise = np.concatenate([pipe.noise(seed, frames, size) for seed in seeds])
    return np.asarray(pipe.sample_latents(prepared, given, noise, options), np.float16)


def puppet_number(name: str) -> tuple[str, int]:
    """Split and number of a puppets' example by its identifier, SPLIT/NUMBER.

    Raises:
      UserError: it is none.
    """
    split, _, number = name.partition("/")
    if split not in ("train", "heldout") or not number.isdecimal():
        raise UserError(
            f"the clip {name!r} is no puppet, so no measure can judge it: let a person (--judge person, or config key"
            " review.judge)"
        )
    return split, int(number)


def puppet_of(name: str, frames: int) -> clips.Clip:
    """The clip of a puppets' example; see `puppet_number`."""
    return clips.make_clip(*puppet_number(name), frames)


def check_puppets(record: dict[str, Any]) -> None:
    """Raises UserError unless measures can judge all clips of a dataset (`builder.read_record`)."""
    for name, *_ in record["clips"]:
        puppet_number(name)


def worst(scores: Sequence[dict[str, float]], issue: str, share: float) -> list[int]:
    """Numbers of the clips that a judge rejects for an issue: the worst share, at least one."""
    order = sorted(range(len(scores)), key=lambda k: -JUDGES[issue](scores[k]))
    return sorted(order[: max(1, round(share * len(order)))])


def plan_of(
    preset: Preset, weights: dict[str, str], options: SamplingOptions, data: Dataset, task: str, seed: int
) -> dict[str, Any]:
    """What clips for review are made of; weights: hashes of the trained models (`weight_files.weight_hashes`)."""
    dataset = hashlib.sha256(json.dumps(data.record, sort_keys=True).encode()).hexdigest()
    return {
        "format": FORMAT, "dataset": dataset, "task": task, "seed": seed, **_makers(preset, weights),
        **{f"sampling.{name}": value for name, value in dataclasses.asdict(options).items()},
    }  # fmt: skip


def _makers(preset: Preset, weights: dict[str, str]) -> dict[str, str]:
    """The part of a plan that says by what clips are made."""
    return {"preset": preset.name, **{f"weights of {role}": value for role, value in weights.items()}}


def check_makers(folder: PathLike, preset: Preset, weights: str, roles: Sequence[str]) -> list[str]:
    """A note where the clips of a review folder are not those of the weights that are to unlearn them: what others made
    may be what these would never make.

    Args:
      weights: the folder of the reference; roles: its trained models.
    Raises:
      UserError: the clips are of another preset, or their plan is damaged.
    """
    if not (pathlib.Path(folder) / builder.PLAN).exists():
        return [f"{folder} has no {builder.PLAN}, so nothing says whether the weights in {weights} made its clips"]
    try:
        there = builder.read_plan(pathlib.Path(folder))
    except UserError as error:
        raise UserError(f"{error}: delete it if you know that the weights in {weights} made the clips") from error
    if there.get("preset") != preset.name:
        raise UserError(
            f"the clips in {folder} are of the preset {there.get('preset')}, not of {preset.name}: give others (config"
            " key negatives)"
        )
    here = _makers(preset, weight_files.weight_hashes(preset.name, weights, roles))
    if others := [key.removeprefix("weights of ") for key, value in here.items() if there.get(key) != value]:
        return [
            f"the clips in {folder} were made by other weights of {' and '.join(others)} than those in {weights}, which"
            " are to unlearn them (config keys negatives and init_from)"
        ]
    return []


def sample(
    pipe: pipeline.Pipeline, options: SamplingOptions, data: Dataset, folder: pathlib.Path, count: int, batch: int,
    plan: dict[str, Any],
) -> None:  # fmt: skip
    """Makes `count` clips of a dataset anew into a review folder; those that are there and whole are kept. Several
    processes (`jax.distributed`), all of which call it, share the batches.

    Args:
      pipe: may work on this process's own devices alone where there are others.
      plan: `plan_of` the pipeline's weights, the options and the dataset.
    Raises:
      UserError: the folder holds clips of another plan, or of none, or cannot be written; the device has too little
        memory for a batch; another process failed.
    """
    task, seed = plan["task"], plan["seed"]
    numbers = np.random.default_rng([seed, 0x6E]).permutation(len(data))[:count]
    parts = _batches(data, numbers, batch)
    with distributed.together():
        check_writable(folder / verdicts.CLIPS)
        if not (folder / builder.PLAN).exists() and any(folder.glob("*.npz")):
            raise UserError(
                f"{folder} holds clips without a {builder.PLAN} that says what made them: give another --out"
            )
        builder.check_plan(folder, plan)
    waiting = distributed.of_first([not all(is_made(folder, _name(number)) for number in part) for part in parts])
    mine = [part for part, waits in zip(parts, waiting, strict=True) if waits][
        jax.process_index() :: jax.process_count()
    ]
    done, total = 0, sum(map(len, mine))
    others = f" ({len(numbers) - total} before, or by others)" if total < len(numbers) else ""
    with distributed.together():
        for part in mine:
            missing = [number for number in part if not is_made(folder, _name(number))]
            remedy = "make fewer at once (--batch, in a cycle config key review.batch) or shorter ones"
            with short_of_memory(f"a batch of {len(part)} clips", remedy):
                _make(pipe, options, data, folder, part, missing, task, seed)
            done += len(part)
            distributed.say(f"{done} of {total} clips sampled{others}: {folder}")
    with distributed.together():
        if jax.process_index() == 0:
            rows = [
                {"id": _name(number), "video": f"{_name(number)}.mp4", "task": task, "clip": data.id(number),
                 "seed": seed + number, "prompt": examples.text_of(data.examples([number])[0]["caption"])}
                for part in parts for number in part
            ]  # fmt: skip
            with atomic_path(folder / verdicts.CLIPS) as path:
                path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _name(number: int) -> str:
    """What the files of a clip of the dataset made anew are called."""
    return f"{number:06d}"


def _batches(data: Dataset, numbers: Sequence[int], size: int) -> list[list[int]]:
    """Numbers of clips in batches of at most `size`, those of one shape together."""
    by_shape: dict[Any, list[int]] = {}
    for number in numbers:
        by_shape.setdefault(tuple(data.record["clips"][number][1:]), []).append(int(number))
    return [some[first : first + size] for some in by_shape.values() for first in range(0, len(some), size)]


def _make(
    pipe: pipeline.Pipeline, options: SamplingOptions, data: Dataset, folder: pathlib.Path, numbers: list[int],
    missing: list[int], task: str, seed: int,
) -> None:  # fmt: skip
    """Makes a batch; of clips that are there already, which a batch of one size holds too, nothing is written."""
    from emv3_jax.media import VideoWriter, to_uint8

    some = data.examples(numbers)
    latents = generate(pipe, options, some, task, [seed + number for number in numbers])
    videos = evaluation.decode(pipe, latents.astype(np.float32))
    for number, example, made, video in zip(numbers, some, latents, videos, strict=True):
        if number not in missing:
            continue
        name = _name(number)
        wave, (_, height, width, _) = example["wave"].astype(np.float32) / 32767, video.shape
        scale = max(1, 384 // height)
        with VideoWriter(folder / f"{name}.mp4", height, width, wave=wave, scale=scale) as writer:
            writer.write(to_uint8(video))
        arrays = {**example, "latents": made, TRUE: example["latents"], "caption": examples.text_of(example["caption"])}
        arrays["id"] = examples.text_of(example["id"])
        with atomic_path(folder / f"{name}.npz") as path, open(path, "wb") as file:
            np.savez(file, **arrays)


def judge(pipe: pipeline.Pipeline, folder: pathlib.Path, issue: str, share: float) -> int:
    """Lets the small world's measures reject the worst share of a review folder for an issue; returns how many.

    Clips that a person has judged are left out, and said to be.
    """
    said = {id for id, verdict in verdicts.read_verdicts(folder).items() if verdict.by != METRICS}
    rows = [row for row in verdicts.read_clips(folder) if row["id"] not in said]
    if kept := len(verdicts.read_clips(folder)) - len(rows):
        print(f"note: a person has judged {kept} clips of {folder}, which the measures leave as they are", flush=True)
    if not rows:
        return 0
    scores = []
    for row in rows:
        arrays = _read(folder / f"{row['id']}.npz")
        video = evaluation.decode(pipe, np.asarray(arrays["latents"], np.float32)[None])[0]
        scores.append(metrics.score_clip(video, puppet_of(row["clip"], len(video))))
    bad = set(worst(scores, issue, share))
    for number, row in enumerate(rows):
        verdict = "reject" if number in bad else "keep"
        verdicts.add_verdict(folder, row["id"], verdict, issue if number in bad else None, by=METRICS)
    return len(bad)


def main(arguments: list[str]) -> int:
    """Parses the command line, samples, judges."""
    parser = command_line.make_parser("emv3_jax.training.negatives", __doc__)
    parser.add_argument("--weights", required=True, help="a folder that train.py wrote, or converted weights")
    parser.add_argument("--out", required=True, type=pathlib.Path, help="the review folder")
    parser.add_argument("--clips", type=int, default=64, help="how many to make (default: 64)")
    parser.add_argument("--batch", type=int, default=1, help="made at once, as memory allows (default: 1)")
    parser.add_argument("--task", choices=examples.TRAINED_TASKS, default="i2v", help="(default: i2v)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of clips and of the noise (default: 0)")
    parser.add_argument("--judge", choices=("person", METRICS), default="person", help="(default: person)")
    parser.add_argument("--issue", choices=sorted(JUDGES), default="lips", help="what measures look at (default: lips)")
    parser.add_argument("--share", type=float, default=0.25, help="of the clips that measures reject (default: 0.25)")
    options, cfg = command_line.parse(parser, arguments)
    if min(options.clips, options.batch) < 1 or not 0 < options.share <= 1 or options.seed < 0:
        raise UserError("--clips and --batch must be 1 or more, --seed 0 or more, --share above 0 and at most 1")

    from emv3_jax.training import recipes

    recipe = recipes.build(cfg)
    if wrong := recipes.without_videos(cfg):
        raise UserError(wrong)
    check_writable(options.out / verdicts.CLIPS)
    if options.judge == METRICS:
        check_puppets(recipe.data.record)
    command_line.setup_compile_cache()
    pipe = recipe.make_sampler(options.weights)
    sampling = SamplingOptions(**cfg.sampling)
    hashes = weight_files.weight_hashes(recipe.preset.name, options.weights, recipe.trained)
    plan = plan_of(recipe.preset, hashes, sampling, recipe.data, options.task, options.seed)
    sample(pipe, sampling, recipe.data, options.out, options.clips, options.batch, plan)
    if options.judge == METRICS:
        count = judge(pipe, options.out, options.issue, options.share)
        print(f"{count} of {len(verdicts.read_clips(options.out))} rejected for {options.issue}", flush=True)
    else:
        print(f"now look at them: python -m emv3_jax.training.review {options.out}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(command_line.run_main(main))
