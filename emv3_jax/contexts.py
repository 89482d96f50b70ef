"""The contexts of the guidance branches, put together from what is embedded once and what belongs to a window.

Text and image are the same for the whole video and for every step: their keys and values are computed once (`Shared`).
Sound, mask and masked latents belong to a stretch of latent frames (`Window`). A batch is a batch of videos, or of
windows of one video, which then share one picture and a few prompts.

Axes: B batch, M texts, P prompts that a window uses, I pictures, T latent frames, S tokens, N heads, K head width,
R contexts.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import struct

from emv3_jax.diffusion.guidance import Branch, ModelVelocity, stack_branches
from emv3_jax.models.cdca import KV, ModalityKV
from emv3_jax.models.dit import Context


@struct.dataclass
class Shared:
    """Keys and values of every layer: text [layers, M, S, N, K] (prompts, then negatives), image [layers, I, S, N, K].

    negatives: how many of the texts, the last ones, are negative.
    """

    text: KV
    image: KV
    negatives: int = struct.field(pytree_node=False)


@struct.dataclass
class Window:
    """What belongs to each sample of a batch."""

    given: jax.Array  # [B, T, h, w, 4 + 16] mask channels, then masked latents
    audio: jax.Array  # features as the DiT takes them, with a batch axis
    segments: jax.Array  # int [B, T, S], which of them each latent frame hears
    prompts: jax.Array  # int [B, P], which of the shared texts
    text_share: jax.Array  # [B, P, T], how much each of them counts in each latent frame
    pictures: jax.Array  # int [B], which of the shared pictures
    audio_gain: jax.Array  # [B, (h/2)·(w/2)]


def shared(model: ModelVelocity, prompts: jax.Array, negatives: jax.Array, image: jax.Array) -> Shared:
    """Embeds texts [M, text_len, text_width], negative ones apart, and pictures [I, image_tokens, image_width]."""
    text = model.apply("text_kv", jnp.concatenate([prompts, negatives]))
    return Shared(text, model.apply("image_kv", image), negatives.shape[0])


def branch_contexts(
    model: ModelVelocity, parts: Shared, window: Window, chain: Sequence[Branch], stages: Sequence[int]
) -> Context:
    """Contexts of the branches, leaves [R, ...]: first the branch with the negative prompt, once for each of `stages`
    (numbers of negatives), then the others in their order."""
    sounds = {
        heard: model.apply("audio_kv", window.audio if heard else jnp.zeros_like(window.audio), window.segments)
        for heard in {branch.audio for branch in chain}
    }
    image = _pick(parts.image, window.pictures)
    first_negative = parts.text.key.shape[1] - parts.negatives
    # Without guidance by text there is no branch with a negative prompt.
    rows = [(branch, stage) for branch in chain for stage in (stages if not branch.prompt else (None,))]

    def context(branch: Branch, stage: int | None) -> Context:
        prompts, share = window.prompts, window.text_share
        if stage is not None:
            prompts = jnp.full_like(prompts, first_negative + stage)
            share = jnp.zeros_like(share).at[:, 0].set(1.0)
        kv = ModalityKV(_pick(parts.text, prompts), image, sounds[branch.audio])
        return Context(window.given, kv, share, window.audio_gain)

    return stack_branches([context(*row) for row in rows])


def _pick(kv: KV, index: jax.Array) -> KV:
    """[layers, M, ...] -> [layers, *index.shape, ...]."""
    return jax.tree.map(lambda leaf: leaf[:, index], kv)
