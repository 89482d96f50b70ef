"""Table 2, SFT only: no stage unlearns anything.

python train.py --config configs/table2_sft_only.py --workdir runs/table2_sft_only
python -m bench.table2 --out runs/table2 --rows sft_only     trains it for several seeds, and scores it

Everything else is puppet_full_cycle.py.
"""

import ml_collections

from configs import puppet_full_cycle


def get_config() -> ml_collections.ConfigDict:
    cfg = puppet_full_cycle.get_config()
    cfg.cycle = tuple(stage for stage in cfg.cycle if "objective" not in stage)
    return cfg
