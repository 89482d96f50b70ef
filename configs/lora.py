"""Low-rank adapters beside frozen weights: a face, a voice or a style, from few films, in little memory.

python train.py --config configs/lora.py --workdir runs/lora
python sample.py --config configs/preview.py --config.weights=runs/lora/weights ...
python -m convert to-torch runs/lora/weights/adapters --to lora

As finetune.py, but what is trained are adapters of rank 32 of the projections that `adapters.on` matches: those of
attention to the picture itself, to text, image and sound, and of the MLPs. The run writes the merged weights, and the
adapters alone, which `convert` gives the released key names.
"""

import ml_collections

from configs import finetune


def get_config() -> ml_collections.ConfigDict:
    cfg = finetune.get_config()
    cfg.adapters = {
        "rank": 32,
        "scale": 32.0,  # of the change, times 1 / rank
        "on": r"blocks/(self|cross)_attention/(query|key|value|out)|blocks/mlp/(up|down)|cross_kv/.*/(key|value)",
    }
    cfg.update({"learning_rates": ((finetune.STEPS, 1e-4),), "weight_decay": 0.0})
    return cfg
