"""eval.py against transformers on the same windows, and through lm-eval itself on small local tasks."""

import json
import logging
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

import eval as evaluation
import quantize
from checkpoint import load_model
from errors import UserError
from tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
TEXT = Path(__file__).read_text()[:1500] + "\nnaïve 😀 字\n"


@pytest.fixture(scope="module")
def tokenizer(base_folder):
    return load_tokenizer(base_folder)


@pytest.fixture(scope="module")
def reference(hf_folder) -> transformers.LlamaForCausalLM:
    return transformers.LlamaForCausalLM.from_pretrained(hf_folder, dtype=torch.float32).eval()


@pytest.fixture
def text_file(tmp_path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def run(*arguments: object, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["eval.py", "--device", "cpu", *map(str, arguments)])
    evaluation.main()


# -- perplexity


@given(st.integers(2, 60), st.integers(1, 20), st.data())
def test_every_id_but_the_first_is_scored_once(count, length, data):
    stride, scored = data.draw(st.integers(1, length)), []
    for inputs, targets in evaluation.windows(list(range(count)), length, stride):
        assert 1 <= len(inputs) <= length and 1 <= len(targets) <= len(inputs)
        assert inputs == list(range(inputs[0], inputs[0] + len(inputs))) and targets[-1] == inputs[-1] + 1
        assert targets == list(range(targets[0], targets[-1] + 1))
        assert targets[0] >= min(targets[0], length - stride + 1) and targets[0] - inputs[0] > min(
            targets[0] - 1, length - stride
        )
        scored += targets
    assert scored == list(range(1, count))


@pytest.mark.parametrize(("length", "stride"), [(64, 64), (64, 24), (100, 1000), (2048, 2048)])
def test_perplexity_is_that_of_transformers(length, stride, base_folder, reference, monkeypatch, capsys, text_file):
    """The reference masks what was scored before, as transformers' guide to perplexity does, in windows that overlap by
    one token, the last target being the next input."""
    stride = min(stride, length)
    arguments = ["--perplexity", text_file, "--checkpoint_path", base_folder, "--json", "--max_seq_length", length]
    run(*arguments, "--stride", stride, monkeypatch=monkeypatch)
    out = capsys.readouterr()
    found = json.loads(out.out)
    ids = torch.tensor([load_tokenizer(base_folder).encode(TEXT)])
    total, count, scored = 0.0, 0, 1
    for begin in range(0, ids.shape[1] - 1, stride):
        window = ids[:, begin : begin + length + 1]
        labels = window.clone()
        labels[:, : scored - begin] = -100
        kept = int((labels[:, 1:] != -100).sum())
        with torch.inference_mode():
            total += float(reference(window, labels=labels).loss) * kept
        count, scored = count + kept, begin + window.shape[1]
        if scored == ids.shape[1]:
            break
    assert found["tokens"] == count == ids.shape[1] - 1
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert found["bytes"] == len(TEXT.encode())
    assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / len(TEXT.encode()), rel=1e-4)
    assert "error" not in out.err


def test_without_bos_the_first_token_is_only_read(base_folder, tokenizer, monkeypatch):
    model = load_model(base_folder)
    model.setup_caches(1, 64)
    monkeypatch.setattr(tokenizer, "encode", lambda text: [60, 61, 62])
    found = evaluation.perplexity(model, tokenizer, tokenizer.decode([60, 61, 62]), 64, 64)
    assert found["tokens"] == 2 and found["bytes"] == len(tokenizer.decode([61, 62]).encode())


def test_the_line_of_a_quantized_file(base_folder, tmp_path, text_file, monkeypatch, capsys):
    import shutil

    shutil.copytree(base_folder, tmp_path / "model")
    written = quantize.quantize(tmp_path / "model", "int8")
    numbers = []
    for path in (base_folder, written):
        run("--perplexity", text_file, "--checkpoint_path", path, monkeypatch=monkeypatch)
        out = capsys.readouterr().out
        line = r"perplexity ([\d.]+) over (\d+) tokens, [\d.]+ bits a byte \(windows of 2048, stride 2048\)\n"
        numbers.append(re.fullmatch(line, out).groups())
    assert numbers[0][1] == numbers[1][1]
    assert numbers[0] != numbers[1] and float(numbers[1][0]) == pytest.approx(float(numbers[0][0]), rel=0.05)


# -- lm-eval

QUESTIONS = [
    ("def read_lines(path):\n", ["return path", "with open(path) as file:", "class"], 1),
    ("import", [" json", " 字字", " re\nimport sys"], 0),
    ("assert model ==", [" None", " the same model that was there before", ""], 1),
    ("x = [1, 2, 3]; sum(x) is", [" 6", " 7"], 0),
    ("😀 the end of", [" a text", " the text"], 0),
]
COMMON = """
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
TASKS = {
    "tiny_choice": "output_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: label\n"
    "metric_list: [{metric: acc}]\n",
    "tiny_rolling": "output_type: loglikelihood_rolling\ndoc_to_target: '{{passage}}'\n"
    "metric_list: [{metric: bits_per_byte}]\n",
    "tiny_generation": "output_type: generate_until\ndoc_to_target: '{{answer}}'\n"
    "generation_kwargs: {until: ['\\n', 'zz'], max_gen_toks: 12}\nmetric_list: [{metric: exact_match}]\n",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, reference, tokenizer) -> Path:
    """A folder of lm-eval tasks with their data. The first two answers are the text that the model itself generates."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = []
    for i, (question, choices, label) in enumerate(QUESTIONS):
        answer = greedy_text(reference, tokenizer, question, 12, ["\n", "zz"]) if i < 2 else "something else"
        passage = TEXT[100 * i : 100 * i + 60 * (i + 1)]
        row = {"question": question, "choices": [c or " it" for c in choices], "label": label}
        lines.append(json.dumps(row | {"passage": passage, "answer": answer}))
    (folder / "data.jsonl").write_text("\n".join(lines))
    for name, body in TASKS.items():
        yaml = f"task: {name}\n" + COMMON.format(data=folder / "data.jsonl") + body
        if name == "tiny_rolling":
            yaml = yaml.replace('doc_to_text: "{{question}}"', 'doc_to_text: ""')
        (folder / f"{name}.yaml").write_text(yaml)
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path_factory):
    """Keeps the datasets library off the network and out of the home folder."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


@torch.inference_mode()
def log_probabilities(reference, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Of a continuation, by transformers' logits; and whether it is the greedy one."""
    logits = reference(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1].double()
    wanted = torch.tensor(continuation)
    picked = logits.log_softmax(-1).gather(1, wanted[:, None])
    return float(picked.sum()), bool((logits.argmax(-1) == wanted).all())


def greedy_text(reference, tokenizer, prompt: str, new: int, until: list[str]) -> str:
    """transformers' own greedy generation, cut at the first stop string."""
    ids = torch.tensor([tokenizer.encode(prompt)])
    out = reference.generate(ids, max_new_tokens=new, do_sample=False, eos_token_id=1, pad_token_id=1)
    text = tokenizer.decode(out[0, ids.shape[1] :].tolist())
    return text[: min([text.find(stop) for stop in until if stop in text], default=None)]


def harness(base_folder, batch_size: int = 3, length: int = 256):
    model = load_model(base_folder)
    return evaluation.harness_class()(model, load_tokenizer(base_folder), batch_size, length, frozenset([1]))


def requests(kind: str, arguments: list[tuple]) -> list:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=pair, idx=0) for pair in arguments]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_log_likelihoods_are_those_of_transformers(batch_size, base_folder, reference, tokenizer):
    pairs = [(question, choice) for question, choices, _ in QUESTIONS for choice in choices if choice]
    pairs += [("", "import json")]
    lm = harness(base_folder, batch_size)
    found = lm.loglikelihood(requests("loglikelihood", pairs))
    for (context, continuation), (logp, greedy) in zip(pairs, found, strict=True):
        # White space at the end of a context belongs to the continuation.
        whole, before = tokenizer.encode(context + continuation), tokenizer.encode(context.rstrip())
        expected, is_greedy = log_probabilities(reference, before, whole[len(before) :])
        assert logp == pytest.approx(expected, abs=1e-3) and greedy == is_greedy, (context, continuation)
    ids = tokenizer.encode("return")
    greedy_ids = reference.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False, eos_token_id=1)[0].tolist()
    for continuation, is_greedy in ((greedy_ids[len(ids) :], True), ([*greedy_ids[len(ids) : -1], 77], False)):
        (found,) = lm._loglikelihood_tokens([(None, ids, continuation)])
        assert found[0] == pytest.approx(log_probabilities(reference, ids, continuation)[0], abs=1e-3)
        assert found[1] == is_greedy


def test_a_context_that_is_too_long_loses_its_beginning(base_folder, reference, tokenizer):
    (found, _), *_ = harness(base_folder, 2, 32).loglikelihood(requests("loglikelihood", [(TEXT[:300], " the end")]))
    whole, before = tokenizer.encode(TEXT[:300] + " the end"), tokenizer.encode(TEXT[:300])
    continuation = whole[len(before) :]
    context = whole[-33 : -len(continuation)]  # 32 inputs, and the last target
    assert found == pytest.approx(log_probabilities(reference, context, continuation)[0], abs=1e-3)


def test_rolling_log_likelihoods_are_those_of_transformers(base_folder, reference, tokenizer):
    texts = [TEXT[:40], TEXT[200:900], "x"]
    found = harness(base_folder, 2, 64).loglikelihood_rolling(requests("loglikelihood_rolling", [(t,) for t in texts]))
    for text, logp in zip(texts, found, strict=True):
        ids = tokenizer.encode(text)  # <s> first
        # The windows of lm-eval's documentation: whole ones, and a last one that is whole as well but scores the rest.
        expected, done = 0.0, 0
        while done < len(ids) - 1:
            end = min(done + 64, len(ids) - 1)
            begin = max(end - 64, 0)
            expected += log_probabilities(reference, ids[begin : done + 1], ids[done + 1 : end + 1])[0]
            done = end
        assert logp == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_generation_is_that_of_transformers(batch_size, base_folder, reference, tokenizer):
    prompts = [question for question, _, _ in QUESTIONS]
    free = [greedy_text(reference, tokenizer, prompt, 20, []) for prompt in prompts]
    stops = [free[0][5:7], free[1][3:4], "never"]
    pairs = [(prompt, {"until": stops, "max_gen_toks": 20, "do_sample": False}) for prompt in prompts]
    pairs += [(prompts[0], {"until": [], "max_gen_toks": 7}), ("", {"until": "never", "max_gen_toks": 4})]
    found = harness(base_folder, batch_size).generate_until(requests("generate_until", pairs))
    for (prompt, settings), text in zip(pairs, found, strict=True):
        until = [settings["until"]] if isinstance(settings["until"], str) else settings["until"]
        assert text == greedy_text(reference, tokenizer, prompt, settings["max_gen_toks"], until)
    assert found[0] == free[0][: free[0].find(stops[0])] and len(set(found)) > 2


def test_sampling_settings_are_honoured(base_folder):
    pairs = [("def", {"until": [], "max_gen_toks": 9, "do_sample": True, "temperature": t}) for t in (1e-4, 5.0)]
    lm = harness(base_folder)
    cold, hot = lm.generate_until(requests("generate_until", pairs))
    (greedy,) = lm.generate_until(requests("generate_until", [("def", {"until": [], "max_gen_toks": 9})]))
    assert cold == greedy != hot


def test_tasks_through_lm_eval(base_folder, reference, tokenizer, tasks, monkeypatch, capsys):
    names = ["tiny_choice,tiny_rolling", "tiny_generation"]
    arguments = ["--task_path", tasks, "--checkpoint_path", base_folder, "--batch_size", 3, "--json"]
    run("--tasks", *names, *arguments, "--max_seq_length", 256, monkeypatch=monkeypatch)
    results = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]

    right, nats, size = 0, 0.0, 0
    for line in (tasks / "data.jsonl").read_text().splitlines():
        row = json.loads(line)
        context = tokenizer.encode(row["question"].rstrip())
        space = row["question"][len(row["question"].rstrip()) :]  # lm-eval moves it to the continuation
        wholes = [tokenizer.encode(row["question"].rstrip() + space + " " + c) for c in row["choices"]]
        scores = [log_probabilities(reference, context, whole[len(context) :])[0] for whole in wholes]
        right += scores.index(max(scores)) == row["label"]
        ids = tokenizer.encode(row["passage"])
        nats -= log_probabilities(reference, ids[:1], ids[1:])[0]
        size += len(row["passage"].encode())
    assert results["tiny_choice"]["acc,none"] == pytest.approx(right / 5)
    assert results["tiny_rolling"]["bits_per_byte,none"] == pytest.approx(nats / math.log(2) / size, rel=1e-4)
    assert results["tiny_generation"]["exact_match,none"] == pytest.approx(2 / 5)


@pytest.mark.slow
def test_tasks_by_two_ranks(base_folder, tasks, tmp_path, monkeypatch, capsys):
    """One object, with the numbers of one process."""
    names, where = ["tiny_choice", "tiny_generation"], ["--task_path", tasks, "--checkpoint_path", base_folder]
    arguments = ["--tasks", *names, *where, "--batch_size", "2", "--json"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    env = os.environ | offline | {"HF_DATASETS_CACHE": str(tmp_path)}
    ranks = subprocess.run([*torchrun, ROOT / "eval.py", *arguments], env=env, capture_output=True, text=True)
    assert ranks.returncode == 0, ranks.stderr
    run(*arguments, monkeypatch=monkeypatch)
    objects = [line for line in ranks.stdout.splitlines() if line.startswith("{")]
    assert len(objects) == 1 and json.loads(objects[0]) == json.loads(capsys.readouterr().out)


def test_the_table_limit_and_examples(base_folder, tasks, monkeypatch, capsys):
    arguments = ["--task_path", tasks, "--checkpoint_path", base_folder, "--limit", 2, "--num_fewshot", 0]
    run("--tasks", "tiny_generation", *arguments, monkeypatch=monkeypatch)
    out = capsys.readouterr().out
    assert re.search(r"\|tiny_generation\|.*\|exact_match\|.*\|\s*1\s*\|", out), out


# -- what a user can do wrong


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--perplexity"),
        (["--perplexity", "missing.txt"], r"missing.txt: No such file"),
        (["--perplexity", "{text}", "--stride", "65", "--max_seq_length", "64"], "--stride 65"),
        (["--perplexity", "{text}", "--stride", "0"], "--stride 0"),
        (["--perplexity", "{text}", "--max_seq_length", "9999"], "9999 is more than .* 2048"),
        (["--perplexity", "{text}", "--limit", "3"], "--limit goes with --tasks"),
        (["--tasks", "tiny_choice", "--stride", "3"], "--stride goes with --perplexity"),
        (["--tasks", "no_such_task"], "no task 'no_such_task'"),
        (["--tasks", ","], "--tasks names no task"),
        (["--tasks", "tiny_choice", "--task_path", "nowhere"], "nowhere is no folder"),
        (["--tasks", "tiny_choice", "--perplexity", "{text}"], "not allowed with"),
    ],
)
def test_arguments(arguments, message, base_folder, text_file, monkeypatch):
    arguments = [str(text_file) if argument == "{text}" else argument for argument in arguments]
    with pytest.raises(UserError, match=message):
        run(*arguments, "--checkpoint_path", base_folder, monkeypatch=monkeypatch)


def test_a_text_that_is_too_short(base_folder, tmp_path):
    (tmp_path / "empty.txt").write_text("")  # the tokenizer puts a bos before it
    command = [sys.executable, ROOT / "eval.py", "--checkpoint_path", base_folder, "--perplexity"]
    done = subprocess.run([*command, tmp_path / "empty.txt"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: the text has 1 token, perplexity needs 2 or more; .*\n", done.stderr), done.stderr


def test_a_text_that_is_none(base_folder, tmp_path, monkeypatch):
    (tmp_path / "binary").write_bytes(b"ok \xff")
    with pytest.raises(UserError, match=r"binary is not UTF-8 \(byte 3\)"):
        run("--perplexity", tmp_path / "binary", "--checkpoint_path", base_folder, monkeypatch=monkeypatch)


def test_a_task_without_its_data(base_folder, tasks, tmp_path, monkeypatch):
    yaml = (tasks / "tiny_choice.yaml").read_text().replace("data.jsonl", "nowhere.jsonl")
    (tmp_path / "tiny_choice.yaml").write_text(yaml)
    with pytest.raises(UserError, match="cannot load the tasks"):
        run(
            "--tasks", "tiny_choice", "--task_path", tmp_path, "--checkpoint_path", base_folder, monkeypatch=monkeypatch
        )


def test_without_lm_eval(base_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install lm-eval==0\.4\.13"):
        run("--tasks", "tiny_choice", "--checkpoint_path", base_folder, monkeypatch=monkeypatch)


def test_a_task_that_generates_more_than_the_window(base_folder):
    with pytest.raises(UserError, match="generates up to 300 tokens"):
        harness(base_folder).generate_until(requests("generate_until", [("def", {"max_gen_toks": 300})]))
