"""The demo's VAE, from nothing, on puppets.

python train.py --config configs/demo_vae.py --workdir runs/demo_vae

About 100 minutes on 2 cores. Expect on held-out puppets of 49 frames (docs/benchmarks.md): 30.6 dB PSNR, and mouths
that follow the law with a correlation of 0.97 after encoding and decoding; after the 2500 steps of single pictures,
26 dB and 0.79. (The shipped weights had "l2_weight" 2 up to step 4127, and were set to 8 then.)
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "recipe": "vae",
            "preset": "demo",
            "init_from": "",
            "seed": 0,
            # data: crops of clips. Single pictures first, which are cheap; then short clips for variety in turn with
            # long ones, without which the codec learns to send what stays the same only once, and to forget it.
            "picture": 64,
            "stages": (  # up to step; then kinds of batches, taken in turn: frames, side of the crop, crops
                (2500, ((1, 32, 32), (1, 32, 32), (1, 64, 8))),
                (4000, ((13, 32, 6), (49, 32, 2))),
                (4200, ((25, 64, 1), (65, 64, 1))),
                (7200, ((13, 32, 6), (25, 64, 1), (49, 32, 2), (65, 64, 1))),
            ),
            # loss
            "motion_gain": 4.0,
            "l2_weight": 8.0,
            "kl_weight": 3e-4,
            # optimizer
            "steps": 7200,
            "learning_rates": ((2500, 2e-3), (4200, 8e-4), (7200, 8e-4)),  # up to step, peak
            "warmup_steps": 100,
            "final_lr_share": 0.05,
            "weight_decay": 1e-4,
            "clip_norm": 1.0,
            "beta1": 0.9,
            "beta2": 0.99,
            "ema_decay": 0.998,
            # run
            # several devices: samples and parameters go along fsdp, which takes what the others leave
            "mesh": {"data": 1, "context": 1, "tensor": 1},
            "micro_batches": 1,  # parts that a batch is taken in, to save memory; 0: one sample at a time a device
            "batches_ahead": 2,  # made by as many threads before they are needed
            "minutes": 0.0,
            "bad_steps": 3,
            "log_every": 20,
            "eval_every": 500,
            "eval_clips": 8,
            "checkpoint_every": 250,
            "export_dtype": "float16",
        }
    )
