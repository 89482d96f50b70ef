"""Hugging Face's names for umT5 and the CLIP vision tower <-> the trees of `emv3_jax.models.umt5` and `.clip`.

`umt5_table`: `UMT5EncoderModel`, and whole umT5 models, whose decoder is left out. The token embedding has two names,
tied to one tensor, and a file holds either or both. The table knows `shared.weight` alone, so that a second copy is not
let through unseen: `convert.sources.TiedTensors` compares the copies first. Written files hold `shared.weight`, from
which transformers fills the other.

`clip_table`: `CLIPVisionModel`, `CLIPVisionModelWithProjection`, and whole CLIP models, whose text tower is left out.
The model here ends one block early (SPEC section 3), so a written file lacks the last block, the final norm and the
projection. It is a tower of `layers - 1` blocks whose last hidden state is the image feature. A complete tower is not
offered: it needs the layers left out, from the file that the model came from.
"""

import re

from convert.rules import Ignore, Rule, Table, linear_rules, norm_rules
from emv3_jax.config import CLIPConfig, UMT5Config

EMBEDDING = "shared.weight"
EMBEDDING_COPY = "encoder.embed_tokens.weight"
CLIP_PREFIX = "vision_model."

_UMT5_BLOCK = r"encoder\.block\.(?P<layer>\d+)"


def umt5_table(cfg: UMT5Config) -> Table:
    """Rules of the encoder; the names do not depend on the size."""
    attention = _UMT5_BLOCK + r"\.layer\.0"
    feed_forward = _UMT5_BLOCK + r"\.layer\.1"
    return Table(
        name="umt5 (huggingface)",
        rules=(
            Rule(re.escape(EMBEDDING), "tokens/embedding"),
            *norm_rules(attention + r"\.layer_norm", "blocks/norm1", bias=False),
            *linear_rules(attention + r"\.SelfAttention\.(q|k|v|o)", "blocks/attention/{2}", bias=False),
            Rule(attention + r"\.SelfAttention\.relative_attention_bias\.weight", "blocks/attention/position_bias"),
            *norm_rules(feed_forward + r"\.layer_norm", "blocks/norm2", bias=False),
            # Only wi_0 goes through the GELU.
            *linear_rules(feed_forward + r"\.DenseReluDense\.wi_0", "blocks/ffn/gate", bias=False),
            *linear_rules(feed_forward + r"\.DenseReluDense\.wi_1", "blocks/ffn/fc1", bias=False),
            *linear_rules(feed_forward + r"\.DenseReluDense\.wo", "blocks/ffn/fc2", bias=False),
            *norm_rules(r"encoder\.final_layer_norm", "norm", bias=False),
        ),
        ignored=(
            Ignore(r"decoder\..*", "prompts are only encoded"),
            Ignore(r"lm_head\.weight", "prompts are only encoded"),
        ),
    )


def clip_table(cfg: CLIPConfig, prefix: str = CLIP_PREFIX) -> Table:
    """Rules for a tower of `cfg.layers` blocks, the last of which is not used; `prefix` stands before its keys.

    All files have the prefix but those that transformers 5 writes of a bare `CLIPVisionModel`.
    """
    vision = re.escape(prefix)
    used = "|".join(str(layer) for layer in range(cfg.layers - 1))
    block = rf"{vision}encoder\.layers\.(?P<layer>{used})"
    return Table(
        name="clip (huggingface)",
        rules=(
            Rule(rf"{vision}embeddings\.class_embedding", "class_embedding", "row"),
            Rule(rf"{vision}embeddings\.position_embedding\.weight", "position_embedding"),
            Rule(rf"{vision}embeddings\.patch_embedding\.weight", "patch_embedding/kernel", "conv2d"),
            *norm_rules(rf"{vision}pre_layrnorm", "pre_norm"),
            *norm_rules(rf"{block}\.layer_norm1", "blocks/norm1"),
            *norm_rules(rf"{block}\.layer_norm2", "blocks/norm2"),
            *_qkv_rules(block),
            *linear_rules(rf"{block}\.self_attn\.out_proj", "blocks/attention/out"),
            *linear_rules(rf"{block}\.mlp\.fc1", "blocks/mlp/up"),
            *linear_rules(rf"{block}\.mlp\.fc2", "blocks/mlp/down"),
        ),
        ignored=(
            Ignore(rf"{vision}encoder\.layers\.{cfg.layers - 1}\..*", "states are read before the last block"),
            Ignore(rf"{vision}post_layernorm\.(weight|bias)", "states are read without the final norm"),
            Ignore(r"visual_projection\.weight", "only image-text similarity needs the projection"),
            Ignore(rf"{vision}embeddings\.position_ids", "the numbers 0, 1, 2, ..., which old versions wrote"),
            Ignore(r"text_model\..*", "the text tower; prompts go through umT5"),
            Ignore(r"text_projection\.weight", "only image-text similarity needs the projection"),
            Ignore(r"logit_scale", "only image-text similarity needs the temperature"),
        ),
    )


def _qkv_rules(block: str) -> tuple[Rule, ...]:
    """Query, key and value are three layers there and one here."""
    rules: list[Rule] = []
    for i, letter in enumerate("qkv"):
        source, part = rf"{block}\.self_attn\.{letter}_proj", (i, 3)
        rules += [
            Rule(rf"{source}\.weight", "blocks/attention/qkv/kernel", "linear", part),
            Rule(rf"{source}\.bias", "blocks/attention/qkv/bias", part=part),
        ]
    return tuple(rules)
