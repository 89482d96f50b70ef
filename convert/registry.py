"""Every model that can be converted, the ways its torch keys are named, and how to tell which one a file is."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flax import traverse_util

from convert import clip, dit, names_diffusers, names_huggingface, umt5, vae, wav2vec2
from convert.engine import parameter_shapes
from convert.rules import Table
from convert.sources import Source, Spec, TiedTensors
from emv3_jax.config import (
    DIT_FLASH,
    DIT_PREVIEW,
    PRESETS,
    CLIPConfig,
    DiTConfig,
    UMT5Config,
    VAEConfig,
    Wav2Vec2Config,
)
from emv3_jax.errors import UserError

Shapes = Mapping[str, tuple[int, ...]]
GUESSED = ("heads", "audio_windows.layers")  # by `read_config`: these sizes do not show in shapes
PARTS = ("vae", "dit", "text", "image", "speech")  # of presets that are models
SURE = 0.5  # share of a model's rules that a file must fill to be taken for that model


@dataclasses.dataclass(frozen=True)
class Naming:
    """One family of torch keys. `forms`: what distinguishes its files from one another -> the table of such files.

    The first form is the one that is written where nothing else is known. `tied`: (key, other key) of one tensor.
    """

    name: str
    forms: Mapping[str, Callable[[Any], Table]]
    tied: tuple[str, str] | None = None

    def table(self, cfg: Any, form: str | None = None) -> Table:
        """The table of a form, by default the first."""
        first = next(iter(self.forms.values()))
        return first(cfg) if form is None else self.forms.get(form, first)(cfg)

    def prepare(self, source: Source) -> Source:
        """`source`, with a tensor that has two names under one of them."""
        return TiedTensors(source, *self.tied) if self.tied and self.tied[1] in source.header else source


@dataclasses.dataclass(frozen=True)
class Model:
    """One model. `cfg`: the released sizes.

    read_sizes: parameter shapes -> config fields that show in them; the number of heads, for one, does not.
    bases: models whose weights may lie under a partial checkpoint of this one, besides its own.
    other_keys: configs whose torch keys are others than those of the released sizes, to recognise files by.
    """

    name: str
    title: str
    cfg: Any
    namings: tuple[Naming, ...]
    target_tree: Callable[[Any], dict]
    read_sizes: Callable[[Shapes, Any], dict[str, Any]]
    bases: tuple[str, ...] = ()
    other_keys: tuple[Any, ...] = ()

    def naming(self, name: str | None = None) -> Naming:
        """A naming, by default the released one; raises UserError where the model has no such form."""
        for naming in self.namings:
            if name in (None, naming.name):
                return naming
        names = ", ".join(naming.name for naming in self.namings)
        raise UserError(f"{self.name} has no {name} naming: choose {names}")

    def tree(self, cfg: Any) -> dict:
        """The parameter tree of a config; raises UserError where no model has these sizes."""
        try:
            return self.target_tree(cfg)
        except (ValueError, TypeError, AssertionError, ArithmeticError, IndexError) as error:
            line = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise UserError(f"no {self.name} has these sizes: {cfg} ({line})") from error


def _sizes(shapes: Shapes, **places: tuple[str, int]) -> dict[str, Any]:
    """Field -> size, for every field whose (parameter, axis) is there."""
    return {field: shapes[path][axis] for field, (path, axis) in places.items() if path in shapes}


def _dit_sizes(shapes: Shapes, cfg: DiTConfig) -> dict[str, Any]:
    sizes = _sizes(
        shapes,
        width=("patch_embedding/kernel", -1),
        layers=("blocks/mlp/up/kernel", 0),
        ffn=("blocks/mlp/up/kernel", -1),
        time_features=("time_embedding/up/kernel", 0),
        text_width=("text_embedding/up/kernel", 0),
        image_width=("image_embedding/norm_in/scale", 0),
        audio_width=("audio_tokens/proj/kernel", 0),
    )
    windows = cfg.audio_windows
    if windows is not None and "width" in sizes:
        windowed = _sizes(shapes, hidden=("audio_tokens/out/kernel", 0), tokens=("audio_tokens/out/kernel", -1))
        if "tokens" in windowed:
            windowed["tokens"] //= sizes["width"]
        if frame := _sizes(shapes, width=("audio_tokens/first_in/kernel", 0)):
            # Layers and width of the audio encoder only show as their product; a width that is not released is odder.
            layers, rest = divmod(frame["width"] // (2 * windows.neighbours + 1), cfg.audio_width)
            if rest or not layers:
                layers, sizes["audio_width"] = 1, frame["width"] // (2 * windows.neighbours + 1)
            windowed["layers"] = layers
        sizes["audio_windows"] = dataclasses.replace(windows, **windowed)
    return _with_heads(sizes, cfg)


def _vae_sizes(shapes: Shapes, cfg: VAEConfig) -> dict[str, Any]:
    return _sizes(shapes, width=("encoder/conv_in/kernel", -1), latent_channels=("from_latents/kernel", 0))


def _umt5_sizes(shapes: Shapes, cfg: UMT5Config) -> dict[str, Any]:
    return _sizes(
        shapes,
        vocab=("tokens/embedding", 0),
        width=("tokens/embedding", 1),
        attention_width=("blocks/attention/q/kernel", -1),
        heads=("blocks/attention/position_bias", -1),
        buckets=("blocks/attention/position_bias", -2),
        layers=("blocks/ffn/gate/kernel", 0),
        ffn=("blocks/ffn/gate/kernel", -1),
    )


def _clip_sizes(shapes: Shapes, cfg: CLIPConfig) -> dict[str, Any]:
    """Of the blocks that the table lets through; the last one of a whole file is not among them."""
    sizes = _sizes(
        shapes,
        width=("pre_norm/scale", 0),
        patch=("patch_embedding/kernel", 0),
        layers=("blocks/mlp/up/kernel", 0),
        mlp_ratio=("blocks/mlp/up/kernel", -1),
        image_size=("position_embedding", 0),
    )
    if "layers" in sizes:
        sizes["layers"] += 1
    if "width" in sizes and "mlp_ratio" in sizes:
        sizes["mlp_ratio"] //= sizes["width"]
    if "patch" in sizes and "image_size" in sizes:
        sizes["image_size"] = round((sizes["image_size"] - 1) ** 0.5) * sizes["patch"]
    return _with_heads(sizes, cfg)


def _wav2vec2_sizes(shapes: Shapes, cfg: Wav2Vec2Config) -> dict[str, Any]:
    sizes = _sizes(
        shapes,
        width=("encoder/proj/kernel", -1),
        layers=("encoder/blocks/mlp/up/kernel", 0),
        ffn=("encoder/blocks/mlp/up/kernel", -1),
        conv_width=("features/conv0/kernel", -1),
        positional_taps=("encoder/positions/v", 0),
        positional_groups=("encoder/positions/v", 1),
    )
    if "width" in sizes and "positional_groups" in sizes:
        sizes["positional_groups"] = sizes["width"] // sizes["positional_groups"]
    kernels = [shapes[path][0] for i in range(99) if (path := f"features/conv{i}/kernel") in shapes]
    if len(kernels) == len(cfg.conv_kernels):  # strides do not show, so another number of layers cannot be guessed
        sizes["conv_kernels"] = tuple(kernels)
    return _with_heads(sizes, cfg)


def _with_heads(sizes: dict[str, Any], cfg: Any) -> dict[str, Any]:
    """Adds a number of heads that keeps the released head width: no shape depends on it, but a model needs one."""
    if "width" in sizes:
        sizes["heads"] = max(1, sizes["width"] // (cfg.width // cfg.heads))
        if sizes["width"] % sizes["heads"]:
            sizes["heads"] = 1
    return sizes


def _base_tree(cfg: DiTConfig) -> dict:
    """The preview transformer's tree without what hears."""
    flat = traverse_util.flatten_dict(dit.target_tree(dataclasses.replace(cfg, audio_windows=None)), sep="/")
    kept = {path: leaf for path, leaf in flat.items() if not path.startswith(("audio_tokens/", "cross_kv/audio/"))}
    return traverse_util.unflatten_dict(kept, sep="/")


_WAV2VEC2_FORMS = {
    "without prefix, parametrizations": lambda cfg: wav2vec2.table(cfg),
    "without prefix, weight_g": lambda cfg: wav2vec2.table(cfg, weight_norm="g_v"),
    "wav2vec2., parametrizations": lambda cfg: wav2vec2.table(cfg, wav2vec2.PREFIX),
    "wav2vec2., weight_g": lambda cfg: wav2vec2.table(cfg, wav2vec2.PREFIX, "g_v"),
}
_HF_CLIP_FORMS = {
    "vision_model.": lambda cfg: names_huggingface.clip_table(cfg),
    "without prefix": lambda cfg: names_huggingface.clip_table(cfg, prefix=""),
}
_CLIP_FORMS = {
    "visual.": lambda cfg: clip.table(cfg, clip.RELEASED_PREFIX),
    "without prefix": lambda cfg: clip.table(cfg),
}

MODELS = {
    model.name: model
    for model in (
        Model(
            "dit-preview", "EchoMimicV3 preview transformer", DIT_PREVIEW,
            (Naming("released", {"": lambda cfg: dit.PREVIEW}),),
            dit.target_tree, _dit_sizes, bases=("dit-base",),
        ),
        Model(
            "dit-flash", "EchoMimicV3 flash transformer", DIT_FLASH,
            (Naming("released", {"": lambda cfg: dit.FLASH}),),
            dit.target_tree, _dit_sizes, bases=("dit-base",),
        ),
        Model(
            "dit-base", "Wan-Fun base transformer, without audio", DIT_PREVIEW,
            (
                Naming("released", {"": lambda cfg: dit.BASE}),
                Naming("diffusers", {"": names_diffusers.dit_table}),
            ),
            _base_tree, _dit_sizes,
        ),
        Model(
            "vae", "Wan 2.1 video VAE", VAEConfig(),
            (Naming("released", {"": vae.table}), Naming("diffusers", {"": names_diffusers.vae_table})),
            vae.target_tree, _vae_sizes, other_keys=tuple(VAEConfig(res_blocks=count) for count in (1, 3, 4)),
        ),
        Model(
            "umt5", "umT5-XXL text encoder", UMT5Config(),
            (
                Naming("released", {"": lambda cfg: umt5.TABLE}),
                Naming(
                    "huggingface", {"": names_huggingface.umt5_table},
                    tied=(names_huggingface.EMBEDDING, names_huggingface.EMBEDDING_COPY),
                ),
            ),
            umt5.target_tree, _umt5_sizes,
        ),
        Model(
            "clip", "CLIP ViT-H/14 vision tower", CLIPConfig(),
            (Naming("released", _CLIP_FORMS), Naming("huggingface", _HF_CLIP_FORMS)),
            clip.target_tree, _clip_sizes,
        ),
        Model(
            "wav2vec2", "wav2vec2-base speech encoder", Wav2Vec2Config(),
            (Naming("released", _WAV2VEC2_FORMS), Naming("huggingface", _WAV2VEC2_FORMS)),
            wav2vec2.target_tree, _wav2vec2_sizes,
        ),
    )
}  # fmt: skip
NAMINGS = ("released", "diffusers", "huggingface")


@dataclasses.dataclass(frozen=True)
class Match:
    """How well a file fits a model: the share of its keys that the model knows, and of the model's rules it fills.

    cfg: the model's own, or that of `other_keys` whose keys fit better.
    """

    model: Model
    naming: Naming
    form: str
    cfg: Any
    known: float
    filled: float

    @property
    def rank(self) -> tuple[float, float]:
        """Greater is better. Keys first: a file of the base model fits the larger ones too, but leaves rules empty."""
        return self.known, self.filled

    def table(self, cfg: Any) -> Table:
        """The table of the file's form."""
        return self.naming.table(cfg, self.form)


def identify(header: Iterable[str], models: Iterable[str] = MODELS, naming: str | None = None) -> list[Match]:
    """Models that know some of the keys, the best first; of one model only the best naming and form."""
    keys = tuple(header)
    found = []
    for model in (MODELS[name] for name in models):
        matches = [
            Match(model, family, form, cfg, *_fit(family.table(cfg, form), keys, family.tied))
            for family in model.namings
            if naming in (None, family.name)
            for form in family.forms
            for cfg in (model.cfg, *model.other_keys)
        ]
        if matches:
            found.append(max(matches, key=lambda match: match.rank))
    return sorted((match for match in found if match.known), key=lambda match: match.rank, reverse=True)


def _fit(table: Table, keys: tuple[str, ...], tied: tuple[str, str] | None) -> tuple[float, float]:
    """(share of the keys that the table knows, share of its rules that some key matches)."""
    known, filled = 0, set()
    for key in keys:
        key = tied[0] if tied and key == tied[1] else key
        rules = [i for i, rule in enumerate(table.compiled) if rule.source.fullmatch(key)]
        filled.update(rules)
        known += bool(rules) or any(re.fullmatch(ignore.pattern, key) for ignore in table.ignored)
    return known / max(len(keys), 1), len(filled) / len(table.rules)


def identify_parameters(paths: Iterable[str], models: Iterable[str] = MODELS) -> list[Match]:
    """As `identify`, of parameters by '/'-joined path instead of torch keys; of every model the first form."""
    paths, found = tuple(paths), []
    for model in (MODELS[name] for name in models):
        family = model.naming()
        form = next(iter(family.forms))
        found.append(
            max(
                (
                    Match(model, family, form, cfg, *_fit_backwards(family.table(cfg), paths))
                    for cfg in (model.cfg, *model.other_keys)
                ),
                key=lambda match: match.rank,
            )
        )
    return sorted((match for match in found if match.known), key=lambda match: match.rank, reverse=True)


def _fit_backwards(table: Table, paths: tuple[str, ...]) -> tuple[float, float]:
    rules = [[i for i, rule in enumerate(table.compiled) if rule.target.fullmatch(path)] for path in paths]
    filled = {number for some in rules for number in some}
    return sum(map(bool, rules)) / max(len(paths), 1), len(filled) / len(table.rules)


def identify_one(header: Iterable[str], name: str, identified: Callable[..., list[Match]] = identify) -> Match:
    """The model that a file certainly is; raises UserError, naming the candidates, where that is open."""
    found = identified(header)
    if not found:
        raise UserError(f"{name}: its keys are those of no known model ({', '.join(MODELS)})")
    best = found[0]
    if min(best.rank) < SURE or (len(found) > 1 and found[1].rank == best.rank):
        names = ", ".join(match.model.name for match in found if match.known == best.known)
        raise UserError(f"{name}: cannot tell which model it is (keys fit {names}): say --model")
    return best


def read_config(match: Match, header: Mapping[str, Spec]) -> Any:
    """The model's config with every size that shows in a file's shapes."""
    cfg = match.cfg
    if isinstance(cfg, CLIPConfig):
        blocks = {int(m[1]) for key in header if (m := re.search(r"(?:transformer|encoder\.layers)\.(\d+)\.", key))}
        if blocks:  # the last block may be there or not: files written here lack it
            count = max(blocks) + 1
            cfg = dataclasses.replace(cfg, layers=cfg.layers if count == cfg.layers - 1 else count)
    sizes = match.model.read_sizes(parameter_shapes(match.table(cfg), header), cfg)
    return dataclasses.replace(cfg, **sizes)


def known_sizes(model: Model) -> tuple[Any, ...]:
    """Configs of a model whose sizes need not be given: the released one, and those of presets."""
    parts = [getattr(preset, part) for preset in PRESETS.values() for part in PARTS]
    return tuple(dict.fromkeys((model.cfg, *(cfg for cfg in parts if type(cfg) is type(model.cfg)))))


def configured(cfg: Any, settings: Iterable[str]) -> Any:
    """`cfg` with fields replaced as `NAME=NUMBER` says, in nested configs as `audio_windows.tokens=4`, and tuples as
    `conv_kernels=10,3`; raises UserError for anything else.
    """
    for setting in settings:
        match = re.fullmatch(r"([\w.]+)=(\d+(?:,\d+)*)", setting)
        fields = _settable(cfg)
        if match is None or match[1] not in fields:
            raise UserError(f"--set {setting}: give NAME=NUMBER with NAME one of {', '.join(fields)}")
        numbers = tuple(map(int, match[2].split(",")))
        if not isinstance(fields[match[1]], tuple) and len(numbers) > 1:
            raise UserError(f"--set {setting}: {match[1]} is one number")
        cfg = _replaced(cfg, match[1], numbers if isinstance(fields[match[1]], tuple) else numbers[0])
    return cfg


def _settable(cfg: Any, prefix: str = "") -> dict[str, Any]:
    """Whole numbers and tuples of them in a config, by dotted name."""
    out: dict[str, Any] = {}
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if dataclasses.is_dataclass(value):
            out |= _settable(value, f"{prefix}{field.name}.")
        elif type(value) is int or (isinstance(value, tuple) and value and all(type(v) is int for v in value)):
            out[prefix + field.name] = value
    return out


def _replaced(cfg: Any, name: str, value: Any) -> Any:
    head, _, rest = name.partition(".")
    return dataclasses.replace(cfg, **{head: _replaced(getattr(cfg, head), rest, value) if rest else value})


def config_from(cfg: Any, fields: Mapping[str, Any]) -> Any:
    """A config of `cfg`'s type from the JSON of `dataclasses.asdict`; raises UserError where the fields differ."""
    known = {field.name for field in dataclasses.fields(cfg)}
    if unknown := sorted(fields.keys() - known):
        raise UserError(f"the config has no fields {', '.join(unknown)}; convert the weights again")
    values: dict[str, Any] = {}
    for name, value in fields.items():
        default = getattr(cfg, name)
        if dataclasses.is_dataclass(default) and isinstance(value, Mapping):
            value = config_from(default, value)
        values[name] = tuple(value) if isinstance(value, list) else value
    return dataclasses.replace(cfg, **values)
