"""Trains the DiT, with its text and image encoders, on puppets: flow matching over the soup of tasks."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emv3_jax import checkpoint, conditioning
from emv3_jax.config import Preset
from emv3_jax.data import puppet_latents
from emv3_jax.diffusion import flow
from emv3_jax.diffusion.phda import PhDAConfig
from emv3_jax.models.dit import DiT
from emv3_jax.pipeline import Pipeline, SamplingOptions, expected_params, init_params
from emv3_jax.puppets import clips, evaluation
from emv3_jax.training import losses, pictures
from emv3_jax.training.stages import kind_of_batch

TRAINED = ("dit", "text", "image")


class DiTRecipe:
    """See training.loop.Recipe. Trains the models named TRAINED; the VAE comes from `cfg.vae_weights`."""

    def __init__(self, cfg: Any, preset: Preset):
        self.cfg, self.preset = cfg, preset
        self.dit, self.phda = DiT(preset.dit), PhDAConfig()
        self.vae_params = checkpoint.load_params(pathlib.Path(cfg.vae_weights), expected_params(preset)["vae"])

    @functools.cached_property
    def _clips(self) -> dict[str, np.ndarray]:
        """Training arrays, extracted on first use."""
        folder = pathlib.Path(self.cfg.latents)
        return puppet_latents.load(folder, self.preset, self.vae_params, "train", self.cfg.clips, self.cfg.clip_frames)

    def init(self) -> Any:
        if self.cfg.init_from:
            like = expected_params(self.preset)
            return checkpoint.load_models(self.cfg.init_from, {name: like[name] for name in TRAINED})

        @jax.jit
        def fresh(key: jax.Array) -> Any:
            params = init_params(self.preset, key)
            return {name: params[name] for name in TRAINED}

        return fresh(jax.random.key(self.cfg.seed))

    def batch(self, step: int) -> dict[str, Any]:
        cfg = self.cfg
        frames, size = kind_of_batch(cfg.stages, step)
        picked = np.random.default_rng([cfg.seed, step]).choice(cfg.clips, size=size, replace=False)
        arrays = {name: values[picked] for name, values in self._clips.items()}
        # The VAE is causal: the first latents of a clip are those of a shorter clip. (Cut, FLF2V loses its given last
        # frame and is I2V; in batches of whole clips it is itself.)
        latent_frames = self.preset.vae.latent_frames(frames)
        ends = {"latents": latent_frames, "given": latent_frames, "audio": 2 * frames}
        arrays = {k: v[:, : ends[k]] if k in ends else v for k, v in arrays.items()}
        arrays = {k: v.astype(np.float32) if v.dtype == np.float16 else v for k, v in arrays.items()}
        names = conditioning.Prepared.__dataclass_fields__
        prepared = conditioning.Prepared(**{name: arrays[name] for name in names})
        return {"latents": arrays["latents"], "given": arrays["given"], "prepared": prepared}

    def _dropped(self, prepared: conditioning.Prepared, key: jax.Array) -> conditioning.Prepared:
        """Some samples lose their voice, some their prompt too: just the branches that guidance compares."""
        drawn = jax.random.uniform(key, (prepared.ids.shape[0], 1))
        no_text = drawn < self.cfg.drop_both
        no_audio = (drawn < self.cfg.drop_both + self.cfg.drop_audio)[..., None]
        ids, mask = conditioning.tokenizer(self.preset).encode([""])
        return dataclasses.replace(
            prepared,
            ids=jnp.where(no_text, ids, prepared.ids),
            text_mask=jnp.where(no_text, mask, prepared.text_mask),
            audio=jnp.where(no_audio, 0.0, prepared.audio),
        )

    def loss(self, params: Any, batch: dict[str, Any], key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        drop_key, time_key, noise_key, phda_key = jax.random.split(key, 4)
        x0 = batch["latents"]
        cond = conditioning.encode(params, self.preset, self._dropped(batch["prepared"], drop_key), batch["given"])
        t = flow.sample_timesteps(time_key, x0.shape[0], self.cfg.shift, self.cfg.timesteps)
        noise = jax.random.normal(noise_key, x0.shape)
        weights = self.phda.sample(phda_key, t)
        velocity = jnp.asarray(
            self.dit.apply({"params": params["dit"]}, flow.add_noise(x0, noise, t), t, cond, weights)
        )
        loss = losses.flow_matching(velocity, x0, noise, self.cfg.motion_gain)
        squared = jnp.mean(jnp.square(velocity - flow.velocity_target(x0, noise)), axis=(1, 2, 3, 4))
        early = t > 0.5 * flow.T_MAX
        share = lambda mask: jnp.sum(squared * mask) / jnp.maximum(jnp.sum(mask), 1.0)  # noqa: E731
        return loss, {"mse": jnp.mean(squared), "mse_early": share(early), "mse_late": share(~early)}

    def evaluate(self, params: Any) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Held-out puppets, generated and scored."""
        pipeline = Pipeline(self.preset, {**params, "vae": self.vae_params})
        options = SamplingOptions(**self.cfg.sampling)
        held_out = [clips.make_clip("heldout", i, self.cfg.eval_frames) for i in range(self.cfg.eval_clips)]
        make = functools.partial(evaluation.generate_batch, pipeline, options)
        rows, videos = evaluation.in_batches(lambda some, first: make(some, seed=first), held_out, keep=4)
        true = [np.asarray(clip.render(self.preset.height)) for clip in held_out[:4]]
        strip = pictures.film_strip([video for pair in zip(true, videos, strict=False) for video in pair])
        return {f"heldout_{name}": value for name, value in evaluation.means(rows).items()}, {"true_and_made": strip}

    def export(self, params: Any, folder: pathlib.Path) -> None:
        """The whole pipeline's weights, the VAE's included, in the form that the package ships."""
        checkpoint.save_models(folder, {**params, "vae": self.vae_params}, self.cfg.export_dtype)
