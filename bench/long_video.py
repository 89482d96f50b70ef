"""Videos of a minute in every long form, on held-out puppets: python -m bench.long_video [--clips 8] [--seconds 60]

Puppets sit still and the camera does not move, so that every change but the mouth's is an error; with --moving they do
as their prompts say, and whether they do is a column. For each form: seam error (how much larger the error of the
change between frames is at the edges of windows than where other latent frames begin), colour drift of the background
since the beginning, and sync in the first and in the last 10 s. A form may be followed by one of `CHANGES`: "cfg, fresh
noise".
"""

import dataclasses
import json
import sys
import time

import numpy as np

from emv3_jax import command_line, media
from emv3_jax.config import DEMO, FPS
from emv3_jax.diffusion.long_video import NOISES
from emv3_jax.errors import UserError
from emv3_jax.options import LONG_FORMS, SamplingOptions
from emv3_jax.pipeline import Pipeline, Request, load_pipeline
from emv3_jax.puppets import clips, metrics, prompts, world
from emv3_jax.render import HANDED_ON
from emv3_jax.request import scaled

FIRST_CLIP = 3000  # numbers that no other benchmark uses
MATCHED = "colours matched"  # Request.match_colours
CHANGES: dict[str, dict[str, str]] = {MATCHED: {}, **{f"{noise} noise": {"noise": noise} for noise in NOISES}}


def still_clip(number: int, frames: int) -> clips.Clip:
    """A held-out puppet that speaks and does nothing else."""
    clip = clips.make_clip("heldout", number, frames)
    pose = world.pose_clip(clip.mouth, "still", clip.expression, "fixed", np.zeros(0))
    prompt = prompts.make_prompt("still", clip.expression, "fixed", world.generator("heldout", "bench", number))
    return dataclasses.replace(clip, motion="still", camera="fixed", pose=pose, prompt=prompt)


def piece(clip: clips.Clip, frames: slice | np.ndarray) -> clips.Clip:
    """Some frames of a clip."""
    pose = world.Pose(**{name: getattr(clip.pose, name)[frames] for name in world.Pose.__dataclass_fields__})
    return dataclasses.replace(clip, pose=pose, mouth=clip.mouth[frames])


def seams(form: str, frames: int, options: SamplingOptions) -> list[int]:
    """Video frames at which a window begins or ends."""
    length = options.window or DEMO.max_frames
    if form == "chained":
        starts = range(length - HANDED_ON, frames, length - HANDED_ON)
        return [frame for start in starts for frame in (start, start + HANDED_ON) if frame < frames]
    windows = options.windows(DEMO.vae.latent_frames(frames), length)
    return sorted({4 * k - 3 for k in (*windows.starts[1:], *windows.ends[:-1])})


def measure(video: np.ndarray, clip: clips.Clip, at: list[int]) -> dict[str, float]:
    """The measures of one video in [-1, 1]."""
    ten = 10 * FPS
    ends = range(ten, len(video) + 1, ten)
    both = [np.r_[:10, end - 10 : end] for end in ends]
    drifts = [metrics.background_drift(video[frames], piece(clip, frames)) for frames in both]
    parts = {"first": (1, ten), "last": (len(video) - ten, len(video))}
    syncs = {
        f"sync, {name} 10 s": metrics.sync(
            metrics.mouth_height(video[a:b], piece(clip, slice(a, b))), clip.mouth[a:b, 0]
        )[0]
        for name, (a, b) in parts.items()
    }  # fmt: skip
    return {
        "seam error": metrics.seam_error(video, clip, at, every=DEMO.vae.temporal_factor),
        "drift after 10 s": drifts[0],
        "drift at the end": drifts[-1],
        "drift per 10 s": float(np.polyfit(np.arange(1, len(drifts) + 1), drifts, 1)[0]) if len(drifts) > 1 else 0.0,
        **syncs,
    }


def generate(pipe: Pipeline, clip: clips.Clip, options: SamplingOptions, seed: int, match: bool) -> np.ndarray:
    """The video [F, H, W, 3] in [-1, 1]."""
    portrait = media.to_uint8(np.asarray(piece(clip, slice(0, 1)).render(DEMO.height))[0])
    request = Request(
        image=portrait, audio=clip.wave, prompt=clip.prompt, frames=len(clip.mouth), seed=seed, match_colours=match
    )
    return scaled(pipe.generate(request, options).frames)


def main(arguments: list[str]) -> int:
    """The command line."""
    parser = command_line.Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--seconds", type=int, default=60)
    names = [*LONG_FORMS, *(f"{form}, {change}" for form in LONG_FORMS for change in CHANGES)]
    parser.add_argument("--forms", nargs="+", choices=names, default=["none", "chained", "released", "cfg"])
    parser.add_argument("--moving", action="store_true", help="puppets that move as others do")
    parser.add_argument("--overlap", type=int, default=8, help="latent frames")
    parser.add_argument("--json", help="also write the numbers of every clip here")
    args = parser.parse_args(arguments)
    if args.clips < 1 or args.seconds < 10 or args.seconds % 4:
        raise UserError("--clips must be 1 or more, --seconds a multiple of 4 above 10")
    pipe = load_pipeline("demo")
    frames = args.seconds * FPS + 1
    rows: dict[str, list[dict[str, float]]] = {}
    for name in args.forms:
        form, _, change = name.partition(", ")
        options = SamplingOptions(long_video=form, overlap=args.overlap, **CHANGES.get(change, {}))
        started = time.monotonic()
        for k in range(args.clips):
            clip = (
                clips.make_clip("heldout", FIRST_CLIP + k, frames)
                if args.moving
                else still_clip(FIRST_CLIP + k, frames)
            )
            video = generate(pipe, clip, options, seed=k, match=change == MATCHED)
            row = measure(video, clip, seams(form, frames, options))
            if args.moving:
                row["motion right"] = metrics.score_clip(video, clip)["motion"]
            rows.setdefault(name, []).append(row)
        means = {key: np.mean([row[key] for row in rows[name]]) for key in rows[name][0]}
        if name == args.forms[0]:
            print("| form | " + " | ".join(means) + " | s a video |\n" + "| --- " * (len(means) + 2) + "|")
        took = (time.monotonic() - started) / args.clips
        if args.json:
            with media.atomic_path(args.json) as path:
                path.write_text(json.dumps(rows, indent=1))
        print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in means.values()) + f" | {took:.0f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(command_line.run_main(main))
