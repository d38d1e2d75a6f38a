"""What the demo's target learns from: the source of the Python standard library, as text, tokens and batches.

training, held_out = read_corpus()                        # {path: text}; no model is trained on the files in HELD_OUT
train_tokenizer(training, path)                           # writes a sentencepiece tokenizer.model
batches = corpus_batches(documents, rank, world, seed)    # pairs (tokens, next tokens)
"""

import hashlib
import io
import os
import random
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
import torch

from errors import UserError

HELD_OUT = [
    "bisect.py", "calendar.py", "cmd.py", "csv.py", "fractions.py", "getopt.py",
    "graphlib.py", "heapq.py", "queue.py", "sched.py", "shlex.py", "textwrap.py",
]  # fmt: skip
# Tests are written in a style of their own, and the others hold tables rather than code.
SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}
SKIPPED_FILES = ("html/entities.py", "_sysconfigdata")

VOCAB_SIZE, CONTEXT, UNK, BOS, EOS = 4096, 1024, 0, 1, 2
BATCH = 8  # windows per step: small, because on a CPU time limits the number of steps


def read_corpus() -> tuple[dict[str, str], dict[str, str]]:
    """The standard library's source as {path: text}: the training files, and the held-out files."""
    root = Path(sysconfig.get_paths()["stdlib"])
    training, held_out, seen = {}, {}, set()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if SKIPPED_FOLDERS & set(path.relative_to(root).parts) or name.startswith(SKIPPED_FILES):
            continue
        try:
            with tokenize.open(path) as file:  # decodes by the file's own coding line
                text = file.read()
        except (SyntaxError, UnicodeDecodeError):
            continue
        digest = hashlib.sha256(text.encode()).digest()
        if text.strip() and digest not in seen:
            seen.add(digest)
            (held_out if name in HELD_OUT else training)[name] = text
    if len(held_out) < len(HELD_OUT) or len(training) < 100:
        raise UserError(f"{root} does not hold the standard library's source; use a Python that has its .py files")
    return training, held_out


def train_tokenizer(texts: dict[str, str], path: Path) -> None:
    """Trains a sentencepiece BPE that changes no character of a text except U+2581, its own mark for a space."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts.values() for line in text.split("\n") if line.strip()),
        model_writer=(model := io.BytesIO()),
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        character_coverage=0.9995,
        required_chars="".join(map(chr, range(33, 127))),
        # Nothing is normalised, and runs of spaces may become tokens, because indentation matters in Python.
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        allow_whitespace_only_pieces=True,
        split_by_unicode_script=False,  # otherwise `__init__` and `self.` could not be pieces
        split_digits=True,
        # A newline is always a token of its own, so the tokens of a line do not depend on what follows it.
        user_defined_symbols=["\n"],
        unk_id=UNK, bos_id=BOS, eos_id=EOS, pad_id=-1,
        num_threads=os.cpu_count(),
        minloglevel=2,
    )  # fmt: skip
    path.write_bytes(model.getvalue())


def windows(documents: list[list[int]], generator: random.Random) -> torch.Tensor:
    """One epoch: the documents in a new order, end to end, cut into shuffled windows [N, CONTEXT + 1]."""
    order = generator.sample(documents, len(documents))
    stream = torch.tensor([token for document in order for token in document], dtype=torch.int64)
    stream = stream[generator.randrange(CONTEXT) :]
    # Windows overlap by one token: the last target of one is the first input of the next.
    count = (len(stream) - 1) // CONTEXT
    cut = stream[: count * CONTEXT + 1].unfold(0, CONTEXT + 1, CONTEXT)
    return cut[torch.tensor(generator.sample(range(count), count))]


def corpus_batches(documents: list[list[int]], rank: int, world: int, seed: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """Endless batches, epoch after epoch: one process's share of BATCH windows, as tokens and next tokens."""
    generator = random.Random(seed)
    while True:
        epoch = windows(documents, generator)
        for batch in epoch[: len(epoch) // BATCH * BATCH].split(BATCH):
            yield batch[rank::world, :-1], batch[rank::world, 1:]
