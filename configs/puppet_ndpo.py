"""Puppets: puppet_sft's weights unlearn their worst lips. The twin of ndpo.py.

python -m emv3_jax.training.negatives --config configs/puppet_sft.py --weights runs/puppet_sft/weights \
    --out data/puppet_negatives --clips 48 --batch 8 --judge metrics --issue lips
python train.py --config configs/puppet_ndpo.py --workdir runs/puppet_ndpo

The other forms: --config.objective=dpo, and --config.objective=ndpo_absolute --config.beta=10 (ndpo.py says why).
"""

import ml_collections

from configs import puppet_finetune

STEPS = 40


def get_config() -> ml_collections.ConfigDict:
    cfg = puppet_finetune.get_config()
    cfg.update(
        {
            "objective": "ndpo",
            "beta": 1000.0,
            "negatives": "data/puppet_negatives",
            "issue": "lips",
            "steps": STEPS,
            "stages": ((STEPS, ((33, 8),)),),
            "learning_rates": ((STEPS, 2e-4),),
            "beta1": 0.0,
            "beta2": 0.999,
            "warmup_steps": 5,
            "eval_every": STEPS,
            "checkpoint_every": 20,
        }
    )
    return cfg
