"""Table 2, schedule B: all tasks from the beginning.

python train.py --config configs/table2_schedule_b.py --workdir runs/table2_schedule_b
python -m bench.table2 --out runs/table2 --rows schedule_b     trains it for several seeds, and scores it

Everything else is puppet_full_cycle.py.
"""

import ml_collections

from configs import puppet_full_cycle, puppet_sft


def get_config() -> ml_collections.ConfigDict:
    cfg = puppet_full_cycle.get_config()
    cfg.tasks = ((puppet_sft.STEPS, puppet_sft.ALL),)
    return cfg
