"""Trains the DiT: flow matching over the soup of tasks, or preferences against a reference (Negative DPO, paired DPO).

What differs between recipes stands in their configs: where weights come from, what is trained (all of it, or adapters),
on which tasks when, with which modality weights, and by which objective.
"""

import collections
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emv3_jax import checkpoint, conditioning, pipeline, sharding, weight_files
from emv3_jax.config import Preset
from emv3_jax.data import examples
from emv3_jax.data.dataset import Dataset, Plan
from emv3_jax.data.extract import encoder_hash
from emv3_jax.diffusion import flow
from emv3_jax.diffusion.phda import EVEN, PhDAConfig
from emv3_jax.errors import UserError, short_of_memory
from emv3_jax.models import dit
from emv3_jax.models.dit import Conditions, DiT
from emv3_jax.options import SamplingOptions
from emv3_jax.puppets import clips, evaluation
from emv3_jax.training import adapters, distributed, losses, negatives, pictures, schedule, starts
from emv3_jax.training.losses import Mean

SFT, PAIRED = "sft", "dpo"
BANDS = {"early": (2 / 3, 1.01), "middle": (1 / 3, 2 / 3), "late": (-0.01, 1 / 3)}  # phases of t / 1000


@functools.partial(jax.jit, static_argnums=(0, 1))
def _fresh(preset: Preset, roles: tuple[str, ...], key: jax.Array) -> dict[str, Any]:
    """Untrained parameters of some models."""
    params = pipeline.init_params(preset, key)
    return {role: params[role] for role in roles}


def trained_models(preset: Preset) -> tuple[str, ...]:
    """The models that a preset's transformer is trained with: its encoders too, where they are small."""
    return ("dit", "text", "image") if examples.encoders_trained(preset) else ("dit",)


class DiTRecipe:
    """See training.loop.Recipe. Other models than those of `trained_models` come from `cfg.frozen_weights`."""

    def __init__(self, cfg: Any, preset: Preset):
        self.cfg, self.preset = cfg, preset
        self.dit, self.trained = DiT(preset.dit), trained_models(preset)
        self.phda = PhDAConfig.from_config(cfg.phda) if cfg.phda else EVEN

    @property
    def frozen(self) -> Mapping[str, Any]:
        """The models that are not trained, read when they are used and not kept."""
        return self._frozen_on(None)

    def _frozen_on(self, mesh: jax.sharding.Mesh | None) -> Mapping[str, Any]:
        roles = [role for role in pipeline.expected_params(self.preset) if role not in self.trained]
        return pipeline.load_models(self.preset, self.cfg.frozen_weights, roles, mesh)

    @functools.cached_property
    def words(self) -> Any:
        """The tokenizer."""
        return weight_files.load_tokenizer(self.preset, self.cfg.frozen_weights)

    # Parameters.

    def start(self) -> dict[str, Any]:
        """The trained models' weights at step 0, before adapters."""
        cfg = self.cfg
        if cfg.init_from and not cfg.silent_audio:
            return dict(pipeline.load_models(self.preset, cfg.init_from, self.trained))

        made = _fresh(self.preset, self.trained, jax.random.key(cfg.seed))
        if not cfg.silent_audio:
            return made
        if examples.encoders_trained(self.preset):  # whose base is of our own training
            base = dict(pipeline.load_models(self.preset, cfg.init_from, self.trained))
            return {**base, "dit": starts.silent(base["dit"])}
        return {"dit": starts.on_base(made["dit"], pathlib.Path(cfg.init_from))}

    def init(self) -> Any:
        """What is trained: the models, or adapters of the transformer."""
        if not self.cfg.adapters:
            return self.start()
        shapes = pipeline.expected_params(self.preset)["dit"]
        key = jax.random.fold_in(jax.random.key(self.cfg.seed), 1)
        return adapters.init(key, shapes, self.cfg.adapters.rank, self.cfg.adapters.on)

    def constants(self) -> dict[str, Any]:
        """What the loss needs and does not change: the weights under adapters, the reference of a preference."""
        if self.cfg.objective == SFT:
            return self.base()
        return {**self.base(), "reference": dict(pipeline.load_models(self.preset, self.cfg.init_from, self.trained))}

    def base(self) -> dict[str, Any]:
        """Those of `constants` without which what was trained is no whole model."""
        return {"base": self.start()} if self.cfg.adapters else {}

    def weights(self, params: Any, constants: Any) -> dict[str, Any]:
        """The models as they are with what has been trained."""
        if not self.cfg.adapters:
            return params
        scale = self.cfg.adapters.scale / self.cfg.adapters.rank
        return {**constants["base"], "dit": adapters.merged(constants["base"]["dit"], params, scale)}

    # Batches.

    def open(self) -> None:
        """Opens the dataset or the negatives, plans the batches, and says what of it may not be expected."""
        notes = starts.notes(self.preset, self.cfg.init_from, self.phda)
        if self.cfg.objective == SFT:
            notes += self._plan.notes() + self._cut_short()
        else:
            longest = max(self._kind(step)[0] for step in range(1, self.cfg.steps + 1))
            notes += self._negatives.notes(longest, self.preset)
            notes += negatives.check_makers(self.cfg.negatives, self.preset, self.cfg.init_from, self.trained)
        if jax.process_index() == 0:
            for note in notes:
                print(f"note: {note}", flush=True)

    def _cut_short(self) -> list[str]:
        """A line if FLF2V is trained on batches of fewer frames than their clips have: the last one is not given."""
        longest = max(bucket.frames for bucket in self.data.buckets)
        steps = [step for step in range(1, self.cfg.steps + 1) if "flf2v" in dict(schedule.soup(self.cfg.tasks, step))]
        cut = {frames for step in steps if (frames := self._kind(step)[0]) < longest}
        if not cut:
            return []
        return [
            f"clips have up to {longest} frames, of which batches of {' and '.join(map(str, sorted(cut)))} take the"
            " first: the last one is not given there, so FLF2V is I2V (config keys stages and tasks)"
        ]

    def restarts(self) -> tuple[int, ...]:
        """The steps after which other tasks join, if the weights go on from the moving average there."""
        return schedule.joins(self.cfg.tasks, self.cfg.steps) if self.cfg.inter_task_ema else ()

    @functools.cached_property
    def data(self) -> Dataset:
        data = Dataset(self.cfg.data, self.preset)
        if data.record["vae"] != encoder_hash(self.frozen["vae"]):
            raise UserError(
                f"the dataset {self.cfg.data} was made with another VAE than that of {self.cfg.frozen_weights}: make it"
                " again, or give that VAE"
            )
        data.check_weights(self.cfg.frozen_weights, [role for role in data.record.get("weights", {}) if role != "vae"])
        return data

    @functools.cached_property
    def _plan(self) -> Plan:
        return Plan(self.data.buckets, self.cfg.stages, self.cfg.steps, self.cfg.seed)

    @functools.cached_property
    def _negatives(self) -> negatives.Negatives:
        return negatives.Negatives.read(self.cfg.negatives, self.cfg.issue)

    def _kind(self, step: int) -> tuple[int, int]:
        """Frames and clips of a step's batch."""
        return schedule.kind_of_batch(self.cfg.stages, step)

    def batch_size(self, step: int) -> int:
        """Samples of a step's batch."""
        return self._kind(step)[1] * (2 if self.cfg.objective == PAIRED else 1)

    def ids(self, step: int) -> list[str]:
        """What the clips of a step's batch are called."""
        if self.cfg.objective != SFT:
            return self._negatives.ids(self.cfg.seed, step, self._kind(step)[1])
        return [self.data.id(number) for number in self._plan.batch(step)[1]]

    def batch(self, step: int, rows: np.ndarray | None = None) -> dict[str, Any]:
        """A step's batch (`examples.batch`), or some rows of it."""
        cfg, (frames, size) = self.cfg, self._kind(step)
        chosen = np.arange(self.batch_size(step)) if rows is None else rows
        if cfg.objective == SFT:
            names = schedule.tasks_of_batch(cfg.tasks, step, size, cfg.seed)
            some = self.data.examples(self._plan.batch(step)[1][chosen])  # no more is read than is used
        else:
            every, names = self._negatives.examples(cfg.seed, step, size, paired=cfg.objective == PAIRED)
            some = [every[row] for row in chosen]
        return examples.batch(some, [names[row] for row in chosen], frames, self.preset)

    # The loss.

    def conditions(self, weights: Any, batch: dict[str, Any], key: jax.Array | None = None) -> Conditions:
        """What the transformer is conditioned on. With a key some samples lose their voice, some their prompt too: just
        the branches that guidance compares."""
        audio, cfg, size = batch["audio"], self.cfg, batch["task"].shape[0]
        no_text = jnp.zeros((size, 1), bool)
        if key is not None:
            drawn = jax.random.uniform(key, (size, 1))
            no_text = drawn < cfg.drop_both
            no_audio = (drawn < cfg.drop_both + cfg.drop_audio)[:, 0]
            audio = jnp.where(no_audio.reshape(-1, *(1,) * (audio.ndim - 1)), 0.0, audio)
        if examples.encoders_trained(self.preset):
            ids, mask = conditioning.tokenizer(self.preset).encode([""])
            text = conditioning.encode_text(
                weights, self.preset,
                jnp.where(no_text, ids, batch["ids"]), jnp.where(no_text, mask, batch["text_mask"]),
            )  # fmt: skip
            image = conditioning.encode_image(weights, self.preset, batch["image"], batch["has_image"])
        else:
            text = batch["text"]
            if key is not None:
                text = jnp.where(no_text[..., None], self._null_text, text)
            image = batch["image"] * batch["has_image"][:, None, None]
        return Conditions(batch["given"], text, image, audio, batch["face_mask"], jnp.ones(size))

    @functools.cached_property
    def _null_text(self) -> np.ndarray:
        """States of the empty prompt [1, text_len, text_width]."""
        path = pathlib.Path(self.cfg.data) / examples.NULL_TEXT
        states = np.zeros((1, self.preset.dit.text_len, self.preset.dit.text_width), np.float32)
        try:
            found = np.load(path)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is missing or damaged ({error}): prepare the dataset again") from error
        states[0, : len(found)] = found
        return states

    def loss(self, params: Any, constants: Any, batch: dict[str, Any], key: jax.Array) -> tuple[jax.Array, dict]:
        """See LossFn. Errors of a preference and of its reference are of the same noise at the same times."""
        cfg = self.cfg
        keys = dict(zip(("drop", "time", "noise", "phda"), jax.random.split(key, 4), strict=True))
        if cfg.objective == SFT:
            errors, plain, t = self._errors(self.weights(params, constants), batch, keys, drop=True)
            return jnp.mean(errors), self._metrics(plain, t, batch["task"])
        errors, plain, t = self._errors(self.weights(params, constants), batch, keys, drop=False)
        reference = jax.lax.stop_gradient(self._errors(constants["reference"], batch, keys, drop=False)[0])
        preference = losses.PREFERENCES[cfg.objective](errors, reference, cfg.beta)
        count = jnp.asarray(errors.shape[0], jnp.float32)
        seen = {
            "preference": Mean(count * preference, count),
            "error_over_reference": Mean(jnp.sum(errors - reference), count),
        }
        # By beta, so that gradients have the errors' own size and fade with the preference. As large as beta they would
        # all be clipped to one length (clip_norm) until next to nothing was left of it.
        return preference / cfg.beta, {**seen, **self._metrics(plain, t, batch["task"])}

    def _errors(
        self, weights: Any, batch: dict[str, Any], keys: dict[str, jax.Array], drop: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Errors of the velocity of each sample, weighted and plain, and the times they are of."""
        x0 = batch["latents"]
        count = x0.shape[0] // 2 if self.cfg.objective == PAIRED else x0.shape[0]
        t = flow.sample_timesteps(keys["time"], count, self.cfg.shift, self.cfg.timesteps)
        noise = jax.random.normal(keys["noise"], (count, *x0.shape[1:]))
        modal = self.phda.sample(keys["phda"], t)
        t, noise, modal = jax.tree.map(lambda x: jnp.tile(x, (x0.shape[0] // count, *(1,) * (x.ndim - 1))),
                                       (t, noise, modal))  # fmt: skip
        cond = self.conditions(weights, batch, keys["drop"] if drop else None)
        velocity = jnp.asarray(self.dit.apply({"params": weights["dit"]}, flow.add_noise(x0, noise, t), t, cond, modal))
        plain = losses.velocity_errors(velocity, x0, noise)
        return losses.velocity_errors(velocity, x0, noise, self.cfg.motion_gain), plain, t

    def _metrics(self, errors: jax.Array, t: jax.Array, task: jax.Array) -> dict[str, Mean]:
        sigma = t / flow.T_MAX
        bands = {f"mse_{name}": (low <= sigma) & (sigma < high) for name, (low, high) in BANDS.items()}
        names = {f"mse_{name}": task == i for i, name in enumerate(examples.TRAINED_TASKS)}
        everything = {"mse": jnp.ones_like(errors, bool)}
        return {name: losses.mean_where(errors, where) for name, where in {**everything, **bands, **names}.items()}

    # What is seen and written.

    def make_pipeline(self, weights: Any) -> pipeline.Pipeline:
        """The pipeline with the trained models, on the mesh over which they are divided."""
        mesh = distributed.mesh_of(weights)
        models = collections.ChainMap(weights, self._frozen_on(mesh))
        return pipeline.Pipeline(self.preset, models, self.phda, self.words, mesh)

    def make_sampler(self, folder: str) -> pipeline.Pipeline:
        """The pipeline with a folder's weights, for many clips: the trained models and the VAE stay in memory, the
        others are read when they are used. On the mesh that the config says, if there are several devices; of several
        processes each has its own.

        Raises:
          UserError: the devices cannot be divided so, or have too little memory.
        """
        if jax.process_count() > 1 or jax.device_count() == 1:
            mesh = distributed.local_mesh()
        else:
            mesh = sharding.from_config(self.cfg.mesh)
        with short_of_memory("the models that make clips", "divide them over more devices (config key mesh)"):
            models = pipeline.load_models(self.preset, folder, self.trained, mesh)
            return self.make_pipeline({**models, "vae": self._frozen_on(mesh)["vae"]})

    def evaluate(self, params: Any, constants: Any) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Held-out puppets, generated and scored; of presets that know none, a clip of the dataset, generated."""
        cfg, weights = self.cfg, self.weights(params, constants)
        pipe, options = self.make_pipeline(weights), SamplingOptions(**cfg.sampling)
        if not examples.encoders_trained(self.preset):
            return {}, {"made": self._generate(pipe, options)}
        held_out = [clips.make_clip("heldout", i, cfg.eval_frames) for i in range(cfg.eval_clips)]
        make = functools.partial(evaluation.generate_batch, pipe, options)
        rows, videos = evaluation.in_batches(lambda some, first: make(some, seed=first), held_out, keep=4)
        true = [np.asarray(clip.render(self.preset.height)) for clip in held_out[:4]]
        strip = pictures.film_strip([video for pair in zip(true, videos, strict=False) for video in pair])
        seen = {"true_and_made": strip, "made": pictures.side_by_side(videos)}
        return {f"heldout_{name}": value for name, value in evaluation.means(rows).items()}, seen

    def _generate(self, pipe: pipeline.Pipeline, options: SamplingOptions) -> np.ndarray:
        """A clip of the dataset or of the negatives, the first, made again from its first frame, sound and caption:
        [F, H, W, 3] uint8."""
        preferred = self.cfg.objective != SFT  # who unlearns needs the review folder alone
        example = self._negatives.rows[0] if preferred else self.data.examples([0])[0]
        request = pipeline.Request(
            image=example["image"], audio=example["wave"].astype(np.float32) / 32767,
            prompt=examples.text_of(example["caption"]),
            frames=self.preset.vae.video_frames(len(example["latents"])),
        )  # fmt: skip
        return np.asarray(pipe.generate(request, options).frames)

    def export(self, params: Any, constants: Any, folder: pathlib.Path) -> None:
        """The trained models' weights, adapters merged and beside them; of a preset that is shipped whole, all."""
        weights = self.weights(params, constants)
        if self.cfg.adapters:
            scale = np.float32(self.cfg.adapters.scale / self.cfg.adapters.rank)
            tree = {"scale": scale, "adapters": params}
            checkpoint.save_params(folder / "adapters" / "dit.safetensors", tree)
        if examples.encoders_trained(self.preset):
            weights = {**weights, **dict(self.frozen)}
        checkpoint.save_models(folder, weights, self.cfg.export_dtype)
        elsewhere = [role for role in pipeline.expected_params(self.preset) if role not in weights]
        weight_files.record_training(folder, self.preset, self.phda, self.cfg.frozen_weights, elsewhere)

    def work(self, batch: dict[str, Any]) -> tuple[int, float]:
        """Tokens of a batch, and FLOPs of a step on it: forward, backward and what remat computes again; a preference
        looks at its reference too."""
        samples, *grid, _ = batch["latents"].shape
        cfg, tokens = self.preset.dit, int(np.prod(grid)) // int(np.prod(self.preset.dit.patch))
        passes = 3 + (self.cfg.objective != SFT)
        one = passes * dit.forward_flops(cfg, tokens) + dit.recomputed_flops(cfg, tokens)
        return samples * tokens, samples * one
