"""Text to token ids and back, exactly as transformers does it, and chat templates.

    tokenizer = load_tokenizer("checkpoints/ORG/NAME")
    ids = tokenizer.encode("def read_lines(path):")
    stream = StreamingDetokenizer(tokenizer)
    text = "".join(stream.put(i) for i in ids) + stream.finish()  # == tokenizer.decode(ids)

A folder holds `tokenizer.json`, or else `tokenizer.model`: sentencepiece's protobuf, or Llama 3's lines of base64 in
tiktoken's format. All three become one `tokenizers.Tokenizer`: so does transformers, and the ids have to be the same.
`tokenizer_config.json` and its older companions say which tokens are special, whether bos is added, and how a chat is
written.
"""

import base64
import codecs
import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceNormalizer, SentencePieceProcessor, set_min_log_level
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from errors import UserError

set_min_log_level(2)  # errors only: sentencepiece tells the terminal what it does

# What Meta published with Llama 3: how text is split into words, and the 256 tokens that follow the file's own (by the
# names of 3.1, which gave a few of 3.0's reserved ones a meaning). For a tokenizer.model without tokenizer_config.json.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_NAMES = {0: "begin_of_text", 1: "end_of_text", 4: "finetune_right_pad_id", 6: "start_header_id"}
LLAMA3_NAMES |= {7: "end_header_id", 8: "eom_id", 9: "eot_id", 10: "python_tag"}
LLAMA3_SPECIAL = [
    LLAMA3_NAMES.get(i, f"reserved_special_token_{i - sum(n < i for n in LLAMA3_NAMES)}") for i in range(256)
]
LLAMA3_CONFIG = {
    "bos_token": "<|begin_of_text|>",
    "eos_token": "<|end_of_text|>",
    "add_bos_token": True,
    "extra_special_tokens": [f"<|{name}|>" for name in LLAMA3_SPECIAL],
}

NO_SENTENCEPIECE = "it is cut off, or no sentencepiece model"
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

# Byte-level BPE spells a byte as one printable character: itself, or the next free one from U+0100 on (GPT-2).
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_OF = {chr(byte): byte for byte in PRINTABLE}
BYTE_OF |= {chr(256 + i): byte for i, byte in enumerate(sorted(set(range(256)) - set(PRINTABLE)))}


class Tokenizer:
    """What `load_tokenizer` returns.

    vocab_size: one more than the largest id. The model's is often larger, padded to a round number.
    bos_id, eos_ids: the tokenizer's own; a model's generation_config.json may name more ids that end a text.
    has_chat_template: whether `apply_chat_template` can be called.
    """

    def __init__(self, backend: Backend, named: dict[str, str], chat_template: str | None, clean_up: bool):
        """named: {"bos_token": "<s>", ...}. clean_up: decode drops spaces before punctuation."""
        self.backend = backend
        self.named = named
        self.chat_template = chat_template
        self.image_template = chat_template  # of chats with images, for which some models have another
        self.has_chat_template = chat_template is not None
        self.clean_up = clean_up
        self.decoder_steps = _decoder_steps(backend)
        # Asked of decode itself: a token once added as special and later as ordinary is skipped all the same.
        self.special_ids = {i for i in backend.get_added_tokens_decoder() if not backend.decode([i, i])}
        # What the post-processor puts behind a text: tokens that end it, where a prompt is to be continued.
        mask = backend.encode("a").special_tokens_mask
        self.closing = mask[::-1].index(0) if 0 in mask else 0
        self.vocab_size = 1 + max(backend.get_vocab().values(), default=-1)
        if not self.vocab_size:
            raise ValueError("it holds no tokens")
        ids = {name: backend.token_to_id(token) for name, token in named.items()}
        self.bos_id: int | None = ids.get("bos_token")
        self.eos_ids: list[int] = [ids["eos_token"]] if ids.get("eos_token") is not None else []

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`; special tokens written out in it count as such. The tokenizer's bos comes first, where it
        adds one, but no eos last, since the text is to be continued. A rendered chat already holds its bos: encode it
        with `add_special_tokens=False`. Raises UserError where `text` holds lone surrogates, which is what Python makes
        of arguments that are not UTF-8."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"the text is not valid UTF-8 at character {error.start + 1}; convert it to UTF-8 and try again"
            ) from error
        ids = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids[: len(ids) - self.closing] if add_special_tokens else ids

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`. Bytes that are not UTF-8 become U+FFFD, ids outside the vocabulary nothing."""
        text = self.backend.decode(ids, skip_special_tokens=skip_special_tokens)
        return _clean_up(text) if self.clean_up else text

    def check_chat_template(self) -> None:
        """UserError, in jinja's words, where the chat template is broken. There may be none."""
        if self.chat_template is not None:
            from templates import compile_template  # here, since jinja2 takes a while to import and only chats need it

            compile_template(self.chat_template)

    def apply_chat_template(
        self, messages: list[dict], add_generation_prompt: bool = True, variables: dict[str, Any] | None = None
    ) -> str:
        """The prompt of a chat, `messages` being [{"role": "user", "content": "..."}, ...]; a content may be a list of
        parts {"type": "text", "text": "..."}. `variables` are the template's own, such as {"enable_thinking": False}.
        Raises UserError where the folder has no template, or it is broken or refuses these messages."""
        if self.chat_template is None:
            raise UserError("this model has no chat template; give it plain text, or use a model trained to chat")
        from templates import render_chat

        given = {**self.named, "add_generation_prompt": add_generation_prompt, **(variables or {})}
        parts = [part for m in messages if isinstance(m.get("content"), list) for part in m["content"]]
        of_text = all(part.get("type") == "text" for part in parts if isinstance(part, dict))
        return render_chat(self.chat_template if of_text else self.image_template, messages, given)


class StreamingDetokenizer:
    """Ids in, text out as soon as it is certain: whole characters only, and all that `put` and the final `finish`
    returned, joined, is exactly `tokenizer.decode(all ids)`. A token costs the same wherever it stands. `shown_ids` are
    special tokens that are written all the same, by their names.

    A token's text depends on the tokens around it in four ways, each a small state here:
    - byte-level tokens are pieces of UTF-8 that may end within a character: an incremental UTF-8 decoder;
    - sentencepiece spells what it has no piece for in bytes, <0xE4> <0xBD> <0xA0>. A run of them is text only if all of
      it is valid, otherwise every byte becomes U+FFFD: so a run is held back until it has ended;
    - the space that sentencepiece puts before the first word is taken away again;
    - clean-up, which hardly any model asks for, looks at up to four characters.
    """

    def __init__(self, tokenizer: Tokenizer, shown_ids: frozenset[int] = frozenset()):
        self.tokenizer, self.shown_ids = tokenizer, shown_ids
        self.steps = tokenizer.decoder_steps
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.byte_run = bytearray()
        self.is_first = True
        self.to_strip = self.steps.get("Strip", {}).get("start", 0)
        self.unclean = ""

    def put(self, token_id: int) -> str:
        """The text that this token makes certain: often its own, maybe "", maybe more."""
        token = self.tokenizer.backend.id_to_token(token_id)
        if token_id in self.shown_ids:
            return self.finish() + token
        if token is None or token_id in self.tokenizer.special_ids:
            return ""
        text = self._bytes(token) if "ByteLevel" in self.steps else self._piece(token)
        self.is_first = False
        return self._clean(text)

    def finish(self) -> str:
        """What was held back for a character or a run that does not go on."""
        return self._clean(self.utf8.decode(b"", final=True) + self._strip(self._end_run()), final=True)

    def _bytes(self, token: str) -> str:
        spelled = all(character in BYTE_OF for character in token)  # added tokens may be plain text
        return self.utf8.decode(bytes(BYTE_OF[character] for character in token) if spelled else token.encode())

    def _piece(self, token: str) -> str:
        if metaspace := self.steps.get("Metaspace"):
            space = "" if self.is_first and metaspace["prepend_scheme"] != "never" else " "
            return token.replace(metaspace["replacement"], space)
        replace = self.steps["Replace"]
        token = token.replace(replace["pattern"]["String"], replace["content"])
        if "ByteFallback" in self.steps and (byte := re.fullmatch("<0x([0-9A-Fa-f]{2})>", token)):
            self.byte_run.append(int(byte[1], 16))
            return ""
        return self._strip(self._end_run() + token)

    def _end_run(self) -> str:
        run, self.byte_run = self.byte_run, bytearray()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _strip(self, text: str) -> str:
        while text and self.to_strip:
            if text[0] == self.steps["Strip"]["content"]:
                text, self.to_strip = text[1:], self.to_strip - 1
            else:
                self.to_strip = 0
        return text

    def _clean(self, text: str, final: bool = False) -> str:
        if not self.tokenizer.clean_up:
            return text
        # Every pattern of _clean_up begins with a space and has at most four characters, and none puts a space where
        # there was none: so nothing reaches beyond three characters without a space.
        text = self.unclean + text
        certain = re.match("(?s).*[^ ]{3}", text)
        end = len(text) if final else certain.end() if certain else 0
        self.unclean = text[end:]
        return _clean_up(text[:end])


def load_tokenizer(folder: str | Path, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint folder. Raises UserError, naming the file, where there is none or it is broken, and
    where it has more tokens than `vocab_size`, the model's."""
    folder = Path(folder)
    path = next((folder / name for name in ("tokenizer.json", "tokenizer.model") if (folder / name).is_file()), None)
    if path is None:
        raise UserError(f"{folder} has no tokenizer; put the model's tokenizer.json or tokenizer.model there")
    config_path = folder / "tokenizer_config.json"
    with _blaming(config_path):
        config = _read_config(folder)
        llama = _is_llama(folder, config)
        if llama:
            config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | config
    with _blaming(path):
        data = path.read_bytes()
        if path.name == "tokenizer.json":
            backend = Backend.from_buffer(data)
        elif data.startswith(b"\n"):  # the tag of the protobuf's first field, and no base64
            backend = _from_sentencepiece(data, config, llama)
        else:
            config = config if config_path.is_file() else LLAMA3_CONFIG
            backend, llama = _from_tiktoken(data, config), False
        if llama and isinstance(backend.model, models.BPE):
            _set_llama_pipeline(backend, config)
    with _blaming(config_path):
        named = _add_special_tokens(backend, config)
        if path.name == "tokenizer.model":  # tokenizer.json says itself what is put around a text
            _add_bos(backend, config, named)
        chat_template = _chat_template(folder, config)
        # transformers leaves BPE text alone: there the clean-up does harm.
        forced = config.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output")
        applies = forced or not isinstance(backend.model, models.BPE)
        clean_up = bool(applies and config.get("clean_up_tokenization_spaces"))
        backend.encode_special_tokens = bool(config.get("split_special_tokens"))
    backend.no_truncation()
    backend.no_padding()
    image_template = _read_json(folder / "chat_template.json").get("chat_template")  # of processors of images
    with _blaming(path):
        tokenizer = Tokenizer(backend, named, chat_template or image_template, clean_up)
        tokenizer.image_template = image_template or tokenizer.chat_template
    if vocab_size is not None and tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer in {folder} has {tokenizer.vocab_size} tokens, the model only {vocab_size}; "
            "get the tokenizer that belongs to it"
        )
    return tokenizer


@contextlib.contextmanager
def _blaming(path: Path) -> Iterator[None]:
    """Whatever goes wrong inside is the fault of this file."""
    try:
        yield
    except (UserError, OSError, MemoryError, KeyboardInterrupt):
        raise
    except BaseException as error:  # a panic in the Rust library is not an Exception
        # ValueErrors are ours and json's, plain Exceptions the Rust library's: they say what is wrong.
        reason = error if isinstance(error, ValueError) or type(error) is Exception else repr(error)
        raise UserError(f"{path} cannot be used ({reason}); download it again") from error


def _read_json(path: Path) -> dict:
    if not path.is_file():
        return {}
    with _blaming(path):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is not a JSON object")
        return content


def _read_config(folder: Path) -> dict:
    """tokenizer_config.json, completed from the two files that held the special tokens before it did."""
    config = _read_json(folder / "tokenizer_config.json")
    if not config.get("extra_special_tokens") and "additional_special_tokens" in config:
        config["extra_special_tokens"] = config["additional_special_tokens"]
    if "added_tokens_decoder" not in config:
        extra = config.get("extra_special_tokens") or []
        config |= _read_json(folder / "special_tokens_map.json")
        special = {_added_token(token).content for token in (*map(config.get, NAMED), *extra) if token}
        path = folder / "added_tokens.json"
        with _blaming(path):  # of no interest beside a tokenizer.json, which holds them too
            added = {} if (folder / "tokenizer.json").is_file() else _read_json(path)
            tokens = {int(i): {"content": token, "special": token in special} for token, i in added.items()}
        config["added_tokens_decoder"] = tokens
    listed = sorted((int(i), _added_token(token)) for i, token in config["added_tokens_decoder"].items())
    if listed and not 0 <= listed[0][0] <= listed[-1][0] < 1 << 24:
        raise ValueError(f"its added tokens have ids from {listed[0][0]} to {listed[-1][0]}")
    return config | {"added_tokens_decoder": dict(listed)}


def _is_llama(folder: Path, config: dict) -> bool:
    """Whether transformers 5 uses its class LlamaTokenizer, which takes no more than the vocabulary from the file. (Its
    other such classes either change nothing, as Qwen2Tokenizer, or split words as the model was not trained to, as
    GPT2Tokenizer for files that split digits: there tokenizer.json is taken at its word.)"""
    model = _read_json(folder / "config.json")
    declared = str(config.get("tokenizer_class") or model.get("tokenizer_class")).removesuffix("Fast")
    if declared != "LlamaTokenizer" or model.get("model_type") in ("mistral", "mixtral", "qwen2"):
        return False
    path = folder / "tokenizer.json"
    return not path.is_file() or b'"ByteLevel"' not in path.read_bytes()


def _set_llama_pipeline(backend: Backend, config: dict) -> None:
    """A space before the first word, or after every special token too (`legacy`), and bytes for what has no piece."""
    prefix = config.get("add_prefix_space") is not False
    scheme = "never" if not prefix else "always" if config.get("legacy") else "first"
    backend.model.fuse_unk, backend.model.byte_fallback = True, True
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    strip = [decoders.Strip(content=" ", left=1)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])


def _from_sentencepiece(data: bytes, config: dict, llama: bool) -> Backend:
    """From a sentencepiece model; completes the config with the special tokens it names. As in transformers its
    normalizer counts only as far as it is a table of characters: no dummy space, no spaces removed."""
    try:
        processor = SentencePieceProcessor(model_proto=data)
    except RuntimeError as error:
        raise ValueError(NO_SENTENCEPIECE) from error
    names = [processor.id_to_piece(i) for i in range(len(processor))]
    kept = _user_defined(data, names)
    # Control symbols and those the trainer was told to keep whole are looked for in the text first.
    extra = [
        AddedToken(name, normalized=False, special=processor.is_control(i))
        for i, name in enumerate(names)
        if processor.is_control(i) or name in kept
    ]
    config.setdefault("extra_special_tokens", extra)
    ids = {"bos_token": processor.bos_id(), "eos_token": processor.eos_id(), "unk_token": processor.unk_id()}
    for token, i in ids.items():
        if i >= 0:
            config.setdefault(token, names[i])
    byte_fallback = any(map(processor.is_byte, range(len(processor))))
    if not llama and _is_unigram(processor):
        scored = [(name, processor.get_score(i)) for i, name in enumerate(names)]
        backend = Backend(models.Unigram(scored, processor.unk_id(), byte_fallback))
    else:
        vocab = {name: i for i, name in enumerate(names)}
        # The merges are not stored, but a piece's id tells the turn of the merges that make it.
        splits = ((name[:i], name[i:]) for name in names for i in range(1, len(name)))
        merges = [(left, right) for left, right in splits if left in vocab and right in vocab]
        unk = None if llama else names[processor.unk_id()]
        backend = Backend(models.BPE(vocab, merges, unk_token=unk, fuse_unk=True, byte_fallback=byte_fallback))
    table = _character_table(data)
    characters = [normalizers.Precompiled(table)] if table else []
    backend.normalizer = normalizers.Sequence([*characters, normalizers.Replace(" ", "▁")])
    bytes_too = [decoders.ByteFallback(), decoders.Fuse()] if byte_fallback else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), *bytes_too])
    return backend


def _user_defined(data: bytes, names: list[str]) -> set[str]:
    """The user-defined pieces. The processor does not tell them from normal ones, but normalization leaves them alone,
    so here a normalizer that changes every character takes the place of the model's own (a later field wins)."""
    changes = [(character, "\ue000") for character in sorted(set("".join(names)) - {"\ue000"})]
    flags = dict.fromkeys(("add_dummy_prefix", "escape_whitespaces", "remove_extra_whitespaces"), False)
    changing = SentencePieceNormalizer(norm_map=changes, **flags).serialized_model_proto()
    processor = SentencePieceProcessor(model_proto=data + changing)
    return {name for name in names if name and processor.normalize(name) == name}


def _is_unigram(processor: SentencePieceProcessor) -> bool:
    """Of the kinds of models, which the processor does not name, this one alone has an n-best list."""
    try:
        return bool(processor.nbest_encode("a", nbest_size=1))
    except RuntimeError:
        return False


def _character_table(data: bytes) -> bytes:
    """What the model's normalizer does to characters, as `Precompiled` takes it; empty where it does nothing.

    The library hands it out behind the name and the length, and before a few flags, which do not matter here.
    """
    spec = SentencePieceNormalizer(model_proto=data).serialized_normalizer_spec()
    if not spec:
        raise ValueError(NO_SENTENCEPIECE)
    table = re.match(rb"(?s)\x12(?!\x00)[\x80-\xff]*[\x00-\x7f](.*)", spec[2 + spec[1] :])
    return table[1] if table else b""


def _from_tiktoken(data: bytes, config: dict) -> Backend:
    """From lines of a token in base64 and its rank, which is its id and the turn of its merges."""
    try:
        lines = [line.split() for line in data.splitlines()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except ValueError:
        raise ValueError("it is neither a sentencepiece model nor lines of base64 and rank") from None
    if not ranks or sorted(ranks.values()) != list(range(len(lines))):
        raise ValueError("its ranks are not 0, 1, 2, ...")
    character = {byte: character for character, byte in BYTE_OF.items()}
    spelled = {token: "".join(character[byte] for byte in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.get):
        splits = ((token[:i], token[i:]) for i in range(1, len(token)))
        splits = [(left, right) for left, right in splits if left in ranks and right in ranks]
        splits.sort(key=lambda split: (ranks[split[0]], ranks[split[1]]))
        merges += [(spelled[left], spelled[right]) for left, right in splits]
    vocab = {spelled[token]: rank for token, rank in ranks.items()}
    backend = Backend(models.BPE(vocab, merges, ignore_merges=True))
    words = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated")
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, bytewise])
    backend.decoder = decoders.ByteLevel()
    # The ids after the ranks belong to the special tokens; gaps between those whose ids are given are kept open.
    given = {i: token.content for i, token in config.get("added_tokens_decoder", {}).items()}
    special = [given.get(i, f"<|reserved_token_{i}|>") for i in range(len(ranks), max(given, default=0) + 1)]
    extra = config.get("extra_special_tokens") or []
    special += [_added_token(token).content for token in extra if isinstance(extra, list)]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return backend


def _add_special_tokens(backend: Backend, config: dict) -> dict[str, str]:
    """Makes known what the config calls special, in transformers' order, which decides the ids of new ones. Returns
    the named ones."""
    named = {key: token for key, token in config.items() if key.endswith("_token") and isinstance(token, str | dict)}
    extra = config.get("extra_special_tokens", config.get("additional_special_tokens")) or []
    if isinstance(extra, dict):
        named, extra = named | extra, []
    named = {key: _added_token(named[key]) for key in (*NAMED, *named) if key in named}
    contents = {key: token.content for key, token in named.items()}

    present = backend.get_added_tokens_decoder()
    listed = config.get("added_tokens_decoder") or present
    known = {token.content for token in (*present.values(), *listed.values())}
    tokens = list(listed.values())
    tokens += [token for token in (*named.values(), *map(_added_token, extra)) if token.content not in known]
    for token in tokens:
        token.special = token.special or token.content in contents.values()
    backend.add_tokens(tokens)
    return contents


def _added_token(token: str | dict | AddedToken) -> AddedToken:
    if isinstance(token, AddedToken):
        return token
    if isinstance(token, str):
        return AddedToken(token, special=True)
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(token["content"], **{flag: token[flag] for flag in flags if flag in token})


def _add_bos(backend: Backend, config: dict, named: dict[str, str]) -> None:
    """The config of a tokenizer.model says whether bos is put before a text. Saying nothing means no."""
    bos = [named["bos_token"]] if config.get("add_bos_token") and "bos_token" in named else []
    ids = [(token, backend.token_to_id(token)) for token in bos]
    backend.post_processor = processors.TemplateProcessing(single=[*bos, "$A"], special_tokens=ids)


def _decoder_steps(backend: Backend) -> dict[str, dict]:
    """How `backend` puts text together, as {"Replace": {"pattern": ..., "content": ...}, "ByteFallback": {}, ...}."""
    state = json.loads(backend.decoder.__getstate__()) if backend.decoder else {"type": "none"}
    steps = state.get("decoders", [state])
    shape = " ".join(step["type"] for step in steps)
    steps = {step["type"]: step for step in steps}
    known = re.fullmatch("ByteLevel|Metaspace|Replace( ByteFallback)?( Fuse( Strip)?)?", shape)
    if not known or steps.get("Strip", {}).get("stop") or "Regex" in steps.get("Replace", {}).get("pattern", {}):
        raise ValueError(f"its decoder ({shape}) is neither byte-level nor sentencepiece's")
    if backend.pre_tokenizer and b'"type":"ByteLevel"' in backend.pre_tokenizer.__getstate__():
        backend.decoder = decoders.ByteLevel()  # conversions of Mistral's tekken files come with sentencepiece's
        return {"ByteLevel": {}}
    return steps


def _clean_up(text: str) -> str:
    for pattern in (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"):
        text = text.replace(pattern, pattern.strip())
    return text


def _chat_template(folder: Path, config: dict) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        with _blaming(path):
            return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}
    if isinstance(template, dict):
        template = template.get("default")
    if not isinstance(template, str | None):
        raise ValueError("its chat_template is no text")
    return template
