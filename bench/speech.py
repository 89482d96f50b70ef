"""What the speech encoder needs for long sounds: python -m bench.speech [--seconds 30 120 600]

wav2vec2 at the released size, of preview and of flash, compiled for this machine and not run: the temporaries of the
convolutions and of the blocks, which run one after the other, and what the blocks give back.
"""

import argparse
import sys

import jax
import jax.numpy as jnp
import numpy as np

from emv3_jax import audio_preprocessing as audio
from emv3_jax.config import FPS, RATE, Wav2Vec2Config
from emv3_jax.models.wav2vec2 import Wav2Vec2, feature_count, sample_count


def row(seconds: int) -> str:
    """A row of the table, in GiB."""
    cfg, shape = Wav2Vec2Config(), jax.ShapeDtypeStruct
    params = jax.eval_shape(Wav2Vec2(cfg).init, jax.random.key(0), shape((1, RATE), jnp.float32))["params"]
    heard = audio.padded_length(feature_count(cfg, RATE * seconds))
    wave = shape((1, sample_count(cfg, heard)), jnp.float32)
    count = np.int32(0)

    def needs(lowered: jax.stages.Lowered) -> tuple[float, float]:
        memory = lowered.compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes / 2**30, memory.output_size_in_bytes / 2**30

    cells = [f"{needs(audio._convolve.lower(cfg, params, wave, count))[0]:.3f}"]
    for features, every_layer in ((heard, False), (audio.padded_length(FPS * seconds), True)):
        states = shape((1, features, cfg.conv_width), jnp.float32)
        cells += [f"{size:.3f}" for size in needs(audio._encode.lower(cfg, params, states, count, every_layer))]
    return f"| {seconds} s | {' | '.join(cells)} |"


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=int, nargs="+", default=[30, 120, 600])
    args = parser.parse_args()
    names = ("sound", "convolutions", "preview, blocks", "states", "flash, blocks", "states of all blocks")
    print(f"| {' | '.join(names)} |\n" + "| --- " * len(names) + "|")
    for seconds in args.seconds:
        print(row(seconds), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
