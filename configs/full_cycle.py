"""The whole of the paper's training: SFT over the soup of tasks, and Negative DPO and SFT in turn, an issue at a time.

python train.py --config configs/full_cycle.py --workdir runs/full_cycle

Data and weights as for sft_1b.py. Before every Negative DPO stage the run makes clips, each process its part of
them, and stops: look at them with the command that it prints, then give this one again. Its twin for a laptop is
puppet_full_cycle.py, where measures judge.
"""

import ml_collections

from configs import ndpo, sft_1b

MORE = 3000  # steps of a later SFT stage


def _sft() -> dict:
    return {"name": "sft", "steps": MORE, "stages": ((MORE, ((113, sft_1b.CLIPS),)),), "tasks": ((MORE, sft_1b.ALL),),
            "learning_rates": ((MORE, 5e-5),), "warmup_steps": 100}  # fmt: skip


def _unlearn(issue: str) -> dict:
    keys = ("objective", "beta", "steps", "stages", "learning_rates", "beta1", "warmup_steps", "ema_decay",
            "inter_task_ema", "eval_every", "checkpoint_every")  # fmt: skip
    cfg = ndpo.get_config()
    return {"name": issue, "issue": issue, **{key: cfg[key] for key in keys}}


def get_config() -> ml_collections.ConfigDict:
    cfg = sft_1b.get_config()
    cfg.cycle = ({"name": "sft"}, _unlearn("identity"), _sft(), _unlearn("colour"), _sft())
    cfg.review = {"clips": 200, "batch": 1, "judge": "person", "share": 0.25, "task": "i2v"}
    return cfg
