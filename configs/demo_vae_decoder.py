"""A finer decoder for the demo's VAE: its encoder frozen, plain squared error, so that what a DiT has learnt still fits.

python train.py --config configs/demo_vae_decoder.py --workdir runs/demo_vae_decoder

After configs/demo_vae.py, before or after configs/demo_dit.py.
"""

import ml_collections

from configs import demo_vae


def get_config() -> ml_collections.ConfigDict:
    cfg = demo_vae.get_config()
    cfg.init_from = "runs/demo_vae/weights"
    cfg.frozen = ("encoder", "to_moments")
    cfg.stages = ((1200, ((25, 64, 2), (65, 64, 1))),)
    cfg.motion_gain = 1.0  # the mouths have been learnt; what counts now is every pixel alike
    cfg.l2_weight = 30.0
    cfg.steps = 1200
    cfg.learning_rates = ((1200, 8e-4),)
    cfg.ema_decay = 0.995
    cfg.eval_every = 300
    return cfg
