"""Table 2, allocation C: the image does not count in the early phase.

python train.py --config configs/table2_allocation_c.py --workdir runs/table2_allocation_c
python -m bench.table2 --out runs/table2 --rows allocation_c     trains it for several seeds, and scores it

Everything else is puppet_full_cycle.py.
"""

import ml_collections

from configs import puppet_full_cycle


def get_config() -> ml_collections.ConfigDict:
    cfg = puppet_full_cycle.get_config()
    cfg.phda.image = (500.0, 2000 / 3, 1.0, 0.0)
    return cfg
