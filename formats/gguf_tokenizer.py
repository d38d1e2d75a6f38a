"""The tokenizer that a GGUF file holds in its metadata, as the files of a Hugging Face checkpoint.

    files = tokenizer_files(open_gguf(path).metadata)    # {"tokenizer.json": b"...", "tokenizer_config.json": ...}

The ids are llama.cpp's. Its "llama" vocabulary is sentencepiece's BPE: any two neighbours that make a piece may be
merged, the piece with the highest score first. "gpt2" is byte-level BPE: merges in their order, within the words into
which a pattern splits the text. Of the pattern the file holds the name only; SPLITS has what each name means.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from errors import UserError, log
from formats.gguf_splits import BOS_FIRST, PLAIN, SPLITS, WHOLE_WORDS

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5  # tokenizer.ggml.token_type; 6 is a byte
FOUND_WHOLE = (UNKNOWN, CONTROL, USER_DEFINED)  # looked for in the text before all else
# Control tokens by their names, whatever type the file gives them: those that end a text ...
ENDS = frozenset([
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
    "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "[e~[", "<｜end▁of▁sentence｜>",
])  # fmt: skip
# ... and those of code with a gap to fill, unless the file says which they are. The last three end a text as well.
FILL = {
    "fim_pre": ["<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>",
                "<|code_prefix|>", "<|prefix|>"],
    "fim_suf": ["<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>",
                "<|code_suffix|>", "<|suffix|>"],
    "fim_mid": ["<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>",
                "<|code_middle|>", "<|middle|>"],
    "fim_pad": ["<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"],
    "fim_rep": ["<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"],
    "fim_sep": ["<|file_sep|>"],
}  # fmt: skip
HARMONY = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")  # gpt-oss's parts of a reply
SPECIAL = ("bos", "eos", "eot", "eom", "unknown")  # what a text cannot do without: tokenizer.ggml.bos_token_id, ...
REFUSED = {"bert": "WordPiece", "t5": "Unigram", "rwkv": "RWKV's", "plamo2": "PLaMo 2's", "hybriddna": "of DNA"}
NO_ID = 2**32 - 1  # -1 as an unsigned number: there is no such token


@dataclass(frozen=True)
class Vocabulary:
    """What the metadata says, checked. tokens, types, scores: one for each id."""

    kind: str  # "llama", "gpt2" or "gemma4"
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    merges: list[tuple[str, str]]
    ids: dict[str, int]  # "bos", "eos", "eot", ... -> id
    ends: list[int]  # the ids that end a text, eos first

    def text(self, name: str) -> str | None:
        """The file's "bos", "eos", ..., if it is a token that is looked for in a text."""
        i = self.ids.get(name)
        return self.tokens[i] if i is not None and self.types[i] in FOUND_WHOLE else None

    def pieces(self) -> dict[str, int]:
        """Token -> id, without the names that llama.cpp's converter gives to rows of the embedding without a token."""
        kinds = enumerate(zip(self.tokens, self.types, strict=True))
        return {token: i for i, (token, kind) in kinds if kind != UNUSED or token != f"[PAD{i}]"}


def tokenizer_files(metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """{file name: content} of the tokenizer, its chat templates and the ids that end a text; {} where there is none.

    Raises UserError where the vocabulary is damaged or of a kind that is not supported.
    """
    kind = str(metadata.get("tokenizer.ggml.model", "none"))
    if kind in ("none", "no_vocab"):
        return {}
    if kind not in ("llama", "gpt2", "gemma4"):
        known = f" ({REFUSED[kind]})" if kind in REFUSED else ""
        raise UserError(
            f"the GGUF file's tokenizer is {kind[:40]!r}{known}, which is not supported; take another model"
        )
    vocabulary = read_vocabulary(metadata, kind)
    pre = split_name(metadata, vocabulary.kind)
    if vocabulary.kind == "llama":
        prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
        backend = sentencepiece_bpe(vocabulary, scored_merges(vocabulary), prefix)
    elif pre in PLAIN:
        backend = sentencepiece_bpe(vocabulary, vocabulary.merges, prefix=False)
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(*SPLITS[pre]), "isolated")
    else:
        backend = byte_level_bpe(vocabulary, pre)
    add_tokens(backend, vocabulary, str(metadata.get("general.name", "")).lower())
    add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", vocabulary.kind == "llama" or pre in BOS_FIRST))
    add_bos = add_bos or vocabulary.kind == "gemma4"  # whose first files say no, which is wrong
    bos = vocabulary.ids.get("bos")
    if add_bos and bos is not None:
        token = {"id": "bos", "ids": [bos], "tokens": [vocabulary.tokens[bos]]}
        backend.post_processor = processors.TemplateProcessing(single=["bos", "$A"], special_tokens=[token])
    templates = chat_templates(metadata)
    warn_of_plain_tokens(vocabulary, templates)
    return {"tokenizer.json": backend.to_str().encode()} | config_files(vocabulary, add_bos, templates)


# ---- what the metadata says ----


def read_vocabulary(metadata: Mapping[str, Any], kind: str) -> Vocabulary:
    """The vocabulary. UserError where its parts are missing, or do not fit each other."""
    tokens = read_array(metadata, "tokens", str)
    if not tokens:
        raise UserError("the GGUF file has a tokenizer without tokens; download it again")
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
    index = {token: i for i, token in enumerate(tokens)}
    if len(index) < len(tokens):
        i, token = next((i, token) for i, token in enumerate(tokens) if index[token] != i)
        raise UserError(
            f"the GGUF file's vocabulary has {token[:40]!r} twice, as {i} and {index[token]}; take another file"
        )
    scores = read_array(metadata, "scores", Real, len(tokens))
    if scores and any(map(math.isnan, scores)):
        raise UserError("the GGUF file's tokenizer.ggml.scores are not all numbers; download it again")
    merges = read_array(metadata, "merges", str)
    if kind != "llama" and not merges:
        raise UserError("the GGUF file has a BPE tokenizer without merges; take one that a newer llama.cpp converted")
    if kind == "llama" and merges and is_byte_level(tokens):
        log("warning: the GGUF file calls its tokenizer sentencepiece's, but its pieces are byte-level BPE's: read so")
        kind = "gpt2"
    merges = split_merges(merges, index) if merges and kind != "llama" else []
    ids = read_ids(metadata, kind, len(tokens))
    types = read_array(metadata, "token_type", Integral, len(tokens)) or [NORMAL] * len(tokens)
    ends = correct_types(types, index, ids)
    return Vocabulary(kind, tokens, types, scores, merges, ids, ends)


def read_array(metadata: Mapping[str, Any], name: str, kind: type, length: int | None = None) -> list | None:
    """The list tokenizer.ggml.NAME; None where it is missing. UserError where it does not hold `length` values of a
    kind."""
    values = metadata.get(f"tokenizer.ggml.{name}")
    if values is None:
        return None
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, list | tuple) or not all(isinstance(value, kind) for value in values):
        raise UserError(f"the GGUF file's tokenizer.ggml.{name} has values of a wrong type; download it again")
    if length is not None and len(values) != length:
        raise UserError(
            f"the GGUF file's tokenizer.ggml.{name} has {len(values)} values for {length} tokens; download it again"
        )
    if kind is str:
        check_text(f"tokenizer.ggml.{name}", "".join(values))
    return list(values)


def check_text(key: str, text: Any) -> str:
    """The text. UserError where it is none, or cannot be written as UTF-8."""
    try:
        text.encode()
    except (AttributeError, UnicodeEncodeError):
        raise UserError(f"the GGUF file's {key} is not UTF-8 text; download it again") from None
    return text


def read_ids(metadata: Mapping[str, Any], kind: str, size: int) -> dict[str, int]:
    """The special tokens that the file names. UserError where one is outside the vocabulary."""
    ids = {"unknown": 0, "bos": 1, "eos": 2} if kind == "llama" and size > 2 else {}
    for name in (*SPECIAL, "padding", *FILL):
        key = f"tokenizer.ggml.{name}_token_id"
        i = metadata.get(key)
        if isinstance(i, Integral) and 0 <= i < size:
            ids[name] = int(i)
        elif i is None or (isinstance(i, Integral) and i in (-1, NO_ID)):
            continue
        elif name in SPECIAL:
            raise UserError(
                f"the GGUF file's {key} is {str(i)[:40]}, but it has {size} tokens; correct it, or take another file"
            )
        else:
            log(f"warning: the GGUF file's {key} is {str(i)[:40]}, but it has {size} tokens; it is ignored")
    return ids


def correct_types(types: list[int], index: Mapping[str, int], ids: dict[str, int]) -> list[int]:
    """Makes control tokens of those that are known by their names, adds FILL's to `ids`, and returns the ids that end a
    text. All of it as llama.cpp does, but that the file's bos, eos, ... are control tokens as well if they look so:
    llama.cpp would read the bos that a chat template writes as text."""
    tokens = list(index)
    for i in (ids[name] for name in SPECIAL if name in ids):
        if types[i] == NORMAL and re.fullmatch(r"[<\[].+[>\]]", tokens[i]):
            types[i] = CONTROL
    for token in HARMONY:
        if token in index and types[index[token]] not in FOUND_WHOLE:
            types[index[token]] = CONTROL
    for name, texts in FILL.items():
        found = [index[text] for text in texts if text in index and name not in ids]
        for i in found:
            types[i] = CONTROL
        ids |= {name: found[0]} if found else {}
    ends = [ids[name] for name in ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep") if name in ids]
    for token in sorted(ENDS & index.keys(), key=index.get):
        types[index[token]] = CONTROL
        ends.append(index[token])
    ends = list(dict.fromkeys(ends))
    calls = not index.keys().isdisjoint(("<|call|>", "<|calls|>"))
    if calls and "<|end|>" in index and not index.keys().isdisjoint(("<|return|>", "<|flush|>")):
        ends.remove(index["<|end|>"])  # there it ends one message of several
    if "<|tool_response>" in index and "</s>" in index:
        types[index["</s>"]] = NORMAL  # Gemma 4's HTML
        ends.remove(index["</s>"])
    return ends


def split_merges(merges: list[str], index: Mapping[str, int]) -> list[tuple[str, str]]:
    """[("Ġt", "he"), ...] of ["Ġt he", ...], without those that the vocabulary has no pieces for: a warning. UserError
    where one is no pair."""
    pairs, unknown = {}, []  # of two alike the first counts
    for merge in merges:
        space = merge.find(" ", 1)
        if space < 0:
            raise UserError(f"the GGUF file's tokenizer.ggml.merges has {merge[:40]!r}, which is no pair; get it again")
        left, right = merge[:space], merge[space + 1 :]
        if left in index and right in index and left + right in index:
            pairs[left, right] = None
        else:
            unknown.append(merge)
    if unknown:
        example = f"{len(unknown)} merges in the GGUF file, such as {unknown[0][:40]!r}"
        log(f"warning: {example}, are of pieces that it does not have; they are left out")
    return list(pairs)


def is_byte_level(tokens: list[str]) -> bool:
    """Whether the pieces spell a space as byte-level BPE does, rather than as sentencepiece."""
    return sum(token.startswith("Ġ") for token in tokens) > sum(token.startswith("▁") for token in tokens)


def split_name(metadata: Mapping[str, Any], kind: str) -> str | None:
    """The name in SPLITS by which text is split into words; None for sentencepiece, which does not."""
    if kind != "gpt2":
        return "gemma4" if kind == "gemma4" else None
    pre = metadata.get("tokenizer.ggml.pre")
    if isinstance(pre, str) and pre in SPLITS:
        return pre
    said = (
        "does not say how to split text into words"
        if pre is None
        else f"splits text as {str(pre)[:40]!r}, which is unknown"
    )
    log(f"warning: the GGUF file {said}; llama.cpp's default is taken, so ids may be others than in training")
    return "default"


# ---- tokenizer.json ----


def sentencepiece_bpe(vocabulary: Vocabulary, merges: list[tuple[str, str]], prefix: bool) -> Tokenizer:
    """BPE of text with ▁ for spaces. `prefix`: one comes before a text, and before what follows a special token."""
    unknown = vocabulary.ids.get("unknown")
    unknown = None if unknown is None else vocabulary.tokens[unknown]
    backend = Tokenizer(models.BPE(vocabulary.pieces(), merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    before = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend


def scored_merges(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Every way to make a piece of two, the piece with the highest score first. Of pieces with the same score, such as
    runs of spaces, the longest: a run that has begun grows before another one begins."""
    vocab = vocabulary.pieces()
    scores = vocabulary.scores
    if scores is None or len({scores[i] for i, kind in enumerate(vocabulary.types) if kind == NORMAL}) < 2:
        log("warning: the GGUF file's pieces have no scores of their own; they are merged in the order of their ids")
        scores = range(0, -len(vocabulary.tokens), -1)
    order = sorted(vocab, key=lambda piece: (-scores[vocab[piece]], -len(piece), vocab[piece]))
    splits = ((piece[:i], piece[i:]) for piece in order for i in range(1, len(piece)))
    return [(left, right) for left, right in splits if left in vocab and right in vocab]


def byte_level_bpe(vocabulary: Vocabulary, pre: str) -> Tokenizer:
    """Byte-level BPE within the words that the patterns called `pre` make."""
    backend = Tokenizer(models.BPE(vocabulary.pieces(), vocabulary.merges, ignore_merges=pre in WHOLE_WORDS))
    words = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS[pre]]
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*words, bytewise])
    backend.decoder = decoders.ByteLevel()
    return backend


def add_tokens(backend: Tokenizer, vocabulary: Vocabulary, model_name: str) -> None:
    """Makes known which tokens are looked for in a text before all else. Phi 3's take the spaces behind them along."""
    phi3 = "phi-3" in model_name or "phi3" in model_name
    tokens = []
    for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True):
        if kind in FOUND_WHOLE:
            rstrip = phi3 and token not in ("<unk>", "<s>", "<|endoftext|>")
            tokens.append(AddedToken(token, special=kind != USER_DEFINED, normalized=False, rstrip=rstrip))
    backend.add_tokens(tokens)


# ---- the other files ----


def config_files(vocabulary: Vocabulary, add_bos: bool, templates: dict[str, str]) -> dict[str, bytes]:
    """tokenizer_config.json, generation_config.json and, for the default template, chat_template.jinja."""
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": add_bos}
    config |= {key: text for key, name in names.items() if (text := vocabulary.text(name)) is not None}
    config["clean_up_tokenization_spaces"] = False
    if templates.keys() - {"default"}:
        config["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    names = {"bos_token_id": "bos", "pad_token_id": "padding"}
    generation = {key: vocabulary.ids[name] for key, name in names.items() if name in vocabulary.ids}
    if vocabulary.ends:
        generation["eos_token_id"] = vocabulary.ends
    files = {"tokenizer_config.json": to_json(config), "generation_config.json": to_json(generation)}
    if "default" in templates:
        files["chat_template.jinja"] = templates["default"].encode()
    return files


def chat_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    """{"default": ..., "tool_use": ...}: the chat templates by their names."""
    default = "tokenizer.chat_template"
    templates = {"default": metadata[default]} if metadata.get(default) else {}
    templates |= {key[len(default) + 1 :]: text for key, text in metadata.items() if key.startswith(f"{default}.")}
    return {name: check_text(default, text) for name, text in templates.items()}


def warn_of_plain_tokens(vocabulary: Vocabulary, templates: dict[str, str]) -> None:
    """A file that marks <|im_start|> as ordinary text gets it split like any text, from llama.cpp as from us."""
    kinds = zip(vocabulary.tokens, vocabulary.types, strict=True)
    plain = [token for token, kind in kinds if kind == NORMAL and re.fullmatch(r"<\|[^|<>]+\|>", token)]
    if written := [token for token in plain if token in templates.get("default", "")]:
        log(
            f"warning: the chat template writes {', '.join(written)}, which the GGUF file marks as ordinary text: it is"
            " split like any other, as llama.cpp does; take a file that marks it as a control token"
        )


def to_json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode()
