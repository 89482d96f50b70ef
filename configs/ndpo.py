"""Negative DPO: trained weights unlearn one issue of clips that they made themselves (paper eq. 3).

python -m emv3_jax.training.negatives --config configs/sft_1b.py --weights runs/sft_1b/weights --out data/negatives
python -m emv3_jax.training.review data/negatives
python train.py --config configs/ndpo.py --workdir runs/ndpo --config.issue=lips

The weights that made the clips are the start and the reference; clips that others made are told in a note. Clips of
several sizes are unlearnt a size at a time, those shorter than a batch of `stages` whole. `objective`: ndpo compares
with the reference and fades as negatives become unlikely; ndpo_absolute is the paper's formula as it stands; dpo is the
paired baseline, each negative against the true clip it was made after: with it give --config.micro_batches=8, say,
which divides the clips of a batch. beta here is for differences between errors. ndpo_absolute takes exp(-beta·err) of
the error itself, which in float32 is exactly 0 from beta·err of 88 on, and lost beside AdamW's epsilon long before:
give it --config.beta=10, for velocity errors of a few tenths. A stage is short: it only pushes away, and what it harms
the SFT after it mends (full_cycle.py). beta1 is 0, for momentum runs on after the preference has faded: on puppets the
errors rose with it to ten times what they rise to without (docs/benchmarks.md). The loss that is logged is the
preference over beta; `error_over_reference` says how far the errors have risen.
"""

import ml_collections

from configs import sft_1b

STEPS = 200


def get_config() -> ml_collections.ConfigDict:
    cfg = sft_1b.get_config()
    cfg.update(
        {
            "init_from": "runs/sft_1b/weights",
            "silent_audio": False,
            "inter_task_ema": False,
            "objective": "ndpo",
            "beta": 1000.0,
            "negatives": "data/negatives",
            "steps": STEPS,
            "stages": ((STEPS, ((113, 8),)),),
            "learning_rates": ((STEPS, 1e-5),),
            "beta1": 0.0,
            "warmup_steps": 20,
            "ema_decay": 0.99,
            "eval_every": 100,
            "checkpoint_every": 100,
        }
    )
    return cfg
