"""Puppets: the whole of the paper's training, SFT and Negative DPO in turn, at a size for a laptop.

python train.py --config configs/puppet_base.py --workdir runs/puppet_base
python train.py --config configs/puppet_full_cycle.py --workdir runs/puppet_full_cycle

Stages: SFT over the tasks as they join; Negative DPO on clips with the worst lips; SFT; Negative DPO on those with the
worst identity; SFT. The measures of the small world stand in for the reviewer (review.judge); with
--config.review.judge=person the run stops for a person, and the same command goes on. Table 2 of docs/benchmarks.md
compares it with what it leaves out (python -m bench.table2).
"""

import ml_collections

from configs import puppet_ndpo, puppet_sft

MORE = 160  # steps of a later SFT stage


def _sft(name: str) -> dict:
    return {"name": name, "steps": MORE, "stages": ((MORE, ((33, 8),)),), "tasks": ((MORE, puppet_sft.ALL),),
            "learning_rates": ((MORE, 1e-3),)}  # fmt: skip


def _unlearn(issue: str) -> dict:
    keys = ("objective", "beta", "inter_task_ema", "steps", "stages", "learning_rates", "beta1", "beta2",
            "warmup_steps")  # fmt: skip
    cfg = puppet_ndpo.get_config()
    return {"name": issue, "issue": issue, **{key: cfg[key] for key in keys}}


def get_config() -> ml_collections.ConfigDict:
    cfg = puppet_sft.get_config()
    cfg.cycle = (
        {"name": "sft"}, _unlearn("lips"), _sft("sft"), _unlearn("identity"), _sft("sft"),
    )  # fmt: skip
    cfg.review = {"clips": 48, "batch": 8, "judge": "metrics", "share": 0.25, "task": "i2v"}
    return cfg
