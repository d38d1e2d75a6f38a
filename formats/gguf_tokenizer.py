"""The tokenizer that a GGUF file holds in its metadata, as the files of a Hugging Face checkpoint.

    files = tokenizer_files(open_gguf(path).metadata)    # {"tokenizer.json": b"...", "tokenizer_config.json": ...}

The ids are llama.cpp's. Its "llama" vocabulary is sentencepiece's BPE: any two neighbours that make up a piece may be
merged, the piece with the highest score first. "gpt2" is byte-level BPE: merges in order, within the words into which a
pattern splits the text. The file holds only a name of that pattern: SPLITS has what each name means.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from errors import UserError, log

# How a text is split into words before BPE: the patterns in the tokenizer.json of the models that came with them. One
# after the other splits what the ones before it have left, and what a pattern does not match is a word as well.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
DIGIT = r"\p{N}"
SPLITS = {
    "default": (r"[\p{P}$+<=>^~|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),  # of a file that names no pattern
    "gpt-2": (GPT2,),
    "llama-bpe": (LLAMA3,),
    "qwen2": (QWEN2,),
    "starcoder": (DIGIT, GPT2),
}
SAME = {  # other names for a pattern
    "gpt-2": "phi-2 mpt olmo jais trillion granite-docling exaone4 gigachat a.x-4.0 mellum modern-bert jina-es jina-de"
    " jina-v2-es jina-v2-de jina-v1-en jina-v2-code roberta-bpe",
    "llama-bpe": "llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano dbrx smaug-bpe chatglm-bpe glm4"
    " glm5",
    "qwen2": "stablelm2 hunyuan solar-open megrez grok-2 deepseek-r1-qwen kormo f2llmv2",
    "starcoder": "refact command-r smollm codeshell exaone minerva-7b mellum2",
}
SPLITS |= {name: SPLITS[split] for split, names in SAME.items() for name in names.split()}
# Patterns with which a word that is in the vocabulary is one token, whatever the merges would make of it ...
WHOLE_WORDS = frozenset(
    [
        "llama-bpe",
        "llama3",
        "llama-v3",
        "falcon3",
        "falcon-h1",
        "pixtral",
        "midm-2.0",
        "lfm2",
        "jina-v5-nano",
        "glm4",
        "glm5",
    ]
)
# ... and with which bos comes first unless the file says otherwise.
BOS_FIRST = WHOLE_WORDS - {"glm4", "glm5"}

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # tokenizer.ggml.token_type
FOUND_WHOLE = (UNKNOWN, CONTROL, USER_DEFINED)  # looked for in the text before all else
# Tokens that end a text wherever they are in a vocabulary, and others that are control tokens whatever their type.
ENDS = frozenset(
    [
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|flush|>",
        "<|calls|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "</s>",
        "<|eom_id|>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<|end_of_text|>",
        "<end_of_utterance>",
        "<eos>",
        "<turn|>",
        "<|tool_response>",
        "[e~[",
        "<｜end▁of▁sentence｜>",
    ]
)
FILL_ENDS = {  # of code with a gap to fill, unless the file names the token itself
    "fim_pad": frozenset(["<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"]),
    "fim_rep": frozenset(["<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"]),
    "fim_sep": frozenset(["<|file_sep|>"]),
}
HARMONY = frozenset(["<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"])  # part of the text, never hidden
NONE = 2**32 - 1  # an id that is no token: -1, as an unsigned number
OTHER_KINDS = {"bert": "WordPiece", "t5": "Unigram", "rwkv": "RWKV's", "plamo2": "PLaMo 2's"}


@dataclass
class Vocabulary:
    """What the metadata says, checked. tokens, types, scores (None: no order of their own): one for each id."""

    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    merges: list[tuple[str, str]] | None
    ids: dict[str, int]  # "bos", "eos", "eot", ... -> id

    def named(self, name: str) -> str | None:
        """The token that the file names as its bos, eos, ..., if it is looked for in a text."""
        token = self.ids.get(name)
        return self.tokens[token] if token is not None and self.types[token] in FOUND_WHOLE else None


def tokenizer_files(metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """{file name: content} of the tokenizer, its chat template and the ids that end a text; {} where the file has none.

    Raises UserError where the vocabulary is damaged or of a kind that is not supported.
    """
    model = metadata.get("tokenizer.ggml.model")
    if model in (None, "none", "no_vocab"):
        log("warning: the GGUF file holds no tokenizer; put the model's tokenizer.json beside the checkpoint")
        return {}
    if model not in ("llama", "gpt2"):
        kind = OTHER_KINDS.get(model, "unknown")
        raise UserError(
            f"the GGUF file has a tokenizer of kind {model!r} ({kind}), which is not supported; take another"
        )
    vocabulary = read_vocabulary(metadata)
    if model == "llama" and is_byte_level(vocabulary):
        log("warning: the GGUF file calls its tokenizer sentencepiece, but its pieces are byte-level; read as those")
        model = "gpt2"
    pre = metadata.get("tokenizer.ggml.pre")
    if model == "llama":
        prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
        backend = sentencepiece_bpe(vocabulary, prefix)
    else:
        backend = byte_level_bpe(vocabulary, pre)
    add_tokens(backend, vocabulary, str(metadata.get("general.name", "")))
    add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", model == "llama" or pre in BOS_FIRST))
    bos = vocabulary.ids.get("bos")
    if add_bos and bos is not None:
        token = vocabulary.tokens[bos]
        backend.post_processor = processors.TemplateProcessing(single=[token, "$A"], special_tokens=[(token, bos)])
    files = {"tokenizer.json": backend.to_str().encode()}
    return files | config_files(vocabulary, add_bos, chat_templates(metadata))


# ---- what the metadata says ----


def read_vocabulary(metadata: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary. UserError where its parts are missing, or don't fit each other."""
    tokens = read_array(metadata, "tokens", str)
    if not tokens:
        raise UserError("the GGUF file has a tokenizer without tokens; download it again")
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
    ids = {token: i for i, token in enumerate(tokens)}
    if len(ids) < len(tokens):
        i, token = next((i, token) for i, token in enumerate(tokens) if ids[token] != i)
        raise UserError(f"the GGUF file's vocabulary has {token!r} twice, as {i} and {ids[token]}; take another file")
    named = read_ids(metadata, len(tokens))
    types = read_array(metadata, "token_type", int, len(tokens)) or [NORMAL] * len(tokens)
    for name in ("bos", "eos", "eot", "eom", "unknown"):
        token = named.get(name)
        if token is not None and types[token] == NORMAL and re.fullmatch(r"[<\[].+[>\]]", tokens[token]):
            types[token] = CONTROL
    for token in ENDS & ids.keys():
        types[ids[token]] = CONTROL
    for name, texts in FILL_ENDS.items():
        for token in texts & ids.keys() if name not in named else ():
            types[ids[token]] = CONTROL
            named[name] = ids[token]
    for token in HARMONY & ids.keys():
        types[ids[token]] = USER_DEFINED
    scores = read_array(metadata, "scores", (int, float), len(tokens))
    merges = read_array(metadata, "merges", str)
    if merges is not None:
        merges = [split_merge(merge, ids) for merge in merges]
    return Vocabulary(tokens, types, scores, merges, named)


def read_array(
    metadata: Mapping[str, Any], name: str, kind: type | tuple[type, ...], length: int | None = None
) -> list | None:
    """The list "tokenizer.ggml.NAME", which may be missing. UserError where it holds something else than `kind`, or
    other than `length` values."""
    values = metadata.get(f"tokenizer.ggml.{name}")
    if values is None:
        return None
    values = values.tolist() if hasattr(values, "tolist") else list(values)
    if not all(isinstance(value, kind) for value in values):
        raise UserError(f"the GGUF file's tokenizer.ggml.{name} holds values of a wrong type; download it again")
    if length is not None and len(values) != length:
        raise UserError(
            f"the GGUF file's tokenizer.ggml.{name} has {len(values)} values for {length} tokens; download it again"
        )
    return values


def read_ids(metadata: Mapping[str, Any], size: int) -> dict[str, int]:
    """The special tokens that the file names. UserError where one is outside the vocabulary."""
    sentencepiece = {"unknown": 0, "bos": 1, "eos": 2} if metadata["tokenizer.ggml.model"] == "llama" else {}
    ids = {name: i for name, i in sentencepiece.items() if i < size}
    for name in ("bos", "eos", "eot", "eom", "unknown", "padding", "fim_pad", "fim_rep", "fim_sep"):
        key = f"tokenizer.ggml.{name}_token_id"
        token = metadata.get(key)
        if token is None or token in (-1, NONE):
            continue
        if not 0 <= token < size:
            raise UserError(f"the GGUF file's {key} is {token}, but it has {size} tokens; correct it or take another")
        ids[name] = int(token)
    return ids


def split_merge(merge: str, ids: Mapping[str, int]) -> tuple[str, str]:
    """("Ġt", "he") of "Ġt he". UserError where the two or what they make are no pieces of the vocabulary."""
    space = merge.find(" ", 1)
    left, right = merge[:space], merge[space + 1 :]
    if space < 0 or left not in ids or right not in ids or left + right not in ids:
        raise UserError(f"the GGUF file merges {merge!r}, which its vocabulary does not hold; take another file")
    return left, right


def is_byte_level(vocabulary: Vocabulary) -> bool:
    """Whether the pieces spell a space as byte-level BPE does, and there are merges to go by."""
    spaced = [sum(token.startswith(space) for token in vocabulary.tokens) for space in ("Ġ", "▁")]
    return vocabulary.merges is not None and spaced[0] > spaced[1]


# ---- tokenizer.json ----


def pieces(vocabulary: Vocabulary) -> dict[str, int]:
    """The vocabulary but for the names that llama.cpp's converter gave to rows of the embedding without a token."""
    return {
        token: i
        for i, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if kind != UNUSED or token != f"[PAD{i}]"
    }


def sentencepiece_bpe(vocabulary: Vocabulary, prefix: bool) -> Tokenizer:
    """sentencepiece's BPE. `prefix`: a space comes before a text, and before what follows a special token."""
    vocab = pieces(vocabulary)
    vocab_merges = scored_merges(vocabulary, vocab)
    unknown = vocabulary.ids.get("unknown")
    unknown = None if unknown is None else vocabulary.tokens[unknown]
    backend = Tokenizer(models.BPE(vocab, vocab_merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    before = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend


def scored_merges(vocabulary: Vocabulary, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every way to make a piece of two, the piece with the highest score first. Of pieces with the same score, such as
    runs of spaces, the longest: a run that has begun grows until it ends."""
    scores = vocabulary.scores
    normal = [scores[i] for i, kind in enumerate(vocabulary.types) if kind == NORMAL] if scores else []
    if len(set(normal)) <= 1:
        log("warning: the GGUF file's pieces have no scores; they are merged in the order of their ids")
        scores = [-float(i) for i in range(len(vocabulary.tokens))]
    order = sorted(vocab, key=lambda piece: (-scores[vocab[piece]], -len(piece), vocab[piece]))
    splits = ((piece[:i], piece[i:]) for piece in order for i in range(1, len(piece)))
    return [(left, right) for left, right in splits if left in vocab and right in vocab]


def byte_level_bpe(vocabulary: Vocabulary, pre: str | None) -> Tokenizer:
    """Byte-level BPE within the words of the pattern called `pre`. UserError where there are no merges."""
    if vocabulary.merges is None:
        raise UserError(
            "the GGUF file has a BPE tokenizer without merges; take another, converted by a newer llama.cpp"
        )
    if pre not in SPLITS:
        said = "does not say how" if pre is None else f"names an unknown way ({pre!r})"
        log(f"warning: the GGUF file {said} to split text into words; llama.cpp's default is taken, which may differ")
        pre = "default"
    vocab = pieces(vocabulary)
    backend = Tokenizer(models.BPE(vocab, vocabulary.merges, ignore_merges=pre in WHOLE_WORDS))
    words = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS[pre]]
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*words, bytewise])
    backend.decoder = decoders.ByteLevel()
    return backend


def add_tokens(backend: Tokenizer, vocabulary: Vocabulary, name: str) -> None:
    """Makes known which tokens are looked for in the text before all else."""
    phi3 = "phi-3" in name.lower() or "phi3" in name.lower()  # whose special tokens take the spaces behind them along
    backend.add_tokens(
        [
            AddedToken(
                token,
                special=kind != USER_DEFINED,
                normalized=False,
                rstrip=phi3 and token not in ("<unk>", "<s>", "<|endoftext|>"),
            )
            for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
            if kind in FOUND_WHOLE
        ]
    )


# ---- the other files ----


def config_files(vocabulary: Vocabulary, add_bos: bool, templates: dict[str, str]) -> dict[str, bytes]:
    """tokenizer_config.json, generation_config.json and chat_template.jinja."""
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    named = {key: vocabulary.named(name) for key, name in names.items()}
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | {key: token for key, token in named.items() if token}
    config |= {"add_bos_token": add_bos, "clean_up_tokenization_spaces": False}
    if len(templates) > 1 or (templates and "default" not in templates):
        config["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    ids = {"bos_token_id": "bos", "pad_token_id": "padding"}
    generation = {key: vocabulary.ids[name] for key, name in ids.items() if name in vocabulary.ids}
    if ends := end_ids(vocabulary):
        generation["eos_token_id"] = ends
    files = {"tokenizer_config.json": to_json(config), "generation_config.json": to_json(generation)}
    if "default" in templates:
        files["chat_template.jinja"] = templates["default"].encode()
    return files


def end_ids(vocabulary: Vocabulary) -> list[int]:
    """The ids that end a text, the file's eos first: those it names, and those with well-known names."""
    ids = {token: i for i, token in enumerate(vocabulary.tokens) if token in ENDS}
    called = {"<|return|>", "<|call|>"} <= ids.keys() or ("<|flush|>" in ids and ids.keys() & {"<|call|>", "<|calls|>"})
    if called:
        ids.pop("<|end|>", None)  # there it ends one of several messages
    if "<|tool_response>" in ids:
        ids.pop("</s>", None)  # there a tag of HTML
    names = ("eos", "eot", "eom", *FILL_ENDS)
    return list(dict.fromkeys([*(vocabulary.ids[name] for name in names if name in vocabulary.ids), *ids.values()]))


def chat_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    """{"default": ..., "tool_use": ...}: the chat templates by their names."""
    key = "tokenizer.chat_template"
    templates = {"default": metadata[key]} if metadata.get(key) else {}
    return templates | {name[len(key) + 1 :]: text for name, text in metadata.items() if name.startswith(f"{key}.")}


def to_json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode()
