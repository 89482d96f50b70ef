"""wav2vec2-base in the Hugging Face naming (`wav2vec2-base-960h`, `chinese-wav2vec2-base`) <-> `Wav2Vec2`.

Files of the bare encoder have no prefix; those with a head for recognition or pretraining put `wav2vec2.` before the
encoder's keys. The weight norm of the positional convolution is written in one of two ways, by the age of the file.
"""

import re
from typing import Literal

import jax
import jax.numpy as jnp

from convert.rules import Ignore, Rule, Table, linear_rules, norm_rules
from emv3_jax.config import Wav2Vec2Config
from emv3_jax.models.wav2vec2 import Wav2Vec2, sample_count

PREFIX = "wav2vec2."  # in files that hold more than the encoder

WeightNorm = Literal["parametrizations", "g_v"]
_SIZE_AND_DIRECTION: dict[WeightNorm, tuple[str, str]] = {
    "parametrizations": (r"parametrizations\.weight\.original0", r"parametrizations\.weight\.original1"),
    "g_v": ("weight_g", "weight_v"),
}


def table(cfg: Wav2Vec2Config, prefix: str = "", weight_norm: WeightNorm = "parametrizations") -> Table:
    """Rules for one of the ways to write the file; `prefix` stands before the encoder's keys."""
    root = re.escape(prefix)
    positions = rf"{root}encoder\.pos_conv_embed\.conv"
    size, direction = _SIZE_AND_DIRECTION[weight_norm]
    block = rf"{root}encoder\.layers\.(?P<layer>\d+)"
    return Table(
        name="wav2vec2",
        rules=(
            Rule(rf"{root}masked_spec_embed", "masked_spec_embed"),
            Rule(rf"{root}feature_extractor\.conv_layers\.(\d+)\.conv\.weight", "features/conv{1}/kernel", "conv1d"),
            *norm_rules(rf"{root}feature_extractor\.conv_layers\.0\.layer_norm", "features/norm"),
            *norm_rules(rf"{root}feature_projection\.layer_norm", "encoder/proj_norm"),
            *linear_rules(rf"{root}feature_projection\.projection", "encoder/proj"),
            Rule(rf"{positions}\.{size}", "encoder/positions/g", "conv1d"),
            Rule(rf"{positions}\.{direction}", "encoder/positions/v", "conv1d"),
            Rule(rf"{positions}\.bias", "encoder/positions/bias"),
            *norm_rules(rf"{root}encoder\.layer_norm", "encoder/norm"),
            *linear_rules(rf"{block}\.attention\.(q|k|v)_proj", "encoder/blocks/attention/{2}"),
            *linear_rules(rf"{block}\.attention\.out_proj", "encoder/blocks/attention/o"),
            *norm_rules(rf"{block}\.layer_norm", "encoder/blocks/norm1"),
            *linear_rules(rf"{block}\.feed_forward\.intermediate_dense", "encoder/blocks/mlp/up"),
            *linear_rules(rf"{block}\.feed_forward\.output_dense", "encoder/blocks/mlp/down"),
            *norm_rules(rf"{block}\.final_layer_norm", "encoder/blocks/norm2"),
        ),
        ignored=(
            Ignore(r"lm_head\.(weight|bias)", "only speech recognition needs the letters"),
            Ignore(r"(quantizer|project_q|project_hid)\..*", "only the encoder's own pretraining needs the codebook"),
        ),
    )


def target_tree(cfg: Wav2Vec2Config) -> dict:
    """Shapes of the model's parameters, without computing any."""
    wave = jax.ShapeDtypeStruct((1, sample_count(cfg, 1)), jnp.float32)
    return jax.eval_shape(Wav2Vec2(cfg).init, jax.random.key(0), wave)["params"]
