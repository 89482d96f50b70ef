"""Reading a dataset that `python -m emv3_jax.data.prepare` made: random access, and batches by step."""

import collections
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from emv3_jax import weight_files
from emv3_jax.config import Preset
from emv3_jax.data import builder, extra
from emv3_jax.data.examples import Example
from emv3_jax.errors import UserError
from emv3_jax.files import PathLike
from emv3_jax.training.schedule import kind_of_batch


class Bucket(NamedTuple):
    """Clips of one size."""

    frames: int
    height: int
    width: int


class Dataset:
    """The clips of a folder by number.

    Attributes:
      record: what `builder.build` returned.
      buckets: the numbers of the clips of each size.
    Raises:
      UserError: no finished dataset there, or one of another preset.
    """

    def __init__(self, folder: PathLike, preset: Preset):
        self.folder = Path(folder)
        again = f"make it with python -m emv3_jax.data.prepare --preset {preset.name} --out {folder}"
        try:
            self.record = builder.read_record(self.folder)
        except UserError as error:
            raise UserError(f"{error}; {again}") from error
        if self.record["preset"] != preset.name:
            raise UserError(f"the dataset {folder} is of the preset {self.record['preset']}, not of {preset.name}")
        tfds = extra.load("tensorflow_datasets")
        try:
            made = tfds.builder_from_directory(self.folder)
            self._source = made.as_data_source("train")
            split = made.info.splits["train"]
            if sum(Path(path).stat().st_size for path in split.filepaths) != split.num_bytes:
                raise UserError("shards are cut off")
        except Exception as error:  # TFDS passes on whatever its readers raise
            raise UserError(f"the dataset {folder} is damaged ({error}): {again}") from error
        if len(self._source) != len(self.record["clips"]):
            raise UserError(f"the dataset {folder} is damaged (clips are missing): {again}")
        sizes = collections.defaultdict(list)
        for number, (_, *size) in enumerate(self.record["clips"]):
            sizes[Bucket(*size)].append(number)
        self.buckets = {bucket: np.array(numbers) for bucket, numbers in sorted(sizes.items())}

    def __len__(self) -> int:
        return len(self._source)

    def id(self, number: int) -> str:
        """What a clip is called."""
        return self.record["clips"][number][0]

    def check_weights(self, weights: str, roles: Sequence[str]) -> None:
        """Raises UserError unless the frozen models of some roles are those that the clips were seen by.

        Args:
          weights: their folder; empty: the shipped weights.
          roles: of `record["weights"]`, which has the hashes of their files (the same values in another file differ).
        """
        if not roles:
            return
        hashes = weight_files.weight_hashes(self.record["preset"], weights, roles)
        if others := [role for role in roles if hashes[role] != self.record["weights"][role]]:
            raise UserError(
                f"the dataset {self.folder} was made with other weights of {' and '.join(others)} than those of"
                f" {weights or 'this program'}: make it again, or give those weights (config key frozen_weights)"
            )

    def examples(self, numbers: Sequence[int]) -> list[Example]:
        """Clips by number.

        Raises:
          UserError: a file is damaged or gone.
        """
        try:
            return self._source.__getitems__([int(number) for number in numbers])
        except Exception as error:  # TFDS passes on whatever its readers raise
            raise UserError(f"the dataset {self.folder} is damaged ({error}): make it anew") from error


class Plan:
    """Which clips are in the batch of which step: every clip of a size once before one of them comes again.

    A function of its arguments alone, so a resumed run sees what an uninterrupted one would have seen, and every
    process of many knows what the others read.

    Args:
      buckets: numbers of clips by size.
      stages: ((up to step, ((first frames of a clip, clips), ...)), ...); see `kind_of_batch`.
      steps: how many there are.
      seed: of the order.
    Raises:
      UserError: a stage asks for longer clips than there are, or for more at once.
    """

    def __init__(
        self, buckets: dict[Bucket, np.ndarray], stages: Sequence[tuple[int, Sequence[Any]]], steps: int, seed: int
    ):
        self._buckets, self._stages, self._seed = list(buckets.items()), stages, seed
        self._chosen, self._offset = np.zeros(steps + 1, np.int32), np.zeros(steps + 1, np.int64)
        used = np.zeros(len(self._buckets), np.int64)
        draws = np.random.default_rng([seed, 0x0B]).random(steps + 1)
        self._kinds: list[tuple[tuple[int, int], np.ndarray]] = []  # those of the run, and which sizes they take
        shares: dict[tuple[int, int], np.ndarray] = {}
        for step in range(1, steps + 1):
            kind = tuple(kind_of_batch(stages, step))
            if kind not in shares:
                counts = self._counts(*kind)
                self._kinds.append((kind, counts > 0))
                shares[kind] = np.cumsum(counts / counts.sum())
            bucket = min(int(np.searchsorted(shares[kind], draws[step], side="right")), len(used) - 1)
            self._chosen[step], self._offset[step] = bucket, used[bucket]
            used[bucket] += kind[1]

    def _counts(self, frames: int, size: int) -> np.ndarray:
        """How often each bucket is taken for batches of a kind: as often as it has clips; 0: never."""
        counts = np.array([len(numbers) * (bucket.frames >= frames) for bucket, numbers in self._buckets], float)
        if not counts.any():
            longest = max(bucket.frames for bucket, _ in self._buckets)
            raise UserError(f"config key stages: no clip of the dataset has {frames} frames; the longest has {longest}")
        counts[counts < size] = 0
        if not counts.any():
            raise UserError(
                f"config key stages: no size of the dataset has {size} clips of {frames} frames or more: make batches"
                " smaller, or prepare more clips"
            )
        return counts

    def notes(self) -> list[str]:
        """What no batch of the run is made of, a line each: sizes with too few clips, or too short ones."""
        found = []
        for number, (bucket, numbers) in enumerate(self._buckets):
            if any(taken[number] for _, taken in self._kinds):
                continue
            short = all(bucket.frames < frames for (frames, _), _ in self._kinds)
            why = f"shorter than the {min(frames for (frames, _), _ in self._kinds)} frames of a batch"
            if not short:
                fewest = min(size for (frames, size), _ in self._kinds if bucket.frames >= frames)
                why = f"fewer than the {fewest} of a batch"
            clips = f"{len(numbers)} clips of {bucket.frames} frames of {bucket.height} x {bucket.width}"
            found.append(f"{clips} are never trained on: {why} (config key stages)")
        return found

    def batch(self, step: int) -> tuple[int, np.ndarray]:
        """The step's (frames, numbers of clips [B])."""
        frames, size = kind_of_batch(self._stages, step)
        bucket, first = int(self._chosen[step]), int(self._offset[step])
        numbers = self._buckets[bucket][1]
        places = range(first, first + size)
        epochs = {place // len(numbers) for place in places}
        orders = {epoch: np.random.default_rng([self._seed, bucket, epoch]).permutation(numbers) for epoch in epochs}
        return frames, np.array([orders[place // len(numbers)][place % len(numbers)] for place in places])
