"""Patterns of module names: every alternative exists, and a share means the same on towers of any depth."""

import pytest

from lavida_adapter.lora import check_parts, expand, part_of

NAMES = ["a.0.x", "a.1.x", "a.10.x", "a.0.y", "b"]


def layers(n: int) -> list[str]:
    return [f"t.layers.{i}.{leaf}" for i in range(n) for leaf in ("q", "k")]


def test_alternatives_ranges_and_stars() -> None:
    assert expand("a.*.x", NAMES) == ["a.0.x", "a.1.x", "a.10.x"]
    assert expand("a.{0,10}.{x}", NAMES) == ["a.0.x", "a.10.x"]
    assert expand("a.{0-1}.x", NAMES) == ["a.0.x", "a.1.x"]
    assert expand("b", NAMES) == ["b"]
    with pytest.raises(ValueError, match=r"'a\+0.x' names nothing"):
        expand("a+0.x", NAMES)


@pytest.mark.parametrize(
    ("depth", "share", "expected"),
    [(26, "4/26", 4), (26, "8/26", 8), (26, "1/1", 26), (3, "4/26", 1), (3, "8/26", 1), (3, "2/3", 2), (12, "1/5", 3)],
)
def test_a_share_is_the_first_layers_rounded_up(depth: int, share: str, expected: int) -> None:
    wanted = [f"t.layers.{i}.{leaf}" for i in range(expected) for leaf in ("q", "k")]
    assert expand(f"t.layers.{{:{share}}}.{{q,k}}", layers(depth)) == wanted


@pytest.mark.parametrize(
    ("pattern", "sentence"),
    [
        ("t.layers.{:4/3}.q", "the share {:4/3} in 't.layers.{:4/3}.q' is more than all layers"),
        ("t.layers.{1-0}.q", "the range {1-0} in 't.layers.{1-0}.q' is empty"),
        ("t.layers.{:4/26}.v", "'t.layers.0.v' names nothing in this model; the nearest names are t.layers.0.[qk]"),
        ("t.layer.{:4/26}.q", "'t.layer.:4/26.q' names nothing in this model; the nearest names are t.layers"),
        ("t.layers.{:0/26}.q", "'t.layers.:0/26.q' names nothing"),
        ("t.layers.{3-4}.q", "'t.layers.4.q' names nothing in this model; the nearest names are t.layers.3.q"),
    ],
)
def test_what_does_not_exist(pattern: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        expand(pattern, layers(4))


def test_parts() -> None:
    names = {
        "mm_projector.0": "mm_projector",
        "model.image_newline": "image_newline",
        "model.model.transformer.blocks.0.ff_out.lora_A.default.weight": "transformer",
        "selector.coords.linear": "selector",
        "vision_tower.vision_tower.vision_model.embeddings": "vision_tower",
    }
    assert {name: part_of(name) for name in names} == names
    check_parts("lora.ranks", ["selector", "vision_tower"])
    with pytest.raises(ValueError, match=r"lora.ranks.projector: no such part, the nearest is mm_projector; the parts"):
        check_parts("lora.ranks", ["selector", "projector"])
