"""How many rows each layer's prefix cache may forget.

Run: `python -m experiments.bench.profile_cache forget=0.4 selector=full`.

Reads prompts of `data=...` through the model, adds up what attention each row receives, and writes the share that each
layer forgets for `cache=layer_retention cache.profile=FILE`. Keys are those of eval.py, and besides them forget= (the
share of all rows), out= (the file) and limit= (prompts, 32).
"""

import sys
from pathlib import Path

from experiments.errors import fail, is_user_error
from shirg import UserError

DEFAULTS = {"forget": "0.4", "out": "outputs/profile.json", "limit": "32"}


def main(arguments: list[str]) -> None:
    given = dict(DEFAULTS)
    overrides = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in given:
            given[key] = value
        else:
            overrides.append(argument)
    try:
        shares = profile_data(overrides, float(given["forget"]), int(given["limit"]), Path(given["out"]))
    except (ValueError, OSError) as error:
        if not is_user_error(error):
            raise
        fail(str(error))
    print("forgets by layer: " + " ".join(f"{share:.2f}" for share in shares))
    print(f"written: {given['out']}; use it with cache=layer_retention cache.profile={given['out']}")


def profile_data(overrides: list[str], forget: float, limit: int, out: Path) -> list[float]:
    """The shares, which are also written to `out`.

    Raises:
        UserError: for a share that is not between 0 and 1, or bad overrides.
    """
    import torch

    from experiments import build
    from experiments.atomic_files import write_json
    from experiments.bench.common import config_of
    from experiments.data.image_io import load_pictures
    from experiments.evaluate import choose_samples
    from experiments.profiling import resolve_device
    from lavida_adapter.cache_compression.layer_retention import MassReceived, profile

    if not 0 < forget < 1:
        raise UserError(f"forget={forget}: give the share of all rows to forget, above 0 and below 1")
    cfg = config_of(*overrides)
    samples = choose_samples(build.build_dataset(cfg), limit, cfg.seed)
    model = build.build_model(cfg, resolve_device(cfg.device))
    selector = build.build_selector(cfg, model.config.budgets).to(model.device).eval()
    relevance = build.build_relevance(cfg, selector)
    masses = []
    with torch.inference_mode():
        for sample in samples:
            prefix = model.encode(
                load_pictures([sample]),
                [sample.question],
                selector,
                relevance=relevance,
                ids=[sample.id],
                prompts=[sample.prompt],
                boxes=[sample.boxes],
            )
            seen = MassReceived(prefix.mask_BP)
            model.prefill(prefix, hook=seen)
            masses.append([mass_BP[0].cpu() for mass_BP in seen.masses])
    shares = profile(masses, forget)
    write_json(out, {"forget": shares, "mean": forget, "prompts": len(samples), "overrides": overrides})
    return shares


if __name__ == "__main__":
    main(sys.argv[1:])
