"""The released flash model, with the values of its demos: few steps, guidance by sound alone, TeaCache.

python sample.py --config configs/flash.py --image me.jpg --audio voice.wav --prompt "..." --out talk.mp4

needs converted weights in the folder weights (python -m convert to-jax --from DIR --variant flash --to weights), or
in another one: --config.weights=DIR. --config.mode=released does as the released program does where ours is right
instead. A video takes minutes on an accelerator and many hours on a CPU.
"""

import ml_collections

from configs import preview


def get_config() -> ml_collections.ConfigDict:
    cfg = preview.get_config()
    cfg.preset = "flash"
    cfg.sampling.update(
        sampler="unipc",
        steps=8,
        text_scale=1.0,  # the text guides nothing
        audio_scale=3.0,
        text_dynamic=False,
        audio_dynamic=False,
        negative_prompt="",
        neg_scale=1.0,
        neg_steps=0,
        cache_threshold=0.1,  # the released program has TeaCache on here; 0 computes every step
        cache_start=5,
    )
    return cfg
