"""The language of conversion tables: rules that run forwards and backwards.

A `Table` holds `Rule(pattern, target, transform)` lines. `pattern` is a regular expression that must match a whole
torch key; it is made of literals (`\\.` for a dot) and plain capture groups without nesting, so that it can also be
filled in backwards. `target` is the path in the Flax tree; `{1}`, `{2}`, ... or `{name}` stand for the pattern's
groups. A group called `layer` is not in the target: it is the index on axis 0 of a stacked (scanned) parameter.

    Rule(r"blocks\\.(?P<layer>\\d+)\\.ffn\\.0\\.weight", "blocks/ffn/up/kernel", "linear")
    Rule(r"(encoder|decoder)\\.head\\.0\\.gamma", "{1}/head/norm/scale", "vector3")
"""

import dataclasses
import functools
import re
from collections.abc import Callable

import numpy as np

LAYER = "layer"  # name of the group that counts layers


@dataclasses.dataclass(frozen=True)
class Transform:
    """How one tensor changes its layout; `inverse` undoes `forward` bit by bit."""

    forward: Callable[[np.ndarray], np.ndarray]
    inverse: Callable[[np.ndarray], np.ndarray]


def _permute(*axes: int) -> Transform:
    back = tuple(int(i) for i in np.argsort(axes))
    return Transform(lambda x: x.transpose(axes), lambda x: x.transpose(back))


def _drop(rank: int, ones: tuple[int, ...], then: Transform | None = None) -> Transform:
    """Drops the unit axes `ones` of a tensor of `rank` axes, then permutes."""

    def forward(x: np.ndarray) -> np.ndarray:
        if x.ndim != rank:
            raise ValueError(f"rank {x.ndim} is not {rank}")
        x = np.squeeze(x, axis=ones)
        return then.forward(x) if then else x

    def inverse(x: np.ndarray) -> np.ndarray:
        return np.expand_dims(then.inverse(x) if then else x, axis=ones)

    return Transform(forward, inverse)


TRANSFORMS: dict[str, Transform] = {
    "identity": Transform(lambda x: x, lambda x: x),
    "linear": _permute(1, 0),  # [O, I] -> [I, O]
    "conv1d": _permute(2, 1, 0),  # OIK -> KIO
    "conv2d": _permute(2, 3, 1, 0),  # OIHW -> HWIO
    "conv3d": _permute(2, 3, 4, 1, 0),  # OIDHW -> DHWIO
    "pointwise2d": _drop(4, (2, 3), _permute(1, 0)),  # [O, I, 1, 1] -> [I, O]
    "pointwise3d": _drop(5, (2, 3, 4), _permute(1, 0)),  # [O, I, 1, 1, 1] -> [I, O]
    "temporal": _drop(5, (3, 4), _permute(2, 1, 0)),  # [O, I, K, 1, 1] -> [K, I, O]
    "vector2": _drop(3, (1, 2)),  # [C, 1, 1] -> [C]
    "vector3": _drop(4, (1, 2, 3)),  # [C, 1, 1, 1] -> [C]
    "unbatch": _drop(3, (0,)),  # [1, A, B] -> [A, B]
    "row": Transform(lambda x: x[None], lambda x: np.squeeze(x, axis=0)),  # [D] -> [1, D]
}


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of a table: torch keys that fully match `pattern` become `target` by way of `transform`.

    `part=(i, n)`: the tensor, once transformed, is piece i of n equal pieces along the last axis of the target (query,
    key and value that share a kernel). n rules with one pattern each then lead to the same target.
    """

    pattern: str
    target: str
    transform: str = "identity"
    part: tuple[int, int] = (0, 1)


@dataclasses.dataclass(frozen=True)
class Ignore:
    """Torch keys that are left out on purpose, and why."""

    pattern: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Table:
    """All rules of one model. A malformed rule raises ValueError when the table is built."""

    name: str
    rules: tuple[Rule, ...]
    ignored: tuple[Ignore, ...] = ()

    def __post_init__(self):
        for rule in self.rules:
            if rule.transform not in TRANSFORMS:
                raise ValueError(f"table {self.name}: unknown transform {rule.transform!r}")
            if not 0 <= rule.part[0] < rule.part[1]:
                raise ValueError(
                    f"table {self.name}: part {rule.part} of {rule.target!r} is not (i, n) with 0 <= i < n"
                )
        _ = self.compiled  # raises where a rule has no inverse
        if any(not ignore.reason for ignore in self.ignored):
            raise ValueError(f"table {self.name}: an ignored key needs a reason")

    @functools.cached_property
    def compiled(self) -> tuple["CompiledRule", ...]:
        """The rules, ready to run both ways."""
        return tuple(CompiledRule(rule) for rule in self.rules)


def linear_rules(source: str, target: str, bias: bool = True) -> tuple[Rule, ...]:
    """Rules of an `nn.Linear`: kernel, and bias unless it has none."""
    kernel = Rule(source + r"\.weight", target + "/kernel", "linear")
    return (kernel, Rule(source + r"\.bias", target + "/bias")) if bias else (kernel,)


def norm_rules(source: str, target: str, bias: bool = True) -> tuple[Rule, ...]:
    """Rules of a LayerNorm, or of an RMS norm with `bias=False`."""
    scale = Rule(source + r"\.weight", target + "/scale")
    return (scale, Rule(source + r"\.bias", target + "/bias")) if bias else (scale,)


def conv_rules(source: str, target: str, transform: str) -> tuple[Rule, ...]:
    """Rules of a convolution with bias; `transform` names the layout (conv2d, conv3d, temporal, pointwise2d, ...)."""
    return (Rule(source + r"\.weight", target + "/kernel", transform), Rule(source + r"\.bias", target + "/bias"))


class CompiledRule:
    """A rule made ready to run both ways."""

    _GROUP = re.compile(r"\((?:\?P<(?P<name>\w+)>)?(?P<body>[^()]*)\)")

    def __init__(self, rule: Rule):
        self.rule = rule
        self.source = re.compile(rule.pattern)
        self.stacked = LAYER in self.source.groupindex
        self.transform = TRANSFORMS[rule.transform]
        groups = [(m["name"] or str(i + 1), m["body"]) for i, m in enumerate(self._GROUP.finditer(rule.pattern))]
        self._names = [name for name, _ in groups]
        literals = self._GROUP.sub("\0", rule.pattern).split("\0")
        if len(groups) != self.source.groups or any(
            re.search(r"[.\\()\[\]{}*+?|^$]", s.replace(r"\.", "")) for s in literals
        ):
            raise ValueError(f"pattern {rule.pattern!r} is more than literals and plain groups, so it has no inverse")
        self._literals = [part.replace(r"\.", ".") for part in literals]
        bodies = {name: body for name, body in groups}
        holes = re.findall(r"{(\w+)}", rule.target)
        numbered = {str(i + 1): name for i, name in enumerate(self._names)}
        self._holes = [numbered.get(hole, hole) for hole in holes]
        if sorted(self._holes) != sorted(name for name in self._names if name != LAYER):
            raise ValueError(f"target {rule.target!r} must use every group of {rule.pattern!r} once, except {LAYER}")
        pieces = re.split(r"{\w+}", rule.target)
        regex = re.escape(pieces[0])
        for hole, piece in zip(self._holes, pieces[1:], strict=True):
            regex += f"({bodies[hole]})" + re.escape(piece)
        self.target = re.compile(regex)

    def forwards(self, key: str) -> tuple[str, int | None] | None:
        """Torch key -> (path, layer or None), or None where the rule does not match."""
        match = self.source.fullmatch(key)
        if match is None:
            return None
        path = self.rule.target.format("", *match.groups(), **match.groupdict())
        return path, int(match[LAYER]) if self.stacked else None

    def backwards(self, path: str) -> Callable[[int | None], str] | None:
        """Path -> function from layer (or None) to the torch key, or None where the rule does not match."""
        match = self.target.fullmatch(path)
        if match is None:
            return None
        values = dict(zip(self._holes, match.groups(), strict=True))

        def key(layer: int | None) -> str:
            filled = [str(layer) if name == LAYER else values[name] for name in self._names]
            return self._literals[0] + "".join(v + part for v, part in zip(filled, self._literals[1:], strict=True))

        return key

    def source_shape(self, target_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape that the torch tensor of one layer and part must have; ValueError where there is none."""
        shape = target_shape[1:] if self.stacked else target_shape
        parts = self.rule.part[1]
        if parts > 1:
            if not shape or shape[-1] % parts:
                raise ValueError(f"{shape} has no {parts} equal parts")
            shape = (*shape[:-1], shape[-1] // parts)
        return self.transform.inverse(np.broadcast_to(np.float32(0), shape)).shape
