"""What a Negative DPO stage does, at once and after the SFT that follows: python -m bench.unlearning --out runs/table2

Goes on from the first stage of `bench.table2`'s row "full", for the same seeds, and keeps its stages there too. Every
variant changes the first stage that unlearns and nothing else. Prints, with deviations over seeds: by how much the
errors of the negatives have risen above the reference's, and sync, identity and distance on the held-out puppets of
`bench.table2`, right after the stage and after the SFT that follows it.
"""

import pathlib
import sys
from typing import Any

from bench.table2 import SCALE, SEEDS, Bench, scored_on, spread
from configs import puppet_full_cycle
from emv3_jax import command_line
from emv3_jax.training import cycle

MEASURES = ("sync", "identity", "distance")
VARIANTS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "as in the cycle: no momentum, rate 2e-4, beta 1000": {},
    "with momentum 0.9": {"beta1": 0.9},
}


def cycle_with(changes: dict[str, Any] | None) -> Any:
    """The puppets' cycle up to its second SFT stage, with a changed stage between the two, or without it."""
    cfg = puppet_full_cycle.get_config()
    first, unlearn, second = cfg.cycle[:3]
    if changes is None:
        cfg.cycle = (first, {**second, "seed": cycle.seed_of(cfg.seed, 3)})  # the seed it has as the third stage
    else:
        cfg.cycle = (first, {**unlearn, **changes}, second)
    return cfg


def measured(bench: Bench, cfg: Any, stages: int) -> tuple[str, list[dict[str, float]]]:
    """The name of a cycle's weights after so many stages, and the measures of each seed, kept if they are there."""
    params, name = bench.train(cfg, stages)
    path = bench.out / "unlearning" / f"{name}.json"
    return name, bench.scores(path, scored_on({}, True), lambda: params, cfg, {}, True)


def main(arguments: list[str]) -> int:
    """The command line."""
    parser = command_line.Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--data", default="data/puppets33")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args(arguments)
    command_line.setup_compile_cache()
    bench = Bench(args.out, args.data, args.seeds, SCALE)
    titles = [f"{name}, {when}" for when in ("at once", "after SFT") for name in MEASURES]
    print(f"| stage that unlearns | errors above the reference's | {' | '.join(titles)} |")
    print("| --- " * (len(titles) + 2) + "|")
    for title, changes in VARIANTS.items():
        cfg = cycle_with(changes)
        count = len(cfg.cycle)
        before, after = (measured(bench, cfg, stages) for stages in (count - 1, count))
        risen = "" if changes is None else spread(bench.ahead(before[0]))
        scores = [spread([seed[name] for seed in found]) for _, found in (before, after) for name in MEASURES]
        print(f"| {title} | {risen} | {' | '.join(scores)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(command_line.run_main(main))
