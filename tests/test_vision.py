"""Models with eyes against transformers' own classes, with tiny random weights in float32."""

import pytest
import torch
from conftest import GREEDY, ids_of, run_rows, set_up
from test_images import saved
from vision_models import IMAGE, Made, converted, make, picture

from checkpoint import load_config, load_model
from config import VisionConfig
from engine import Engine, Request
from images import load_options, place_images, read_image
from tokenizer import load_tokenizer
from vision import VisionTransformer, rope_positions

KINDS = ["qwen2_vl", "qwen2_5_vl"]
# Each of a size of its own: several windows and parts of some, one window, less than one.
PICTURES = [picture(300, 220), picture(112, 224, 1), picture(60, 90, 2)]
TEXT = [20, 21, 22, 23, 24, 25]


@pytest.fixture(scope="module", params=KINDS)
def both(request, tmp_path_factory):
    """A model as published, and ours of it."""
    folder = tmp_path_factory.mktemp(request.param)
    made = make(request.param, folder / "hf")
    return made, converted(made, folder / "ours")


def inputs(folder, ids: list[int], pictures) -> tuple[list[int], tuple]:
    options = load_options(folder, load_config(folder).vision)
    return place_images(ids, [read_image(saved(image), options) for image in pictures], options)


@torch.no_grad()
def seen_by_reference(made: Made, pictures) -> torch.Tensor:
    given = made.processor(pictures, return_tensors="pt")
    return torch.cat(made.reference.get_image_features(**given).pooler_output)


@pytest.mark.parametrize("pictures", [PICTURES[:1], PICTURES[1:2], PICTURES, [PICTURES[0]] * 2 + PICTURES[1:]])
def test_image_embeddings(both, pictures):
    made, folder = both
    model = load_model(folder)
    _, images = inputs(folder, [IMAGE] * len(pictures), pictures)
    ours = model.vision(torch.cat([image.patches() for image in images]), [image.grid for image in images])
    theirs = seen_by_reference(made, pictures)
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_grids_have_to_fit():
    with pytest.raises(ValueError, match="16 patches"):
        VisionTransformer(VisionConfig(7, 48, 1, 3, 96, 64))(torch.zeros(16, 1176), [(1, 4, 2)])


PROMPTS = [[*TEXT, IMAGE, *TEXT, IMAGE, 7, IMAGE, *TEXT], [IMAGE, *TEXT, IMAGE, 5, IMAGE], [IMAGE]]


@pytest.mark.parametrize("ids", PROMPTS)
def test_positions(both, ids):
    made, folder = both
    pictures = PICTURES[: ids.count(IMAGE)]
    longer, images = inputs(folder, ids, pictures)
    given = made.inputs(ids, pictures)
    assert given["input_ids"][0].tolist() == longer
    expected, delta = made.reference.model.get_rope_index(
        given["input_ids"], given["mm_token_type_ids"], given["image_grid_thw"], attention_mask=given["attention_mask"]
    )
    positions = rope_positions(images, len(longer))
    assert torch.equal(positions, expected[:, 0])
    assert int(positions.max()) + 1 - len(longer) == int(delta)


# ---------------------------------------------------------------------------------------------------------------------
# Through the engine

CASES = {  # a prompt, and its images
    "one": ([*TEXT, 5, IMAGE, 7, *TEXT], PICTURES[:1]),
    "two": ([5, IMAGE, 7, *TEXT, 5, IMAGE, 7, 30, 31], PICTURES[1:]),
    "same twice": ([5, IMAGE, 7, 5, IMAGE, 7, *TEXT], [PICTURES[2]] * 2),
    "ends in one": ([*TEXT, 5, IMAGE], PICTURES[2:]),
    "none": (list(range(20, 60)), []),
}


def request(folder, ids, pictures, count=12, **others):
    longer, images = inputs(folder, ids, pictures)
    return Request(longer, GREEDY, count, images=images, **others)


@pytest.fixture(scope="module")
def engine(both):
    return Engine(load_model(both[1]))


@pytest.mark.parametrize("case", CASES)
def test_logits(both, engine, case):
    """Of every token of the prompt."""
    made, folder = both
    ids, pictures = CASES[case]
    asked = request(folder, ids, pictures, echo=True)
    set_up(engine, [asked])
    engine.take(asked, [0])
    logits = engine.model.logits(engine.prefill(0, asked))
    torch.testing.assert_close(logits, made.logits(ids, pictures), rtol=0, atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_greedy_tokens(both, engine, tokenizer_of, batch_size):
    """Rows with and without images beside each other."""
    made, folder = both
    requests = [request(folder, *case) for case in CASES.values()]
    set_up(engine, requests, batch_size=batch_size)
    tokens = ids_of(run_rows(engine, tokenizer_of, requests))
    for (name, (ids, pictures)), new in zip(CASES.items(), tokens, strict=True):
        made.assert_greedy(ids, pictures, new)
        if name != "ends in one":  # where generate goes on from the last row and column, other than its own forward
            assert new == made.greedy(ids, pictures, 12)


@pytest.fixture(scope="module")
def tokenizer_of(both):
    return load_tokenizer(both[1])
