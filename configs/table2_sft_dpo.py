"""Table 2, SFT and paired DPO: each negative is paired with the true clip that it was made after.

python train.py --config configs/table2_sft_dpo.py --workdir runs/table2_sft_dpo
python -m bench.table2 --out runs/table2 --rows sft_dpo     trains it for several seeds, and scores it

Everything else is puppet_full_cycle.py.
"""

import ml_collections

from configs import puppet_full_cycle


def get_config() -> ml_collections.ConfigDict:
    cfg = puppet_full_cycle.get_config()
    cfg.cycle = tuple({**stage, "objective": "dpo"} if "objective" in stage else stage for stage in cfg.cycle)
    return cfg
