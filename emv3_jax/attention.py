"""attention(q, k, v): one signature; the kernel follows the platform that the program is compiled for.

`self_attention` and `cross_attention` are the same over a mesh of devices (`jax.set_mesh`); a sequence that is divided
attends to itself by heads (Ulysses) where their number allows, else in a ring. Without a mesh they are `attention`.

CUDA runs cuDNN flash attention (bf16, fp16), TPU runs splash attention, everything else plain XLA, in query chunks
where the sequence is long. `jax.lax.platform_dependent` decides at lowering time, so compiling ahead of time for
another machine picks that machine's kernel.

Axes: B batch, L query tokens, S context tokens, N heads, K head width.
"""

import importlib.util
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from emv3_jax import sharding

CHUNK = 512  # queries per chunk of the plain form
LONG = 2048  # from more query tokens than this on, the plain form works in chunks
LANES = 128  # TPU vector width: splash wants the head width and its blocks to be multiples of it
BLOCK_Q = 512
BLOCK_KV = 1024


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """softmax(q kᵀ / sqrt(K)) v, softmax in float32.

    q [B, L, N, K]; k and v [B, S, N, K], all of one dtype, which is the output's; mask bool, broadcastable to
    [B, N, L, S], True = may attend (masked attention always runs plain). Returns [B, L, N, K].
    """
    if mask is not None:
        return plain_attention(q, k, v, mask)
    branches: dict[str, Callable[..., jax.Array]] = {}
    if _cudnn_fits(q):
        branches["cuda"] = partial(jax.nn.dot_product_attention, implementation="cudnn")
    if _splash_fits(q, k):
        branches["tpu"] = splash_attention
    if not branches:
        return _xla_attention(q, k, v)
    return jax.lax.platform_dependent(q, k, v, default=_xla_attention, **branches)


def self_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """`attention` of a sequence with itself, q k v [B, L, N, K], over the mesh of `jax.set_mesh`.

    Samples and heads are divided as they come; the sequence is divided over the mesh's axis "context": Ulysses gives
    each device all tokens of some heads, ring all heads of some tokens, past which keys and values travel. Lengths that
    do not divide are padded.
    """
    devices = sharding.axis_size(sharding.CONTEXT)
    if devices == 1:
        return _over_devices(attention, q, k, v, keys_divided=False)
    length, heads = q.shape[1], q.shape[2] // _head_shards(q.shape[2])
    form = partial(ulysses_attention if heads % devices == 0 else ring_attention, length=length)
    return _over_devices(form, q, k, v, keys_divided=True)


def cross_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """`attention` of q [B, L, N, K], divided like a sequence, to k and v [B, S, N, K] that every device holds."""
    return _over_devices(attention, q, k, v, keys_divided=False)


def _head_shards(heads: int) -> int:
    tensor = sharding.axis_size(sharding.TENSOR)
    return tensor if heads % tensor == 0 else 1


def _over_devices(form: Callable, q: jax.Array, k: jax.Array, v: jax.Array, keys_divided: bool) -> jax.Array:
    """`form` on every device's share; kernels know nothing of meshes."""
    batch = sharding.batch_axes(q.shape[0])
    tokens = sharding.present(sharding.CONTEXT)
    heads = sharding.TENSOR if _head_shards(q.shape[2]) > 1 else None
    if not (batch or tokens or heads):
        return form(q, k, v)
    length, rest = q.shape[1], -q.shape[1] % sharding.axis_size(sharding.CONTEXT)
    pad = lambda x: jnp.pad(x, ((0, 0), (0, rest), (0, 0), (0, 0)))  # noqa: E731
    divided, whole = PartitionSpec(batch, tokens, heads), PartitionSpec(batch, None, heads)
    keys = divided if keys_divided else whole
    run = jax.shard_map(form, in_specs=(divided, keys, keys), out_specs=divided, check_vma=False)
    k, v = (pad(x) if keys_divided else x for x in (k, v))
    return run(pad(q), k, v)[:, :length]


def ulysses_attention(q: jax.Array, k: jax.Array, v: jax.Array, length: int) -> jax.Array:
    """Inside shard_map: [B, L/n, N, K] of each of n devices -> the same; every device attends for N/n heads.

    length: of the whole sequence without padding (Jacobs et al. 2023).
    """
    swap = partial(jax.lax.all_to_all, axis_name=sharding.CONTEXT, tiled=True)
    whole = [swap(x, split_axis=2, concat_axis=1) for x in (q, k, v)]
    out = attention(*(x[:, :length] for x in whole))
    out = jnp.pad(out, ((0, 0), (0, whole[0].shape[1] - length), (0, 0), (0, 0)))
    return swap(out, split_axis=1, concat_axis=2)


def ring_attention(q: jax.Array, k: jax.Array, v: jax.Array, length: int) -> jax.Array:
    """Inside shard_map: [B, L/n, N, K] of each of n devices -> the same; keys and values go around (Liu et al. 2023).

    length: of the whole sequence without padding. Softmax is accumulated in float32, a head at a time.
    """
    axis = sharding.CONTEXT
    devices, here = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    block, width = k.shape[1], q.shape[-1]
    onward = [(i, (i + 1) % devices) for i in range(devices)]

    def one_head(args: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        query, key, value, top, total, out, real = args
        logits = jnp.einsum("BLK,BSK->BLS", query, key, preferred_element_type=jnp.float32) * width**-0.5
        logits = jnp.where(real, logits, jnp.finfo(jnp.float32).min)
        highest = jnp.maximum(top, logits.max(-1, keepdims=True))
        weights, kept = jnp.exp(logits - highest) * real, jnp.exp(top - highest)
        values = jnp.einsum("BLS,BSK->BLK", weights, value.astype(jnp.float32))
        return highest, total * kept + weights.sum(-1, keepdims=True), out * kept + values

    def step(i: jax.Array, carry: tuple) -> tuple:
        key, value, *sums = carry
        source = (here - i) % devices  # whose keys these are
        real = jnp.broadcast_to(source * block + jnp.arange(block) < length, (heads, block))
        sums = jax.lax.map(one_head, (queries, key, value, *sums, real))
        return *(jax.lax.ppermute(x, axis, onward) for x in (key, value)), *sums

    queries, keys, values = (jnp.moveaxis(x, 2, 0) for x in (q, k, v))
    heads, batch, tokens = queries.shape[:3]
    start = jnp.full((heads, batch, tokens, 1), jnp.finfo(jnp.float32).min)
    zeros = jnp.zeros_like(start), jnp.zeros((heads, batch, tokens, width), jnp.float32)
    *_, total, out = jax.lax.fori_loop(0, devices, step, (keys, values, start, *zeros))
    return jnp.moveaxis(out / total, 0, 2).astype(q.dtype)


def plain_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """The definition, with the whole [B, N, L, S] weights in memory."""
    logits = jnp.einsum("BLNK,BSNK->BNLS", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("BNLS,BSNK->BLNK", weights, v)


def chunked_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, chunk: int = CHUNK, mask: jax.Array | None = None
) -> jax.Array:
    """Like `plain_attention`, one head and `chunk` queries at a time; memory grows with B·chunk·S, not with L·S.

    mask: bool [S], the same for all heads and queries. A chunk is no longer than there are queries.
    The weights of a chunk are computed again in the backward pass.
    """
    batch, length, heads, width = q.shape
    chunk = min(chunk, length)
    chunks = -(-length // chunk)
    padded = jnp.pad(q, ((0, 0), (0, chunks * chunk - length), (0, 0), (0, 0)))
    padded = padded.reshape(batch, chunks, chunk, heads, width).transpose(3, 1, 0, 2, 4)  # N, chunks, B, chunk, K

    def one_head(args: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        queries, key, value = args  # [chunks, B, chunk, K], [B, S, K], [B, S, K]

        @jax.checkpoint
        def one_chunk(query: jax.Array) -> jax.Array:
            return plain_attention(query[:, :, None], key[:, :, None], value[:, :, None], mask)[:, :, 0]

        return jax.lax.map(one_chunk, queries)

    out = jax.lax.map(one_head, (padded, k.transpose(2, 0, 1, 3), v.transpose(2, 0, 1, 3)))
    return out.transpose(2, 1, 3, 0, 4).reshape(batch, chunks * chunk, heads, width)[:, :length]


def splash_attention(q: jax.Array, k: jax.Array, v: jax.Array, interpret: bool = False) -> jax.Array:
    """TPU flash attention: pads both lengths to whole blocks; padded context tokens are masked by segment ids."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, context, heads = q.shape[1], k.shape[1], q.shape[2]
    block_q, block_kv = (min(block, _up(n, LANES)) for block, n in ((BLOCK_Q, length), (BLOCK_KV, context)))
    padded_q, padded_kv = _up(length, block_q), _up(context, block_kv)
    blocks = kernel.BlockSizes(
        block_q=block_q, block_kv=block_kv, block_kv_compute=block_kv,
        block_q_dkv=block_q, block_kv_dkv=block_kv, block_kv_dkv_compute=block_kv,
        block_q_dq=block_q, block_kv_dq=block_kv,
    )  # fmt: skip
    mask = masks.MultiHeadMask([masks.FullMask((padded_q, padded_kv))] * heads)
    run = kernel.make_splash_mha(mask=mask, block_sizes=blocks, head_shards=1, q_seq_shards=1, interpret=interpret)
    # Padded queries keep the id of real tokens: a row that attends to nothing would turn gradients into NaN.
    ids = kernel.SegmentIds(
        q=jnp.zeros(padded_q, jnp.int32), kv=jnp.asarray(np.arange(padded_kv) >= context, jnp.int32)
    )

    def heads_first(x: jax.Array, size: int) -> jax.Array:
        return jnp.pad(x.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, size - x.shape[1]), (0, 0)))

    scaled = (q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)).astype(q.dtype)
    args = heads_first(scaled, padded_q), heads_first(k, padded_kv), heads_first(v, padded_kv)
    out = jax.vmap(lambda q, k, v: run(q, k, v, segment_ids=ids))(*args)
    return out[:, :, :length].transpose(0, 2, 1, 3).astype(q.dtype)


def _xla_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return chunked_attention(q, k, v) if q.shape[1] > LONG else plain_attention(q, k, v)


def _cudnn_fits(q: jax.Array) -> bool:
    """cuDNN takes half precision and head widths up to 128; without the CUDA plugin it cannot even be traced."""
    plugin = any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13))
    return plugin and q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] <= 128 and q.shape[-1] % 8 == 0


def _splash_fits(q: jax.Array, k: jax.Array) -> bool:
    """Short sequences gain nothing from splash attention, and narrow heads do not fill its lanes."""
    return q.shape[1] >= 1024 and k.shape[1] >= LANES and q.shape[-1] % LANES == 0


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
