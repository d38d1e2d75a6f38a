"""Ids of tokenizers read from a GGUF file's metadata, compared with those of the tokenizers that the metadata was made
from (sentencepiece, tokenizers), with ids that llama.cpp gave, and with llama.cpp itself where it is installed."""

import inspect
import io
import json
import os
import random
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: it must not ask the hub about our folders

import numpy as np
import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from checkpoint import load_generation_config
from errors import UserError
from formats.gguf_splits import BOS_FIRST, PLAIN, SPLITS, WHOLE_WORDS
from formats.gguf_tokenizer import tokenizer_files
from tokenizer import BYTE_OF, StreamingDetokenizer, Tokenizer, load_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
CORPUS = [
    *inspect.getsource(inspect).splitlines()[:700],
    *["你好，世界。今天天气很好。", "日本語のテキストです。", "naïve café — déjà vu", "Привет, мир! Как дела?"] * 20,
    *["It's a dog's life , isn't it ? We've no idea !", "I'm told 1234567, 0x1F and 3.14 are numbers\r\n\r\n\tx"] * 20,
]
TEXTS = [
    "",
    " ",
    "\n",
    "hello world",
    " one space before, two  spaces, then   three    four ",
    "def f(x):\n    return x + 1\n\n\n\tif x == 1:\r\n        pass  # tab\n",
    "\n" * 40 + "x" + " " * 70 + "y" + "=" * 33,
    "emoji 🙂👩‍👩‍👧‍👦🇫🇷 and 🤷🏽‍♀️ done",
    "你好，世界 日本語 안녕 Привет naïve ﬁ Å ½",
    "It's 12345678 o'clock, isn't it ? I'M SURE THEY'VE 've 'LL.",
    "zero\x00byte, \u200bzero width, \u00a0\u3000spaces\u2028 ▁ and <0x41> written out",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "<s>at the start</s> in <s> the middle</s>",
]


# ---- metadata, and the tokenizer made of it ----


def metadata(kind: str, tokens: list[str], types: list[int] | None = None, **others) -> dict:
    others = {"model": kind, "tokens": tokens, "token_type": types} | others
    return {f"tokenizer.ggml.{name}": value for name, value in others.items() if value is not None}


def load(folder: Path, metadata: dict) -> Tokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in tokenizer_files(metadata).items():
        (folder / name).write_bytes(content)
    return load_tokenizer(folder)


CHARACTER = {byte: character for character, byte in BYTE_OF.items()}
ALPHABET = [CHARACTER[byte] for byte in range(256)]


def spell(text: str) -> str:
    """The bytes of a text as byte-level BPE writes them."""
    return "".join(CHARACTER[byte] for byte in text.encode())


def plain(tokens: list[str], ids: list[int]) -> str:
    return "|".join(bytes(BYTE_OF[character] for character in tokens[i]).decode() for i in ids)


PAIRS = [(spell(a), spell(b)) for a in "aA1's =\n!" for b in "aA1's =\n!"]
PAIR_TOKENS = [*ALPHABET, *(a + b for a, b in PAIRS), "<|bos|>", "<|im_end|>", "<think>", "<|im_start|>"]
PAIR_TYPES = [NORMAL] * (256 + len(PAIRS)) + [CONTROL, CONTROL, USER_DEFINED, NORMAL]
BOS, END, THINK, START = range(len(PAIR_TOKENS) - 4, len(PAIR_TOKENS))


def pairs_metadata(pre: str | None, **others) -> dict:
    """A vocabulary whose merges join any two of a few characters: its tokens tell where a text was split."""
    others = {"pre": pre, "merges": [f"{a} {b}" for a, b in PAIRS], "bos_token_id": BOS, "eos_token_id": END} | others
    return metadata("gpt2", others.pop("tokens", PAIR_TOKENS), PAIR_TYPES, **others)


PIECES = ["▁t", "▁▁", "he", "▁the", "▁▁▁▁", "in", "ing", "▁▁▁", "\n\n", "你好", "==", *"▁abeghints你好\n="]
SP_TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
SP_TOKENS += ["<|im_start|>", "<|im_end|>", "  ", "<pad>"]
SP_START, SP_END, SP_SPACES, SP_PAD = range(len(SP_TOKENS) - 4, len(SP_TOKENS))
SP_TYPES = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(PIECES), NORMAL, CONTROL, USER_DEFINED, UNUSED]
SP_SCORES = [0.0] * 259 + [-float(i) for i in range(11)] + [-1000.0 - i for i in range(len(PIECES) - 11)] + [-1e4] * 4


def pieces_metadata(**others) -> dict:
    return metadata("llama", SP_TOKENS, SP_TYPES, **({"scores": SP_SCORES} | others))


def sentencepiece_processor(**options) -> sentencepiece.SentencePieceProcessor:
    stream = io.BytesIO()
    defaults = {"vocab_size": 700, "model_type": "bpe", "byte_fallback": True, "character_coverage": 0.99}
    defaults |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    defaults |= {"allow_whitespace_only_pieces": True, "num_threads": 1, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for line in CORPUS if line), model_writer=stream, **(defaults | options)
    )
    return sentencepiece.SentencePieceProcessor(model_proto=stream.getvalue())


def trained_pieces(processor: sentencepiece.SentencePieceProcessor, **others) -> dict:
    ids = range(len(processor))
    kinds = [(processor.is_unknown, UNKNOWN), (processor.is_control, CONTROL), (processor.is_byte, BYTE)]
    types = [next((kind for is_kind, kind in kinds if is_kind(i)), NORMAL) for i in ids]
    tokens, scores = [processor.id_to_piece(i) for i in ids], [processor.get_score(i) for i in ids]
    return metadata("llama", tokens, types, scores=scores, pre="default", **others)


def byte_level(words: list, ignore_merges: bool = False) -> Backend:
    """A trained byte-level BPE, with the pre-tokenizers of a published tokenizer.json."""
    backend = Backend(models.BPE(ignore_merges=ignore_merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(words)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    options = {"vocab_size": 700, "special_tokens": special, "show_progress": False}
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(initial_alphabet=ALPHABET, **options))
    return backend


def bpe_metadata(backend: Backend, pre: str, **others) -> dict:
    state = json.loads(backend.to_str())
    tokens = sorted(backend.get_vocab(), key=backend.get_vocab().get)
    special = {token["id"] for token in state["added_tokens"]}
    types = [CONTROL if i in special else NORMAL for i in range(len(tokens))]
    merges = [" ".join(merge) for merge in state["model"]["merges"]]
    return metadata("gpt2", tokens, types, merges=merges, pre=pre, eos_token_id=0, **others)


BYTEWISE = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2_WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def isolated(*patterns: str) -> list:
    return [*(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns), BYTEWISE]


SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TO_LOWER, FROM_UPPER = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
PUBLISHED = {  # name: how the tokenizer.json of a model that has it splits words
    "gpt-2": [GPT2_WORDS],
    "starcoder": [pre_tokenizers.Digits(individual_digits=True), GPT2_WORDS],
    "falcon": [
        pre_tokenizers.Punctuation("contiguous"),
        GPT2_WORDS,
        pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
    ],
    "llama-bpe": isolated(
        rf"{SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}"
    ),
    "qwen2": isolated(rf"{SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}"),
    "tekken": isolated(rf"{TO_LOWER}|{FROM_UPPER}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"),
    "gpt-4o": isolated(
        rf"{TO_LOWER}{SUFFIX}?|{FROM_UPPER}{SUFFIX}?|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"
    ),
    "deepseek-coder": [
        *isolated(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+")[:-1],
        pre_tokenizers.Digits(individual_digits=True),
        BYTEWISE,
    ],
    "bloom": isolated(r" ?[^(\s|[.,!?…。，、।۔،])]+"),
}


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> dict[str, tuple]:
    """name -> (metadata, our tokenizer, text -> ids of the tokenizer that the metadata was made from)."""
    folder = tmp_path_factory.mktemp("tokenizers")
    made = {}
    for name, options in {"spaced": {}, "unspaced": {"add_dummy_prefix": False}}.items():
        processor = sentencepiece_processor(**options)
        made[name] = (
            trained_pieces(processor, add_space_prefix=name == "spaced", add_bos_token=False),
            processor.encode,
        )
    for name, words in PUBLISHED.items():
        backend = byte_level(words, ignore_merges=name in ("llama-bpe", "tekken"))
        encode = lambda text, backend=backend: backend.encode(text).ids  # noqa: E731
        made[name] = (bpe_metadata(backend, name, add_bos_token=False), encode)
    return {name: (data, load(folder / name, data), encode) for name, (data, encode) in made.items()}


ALL = ["spaced", "unspaced", *PUBLISHED]
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="<▁")
WORDS = st.sampled_from(
    ["  ", "\n\n", "'s", "'LL", "123", " 1", "\r\n", "\t", "你", "の", "🙂", "é", "É", "aB", "://", "=="]
)
RANDOM_TEXTS = st.lists(WORDS | CHARACTERS | st.sampled_from("ab Z9.,"), max_size=24).map("".join)


# ---- the ids ----


@pytest.mark.parametrize("name", ALL)
def test_ids_are_those_of_the_original(trained, name):
    _, tokenizer, encode = trained[name]
    for text in TEXTS:
        if "spaced" in name and ("<s>" in text or not text):
            continue  # sentencepiece does not look for special tokens, and puts nothing before an empty text
        assert tokenizer.encode(text) == encode(text), text


@pytest.mark.parametrize("name", ALL)
def test_ids_of_random_texts(trained, name):
    _, tokenizer, encode = trained[name]

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(RANDOM_TEXTS)
    def check(text):
        ids = tokenizer.encode(text)
        assert ids == encode(text)
        stream = StreamingDetokenizer(tokenizer)
        assert "".join(stream.put(i) for i in ids) + stream.finish() == tokenizer.decode(ids) == text

    check()


@pytest.mark.parametrize("name", ALL)
def test_transformers_reads_the_files_alike(trained, tmp_path, name):
    data = trained[name][0] | {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 1}
    tokenizer = load(tmp_path, data)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert tokenizer.encode(text) == theirs(text)["input_ids"], text
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, *tokenizer.eos_ids)


SPLIT_TEXT = "Aa's a's Aa1111 1a=a!=  A\n\n a'S! \n  1=11111=!!\n='a"
SPLIT_BY_LLAMA_CPP = {  # names of pre-tokenizers: the tokens that llama.cpp makes of SPLIT_TEXT
    "default":
        "Aa|'|s| a|'|s| |Aa|11|1|1| |1|a|=|a|!=| | A|\n\n| a|'|S|!| \n| | |1|=|11|1|11|=!|!|\n|='|a",
    "gpt-2 phi-2 mpt olmo jais trillion granite-docling exaone4 gigachat a.x-4.0 mellum modern-bert jina-es "
    "jina-de jina-v2-es jina-v2-de jina-v1-en jina-v2-code roberta-bpe":
        "Aa|'s| a|'s| |Aa|11|11| 1|a|=|a|!=| | A|\n\n| a|'|S|!| \n| | 1|=|11|11|1|=!|!|\n|='|a",
    "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2":
        "Aa|'s| a|'s| |Aa|1|1|1|1| |1|a|=|a|!=| | A|\n\n| a|'|S|!| \n|  |1|=|1|1|1|1|1|=!|!|\n|='|a",
    "falcon":
        "Aa|'|s| a|'|s| |Aa|11|1|1| 1|a|=|a|!=| | A|\n\n| a|'|S|!| \n| | 1|=|11|1|11|=!|!|\n|='|a",
    "chameleon":
        "Aa|'|s| a|'|s| |Aa|1|1|1|1| |1|a|=|a|!|=|  |A|\n|\n| a|'|S|!| |\n|  |1|=|1|1|1|1|1|=|!|!|\n|=|'|a",
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano dbrx smaug-bpe "
    "chatglm-bpe glm4 glm5 jais-2":
        "Aa|'s| a|'s| |Aa|11|1|1| |1|a|=a|!=| | A|\n\n| a|'|S|!| \n| | |1|=|11|1|11|=!|!\n|='|a",
    "minicpm5 deepseek-v3 hunyuan-dense joyai-llm hy_v4":
        "Aa|'s| a|'s| |Aa|11|1|1| |1|a|=a|!=| | A|\n\n| a|'|S|!| \n|  |1|=|11|1|11|=!|!\n|='|a",
    "qwen2 stablelm2 hunyuan solar-open megrez grok-2 deepseek-r1-qwen kormo f2llmv2 qwen35 ufakzeka "
    "bailingmoe bailingmoe2 llada-moe exaone-moe tekken":
        "Aa|'s| a|'s| |Aa|1|1|1|1| |1|a|=a|!=| | A|\n\n| a|'|S|!| \n| | |1|=|1|1|1|1|1|=!|!\n|='|a",
    "laguna":
        "Aa|'s| a|'s| |Aa|1|1|1|1| |1|a|=a|!=| | A|\n\n| a|'|S|!| |\n| | |1|=|1|1|1|1|1|=!|!|\n|='|a",
    "seed-coder":
        "Aa|'s| a|'s| |Aa|1|1|1|1| |1|a|=a|!=| | A|\n\n| a|'|S|!| \n| | |1|=|1|1|1|1|1|=!|!|\n|='|a",
    "gpt-4o llama4 kanana2 talkie minimax-m2 granite-embed-multi-97m kimi-k2":
        "A|a'|s| |a'|s| |Aa|11|1|1| |1|a|=a|!=| | A|\n\n| |a'|S|!| \n| | |1|=|11|1|11|=!|!\n|='|a",
    "youtu":
        "A|a'|s| |a'|s| |Aa|1|1|1|1| |1|a|=a|!=| | A|\n\n| |a'|S|!| \n| | |1|=|1|1|1|1|1|=!|!\n|='|a",
    "deepseek-llm":
        "Aa|'|s| a|'|s| |Aa|11|11| |1|a|=|a|!=| | A|\n|\n| a|'|S|!| |\n|  |1|=|11|11|1|=!|!|\n|='|a",
    "deepseek-coder":
        "Aa|'|s| a|'|s| |Aa|1|1|1|1| |1|a|=|a|!|= | A|\n|\n| a|'|S|!| |\n|  |1|=|1|1|1|1|1|=|!!|\n|=|'|a",
    "spark2_5":
        "Aa|'s| a|'s| |Aa|1|1|1|1| |1|a|=a|!=| | A|\n|\n| a|'|S|!| \n|  |1|=|1|1|1|1|1|=!|!|\n|='|a",
    "superbpe":
        "A|a'|s |a'|s |Aa|1|11|1| |1|a=|a!|=|  |A\n|\n |a'|S|!| \n|  |1|=|11|11|1|=!|!|\n=|'a",
    "bloom poro-chat gpt3-finnish":
        "A|a'|s| |a'|s| A|a1|11|1| 1|a=|a|!|=| | A|\n\n| |a'|S|!| \n| | |1=|11|11|1=|!|!\n|=|'a",
    "viking":
        "A|a'|s| |a'|s| |Aa|1|1|1|1| |1|a=|a|!|=| | A|\n\n| |a'|S|!| \n| | |1|=|1|1|1|1|1|=|!|!\n|=|'a",
}  # fmt: skip
NUMBERS = ("afmoe", "tiny_aya", "cohere2moe")  # llama.cpp joins a space before these to the digits


@pytest.mark.parametrize("names", SPLIT_BY_LLAMA_CPP)
def test_words_are_split_as_by_llama_cpp(tmp_path, names):
    for pre in names.split():
        tokenizer = load(tmp_path / pre, pairs_metadata(pre, add_bos_token=False))
        assert plain(PAIR_TOKENS, tokenizer.encode(SPLIT_TEXT)) == SPLIT_BY_LLAMA_CPP[names], pre


def test_every_split_is_checked():
    named = {name for names in SPLIT_BY_LLAMA_CPP for name in names.split()} | {*NUMBERS} | PLAIN
    assert named == SPLITS.keys()
    assert SPLITS.keys() > WHOLE_WORDS | BOS_FIRST


@pytest.mark.parametrize("pre", NUMBERS)
def test_numbers_are_split_from_their_end(tmp_path, pre):
    tokenizer = load(tmp_path, pairs_metadata(pre, add_bos_token=False))
    assert [plain(PAIR_TOKENS, tokenizer.encode("1" * n)) for n in (3, 4, 5, 6)] == [
        "11|1", "1|11|1", "11|11|1", "11|1|11|1"
    ]  # fmt: skip


@pytest.mark.parametrize("pre", ["tekken", "gpt-4o", "kimi-k2", "youtu", "tiny_aya"])
def test_a_capital_begins_a_word_as_in_training(tmp_path, pre):
    """llama.cpp does so for ASCII only, or, with the last three, not at all."""
    tokenizer = load(tmp_path, pairs_metadata(pre, add_bos_token=False))
    assert plain(PAIR_TOKENS, tokenizer.encode("=aAaA")) == "=a|Aa|A"  # else =|aA|aA


SP_TEXTS = ["the thing", "  the\n\n\nin", " 你好🙂\t", "a     b", "<|im_end|> the</s>the<|im_start|>", "======"]
PLAIN_START = [63, 127, 276, 112, 98, 279, 278, 271, 117, 278, 127, 65]  # <|im_start|>, marked as ordinary text
SP_IDS = {  # add_space_prefix: ids that llama.cpp gave for SP_TEXTS
    True: [
        [1, 262, 259, 275, 265],
        [1, 286, 262, 267, 282, 264],
        [1, 260, 268, 243, 162, 156, 133, 12],
        [1, 270, 271, 286, 286, 260, 272],
        [1, SP_END, 270, 262, 2, 262, *PLAIN_START],
        [1, 270, 269, 269, 269],
    ],
    False: [
        [1, 278, 261, 259, 275, 265],
        [1, 286, 278, 261, 267, 282, 264],
        [1, 270, 268, 243, 162, 156, 133, 12],
        [1, 271, 286, 286, 270, 272],
        [1, SP_END, 262, 2, 278, 261, *PLAIN_START],
        [1, 269, 269, 269],
    ],
}


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_ids_that_llama_cpp_gave(tmp_path, prefix):
    tokenizer = load(tmp_path, pieces_metadata(add_space_prefix=prefix))
    assert [tokenizer.encode(text) for text in SP_TEXTS] == SP_IDS[prefix]
    if prefix:  # the default
        assert load(tmp_path / "2", pieces_metadata()).encode(SP_TEXTS[0]) == SP_IDS[True][0]


GEMMA4_MERGES = ["▁▁ ▁▁", "▁ ▁", "▁ t", "h e", "▁t he", "i n", "in g", "\n \n", "你 好"]
GEMMA4 = {"model": "gemma4", "merges": GEMMA4_MERGES, "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
GEMMA4_IDS = [*SP_IDS[False][:-1], [1, *[283] * 6]]  # that llama.cpp gave; there is no merge for ==


def test_gemma4_ids_that_llama_cpp_gave(tmp_path):
    """Merges as in byte-level BPE, pieces as in sentencepiece, and bos whatever the file says."""
    tokenizer = load(tmp_path, pieces_metadata(**GEMMA4, add_bos_token=False))
    assert [tokenizer.encode(text) for text in SP_TEXTS] == GEMMA4_IDS


RUN_TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁=-a"]
RUN_TOKENS += ["==", "===", "====", "▁▁", "▁▁▁", "--", "=-"]
RUN_TYPES = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * 11]
RUN_SCORES = [0.0] * 259 + [-50.0, -51.0, -52.0, -53.0, *[-9.0] * 5, -8.0, -8.5]
RUNS = metadata("llama", RUN_TOKENS, RUN_TYPES, scores=RUN_SCORES, add_space_prefix=False)
RUN_IDS = {  # that llama.cpp gave
    "=" * 11: [1, 265, 265, 264],
    "a       a": [1, 262, 267, 267, 259, 262],
    "===---===-": [1, 264, 268, 261, 263, 269],
    "-=-=--===": [1, 261, 269, 260, 268, 264],
}


def test_runs_of_pieces_with_equal_scores(tmp_path):
    tokenizer = load(tmp_path, RUNS)
    assert {text: tokenizer.encode(text) for text in RUN_IDS} == RUN_IDS


# ---- special tokens ----


def test_types_of_tokens(tmp_path):
    tokenizer = load(tmp_path, pairs_metadata("gpt-2", add_bos_token=False))
    ids = tokenizer.encode("<think>a<|im_end|><|bos|>")
    assert ids == [THINK, 97, END, BOS]
    assert tokenizer.decode(ids) == "<think>a"  # control tokens are skipped, user-defined ones are text
    assert START not in tokenizer.encode("<|im_start|>")  # it is marked as ordinary text


def test_tokens_without_types(tmp_path):
    """<|im_end|> is a control token by its name, <|bos|> because the file calls it bos; the others are text."""
    tokenizer = load(tmp_path, pairs_metadata("gpt-2", token_type=None, add_bos_token=False))
    assert tokenizer.encode("a<|im_end|><|bos|>") == [97, END, BOS]
    assert not {THINK, START} & {*tokenizer.encode("<think><|im_start|>")}
    tokenizer = load(tmp_path, pieces_metadata(token_type=None))
    assert tokenizer.encode("🙂</s>") == [1, 270, 243, 162, 156, 133, 2]
    assert tokenizer.bos_id == 1


def test_tokens_of_known_names_are_control_tokens(tmp_path):
    """Whatever type a file gives them, as in llama.cpp."""
    tokens = [*ALPHABET, "<|im_end|>", "<fim_prefix>", "<|fim_pad|>", "<|channel|>", "<|other|>", "a b"]
    types = [NORMAL] * len(tokens)
    tokenizer = load(tmp_path, metadata("gpt2", tokens, types, merges=["a b"], pre="gpt-2"))
    ids = tokenizer.encode("<|im_end|><fim_prefix><|fim_pad|><|channel|>")
    assert ids == [256, 257, 258, 259]
    assert tokenizer.decode(ids) == ""
    assert len(tokenizer.encode("<|other|>")) == len("<|other|>")


def test_rows_without_a_token_are_left_out(tmp_path):
    size = len(PAIR_TOKENS)
    tokens, types = [*PAIR_TOKENS, f"[PAD{size}]", "[PAD7]", ""], [*PAIR_TYPES, UNUSED, UNUSED, NORMAL]
    vocab = load(tmp_path, pairs_metadata("gpt-2", tokens=tokens, token_type=types)).backend.get_vocab()
    assert f"[PAD{size}]" not in vocab
    assert (vocab["[PAD7]"], vocab[f"[EMPTY_{size + 2}]"]) == (size + 1, size + 2)


@pytest.mark.parametrize("name", ["Phi-3 mini", "phi3", "other"])
def test_special_tokens_of_phi3_take_spaces_along(tmp_path, name):
    tokenizer = load(tmp_path, pieces_metadata() | {"general.name": name})
    assert tokenizer.encode("<|im_end|> the") == [1, SP_END, *([262] if name != "other" else [270, 262])]


def test_bos(tmp_path):
    def first(pre, **others):
        return load(tmp_path, pairs_metadata(pre, **others)).encode("a")[0]

    assert first("llama-bpe") == first("tekken") == first("qwen2", add_bos_token=True) == BOS
    assert first("qwen2") == first("glm4") == first("llama-bpe", add_bos_token=False) == 97
    assert first("llama-bpe", bos_token_id=None) == 97
    assert load(tmp_path, pieces_metadata()).encode("") == [1]
    assert load(tmp_path, pieces_metadata(add_bos_token=False)).encode("") == []
    assert load(tmp_path, pieces_metadata(bos_token_id=SP_END, add_eos_token=True)).encode("") == [SP_END]


def test_named_tokens(tmp_path):
    tokenizer = load(tmp_path, pieces_metadata(padding_token_id=SP_PAD, eos_token_id=SP_END))
    assert tokenizer.named == {"bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>"}  # <pad> is unused
    assert load_generation_config(tmp_path)["eos_token_ids"] == [SP_END, 2]


@pytest.mark.parametrize(
    ("tokens", "ids", "ends"),
    [
        (["<a>", "<b>", "<c>"], {}, []),
        (["<a>", "<b>", "<c>"], {"eos": 258, "eot": 257, "eom": 256}, ["<c>", "<b>", "<a>"]),
        (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], {"eos": 258}, ["<|im_end|>", "<|endoftext|>"]),
        (["<|end_of_text|>", "<|eom_id|>"], {"eos": 257}, ["<|eom_id|>", "<|end_of_text|>"]),
        (["<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"], {}, ["<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"]),
        (["<|fim_pad|>", "<my pad>"], {"fim_pad": 257}, ["<my pad>"]),
        (["<|end|>", "<|return|>"], {"eos": 257}, ["<|return|>", "<|end|>"]),
        (["<|end|>", "<|return|>", "<|call|>"], {"eos": 257}, ["<|return|>", "<|call|>"]),
        (["<|end|>", "<|flush|>", "<|calls|>"], {}, ["<|flush|>", "<|calls|>"]),
        (["</s>", "<turn|>", "<|tool_response>"], {"eos": 257}, ["<turn|>", "<|tool_response>"]),
        (["<eos>", "<end_of_turn>"], {"eos": 256, "eot": 2**32 - 1}, ["<eos>", "<end_of_turn>"]),
    ],
)  # fmt: skip
def test_ids_that_end_a_text(tmp_path, tokens, ids, ends):
    tokens = [*ALPHABET, *tokens, "aa"]
    ids = {f"{name}_token_id": i for name, i in ids.items()}
    load(tmp_path, metadata("gpt2", tokens, merges=["a a"], pre="gpt-2", **ids))
    assert [tokens[i] for i in load_generation_config(tmp_path)["eos_token_ids"]] == ends


# ---- chats ----

CHATML = "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
CHAT = [{"role": "user", "content": "a"}]


def test_a_rendered_chat_has_one_bos(tmp_path):
    types = [*PAIR_TYPES[:START], CONTROL]
    data = pairs_metadata("llama-bpe", token_type=types, add_bos_token=True) | {"tokenizer.chat_template": CHATML}
    tokenizer = load(tmp_path, data)
    text = tokenizer.apply_chat_template(CHAT)
    ids = tokenizer.encode(text, add_special_tokens=False)  # as prompts.make_job does
    assert ids[:2] == [BOS, START]
    assert ids.count(BOS) == 1
    assert ids == AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(CHAT, return_dict=False)


def test_several_chat_templates(tmp_path):
    data = pairs_metadata("qwen2") | {"tokenizer.chat_templates": ["tool_use"]}
    others = {"tokenizer.chat_template.tool_use": "tools", "tokenizer.chat_template.rag": "rag"}
    assert not load(tmp_path / "0", data).has_chat_template
    assert not load(tmp_path / "1", data | others).has_chat_template
    assert load(tmp_path / "2", data | others | {"tokenizer.chat_template": "own"}).apply_chat_template(CHAT) == "own"
    theirs = AutoTokenizer.from_pretrained(tmp_path / "2")
    assert theirs.apply_chat_template(CHAT, tokenize=False) == "own"


def test_warns_of_control_tokens_marked_as_text(tmp_path, capfd):
    load(tmp_path, pairs_metadata("qwen2") | {"tokenizer.chat_template": CHATML})
    assert "the chat template writes <|im_start|>, which the GGUF file marks as ordinary text" in capfd.readouterr().err


# ---- files that contradict themselves ----


def test_a_file_without_a_pre_tokenizer(tmp_path, capfd):
    tokenizer = load(tmp_path / "none", pairs_metadata(None, add_bos_token=False))
    assert "does not say how to split text into words; llama.cpp's default is taken" in capfd.readouterr().err
    unknown = load(tmp_path / "unknown", pairs_metadata("from-2031", add_bos_token=False))
    assert "splits text as 'from-2031', which is unknown; llama.cpp's default is taken" in capfd.readouterr().err
    for other in (tokenizer, unknown):
        assert plain(PAIR_TOKENS, other.encode(SPLIT_TEXT)) == SPLIT_BY_LLAMA_CPP["default"]
    load(tmp_path / "default", pairs_metadata("default"))
    assert capfd.readouterr().err == ""


def test_byte_level_pieces_called_sentencepiece(trained, tmp_path, capfd):
    data, tokenizer, _ = trained["qwen2"]
    other = load(tmp_path, data | {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [0.0] * 700})
    assert "its pieces are byte-level BPE's" in capfd.readouterr().err
    assert [other.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    assert other.backend.to_str() == tokenizer.backend.to_str()


def test_sentencepiece_with_merges_of_its_own(tmp_path):
    """Its scores decide."""
    tokenizer = load(tmp_path, pieces_metadata(merges=["▁ t", "h e"]))
    assert [tokenizer.encode(text) for text in SP_TEXTS] == SP_IDS[True]


@pytest.mark.parametrize("scores", [None, [-1000.0] * len(SP_TOKENS)])
def test_sentencepiece_without_scores(trained, tmp_path, capfd, scores):
    """In a vocabulary that sentencepiece made, the order of the ids is that of the scores."""
    data, _, encode = trained["spaced"]
    scores = scores and [-1000.0] * len(data["tokenizer.ggml.tokens"])
    tokenizer = load(tmp_path, data | {"tokenizer.ggml.scores": scores})
    assert "no scores of their own; they are merged in the order of their ids" in capfd.readouterr().err
    assert [tokenizer.encode(text) for text in TEXTS[1:-1]] == [encode(text) for text in TEXTS[1:-1]]


def test_arrays_of_numpy(tmp_path):
    lists = pieces_metadata()
    arrays = lists | {
        "tokenizer.ggml.scores": np.array(SP_SCORES, dtype=np.float32),
        "tokenizer.ggml.token_type": np.array(SP_TYPES, dtype=np.int32),
        "tokenizer.ggml.bos_token_id": np.uint32(1),
        "tokenizer.ggml.add_bos_token": np.bool_(True),
    }
    assert tokenizer_files(arrays) == tokenizer_files(lists)


def test_merges_without_pieces_are_left_out(tmp_path, capfd):
    merges = [f"{a} {b}" for a, b in PAIRS]
    tokenizer = load(tmp_path, pairs_metadata("gpt-2", merges=["q q", "zz z", *merges, merges[0]]))
    assert "2 merges in the GGUF file, such as 'q q', are of pieces that it does not have" in capfd.readouterr().err
    assert plain(PAIR_TOKENS, tokenizer.encode("qq aa")) == "q|q| |aa"


def test_no_vocabulary():
    for kind in ("none", "no_vocab", None):
        assert tokenizer_files(metadata(kind, None)) == {}


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"model": "bert"}, "'bert' (WordPiece), which is not supported"),
        ({"model": "t5"}, "'t5' (Unigram)"),
        ({"model": "rwkv"}, "'rwkv'"),
        ({"model": "plamo2"}, "'plamo2'"),
        ({"model": "new"}, "'new', which is not supported"),
        ({"model": ["gpt2"]}, "not supported"),
        ({"tokens": None}, "without tokens"),
        ({"tokens": []}, "without tokens"),
        ({"tokens": [*PAIR_TOKENS[:-1], "a"]}, f"'a' twice, as 97 and {START}"),
        ({"tokens": [*PAIR_TOKENS[:-1], 5]}, "tokenizer.ggml.tokens has values of a wrong type"),
        ({"tokens": "abc"}, "tokenizer.ggml.tokens has values of a wrong type"),
        ({"tokens": [*PAIR_TOKENS[:-1], "\udcff"]}, "tokenizer.ggml.tokens is not UTF-8"),
        ({"token_type": [1]}, f"tokenizer.ggml.token_type has 1 values for {len(PAIR_TOKENS)} tokens"),
        ({"token_type": [1.5] * len(PAIR_TOKENS)}, "tokenizer.ggml.token_type has values of a wrong type"),
        ({"scores": [0.0] * (len(PAIR_TOKENS) + 1)}, f"has {len(PAIR_TOKENS) + 1} values for"),
        ({"scores": [float("nan")] * len(PAIR_TOKENS)}, "tokenizer.ggml.scores are not all numbers"),
        ({"merges": None}, "BPE tokenizer without merges"),
        ({"merges": []}, "BPE tokenizer without merges"),
        ({"merges": ["ab"]}, "'ab', which is no pair"),
        ({"merges": [["a", "b"]]}, "tokenizer.ggml.merges has values of a wrong type"),
        ({"bos_token_id": 341}, f"bos_token_id is 341, but it has {len(PAIR_TOKENS)} tokens"),
        ({"eos_token_id": -5}, "eos_token_id is -5"),
        ({"eot_token_id": "x"}, "eot_token_id is x"),
    ],
)  # fmt: skip
def test_refuses(others, message):
    others = {f"tokenizer.ggml.{name}": value for name, value in others.items()}
    data = {key: value for key, value in (pairs_metadata("gpt-2") | others).items() if value is not None}
    with pytest.raises(UserError) as caught:
        tokenizer_files(data)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_refuses_a_chat_template_that_is_no_text():
    with pytest.raises(UserError, match="chat_template is not UTF-8 text"):
        tokenizer_files(pairs_metadata("gpt-2") | {"tokenizer.chat_template": 5})


SCALARS = st.none() | st.booleans() | st.integers(-3, 400) | st.floats() | st.text(max_size=4)
PARTS = st.sampled_from(
    ["Ġ", "▁", "a", "b", "ab", "a b", "▁a", ":", "$A", "<$A>", "</s>", "[PAD3]", "<0x41>", "<0xZZ>", ""]
)
VALUES = SCALARS | st.lists(SCALARS, max_size=5) | st.lists(PARTS, max_size=8) | st.lists(st.integers(0, 7), max_size=8)
NAMES = ["model", "pre", "tokens", "scores", "merges", "token_type", "bos_token_id", "eot_token_id", "add_space_prefix"]
TINY = st.fixed_dictionaries(
    {
        "tokenizer.ggml.model": st.sampled_from(["llama", "gpt2", "gemma4"]),
        "tokenizer.ggml.tokens": st.lists(PARTS, min_size=1, max_size=8, unique=True),
    },
    optional={
        "tokenizer.ggml.merges": st.lists(st.sampled_from(["a b", "▁ a", "a a"]), min_size=1, max_size=3),
        "tokenizer.ggml.bos_token_id": st.integers(0, 7),
        "tokenizer.ggml.add_bos_token": st.just(True),
        "tokenizer.ggml.pre": st.sampled_from(sorted(SPLITS)),
    },
)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    TINY | st.sampled_from([pairs_metadata("llama-bpe"), pieces_metadata()]),
    st.dictionaries(st.sampled_from([f"tokenizer.ggml.{name}" for name in NAMES]), VALUES, max_size=3),
)
def test_any_metadata_is_refused_in_one_line_or_usable(tmp_path_factory, data, changes):
    folder = tmp_path_factory.mktemp("any")
    try:
        files = tokenizer_files(data | changes)
    except UserError as error:
        assert "\n" not in str(error)
        return
    if files:
        tokenizer = load(folder, data | changes)
        tokenizer.decode(tokenizer.encode("a b ▁<$A>\n"))


def test_an_id_that_nothing_needs_may_be_wrong(tmp_path, capfd):
    load(tmp_path, pairs_metadata("gpt-2", padding_token_id=99999))
    assert "padding_token_id is 99999" in capfd.readouterr().err


# ---- llama.cpp itself, where it is installed ----


class LlamaCpp:
    """A GGUF file of metadata alone, as llama.cpp reads it."""

    def __init__(self, path: Path, metadata: dict):
        gguf = pytest.importorskip("gguf", reason="writes the files for llama.cpp")
        llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp itself is the reference here")
        writer = gguf.GGUFWriter(str(path), "llama")
        for key, value in metadata.items():
            kinds = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
            kinds[type(value)](key, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        self.llama = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
        vocab = self.llama._model.vocab
        self.ends = [i for i in range(self.llama.n_vocab()) if llama_cpp.llama_vocab_is_eog(vocab, i)]

    def encode(self, text: str) -> list[int]:
        return self.llama.tokenize(text.encode(), add_bos=True, special=True)


@pytest.mark.parametrize("name", ALL)
def test_llama_cpp_reads_it_alike(trained, tmp_path, name):
    data = trained[name][0] | {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 1}
    theirs, ours = LlamaCpp(tmp_path / "model.gguf", data), load(tmp_path, data)
    rng = random.Random(0)
    parts = [
        "a",
        "Z",
        "ß",
        "中",
        "の",
        "한",
        "🙂",
        "1",
        "23",
        " ",
        "  ",
        "\n",
        "\n\n",
        "\r\n",
        "\t",
        "'s",
        "'LL",
        ".",
        "//",
    ]
    parts += ["=", "==", "_", "def", " the", "</s>", "<|im_end|>", "\u200b", "½", "٣", "—"]
    texts = [*TEXTS, *("".join(rng.choices(parts, k=rng.randint(1, 20))) for _ in range(300))]
    for text in texts:
        assert ours.encode(text) == theirs.encode(text), text
    assert sorted(load_generation_config(tmp_path)["eos_token_ids"]) == theirs.ends


@pytest.mark.parametrize("names", SPLIT_BY_LLAMA_CPP)
def test_llama_cpp_still_splits_so(tmp_path, names):
    for pre in names.split():
        theirs = LlamaCpp(tmp_path / "model.gguf", pairs_metadata(pre, add_bos_token=False))
        assert plain(PAIR_TOKENS, theirs.encode(SPLIT_TEXT)) == SPLIT_BY_LLAMA_CPP[names]


@pytest.mark.parametrize("prefix", [True, False])
def test_llama_cpp_still_gives_these_ids(tmp_path, prefix):
    theirs = LlamaCpp(tmp_path / "model.gguf", pieces_metadata(add_space_prefix=prefix))
    assert [theirs.encode(text) for text in SP_TEXTS] == SP_IDS[prefix]


def test_llama_cpp_still_gives_those_ids_too(tmp_path):
    theirs = LlamaCpp(tmp_path / "gemma4.gguf", pieces_metadata(**GEMMA4, add_bos_token=False))
    assert [theirs.encode(text) for text in SP_TEXTS] == GEMMA4_IDS
    theirs = LlamaCpp(tmp_path / "runs.gguf", RUNS)
    assert {text: theirs.encode(text) for text in RUN_IDS} == RUN_IDS
