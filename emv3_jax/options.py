"""How a velocity is followed: the sampling section of a config, checked; and the values that each preset has."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from emv3_jax.diffusion import guidance, long_video, solvers
from emv3_jax.diffusion.flow import T_MAX, TimeGrid
from emv3_jax.diffusion.long_video import Windows
from emv3_jax.diffusion.negatives import Negatives
from emv3_jax.diffusion.step_cache import StepCache
from emv3_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class LongForm:
    """How windows of a long video lie, are blended and share their noise (a key of long_video.NOISES); `alone`: they
    hear nothing from outside themselves."""

    plan: Callable[[int, int, int], Windows] = long_video.plan
    blend: long_video.Blend = long_video.long_video_cfg
    noise: str = "fresh"
    overlaps: bool = True
    alone: bool = False


# "chained" makes one window after another, each of which goes on from the last frames of the one before.
LONG_FORMS = {
    "cfg": LongForm(noise="repeated"),
    "chained": LongForm(),
    "released": LongForm(long_video.released_plan, long_video.released_blend, alone=True),
    "none": LongForm(overlaps=False),
}
OPEN = {"long_video": "cfg", "neg_growth": "steady"}  # what an empty value stands for
# Where a preset differs from the defaults of SamplingOptions: the values of the released demos (those of the newest
# demo, where demos differ). configs/NAME.py says all of them, with comments.
PRESET_VALUES: dict[str, dict[str, Any]] = {
    "preview": {
        "steps": 25,
        "shift": 5.0,
        "text_scale": 4.0,
        "audio_scale": 2.9,
        "text_dynamic": True,
        "audio_dynamic": True,
        "negative_prompt": (
            "Gesture is bad. Gesture is unclear. Strange and twisted hands. Bad hands. Bad fingers. Unclear and blurry "
            "hands. 手部快速摆动, 手指频繁抽搐, 夸张手势, 重复机械性动作."
        ),
        "neg_scale": 1.5,
        "neg_steps": 2,
        "noise": "fresh",
    },
    "flash": {
        "sampler": "unipc", "steps": 8, "shift": 5.0, "audio_scale": 3.0, "cache_threshold": 0.1, "noise": "fresh"
    },
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How the velocity is followed. The defaults are the demo's; `for_preset` gives those of the others.

    sampler: a key of solvers.SAMPLERS. steps: of the solver. shift: of the time grid (SPEC 4). text_scale, audio_scale:
    guidance; 1 is none. text_dynamic, audio_dynamic: that scale falls to its half on the way (dynamic CFG, SPEC 4).
    cfg_skip_ratio: the last steps, this share of all, go without guidance.
    negative_prompt: what guidance by text moves away from (with a text_scale of 1 nothing does); the demo was trained
    with the empty one. negative_motion, negative_detail, negative_low, negative_high (its bounds), neg_scale,
    neg_steps, neg_growth (a key of negatives.GROWTHS; empty: steady): see `negatives.Negatives`.
    cache_threshold: TeaCache, 0 is off; cache_start: steps that are always computed.
    long_video: a key of LONG_FORMS, for videos longer than a window; empty: cfg. window: video frames of one, 4k + 1; 0
    is the longest clip of the preset. overlap: latent frames that neighbouring windows share. noise: a key of
    long_video.NOISES; empty: the form's.
    windows_together: how many windows are one batch; 0: as many as the device has memory for. branches_together:
    guidance branches as one batch, or one after another in the memory of one.
    """

    sampler: str = "flow"
    steps: int = 12
    shift: float = 3.0
    text_scale: float = 1.0
    audio_scale: float = 2.0
    text_dynamic: bool = False
    audio_dynamic: bool = False
    cfg_skip_ratio: float = 0.0
    negative_prompt: str = ""
    negative_motion: str = ""
    negative_detail: str = ""
    negative_low: float = T_MAX / 3
    negative_high: float = T_MAX * 2 / 3
    neg_scale: float = 1.0
    neg_steps: int = 0
    neg_growth: str = "steady"
    cache_threshold: float = 0.0
    cache_start: int = 5
    long_video: str = "cfg"
    window: int = 0
    overlap: int = 8
    noise: str = ""
    windows_together: int = 0
    branches_together: bool = True

    def __post_init__(self):
        solvers.sampler_named(self.sampler)
        if self.steps < 1:
            raise UserError(f"steps must be at least 1, got {self.steps}")
        for name in ("text_scale", "audio_scale"):
            if not np.isfinite(getattr(self, name)) or getattr(self, name) < 0:
                raise UserError(f"{name} must be a number of 0 or more, got {getattr(self, name)}")
        if not np.isfinite(self.shift) or self.shift <= 0:
            raise UserError(f"shift must be a number above 0, got {self.shift}")
        guidance.skipped_guidance(self.cfg_skip_ratio, self.steps)
        for name, value in OPEN.items():  # a config may leave them open
            object.__setattr__(self, name, getattr(self, name) or value)
        if self.long_video not in LONG_FORMS:
            raise UserError(f"there is no form of long video {self.long_video!r}: one of {', '.join(LONG_FORMS)}")
        if self.noise and self.noise not in long_video.NOISES:
            raise UserError(f"there is no noise {self.noise!r}: one of {', '.join(long_video.NOISES)}")
        if self.long_video == "released" and self.sampler != "flow":
            raise UserError("the released long video needs the sampler flow, which has no memory; cfg works with all")
        if self.window and (self.window < 5 or self.window % 4 != 1):
            raise UserError(f"window must be 4k + 1 frames and at least 5, got {self.window}")
        if self.overlap < 0:
            raise UserError(f"overlap must be 0 or more latent frames, got {self.overlap}")
        if self.windows_together < 0:
            raise UserError(f"windows_together must be 0 or more, got {self.windows_together}")
        _ = self.negatives, self.cache, self.solver  # refuse what they refuse

    @classmethod
    def for_preset(cls, name: str, **changes: Any) -> "SamplingOptions":
        """The options of a preset by name (PRESET_VALUES; presets of one's own have the defaults), with changes."""
        return cls(**{**PRESET_VALUES.get(name, {}), **changes})

    @property
    def scales(self) -> tuple[guidance.Scale, guidance.Scale]:
        """Of text and audio: numbers, or tables with one number a step."""
        pairs = (self.text_scale, self.text_dynamic), (self.audio_scale, self.audio_dynamic)
        text, audio = (guidance.dynamic_scale(scale, self.steps) if falls else scale for scale, falls in pairs)
        return text, audio

    @property
    def negatives(self) -> Negatives:
        return Negatives(
            self.negative_prompt,
            self.negative_motion,
            self.negative_detail,
            bounds=(self.negative_low, self.negative_high),
            scale=self.neg_scale,
            steps=self.neg_steps,
            growth=self.neg_growth,
        )

    @property
    def unused_negatives(self) -> list[str]:
        """Names of the options of negative prompts that are set, where guidance has no branch that takes them."""
        if not guidance.branches(*self.scales)[0].prompt:
            return []
        words = [name for name in ("negative_prompt", "negative_motion", "negative_detail") if getattr(self, name)]
        return words + (["neg_scale"] if self.neg_scale != 1 else [])

    @property
    def cache(self) -> StepCache | None:
        return StepCache(self.cache_threshold, self.cache_start) if self.cache_threshold else None

    @property
    def long_form(self) -> LongForm:
        return LONG_FORMS[self.long_video]

    @property
    def noise_name(self) -> str:
        """A key of long_video.NOISES."""
        return self.noise or self.long_form.noise

    @property
    def grid(self) -> TimeGrid:
        return solvers.make(self.sampler, self.steps, self.shift)[0]

    @property
    def solver(self) -> solvers.Solver:
        return solvers.make(self.sampler, self.steps, self.shift)[1]

    def noises(self, frames: np.ndarray, windows: Windows, seed: int) -> np.ndarray:
        """Numbers of the noises that latent frames [k] of a video begin with."""
        return long_video.NOISES[self.noise_name](frames, windows.stride, seed)

    def windows(self, latent_frames: int, longest: int) -> Windows:
        """The windows of a video; longest: video frames of the preset's longest clip."""
        size = ((self.window or longest) - 1) // 4 + 1
        return self.long_form.plan(latent_frames, size, self.overlap if self.long_form.overlaps else 0)
