"""A program: simulated training steps, each of any rank of any job, in one process of its own.

usage: simulated_steps.py [--transformer-engine] < CASES > RESULTS

CASES is a JSON list of [world size, rank, device, [section.key=value ...]], each with a recipe's path besides or not;
RESULTS has for each what `dry_run` found.
With the option layers are Transformer Engine's.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def main() -> None:
    if "--transformer-engine" in sys.argv:
        from vishwamai_mp.runtime.simulated import transformer_engine_double

        assert transformer_engine_double.install()
    import torch

    import vishwamai_mp.runtime  # noqa: F401  (before megatron.core)
    from tests.training.layouts import SMALL
    from vishwamai_mp.config import load_config, resolve
    from vishwamai_mp.training.dry_run import dry_run

    results = []
    for world_size, rank, device, overrides, *recipe in json.load(sys.stdin):
        config = resolve(load_config(recipe[0] if recipe else SMALL, overrides), world_size)
        try:
            with torch.backends.mkldnn.flags(enabled=False):
                results.append(dry_run(config, world_size, rank, device).to_dict())
        except Exception as error:
            import traceback

            results.append({"error": f"{type(error).__name__}: {error}\n{traceback.format_exc()}"})
    print(json.dumps(results))


if __name__ == "__main__":
    main()
