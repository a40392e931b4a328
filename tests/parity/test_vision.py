"""Views, tower, projector, pooling and splicing against the reference's numbers."""

import hashlib
import re
from dataclasses import replace

import pytest
import torch
from PIL import Image

from baselines import Pooled
from lavida_adapter.encode import EncodedPicture, PictureEncoder, PictureGroup, PicturePrompts
from lavida_adapter.prefix import picture_rows, splice
from lavida_adapter.prompt import IGNORE, join_at_images, render
from lavida_adapter.timing import NoTimer
from lavida_adapter.views import Views, choose_canvas, make_views
from shirg import VisionFeatures
from tests.parity.conftest import Golden


def sha(array) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


def blank(size) -> Image.Image:
    return Image.new("RGB", tuple(size))


def test_canvas_choice(golden: Golden, equal) -> None:
    for case in golden.json("preprocess")["select_best_resolution"]:
        chosen = choose_canvas(tuple(case["size_wh"]), golden.config.image_grid_pinpoints)
        equal("canvas choice", list(chosen), case["best_wh"])


def test_views_hash_for_hash(golden: Golden, equal, close) -> None:
    sampled = golden.tensors("preprocess")
    for case in golden.json("preprocess")["images"]:
        views = make_views(golden.image(f"images/{case['file']}"), golden.config).pixels_V3SS
        close("views (sampled pixels)", views[:, :, 7::32, 5::32], sampled[f"{case['file']}.sampled"], 1e-6)
        equal("views (SHA-256, float32)", [sha(v.numpy()) for v in views], case["view_sha256_float32"])


def test_single_view_modes(golden: Golden, equal) -> None:
    first = golden.json("preprocess")["images"][0]["file"]
    for mode, case in golden.json("preprocess")["single_view_modes_on_first_image"].items():
        config = replace(golden.config, image_aspect_ratio="resize" if mode == "None" else mode)
        pixels = make_views(golden.image(f"images/{first}"), config).pixels_V3SS
        equal("views (pad and single)", list(pixels.shape), case["shape"])
        equal("views (pad and single)", sha(pixels.numpy()), case["sha256_float32"])


@torch.no_grad()
def test_tower(golden: Golden, close) -> None:
    image = golden.image(f"images/{golden.json('preprocess')['images'][0]['file']}")
    states, taps = golden.model.model.vision_tower(make_views(image, golden.config).pixels_V3SS[:1])
    assert not taps
    close("vision tower", states[0], golden.tensors("vision_tower")["tower_out_of_first_image_base_view"], 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["bilinear", "average", "max"])
def test_projector_and_pooling(golden: Golden, close, mode: str) -> None:
    saved = golden.tensors("projector_pool")
    projected = golden.model.model.mm_projector(saved["features"])
    rows = saved["projected_rows_0_64"]
    close("projector", projected[:, : rows.shape[1]], rows, 1e-4)
    config = replace(golden.config, mm_spatial_pool_mode=mode, mm_patch_merge_type="flat", image_aspect_ratio="resize")
    views = make_views(blank((config.vision.image_size,) * 2), config)
    features = tower_features(views, saved["features"])
    pooled = Pooled()(replace(features, tokens_BND=projected))
    close(f"pooling ({mode})", pooled.tokens_BTD, saved[f"pooled_{mode}"], 1e-4)


def tower_features(views: Views, states_1ND: torch.Tensor) -> VisionFeatures:
    """What a selector sees of one picture whose tower states are given."""
    picture = EncodedPicture(views, states_1ND[0], {})
    return PictureGroup([picture], [0], torch.nn.Identity()).features(("0",))


def token_map(golden: Golden, size, config=None) -> torch.Tensor:
    """The picture block of probe features (view, row, column), with a newline of -1."""
    config = config or golden.config
    views = make_views(blank(size), config)
    side, n_views = config.vision.side, len(views.pixels_V3SS)
    grid = torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in (n_views, side, side)), indexing="ij"), -1)
    probe = grid.reshape(1, -1, 3)
    features = tower_features(views, probe)
    selection = Pooled()(features)
    (row_TD,) = picture_rows(selection, selection.tokens_BTD, -torch.ones(3))
    return row_TD[: int(selection.mask_BT.sum())]


def test_token_map_of_the_splice(golden: Golden, close, equal) -> None:
    maps = golden.tensors("splice_token_map")
    for case in golden.json("splice_token_map"):
        if case.get("single_view"):
            config = replace(golden.config, image_aspect_ratio="resize")
            block, name = token_map(golden, (300, 200), config), "map_single_view"
        else:
            w, h = case["size_wh"]
            block, name = token_map(golden, (w, h)), f"map_{w}x{h}"
            newlines = (block == -1).all(-1)
            equal("token counts", int(newlines.sum()), case["n_newlines"])
            equal("token counts", int(newlines.to(torch.int64).argmax()), case["first_newline_index"])
        equal("token counts", len(block), case["n_image_tokens"])
        close("token map of the splice", block, maps[name], 1e-4)


def test_token_map_without_pooling(dream: Golden, close, equal) -> None:
    """The checkpoint of low resolution: one view whose tokens are all fed, and one newline."""
    config = dream.config.switched(image_aspect_ratio="resize", mm_pool=False)
    block = token_map(dream, (300, 200), config)
    facts = dream.json("facts")["facts"]
    equal("token counts", len(block), facts["lowres_single_view_no_pool_spatial_unpad_tokens"])
    close("token map of the splice", block, dream.tensors("splice_token_map")["map_single_view_no_pool"], 1e-4)
    flat = token_map(dream, (300, 200), config.switched(mm_patch_merge_type="flat"))
    equal("token counts", len(flat), facts["lowres_single_view_no_pool_flat_tokens"])
    equal(
        "token counts",
        len(token_map(dream, (768, 768), dream.config.switched(mm_pool=False))),
        facts["anyres_768_no_pool_tokens"],
    )


@torch.no_grad()
def test_spliced_embeddings(golden: Golden, close, equal) -> None:
    saved, model = golden.tensors("splice"), golden.model
    files = golden.json("preprocess")["images"]
    chosen = [golden.raw["splice_image_index"], golden.raw["splice_image_index2"]]
    images = [golden.image(f"images/{files[i]['file']}") for i in chosen]
    blocks = picture_blocks(golden, images)

    prefix, _ = splice(saved["input_ids"].tolist(), blocks[:1], model.lm.embedding, max_length=10**6)
    close("spliced embeddings", prefix.embeds_BPD, saved["inputs_embeds"], 1e-4)
    equal("spliced embeddings (places)", prefix.visual_BP.tolist(), (saved["new_input_ids"] == -200).tolist())

    kept = [
        row[mask].tolist()
        for row, mask in zip(saved["batch_input_ids"], saved["batch_attention_mask_in"].bool(), strict=True)
    ]
    labels = [
        row[mask].tolist()
        for row, mask in zip(saved["batch_labels_in"], saved["batch_attention_mask_in"].bool(), strict=True)
    ]
    prefix, labels_out = splice(kept, blocks, model.lm.embedding, max_length=10**6, labels=labels)
    tail = saved["batch_embeds_row1_tail"]
    close("spliced batch (tail of row 1)", prefix.embeds_BPD[1, -len(tail) :], tail, 1e-4)
    equal("spliced batch (labels)", labels_out.tolist(), saved["batch_labels_out"].tolist())
    equal("spliced batch (mask)", prefix.mask_BP.long().tolist(), saved["batch_attention_mask_out"].long().tolist())
    assert (labels_out[prefix.visual_BP] == IGNORE).all()


def picture_blocks(golden: Golden, images) -> list[torch.Tensor]:
    """Picture tokens of the pooled baseline: what LaViDa itself feeds its language model."""
    ids = [str(i) for i in range(len(images))]
    encoder = PictureEncoder(golden.model, Pooled(), None, NoTimer())
    return encoder.blocks(PicturePrompts(images, [""] * len(images), ids))[0]


def split_turn(text: str) -> tuple[int, str]:
    """How many pictures a user's turn begins with, and its text behind them and their line break."""
    found = re.match(r"(?:<image> ?)+\n?", text)
    return text.count("<image>"), text if found is None else text[found.end() :]


def test_prompts_and_the_lost_token(golden: Golden, equal) -> None:
    for case in golden.json("prompt")["prompts"]:
        n_images, first = split_turn(case["turns"][0])
        pieces = render([first, *case["turns"][1:]], golden.config, n_images=n_images)
        texts = ["".join(piece.text for piece in chunk) for chunk in pieces]
        equal("rendered prompt", "<image>".join(texts), case["prompt"])
        vocabulary: dict[str, int] = {}
        chunks = [
            tuple(vocabulary.setdefault(t, len(vocabulary)) for t in chunk)
            for chunk in case["toy_tokens_of_each_text_chunk"]
        ]
        names = {v: k for k, v in vocabulary.items()} | {-200: "<IMG -200>"}
        joined = [names[i] for i in join_at_images(chunks, drop_first=bool(golden.config.drop_token_after_image))]
        equal("lost token after the picture", joined, case["toy_tokens_from_reference_splitter"])
