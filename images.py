"""Images: files or bytes -> pixels and patches, as the published image processor makes them for a model with eyes.

    options = load_options(folder, config.vision)            # what preprocessor_config.json says
    image = read_image(Path("cat.jpg"), options)             # an ImageInput; UserError where the file is no such image
    patches, grid = image.patches(), image.grid              # float32 [h * w, 3 * frames * patch * patch], (1, h, w)
    ids, images = place_images(ids, [image], options)        # each image's token as often as the image has pieces

An image is turned as its EXIF data say, its transparent parts become white, and it is resized to whole patches, with
about its own proportions, within limits of pixels. Patches of one token, merge x merge of them, follow one another.
"""

import base64
import binascii
import contextlib
import hashlib
import io
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from config import VisionConfig
from config_fields import FieldReader
from errors import UserError
from files import gb, read_json

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")  # others have parsers that run programs
MAX_BYTES = 2**26  # of a file
MAX_PIXELS = 2**26  # in it; more are not decompressed
MAX_RATIO = 200  # of the longer side to the shorter one
LOW_DETAIL = 512 * 512  # pixels of an image that a client wants seen in low detail
PLACEHOLDER = "<image>"  # where an image goes in a prompt of plain text
FILES = ("preprocessor_config.json", "processor_config.json")  # the second one holds what the first one may
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
warnings.filterwarnings("ignore", module="PIL")  # of damage that it can live with, and of images too large for us


@dataclass(frozen=True)
class ImageOptions:
    """How a model wants its images."""

    token: int  # the id that stands for each piece of an image in a prompt
    patch: int = 14  # pixels of a side
    frames: int = 2  # that a patch covers: an image is so many equal ones
    merge: int = 2  # patches of a side of what becomes one token
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    scale: float = 1 / 255
    resample: int = Image.Resampling.BICUBIC


@dataclass(frozen=True, eq=False)
class ImageInput:
    """An image of a prompt: its pixels, and where its tokens are."""

    pixels: Tensor  # uint8 [height, width, 3], whole patches
    options: ImageOptions
    digest: str  # of the file's bytes and the size
    start: int = 0  # the first of its tokens in the prompt

    @property
    def grid(self) -> tuple[int, int, int]:
        """Patches: in time, down, across."""
        height, width, _ = self.pixels.shape
        return 1, height // self.options.patch, width // self.options.patch

    @property
    def count(self) -> int:
        """Its tokens."""
        return math.prod(self.grid) // self.options.merge**2

    @property
    def key(self) -> int:
        """A number below 0, the same for the same image only, that stands for its tokens where texts are compared."""
        return -1 - int(self.digest[:15], 16)

    def patches(self) -> Tensor:
        """float32 [patches, 3 * frames * patch * patch], normalized."""
        options = self.options
        mean, std = torch.tensor(options.mean), torch.tensor(options.std)
        x = ((self.pixels.double() * options.scale).float() - mean) / std
        _, down, across = self.grid
        merge, patch = options.merge, options.patch
        x = x.view(down // merge, merge, patch, across // merge, merge, patch, 3)
        x = x.permute(0, 3, 1, 4, 6, 2, 5)  # groups down and across, patches within, channels, pixels
        x = x[:, :, :, :, :, None].expand(*x.shape[:5], options.frames, patch, patch)
        return x.reshape(down * across, -1)


# ---------------------------------------------------------------------------------------------------------------------
# Options


def load_options(folder: Path, vision: VisionConfig | None) -> ImageOptions | None:
    """The options of a checkpoint's images, those of transformers where its files say nothing; None for a model
    without eyes. UserError for settings that the model or this program cannot honour."""
    if vision is None:
        return None
    path = next((folder / name for name in FILES if (folder / name).is_file()), None)
    fields = {} if path is None else read_json(path)
    fields = fields.get("image_processor", fields)
    read = FieldReader(fields, str(path))
    for name in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        if not read.flag(name, default=True):
            raise read.error(name, "false is not supported; images are resized, normalized and made RGB")
    shape = {"patch_size": vision.patch, "temporal_patch_size": vision.frames, "merge_size": vision.merge}
    for name, own in shape.items():
        if read.integer(name, default=own) != own:
            raise read.error(name, f"{read.value(name)} differs from the {own} of config.json's vision_config")
    resample = read.value("resample", ImageOptions.resample)
    if resample not in list(Image.Resampling):
        raise read.error("resample", f"{resample!r} is not one of Pillow's filters, 0 to 5")
    least, most = read_limits(read)
    return ImageOptions(
        token=vision.token,
        patch=vision.patch,
        frames=vision.frames,
        merge=vision.merge,
        min_pixels=least,
        max_pixels=most,
        mean=read_triple(read, "image_mean", CLIP_MEAN),
        std=read_triple(read, "image_std", CLIP_STD),
        scale=read.number("rescale_factor", default=ImageOptions.scale),
        resample=int(resample),
    )


def read_limits(read: FieldReader) -> tuple[int, int]:
    """The fewest and the most pixels: `min_pixels` and `max_pixels`, in `size` too, or its older names."""
    size = read.value("size", {})
    if not isinstance(size, dict):
        raise read.error("size", f"{size!r} is not an object of shortest_edge and longest_edge")
    inner = FieldReader(size, f"{read.where}: size")
    limits = []
    for name, edge, default in (
        ("min_pixels", "shortest_edge", ImageOptions.min_pixels),
        ("max_pixels", "longest_edge", ImageOptions.max_pixels),
    ):
        default = inner.integer(edge, default=inner.integer(name, default=default))
        limits.append(read.integer(name, default=default))
    if limits[0] > limits[1]:
        raise read.error("min_pixels", f"{limits[0]} is more than max_pixels {limits[1]}")
    return limits[0], limits[1]


def read_triple(read: FieldReader, name: str, default: tuple[float, ...]) -> tuple[float, ...]:
    """A number for each channel."""
    value = read.value(name, list(default))
    numbers = isinstance(value, list) and all(isinstance(x, (int, float)) and 0 < x < 1e3 for x in value)
    if not numbers or len(value) != 3:
        raise read.error(name, f"{value!r} is not a list of three numbers above 0")
    return tuple(map(float, value))


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_image(source: Path | bytes, options: ImageOptions, name: str = "the image", low: bool = False) -> ImageInput:
    """An image of a file, or of a file's bytes, which errors call by this name; `low`: in low detail.

    UserError for what is no image, broken, too large, or far longer than wide.
    """
    if isinstance(source, Path):
        name, source = f"image {source}", read_file(source)
    if low:
        options = replace(options, max_pixels=max(min(options.max_pixels, LOW_DETAIL), options.min_pixels))
    image = decode(source, name)
    height, width = resized(image.height, image.width, options, name)
    image = image.resize((width, height), resample=options.resample)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(height, width, 3)
    digest = hashlib.sha256(source + f" {height} x {width}".encode())
    return ImageInput(pixels, options, digest.hexdigest())


def read_file(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"image {path}: {error.strerror}; name a readable file") from error
    if len(data) > MAX_BYTES:
        raise UserError(f"image {path} has more than {gb(MAX_BYTES)}; make it smaller")
    return data


def decode(data: bytes, name: str) -> Image.Image:
    """The bytes of a file -> its (first) image, upright, in RGB, on white where it is transparent."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError
        image = ImageOps.exif_transpose(image)
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise UserError(f"{name} is no image of a known format; give a {', '.join(FORMATS[:-1])} or PPM") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{name} has more than {MAX_PIXELS / 1e6:.0f} million pixels; make it smaller") from error
    except Exception as error:  # parsers of damaged files raise whatever they stumble over
        raise UserError(f"{name} is damaged ({error}); give it whole") from error


def resized(height: int, width: int, options: ImageOptions, name: str = "the image") -> tuple[int, int]:
    """The size in whole tokens, of about the same proportions and within the limits. UserError for an image that is
    too long and narrow."""
    if not min(height, width) or max(height, width) > MAX_RATIO * min(height, width):
        raise UserError(
            f"{name} is {width} x {height} pixels, one side more than {MAX_RATIO} times as long as the other; cut it"
        )
    unit = options.patch * options.merge
    down, across = round(height / unit), round(width / unit)
    if down * across * unit**2 > options.max_pixels:
        shrink = math.sqrt(height * width / options.max_pixels)
        down, across = (max(1, math.floor(side / shrink / unit)) for side in (height, width))
    elif down * across * unit**2 < options.min_pixels:
        grow = math.sqrt(options.min_pixels / (height * width))
        down, across = (math.ceil(side * grow / unit) for side in (height, width))
    return down * unit, across * unit


def read_source(source: str, options: ImageOptions, low: bool = False) -> ImageInput:
    """An image that a user of this machine names: a path, a file: URL or a data: URL."""
    if source.startswith("data:"):
        return read_image(decode_data_url(source), options, low=low)
    if source.startswith(("http://", "https://")):
        raise UserError(f"image {source[:80]}: images come from files here; download it and give its path")
    path = unquote(urlsplit(source).path) if source.startswith("file://") else source
    return read_image(Path(path), options, low=low)


def decode_data_url(url: str) -> bytes:
    """What a data: URL holds in base64."""
    head, comma, data = url.partition(",")
    if comma and head.endswith(";base64"):
        with contextlib.suppress(binascii.Error, ValueError):
            return base64.b64decode("".join(unquote(data).split()), validate=True)
    raise UserError(f"image {url[:40]!r}... is no data: URL in base64; write it as data:image/png;base64,...")


# ---------------------------------------------------------------------------------------------------------------------
# Messages and prompts


def is_image(part: Any) -> bool:
    """Whether a part of a message is {"type": "image", "image": ...}, or OpenAI's {"type": "image_url", ...}."""
    return isinstance(part, dict) and part.get("type") in ("image", "image_url")


def source_of(part: dict[str, Any]) -> Any:
    """Where the image of a part comes from: a path or a URL; or an ImageInput that has been read."""
    source = part.get(part["type"])
    return source.get("url") if isinstance(source, dict) else source


def wants_low_detail(part: dict[str, Any]) -> bool:
    return isinstance(part.get("image_url"), dict) and part["image_url"].get("detail") == "low"


def with_images(text: str, sources: Sequence[Any]) -> list[dict[str, Any]]:
    """A content of text and images: these stand where <image> does in the text, or before all of it."""
    images = [{"type": "image", "image": source} for source in sources]
    texts = text.split(PLACEHOLDER)
    if len(texts) == 1:
        return [*images, {"type": "text", "text": text}]
    if len(texts) - 1 != len(images):
        raise UserError(f"the prompt has {len(texts) - 1} {PLACEHOLDER} for {len(images)} images; make them equal")
    parts = [{"type": "text", "text": texts[0]}]
    for image, after in zip(images, texts[1:], strict=True):
        parts += [image, {"type": "text", "text": after}]
    return [part for part in parts if part.get("text") != ""]


def read_parts(
    messages: list[dict[str, Any]],
    options: ImageOptions | None,
    read: Callable[[str, ImageOptions, bool], ImageInput] = read_source,
) -> list[dict[str, Any]]:
    """The messages, with images read. UserError where there are some and the model has no eyes."""

    def loaded(part: Any) -> Any:
        if not is_image(part) or isinstance(source_of(part), ImageInput):
            return part
        if options is None:
            raise UserError("this model has no eyes; leave the images out, or take one that has, as Qwen2.5-VL")
        return {"type": "image", "image": read(source_of(part), options, wants_low_detail(part))}

    contents = [message.get("content") for message in messages]
    return [
        message | {"content": list(map(loaded, content))} if isinstance(content, list) else message
        for message, content in zip(messages, contents, strict=True)
    ]


def bare(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[ImageInput]]:
    """Messages whose images have been read -> the same for a chat template, which marks their places; the images."""
    images: list[ImageInput] = []

    def without(part: Any) -> Any:
        if not is_image(part):
            return part
        images.append(part["image"])
        return {"type": "image"}

    marked = [
        message | {"content": list(map(without, message["content"]))}
        if isinstance(message.get("content"), list)
        else message
        for message in messages
    ]
    return marked, images


def place_images(
    ids: list[int], images: Sequence[ImageInput], options: ImageOptions | None
) -> tuple[list[int], tuple[ImageInput, ...]]:
    """A prompt with one token for each image -> with as many as each image has, and the images with their places."""
    if not images:
        return ids, ()
    places = [i for i, token in enumerate(ids) if token == options.token]
    if len(places) != len(images):
        raise UserError(
            f"the prompt has {len(places)} places for {len(images)} images; the chat template has to mark each image,"
            " and the text must not hold the mark itself"
        )
    longer: list[int] = []
    placed, copied = [], 0
    for place, image in zip(places, images, strict=True):
        longer += ids[copied:place]
        placed.append(replace(image, start=len(longer)))
        longer += [options.token] * image.count
        copied = place + 1
    return longer + ids[copied:], tuple(placed)
