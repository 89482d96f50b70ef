"""The demo's DiT with its text and image encoders, from nothing, on puppets; its VAE is of demo_vae_decoder.py.

python train.py --config configs/demo_dit.py --workdir runs/demo_dit

About 20 minutes to extract latents and 67 to train on 2 cores. Expect on held-out puppets (docs/benchmarks.md): sync
0.92, the motion of the prompt always, colours within 4 of 255. After 800 steps sync is 0.83. (The shipped weights
learnt up to step 2600 on 640 clips and on the latents of a VAE at step 4127, and from there on what is below.)
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "recipe": "dit",
            "preset": "demo",
            "init_from": "",
            "seed": 0,
            # data: latents of puppets, extracted once
            "vae_weights": "runs/demo_vae_decoder/weights/vae.safetensors",
            "latents": "runs/latents",
            "clips": 832,
            "clip_frames": 125,
            # Up to step; then kinds of batches, taken in turn: first frames of a clip, clips.
            "stages": (
                (2000, ((61, 12),)),
                (2600, ((125, 8),)),
                (6000, ((61, 12), (125, 6), (81, 10), (125, 6))),
            ),
            # loss
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
            "beta2": 0.99,
            "ema_decay": 0.998,
            # held-out clips
            "eval_clips": 8,
            "eval_frames": 81,
            "sampling": {"steps": 10, "shift": 3.0, "text_scale": 1.0, "audio_scale": 2.0},
            # run
            # several devices: samples and parameters go along fsdp, which takes what the others leave
            "mesh": {"data": 1, "context": 1, "tensor": 1},
            "micro_batches": 1,  # parts that a batch is taken in, to save memory
            "minutes": 0.0,
            "bad_steps": 3,
            "log_every": 20,
            "eval_every": 800,
            "checkpoint_every": 250,
            "export_dtype": "float16",
        }
    )
