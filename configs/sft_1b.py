"""EchoMimicV3 from its base: Wan-Fun learns to hear, and the soup of tasks (paper, Training; SPEC section 5).

python -m convert to-jax --from released --variant preview --to weights
python -m convert to-jax released/Wan2.1-Fun-V1.1-1.3B-InP/diffusion_pytorch_model.safetensors --to weights
python -m emv3_jax.data.prepare --videos films --preset preview --weights weights --out data/films
python train.py --config configs/sft_1b.py --workdir runs/sft_1b

The audio branch starts silent: at step 0 the velocity is the same whatever is heard, and the base model's where text
and image count 1. That is from t = 334 on (in training, which moves the boundaries, from 434 on); below, PhDA lets the
image count less, down to 0.5, which the base model never saw. Tasks join from the highest masking ratio to the lowest,
and the weights go on from their moving average whenever one joins. As in the paper: clips of 113 frames of 768 x 768,
learning rate 1e-4; the paper does not say how many steps. This has not been run: memory and FLOPs of a step on TPU
slices stand in docs/benchmarks.md (`python -m bench.tpu_aot --mode train`).

Four devices share a clip's tokens (mesh.context), and take the clips of a batch one after another (micro_batches 0).
With more than 128 devices a batch needs more clips, or a clip more devices; with less than four set mesh.context.
"""

import ml_collections

from configs import demo_dit

STEPS = 30_000
CLIPS = 32  # of a batch
ALL = (("t2v", 0.15), ("i2v", 0.45), ("flf2v", 0.2), ("lipsync", 0.2))
HARD_TO_EASY = (
    (10_000, (("t2v", 0.2), ("i2v", 0.8))),
    (20_000, (("t2v", 0.15), ("i2v", 0.55), ("flf2v", 0.3))),
    (STEPS, ALL),
)


def get_config() -> ml_collections.ConfigDict:
    cfg = demo_dit.get_config()
    cfg.preset = "preview"
    cfg.model = {"remat": "full", "dtype": "bfloat16"}
    cfg.sampling = {"steps": 25, "shift": 5.0, "text_scale": 4.0, "audio_scale": 2.9}
    cfg.update(
        {
            "init_from": "weights",
            "silent_audio": True,
            "frozen_weights": "weights",
            "data": "data/films",
            "stages": ((STEPS, ((113, CLIPS),)),),
            "tasks": HARD_TO_EASY,
            "inter_task_ema": True,
            "shift": 5.0,
            "timesteps": "logit_normal",
            "motion_gain": 0.0,
            "steps": STEPS,
            "learning_rates": ((STEPS, 1e-4),),
            "warmup_steps": 500,
            "final_lr_share": 0.1,
            "beta2": 0.999,
            "ema_decay": 0.9995,
            "mesh": {"data": 1, "context": 4, "tensor": 1},
            "micro_batches": 0,
            "batches_ahead": 4,
            "log_every": 5,
            "eval_every": 1000,
            "checkpoint_every": 500,
            "export_dtype": "float32",
        }
    )
    return cfg
