"""Ids, text and chats compared with transformers, on tiny tokenizers trained here; tiktoken and sentencepiece bear
witness too. Hypothesis looks for ids whose stream does not join to `decode`, and for files that crash the reader."""

import base64
import inspect
import io
import itertools
import json
import os
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

from errors import UserError
from tokenizer import BYTE_OF, LLAMA3_CONFIG, LLAMA3_SPLIT, StreamingDetokenizer, load_tokenizer

CORPUS = [
    *inspect.getsource(inspect).splitlines()[:900],
    *["你好，世界。今天天气很好。", "日本語のテキストです。", "naïve café — déjà vu", "Привет, мир! Как дела?"] * 20,
    *["It's a dog's life , isn't it ? We've no idea ! They're here .", "I'm told 1234567 and 3.14 are numbers"] * 20,
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


def write(folder: Path, files: dict[str, bytes | str | dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        content = json.dumps(content) if isinstance(content, dict) else content
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def sentencepiece_model(corpus: list[str] = CORPUS, **options) -> bytes:
    stream = io.BytesIO()
    defaults = {"vocab_size": 700, "model_type": "bpe", "byte_fallback": True, "character_coverage": 0.99}
    defaults |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    defaults |= {"allow_whitespace_only_pieces": True, "num_threads": 1, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for line in corpus if line), model_writer=stream, **(defaults | options)
    )
    return stream.getvalue()


def byte_level(split: str | None, special: tuple[str, ...] = (), vocab_size: int = 600) -> Backend:
    backend = Backend(models.BPE(ignore_merges=split == LLAMA3_SPLIT))
    words = [pre_tokenizers.Split(Regex(split), "isolated")] if split else []
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*words, bytewise])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=list(special))
    )
    return backend


def byte_ranks() -> dict[bytes, int]:
    """A byte-level BPE as tiktoken knows it: the bytes and what is merged of them, no special tokens."""
    vocab = sorted(byte_level(LLAMA3_SPLIT).get_vocab().items(), key=lambda item: item[1])
    return {bytes(BYTE_OF[character] for character in token): rank for token, rank in vocab}


def tiktoken_file(ranks: dict[bytes, int]) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())


def added(content: str, **flags) -> dict:
    return {"content": content, "lstrip": False, "rstrip": False, "normalized": False, "special": True} | flags


LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
TOKENS = {"0": added("<unk>"), "1": added("<s>"), "2": added("</s>"), "700": added("<|im_start|>")}
TOKENS |= {"701": added("<|im_end|>", lstrip=True, rstrip=True), "702": added("<tool>", special=False)}
TOKENS |= {"703": added("<think>", special=False, normalized=True)}
BOS, EOS = {"add_bos_token": True}, {"add_eos_token": True}


def sentencepiece_folders() -> dict[str, dict]:
    bpe, demo = sentencepiece_model(), sentencepiece_model(add_dummy_prefix=False)
    symbols = sentencepiece_model(user_defined_symbols=["<tool>", "return"], control_symbols=["<|im_end|>"], pad_id=3)
    unigram = sentencepiece_model(model_type="unigram")
    nfkc = {"normalization_rule_name": "nmt_nfkc", "byte_fallback": False, "unk_piece": "<UNK>", "bos_id": -1}
    nfkc = sentencepiece_model(model_type="unigram", **nfkc)
    bos = {"__type": "AddedToken", **added("<s>")}
    older = {"bos_token": added("<s>"), "eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
    llama = {"model_type": "llama"}
    folders = {  # name -> model, tokenizer_config.json, config.json
        "demo": (demo, LLAMA | BOS | {"add_prefix_space": False}, None),
        "llama 1": (bpe, LLAMA | BOS | EOS | {"legacy": True, "bos_token": bos, "added_tokens_decoder": TOKENS}),
        "llama 2": (bpe, LLAMA | BOS | {"tokenizer_class": "LlamaTokenizerFast", "legacy": False}, llama),
        "older files": (bpe, BOS | {"tokenizer_class": "LlamaTokenizer", "legacy": None}),
        "class in config.json": (bpe, None, llama | {"tokenizer_class": "LlamaTokenizer"}),
        "mistral": (bpe, LLAMA | BOS, {"model_type": "mistral"}),
        "no config": (symbols, None, {}),
        "symbols": (symbols, {"tokenizer_class": "LlamaTokenizer", "pad_token": "<pad>", "image_token": "<think>"}),
        "unigram": (unigram, EOS, {}),
        "unigram as Llama": (unigram, LLAMA),
        "cleaned up": (nfkc, {"clean_up_tokenization_spaces": True, "extra_special_tokens": ["<|im_end|>"]}, {}),
    }
    names = ("tokenizer.model", "tokenizer_config.json", "config.json")
    folders = {
        name: {file: content for file, content in zip(names, files, strict=False) if content is not None}
        for name, files in folders.items()
    }
    folders["older files"]["special_tokens_map.json"] = older
    folders["older files"]["added_tokens.json"] = {"<|im_end|>": 701, "<|im_start|>": 700, "<think>": 702}
    return folders


def metaspace_folders(converted: dict) -> dict[str, dict]:
    """converted: a tokenizer.json as transformers saves it. What is made of it is how Llama 2's and Mistral's came."""
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    normalizer = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, space]}
    older = converted | {"normalizer": normalizer, "pre_tokenizer": None}
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    config = LLAMA | {"legacy": False, "add_bos_token": False, "added_tokens_decoder": TOKENS}
    both = {"tokenizer.json": older, "tokenizer_config.json": config}
    return {
        "llama json": both | {"tokenizer.model": b"not looked at"},
        "mistral json": both | {"config.json": {"model_type": "mistral"}},
        "json alone": {"tokenizer.json": older, "config.json": {}},
        "metaspace decoder": {
            "tokenizer.json": converted | {"pre_tokenizer": metaspace, "decoder": metaspace},
            "config.json": {},
        },
    }


def byte_level_folders() -> dict[str, dict]:
    llama3 = byte_level(LLAMA3_SPLIT)
    llama3.add_special_tokens(LLAMA3_CONFIG["extra_special_tokens"])
    bos = processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 600)])
    llama3.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), bos])
    llama3.enable_truncation(4)
    config = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "clean_up_tokenization_spaces": True}
    forced = {"clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True, "add_bos_token": False}
    chat = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    minimind = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>", "legacy": True}

    qwen = byte_level(LLAMA3_SPLIT.replace("{1,3}", ""))
    qwen.normalizer = normalizers.NFC()
    qwen.add_special_tokens(list(chat))
    qwen.add_tokens([AddedToken("<think>", normalized=False), AddedToken("<tool>", normalized=False)])
    qwen_tokens = {str(i): added(t.content, special=t.special) for i, t in qwen.get_added_tokens_decoder().items()}
    qwen_config = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "add_bos_token": False}
    qwen_config |= {"additional_special_tokens": ["<|im_start|>"], "added_tokens_decoder": qwen_tokens}
    older = {"additional_special_tokens": ["<|im_start|>"], "unk_token": "<think>"}

    ranks = tiktoken_file(byte_ranks())
    tokens = {"600": added("<|begin_of_text|>"), "603": added("<|eot_id|>"), "604": added("<tool>", special=False)}
    tokens = {"added_tokens_decoder": tokens, "extra_special_tokens": ["<|start_header_id|>"]}
    folders = {  # name -> tokenizer.json or tokenizer.model, the class, the rest of tokenizer_config.json, model_type
        "llama 3": (llama3, "PreTrainedTokenizerFast", config, "llama"),
        "llama 3 cleaned up": (llama3, "PreTrainedTokenizerFast", config | forced, "llama"),
        "llama 3 calling itself Llama": (llama3, "LlamaTokenizerFast", config, "llama"),
        "qwen2": (qwen, "Qwen2Tokenizer", qwen_config, "qwen2"),
        "qwen3": (qwen, "Qwen2Tokenizer", qwen_config, "qwen3"),
        "minimind": (byte_level(None, chat), "PreTrainedTokenizerFast", minimind, "minimind"),
        "tiktoken": (ranks, "PreTrainedTokenizerFast", config | BOS | tokens, "llama"),
        "tiktoken as Llama": (ranks, "LlamaTokenizer", LLAMA | BOS | {"extra_special_tokens": ["<think>"]}, "llama"),
        "as it is": (qwen, "PreTrainedTokenizerFast", qwen_config | {"unk_token": "<tool>"}, "llama"),
        "older json": (qwen, "PreTrainedTokenizerFast", older, "llama"),
    }
    folders = {
        name: {
            **({"tokenizer.model": ranks} if model is ranks else {"tokenizer.json": model.to_str()}),
            "tokenizer_config.json": {"tokenizer_class": class_} | config,
            "config.json": {"model_type": model_type},
        }
        for name, (model, class_, config, model_type) in folders.items()
    }
    folders["older json"]["added_tokens.json"] = {t.content: i for i, t in qwen.get_added_tokens_decoder().items()}
    folders["older json"]["special_tokens_map.json"] = {"eos_token": added("<|im_end|>", rstrip=True)}
    return folders


NAMES = [
    *("demo", "llama 1", "llama 2", "older files", "class in config.json", "mistral", "no config", "symbols"),
    *("unigram", "unigram as Llama", "cleaned up", "converted", "llama json", "mistral json", "json alone"),
    *("metaspace decoder", "llama 3", "llama 3 cleaned up", "llama 3 calling itself Llama", "qwen2", "qwen3"),
    *("minimind", "tiktoken", "tiktoken as Llama", "as it is", "older json"),
]


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    folders = {name: write(root / name, files) for name, files in sentencepiece_folders().items()}
    AutoTokenizer.from_pretrained(folders["llama 2"]).save_pretrained(root / "converted")
    folders["converted"] = root / "converted"
    others = metaspace_folders(json.loads((root / "converted" / "tokenizer.json").read_bytes())) | byte_level_folders()
    folders |= {name: write(root / name, files) for name, files in others.items()}
    assert list(folders) == NAMES
    return folders


@pytest.fixture(scope="session")
def pairs(folders):
    """name -> (ours, transformers')"""
    return {name: (load_tokenizer(path), AutoTokenizer.from_pretrained(path)) for name, path in folders.items()}


# ---- ids and text ----


def without_eos(theirs, ids):
    """transformers' ids of a text to be continued: without the eos that it puts behind one."""
    closed = theirs.encode("") and theirs.encode("")[-1] == theirs.eos_token_id
    return ids[:-1] if closed else ids


@pytest.mark.parametrize("name", NAMES)
def test_same_as_transformers(pairs, name):
    mine, theirs = pairs[name]
    assert mine.bos_id == theirs.bos_token_id
    assert mine.eos_ids == ([] if theirs.eos_token_id is None else [theirs.eos_token_id])
    assert mine.vocab_size == 1 + max(theirs.get_vocab().values())
    for text in TEXTS:
        for add_special_tokens in (True, False):
            ids = theirs.encode(text, add_special_tokens=add_special_tokens)
            assert mine.encode(text, add_special_tokens) == (without_eos(theirs, ids) if add_special_tokens else ids), (
                text
            )
            for skip in (True, False):
                assert mine.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip), text


WORDS = [" ", "  ", "\n", "\t", "<s>", "</s>", "<|im_end|>", "<tool>", "<think>", "return", "é", "🙂", "▁"]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30, deadline=None)
@given(parts=st.lists(st.sampled_from(WORDS) | st.text(max_size=5), max_size=12))
def test_any_text_same_as_transformers(pairs, name, parts):
    mine, theirs = pairs[name]
    ids = theirs.encode("".join(parts))
    assert mine.encode("".join(parts)) == without_eos(theirs, ids)
    assert mine.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_no_eos_behind_a_prompt(folders, tmp_path):
    """Neither add_eos_token nor the post-processor of a tokenizer.json ends a text that is to be continued."""
    closing = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    files = json.loads((folders["converted"] / "tokenizer.json").read_bytes())
    files["post_processor"] = json.loads(closing.__getstate__())
    closed = write(
        tmp_path, {"tokenizer.json": files, "tokenizer_config.json": {"eos_token": "</s>"}, "config.json": {}}
    )
    for path in (folders["llama 1"], closed):
        mine, theirs = load_tokenizer(path), AutoTokenizer.from_pretrained(path)
        for text in ("hello world", "", "ends in </s>"):
            ids = theirs.encode(text)
            assert ids[-1] == 2
            assert mine.encode(text) == ids[:-1]


def test_pre_tokenizer_decides_how_bytes_are_spelled(folders, tmp_path):
    """Conversions of Mistral's tekken files: byte-level tokens with the decoder of a sentencepiece model."""
    content = json.loads((folders["qwen2"] / "tokenizer.json").read_bytes())
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1)]
    content["decoder"] = json.loads(decoders.Sequence(steps).__getstate__())
    mine = load_tokenizer(write(tmp_path, {"tokenizer.json": content, "config.json": {"model_type": "mistral"}}))
    theirs = AutoTokenizer.from_pretrained(folders["qwen2"])  # with the decoder that goes with the pre-tokenizer
    for text in TEXTS:
        ids = mine.encode(text)
        assert ids == theirs.encode(text)
        assert "".join(stream(mine, ids)) == mine.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_user_defined_pieces(tmp_path):
    """Single characters too, which a normalizer would change, in every kind of model. The demo's line break is one."""
    for options in (
        {},
        {"model_type": "unigram"},
        {"model_type": "unigram", "normalization_rule_name": "nmt_nfkc", "byte_fallback": False},
    ):
        model = sentencepiece_model(user_defined_symbols=["<tool>", "return", "7", "\n", "ﬁ", "two words"], **options)
        mine = load_tokenizer(write(tmp_path, {"tokenizer.model": model, "config.json": {}}))
        theirs = AutoTokenizer.from_pretrained(tmp_path)
        added = {i: token.content for i, token in mine.backend.get_added_tokens_decoder().items()}
        assert {"<tool>", "return", "7", "\n", "ﬁ"} < set(added.values())
        assert added == {i: token.content for i, token in theirs.added_tokens_decoder.items()}
        for text in [*TEXTS, "7\n7 is ﬁne", "two words return 77"]:
            assert mine.encode(text) == theirs.encode(text)


def test_demo_kind_is_what_sentencepiece_does(folders):
    """The demo's model is trained on ids from sentencepiece itself: no prefix, whitespace and all else kept."""
    mine = load_tokenizer(folders["demo"])
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folders["demo"] / "tokenizer.model"))
    for text in [*TEXTS, *CORPUS[:300], "\n".join(CORPUS[:300])]:
        if "<" in text or "▁" in text:
            continue  # sentencepiece knows no special tokens within a text, and takes ▁ for a space
        ids = mine.encode(text)
        assert ids == [1, *processor.encode(text)]
        assert mine.decode(ids) == text


def test_bare_tiktoken_file_is_llama_3(tmp_path):
    ranks = byte_ranks()
    mine = load_tokenizer(write(tmp_path, {"tokenizer.model": tiktoken_file(ranks)}))
    special = LLAMA3_CONFIG["extra_special_tokens"]
    numbered = {token: 600 + i for i, token in enumerate(special)}
    theirs = tiktoken.Encoding("x", pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens=numbered)
    # The published ids that matter, counted from the end of the file's own tokens (which is 128000 in Llama 3's).
    published = {0: "<|begin_of_text|>", 1: "<|end_of_text|>", 2: "<|reserved_special_token_0|>"}
    published |= {4: "<|finetune_right_pad_id|>", 5: "<|reserved_special_token_2|>", 6: "<|start_header_id|>"}
    published |= {7: "<|end_header_id|>", 8: "<|eom_id|>", 9: "<|eot_id|>", 10: "<|python_tag|>"}
    published |= {11: "<|reserved_special_token_3|>", 255: "<|reserved_special_token_247|>"}
    assert {i: special[i] for i in published} == published
    assert len(special) == len(set(special)) == 256
    assert (mine.vocab_size, mine.bos_id, mine.eos_ids) == (856, 600, [601])
    for text in [*TEXTS, *CORPUS[:200], "".join(CORPUS[:200])]:
        ids = theirs.encode(text, allowed_special="all")
        assert mine.encode(text) == [600, *ids]
        assert mine.decode(ids, skip_special_tokens=False) == theirs.decode(ids)


def test_vocab_size_counts_holes(tmp_path):
    content = json.loads(TOKENIZER_JSON)
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


@pytest.fixture(scope="session")
def interesting(pairs) -> dict[str, list[int]]:
    """name -> the ids of spaces, bytes, added tokens and half characters, and some that do not exist"""
    interesting = {}
    for name, (mine, _) in pairs.items():
        tokens = [mine.backend.id_to_token(i) or "" for i in range(mine.vocab_size)]
        odd = [i for i, token in enumerate(tokens) if not token.strip("▁Ġ ") or token[0] == "<" or "\ufffd" in token]
        interesting[name] = [*odd, *mine.backend.get_added_tokens_decoder(), mine.vocab_size, mine.vocab_size + 1]
    return interesting


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_stream_joins_to_decode(pairs, interesting, name, data):
    """Any ids: those of a text, cut anywhere, between random ones and interesting ones."""
    mine, theirs = pairs[name]
    texts = [mine.encode(text) for text in TEXTS]
    cut = st.builds(lambda ids, a, b: ids[a:b], st.sampled_from(texts), st.integers(0, 30), st.integers(0, 60))
    some = st.lists(st.integers(0, mine.vocab_size - 1) | st.sampled_from(interesting[name]), max_size=8)
    ids = list(itertools.chain(*data.draw(st.lists(some | cut, max_size=4))))
    pieces = stream(mine, ids)
    assert "".join(pieces) == mine.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    # What is out is never taken back, however the text goes on.
    shown = "".join(pieces[: len(ids)])
    for more in texts[8:10]:
        assert mine.decode(ids + more).startswith(shown)


@pytest.mark.parametrize("name", ["demo", "llama 2", "llama 3", "qwen2", "unigram"])
def test_stream_gives_whole_characters_soon(pairs, name):
    mine, _ = pairs[name]
    text = "naïve 你好 🙂👩‍👩‍👧‍👦 ok then, " * 3
    pieces = stream(mine, mine.encode(text, add_special_tokens=False))
    assert "".join(pieces) == text
    assert sum(map(bool, pieces)) > 20


@settings(deadline=None)
@given(data=st.binary(max_size=12))
def test_byte_level_stream_of_any_bytes(pairs, data):
    mine, _ = pairs["llama 3"]
    spelled = {byte: mine.backend.token_to_id(character) for character, byte in BYTE_OF.items()}
    ids = [spelled[byte] for byte in data]
    assert "".join(stream(mine, ids)) == mine.decode(ids) == data.decode(errors="replace")


@settings(deadline=None)
@given(data=st.binary(max_size=12), after=st.sampled_from(["", "a", "<s>"]))
@example(data=b"\xe4\xbd\xa0\x80", after="a")
def test_byte_fallback_stream_of_any_bytes(pairs, data, after):
    mine, _ = pairs["demo"]
    ids = [mine.backend.token_to_id(f"<0x{byte:02X}>") for byte in data] + mine.encode(after, False)
    assert "".join(stream(mine, ids)) == mine.decode(ids)


@settings(max_examples=300, deadline=None)
@given(parts=st.lists(st.sampled_from([" .", " ' ", " n't", " 've", " 's", " ", "x", "xyz", "'", "t"]), max_size=9))
def test_clean_up_stream_of_any_text(pairs, parts):
    detokenizer, text = StreamingDetokenizer(pairs["cleaned up"][0]), "".join(parts)
    cleaned = "".join(detokenizer._clean(character) for character in text) + detokenizer.finish()
    assert cleaned == pairs["unigram"][1].clean_up_tokenization(text)


def test_stream_costs_the_same_everywhere(pairs):
    """A byte run and a line without end: were anything decoded twice, this would take minutes."""
    for name, token in (("demo", "<0xE4>"), ("demo", "e"), ("llama 3", "ä"), ("llama 3", "e")):
        mine, _ = pairs[name]
        ids = [mine.backend.token_to_id(token)] * 100_000
        assert "".join(stream(mine, ids)) == mine.decode(ids)


# ---- chats ----

CHATML = """{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == "user" and message.content is string %}
        {%- set ns.last = index %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'system' and not loop.first %}{%- continue %}{%- endif %}
    {%- if message.tool_calls %}
        {{- '<tool_call>\\n' + message.tool_calls | tojson + '\\n</tool_call>' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
        {%- set inside = message.content.split('</think>')[-1].lstrip('\\n') %}
        {{- inside + '<|im_end|>' }}
        {%- endgeneration %}
        {{- inside }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
{{- ns.last }}"""

LLAMA3_CHAT = """{{- bos_token }}
{%- if strftime_now is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- if tools is not none %}{{ raise_exception("no tools here") }}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n<|eot_id|>" }}
{% for message in messages %}
    {% if loop.index0 > 0 and not loop.last %}

    {% endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + eos_token }}
{% endfor %}
[{{ missing }}{{ pad_token }}]{{ {"b": "<é&'>", "a": [1, 2.5, none]} | tojson }}
{{ messages | tojson(indent=2) }}"""

MISTRAL_CHAT = """{{ bos_token }}{% for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif -%}
    {%- if message['role'] == 'user' -%}
        {{ ' [INST] ' + message['content'] + ' [/INST]' }}
    {%- else -%}
        {{ ' ' + message['content'] + eos_token }}
    {%- endif -%}
{% endfor %}"""

USER, HI = {"role": "user", "content": "Hello <b>&'you'</b> 你好\n "}, {"role": "assistant", "content": " Hi! "}
SYSTEM = {"role": "system", "content": "Be brief.", "tool_calls": None}
CHATS = [[USER], [USER, HI, {"role": "user", "content": "And <|eot_id|>\tnow?"}], [SYSTEM, USER, HI, USER, HI]]


@pytest.mark.parametrize("template", [CHATML, LLAMA3_CHAT, MISTRAL_CHAT], ids=["chatml", "llama3", "mistral"])
@pytest.mark.parametrize("where", ["config", "named", "file"])
def test_chat_same_as_transformers(folders, tmp_path, template, where):
    config = json.loads((folders["llama 3"] / "tokenizer_config.json").read_bytes())
    files = {"tokenizer.json": (folders["llama 3"] / "tokenizer.json").read_bytes(), "tokenizer_config.json": config}
    config["chat_template"] = template
    if where == "named":
        named = {"tool_use": "for tools", "default": template}
        config["chat_template"] = [{"name": name, "template": text} for name, text in named.items()]
    if where == "file":
        config["chat_template"], files["chat_template.jinja"] = "the file wins", template
    mine, theirs = load_tokenizer(write(tmp_path, files)), AutoTokenizer.from_pretrained(tmp_path)
    assert mine.has_chat_template
    for chat in CHATS[: 2 if template == MISTRAL_CHAT else 3]:
        for prompt in (True, False):
            text = mine.apply_chat_template(chat, add_generation_prompt=prompt)
            assert text == theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
            ids = theirs.apply_chat_template(chat, add_generation_prompt=prompt, return_dict=False)
            assert mine.encode(text, add_special_tokens=False) == ids
    if template == LLAMA3_CHAT:
        assert datetime.now().strftime("%d %b %Y") in mine.apply_chat_template(CHATS[0])


def with_template(folder: Path, template: str):
    return load_tokenizer(write(folder, {"tokenizer.json": TOKENIZER_JSON, "chat_template.jinja": template}))


# Templates that take the parts of a content: those of Llama 3.2 Vision and SmolLM, in short, and one with a macro.
THROUGH_PARTS = """{% for message in messages %}<{{ message['role'] }}>
{%- if message['content'] is string %}{{ message['content'] }}{% else %}
{%- for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% elif part['type'] == 'text' %}
{{- '[' + part['text'] + ']' }}{% endif %}{% endfor %}{% endif %}</>{% endfor %}"""
BY_MACRO = """{%- macro text(content) %}{% if content is string %}{{ content }}{% else %}{% for part in content %}
{{- part.text }}|{% endfor %}{% endif %}{% endmacro %}
{%- for message in messages %}{{ message.role }}: {{ text(message.content) }}
{% endfor %}"""
# Templates that want strings: one cannot add a list, one would print it, one as JSON, one leaves it out.
INSTRUCT = MISTRAL_CHAT.replace(" + eos_token", "")
PRINTED = "{% for message in messages %}<{{ message.role }}>{{ message.content | trim }}</>{% endfor %}"
AS_JSON = PRINTED.replace("trim", "tojson")
LEFT_OUT = PRINTED.replace("message.content | trim", "message.content if message.content is string else ''")


@pytest.mark.parametrize("template", [THROUGH_PARTS, BY_MACRO, INSTRUCT, PRINTED, AS_JSON, LEFT_OUT, CHATML])
def test_contents_in_parts(tmp_path, template):
    mine = with_template(tmp_path, template)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    parts = [{"type": "text", "text": "Say "}, {"type": "text", "text": "'hello'"}]
    chat = [{"role": "user", "content": parts}, HI, {"role": "user", "content": "And now?"}]
    if template in (THROUGH_PARTS, BY_MACRO):
        expected = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    else:
        joined = [{"role": "user", "content": "Say 'hello'"}, *chat[1:]]
        expected = theirs.apply_chat_template(joined, tokenize=False, add_generation_prompt=True)
    assert "Say" in expected and "hello" in expected
    assert mine.apply_chat_template(chat) == expected
    chat[0]["content"] = [*parts, {"type": "image"}]
    if template == THROUGH_PARTS:
        assert mine.apply_chat_template(chat) == theirs.apply_chat_template(chat, tokenize=False)
    elif template != BY_MACRO:
        with pytest.raises(UserError, match="takes text only"):
            mine.apply_chat_template(chat)


def test_variables_of_the_template(tmp_path):
    template = CHATML + "{{ bos_token is defined }}{{ tools }}{{ custom }}"
    mine = with_template(tmp_path, template)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for variables in (
        {"enable_thinking": False},
        {"enable_thinking": True, "custom": {"a": [1, None]}},
        {"tools": [{"type": "function"}], "bos_token": "<x>"},
    ):
        text = mine.apply_chat_template(CHATS[0], variables=variables)
        assert text == theirs.apply_chat_template(CHATS[0], tokenize=False, add_generation_prompt=True, **variables)
    assert "<think>" in mine.apply_chat_template(CHATS[0], variables={"enable_thinking": False})
    assert "<think>" not in mine.apply_chat_template(CHATS[0])


def test_check_chat_template(pairs, tmp_path):
    pairs["demo"][0].check_chat_template()
    with_template(tmp_path, CHATML).check_chat_template()
    with_template(tmp_path, "{{ nothing.at.all }}").check_chat_template()  # breaks only when it is rendered
    for template, words in (("{% if %}", "Expected an expression"), ("{% for m in x %}", "Unexpected end of template")):
        with pytest.raises(UserError, match=f"chat template is broken: {words}"):
            with_template(tmp_path, template).check_chat_template()
    with pytest.raises(UserError, match="chat template is broken"):
        with_template(tmp_path, "{{" + "(" * 5000 + "1" + ")" * 5000 + "}}").check_chat_template()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (MISTRAL_CHAT, "roles must alternate"),
        ("{% if %}", "Expected an expression"),
        ("{% for m in messages %}{{ m.content }}", "Unexpected end of template"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_template_that_fails_is_the_users_error(tmp_path, template, message):
    mine = load_tokenizer(write(tmp_path, {"tokenizer.json": TOKENIZER_JSON, "chat_template.jinja": template}))
    with pytest.raises(UserError, match=message):
        mine.apply_chat_template([USER, USER])


def test_no_chat_template(pairs):
    mine, _ = pairs["demo"]
    assert not mine.has_chat_template
    with pytest.raises(UserError, match="no chat template"):
        mine.apply_chat_template([USER])


# ---- bad input ----

TOKENIZER_JSON = byte_level(None, vocab_size=260).to_str()


def with_model(**model) -> dict:
    return json.loads(TOKENIZER_JSON) | {"model": {"type": "BPE"} | model}


def with_decoder(decoder: dict | None) -> dict:
    return json.loads(TOKENIZER_JSON) | {"decoder": decoder}


BAD_FILES = [
    ("tokenizer.model", b"", "ranks"),
    ("tokenizer.model", b"\x80\x02garbage\xff\x00", "neither a sentencepiece model nor"),
    ("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\noid", "neither a sentencepiece model nor"),
    ("tokenizer.model", b"IQ== 0\nIg== 2\n", "ranks"),
    ("tokenizer.model", b"\n" + b"\xff" * 100_000, "cut off"),
    ("tokenizer.json", "{ not json", "key must be a string"),
    ("tokenizer.json", "", "EOF"),
    ("tokenizer.json", "[]", "expected struct Tokenizer"),
    ("tokenizer.json", b"\xff\xfe{}", "expected value"),
    ("tokenizer.json", TOKENIZER_JSON[:-400], "EOF"),
    ("tokenizer.json", with_model(vocab={}, merges=[]), "holds no tokens"),
    ("tokenizer.json", with_model(vocab={"a": 0, "b": 5}, merges=["a b"]), "Panic"),  # the Rust library's
    ("tokenizer.json", with_decoder({"type": "WordPiece", "prefix": "##", "cleanup": True}), r"decoder \(WordPiece\)"),
    ("tokenizer.json", with_decoder(None), r"decoder \(none\)"),
    ("tokenizer_config.json", "[1]", "not a JSON object"),
    ("tokenizer_config.json", "{", "Expecting property name"),
    ("tokenizer_config.json", b'{"a": "\xff"}', "utf-8"),
    ("tokenizer_config.json", "[" * 100_000, "recursion"),
    ("tokenizer_config.json", {"added_tokens_decoder": [1]}, "list"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"1": {"lstrip": True}}}, "content"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"999999999999": added("a")}}, "999999999999"),
    ("tokenizer_config.json", {"extra_special_tokens": [7]}, "int"),
    ("tokenizer_config.json", {"chat_template": 7}, "chat_template"),
    ("tokenizer_config.json", {"chat_template": [{"name": "default"}]}, "template"),
    ("special_tokens_map.json", "nope", "Expecting value"),
    ("added_tokens.json", {"a": None}, "int"),
    ("chat_template.jinja", b"\xff", "utf-8"),
    ("config.json", "{", "Expecting property name"),
]


@pytest.mark.parametrize(("file", "content", "reason"), BAD_FILES)
def test_bad_files_are_named(tmp_path, file, content, reason):
    files = {} if file in ("tokenizer.model", "added_tokens.json") else {"tokenizer.json": TOKENIZER_JSON}
    files |= {"tokenizer.model": "IQ== 0"} if file == "added_tokens.json" else {}
    with pytest.raises(UserError, match=reason) as error:
        load_tokenizer(write(tmp_path, files | {file: content}))
    assert str(error.value).startswith(f"{tmp_path / file} cannot be used (")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("files", [{}, {"tokenizer_config.json": LLAMA, "config.json": {}}])
def test_no_tokenizer(tmp_path, files):
    with pytest.raises(UserError, match="has no tokenizer"):
        load_tokenizer(write(tmp_path, files))
    with pytest.raises(UserError, match="has no tokenizer"):
        load_tokenizer(tmp_path / "nowhere")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_tokenizer_model(folders, tmp_path, data):
    """Cut off, or with bytes changed: a tokenizer that works or a UserError, and soon."""
    kind = data.draw(st.sampled_from(["demo", "unigram", "tiktoken"]))
    whole = (folders[kind] / "tokenizer.model").read_bytes()
    content = bytearray(whole)
    for at, byte in data.draw(st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), max_size=4)):
        content[at] = byte
    cut = data.draw(st.just(len(whole)) | st.integers(0, len(whole)))
    config = json.loads((folders[kind] / "tokenizer_config.json").read_bytes())
    write(tmp_path, {"tokenizer.model": bytes(content[:cut]), "tokenizer_config.json": config})
    try:
        mine = load_tokenizer(tmp_path)
        mine.decode(mine.encode(TEXTS[4]))
        assert cut == len(whole) or kind == "tiktoken"  # whose lines can end anywhere
    except UserError as error:
        assert str(error).startswith(str(tmp_path)), error
