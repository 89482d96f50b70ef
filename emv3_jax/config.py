"""Sizes of every model, and the presets that name them.

Configs are frozen dataclasses: hashable, so they can be static arguments of a jitted function. Derived values are
properties. Experiments (learning rates, schedules, paths) live in `configs/`, not here.
"""

import dataclasses

FPS = 25  # video frames a second
RATE = 16_000  # sound samples a second, mono

# Per-channel statistics of the released VAE's latents (SPEC section 3).
WAN_LATENT_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
                   0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)  # fmt: skip
WAN_LATENT_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
                  3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Wan 2.1 causal video VAE: 8x in space, 4x in time, frame 0 alone."""

    width: int = 96
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    res_blocks: int = 2
    latent_channels: int = 16
    temporal_down: tuple[bool, ...] = (False, True, True)  # which of the spatial halvings also halve time
    latent_mean: tuple[float, ...] = WAN_LATENT_MEAN
    latent_std: tuple[float, ...] = WAN_LATENT_STD

    @property
    def spatial_factor(self) -> int:
        return 2 ** (len(self.multipliers) - 1)

    @property
    def temporal_factor(self) -> int:
        return 2 ** sum(self.temporal_down)

    def latent_frames(self, frames: int) -> int:
        """Of a video of 4k + 1 frames."""
        return (frames - 1) // self.temporal_factor + 1

    def video_frames(self, latent_frames: int) -> int:
        return (latent_frames - 1) * self.temporal_factor + 1


@dataclasses.dataclass(frozen=True)
class AudioWindowConfig:
    """Flash: a window of video frames around each latent frame becomes a fixed number of audio tokens (SPEC 2)."""

    layers: int = 12  # of the audio encoder, all of which are heard
    hidden: int = 512
    tokens: int = 32  # per latent frame
    neighbours: int = 2  # video frames on either side


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Diffusion transformer with coupled-decoupled cross-attention (SPEC section 2).

    `audio_windows` says which variant it is: None is preview (one audio token per feature, face mask), otherwise flash
    (tokens made of windows of features, keys and values with a bias).
    """

    width: int = 1536
    heads: int = 12
    layers: int = 30
    ffn: int = 8960
    time_features: int = 256
    text_width: int = 4096
    text_len: int = 512
    image_width: int = 1280
    image_tokens: int = 257
    audio_width: int = 768
    audio_windows: AudioWindowConfig | None = None
    latent_channels: int = 16
    mask_channels: int = 4
    patch: tuple[int, int, int] = (1, 2, 2)
    rope_theta: float = 10000.0
    riflex: int = 0  # RIFLEx, for videos longer than trained: k, which temporal frequency is slowed down; 0 is off
    remat: str = ""  # what the backward pass of a block finds in memory: a key of models.dit.REMAT, or all of it
    dtype: str = "float32"  # of the matmuls; parameters, norms, modulation and softmax stay float32

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def in_channels(self) -> int:
        """Noisy latents, mask, masked-video latents, in this order."""
        return 2 * self.latent_channels + self.mask_channels


DIT_PREVIEW = DiTConfig()
DIT_FLASH = DiTConfig(audio_windows=AudioWindowConfig())


@dataclasses.dataclass(frozen=True)
class UMT5Config:
    """umT5 encoder."""

    vocab: int = 256384
    width: int = 4096
    attention_width: int = 4096
    heads: int = 64
    layers: int = 24
    ffn: int = 10240
    buckets: int = 32
    max_distance: int = 128


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """CLIP vision tower, read out one block before the last, without the final norm."""

    image_size: int = 224
    patch: int = 14
    width: int = 1280
    heads: int = 16
    layers: int = 32
    mlp_ratio: int = 4

    @property
    def tokens(self) -> int:
        return (self.image_size // self.patch) ** 2 + 1


@dataclasses.dataclass(frozen=True)
class Wav2Vec2Config:
    """wav2vec2-base speech encoder: 50 features a second of 16 kHz sound."""

    width: int = 768
    heads: int = 12
    layers: int = 12
    ffn: int = 3072
    conv_width: int = 512
    conv_kernels: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_strides: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    positional_taps: int = 128
    positional_groups: int = 16


@dataclasses.dataclass(frozen=True)
class Preset:
    """All the sizes of one pipeline, and how it was trained to read, see and hear."""

    name: str
    vae: VAEConfig
    dit: DiTConfig
    text: UMT5Config
    image: CLIPConfig
    height: int  # of its pictures; with `keep_proportions` only their area counts
    width: int
    max_frames: int  # longest clip in one piece
    audio: str  # key of conditioning.AUDIO_ENCODERS
    speech: Wav2Vec2Config | None = None  # the speech encoder, where the audio encoder is one
    vocabulary: tuple[str, ...] = ()  # of the word tokenizer; none: umT5's own tokenizer, from the weights' folder
    keep_proportions: bool = False  # pictures keep their proportions instead of becoming height x width
    # Sizes are compiled for, so they are rounded: sides of pictures (0: as released, down to multiples of 16), and
    # latent frames of videos of one window, whose surplus is cut off again.
    side_step: int = 0
    latent_step: int = 1
    phda: bool = False  # trained with PhDA weights (paper eq. 2)
    fit: str = "crop"  # how a picture gets its size (media.fit_image)
    # A face box: False, it goes where the picture goes, and all tokens that it touches count; True, as released, height
    # and width are scaled by one factor, and both ends rounded down.
    face_floored: bool = False
    # Where a sound is shorter than its video: True, silence follows; False, the video ends with the sound, and a speech
    # encoder hears no silence after it, so that the last feature is missing.
    fill_silence: bool = True
    whole_chunks: bool = True  # chained long videos: the last chunk is as long as the others, or ends with the video


# The words of the puppets' grammar (puppets/prompts.py), in the order that the demo's text encoder has learnt.
PUPPET_WORDS = tuple((
    "a and angry calm camera does from frowns hand happy head in is its keeps looks move nodding nods not "
    "puppet sad shakes shaking side sits slow slowly smiles speaks still surprised swaying sways talks the to "
    "turns waves waving zoom zooms . ,"
).split())  # fmt: skip

DEMO = Preset(
    name="demo",
    vae=VAEConfig(width=16, res_blocks=1, latent_mean=(0.0,) * 16, latent_std=(1.0,) * 16),
    dit=DiTConfig(
        width=160, heads=5, layers=6, ffn=480, time_features=64, text_width=64, text_len=24, image_width=64,
        image_tokens=17, audio_width=80,
    ),
    text=UMT5Config(vocab=47, width=64, attention_width=64, heads=4, layers=2, ffn=128),
    image=CLIPConfig(image_size=64, patch=16, width=64, heads=4, layers=3, mlp_ratio=2),
    height=64,
    width=64,
    max_frames=125,
    audio="log_mel",
    vocabulary=PUPPET_WORDS,
    phda=True,
)  # fmt: skip
PREVIEW = Preset(
    name="preview",
    vae=VAEConfig(),
    dit=DIT_PREVIEW,
    text=UMT5Config(),
    image=CLIPConfig(),
    height=768,
    width=768,
    max_frames=113,
    audio="wav2vec2",
    speech=Wav2Vec2Config(),
    keep_proportions=True,
    side_step=32,
    latent_step=4,
)
FLASH = dataclasses.replace(PREVIEW, name="flash", dit=DIT_FLASH, audio="wav2vec2_windows")
PRESETS = {preset.name: preset for preset in (DEMO, PREVIEW, FLASH)}


def released(preset: Preset) -> Preset:
    """The preset with the released program's quirks in place of what is right (SPEC section 3): pictures are stretched
    to the output size, by up to 15 pixels; a face box does not follow the stretching, and loses the tokens that its
    lower and right edge reach into; a video is never longer than its sound, after which nothing is heard; and the last
    chunk of a chained video is shortened to 4k + 1 frames, so that up to 3 are lost. Sizes are its own too."""
    return dataclasses.replace(
        preset, fit="stretch", face_floored=True, fill_silence=False, whole_chunks=False, side_step=0, latent_step=1
    )
