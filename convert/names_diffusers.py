"""Diffusers' names for the Wan 2.1 transformer and VAE <-> the trees of `emv3_jax.models.dit` and `.vae`.

`dit_table` covers `WanTransformer3DModel` with image cross-attention and 36 input channels. That is all of Wan-Fun 1.3B
InP, and nothing of the audio: audio layers have no name there, so a whole preview or flash model has no Diffusers form.
A file in these names is the base (`dit-base`) that audio layers are laid over. Refused, as missing or unexpected keys:
models without an image (T2V), with positions for two images (FLF2V), with fused projections.

`vae_table` covers `AutoencoderKLWan` of Wan 2.1; that of Wan 2.2 (residual, patched) has other keys and is refused.
Neither table leaves a key out, so both run both ways without loss.
"""

from convert.rules import Rule, Table, conv_rules, linear_rules, norm_rules
from emv3_jax.config import DiTConfig, VAEConfig

_BLOCK = r"blocks\.(?P<layer>\d+)"
_CONDITIONS = r"condition_embedder"
_IMAGE = _CONDITIONS + r"\.image_embedder"


def dit_table(cfg: DiTConfig) -> Table:
    """Rules for everything but the audio; the names do not depend on the size.

    Diffusers numbers the norms of a block otherwise: the affine one, before cross-attention, is `norm2` there and
    `norm3` in released files.
    """
    return Table("dit base (diffusers)", (*_embedding_rules(), *_block_rules(), *_head_rules()))


def _embedding_rules() -> tuple[Rule, ...]:
    return (
        *conv_rules(r"patch_embedding", "patch_embedding", "conv3d"),
        *linear_rules(_CONDITIONS + r"\.text_embedder\.linear_1", "text_embedding/up"),
        *linear_rules(_CONDITIONS + r"\.text_embedder\.linear_2", "text_embedding/down"),
        *linear_rules(_CONDITIONS + r"\.time_embedder\.linear_1", "time_embedding/up"),
        *linear_rules(_CONDITIONS + r"\.time_embedder\.linear_2", "time_embedding/down"),
        *linear_rules(_CONDITIONS + r"\.time_proj", "time_projection"),
        *norm_rules(_IMAGE + r"\.norm1", "image_embedding/norm_in"),
        *linear_rules(_IMAGE + r"\.ff\.net\.0\.proj", "image_embedding/mlp/up"),
        *linear_rules(_IMAGE + r"\.ff\.net\.2", "image_embedding/mlp/down"),
        *norm_rules(_IMAGE + r"\.norm2", "image_embedding/norm_out"),
    )


def _block_rules() -> tuple[Rule, ...]:
    own, cross = _BLOCK + r"\.attn1", _BLOCK + r"\.attn2"
    return (
        Rule(_BLOCK + r"\.scale_shift_table", "blocks/modulation", "unbatch"),
        *linear_rules(own + r"\.to_q", "blocks/self_attention/query"),
        *linear_rules(own + r"\.to_k", "blocks/self_attention/key"),
        *linear_rules(own + r"\.to_v", "blocks/self_attention/value"),
        *linear_rules(own + r"\.to_out\.0", "blocks/self_attention/out"),
        *norm_rules(own + r"\.norm_q", "blocks/self_attention/query_norm", bias=False),
        *norm_rules(own + r"\.norm_k", "blocks/self_attention/key_norm", bias=False),
        *norm_rules(_BLOCK + r"\.norm2", "blocks/cross_norm"),
        *linear_rules(cross + r"\.to_q", "blocks/cross_attention/query"),
        *linear_rules(cross + r"\.to_out\.0", "blocks/cross_attention/out"),
        *norm_rules(cross + r"\.norm_q", "blocks/cross_attention/query_norm", bias=False),
        *linear_rules(cross + r"\.to_k", "cross_kv/text/key"),
        *linear_rules(cross + r"\.to_v", "cross_kv/text/value"),
        *norm_rules(cross + r"\.norm_k", "cross_kv/text/key_norm", bias=False),
        *linear_rules(cross + r"\.add_k_proj", "cross_kv/image/key"),
        *linear_rules(cross + r"\.add_v_proj", "cross_kv/image/value"),
        *norm_rules(cross + r"\.norm_added_k", "cross_kv/image/key_norm", bias=False),
        *linear_rules(_BLOCK + r"\.ffn\.net\.0\.proj", "blocks/mlp/up"),
        *linear_rules(_BLOCK + r"\.ffn\.net\.2", "blocks/mlp/down"),
    )


def _head_rules() -> tuple[Rule, ...]:
    return (Rule(r"scale_shift_table", "head/modulation", "unbatch"), *linear_rules(r"proj_out", "head/out"))


def vae_table(cfg: VAEConfig) -> Table:
    """Rules for a VAE of any size: the encoder's layers stand in one row there, the decoder's are counted by level."""
    return Table(
        name="vae (diffusers)",
        rules=(
            *_ends("encoder"),
            *_down_levels(cfg),
            *conv_rules("quant_conv", "to_moments", "pointwise3d"),
            *conv_rules("post_quant_conv", "from_latents", "pointwise3d"),
            *_ends("decoder"),
            *_up_levels(cfg),
        ),
    )


def _ends(side: str) -> tuple[Rule, ...]:
    """First convolution, middle and head, which encoder and decoder have in common."""
    middle = rf"{side}\.mid_block"
    return (
        *conv_rules(rf"{side}\.conv_in", f"{side}/conv_in", "conv3d"),
        *_residual(rf"{middle}\.resnets\.0", f"{side}/mid/res_0"),
        Rule(rf"{middle}\.attentions\.0\.norm\.gamma", f"{side}/mid/attention/norm/gamma", "vector2"),
        *conv_rules(rf"{middle}\.attentions\.0\.to_qkv", f"{side}/mid/attention/qkv", "pointwise2d"),
        *conv_rules(rf"{middle}\.attentions\.0\.proj", f"{side}/mid/attention/proj", "pointwise2d"),
        *_residual(rf"{middle}\.resnets\.1", f"{side}/mid/res_1"),
        Rule(rf"{side}\.norm_out\.gamma", f"{side}/head/norm/gamma", "vector3"),
        *conv_rules(rf"{side}\.conv_out", f"{side}/head/conv", "conv3d"),
    )


def _down_levels(cfg: VAEConfig) -> tuple[Rule, ...]:
    """Encoder: residual blocks of a level, then its downsampling, all numbered through."""
    rules: list[Rule] = []
    for level in range(len(cfg.multipliers)):
        first = level * (cfg.res_blocks + 1)
        for block in range(cfg.res_blocks):
            rules += _level_block(rf"encoder\.down_blocks\.{first + block}", f"encoder/down_{level}/res_{block}")
        if level < len(cfg.temporal_down):
            source = rf"encoder\.down_blocks\.{first + cfg.res_blocks}"
            target = f"encoder/down_{level}/downsample"
            rules += [
                *conv_rules(rf"{source}\.resample\.1", f"{target}/conv", "conv2d"),
                Rule(rf"{source}\.time_conv\.weight", f"{target}/time_kernel", "temporal"),
                Rule(rf"{source}\.time_conv\.bias", f"{target}/time_bias"),
            ]
    return tuple(rules)


def _up_levels(cfg: VAEConfig) -> tuple[Rule, ...]:
    """Decoder: one more residual block a level than the encoder has, then its upsampling."""
    rules: list[Rule] = []
    for level in range(len(cfg.multipliers)):
        source, target = rf"decoder\.up_blocks\.{level}", f"decoder/up_{level}"
        for block in range(cfg.res_blocks + 1):
            rules += _level_block(rf"{source}\.resnets\.{block}", f"{target}/res_{block}")
        if level < len(cfg.temporal_down):
            step = rf"{source}\.upsamplers\.0"
            rules += conv_rules(rf"{step}\.resample\.1", f"{target}/upsample/conv", "conv2d")
            rules += conv_rules(rf"{step}\.time_conv", f"{target}/upsample/time_conv", "conv3d")
    return tuple(rules)


def _level_block(source: str, target: str) -> tuple[Rule, ...]:
    """A residual block that may change the number of channels."""
    return (
        *_residual(source, target),
        *conv_rules(rf"{source}\.conv_shortcut", f"{target}/shortcut", "pointwise3d"),
    )


def _residual(source: str, target: str) -> tuple[Rule, ...]:
    """Norms and convolutions of a residual block."""
    return (
        Rule(rf"{source}\.norm1\.gamma", f"{target}/norm_1/gamma", "vector3"),
        *conv_rules(rf"{source}\.conv1", f"{target}/conv_1", "conv3d"),
        Rule(rf"{source}\.norm2\.gamma", f"{target}/norm_2/gamma", "vector3"),
        *conv_rules(rf"{source}\.conv2", f"{target}/conv_2", "conv3d"),
    )
