"""The demo's DiT with its text and image encoders, from nothing, on puppets; its VAE is of demo_vae_decoder.py.

python -m emv3_jax.data.prepare --puppets train --clips 832 --preset demo --weights runs/demo_vae_decoder/weights \
    --out data/puppets
python train.py --config configs/demo_dit.py --workdir runs/demo_dit

About 30 minutes to prepare the clips and 67 to train on 2 cores. Expect on held-out puppets (docs/benchmarks.md): sync
0.92, the motion of the prompt always, colours within 4 of 255. After 800 steps sync is 0.83. (The shipped weights
learnt up to step 2600 on 640 clips and on the latents of a VAE at step 4127, and from there on what is below, but each
clip in one task instead of any.)
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "recipe": "dit",
            "preset": "demo",
            "model": {"remat": ""},  # fields of the transformer's config, where they differ from the preset's
            "seed": 0,
            # weights
            "init_from": "",  # a folder of weights to go on from
            "silent_audio": False,  # init_from holds base weights, which hear nothing
            "frozen_weights": "runs/demo_vae_decoder/weights",  # of what is not trained; empty: the shipped ones
            "adapters": {},  # rank, scale, on: trains adapters of the projections whose path matches
            # data
            "data": "data/puppets",
            # Up to step; then kinds of batches, taken in turn: first frames of a clip, clips.
            "stages": (
                (2000, ((61, 12),)),
                (2600, ((125, 8),)),
                (6000, ((61, 12), (125, 6), (81, 10), (125, 6))),
            ),
            # Up to step; then the tasks, and how often each.
            "tasks": ((6000, (("i2v", 0.76), ("t2v", 0.08), ("flf2v", 0.08), ("lipsync", 0.08))),),
            "inter_task_ema": False,  # weights go on from the moving average when other tasks join
            # loss
            "objective": "sft",  # or a preference: ndpo, ndpo_absolute, dpo
            "beta": 100.0,  # of a preference
            "negatives": "",  # its review folder
            "issue": "",  # what its negatives were rejected for; empty: anything
            "phda": {"text": (), "image": (500 / 3, 1000 / 3), "audio": (500.0, 2000 / 3), "jitter": 100.0},
            "drop_both": 0.1,  # prompt and voice
            "drop_audio": 0.1,  # the voice alone
            "shift": 2.0,
            "timesteps": "uniform",
            "motion_gain": 2.0,
            # optimizer
            "steps": 6000,
            "learning_rates": ((2600, 1.5e-3), (6000, 1e-3)),  # up to step, peak
            "warmup_steps": 100,
            "final_lr_share": 0.03,
            "weight_decay": 0.01,
            "clip_norm": 1.0,
            "beta1": 0.9,
            "beta2": 0.99,
            "ema_decay": 0.998,
            # held-out puppets; presets that know none make a clip of the dataset again, by the same sampling
            "eval_clips": 8,
            "eval_frames": 81,
            "sampling": {"steps": 10, "shift": 3.0, "text_scale": 1.0, "audio_scale": 2.0},
            # run
            # several devices: samples and parameters go along fsdp, which takes what the others leave
            "mesh": {"data": 1, "context": 1, "tensor": 1},
            "micro_batches": 1,  # parts that a batch is taken in, to save memory; 0: one sample at a time a device
            "batches_ahead": 2,  # made by as many threads before they are needed
            "minutes": 0.0,
            "bad_steps": 3,
            "log_every": 20,
            "eval_every": 800,
            "checkpoint_every": 250,
            "export_dtype": "float16",
        }
    )
