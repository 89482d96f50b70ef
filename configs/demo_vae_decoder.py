"""A finer decoder for the demo's VAE: its encoder frozen, so that what a DiT has learnt fits.

python train.py --config configs/demo_vae_decoder.py --workdir runs/demo_vae_decoder

After configs/demo_vae.py and before configs/demo_dit.py, whose weights hold the whole VAE. About 18 minutes on 2 cores;
0.55 dB better on 32 held-out clips of 81 frames (29.78 to 30.33).
"""

import ml_collections

from configs import demo_vae
from emv3_jax.data.extract import VAE_ENCODER


def get_config() -> ml_collections.ConfigDict:
    cfg = demo_vae.get_config()
    cfg.init_from = "runs/demo_vae/weights"
    cfg.frozen = VAE_ENCODER
    cfg.stages = ((800, ((25, 64, 2), (65, 64, 1))),)
    cfg.motion_gain = 1.0  # the mouths have been learnt; what counts now is every pixel alike
    cfg.l2_weight = 30.0
    cfg.steps = 800
    cfg.learning_rates = ((800, 8e-4),)
    cfg.ema_decay = 0.995
    cfg.eval_every = 400
    return cfg
