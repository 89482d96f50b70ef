"""Table of the diffusion transformer: released checkpoint keys <-> `emv3_jax.models.dit.DiT`."""

import functools

import jax

from convert.rules import Rule, Table, conv_rules, linear_rules, norm_rules
from emv3_jax.config import DiTConfig
from emv3_jax.models.dit import DiT, zero_inputs

BLOCK = r"blocks\.(?P<layer>\d+)"

SHARED = (
    *conv_rules(r"patch_embedding", "patch_embedding", "conv3d"),
    *linear_rules(r"text_embedding\.0", "text_embedding/up"),
    *linear_rules(r"text_embedding\.2", "text_embedding/down"),
    *linear_rules(r"time_embedding\.0", "time_embedding/up"),
    *linear_rules(r"time_embedding\.2", "time_embedding/down"),
    *linear_rules(r"time_projection\.1", "time_projection"),
    *norm_rules(r"img_emb\.proj\.0", "image_embedding/norm_in"),
    *linear_rules(r"img_emb\.proj\.1", "image_embedding/mlp/up"),
    *linear_rules(r"img_emb\.proj\.3", "image_embedding/mlp/down"),
    *norm_rules(r"img_emb\.proj\.4", "image_embedding/norm_out"),
    Rule(BLOCK + r"\.modulation", "blocks/modulation", "unbatch"),
    *linear_rules(BLOCK + r"\.self_attn\.q", "blocks/self_attention/query"),
    *linear_rules(BLOCK + r"\.self_attn\.k", "blocks/self_attention/key"),
    *linear_rules(BLOCK + r"\.self_attn\.v", "blocks/self_attention/value"),
    *linear_rules(BLOCK + r"\.self_attn\.o", "blocks/self_attention/out"),
    *norm_rules(BLOCK + r"\.self_attn\.norm_q", "blocks/self_attention/query_norm", bias=False),
    *norm_rules(BLOCK + r"\.self_attn\.norm_k", "blocks/self_attention/key_norm", bias=False),
    *norm_rules(BLOCK + r"\.norm3", "blocks/cross_norm"),
    *linear_rules(BLOCK + r"\.cross_attn\.q", "blocks/cross_attention/query"),
    *linear_rules(BLOCK + r"\.cross_attn\.o", "blocks/cross_attention/out"),
    *norm_rules(BLOCK + r"\.cross_attn\.norm_q", "blocks/cross_attention/query_norm", bias=False),
    *linear_rules(BLOCK + r"\.cross_attn\.k", "cross_kv/text/key"),
    *linear_rules(BLOCK + r"\.cross_attn\.v", "cross_kv/text/value"),
    *norm_rules(BLOCK + r"\.cross_attn\.norm_k", "cross_kv/text/key_norm", bias=False),
    *linear_rules(BLOCK + r"\.cross_attn\.k_img", "cross_kv/image/key"),
    *linear_rules(BLOCK + r"\.cross_attn\.v_img", "cross_kv/image/value"),
    *norm_rules(BLOCK + r"\.cross_attn\.norm_k_img", "cross_kv/image/key_norm", bias=False),
    *linear_rules(BLOCK + r"\.ffn\.0", "blocks/mlp/up"),
    *linear_rules(BLOCK + r"\.ffn\.2", "blocks/mlp/down"),
    Rule(r"head\.modulation", "head/modulation", "unbatch"),
    *linear_rules(r"head\.head", "head/out"),
)
PREVIEW_AUDIO = (
    *linear_rules(r"audio2token\.proj", "audio_tokens/proj", bias=False),
    *norm_rules(r"audio2token\.norm", "audio_tokens/norm"),
    *linear_rules(BLOCK + r"\.cross_attn\.k_audio", "cross_kv/audio/key", bias=False),
    *linear_rules(BLOCK + r"\.cross_attn\.v_audio", "cross_kv/audio/value", bias=False),
    *norm_rules(BLOCK + r"\.cross_attn\.norm_k_audio", "cross_kv/audio/key_norm", bias=False),
)
FLASH_AUDIO = (
    *linear_rules(r"audio_injection\.proj1", "audio_tokens/first_in"),
    *linear_rules(r"audio_injection\.proj1_vf", "audio_tokens/later_in"),
    *linear_rules(r"audio_injection\.proj2", "audio_tokens/middle"),
    *linear_rules(r"audio_injection\.proj3", "audio_tokens/out"),
    *norm_rules(r"audio_injection\.norm", "audio_tokens/norm"),
    *linear_rules(BLOCK + r"\.cross_attn\.q_audio", "blocks/cross_attention/unused_audio_query"),
    *linear_rules(BLOCK + r"\.cross_attn\.k_audio", "cross_kv/audio/key"),
    *linear_rules(BLOCK + r"\.cross_attn\.v_audio", "cross_kv/audio/value"),
    *norm_rules(BLOCK + r"\.cross_attn\.norm_k_audio", "cross_kv/audio/key_norm", bias=False),
)
BASE = Table("dit base", SHARED)  # Wan-Fun, which hears nothing
PREVIEW = Table("dit preview", SHARED + PREVIEW_AUDIO)
FLASH = Table("dit flash", SHARED + FLASH_AUDIO)


def table(cfg: DiTConfig) -> Table:
    """The table of a config's variant."""
    return PREVIEW if cfg.audio_windows is None else FLASH


@functools.cache
def target_tree(cfg: DiTConfig) -> dict:
    """Shapes of the model's parameters, without computing any. It is the same object each time: leave it as it is."""
    return jax.eval_shape(lambda key: DiT(cfg).init(key, *zero_inputs(cfg)), jax.random.key(0))["params"]
