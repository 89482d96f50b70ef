"""Converts a full-size stand-in for the released folders, and back: python -m bench.conversion GOLDEN FOLDER

    python -m bench.conversion ../shared/golden /tmp/full [--variant preview]

GOLDEN holds weights.py and manifests/; FOLDER gets up to 55 GB, which are removed at the end (--keep keeps them). Needs
the torch extra: the released VAE, umT5 and CLIP files are pickles. Prints one row a command: seconds, and the peak of
its memory. What comes back is compared with what went in, tensor by tensor, bit by bit.
"""

import argparse
import json
import multiprocessing
import os
import pathlib
import shutil
import subprocess
import sys
import time

import numpy as np
from flax import traverse_util

from convert import umt5
from convert.engine import plan_to_torch, specs
from convert.parity import load_tensor_for
from convert.sources import Spec, open_source
from convert.writers import SafetensorsWriter
from emv3_jax.config import UMT5Config

BASE = "Wan2.1-Fun-V1.1-1.3B-InP"
AUDIO = {"preview": "wav2vec2-base-960h", "flash": "chinese-wav2vec2-base"}
UMT5_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
CLIP_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
BACK = {
    "dit-{}": "transformer/diffusion_pytorch_model.safetensors",
    "vae": f"{BASE}/Wan2.1_VAE.pth",
    "umt5": f"{BASE}/{UMT5_FILE}",
    "clip": f"{BASE}/{CLIP_FILE}",
    "wav2vec2": "{}/model.safetensors",
}


class Stand:
    """Writes files of stand-in weights."""

    def __init__(self, golden: pathlib.Path):
        self.manifests = golden / "manifests"
        self.tensor_for = load_tensor_for(golden / "weights.py")

    def shapes(self, manifest: str, prefix: str = "") -> dict[str, tuple[int, ...]]:
        """Keys and shapes of a manifest."""
        shapes = json.loads((self.manifests / f"{manifest}.json").read_text())
        return {prefix + key: tuple(shape) for key, shape in shapes.items()}

    def safetensors(self, path: pathlib.Path, shapes: dict[str, tuple[int, ...]]) -> None:
        """One tensor at a time."""
        path.parent.mkdir(parents=True, exist_ok=True)
        header = {key: Spec(shape, np.dtype(np.float32)) for key, shape in shapes.items()}
        with SafetensorsWriter(path, header, {}) as writer:
            for key, shape in shapes.items():
                writer.write(self.tensor_for(key, shape))

    def pickle(self, path: pathlib.Path, shapes: dict[str, tuple[int, ...]], dtype: str = "float32") -> None:
        """As torch saves a state dict."""
        import torch

        path.parent.mkdir(parents=True, exist_ok=True)
        kind = getattr(torch, dtype)
        torch.save({k: torch.from_numpy(self.tensor_for(k, s)).to(kind) for k, s in shapes.items()}, path)


def umt5_shapes() -> dict[str, tuple[int, ...]]:
    """Keys of umT5-XXL's encoder; the golden data holds no manifest of it."""
    tree = traverse_util.flatten_dict(umt5.target_tree(UMT5Config()), sep="/")
    plan = plan_to_torch(umt5.TABLE, specs(tree), None, "umt5")
    return {tensor.key: tensor.spec.shape for tensors in plan.values() for tensor in tensors}


def tokenizer(folder: pathlib.Path) -> None:
    """A small tokenizer where the released one lies."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.Unigram([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0)], unk_id=2))
    PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)


def make(golden: pathlib.Path, folder: pathlib.Path, variant: str) -> None:
    """The released folders, all file names real."""
    stand, base = Stand(golden), folder / BASE
    stand.safetensors(folder / "transformer/diffusion_pytorch_model.safetensors", stand.shapes(f"dit_{variant}_full"))
    stand.pickle(base / "Wan2.1_VAE.pth", stand.shapes("wan_vae"))
    stand.pickle(base / UMT5_FILE, umt5_shapes(), "bfloat16")
    stand.pickle(base / CLIP_FILE, stand.shapes("clip_visual", "visual."))
    stand.safetensors(folder / AUDIO[variant] / "model.safetensors", stand.shapes("wav2vec2_base"))
    tokenizer(base / "google" / "umt5-xxl")


def timed(name: str, *words: str) -> int:
    """Runs a command and prints its row."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", *words], stdout=subprocess.PIPE, text=True)
    said = process.stdout.read() if process.stdout else ""
    _, status, usage = os.wait4(process.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    print(f"| {name} | {time.perf_counter() - start:.0f} s | {usage.ru_maxrss / 2**20:.2f} GB | {code} |", flush=True)
    if code:
        print(said)
    return code


def same(original: pathlib.Path, back: pathlib.Path) -> bool:
    """Whether two files hold the same tensors, bit by bit, the second at least those that the model has."""
    a, b = open_source(original), open_source(back)
    if set(a.header) != set(b.header):
        return False
    return all(a.read(key).tobytes() == b.read(key).tobytes() for key in a.header)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("golden", type=pathlib.Path)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--variant", choices=sorted(AUDIO), default="preview")
    parser.add_argument("--keep", action="store_true")
    args = parser.parse_args()
    if args.folder.exists() and any(args.folder.iterdir()):
        parser.error(f"{args.folder} is not empty; name a folder that is, or does not exist")
    try:
        return run(args.golden, args.folder, args.variant)
    finally:
        if not args.keep:
            shutil.rmtree(args.folder, ignore_errors=True)


def run(golden: pathlib.Path, folder: pathlib.Path, variant: str) -> int:
    """Makes the folders, runs the commands, compares; returns the exit status."""
    released, converted, back = (folder / name for name in ("released", "converted", "back"))
    # In a process of its own: what a parent has once held counts in the peaks of its children.
    maker = multiprocessing.get_context("spawn").Process(target=make, args=(golden, released, variant))
    maker.start()
    maker.join()
    if maker.exitcode:
        return 1
    total = sum(path.stat().st_size for path in released.rglob("*") if path.is_file())
    print(f"{total / 1e9:.1f} GB of stand-in weights\n")
    print("| command | time | peak memory | exit |\n| --- | --- | --- | --- |", flush=True)
    words = ("--from", str(released), "--variant", variant, "--to", str(converted))
    good = timed(f"to-jax --from, {variant}", "convert", "to-jax", *words) == 0
    good &= timed("doctor", "emv3_jax.doctor", "--weights", str(converted)) == 0
    for model, place in BACK.items():
        name, original = model.format(variant), released / place.format(AUDIO[variant])
        good &= timed(f"inspect {original.name}", "convert", "inspect", str(original)) == 0
        base = ("--base", str(original)) if model == "clip" else ()  # for what the model does not hold
        file = back / f"{name}.safetensors"
        good &= timed(f"to-torch {name}", "convert", "to-torch", str(converted / name), "--to", str(file), *base) == 0
        equal = same(original, file)
        print(f"| {name} came back {'the same' if equal else 'DIFFERENT'} | | | |", flush=True)
        good &= equal
        file.unlink(missing_ok=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
