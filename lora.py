"""LoRA adapters in the format of PEFT, which LLaMA-Factory, Unsloth and TRL write too: read, and mapped to our layers.

    adapter = read_adapter("saves/qwen/lora/sft", fields)    # fields: the parsed config.json of the base
    adapter.deltas["layers.0.attention.wqkv"]                # [Delta, ...]: rows start: of the layer get scale * b @ a
    adapter.saved["output.weight"]                           # {0: Piece}: rows that replace the base's

An adapter is a folder, or a repo of the hub, with adapter_config.json and adapter_model.safetensors or .bin. What it
adapts is found by the names of its tensors, through the same tables by which the converter finds those of a checkpoint.
merge.py adds it to a checkpoint's weights. https://arxiv.org/abs/2106.09685
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config import ModelConfig
from config_fields import FieldReader, text_fields
from errors import UserError, log
from families import FAMILIES
from files import read_json, refuse_lfs_pointer
from formats.hub import ADAPTER_FILES, cached, download_adapter
from formats.names import Piece, Place, equal, places, text_names
from formats.packed import Stored
from formats.pickled import PickledFiles
from weights import FLOATS, check_finite, read_header

CONFIG, *WEIGHTS = ADAPTER_FILES
EMBEDDING, OUTPUT = "tok_embeddings", "output"

# Fields of adapter_config.json with which more is computed than W + scale * B @ A -> what people call it.
REFUSED = {
    "alora_invocation_tokens": "an activated LoRA, which begins amid a text", "arrow_config": "Arrow, which routes",
    "kasa_config": "KaSA", "layer_replication": "layer replication", "lora_bias": "a bias of its own",
    "monteclora_config": "MonteCLoRA", "use_bdlora": "block-diagonal LoRA", "use_qalora": "QA-LoRA",
}  # fmt: skip
# Values of init_lora_weights by which training began with another base: with what it took from that already in A and B.
CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
PATTERN = r"(.*\.)?({})$"  # of the keys of rank_pattern and alpha_pattern: they fit the end of a name


@dataclass(frozen=True)
class Delta:
    """What is added to some rows of a layer: scale * b @ a. Of embeddings these are the rows of tokens.

    With a magnitude (DoRA) the rows are then scaled to these norms; of an embedding the columns are.
    """

    a: Tensor  # float32 [r, in]
    b: Tensor  # float32 [rows, r]
    scale: float
    start: int  # the first of these rows in the layer, or in an expert's part of it
    expert: int | None = None
    magnitude: Tensor | None = None  # float32 [rows], of an embedding [in]


@dataclass(frozen=True)
class Adapter:
    """An adapter in our names."""

    name: str
    base: str | None  # what it was trained on, as its config says
    rank: int  # the largest
    deltas: dict[str, list[Delta]]  # our layer -> what is added to it
    saved: dict[str, dict[int, Piece]]  # our tensor -> its first row (experts' one after the other) -> what replaces it
    # Of these PEFT saved the base's own along, as it does where an embedding is adapted: they were not trained.
    frozen: frozenset[str]
    token_rows: dict[str, tuple[Tensor, Tensor]]  # our tensor -> ids int64 [n], and their rows float32 [n, dim]
    vocab_size: int  # with this adapter
    tied: bool  # whether the output projection still is the embedding

    @property
    def is_dora(self) -> bool:
        return any(delta.magnitude is not None for parts in self.deltas.values() for delta in parts)


def read_adapter(path: Path | str, fields: dict[str, Any], base: str | None = None) -> Adapter:
    """Reads an adapter, a folder or ORG/NAME of the hub, for a base with these fields of config.json.

    Warns where the adapter was trained on a model of another name than `base`. UserError names the first thing that is
    missing, not supported, or does not fit the base.
    """
    folder = find_adapter(path)
    name = cached(folder)[1] or str(folder.resolve())
    read = FieldReader(read_json(folder / CONFIG), f"{folder / CONFIG}")
    check_config(read)
    tensors = open_tensors(folder)
    trained_on = read.value("base_model_name_or_path")
    trained_on = trained_on if isinstance(trained_on, str) else None
    if base and trained_on and last_part(base).lower() != last_part(trained_on).lower():
        log(f"warning: {folder} was trained on {trained_on!r}, not on {base!r}; check that they are the same model")
    return Reader(folder, read, tensors, fields).adapter(last_part(name), trained_on)


def last_part(path: str) -> str:
    """Of a path, also one of Windows, or ORG/NAME."""
    return path.replace("\\", "/").rstrip("/").rpartition("/")[2]


# ---------------------------------------------------------------------------------------------------------------------
# The files


def find_adapter(path: Path | str) -> Path:
    """The folder of an adapter, downloaded where it is no local one. UserError when there is none."""
    folder = Path(path)
    if folder.is_file() and folder.name in (CONFIG, *WEIGHTS):
        folder = folder.parent
    folder = cached(folder)[0]
    if not folder.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(path)):
        folder = download_adapter(str(path))
    if not folder.is_dir():
        raise UserError(f"{path} is not there; name the folder of an adapter, or its ORG/NAME on the hub")
    if not (folder / CONFIG).is_file():
        if inner := sorted(entry.parent.name for entry in folder.glob(f"*/{CONFIG}")):
            raise UserError(f"{folder} has no {CONFIG}, but {', '.join(inner)} in it have; name one of these")
        raise UserError(f"{folder} has no {CONFIG}, so it is no adapter of PEFT; name the folder that has one")
    return folder


def open_tensors(folder: Path) -> dict[str, Stored]:
    """The tensors of an adapter, by the names that its base has for what they belong to."""
    found = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        raise UserError(f"{folder} has no {' or '.join(WEIGHTS)}; save the adapter again, or get all of it")
    refuse_lfs_pointer(found)
    tensors: dict[str, Stored] = (
        read_header(found)[0] if found.suffix != ".bin" else dict(PickledFiles([found]).tensors)
    )
    if not tensors:
        raise UserError(f"{found} holds no tensor; save the adapter again")
    for name, tensor in tensors.items():
        if 0 in tensor.shape:
            raise UserError(
                f"{found}: tensor {name!r} has the shape {list(tensor.shape)}, as a sharded trainer saves it that did"
                " not gather its weights (ZeRO-3, FSDP); gather them, and save the adapter again"
            )
        if tensor.dtype not in (*FLOATS, torch.float64):
            raise UserError(f"{found}: tensor {name!r} is {tensor.dtype}, not a float; get the adapter again")
    for prefix in ("module.", "_orig_mod.", "base_model.model."):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def check_config(read: FieldReader) -> None:
    """UserError when it is something else than LoRA, or needs what is not supported."""
    kind = read.value("peft_type")
    if kind != "LORA":
        what = f"{kind!r} is not supported, only 'LORA' is" if kind else "the field is missing"
        raise read.error("peft_type", f"{what}; merge it with peft, and convert the result")
    for name, what in REFUSED.items():
        if read.value(name) not in (None, False, [], {}):
            raise read.error(name, f"{what} is not supported; merge it with peft where it can, and convert the result")
    start = read.value("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(CHANGED_BASE):
        raise read.error(
            "init_lora_weights",
            f"{start!r} changed the base's weights when training began; save the adapter with"
            " path_initial_model_for_weight_conversion, which makes it one for the base as it is",
        )
    read.integer("r", default=8, maximum=2**16)
    read.flag("use_rslora")
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = read.value(name, {})
        if not isinstance(pattern, dict):
            raise read.error(name, "is not an object")
        for key, value in pattern.items():
            shown = repr(key)
            inner = FieldReader({shown: value}, f"{read.where}: {name}")
            _ = inner.integer(shown, maximum=2**16) if name == "rank_pattern" else inner.number(shown)
            try:
                re.compile(PATTERN.format(key))
            except (re.error, OverflowError, RecursionError) as error:
                raise inner.error(shown, f"is no regular expression ({error}); correct it") from error


# ---------------------------------------------------------------------------------------------------------------------
# The tensors

LORA = re.compile(
    r"(?P<module>.*)\.(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.default)?(?:\.weight)?"
)
TOKENS = re.compile(r"(?P<module>.*?)(?:\.token_adapter)?\.trainable_tokens_delta(?:\.default)?")
COPIES = r"\.(token_adapter\.base_layer|base_layer|original_module)(?=\.|$)"
WRAPPERS = re.compile(rf"{COPIES}|\.modules_to_save(\.default)?(?=\.|$)")


class Reader:
    """The tensors of one adapter, on their way to their places in the base."""

    def __init__(self, folder: Path, read: FieldReader, tensors: Mapping[str, Stored], fields: dict[str, Any]):
        self.folder, self.read = folder, read
        self.base = ModelConfig.from_hf(fields)
        self.names = FAMILIES[text_fields(fields)["model_type"]].names
        tensors = text_names(tensors, self.names)
        self.pairs: dict[str, dict[str, Stored]] = defaultdict(dict)  # by module; those of experts are nested
        self.token_rows: dict[str, Stored] = {}
        self.whole: dict[str, Stored] = {}
        self.copies: set[str] = set()
        for name in sorted(tensors, key=preference, reverse=True):
            if found := LORA.fullmatch(name):
                self.pairs[found["module"]][found["kind"]] = tensors[name]
            elif found := TOKENS.fullmatch(name):
                self.token_rows[found["module"]] = tensors[name]
            elif ".lora_" in name:
                raise self.error(name, "is no part of a plain LoRA; merge it with peft, and convert the result")
            else:
                plain = WRAPPERS.sub("", name)
                self.whole[plain] = tensors[name]
                (self.copies.add if preference(name) == 2 else self.copies.discard)(plain)
        self.config = replace(self.base, vocab_size=self.vocab_size(), tied=False)
        self.places = places(self.config, self.names)

    def error(self, name: str, what: str) -> UserError:
        return UserError(f"{self.folder}: tensor {name!r} {what}")

    def vocab_size(self) -> int:
        """The rows of the embedding with which it was trained."""
        heads = [f"{self.names.parts[part][0]}.weight" for part in (EMBEDDING, OUTPUT)]
        sizes = {name: self.whole[name].shape[0] for name in heads if name in self.whole and self.whole[name].shape}
        new = {name: size for name, size in sizes.items() if size != self.base.vocab_size}
        if not new:
            return self.base.vocab_size
        name, size = next(iter(new.items()))
        embedding, output = heads
        if self.base.tied and output in self.copies and embedding not in self.whole:  # PEFT saved their matrix once
            self.whole[embedding], sizes[embedding] = self.whole[output], size
            self.copies.add(embedding)
        missing = [head for head in heads if sizes.get(head) != size]
        if missing and not (self.base.tied and missing == [output] and output not in sizes):
            raise self.error(
                name,
                f"has {size} rows where the base has {self.base.vocab_size}, but {missing[0]!r} has not; train it"
                " again with both in modules_to_save, or merge it with peft where it was trained",
            )
        return size

    def adapter(self, name: str, base: str | None) -> Adapter:
        saved: dict[str, dict[int, Piece]] = defaultdict(dict)
        frozen = set()
        for source, tensor in self.whole.items():
            place = self.place(source)
            if tensor.shape != place.wanted.shape:
                raise self.error(source, f"has the shape {list(tensor.shape)}, the base's {list(place.wanted.shape)}")
            wanted = place.wanted
            saved[place.ours][place.start] = Piece(tensor, wanted.transform, wanted.stacked, wanted.group)
            if source in self.copies:
                frozen.add(place.ours)
        deltas: dict[str, list[Delta]] = defaultdict(list)
        for module in self.pairs:
            for ours, delta in self.read_pair(module):
                deltas[ours].append(delta)
        rows = dict(self.read_token_rows())
        if not (deltas or saved or rows):
            raise UserError(f"{self.folder} holds no tensor that adapts the base; save the adapter again")
        tied = self.base.tied and self.stays_tied(deltas, saved, rows)
        if tied:
            deltas.pop(OUTPUT, None)
            saved.pop(f"{OUTPUT}.weight", None)
            rows.pop(f"{OUTPUT}.weight", None)
        rank = max((delta.a.shape[0] for parts in deltas.values() for delta in parts), default=0)
        ordered = {
            ours: sorted(parts, key=lambda delta: (delta.expert or 0, delta.start)) for ours, parts in deltas.items()
        }
        whole = {ours: dict(sorted(pieces.items())) for ours, pieces in saved.items()}
        kept = frozenset(frozen & saved.keys())
        return Adapter(name, base, rank, ordered, whole, kept, rows, self.config.vocab_size, tied)

    def place(self, source: str) -> Place:
        if source not in self.places:
            raise self.error(source, "belongs to nothing that the base has; take the base that it was trained on")
        return self.places[source]

    # -----------------------------------------------------------------------------------------------------------------
    # A and B

    def read_pair(self, module: str) -> Iterator[tuple[str, Delta]]:
        """What one pair of A and B adds, or that of all experts, and to which of our layers."""
        parts, target = self.pairs[module], WRAPPERS.sub("", module)
        embedded = any("embedding" in kind for kind in parts)
        kinds = [f"lora_{'embedding_' if embedded else ''}{part}" for part in "AB"]
        for kind, other in (kinds, reversed(kinds)):
            if kind not in parts:
                there = other if other in parts else next(iter(parts))
                raise self.error(
                    f"{module}.{kind}", f"is missing, though {there} of it is there; save the adapter again"
                )
            if len(parts[kind].shape) != 2:
                raise self.error(f"{module}.{kind}", f"has the shape {list(parts[kind].shape)}, not that of a matrix")
        a, b = (check_finite(parts[kind].read().float(), f"{module}.{kind}", self.folder) for kind in kinds)
        magnitude = parts.get("lora_magnitude_vector")
        if magnitude is not None:
            magnitude = check_finite(magnitude.read().float().flatten(), f"{module}.lora_magnitude_vector", self.folder)
        if embedded:  # [r, tokens] and [dim, r]
            a, b = b.t().contiguous(), a.t().contiguous()
        found = [name for name in candidates(target) if name in self.places]
        if not found:
            raise self.error(f"{module}.{kinds[0]}", "adapts nothing that the base has; take the base of this adapter")
        shape = b.shape[0], a.shape[1]
        fitting = (name for name in found if shape == (self.places[name].rows, self.places[name].inputs))
        adapted = next(fitting, found[0])
        place = self.places[adapted]
        if shape != (place.rows, place.inputs):
            raise self.error(
                f"{module}.{kinds[0]}",
                f"and {kinds[1]} adapt a layer of {shape[1]} inputs and {shape[0]} outputs, the base's has"
                f" {place.inputs} and {place.rows}",
            )
        experts = place.experts or 1
        if a.shape[0] != b.shape[1] or a.shape[0] % experts:
            raise self.error(f"{module}.{kinds[0]}", f"has the rank {a.shape[0]}, {kinds[1]} {b.shape[1]}")
        rank = a.shape[0] // experts
        scale = self.scale(adapted, rank)
        if magnitude is not None:
            expected = place.inputs if embedded else place.rows
            if place.experts or len(magnitude) != expected:
                raise self.error(f"{module}.lora_magnitude_vector", f"has {len(magnitude)} elements, not {expected}")
            magnitude = magnitude if embedded else place.wanted.in_our_order(magnitude).contiguous()
        ours = place.ours.removesuffix(".weight")
        if not place.experts:
            b = place.wanted.in_our_order(b).contiguous()
            yield ours, Delta(a, b, scale, place.start, place.expert, magnitude)
            return
        # The ranks of an expert lie together in A, and by turns with those of the others in B.
        pairs = zip(a.split(rank), b.unflatten(1, (rank, experts)).unbind(2), strict=True)
        for expert, (own_a, own_b) in enumerate(pairs):
            yield ours, Delta(own_a, place.wanted.in_our_order(own_b).contiguous(), scale, place.start, expert)

    def scale(self, weight: str, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r) (rsLoRA), for a weight. UserError when the config has another rank."""
        wanted = int(self.pattern("rank_pattern", weight, self.read.integer("r", default=8)))
        if wanted != rank:
            raise self.error(weight, f"is adapted with the rank {rank}, adapter_config.json says {wanted}")
        alpha = self.pattern("alpha_pattern", weight, self.read.number("lora_alpha", default=8))
        return alpha / math.sqrt(rank) if self.read.flag("use_rslora") else alpha / rank

    def pattern(self, field: str, weight: str, default: float) -> float:
        """What the first regular expression says that fits the name of a weight or of its module, or an end of it."""
        names = (weight.removesuffix(".weight"), weight)
        for key, value in self.read.value(field, {}).items():
            if any(re.match(PATTERN.format(key), name) for name in names):
                return value
        return default

    # -----------------------------------------------------------------------------------------------------------------
    # Embeddings

    def read_token_rows(self) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
        """The tensors of which single rows were trained: our name -> the ids and the rows."""
        field = self.read.value("trainable_token_indices")
        for module, tensor in self.token_rows.items():
            place = self.place(f"{module}.weight")
            if place.ours not in (f"{EMBEDDING}.weight", f"{OUTPUT}.weight"):
                raise self.error(module, "has trained tokens, but is no embedding")
            ids = field
            if isinstance(field, dict):
                fitting = [ids for key, ids in field.items() if f".{module}".endswith(f".{key}")]
                if not fitting and self.base.tied:  # those of the embedding
                    fitting = list(field.values())
                ids = fitting[0] if fitting else None
            limit, dim = place.wanted.shape
            if not isinstance(ids, list) or any(type(i) is not int or not 0 <= i < limit for i in ids):
                raise self.read.error("trainable_token_indices", f"does not list tokens of {module!r} below {limit}")
            if tensor.shape != (len(ids), dim):
                raise self.error(module, f"has rows of the shape {list(tensor.shape)}, not {[len(ids), dim]}")
            rows = check_finite(tensor.read().float(), module, self.folder)
            yield place.ours, (torch.tensor(ids, dtype=torch.int64), rows)

    def stays_tied(
        self, deltas: dict[str, list[Delta]], saved: dict[str, dict[int, Piece]], rows: dict[str, tuple[Tensor, Tensor]]
    ) -> bool:
        """Whether the embedding and the output projection of a tied base still are one matrix."""
        embedding, output = f"{EMBEDDING}.weight", f"{OUTPUT}.weight"
        if not (OUTPUT in deltas or output in saved or output in rows):
            changed = EMBEDDING in deltas or embedding in saved  # single rows PEFT ties by itself
            resized = self.config.vocab_size != self.base.vocab_size
            return not changed or resized or self.read.flag("ensure_weight_tying")
        if len(deltas.get(EMBEDDING, [])) != len(deltas.get(OUTPUT, [])):
            return False
        if (embedding in saved) != (output in saved) or (embedding in rows) != (output in rows):
            return False
        pairs = zip(deltas.get(EMBEDDING, []), deltas.get(OUTPUT, []), strict=True)
        return (
            all(
                x.scale == y.scale
                and x.magnitude is y.magnitude is None
                and torch.equal(x.a, y.a)
                and torch.equal(x.b, y.b)
                for x, y in pairs
            )
            and (embedding not in saved or equal(saved[embedding][0].tensor, saved[output][0].tensor))
            and (embedding not in rows or all(map(torch.equal, rows[embedding], rows[output])))
        )


def preference(name: str) -> int:
    """Which of several tensors of one name counts: the least. Of a resized vocabulary PEFT saves all wrappers of an
    embedding: what was trained, once more as modules_to_save, and the base's."""
    return 2 if re.search(COPIES, name) else 1 if WRAPPERS.search(name) else 0


def candidates(module: str) -> Iterator[str]:
    """The weights that a module of A and B may be for: its own, or those of stacked experts."""
    yield f"{module}.weight"
    yield f"{module}.gate_up_proj"
    yield f"{module}.down_proj"
