"""Table 2, without EMA: no moving average, neither between tasks nor at the end.

python train.py --config configs/table2_no_ema.py --workdir runs/table2_no_ema
python -m bench.table2 --out runs/table2 --rows no_ema     trains it for several seeds, and scores it

Everything else is puppet_full_cycle.py.
"""

import ml_collections

from configs import puppet_full_cycle


def get_config() -> ml_collections.ConfigDict:
    cfg = puppet_full_cycle.get_config()
    cfg.ema_decay, cfg.inter_task_ema = 0.0, False
    return cfg
