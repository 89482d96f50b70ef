"""Table 2 of the paper in miniature, on puppets: python -m bench.table2 --out DIR [--rows full schedule_a ...]

Every row is a small model of its own, trained from one base model by configs/puppet_full_cycle.py with one thing
changed, for several seeds side by side (vmap). What was trained and measured is kept in DIR, stage by stage and row by
row, and not done again: the same command goes on where it was stopped. The table of all rows that are there is printed
at the end, with the paper's numbers beside; `--rows` alone prints it.

    python -m emv3_jax.data.prepare --puppets train --clips 448 --frames 33 --preset demo --out data/puppets33
    python -m bench.table2 --out runs/table2

Each seed is scored on 24 held-out puppets of 65 frames, twice as long as a window: sync, motion as prompted, identity
error of 255, a distance between the distributions of true and generated videos (puppets.metrics.frechet_distance), seam
error (against other frames at which a latent frame begins). Text guidance is on, with PNG: another motion than the
asked one early, another expression late.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from bench.long_video import seams
from configs import (
    puppet_base,
    puppet_full_cycle,
    table2_allocation_a,
    table2_allocation_b,
    table2_allocation_c,
    table2_no_ema,
    table2_schedule_a,
    table2_schedule_b,
    table2_sft_dpo,
    table2_sft_only,
)
from emv3_jax import Request, checkpoint, command_line, media
from emv3_jax.data.dataset import Dataset
from emv3_jax.files import atomic_path
from emv3_jax.options import SamplingOptions
from emv3_jax.pipeline import Pipeline
from emv3_jax.puppets import clips, evaluation, metrics, prompts, world
from emv3_jax.request import scaled
from emv3_jax.training import cycle, negatives, recipes, starts
from emv3_jax.training import state as train_state
from emv3_jax.training.dit_recipe import SFT, DiTRecipe

CLIPS, FRAMES, FIRST_CLIP = 24, 65, 5000  # held-out puppets that nothing else uses
LAST = 10  # steps over which what a preference has done is averaged
MEASURES = {"sync": "up", "motion": "up", "identity": "down", "distance": "down", "seam": "down"}
SEEDS, SCALE = 3, 1.0  # of the table; what other runs keep has their numbers in its name
WINDOWS = {"steps": 8, "shift": 3.0, "text_scale": 2.0, "audio_scale": 2.0, "window": 33, "overlap": 3}


@dataclasses.dataclass(frozen=True)
class Row:
    """A row: the config it is trained by, how its sampling differs, and the paper's Sync-C, FVD, ID and HAT, where it
    has the row."""

    title: str
    paper: tuple[float, ...]
    config: Any = puppet_full_cycle
    sampling: dict[str, Any] = dataclasses.field(default_factory=dict)
    png: bool = True


ROWS: dict[str, Row] = {
    "full": Row("everything", (5.49, 496.76, 1.00, 0.95)),
    "schedule_a": Row("schedule A: easy to hard", (5.40, 498.09, 0.97, 0.87), table2_schedule_a),
    "schedule_b": Row("schedule B: uniform", (4.98, 499.78, 0.96, 0.95), table2_schedule_b),
    "no_ema": Row("without EMA", (5.32, 508.82, 0.99, 0.90), table2_no_ema),
    "allocation_a": Row("allocation A: no audio early", (4.76, 496.90, 1.00, 0.93), table2_allocation_a),
    "allocation_b": Row("allocation B: no text early and middle", (5.51, 489.08, 0.97, 0.81), table2_allocation_b),
    "allocation_c": Row("allocation C: no image early", (5.51, 540.80, 0.91, 0.93), table2_allocation_c),
    "sft_only": Row("SFT only", (4.94, 540.30, 0.99, 0.87), table2_sft_only),
    "sft_dpo": Row("SFT and paired DPO", (5.21, 480.98, 0.93, 0.89), table2_sft_dpo),
    "no_png": Row("without PNG", (5.49, 496.07, 1.00, 0.89), png=False),
    "no_long_cfg": Row(
        "without Long Video CFG (chained)", (5.49, 530.21, 0.98, 0.92), sampling={"long_video": "chained"}
    ),
    "released_blend": Row("released blend for Long Video CFG", (), sampling={"long_video": "released"}),
}


class Held(Dataset):
    """A small dataset, all of it in memory."""

    @functools.cached_property
    def _all(self) -> list[Any]:
        return super().examples(range(len(self)))

    def examples(self, numbers: Sequence[int]) -> list[Any]:
        """Clips by number."""
        return [self._all[int(number)] for number in numbers]


class Bench:
    """Trains and scores rows; everything that is slow is kept under `out`, by seeds and scale (`run_name`)."""

    def __init__(self, out: pathlib.Path, data: str, seeds: int, scale: float):
        self.out, self.seeds, self.scale = out, seeds, scale
        self._rejected: dict[str, list[negatives.Negatives]] = {}
        cfg = puppet_base.get_config()
        cfg.data = data
        self.base, self.preset = cfg, recipes.preset_of(cfg)
        self.data = Held(data, self.preset)

    # Training.

    def recipe(self, cfg: Any, seed: int) -> DiTRecipe:
        """A stage's recipe for one seed, which is counted from the stage's own."""
        cfg = copied(cfg)
        cfg.seed += seed
        made = DiTRecipe(cfg, self.preset)
        made.__dict__["data"] = self.data
        return made

    def shortened(self, cfg: Any) -> Any:
        """A stage with all numbers of steps scaled, for a quick look; the given one stays as it is."""
        if self.scale == 1:
            return cfg
        times = lambda n: max(8, round(n * self.scale))  # noqa: E731
        cfg = copied(cfg)
        with cfg.unlocked():
            cfg.steps, cfg.warmup_steps = times(cfg.steps), 2
            for key in ("stages", "tasks", "learning_rates"):
                cfg[key] = tuple((times(until), what) for until, what in cfg[key])
        return cfg

    def stage(self, name: str, cfg: Any, start: Any, rejected: Any = None) -> Any:
        """The moving averages of a stage, stacked over seeds; trained unless they are kept from before."""
        cfg = self.shortened(cfg)
        some = [self.recipe(cfg, seed) for seed in range(self.seeds)]
        path = self._kept(name)
        if path.exists():
            return checkpoint.load_params(path)
        constants: dict[str, Any] = {}
        if cfg.objective != SFT:
            constants = {"reference": start}
            for recipe, negative in zip(some, rejected, strict=True):
                recipe.__dict__["_negatives"] = negative
        optimizer = train_state.make_optimizer(cfg)
        params = stack([recipe.init() for recipe in some]) if start is None else start
        seeds = np.array([recipe.cfg.seed for recipe in some], np.uint32)
        state = jax.vmap(lambda p, seed: train_state.init_state(p, optimizer, seed))(params, seeds)
        update = train_state.make_update(some[0].loss, optimizer, cfg.ema_decay, 1, some[0].restarts())
        step_fn = train_state.make_step(jax.vmap(update, in_axes=(0, 0, 0)))
        started, ahead = time.monotonic(), []
        for step in range(1, cfg.steps + 1):
            batch = stack([recipe.batch(step) for recipe in some])
            state, metrics_ = step_fn(state, constants, batch)
            if step % 50 == 0 or step == cfg.steps:
                rate = step / (time.monotonic() - started)
                loss = np.asarray(metrics_["loss"])
                print(f"  {name} {step}/{cfg.steps} {rate:.2f} steps/s loss {np.round(loss, 4)}", flush=True)
            if constants and step > cfg.steps - LAST:
                ahead.append(metrics_["error_over_reference"].total / metrics_["error_over_reference"].count)
        if constants:
            with atomic_path(path.with_suffix(".json")) as temporary:
                temporary.write_text(json.dumps(np.mean(ahead, 0).tolist()))
        average = jax.device_get(state.ema)
        checkpoint.save_params(path, average)
        return average

    def train(self, cfg: Any, stages: int | None = None) -> tuple[Any, str]:
        """The weights of a cycle after so many stages (None: all), stacked over seeds, and the name they are kept by.
        Stages that cycles have in common are trained once."""
        name = run_name(f"base_{digest(self.base)}", self.seeds, self.scale)
        params = self.stage(name, self.base, None)
        params = {**params, "dit": jax.vmap(starts.silent)(params["dit"])}
        cfg = copied(cfg)
        cfg.data = self.base.data
        done: list[Any] = [self.base.to_dict()]
        for _, stage in cycle.stage_configs(cfg, pathlib.Path("x"))[:stages]:
            before = name
            others = ("cycle", "review") if stage.objective == SFT else ("cycle",)
            done.append({key: value for key, value in stage.to_dict().items() if key not in others})
            name = digest([done, self.seeds, self.scale])
            rejected = None
            if stage.objective != SFT and not self._kept(name).exists():
                rejected = self.rejected(params, before, stage)
            params = self.stage(name, stage, params, rejected)
        return params, name

    def _kept(self, name: str) -> pathlib.Path:
        return self.out / "stages" / f"{name}.safetensors"

    def ahead(self, name: str) -> list[float]:
        """By how much the errors of negatives were above the reference's in the last steps of a stage, of each seed."""
        return json.loads(self._kept(name).with_suffix(".json").read_text())

    def rejected(self, params: Any, name: str, stage: Any) -> list[negatives.Negatives]:
        """Of each seed: clips that its weights make anew, the worst of them for the stage's issue. name: of the
        weights."""
        key = f"{name} {stage.issue} {stage.seed}"
        if key not in self._rejected:
            self._rejected[key] = [self._rejected_of(params, seed, stage) for seed in range(self.seeds)]
        return self._rejected[key]

    def _rejected_of(self, params: Any, seed: int, stage: Any) -> negatives.Negatives:
        recipe, review = self.recipe(stage, seed), stage.review
        pipe = recipe.make_pipeline(one(params, seed))
        numbers = np.random.default_rng(recipe.cfg.seed).permutation(len(self.data))[: review.clips]
        seeds = [recipe.cfg.seed + int(number) for number in numbers]
        some, made, scores = self.data.examples(numbers), [], []
        for first in range(0, len(numbers), review.batch):
            part = some[first : first + review.batch]
            options, its_seeds = SamplingOptions(**stage.sampling), seeds[first : first + review.batch]
            latents = negatives.generate(pipe, options, part, review.task, its_seeds)
            made += list(latents)
            for example, video in zip(part, evaluation.decode(pipe, latents.astype(np.float32)), strict=True):
                scores.append(metrics.score_clip(video, negatives.puppet_of(example["id"].decode(), len(video))))
        bad = negatives.worst(scores, stage.issue, review.share)
        rows = [{**some[k], "latents": made[k], negatives.TRUE: some[k]["latents"]} for k in bad]
        return negatives.Negatives(rows, [review.task] * len(bad), [str(numbers[k]) for k in bad])

    # Measuring.

    def measure(self, key: str) -> list[dict[str, float]]:
        """A row's measures, one a seed; kept from before if they are."""
        path = self.out / f"{run_name(key, self.seeds, self.scale)}.json"
        row, settings = ROWS[key], settings_of(key, self.base.data)
        cfg = row.config.get_config()
        return self.scores(path, settings, lambda: self.train(cfg)[0], cfg, row.sampling, row.png)

    def scores(
        self, path: pathlib.Path, settings: str, weights: Callable[[], Any], cfg: Any, sampling: dict[str, Any],
        png: bool,
    ) -> list[dict[str, float]]:  # fmt: skip
        """The measures of stacked weights, one a seed, which are kept at `path`; taken from there if they are of the
        same settings. cfg: what the weights are trained by."""
        if (kept := kept_scores(path, settings)) is not None:
            return kept
        started, params = time.monotonic(), weights()
        pipes = (self.recipe(cfg, seed).make_pipeline(one(params, seed)) for seed in range(self.seeds))
        found = [self.score(pipe, {**WINDOWS, **sampling}, png) for pipe in pipes]
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps({"settings": settings, "seeds": found}, indent=1) + "\n")
        print(f"{path.stem}: {time.monotonic() - started:.0f} s", flush=True)
        return found

    def score(self, pipe: Pipeline, sampling: dict[str, Any], png: bool) -> dict[str, float]:
        """The measures of one set of weights."""
        rows, videos, truth = [], [], []
        for k in range(CLIPS):
            clip = clips.make_clip("heldout", FIRST_CLIP + k, FRAMES)
            options = SamplingOptions(**sampling, **(negative_prompts(clip) if png else {}))
            at = seams(options.long_video, FRAMES, options)
            true = np.asarray(clip.render(self.preset.height))
            request = Request(media.to_uint8(true[0]), clip.wave, clip.prompt, frames=FRAMES, seed=k)
            video = scaled(pipe.generate(request, options).frames)
            scores = metrics.score_clip(video, clip)
            rows.append({**scores, "seam": metrics.seam_error(video, clip, at, every=self.preset.vae.temporal_factor)})
            videos.append(video)
            truth.append(true)
        means = evaluation.means(rows)
        return {**means, "distance": metrics.frechet_distance(videos, truth)}


def settings_of(key: str, data: str) -> str:
    """A digest of all that a row's scores depend on, but for the program itself, the seeds and the scale."""
    row = ROWS[key]
    configs = [cfg.get_config().to_dict() for cfg in (puppet_base, row.config)]
    return digest([configs, data, scored_on(row.sampling, row.png)])


def scored_on(sampling: dict[str, Any], png: bool) -> str:
    """A digest of how weights are scored."""
    return digest([{**WINDOWS, **sampling}, png, CLIPS, FRAMES, FIRST_CLIP])


def kept_scores(path: pathlib.Path, settings: str) -> list[dict[str, float]] | None:
    """Measures from before, one a seed. None: there are none, or they are of other settings, which is said."""
    if not path.exists():
        return None
    kept = json.loads(path.read_text())
    if isinstance(kept, dict) and kept["settings"] == settings:
        return kept["seeds"]
    print(f"note: {path} is of other settings than there are now, and is not used", flush=True)
    return None


def negative_prompts(clip: clips.Clip) -> dict[str, str]:
    """PNG of a puppet: another motion than it is asked for early, another expression late."""

    def other(name: str, names: Sequence[str]) -> str:
        return names[(names.index(name) + 1) % len(names)]

    rng = world.generator("heldout", "negative", 0)
    motion = prompts.make_prompt(other(clip.motion, world.MOTIONS), clip.expression, clip.camera, rng)
    detail = prompts.make_prompt(clip.motion, other(clip.expression, world.EXPRESSIONS), clip.camera, rng)
    return {"negative_motion": motion, "negative_detail": detail}


def stack(trees: Sequence[Any]) -> Any:
    """Trees of seeds -> one tree with an axis of seeds in front."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def one(params: Any, seed: int) -> Any:
    """A seed's weights."""
    return jax.tree.map(lambda leaf: leaf[seed], params)


def copied(cfg: Any) -> ml_collections.ConfigDict:
    """A config of one's own."""
    return ml_collections.ConfigDict(cfg.to_dict())


def run_name(name: str, seeds: int, scale: float) -> str:
    """The name of what a run keeps, which says its seeds and scale unless they are those of the table."""
    return name if (seeds, scale) == (SEEDS, SCALE) else f"{name}_{seeds}seeds_x{scale:g}"


def spread(values: Sequence[float]) -> str:
    """Mean and deviation over seeds."""
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1) if len(values) > 1 else 0:.3f}"


def digest(value: Any) -> str:
    """Of a config or a list of them."""
    value = value.to_dict() if isinstance(value, ml_collections.ConfigDict) else value
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


def table(out: pathlib.Path, data: str, seeds: int = SEEDS, scale: float = SCALE) -> str:
    """The rows that have been measured on some data with so many seeds, at a scale."""
    lines = [
        "| row | "
        + " | ".join(f"{name} ({way})" for name, way in MEASURES.items())
        + " | paper: Sync-C, FVD, ID, HAT |",
        "| --- " * (len(MEASURES) + 2) + "|",
    ]
    for key, row in ROWS.items():
        found = kept_scores(out / f"{run_name(key, seeds, scale)}.json", settings_of(key, data))
        if found is None:
            continue
        cells = [spread([seed[name] for seed in found]) for name in MEASURES]
        lines.append(f"| {row.title} | {' | '.join(cells)} | {', '.join(map(str, row.paper))} |")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """The command line."""
    parser = command_line.Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--data", default="data/puppets33")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--scale", type=float, default=SCALE, help="of all numbers of steps, for a quick look")
    args = parser.parse_args(arguments)
    command_line.setup_compile_cache()
    if args.rows:
        bench = Bench(args.out, args.data, args.seeds, args.scale)
        for key in args.rows:
            bench.measure(key)
    print(table(args.out, args.data, args.seeds, args.scale))
    return 0


if __name__ == "__main__":
    sys.exit(command_line.run_main(main))
