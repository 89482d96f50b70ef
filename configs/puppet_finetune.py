"""Puppets: goes on from puppet_sft's weights at a lower rate, on all tasks. The twin of finetune.py.

python train.py --config configs/puppet_finetune.py --workdir runs/puppet_finetune
"""

import ml_collections

from configs import puppet_sft

STEPS = 160


def get_config() -> ml_collections.ConfigDict:
    cfg = puppet_sft.get_config()
    cfg.update(
        {
            "init_from": "runs/puppet_sft/weights",
            "silent_audio": False,
            "inter_task_ema": False,
            "steps": STEPS,
            "stages": ((STEPS, ((33, 8),)),),
            "tasks": ((STEPS, puppet_sft.ALL),),
            "learning_rates": ((STEPS, 5e-4),),
            "eval_every": STEPS,
            "checkpoint_every": 80,
        }
    )
    return cfg
