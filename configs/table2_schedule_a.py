"""Table 2, schedule A: tasks from easy to hard, lip sync first.

python train.py --config configs/table2_schedule_a.py --workdir runs/table2_schedule_a
python -m bench.table2 --out runs/table2 --rows schedule_a     trains it for several seeds, and scores it

Everything else is puppet_full_cycle.py.
"""

import ml_collections

from configs import puppet_full_cycle, puppet_sft


def get_config() -> ml_collections.ConfigDict:
    cfg = puppet_full_cycle.get_config()
    cfg.tasks = (
        (160, (("lipsync", 1.0),)),
        (320, (("lipsync", 0.3), ("flf2v", 0.7))),
        (480, puppet_sft.ALL),
    )
    return cfg
