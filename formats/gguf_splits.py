"""What the names of pre-tokenizers in GGUF files mean: how a text is split into words before BPE.

    for pattern in SPLITS["llama-bpe"]: ...

These are the patterns in the tokenizer.json of the models that brought them. Each splits what those before it left, and
what lies between two matches is a word as well. llama.cpp's own cannot tell upper from lower case beyond ASCII: what it
makes of the patterns that do (tekken, gpt-4o, ...) comes near, and here the original counts.
"""


def any_of(*alternatives: str) -> str:
    return "|".join(alternatives)


# The alternatives that most patterns are made of.
CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
DIGIT, DIGITS, THREE_DIGITS = r"\p{N}", r"\p{N}+", r"\p{N}{1,3}"
SYMBOLS, PATHS = r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
LINES, LINE_END = r"[^\n]+|\n+", r"[\r\n]"

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = any_of(CONTRACTION, WORD, THREE_DIGITS, SYMBOLS, SPACES)
QWEN2 = any_of(CONTRACTION, WORD, DIGIT, SYMBOLS, SPACES)
BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"

# A word ends where a capital follows a small letter: XMLHttp is XML, Http. Kimi's has Chinese apart.
UPPER, LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
BEFORE, NOT_HAN = r"[^\r\n\p{L}\p{N}]?", r"&&[^\p{Han}]"
CASED = (f"{BEFORE}[{UPPER}]*[{LOWER}]+", f"{BEFORE}[{UPPER}]+[{LOWER}]*")
CONTRACTED = any_of(*(f"{word}{CONTRACTION}?" for word in CASED))
NOT_CHINESE = (f"{BEFORE}[{UPPER}{NOT_HAN}]*[{LOWER}{NOT_HAN}]+", f"{BEFORE}[{UPPER}{NOT_HAN}]+[{LOWER}{NOT_HAN}]*")
GPT4O = any_of(CONTRACTED, THREE_DIGITS, PATHS, SPACES)

# DeepSeek's. The letters are those that had two cases in its version of Unicode.
DEEPSEEK_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-"
    "ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛ"
    "Ꜣ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
CJK, KANA = "[一-龥ࠀ-一가-퟿]+", "[一-龥\u3040-ゟ゠-ヿ]+"
ASCII_WORD = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
MARKED_WORD, MARKS = r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+", r" ?[\p{P}\p{S}]+"
DEEPSEEK3 = any_of(ASCII_WORD, MARKED_WORD, MARKS + r"[\r\n]*", SPACES)

AFMOE_SCRIPTS = (  # Chinese, Japanese, Thai, Lao, Khmer, Burmese, Korean
    "一-鿿㐀-䶿豈-\ufaff\u3040-ゟ゠-ヿ･-ﾟ⼀-\u2fdf\u0e40-\u0e7f\u0e80-\u0effក-\u17ffက-႟ꩠ-ꩿꧠ-\ua9ff가-\ud7afᄀ-ᇿ"
)

SPLITS = {  # names, with spaces between: patterns
    "default": (r"[\p{P}$+<=>^~|]+", GPT2, DIGITS, "[0-9][0-9][0-9]"),  # llama.cpp's, of a file that names none
    "gpt-2 phi-2 mpt olmo jais trillion granite-docling exaone4 gigachat a.x-4.0 mellum modern-bert jina-es jina-de"
    " jina-v2-es jina-v2-de jina-v1-en jina-v2-code roberta-bpe": (GPT2,),
    "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2": (DIGIT, GPT2),
    "falcon": (r"[\p{P}$+<=>^~|`]+", GPT2, "[0-9][0-9][0-9]"),
    "chameleon": (
        r"<sentinel:[0-9]+>",
        r"(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
        r"([\t\n]|    |  )",
        DIGIT,
        r"[\p{P}!-/:-@\[-`{-~]",
        GPT2,
    ),
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano dbrx smaug-bpe chatglm-bpe glm4"
    " glm5": (LLAMA3,),
    "jais-2": (
        any_of(CONTRACTION, WORD, THREE_DIGITS, SYMBOLS, r"\s*[\r\n]+")
        + "".join(rf"|\s{{{n}}}(?!\S)" for n in ("512", "256", "128", "64", "32", "16", "8", "4", "1,2"))
        + r"|\s{1}",
    ),
    "minicpm5": (THREE_DIGITS, any_of(CONTRACTION, WORD, DIGITS, SYMBOLS, SPACES)),
    "qwen2 stablelm2 hunyuan solar-open megrez grok-2 deepseek-r1-qwen kormo f2llmv2": (QWEN2,),
    "qwen35": (
        any_of(
            CONTRACTION,
            r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",
            DIGIT,
            r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
            SPACES,
        ),
    ),
    "ufakzeka": (any_of(WORD, DIGIT, SYMBOLS, SPACES),),
    "laguna": (LINES, QWEN2),
    "seed-coder": (any_of(CONTRACTION, WORD, DIGIT, r" ?[^\s\p{L}\p{N}\r\n]+", SPACES),),
    "bailingmoe bailingmoe2 llada-moe": (
        any_of(
            r"'(?i:[sdmt]|ll|ve|re)",
            r"[^\r\n\p{L}\p{N}]?+\p{L}+",
            DIGIT,
            r" ?[^\s\p{L}\p{N}]++[\r\n]*",
            r"\s*[\r\n]|\s+(?!\S)|\s+",
        ),
    ),
    "exaone-moe": (
        any_of(
            CONTRACTION,
            r"[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+",
            DIGIT,
            r" ?[^\s\p{L}\p{N}]+[\r\n/]?",
            r"\s*[\r\n]|\s+(?!\S)|\s+",
        ),
    ),
    "tekken": (any_of(*CASED, DIGIT, PATHS, SPACES),),
    "gpt-4o llama4 kanana2 talkie minimax-m2 granite-embed-multi-97m": (GPT4O,),
    "tiny_aya cohere2moe": (r"\d{1,3}(?=(?:\d{3})*\b)", GPT4O),
    "youtu": (
        any_of("[가-힣ㄱ-ㆎ]+", "[！…“”‘’—：；，、-〿︰-﹏]+", "[ㄅ-ㄯ]+", KANA),
        any_of(CONTRACTED, DIGIT, PATHS, SPACES),
    ),
    "kimi-k2": (
        any_of(r"[\p{Han}]+", *(f"{word}{CONTRACTION}?" for word in NOT_CHINESE), THREE_DIGITS, SYMBOLS, SPACES),
    ),
    "deepseek-llm": (
        LINE_END,
        rf"\s?[{DEEPSEEK_LETTERS}]+",
        "\\s?[!-/:-~！-／：-～‘-‟\u3000-。]+",
        r"\s+$",
        CJK,
        DIGITS,
    ),
    "deepseek-coder": (LINE_END, r"\s?\p{L}+", r"\s?\p{P}+", CJK, DIGIT),
    "deepseek-v3 hunyuan-dense joyai-llm hy_v4": (THREE_DIGITS, KANA, DEEPSEEK3),
    "spark2_5": (THREE_DIGITS, KANA, any_of(ASCII_WORD, MARKED_WORD, MARKS, LINE_END, r"\s+(?!\S)|\s+"), DIGIT),
    "afmoe": (r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))", f"[{AFMOE_SCRIPTS}]+", DEEPSEEK3),  # 12,345,678
    "superbpe": (DIGITS, r"(?=(\d{3})+(?!\d))"),
    "bloom poro-chat gpt3-finnish": (BLOOM,),
    "viking": (BLOOM, DIGIT),
    "gemma4 granite-embed-multi-311m sarvam-moe": (LINES,),
}
SPLITS = {name: patterns for names, patterns in SPLITS.items() for name in names.split()}

# Where a word that is in the vocabulary is one token, whatever the merges would make of it.
WHOLE_WORDS = frozenset([
    "llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano", "glm4",
    "glm5", "tekken", "youtu", "minicpm5", "granite-embed-multi-97m",
])  # fmt: skip
# Where bos comes first unless the file says otherwise.
BOS_FIRST = WHOLE_WORDS - {"glm4", "glm5", "youtu", "minicpm5", "granite-embed-multi-97m"} | {"chameleon"}
# Where pieces are plain text, a space being ▁, and bytes stand only for what has no piece.
PLAIN = frozenset(["gemma4", "granite-embed-multi-311m", "sarvam-moe"])
