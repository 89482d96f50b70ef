"""Puppets: adapters of rank 4 beside puppet_sft's weights. The twin of lora.py.

python train.py --config configs/puppet_lora.py --workdir runs/puppet_lora
"""

import ml_collections

from configs import puppet_finetune


def get_config() -> ml_collections.ConfigDict:
    cfg = puppet_finetune.get_config()
    cfg.adapters = {"rank": 4, "scale": 4.0, "on": r"blocks/(self_attention|cross_attention)/(query|key|value|out)"}
    cfg.update({"learning_rates": ((puppet_finetune.STEPS, 2e-3),), "weight_decay": 0.0})
    return cfg
