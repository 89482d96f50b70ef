"""Puppets: the base model learns to hear, and the other tasks, from the highest masking ratio to the lowest.

python train.py --config configs/puppet_base.py --workdir runs/puppet_base
python train.py --config configs/puppet_sft.py --workdir runs/puppet_sft

The twin of sft_1b.py: the audio branch starts silent, tasks join one after another, and the weights go on from their
moving average whenever one joins (paper, Soup of Tasks).
"""

import ml_collections

from configs import puppet_base

STEPS = 480
ALL = (("t2v", 0.15), ("i2v", 0.55), ("flf2v", 0.15), ("lipsync", 0.15))
HARD_TO_EASY = (
    (160, (("t2v", 0.2), ("i2v", 0.8))),
    (320, (("t2v", 0.15), ("i2v", 0.65), ("flf2v", 0.2))),
    (480, ALL),
)


def get_config() -> ml_collections.ConfigDict:
    cfg = puppet_base.get_config()
    cfg.update(
        {
            "init_from": "runs/puppet_base/weights",
            "silent_audio": True,
            "steps": STEPS,
            "stages": ((STEPS, ((33, 8),)),),
            "tasks": HARD_TO_EASY,
            "inter_task_ema": True,
            "drop_audio": 0.1,
            "learning_rates": ((STEPS, 2e-3),),
            "warmup_steps": 20,
            "eval_every": 240,
        }
    )
    return cfg
