"""Compares the models with golden values of the released program: `python -m convert.parity DIR [--seed N] [--full]`.

DIR holds `weights.py` (tensor_for: the weight of a checkpoint key), `manifests/<model>.json` (key -> torch shape) and
`<case>.npz` (inputs and outputs). Weights are rebuilt from the manifest, written to a temporary .safetensors file and
loaded through the project's own converter. One row a case: `name  max|a-b|/max|b|  PASS|FAIL`; exit 1 on any FAIL.
Golden arrays are channels first; the models are channels last.
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from convert import clip, dit, golden_loops, umt5, vae, wav2vec2
from convert.engine import Checkpoint, Spec, Table, plan_to_jax
from convert.golden_loops import channels_last, padded_text
from convert.sources import SafetensorsFile
from convert.writers import SafetensorsWriter
from emv3_jax.config import (
    DIT_FLASH,
    DIT_PREVIEW,
    AudioWindowConfig,
    CLIPConfig,
    DiTConfig,
    UMT5Config,
    VAEConfig,
    Wav2Vec2Config,
)
from emv3_jax.diffusion import solvers
from emv3_jax.errors import UserError
from emv3_jax.layers import rotary_frequencies
from emv3_jax.models.audio_tokens import audio_ranges
from emv3_jax.models.clip import CLIPVision, preprocess, resize_bicubic
from emv3_jax.models.dit import Conditions, DiT
from emv3_jax.models.umt5 import UMT5Encoder
from emv3_jax.models.vae import WanVAE
from emv3_jax.models.wav2vec2 import Wav2Vec2
from emv3_jax.tasks import mask_channels

Pair = tuple[jax.Array | np.ndarray, np.ndarray]  # what this program computes, what the released one does

DIT_TINY = DiTConfig(
    width=48, heads=4, layers=2, ffn=96, time_features=32, text_width=24, text_len=12, audio_width=10, image_width=20
)  # fmt: skip
DIT_FLASH_TINY = dataclasses.replace(
    DIT_TINY, audio_width=8, audio_windows=AudioWindowConfig(layers=3, hidden=16, tokens=5)
)
UMT5_TINY = UMT5Config(vocab=97, width=32, attention_width=32, heads=4, layers=3, ffn=48)
CLIP_TINY = CLIPConfig(image_size=28, patch=14, width=32, heads=4, layers=3)


@dataclasses.dataclass(frozen=True)
class Golden:
    """A folder of golden values, and the weights that belong to it."""

    root: Path
    seed: int = 0

    def arrays(self, name: str) -> Mapping[str, np.ndarray]:
        """The arrays of `<name>.npz`."""
        with np.load(self.root / f"{name}.npz") as file:
            return dict(file)

    def params(self, manifest: str, table: Table, target_tree: dict) -> dict:
        """Stand-in weights of a manifest, through a real file and the real converter, one tensor at a time."""
        manifest = manifest.removeprefix("full/")
        shapes = json.loads((self.root / "manifests" / f"{manifest}.json").read_text())
        tensor_for = load_tensor_for(self.root / "weights.py")
        header = {key: Spec(tuple(shape), np.dtype(np.float32)) for key, shape in shapes.items()}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{manifest}.safetensors"
            with SafetensorsWriter(path, header, {}) as writer:
                for key, shape in shapes.items():
                    writer.write(tensor_for(key, shape, self.seed))
            source = SafetensorsFile(path)
            plan = plan_to_jax([Checkpoint(path.name, table, target_tree, source.header, source.read)])
            return traverse_util.unflatten_dict({leaf.path: jnp.asarray(leaf.array()) for leaf in plan.leaves}, sep="/")


@functools.cache
def load_tensor_for(path: Path) -> Callable[..., np.ndarray]:
    """The function of the golden folder's weights.py that makes a weight from its key and shape."""
    spec = importlib.util.spec_from_file_location("golden_weights", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise UserError(f"{path}: no such file; a golden folder holds weights.py beside its .npz files")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.tensor_for


@functools.lru_cache(maxsize=1)
def dit_params(golden: Golden, manifest: str, cfg: DiTConfig) -> dict:
    """Parameters of a transformer."""
    return golden.params(manifest, dit.table(cfg), dit.target_tree(cfg))


def dit_inputs(golden: Golden, name: str, cfg: DiTConfig) -> dict:
    """What a transformer, preview or flash, is called with: x, t, cond."""
    g = golden.arrays(name)
    prompts = sorted(key for key in g if key.startswith("text"))
    tokens = int(np.prod(g["x"].shape[3:])) // int(np.prod(cfg.patch))
    cond = Conditions(
        given=channels_last(g["y"]),
        text=np.stack([padded_text(g[key], cfg) for key in prompts]),
        image=g["clip"],
        audio=g["audio"],
        face_mask=g.get("face_mask", np.ones((len(g["x"]), tokens), np.float32)),
        audio_scale=np.full(len(g["x"]), g.get("audio_scale", 1.0), np.float32),
    )
    return {"x": channels_last(g["x"]), "t": g["t"], "cond": cond}


def dit_velocity(golden: Golden, name: str, cfg: DiTConfig) -> Pair:
    """One velocity of a transformer."""
    params = dit_params(golden, name, cfg)
    out = jax.jit(DiT(cfg).apply)({"params": params}, **dit_inputs(golden, name, cfg))
    return out, channels_last(golden.arrays(name)["out"])


def riflex(golden: Golden) -> Pair:
    """Cosine and sine of RIFLEx's temporal rotary table."""
    g = golden.arrays("riflex")
    positions, count = g["cos"].shape
    theta = DiTConfig().rope_theta
    angles = np.outer(np.arange(positions), rotary_frequencies(count, theta, int(g["k"]), int(g["L_test"])))
    return np.stack([np.cos(angles), np.sin(angles)]), np.stack([g["cos"], g["sin"]])


def dit_audio_ranges(golden: Golden) -> Pair:
    """Which audio tokens each latent frame hears."""
    g = golden.arrays("dit_preview_tiny")
    return audio_ranges(g["audio"].shape[1], g["x"].shape[2]), g["audio_ranges"]


@functools.cache
def _vae_outputs(golden: Golden) -> tuple[jax.Array, jax.Array, jax.Array]:
    g = golden.arrays("vae")
    cfg = VAEConfig()
    model, variables = WanVAE(cfg), {"params": golden.params("wan_vae", vae.TABLE, vae.target_tree(cfg))}
    mean, logvar = jax.jit(functools.partial(model.apply, method="encode"))(variables, channels_last(g["pixels"]))
    video = jax.jit(functools.partial(model.apply, method="decode"))(variables, channels_last(g["latents"]))
    return mean, logvar, video


def vae_output(golden: Golden, index: int, key: str) -> Pair:
    """Mean, log-variance or decoded video of the VAE."""
    return _vae_outputs(golden)[index], channels_last(golden.arrays("vae")[key])


def umt5_states(golden: Golden, name: str, cfg: UMT5Config, every: int = 1) -> Pair:
    """States of the text encoder, of which the golden keeps every `every`-th token and channel."""
    g = golden.arrays(name)
    params = golden.params(name, umt5.TABLE, umt5.target_tree(cfg))
    ids, mask = (jnp.asarray(g[key], jnp.int32) for key in ("ids", "mask"))
    states = jax.jit(UMT5Encoder(cfg).apply)({"params": params}, ids, mask)
    return states[:, ::every, ::every], g["out"]


def clip_states(golden: Golden, name: str, manifest: str, cfg: CLIPConfig) -> Pair:
    """States of the image encoder, from pixels as it wants them or, where the golden has one, from a picture."""
    g = golden.arrays(name)
    pixels = preprocess(channels_last(g["image"]), cfg.image_size) if "image" in g else channels_last(g["pixels"])
    params = golden.params(manifest, clip.table(cfg), clip.target_tree(cfg))
    return jax.jit(CLIPVision(cfg).apply)({"params": params}, pixels), g["out"]


def clip_resized(golden: Golden) -> Pair:
    """The picture resized for the image encoder, every 7th pixel of it."""
    g = golden.arrays("full/clip_full")
    return resize_bicubic(channels_last(g["image"]), CLIPConfig().image_size)[:, ::7, ::7], channels_last(g["resized"])


WAV2VEC2_TINY = Wav2Vec2Config(
    width=32, heads=4, layers=3, ffn=48, conv_width=16, positional_taps=16, positional_groups=4
)  # fmt: skip


@functools.lru_cache(maxsize=1)
def _wav2vec2_outputs(golden: Golden, name: str, cfg: Wav2Vec2Config) -> dict[str, jax.Array]:
    params = golden.params(name, wav2vec2.table(cfg), wav2vec2.target_tree(cfg))
    model, variables, wave = Wav2Vec2(cfg), {"params": params}, golden.arrays(name)["wave"]
    features = jax.jit(functools.partial(model.apply, method="conv_features"))(variables, wave)
    return {
        "conv_features": features[..., ::4],  # the golden keeps every 4th channel
        "last_hidden_state": jax.jit(model.apply)(variables, wave),
        "hidden_states_25": jax.jit(lambda v, w: model.apply(v, w, 25, method="frame_states"))(variables, wave),
    }


def wav2vec2_output(golden: Golden, name: str, cfg: Wav2Vec2Config, key: str) -> Pair:
    """Conv features, last states, or the states of every layer at 25 features a second, of the speech encoder."""
    return _wav2vec2_outputs(golden, name, cfg)[key], golden.arrays(name)[key]


def masks(golden: Golden) -> Pair:
    """Mask channels of the tasks."""
    g = golden.arrays("mask_latents")
    return mask_channels(channels_last(g["pixel_mask"])), channels_last(g["out"])


def scheduler(golden: Golden, name: str, steps: int, what: str) -> Pair:
    """Grid or trajectory of a sampler for v(x, t) = sin(1.7 x + t/300) + 0.3 x."""
    g = golden.arrays("schedulers")
    want, sampler = g[f"{name}{steps}_{what}"], solvers.SAMPLERS[name]
    grid = sampler.grid(steps, 5.0)
    if what != "x":
        return getattr(grid, what), want
    solver, states = sampler.solver(grid), [want[0]]
    state = solver.init(states[0])
    for i, t in enumerate(grid.timesteps):
        v = np.sin(1.7 * states[-1] + t / 300) + 0.3 * states[-1]
        x, state = solver.step(state, states[-1], v, i)
        states.append(np.asarray(x))
    return np.stack(states), want


LOOP_MODELS = {
    "loop_preview": ("dit_preview_tiny", DIT_TINY),
    "loop_long": ("dit_preview_tiny", DIT_TINY),
    "loop_flash": ("dit_flash_tiny", DIT_FLASH_TINY),
}


def loop(golden: Golden, name: str) -> Pair:
    """A whole sampling run of a tiny transformer."""
    file = golden_loops.LOOPS[name].file
    manifest, cfg = LOOP_MODELS[file]
    return golden_loops.replay(name, golden.arrays(file), cfg, dit_params(golden, manifest, cfg))


@dataclasses.dataclass(frozen=True)
class Case:
    """One row: its name, the .npz it needs, the largest max|a-b|/max|b| that passes, and what computes both sides."""

    name: str
    file: str
    tolerance: float
    compare: Callable[[Golden], Pair]


def wav2vec2_cases(name: str, cfg: Wav2Vec2Config) -> tuple[Case, ...]:
    """The rows of one size of the speech encoder."""
    return tuple(
        Case(f"{name}.{key}", name, 1e-5, functools.partial(wav2vec2_output, name=name, cfg=cfg, key=key))
        for key in ("conv_features", "last_hidden_state", "hidden_states_25")
    )


CASES = (
    Case("dit_preview_tiny", "dit_preview_tiny", 1e-5, lambda g: dit_velocity(g, "dit_preview_tiny", DIT_TINY)),
    Case("dit_flash_tiny", "dit_flash_tiny", 1e-5, lambda g: dit_velocity(g, "dit_flash_tiny", DIT_FLASH_TINY)),
    Case("dit_preview_tiny.audio_ranges", "dit_preview_tiny", 0.0, dit_audio_ranges),
    Case("riflex", "riflex", 1e-5, riflex),
    Case("vae.latent_mean", "vae", 1e-4, lambda g: vae_output(g, 0, "latent_mean")),
    Case("vae.latent_logvar", "vae", 1e-4, lambda g: vae_output(g, 1, "latent_logvar")),
    Case("vae.decoded", "vae", 1e-4, lambda g: vae_output(g, 2, "decoded")),
    Case("umt5_tiny", "umt5_tiny", 1e-5, lambda g: umt5_states(g, "umt5_tiny", UMT5_TINY)),
    Case("clip_tiny", "clip_tiny", 1e-5, lambda g: clip_states(g, "clip_tiny", "clip_tiny", CLIP_TINY)),
    *wav2vec2_cases("wav2vec2_tiny", WAV2VEC2_TINY),
    Case("mask_latents", "mask_latents", 1e-5, masks),
    *(
        Case(
            f"schedulers.{name}{n}_{what}",
            "schedulers",
            1e-5,
            functools.partial(scheduler, name=name, steps=n, what=what),
        )
        for name in solvers.SAMPLERS
        for n in (5, 8, 25)
        for what in ("timesteps", "sigmas", "x")
    ),  # fmt: skip
    *(
        Case(f"{one.file}.{name}", one.file, 1e-4, functools.partial(loop, name=name))
        for name, one in golden_loops.LOOPS.items()
    ),
)

# The real sizes, run with --full; one model at a time is in memory.
FULL_CASES = (
    Case("full/dit_preview_full", "full/dit_preview_full", 1e-4,
         lambda g: dit_velocity(g, "full/dit_preview_full", DIT_PREVIEW)),
    Case("full/dit_flash_full", "full/dit_flash_full", 1e-4,
         lambda g: dit_velocity(g, "full/dit_flash_full", DIT_FLASH)),
    Case("full/umt5_wide", "full/umt5_wide", 1e-5,
         lambda g: umt5_states(g, "full/umt5_wide", UMT5Config(vocab=512, layers=1), every=16)),
    Case("full/clip_full", "full/clip_full", 1e-4,
         lambda g: clip_states(g, "full/clip_full", "clip_visual", CLIPConfig())),
    Case("full/clip_full.resized", "full/clip_full", 1e-5, clip_resized),
    *wav2vec2_cases("full/wav2vec2_base", Wav2Vec2Config()),
)  # fmt: skip


def relative_error(got: jax.Array | np.ndarray, want: np.ndarray) -> float:
    """max|a-b| / max|b| in float64; raises ValueError where the shapes differ."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if got.shape != want.shape:
        raise ValueError(f"shape {got.shape}, golden {want.shape}")
    return float(np.abs(got - want).max() / np.abs(want).max())


def run(golden: Golden, cases: tuple[Case, ...]) -> bool:
    """Prints one row a case; True if none failed."""
    good = True
    for case in cases:
        if not (golden.root / f"{case.file}.npz").is_file():
            print(f"{case.name:32s}  skipped: {case.file}.npz is not in {golden.root}")
            continue
        try:
            with jax.default_matmul_precision("highest"):
                error = relative_error(*case.compare(golden))
        except (ValueError, KeyError, OSError) as problem:  # UserError is a ValueError
            error = float("nan")
            print(f"{case.name}: {problem}", file=sys.stderr)
        passed = error <= case.tolerance  # False for nan
        good &= passed
        print(f"{case.name:32s}  {error:.2e}  {'PASS' if passed else 'FAIL'}", flush=True)
    return good


def main(argv: list[str] | None = None) -> int:
    """Command line; returns 0, 1 where a case failed, 2 where the folder cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m convert.parity", description=__doc__.splitlines()[0])
    parser.add_argument("dir", type=Path, metavar="DIR", help="folder of golden values")
    parser.add_argument("--seed", type=int, default=0, help="seed of the stand-in weights (default 0)")
    parser.add_argument(
        "--full", action="store_true", help="also the released sizes (some minutes, up to 20 GB of memory)"
    )
    args = parser.parse_args(argv)
    if not args.dir.is_dir():
        print(f"{args.dir}: no such folder; give one that holds weights.py, manifests/ and .npz files", file=sys.stderr)
        return 2
    cases = CASES + (FULL_CASES if args.full else ())
    if args.full and not any((args.dir / f"{case.file}.npz").is_file() for case in FULL_CASES):
        print(f"{args.dir} holds none of the full-size golden files (full/*.npz); leave out --full", file=sys.stderr)
        return 2
    if not any((args.dir / f"{case.file}.npz").is_file() for case in cases):
        print(f"{args.dir} holds none of the golden files (dit_preview_tiny.npz, vae.npz, ...)", file=sys.stderr)
        return 2
    return 0 if run(Golden(args.dir, args.seed), cases) else 1


if __name__ == "__main__":
    sys.exit(main())
