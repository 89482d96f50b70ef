"""The puppets' base model, which hears nothing: what Wan-Fun is to the released model. From nothing, on two tasks.

python -m emv3_jax.data.prepare --puppets train --clips 448 --frames 33 --preset demo --out data/puppets33
python train.py --config configs/puppet_base.py --workdir runs/puppet_base

A smaller transformer than the demo's (0.5 M parameters), clips of 33 frames. The other puppet_* configs go on from its
weights. What it learns stands in docs/benchmarks.md.
"""

import ml_collections

from configs import demo_dit

STEPS = 1200


def get_config() -> ml_collections.ConfigDict:
    cfg = demo_dit.get_config()
    cfg.model = {"width": 96, "heads": 3, "layers": 4, "ffn": 288, "remat": ""}
    cfg.update(
        {
            "data": "data/puppets33",
            "frozen_weights": "",
            "steps": STEPS,
            "stages": ((STEPS, ((33, 8),)),),
            "tasks": ((STEPS, (("t2v", 0.3), ("i2v", 0.7))),),
            "drop_both": 0.1,
            "drop_audio": 0.9,  # it hears nothing
            "learning_rates": ((STEPS, 3e-3),),
            "ema_decay": 0.99,
            "eval_frames": 33,
            "eval_every": 400,
        }
    )
    return cfg
