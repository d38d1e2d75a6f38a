"""Ids, text and chats compared with transformers, on tiny tokenizers trained here; tiktoken and sentencepiece as further
witnesses. Hypothesis looks for a stream that does not join to `decode`."""

import base64
import codecs
import inspect
import io
import json
import os
import random
from datetime import datetime
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: it must not ask the hub about our folders

import pytest
import sentencepiece
import tiktoken
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

import tokenizer as ours
from errors import UserError
from tokenizer import BYTE_OF, LLAMA3_CONFIG, LLAMA3_SPLIT, StreamingDetokenizer, load_tokenizer

CORPUS = [
    *inspect.getsource(inspect).splitlines()[:900],
    *inspect.getsource(json.decoder).splitlines(),
    *[
        "你好，世界。今天天气很好。",
        "日本語のテキストです。",
        "naïve café — déjà vu",
        "Привет, мир! Как дела?",
        "안녕하세요 세계",
    ]
    * 20,
    *["It's a dog's life , isn't it ? We've no idea ! They're here .", "I'm told 1234567 and 3.14159 are numbers"] * 20,
]
TEXTS = [
    "",
    " ",
    "hello world",
    "  two spaces, then   three",
    "def f(x):\n    return x + 1\n\n\tif x:\r\n        pass  # tab\n",
    "\n\n\nnewlines\n",
    "emoji 🙂👩‍👩‍👧‍👦🇫🇷 and 🤷🏽‍♀️ done",
    "你好，世界 日本語 안녕 Привет naïve ﬁ Å ½",
    "<s>at the start</s> in <s> the middle</s>",
    "<s> spaced </s>  twice <unk>x",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "a<|im_end|>b <|im_end|> c<tool>d <tool> e<think>f",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>",
    "It's 12345678 o'clock , isn't it ? I'm sure they've 're 've .",
    "zero\x00byte, \u200bzero width, \u2581 metaspace ▁▁, <0x41> written out",
    "trailing space ",
    "x" * 300,
]


# ---- folders ----


def sentencepiece_model(**options) -> bytes:
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        **{
            "sentence_iterator": iter(line for line in CORPUS if line),
            "model_writer": stream,
            "model_type": "bpe",
            "vocab_size": 700,
            "byte_fallback": True,
            "character_coverage": 0.99,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "allow_whitespace_only_pieces": True,
            "num_threads": 1,
            "minloglevel": 2,
        }
        | options
    )
    return stream.getvalue()


def byte_level(split: str | None, vocab_size: int = 600, special: list[str] | None = None) -> Backend:
    backend = Backend(models.BPE(ignore_merges=split == LLAMA3_SPLIT))
    if split is None:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), bytewise])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=special or [],
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def write(folder: Path, files: dict[str, bytes | str | dict | list]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if isinstance(content, dict | list):
            content = json.dumps(content)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def tiktoken_file(ranks: dict[bytes, int]) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())


def byte_ranks() -> dict[bytes, int]:
    """A byte-level BPE as tiktoken knows it: the bytes and their merges, no special tokens."""
    vocab = byte_level(LLAMA3_SPLIT).get_vocab()
    return {bytes(BYTE_OF[c] for c in token): rank for token, rank in sorted(vocab.items(), key=lambda item: item[1])}


def added(content: str, **flags) -> dict:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"content": content} | plain | flags


LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
LLAMA_TOKENS = {"0": added("<unk>"), "1": added("<s>"), "2": added("</s>")}
CHAT_TOKENS = {"700": added("<|im_start|>"), "701": added("<|im_end|>", lstrip=True, rstrip=True)}
CHAT_TOKENS |= {"702": added("<tool>", special=False), "703": added("<think>", special=False, normalized=True)}


def all_folders(root: Path) -> dict[str, Path]:
    bpe, plain = sentencepiece_model(), sentencepiece_model(add_dummy_prefix=False)
    named = sentencepiece_model(user_defined_symbols=["<tool>", "return"], control_symbols=["<|im_end|>"], pad_id=3)
    unigram = sentencepiece_model(model_type="unigram")
    nfkc = sentencepiece_model(
        model_type="unigram", normalization_rule_name="nmt_nfkc", byte_fallback=False, unk_piece="<UNK>", bos_id=-1
    )
    files = {
        # Only a tokenizer.model. The first is the demo's kind.
        "demo": {
            "tokenizer.model": plain,
            "tokenizer_config.json": LLAMA | {"add_bos_token": True, "add_prefix_space": False},
        },
        "llama 2": {
            "tokenizer.model": bpe,
            "tokenizer_config.json": LLAMA | {"add_bos_token": True, "legacy": False},
            "config.json": {"model_type": "llama"},
        },
        "llama 1": {
            "tokenizer.model": bpe,
            "tokenizer_config.json": LLAMA
            | {
                "tokenizer_class": "LlamaTokenizerFast",
                "add_bos_token": True,
                "add_eos_token": True,
                "legacy": True,
                "bos_token": {"__type": "AddedToken", **added("<s>")},
                "added_tokens_decoder": LLAMA_TOKENS | CHAT_TOKENS,
            },
        },
        "class in config.json": {
            "tokenizer.model": bpe,
            "config.json": {"model_type": "llama", "tokenizer_class": "LlamaTokenizer"},
        },
        "older files": {
            "tokenizer.model": bpe,
            "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": None},
            "special_tokens_map.json": {
                "bos_token": added("<s>", special=True),
                "eos_token": "<|im_end|>",
                "additional_special_tokens": ["<|im_start|>"],
            },
            "added_tokens.json": {"<|im_end|>": 701, "<|im_start|>": 700, "<think>": 702},
        },
        "mistral, tokenizer.model": {
            "tokenizer.model": bpe,
            "tokenizer_config.json": LLAMA | {"add_bos_token": True},
            "config.json": {"model_type": "mistral"},
        },
        "nothing but tokenizer.model": {"tokenizer.model": named, "config.json": {}},
        "symbols": {
            "tokenizer.model": named,
            "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer", "pad_token": "<pad>", "image_token": "<think>"},
        },
        "unigram": {"tokenizer.model": unigram, "tokenizer_config.json": {"add_eos_token": True}, "config.json": {}},
        "unigram, cleaned up": {
            "tokenizer.model": nfkc,
            "tokenizer_config.json": {"clean_up_tokenization_spaces": True, "extra_special_tokens": ["<|im_end|>"]},
            "config.json": {},
        },
        "unigram as Llama": {"tokenizer.model": unigram, "tokenizer_config.json": LLAMA},
    }  # fmt: skip
    folders = {name: write(root / name, content) for name, content in files.items()}

    # tokenizer.json with a metaspace: as transformers converts it, and the way Llama 2's and Mistral's came.
    saved = AutoTokenizer.from_pretrained(folders["llama 2"])
    saved.save_pretrained(root / "converted")
    folders["converted"] = root / "converted"
    content = json.loads((root / "converted" / "tokenizer.json").read_text())
    content["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    }
    content["pre_tokenizer"] = None
    content["model"]["unk_token"] = "<unk>"
    llama = LLAMA | {"legacy": False, "add_bos_token": False, "added_tokens_decoder": LLAMA_TOKENS | CHAT_TOKENS}
    folders["tokenizer.json, llama 2"] = write(
        root / "json llama 2", {"tokenizer.json": content, "tokenizer_config.json": llama, "tokenizer.model": b"no"}
    )
    folders["tokenizer.json, mistral"] = write(
        root / "json mistral",
        {"tokenizer.json": content, "tokenizer_config.json": llama, "config.json": {"model_type": "mistral"}},
    )
    folders["tokenizer.json, alone"] = write(root / "json alone", {"tokenizer.json": content, "config.json": {}})
    content = json.loads(Backend.from_file(str(root / "converted" / "tokenizer.json")).to_str())
    content["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    content["decoder"] = content["pre_tokenizer"]
    folders["metaspace decoder"] = write(root / "metaspace", {"tokenizer.json": content, "config.json": {}})

    # tokenizer.json with bytes.
    llama3 = byte_level(LLAMA3_SPLIT)
    llama3.add_special_tokens(LLAMA3_CONFIG["extra_special_tokens"])
    llama3.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 600)]),
        ]
    )
    llama3.enable_truncation(4)
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    llama3_config = names | {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": True}
    folders["llama 3"] = write(
        root / "llama 3", {"tokenizer.json": llama3.to_str(), "tokenizer_config.json": llama3_config}
    )
    force = {"clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True, "add_bos_token": False}
    folders["llama 3, cleaned up"] = write(
        root / "llama 3 forced", {"tokenizer.json": llama3.to_str(), "tokenizer_config.json": llama3_config | force}
    )
    folders["llama 3 calling itself Llama"] = write(
        root / "deepseek",
        {"tokenizer.json": llama3.to_str(), "tokenizer_config.json": names | {"tokenizer_class": "LlamaTokenizerFast"}},
    )
    qwen = byte_level(LLAMA3_SPLIT.replace("{1,3}", ""))
    qwen.normalizer = normalizers.NFC()
    qwen.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    qwen.add_tokens([AddedToken("<think>", normalized=False), AddedToken("<tool>", normalized=False)])
    qwen_config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "add_bos_token": False,
        "add_prefix_space": False,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "added_tokens_decoder": {str(i): added(t.content, special=t.special) for i, t in
                                 qwen.get_added_tokens_decoder().items()},
    }  # fmt: skip
    for kind in ("qwen2", "qwen3"):
        folders[kind] = write(
            root / kind,
            {
                "tokenizer.json": qwen.to_str(),
                "tokenizer_config.json": qwen_config,
                "config.json": {"model_type": kind},
            },
        )
    minimind = byte_level(None, special=["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    minimind_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "legacy": True,
        "add_bos_token": False,
        "model_max_length": 32768,
    }
    folders["minimind"] = write(
        root / "minimind", {"tokenizer.json": minimind.to_str(), "tokenizer_config.json": minimind_config}
    )

    # tiktoken's format, described by a config.
    ranks = tiktoken_file(byte_ranks())
    folders["tiktoken"] = write(
        root / "tiktoken",
        {
            "tokenizer.model": ranks,
            "tokenizer_config.json": names
            | {
                "add_bos_token": True,
                "added_tokens_decoder": {
                    "600": added("<|begin_of_text|>"),
                    "603": added("<|eot_id|>"),
                    "604": added("<tool>", special=False),
                },
                "extra_special_tokens": ["<|start_header_id|>"],
            },
            "config.json": {"model_type": "llama"},
        },
    )
    folders["tiktoken as Llama"] = write(
        root / "tiktoken as Llama", {"tokenizer.model": ranks, "tokenizer_config.json": LLAMA | {"add_bos_token": True}}
    )
    return folders


NAMES = [
    "demo", "llama 2", "llama 1", "class in config.json", "older files", "mistral, tokenizer.model",
    "nothing but tokenizer.model", "symbols", "unigram", "unigram, cleaned up", "unigram as Llama", "converted",
    "tokenizer.json, llama 2", "tokenizer.json, mistral", "tokenizer.json, alone", "metaspace decoder", "llama 3",
    "llama 3, cleaned up", "llama 3 calling itself Llama", "qwen2", "qwen3", "minimind", "tiktoken", "tiktoken as Llama",
]  # fmt: skip


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    folders = all_folders(tmp_path_factory.mktemp("tokenizers"))
    assert list(folders) == NAMES
    return folders


@pytest.fixture(scope="session")
def pairs(folders):
    """name -> (ours, transformers')"""
    return {name: (load_tokenizer(path), AutoTokenizer.from_pretrained(path)) for name, path in folders.items()}


# ---- ids and text ----


@pytest.mark.parametrize("name", NAMES)
def test_same_as_transformers(pairs, name):
    mine, theirs = pairs[name]
    assert mine.bos_id == theirs.bos_token_id
    assert mine.eos_ids == ([] if theirs.eos_token_id is None else [theirs.eos_token_id])
    assert mine.vocab_size == 1 + max(theirs.get_vocab().values())
    for text in TEXTS:
        for bos in (True, False):
            ids = theirs.encode(text, add_special_tokens=bos)
            assert mine.encode(text, add_special_tokens=bos) == ids, text
            for skip in (True, False):
                assert mine.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip), text


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_text_same_as_transformers(pairs, name, data):
    mine, theirs = pairs[name]
    words = [" ", "  ", "\n", "\t", "<s>", "</s>", "<|im_end|>", "<tool>", "<think>", "return", "é", "🙂", "▁"]
    text = "".join(data.draw(st.lists(st.one_of(st.sampled_from(words), st.text(max_size=5)), max_size=12)))
    ids = theirs.encode(text)
    assert mine.encode(text) == ids
    assert mine.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_demo_kind_is_what_sentencepiece_does(folders):
    """The demo's model is trained on ids from sentencepiece itself: no prefix, whitespace kept, every byte kept."""
    mine = load_tokenizer(folders["demo"])
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folders["demo"] / "tokenizer.model"))
    for text in [*TEXTS, *CORPUS[:300], "\n".join(CORPUS[:300])]:
        if "<" in text or "▁" in text:
            continue  # sentencepiece takes no special tokens in a text, and ▁ for a space
        ids = mine.encode(text)
        assert ids == [1, *processor.encode(text)]
        assert mine.decode(ids) == text


def test_bare_tiktoken_file_is_llama_3(tmp_path):
    ranks = byte_ranks()
    mine = load_tokenizer(write(tmp_path, {"tokenizer.model": tiktoken_file(ranks)}))
    special = LLAMA3_CONFIG["extra_special_tokens"]
    theirs = tiktoken.Encoding("llama3", pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks,
                               special_tokens={token: 600 + i for i, token in enumerate(special)})  # fmt: skip
    # Of the published ids those that a chat uses, relative to the end of the file's own tokens (128000 in Llama 3's).
    where = {0: "<|begin_of_text|>", 1: "<|end_of_text|>", 4: "<|finetune_right_pad_id|>", 6: "<|start_header_id|>"}
    where |= {7: "<|end_header_id|>", 8: "<|eom_id|>", 9: "<|eot_id|>", 10: "<|python_tag|>"}
    where |= {255: "<|reserved_special_token_247|>"}
    assert {i: special[i] for i in where} == where
    assert len(special) == len(set(special)) == 256
    assert (mine.vocab_size, mine.bos_id, mine.eos_ids) == (856, 600, [601])
    for text in [*TEXTS, *CORPUS[:200], "".join(CORPUS[:200])]:
        ids = theirs.encode(text, allowed_special="all")
        assert mine.encode(text) == [600, *ids]
        assert mine.decode(ids, skip_special_tokens=False) == theirs.decode(ids)


def test_vocab_size_counts_holes(tmp_path):
    content = json.loads(byte_level(None).to_str())
    content["model"]["vocab"]["far"] = 1000
    assert load_tokenizer(write(tmp_path, {"tokenizer.json": content})).vocab_size == 1001


@pytest.mark.parametrize("name", ["demo", "llama 3"])
def test_lone_surrogates_are_refused(pairs, name):
    with pytest.raises(UserError, match="not valid UTF-8 at character 3"):
        pairs[name][0].encode(b"ab\xff".decode(errors="surrogateescape"))


# ---- streaming ----


def stream(tokenizer, ids) -> list[str]:
    detokenizer = StreamingDetokenizer(tokenizer)
    return [*(detokenizer.put(i) for i in ids), detokenizer.finish()]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_stream_joins_to_decode(pairs, name, data):
    """Any ids: those of a text, cut anywhere, mixed with random ones, byte tokens and ids that do not exist."""
    mine, theirs = pairs[name]
    space = [i for i in range(mine.vocab_size) if (mine.backend.id_to_token(i) or "").strip("▁Ġ ") == ""]
    odd = [i for i in range(mine.vocab_size) if (mine.backend.id_to_token(i) or "").startswith("<0x")]
    some = st.integers(0, mine.vocab_size + 3) | st.sampled_from(space + mine.eos_ids + odd + [0])
    part = st.lists(some, max_size=8) | st.sampled_from(TEXTS).map(mine.encode).flatmap(
        lambda ids: st.tuples(st.integers(0, len(ids)), st.integers(0, len(ids))).map(lambda cut: ids[slice(*cut)])
    )
    ids = sum(data.draw(st.lists(part, max_size=4)), [])
    pieces = stream(mine, ids)
    assert "".join(pieces) == mine.decode(ids)
    assert mine.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    # U+FFFD is final: were it for a character that the next tokens complete, some longer text would not begin so.
    sofar = ""
    for count, piece in enumerate(pieces[:-1], 1):
        sofar += piece
        assert mine.decode(ids[: count + 1] + ids[:2]).startswith(sofar)


@pytest.mark.parametrize("name", ["demo", "llama 2", "llama 3", "qwen2", "unigram"])
def test_stream_gives_whole_characters_soon(pairs, name):
    mine, _ = pairs[name]
    text = "naïve 你好 🙂👩‍👩‍👧‍👦 ok then, " * 3
    pieces = stream(mine, mine.encode(text, add_special_tokens=False))
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert sum(map(bool, pieces)) > 30


@given(data=st.binary(max_size=12))
def test_byte_level_stream_of_any_bytes(pairs, data):
    mine, _ = pairs["llama 3"]
    spelled = {byte: mine.backend.token_to_id(character) for character, byte in BYTE_OF.items()}
    ids = [spelled[byte] for byte in data]
    assert "".join(stream(mine, ids)) == mine.decode(ids) == data.decode(errors="replace")


@given(data=st.binary(max_size=12), after=st.sampled_from(["", "a", "<s>"]))
@example(data=b"\xe4\xbd\xa0\x80", after="a")
def test_byte_fallback_stream_of_any_bytes(pairs, data, after):
    mine, _ = pairs["demo"]
    ids = [mine.backend.token_to_id(f"<0x{byte:02X}>") for byte in data] + mine.encode(after, False)
    assert "".join(stream(mine, ids)) == mine.decode(ids)


@settings(max_examples=300)
@given(text=st.text(alphabet=" .?!,'ntmsverxy", max_size=40), cuts=st.lists(st.integers(0, 40)))
def test_clean_up_stream_of_any_text(text, cuts):
    mine = ours.Tokenizer.__new__(ours.Tokenizer)
    mine.clean_up, mine.decoder_steps = True, {}
    detokenizer = StreamingDetokenizer(mine)
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [detokenizer._clean(text[a:b]) for a, b in zip(edges, edges[1:], strict=False)]
    assert "".join(pieces) + detokenizer.finish() == ours._clean_up(text)


def test_stream_costs_the_same_everywhere(pairs):
    """50 000 tokens, all of one byte run or one unfinished line: nothing is decoded twice."""
    for name in ("demo", "llama 3"):
        mine, _ = pairs[name]
        byte = mine.backend.token_to_id("<0xE4>" if name == "demo" else "ä")
        assert "".join(stream(mine, [byte] * 50_000)) == "\ufffd" * 50_000
