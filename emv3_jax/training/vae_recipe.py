"""Trains the VAE on puppets: reconstruction where it moves first of all, and a small KL."""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emv3_jax import checkpoint
from emv3_jax.config import Preset
from emv3_jax.models import vae as vae_model
from emv3_jax.models.vae import WanVAE
from emv3_jax.puppets import clips, metrics
from emv3_jax.training import losses, pictures
from emv3_jax.training.schedule import kind_of_batch


class VAERecipe:
    """See training.loop.Recipe. `cfg` is the experiment's config."""

    def __init__(self, cfg: Any, preset: Preset):
        self.cfg = cfg
        self.frozen = frozenset(cfg.get("frozen", ()))
        self.vae = WanVAE(preset.vae)

    def open(self) -> None:
        """Crops are drawn: there is nothing to open."""

    def restarts(self) -> tuple[int, ...]:
        """Never."""
        return ()

    def init(self) -> Any:
        key, video = jax.random.key(self.cfg.seed), jnp.zeros((1, 5, self.cfg.picture, self.cfg.picture, 3))
        if self.cfg.init_from:
            like = jax.eval_shape(self.vae.init, key, video)["params"]
            return checkpoint.load_params(pathlib.Path(self.cfg.init_from) / "vae.safetensors", like)
        params = jax.jit(self.vae.init)(key, video)["params"]
        # Little noise at first: at a deviation of 1 it would drown the latents until the KL had taught otherwise.
        bias = params["to_moments"]["bias"]
        params["to_moments"]["bias"] = bias.at[bias.size // 2 :].set(-5.0)
        return params

    def constants(self) -> dict[str, Any]:
        """None."""
        return {}

    base = constants

    def loss(
        self, params: Any, constants: Any, batch: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        # What is frozen needs no gradient: the compiler leaves out the way back through it.
        params = {name: jax.lax.stop_gradient(p) if name in self.frozen else p for name, p in params.items()}
        mean, logvar = self.vae.apply({"params": params}, batch, method="encode")
        logvar = jnp.clip(logvar, -20.0, 10.0)
        latents = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
        decoded = self.vae.apply({"params": params}, latents, clamp=False, method="decode")
        errors = losses.reconstruction(batch, decoded, losses.motion_weight(batch, self.cfg.motion_gain))
        kl = losses.gaussian_kl(mean, logvar)
        loss = errors["l1"] + self.cfg.l2_weight * errors["l2"] + self.cfg.kl_weight * kl
        noise = jnp.sqrt(jnp.mean(jnp.exp(logvar)))
        return loss, {
            "psnr": 10 * jnp.log10(4.0 / errors["mse"]),
            "kl": kl,
            "latent_std": jnp.std(mean),
            "noise": noise,
        }

    def batch_size(self, step: int) -> int:
        """Crops of a step's batch."""
        return kind_of_batch(self.cfg.stages, step)[2]

    def ids(self, step: int) -> list[str]:
        """The crops are drawn and have no names."""
        return [f"{self.batch_size(step)} crops drawn with seed {self.cfg.seed}"]

    def work(self, batch: jax.Array) -> tuple[int, float]:
        """Not counted."""
        return 0, 0.0

    def batch(self, step: int, rows: np.ndarray | None = None) -> jax.Array:
        """The step's crops [B, F, side, side, 3] in [-1, 1], or some of them."""
        cfg = self.cfg
        frames, size, batch = kind_of_batch(cfg.stages, step)
        rng = np.random.default_rng([cfg.seed, step])
        crops = clips.sample_crops(rng, batch, frames, size, cfg.picture)
        return crops if rows is None else crops[rows]

    @functools.cached_property
    def _round_trip(self):
        return jax.jit(lambda params, video: self.vae.apply({"params": params}, video))

    def evaluate(self, params: Any, constants: Any) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Held-out puppets through the codec and back."""
        rows, scores = [], []
        for index in range(self.cfg.eval_clips):
            clip = clips.make_clip("heldout", index, 49)
            true = np.asarray(clip.render(self.cfg.picture))
            video = np.asarray(self._round_trip(params, true[None])[0])
            scores.append(metrics.score_clip(video, clip))
            rows += [true, video] if index < 4 else []
        mean = {f"heldout_{name}": float(np.mean([s[name] for s in scores])) for name in scores[0]}
        return mean, {"true_and_decoded": pictures.film_strip(rows)}

    def export(self, params: Any, constants: Any, folder: pathlib.Path) -> None:
        """Weights whose latents have mean 0 and deviation 1 per channel on training clips.

        A frozen encoder's latents stay as they are, so that a DiT trained on them still fits.
        """
        if "encoder" in self.frozen:
            checkpoint.save_models(folder, {"vae": params}, self.cfg.export_dtype)
            return
        encode = jax.jit(lambda video: self.vae.apply({"params": params}, video, method="encode")[0])
        videos = (clips.make_clip("train", i, 17).render(self.cfg.picture) for i in range(64))
        latents = np.concatenate(
            [np.asarray(encode(video[None])).reshape(-1, self.vae.cfg.latent_channels) for video in videos]
        )
        params = vae_model.fold_latent_stats(params, latents.mean(0), latents.std(0))
        checkpoint.save_models(folder, {"vae": params}, self.cfg.export_dtype)
