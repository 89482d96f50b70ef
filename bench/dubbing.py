"""Puppet videos dubbed with another voice: python -m bench.dubbing [--clips 8] [--frames 121]

The true video of a held-out puppet is written as an mp4 file, and lip sync gives it the voice of another clip, in a box
that holds its mouth in every frame. Sync of the new mouth with the new voice, beside the same voice with I2V; and
whether the pixels outside the box are those of the file.
"""

import argparse
import dataclasses
import pathlib
import sys
import tempfile

import numpy as np

from emv3_jax import media
from emv3_jax.config import DEMO
from emv3_jax.pipeline import Pipeline, Request, load_pipeline
from emv3_jax.puppets import clips, metrics
from emv3_jax.puppets.requests import mouth_region
from emv3_jax.request import scaled

FIRST_CLIP, OTHER_VOICE = 4000, 4100  # numbers that no other benchmark uses


def sync_of(frames: np.ndarray, clip: clips.Clip) -> float:
    """Sync of uint8 frames with the clip's voice."""
    heights = metrics.mouth_height(scaled(frames), clip)
    return metrics.sync(heights[1:], clip.mouth[1:, 0])[0]


def dub(pipe: Pipeline, number: int, frames: int, folder: pathlib.Path) -> tuple[float, float, bool]:
    """Sync of the dubbed video and of I2V with the same voice, and whether all other pixels stayed."""
    clip = clips.make_clip("heldout", FIRST_CLIP + number, frames)
    other = clips.make_clip("heldout", OTHER_VOICE + number, frames)
    pose = dataclasses.replace(clip.pose, mouth_height=other.mouth[:, 0], mouth_width=other.mouth[:, 1])
    wanted = dataclasses.replace(clip, wave=other.wave, mouth=other.mouth, pose=pose)
    true, path = media.to_uint8(np.asarray(clip.render(DEMO.height))), folder / f"{number}.mp4"
    with media.VideoWriter(path, *true.shape[1:3], crf=1) as writer:
        writer.write(true)
    inside = mouth_region(clip, DEMO.height, DEMO.width).any(axis=0)
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    y1, y2, x1, x2 = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    asked = Request(
        task="lipsync", video=path, mouth=(y1, y2, x1, x2), audio=other.wave, prompt=clip.prompt, seed=number
    )
    made = pipe.generate(asked).frames
    source = np.stack(list(media.VideoSource(path).frames()))
    outside = np.ones(source.shape[1:3], bool)
    outside[y1:y2, x1:x2] = False
    again = Request(image=true[0], audio=other.wave, prompt=clip.prompt, frames=frames, seed=number)
    return sync_of(made, wanted), sync_of(pipe.generate(again).frames, wanted), bool((made == source)[:, outside].all())


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--frames", type=int, default=121)
    args = parser.parse_args()
    pipe = load_pipeline("demo")
    with tempfile.TemporaryDirectory() as folder:
        rows = [dub(pipe, k, args.frames, pathlib.Path(folder)) for k in range(args.clips)]
    dubbed, image, same = (list(column) for column in zip(*rows, strict=True))
    print("| | sync |\n| --- | --- |")
    print(f"| dubbed, mean of {args.clips} | {np.mean(dubbed):.3f} |\n| I2V, the same voices | {np.mean(image):.3f} |")
    print(f"\npixels outside the box are those of the file in {sum(same)} of {len(same)} videos")
    return 0


if __name__ == "__main__":
    sys.exit(main())
