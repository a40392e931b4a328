"""How many rows each layer's prefix cache may drop.

Run: `python -m experiments.bench.profile_cache forget=0.4 selector=full`.

Reads prompts of `data=...` through the model, adds up the attention that each row receives, and writes the share of
rows that each layer drops, for `cache=layer_retention cache.profile=FILE`.
"""

import argparse
import re
import sys
from pathlib import Path

from experiments.errors import CommandParser, one_sentence
from shirg import UserError


def main(arguments: list[str]) -> None:
    parser = CommandParser(
        prog="python -m experiments.bench.profile_cache",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--forget", type=float, default=0.4, help="the share of all rows to drop (default 0.4)")
    parser.add_argument("--limit", type=int, default=32, help="prompts to read (default 32)")
    parser.add_argument("--out", type=Path, default=Path("outputs/profile.json"), help="the file to write")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="keys of eval.py")
    # `forget=0.4`, as other commands write it, is read as `--forget 0.4`.
    given = parser.parse_intermixed_args([re.sub(r"^(?=(forget|limit|out)=)", "--", word) for word in arguments])
    with one_sentence():
        shares = profile_data(given.overrides, given.forget, given.limit, given.out)
    print("share dropped by layer: " + " ".join(f"{share:.2f}" for share in shares))
    print(f"written: {given.out}; use it with cache=layer_retention cache.profile={given.out}")


def profile_data(overrides: list[str], forget: float, limit: int, out: Path) -> list[float]:
    """The share of rows that each layer drops; also written to `out`.

    Raises:
        UserError: `forget` is not between 0 and 1, or an override is wrong.
    """
    import torch

    from experiments import build
    from experiments.atomic_files import write_json
    from experiments.data.chosen_samples import choose_samples
    from experiments.data.image_io import load_batch
    from experiments.profiling import resolve_device
    from lavida_adapter.cache_compression.layer_retention import MassReceived, profile

    if not 0 < forget < 1:
        raise UserError(f"forget={forget}: give the share of all rows to drop, above 0 and below 1")
    cfg = build.compose_eval(*overrides)
    samples = choose_samples(build.build_dataset(cfg), limit, cfg.seed)
    model = build.build_model(cfg, resolve_device(cfg.device))
    selector = build.build_selector(cfg, model.config.budgets).to(model.device).eval()
    relevance = build.build_relevance(cfg, selector, model)
    masses = []
    with torch.inference_mode():
        for sample in samples:
            prefix = model.encode(
                load_batch([sample]).pictures,
                [sample.question],
                selector,
                relevance=relevance,
                ids=[sample.id],
                prompts=[sample.prompt],
                histories=[sample.history],
                boxes=[sample.boxes],
            )
            received = MassReceived(prefix.mask_BP)
            model.prefill(prefix, hook=received)
            masses.append([mass_BP[0].cpu() for mass_BP in received.masses])
    shares = profile(masses, forget)
    write_json(out, {"forget": shares, "mean": forget, "prompts": len(samples), "overrides": overrides})
    return shares


if __name__ == "__main__":
    main(sys.argv[1:])
