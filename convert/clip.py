"""CLIP vision tower: `visual.*` of the released CLIP file <-> `emv3_jax.models.clip.CLIPVision`."""

import re

import jax
import jax.numpy as jnp

from convert.rules import Ignore, Rule, Table, linear_rules, norm_rules
from emv3_jax.config import CLIPConfig
from emv3_jax.models.clip import CLIPVision

RELEASED_PREFIX = "visual."  # the released file holds both towers under their names


def table(cfg: CLIPConfig, prefix: str = "") -> Table:
    """Rules for a tower of `cfg.layers` blocks, the last of which is not used; `prefix` stands before its keys."""
    vision = re.escape(prefix)
    used = "|".join(str(layer) for layer in range(cfg.layers - 1))
    block = rf"{vision}transformer\.(?P<layer>{used})"
    return Table(
        name="clip",
        rules=(
            Rule(rf"{vision}cls_embedding", "class_embedding", "unbatch"),
            Rule(rf"{vision}pos_embedding", "position_embedding", "unbatch"),
            Rule(rf"{vision}patch_embedding\.weight", "patch_embedding/kernel", "conv2d"),
            *norm_rules(rf"{vision}pre_norm", "pre_norm"),
            *norm_rules(rf"{block}\.(norm1|norm2)", "blocks/{2}"),
            *linear_rules(rf"{block}\.attn\.to_qkv", "blocks/attention/qkv"),
            *linear_rules(rf"{block}\.attn\.proj", "blocks/attention/out"),
            *linear_rules(rf"{block}\.mlp\.0", "blocks/mlp/up"),
            *linear_rules(rf"{block}\.mlp\.2", "blocks/mlp/down"),
        ),
        ignored=(
            Ignore(rf"{vision}transformer\.{cfg.layers - 1}\..*", "states are read before the last block"),
            Ignore(rf"{vision}post_norm\.(weight|bias)", "states are read without the final norm"),
            Ignore(rf"{vision}head", "only image-text similarity needs the projection"),
            Ignore(r"textual\..*", "the text tower; prompts go through umT5"),
            Ignore(r"log_scale", "only image-text similarity needs the temperature"),
        ),
    )


def target_tree(cfg: CLIPConfig) -> dict:
    """Shapes of the model's parameters, without computing any."""
    pixels = jax.ShapeDtypeStruct((1, cfg.image_size, cfg.image_size, 3), jnp.float32)
    return jax.eval_shape(CLIPVision(cfg).init, jax.random.key(0), pixels)["params"]
