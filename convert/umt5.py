"""umT5 encoder: `models_t5_umt5-xxl-enc-bf16.pth` and its like <-> `emv3_jax.models.umt5.UMT5Encoder`."""

import jax
import jax.numpy as jnp

from convert.rules import Rule, Table, linear_rules, norm_rules
from emv3_jax.config import UMT5Config
from emv3_jax.models.umt5 import UMT5Encoder

_BLOCK = r"blocks\.(?P<layer>\d+)"

TABLE = Table(
    name="umt5",
    rules=(
        Rule(r"token_embedding\.weight", "tokens/embedding"),
        *norm_rules(_BLOCK + r"\.norm1", "blocks/norm1", bias=False),
        *linear_rules(_BLOCK + r"\.attn\.(q|k|v|o)", "blocks/attention/{2}", bias=False),
        Rule(_BLOCK + r"\.pos_embedding\.embedding\.weight", "blocks/attention/position_bias"),
        *norm_rules(_BLOCK + r"\.norm2", "blocks/norm2", bias=False),
        *linear_rules(_BLOCK + r"\.ffn\.gate\.0", "blocks/ffn/gate", bias=False),
        *linear_rules(_BLOCK + r"\.ffn\.(fc1|fc2)", "blocks/ffn/{2}", bias=False),
        *norm_rules("norm", "norm", bias=False),
    ),
)


def target_tree(cfg: UMT5Config) -> dict:
    """Shapes of the model's parameters, without computing any."""
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(UMT5Encoder(cfg).init, jax.random.key(0), ids, ids)["params"]
