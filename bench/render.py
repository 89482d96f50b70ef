"""Peak memory against length, and a render that is killed and resumed: python -m bench.render [--seconds 5 30 120]

Each video is made by sample.py in a process of its own, of the demo's puppet and a synthetic voice; memory is what the
process says of itself at the end. The last video but one in length is then made again, killed in the middle of sampling
(SIGKILL), and resumed; the two files are compared byte by byte.
"""

import argparse
import json
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import soundfile

from emv3_jax.config import RATE
from emv3_jax.puppets import voice


def sample(folder: pathlib.Path, seconds: float, name: str, *words: str) -> list[str]:
    """The command line of one video."""
    sound = folder / f"{seconds:g}.wav"
    if not sound.exists():
        soundfile.write(sound, voice.speak("heldout", 0, voice.sample_voice("heldout", 0), seconds), RATE)
    program = [sys.executable, "sample.py", f"--audio={sound}", f"--out={folder / name}", "--config.enlarge=1"]
    return [*program, *words]


def run(command: list[str]) -> None:
    """Runs a command; its output is shown where it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)


def kill_in_the_middle(command: list[str], folder: pathlib.Path, steps: int) -> int:
    """Runs a command until so many sampling steps are finished, then kills it; how many there were."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    progress = folder / "chunk_0" / "progress.json"
    while process.poll() is None:
        done = json.loads(progress.read_text())["done"] if progress.exists() else 0
        if done >= steps:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return done
        time.sleep(0.05)
    raise SystemExit("the render ended before it could be killed")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, nargs="+", default=[5, 30, 120])
    args = parser.parse_args()
    print("| video | frames | peak memory | conditions and warm-up | sampling | decoding and writing |")
    print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for seconds in args.seconds:
            run(sample(folder, seconds, f"{seconds:g}.mp4"))
            record = json.loads((folder / f"{seconds:g}.json").read_text())
            laps = record["seconds"]
            print(
                f"| {seconds:g} s | {record['frames']} | {record['peak_memory_gb']['process']:.2f} GB | "
                f"{laps['conditions and warm-up']:.1f} s | {laps['sampling']:.1f} s | "
                f"{laps['decoding and writing']:.1f} s |",
                flush=True,
            )
        seconds = sorted(args.seconds)[-2:][0]
        whole = (folder / f"{seconds:g}.mp4").read_bytes()
        again = sample(folder, seconds, f"{seconds:g}.mp4")
        (folder / f"{seconds:g}.mp4").unlink()
        done = kill_in_the_middle(again, folder / f"{seconds:g}.mp4.render", 6)
        run([*again, "--resume"])
        same = (folder / f"{seconds:g}.mp4").read_bytes() == whole
        print(f"\nkilled after {done} steps and resumed: the {seconds:g} s file is {'the same' if same else 'ANOTHER'}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
