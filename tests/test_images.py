"""images.py against transformers' own processor, in Pillow's variant, and against pictures that break programs."""

import base64
import io
import json
import struct
import zlib

import numpy
import PIL.Image
import PIL.ImageOps
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize
from vision_models import picture

from config import VisionConfig
from errors import UserError
from images import ImageOptions, bare, load_options, place_images, read_image, read_parts, resized, with_images

OPTIONS = ImageOptions(token=7, min_pixels=56 * 56, max_pixels=28 * 28 * 60)
VISION = VisionConfig(7, 48, 2, 3, 96, 64)


def saved(image: PIL.Image.Image, form: str = "PNG", **others) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **others)
    return file.getvalue()


def published(image: PIL.Image.Image, options: ImageOptions = OPTIONS, **fields) -> tuple[torch.Tensor, tuple]:
    """Patches and grid by transformers."""
    fields = {"min_pixels": options.min_pixels, "max_pixels": options.max_pixels} | fields
    found = Qwen2VLImageProcessorPil(**fields)(image, return_tensors="pt")
    return found["pixel_values"], tuple(found["image_grid_thw"][0].tolist())


def assert_same(data: bytes, expected: PIL.Image.Image, options: ImageOptions = OPTIONS, **fields) -> None:
    image = read_image(data, options)
    patches, grid = published(expected, options, **fields)
    assert image.grid == grid and image.count == grid[1] * grid[2] // 4
    assert image.patches().dtype == torch.float32
    torch.testing.assert_close(image.patches(), patches, rtol=0, atol=1e-5)


def refusal(data, options=OPTIONS, **others) -> str:
    with pytest.raises(UserError) as error:
        read_image(data, options, **others)
    message = str(error.value)
    assert "\n" not in message and len(message) < 300
    return message


# ---------------------------------------------------------------------------------------------------------------------
# The published processor


@pytest.mark.parametrize(
    ("width", "height"),
    [(300, 200), (200, 300), (28, 28), (1, 1), (97, 613), (30, 900), (20, 3), (13, 700), (2000, 11)],
)
def test_patches_are_those_of_the_published_processor(width, height):
    """Wide and high, enlarged and reduced; also images thinner than a patch."""
    image = picture(width, height)
    assert_same(saved(image), image)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF"])
def test_formats(form):
    data = saved(picture(90, 70), form)
    assert_same(data, PIL.Image.open(io.BytesIO(data)))


def palette_with_transparency():
    image = picture(90, 70).quantize(32)
    image.info["transparency"] = 3
    return image


@pytest.mark.parametrize(
    "image",
    [
        picture(90, 70, mode="L"),
        picture(90, 70, mode="LA"),
        picture(90, 70, mode="RGBA"),
        picture(90, 70).quantize(32),
        palette_with_transparency(),
        picture(90, 70).convert("1"),
        PIL.Image.frombytes("I;16", (90, 70), bytes(range(90)) * 140),
    ],
    ids=["grey", "grey-alpha", "alpha", "palette", "palette-transparent", "bits", "grey-16"],
)
def test_kinds_of_pixels(image):
    data = saved(image)
    again = PIL.Image.open(io.BytesIO(data))
    assert again.mode == image.mode
    assert_same(data, again)


def test_colours_of_cmyk():
    data = saved(picture(90, 70).convert("CMYK"), "JPEG")
    assert_same(data, PIL.Image.open(io.BytesIO(data)))


def test_transparent_is_white():
    image = PIL.Image.new("RGBA", (56, 56), (10, 200, 30, 0))
    assert (read_image(saved(image), OPTIONS).pixels == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_rotated_by_exif(orientation):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    data = saved(picture(120, 60), "JPEG", exif=exif)
    upright = PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(data)))
    assert upright.size == ((60, 120) if orientation > 4 else (120, 60))
    assert_same(data, upright)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 20000), st.integers(1, 20000), st.sampled_from([4, 16, 1280, 16384]), st.integers(0, 4))
def test_sizes_are_those_of_the_published_processor(height, width, most, least):
    options = ImageOptions(token=0, min_pixels=784 * least or 1, max_pixels=784 * most)
    try:
        expected = smart_resize(height, width, 28, options.min_pixels, options.max_pixels)
    except ValueError:
        with pytest.raises(UserError, match="200 times"):
            resized(height, width, options)
        return
    assert resized(height, width, options) == expected and min(expected) > 0


def test_height_and_width_are_not_swapped():
    image = read_image(saved(picture(280, 140)), OPTIONS)
    assert image.grid == (1, 10, 20) and image.pixels.shape == (140, 280, 3)


# ---------------------------------------------------------------------------------------------------------------------
# preprocessor_config.json

LIMITS = 28 * 28 * 8, 28 * 28 * 20
SPELLINGS = [
    {"min_pixels": LIMITS[0], "max_pixels": LIMITS[1]},
    {"size": {"shortest_edge": LIMITS[0], "longest_edge": LIMITS[1]}},
    {"size": {"min_pixels": LIMITS[0], "max_pixels": LIMITS[1]}},
    {"size": {"shortest_edge": 1, "longest_edge": 2}, "min_pixels": LIMITS[0], "max_pixels": LIMITS[1]},
    {"size": {"shortest_edge": LIMITS[0], "longest_edge": LIMITS[1]}, "min_pixels": None, "max_pixels": None},
]


@pytest.mark.parametrize("fields", SPELLINGS)
@pytest.mark.parametrize("nested", [False, True])
def test_limits_in_every_spelling(tmp_path, fields, nested):
    fields = {"merge_size": 2, "patch_size": 14, "temporal_patch_size": 2, "resample": 3} | fields
    name = "processor_config.json" if nested else "preprocessor_config.json"
    (tmp_path / name).write_text(json.dumps({"image_processor": fields} if nested else fields))
    options = load_options(tmp_path, VISION)
    assert (options.min_pixels, options.max_pixels, options.token) == (*LIMITS, 7)
    for size in ((500, 400), (20, 30)):
        image = picture(*size)
        expected = {} if "size" in fields and "min_pixels" in fields["size"] else {"size": None, **fields}
        known = {name: value for name, value in expected.items() if value is not None}
        assert_same(saved(image), image, options, **(known or {}))


def test_other_settings(tmp_path):
    fields = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3], "rescale_factor": 0.01, "resample": 2}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
    image = picture(100, 90)
    assert_same(saved(image), image, load_options(tmp_path, VISION), **fields)


def test_defaults_and_no_eyes(tmp_path):
    assert load_options(tmp_path, None) is None
    options, theirs = load_options(tmp_path, VISION), Qwen2VLImageProcessorPil()
    assert (options.min_pixels, options.max_pixels) == (theirs.size["shortest_edge"], theirs.size["longest_edge"])
    assert options.mean == tuple(theirs.image_mean) and options.std == tuple(theirs.image_std)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"do_resize": False}, "do_resize"),
        ({"patch_size": 16}, "patch_size"),
        ({"merge_size": 1}, "merge_size"),
        ({"resample": 9}, "resample"),
        ({"image_mean": [1, 2]}, "image_mean"),
        ({"image_std": [0, 1, 1]}, "image_std"),
        ({"min_pixels": 100, "max_pixels": 50}, "min_pixels"),
        ({"size": 3}, "size"),
        ({"max_pixels": "all"}, "max_pixels"),
    ],
)
def test_settings_that_are_refused(tmp_path, fields, word):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=rf"preprocessor_config.json: {word}"):
        load_options(tmp_path, VISION)


# ---------------------------------------------------------------------------------------------------------------------
# What is no image, or too much of one


def png_of_size(width: int, height: int) -> bytes:
    """A file whose header says so; what follows would unpack to that."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10**6)))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(100_000, 100_000), (9_000, 8_000), (11_000, 10_000), (2**31 - 1, 3)])
def test_bombs_are_not_unpacked(monkeypatch, size):
    def load(*_):
        raise AssertionError("unpacked")

    monkeypatch.setattr(PIL.Image.Image, "load", load)
    monkeypatch.setattr(PIL.ImageFile.ImageFile, "load", load)
    assert "more than 67 million pixels" in refusal(png_of_size(*size))


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "no image"),
        (b"hello", "no image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image"),  # Pillow would start a program
        (saved(picture(90, 70))[:600], "damaged"),
        (saved(picture(90, 70), "JPEG")[:700], "damaged"),
        (saved(picture(90, 70), "WEBP")[:300], ""),
        (saved(picture(90, 70), "GIF")[:1000], "damaged"),
        (saved(picture(90, 70))[:60] + b"x" * 500, ""),
    ],
)
def test_broken_files(data, word):
    assert word in refusal(data)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"]),
    st.integers(0, 400),
    st.binary(min_size=1, max_size=9),
)
def test_any_damage_is_one_line(form, place, new):
    data = bytearray(saved(picture(30, 28), form))
    data[place : place + len(new)] = new
    try:
        read_image(bytes(data), OPTIONS)
    except UserError as error:
        assert "\n" not in str(error)


def test_long_and_narrow():
    assert "200 times" in refusal(saved(picture(2010, 10)))
    assert "10 x 2010" in refusal(saved(picture(10, 2010)), name="image x.png")


def test_files(tmp_path):
    assert "nothing.png" in refusal(tmp_path / "nothing.png")
    assert str(tmp_path) in refusal(tmp_path)
    large = tmp_path / "large.png"
    with open(large, "wb") as file:
        file.truncate(2**26 + 1)
    assert "67.1 MB" in refusal(large)
    image = picture(60, 80)
    image.save(tmp_path / "fine one.png")
    for source in (str(tmp_path / "fine one.png"), f"file://{tmp_path}/fine%20one.png"):
        (message,) = read_parts([{"content": [{"type": "image", "image": source}]}], OPTIONS)
        assert message["content"][0]["image"].grid == (1, 6, 4)


# ---------------------------------------------------------------------------------------------------------------------
# Messages and prompts


def part(image: PIL.Image.Image, **fields) -> dict:
    data = base64.b64encode(saved(image)).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"} | fields}


def test_where_images_stand():
    text = {"type": "text", "text": "What?"}
    assert with_images("What?", ["a", "b"]) == [
        {"type": "image", "image": "a"},
        {"type": "image", "image": "b"},
        text,
    ]
    assert with_images("<image>What?", ["a"]) == [{"type": "image", "image": "a"}, text]
    assert [p.get("text", p.get("image")) for p in with_images("x <image> y <image>", "ab")] == ["x ", "a", " y ", "b"]
    with pytest.raises(UserError, match="2 <image> for 1 images"):
        with_images("<image> <image>", ["a"])


def test_images_of_a_turn_keep_their_own_sizes():
    """None is resized to the largest one."""
    messages = [
        {"role": "user", "content": [part(picture(280, 140)), part(picture(56, 84)), {"type": "text", "text": "x"}]}
    ]
    marked, images = bare(read_parts(messages, OPTIONS))
    assert [image.grid for image in images] == [(1, 10, 20), (1, 6, 4)]
    assert marked == [
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "x"}]}
    ]
    ids, placed = place_images([1, 7, 2, 7, 3], images, OPTIONS)
    assert ids == [1, *[7] * 50, 2, *[7] * 6, 3]
    assert [(image.start, image.count) for image in placed] == [(1, 50), (52, 6)]
    with pytest.raises(UserError, match="3 places for 2 images"):
        place_images([7, 7, 7], images, OPTIONS)


def test_low_detail():
    options = ImageOptions(token=0, max_pixels=10**7)
    messages = [{"role": "user", "content": [part(picture(900, 900), detail="low"), part(picture(900, 900))]}]
    _, (low, high) = bare(read_parts(messages, options))
    assert low.grid == (1, 36, 36) and high.grid == (1, 64, 64)
    assert low.key != high.key and low.key < 0


def test_a_key_is_of_the_bytes():
    first, second, other = (read_image(saved(picture(60, 60, seed)), OPTIONS) for seed in (0, 0, 1))
    assert first.key == second.key != other.key


def test_urls_that_are_refused():
    for url, word in (
        ("https://example.com/cat.png", "download"),
        ("data:image/png,abc", "base64"),
        ("data:image/png;base64,a$c", "base64"),
        ("data:image/png;base64,aGVsbG8=", "no image"),
    ):
        with pytest.raises(UserError, match=word):
            read_parts([{"content": [{"type": "image_url", "image_url": {"url": url}}]}], OPTIONS)
    with pytest.raises(UserError, match="no eyes"):
        read_parts([{"content": [part(picture(60, 60))]}], None)


def test_patches_of_one_image_by_hand():
    """A pixel that is known, at the place where it has to be."""
    pixels = numpy.zeros((56, 84, 3), dtype=numpy.uint8)
    pixels[30, 50, 1] = 255  # row 2 of patches, column 3: in the second row of groups the second one, its second patch
    image = read_image(saved(PIL.Image.fromarray(pixels)), OPTIONS)
    patches = image.patches().view(4 * 6, 3, 2, 14, 14)
    bright = (patches[:, 1] > 1).nonzero().tolist()
    group = 1 * 3 + 1
    assert bright == [[group * 4 + 1, frame, 2, 8] for frame in range(2)]
