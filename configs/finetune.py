"""Goes on from released or trained weights on films of your own; all of the transformer is trained.

python -m convert to-jax --from released --variant preview --to weights
python -m emv3_jax.data.prepare --videos films --preset preview --weights weights --out data/films
python train.py --config configs/finetune.py --workdir runs/finetune
python sample.py --config configs/preview.py --config.weights=runs/finetune/weights ...

Everything of sft_1b.py but where it starts, how fast it learns, and that every device has clips of its own: where one
has no memory for that (docs/benchmarks.md), several share a clip with --config.mesh.context=4.
--config.preset=flash for the flash transformer.
Released weights were not trained with PhDA, so every modality counts the same throughout (phda is empty).
"""

import ml_collections

from configs import sft_1b

STEPS = 3000


def get_config() -> ml_collections.ConfigDict:
    cfg = sft_1b.get_config()
    cfg.phda = {}  # weights that were trained with PhDA (sft_1b.py) go on with it without this line
    cfg.update(
        {
            "silent_audio": False,
            "steps": STEPS,
            "stages": ((STEPS, ((113, sft_1b.CLIPS),)),),
            "tasks": ((STEPS, sft_1b.ALL),),
            "inter_task_ema": False,
            "learning_rates": ((STEPS, 2e-5),),
            "warmup_steps": 100,
            "ema_decay": 0.999,
            "mesh": {"data": 1, "context": 1, "tensor": 1},
        }
    )
    return cfg
