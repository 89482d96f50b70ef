"""The demo's VAE, from nothing, on puppets.

python train.py --config configs/demo_vae.py --workdir runs/demo_vae
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "recipe": "vae",
            "preset": "demo",
            "init_from": "",
            "seed": 0,
            # data: crops of clips; single pictures first, which are cheap, then short clips, then whole pictures
            "picture": 64,
            "stages": (  # up to step, frames, side of the crop, crops in a batch
                (1600, 1, 32, 32),
                (7000, 9, 32, 8),
                (8000, 17, 64, 2),
            ),
            # loss
            "motion_gain": 4.0,
            "l2_weight": 2.0,
            "kl_weight": 3e-4,
            # optimizer
            "steps": 8000,
            "learning_rate": 2e-3,
            "warmup_steps": 100,
            "final_lr_share": 0.05,
            "weight_decay": 1e-4,
            "clip_norm": 1.0,
            "beta2": 0.99,
            "ema_decay": 0.998,
            # run
            "minutes": 0.0,
            "bad_steps": 3,
            "log_every": 20,
            "eval_every": 500,
            "eval_clips": 8,
            "checkpoint_every": 250,
        }
    )
