"""The Wan 2.1 VAE: keys of `Wan2.1_VAE.pth` <-> `emv3_jax.models.vae.WanVAE`."""

import jax
import jax.numpy as jnp

from convert.rules import Rule, Table, conv_rules
from emv3_jax.config import VAEConfig
from emv3_jax.models.vae import WanVAE


def table(cfg: VAEConfig) -> Table:
    """Rules for a VAE of any size; torch numbers the layers of all levels in one row, the model counts by level."""
    return Table(
        name="vae",
        rules=(
            *_ends("encoder"),
            *_levels(cfg, "encoder", "downsamples", "down", cfg.res_blocks),
            *conv_rules("conv1", "to_moments", "pointwise3d"),
            *conv_rules("conv2", "from_latents", "pointwise3d"),
            *_ends("decoder"),
            *_levels(cfg, "decoder", "upsamples", "up", cfg.res_blocks + 1),
        ),
    )


def _ends(side: str) -> tuple[Rule, ...]:
    """First convolution, middle and head, which encoder and decoder have in common."""
    middle = rf"{side}\.middle"
    return (
        *conv_rules(rf"{side}\.conv1", f"{side}/conv_in", "conv3d"),
        *_residual(rf"{middle}\.0", f"{side}/mid/res_0"),
        Rule(rf"{middle}\.1\.norm\.gamma", f"{side}/mid/attention/norm/gamma", "vector2"),
        *conv_rules(rf"{middle}\.1\.to_qkv", f"{side}/mid/attention/qkv", "pointwise2d"),
        *conv_rules(rf"{middle}\.1\.proj", f"{side}/mid/attention/proj", "pointwise2d"),
        *_residual(rf"{middle}\.2", f"{side}/mid/res_1"),
        Rule(rf"{side}\.head\.0\.gamma", f"{side}/head/norm/gamma", "vector3"),
        *conv_rules(rf"{side}\.head\.2", f"{side}/head/conv", "conv3d"),
    )


def _levels(cfg: VAEConfig, side: str, row: str, step: str, blocks: int) -> tuple[Rule, ...]:
    """Residual blocks of every level, and the change of resolution after each level but the last."""
    rules: list[Rule] = []
    for level in range(len(cfg.multipliers)):
        path = f"{side}/{step}_{level}"
        first = level * (blocks + 1)
        for block in range(blocks):
            source, target = rf"{side}\.{row}\.{first + block}", f"{path}/res_{block}"
            rules += [
                *_residual(source, target),
                *conv_rules(rf"{source}\.shortcut", f"{target}/shortcut", "pointwise3d"),
            ]
        if level < len(cfg.temporal_down):
            source, target = rf"{side}\.{row}\.{first + blocks}", f"{path}/{step}sample"
            rules += conv_rules(rf"{source}\.resample\.1", f"{target}/conv", "conv2d")
            if step == "down":
                rules += [
                    Rule(rf"{source}\.time_conv\.weight", f"{target}/time_kernel", "temporal"),
                    Rule(rf"{source}\.time_conv\.bias", f"{target}/time_bias"),
                ]
            else:
                rules += conv_rules(rf"{source}\.time_conv", f"{target}/time_conv", "conv3d")
    return tuple(rules)


def _residual(source: str, target: str) -> tuple[Rule, ...]:
    """Norms and convolutions of a residual block; torch also counts the SiLUs and a dropout between them."""
    return (
        Rule(rf"{source}\.residual\.0\.gamma", f"{target}/norm_1/gamma", "vector3"),
        *conv_rules(rf"{source}\.residual\.2", f"{target}/conv_1", "conv3d"),
        Rule(rf"{source}\.residual\.3\.gamma", f"{target}/norm_2/gamma", "vector3"),
        *conv_rules(rf"{source}\.residual\.6", f"{target}/conv_2", "conv3d"),
    )


TABLE = table(VAEConfig())


def target_tree(cfg: VAEConfig) -> dict:
    """Shapes of the model's parameters, without computing any."""
    side = 2 * cfg.spatial_factor
    video = jax.ShapeDtypeStruct((1, 1 + cfg.temporal_factor, side, side, 3), jnp.float32)
    return jax.eval_shape(WanVAE(cfg).init, jax.random.key(0), video)["params"]
