"""Table 2, allocation B: text does not count in the early and the middle phase.

python train.py --config configs/table2_allocation_b.py --workdir runs/table2_allocation_b
python -m bench.table2 --out runs/table2 --rows allocation_b     trains it for several seeds, and scores it

Everything else is puppet_full_cycle.py.
"""

import ml_collections

from configs import puppet_full_cycle


def get_config() -> ml_collections.ConfigDict:
    cfg = puppet_full_cycle.get_config()
    cfg.phda.text = (500 / 3, 1000 / 3, 1.0, 0.0)
    return cfg
