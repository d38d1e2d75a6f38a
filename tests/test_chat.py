"""--interactive, within this process (a terminal's part is in test_process.py)."""

import json

import pytest
import transformers
from conftest import assert_refused, converse, greedy

import chat
from prompts import SETTINGS


def chat_ids(tokenizer, *turns):
    """The prompt of a chat of alternating words, as conftest's template has it."""
    text = "<s>" + "".join(f"<|{'assistant' if i % 2 else 'user'}|>{turn}<|end|>" for i, turn in enumerate(turns))
    return tokenizer.encode(text + "<|assistant|>", add_special_tokens=False)


def test_a_chat_prefills_only_what_is_new(script, chat_folder, reference, tokenizer, prefills):
    """Each turn's prompt is the whole conversation; what the cache already holds of it is not run again; and the reply
    is the one that the whole conversation gets from scratch."""

    def reply_to(*turns):
        ids = greedy(reference, chat_ids(tokenizer, *turns), 5, eos_token_id=[1, 2])
        ids = ids[:-1] if ids[-1] in (1, 2) else ids
        return tokenizer.decode(ids), ids

    # The tokens of random weights rarely are the ones that their text has: look for a reply where they are.
    for i in range(1000):
        opening = f"word {i}"
        first, generated = reply_to(opening)
        if tokenizer.encode(first, add_special_tokens=False) == generated and "\n" not in first:
            break
    second, _ = reply_to(opening, first, "and 🙂?")
    third, _ = reply_to(opening, first, "and 🙂?", second, "so")
    result = converse(script, chat_folder, opening, "and 🙂?", "so", args=("--max_new_tokens", 5))
    assert result.code == 0
    assert result.out == f"{first}\n{second}\n{third}\n"
    whole = [
        chat_ids(tokenizer, opening),
        chat_ids(tokenizer, opening, first, "and 🙂?"),
        chat_ids(tokenizer, opening, first, "and 🙂?", second, "so"),
    ]
    assert [prefill.prompt for prefill in prefills] == whole
    cached = [prefill.cached for prefill in prefills]
    assert cached[:2] == [0, len(whole[0]) + 4]  # the last of the five tokens was never run
    assert cached[2] >= len(whole[1])


def test_a_base_model_continues_the_text(script, base_folder, reference, tokenizer, prefills):
    result = converse(script, base_folder, "def f(x):", "class A:", args=("--max_new_tokens", 6))
    assert result.code == 0 and "no chat template" in result.err
    prompt_1 = tokenizer.encode("def f(x):")
    reply_1 = greedy(reference, prompt_1, 6)
    prompt_2 = prompt_1 + reply_1 + tokenizer.encode("\nclass A:", add_special_tokens=False)
    assert result.out == tokenizer.decode(reply_1) + "\n" + tokenizer.decode(greedy(reference, prompt_2, 6)) + "\n"
    first, second = prefills
    assert (first.prompt, first.cached) == (prompt_1, 0)
    assert (second.prompt, second.cached) == (prompt_2, len(prompt_1) + 5)


@pytest.mark.parametrize("name", ["chat_folder", "base_folder"])
def test_clear_and_the_ways_to_end(script, request, name):
    folder = request.getfixturevalue(name)
    once = converse(script, folder, "hello", args=("--max_new_tokens", 5))
    result = converse(script, folder, "hello", "", "   ", "/clear", "hello", "/exit", "x", args=("--max_new_tokens", 5))
    assert once.code == result.code == 0
    assert result.out == once.out * 2
    args = ("--checkpoint_path", folder, "--interactive", "--max_new_tokens", 5)
    assert script(*args, stdin=b"hello").out == once.out  # no newline at the end
    assert script(*args, stdin=b"hello\r\n").out == once.out
    nothing = script(*args, stdin=b"")
    assert (nothing.code, nothing.out) == (0, "")


def test_a_message_longer_than_the_context(script, chat_folder):
    args = ("--max_seq_length", 24, "--max_new_tokens", 20)
    result = converse(script, chat_folder, "hello", "x" * 60, "/clear", "hello", args=args)
    assert result.code == 0
    assert result.out == converse(script, chat_folder, "hello", args=args).out * 2
    assert len([line for line in result.err.splitlines() if "no room in 24; give a shorter text" in line]) == 1


def test_a_full_context_forgets_the_oldest_turns(script, chat_folder, reference, tokenizer):
    """The reply is what the system message and the turns that are left get from scratch."""
    args = ("--max_seq_length", 64, "--max_new_tokens", 8, "--ignore_eos")
    system = "<|system|>be brief<|end|>"
    lines = [f"question {i}" for i in range(6)]
    result = converse(script, chat_folder, *lines, args=(*args, "--system", "be brief"))
    replies, messages, forgotten = result.out.split("\n"), [], 0
    assert result.code == 0 and len(replies) == 7
    for line, reply in zip(lines, replies, strict=False):
        room = 8
        while True:
            text = "<s>" + system + "".join(messages) + f"<|user|>{line}<|end|><|assistant|>"
            ids = tokenizer.encode(text, add_special_tokens=False)
            if len(ids) + room <= 64 or not messages:
                break
            messages, forgotten, room = messages[2:], forgotten + 1, 8 + 64 // chat.REPLY_SHARE
        assert reply == tokenizer.decode(greedy(reference, ids, 8, eos_token_id=None))
        messages += [f"<|user|>{line}<|end|>", f"<|assistant|>{reply}<|end|>"]
    assert forgotten > 0 and "what was said first is forgotten" in result.err


def test_a_message_that_is_too_long_changes_nothing(script, chat_folder, prefills):
    args = ("--max_seq_length", 64, "--max_new_tokens", 8, "--ignore_eos", "--system", "be brief")
    result = converse(script, chat_folder, "hello", "x y " * 60, "x y " * 60, "and?", args=args)
    assert result.err.count("leave no room in 64") == 2 and "forgotten" not in result.err
    alone = converse(script, chat_folder, "hello", "and?", args=args)
    assert result.out == alone.out
    assert [prefill.prompt for prefill in prefills[:2]] == [prefill.prompt for prefill in prefills[2:]]


def test_a_base_model_forgets_the_oldest_text(script, base_folder):
    result = converse(script, base_folder, *["some words"] * 9, args=("--max_seq_length", 32, "--max_new_tokens", 6))
    assert result.code == 0 and "what was said first is forgotten" in result.err and len(result.out.splitlines()) >= 9


def test_words_of_a_base_model_that_are_too_long_are_not_cut(script, base_folder, prefills):
    args = ("--max_seq_length", 32, "--max_new_tokens", 6)
    result = converse(script, base_folder, "def f(x):", "x y " * 30, "x y " * 30, "class A:", args=args)
    assert result.err.count("leave no room in 32") == 2 and "forgotten" not in result.err
    assert result.out == converse(script, base_folder, "def f(x):", "class A:", args=args).out
    assert [len(request.prompt) for request in prefills[:2]] == [len(request.prompt) for request in prefills[2:]]


def test_a_reply_that_ctrl_c_ends(script, chat_folder, monkeypatch, reference, tokenizer, prefills):
    """What was said stays, in the conversation and in the cache, and the next reply is the one to all of that."""
    real, stop_after = chat.generate, iter((0, 3, 10**9))

    def interrupted(*args):
        limit = next(stop_after)
        for i, token in enumerate(real(*args)):
            if i == limit:
                raise KeyboardInterrupt
            yield token

    monkeypatch.setattr(chat, "generate", interrupted)
    result = converse(script, chat_folder, "lost", "hello", "and?", args=("--max_new_tokens", 6, "--ignore_eos"))
    assert result.code == 0 and "the message is forgotten" in result.err and "stays in the conversation" in result.err
    ids = greedy(reference, chat_ids(tokenizer, "hello"), 3, eos_token_id=None)
    nothing, first, second, _ = result.out.split("\n")
    assert (nothing, first) == ("", tokenizer.decode(ids))
    whole = chat_ids(tokenizer, "hello", first, "and?")
    assert second == tokenizer.decode(greedy(reference, whole, 6, eos_token_id=None))
    assert prefills[2].prompt == whole and prefills[2].cached >= len(chat_ids(tokenizer, "hello")) - 2


def test_text_of_several_lines(script, chat_folder):
    """Between three quotes; the same as a line of JSON with line breaks has it."""
    rows = json.dumps({"messages": [{"role": "user", "content": "one\n/two\n\nthree"}]}).encode()
    args = ("--checkpoint_path", chat_folder, "--max_new_tokens", 5)
    expected = script(*args, "--prompt_file", "-", stdin=rows).out
    for lines in (('"""one', "/two", "", 'three"""'), ('"""', "one", "/two", "", "three", '"""')):
        assert converse(script, chat_folder, *lines, args=args[2:]).out == expected
    assert converse(script, chat_folder, '"""one', "/two", "", "three", args=args[2:]).out == expected  # the input ends


def test_a_system_message(script, chat_folder, base_folder):
    args = ("--max_new_tokens", 5)
    with_it = converse(script, chat_folder, "hello", args=(*args, "--system", "be brief")).out
    without = converse(script, chat_folder, "hello", args=args).out
    said = converse(script, chat_folder, "hello", "/system be brief", "hello", "/system", "hello", args=args)
    assert said.out == without + with_it + without and with_it != without
    assert_refused(script("--checkpoint_path", base_folder, "--interactive", "--system", "x"), "--system", "template")


def test_each_question_draws_anew(script, chat_folder):
    """With a seed as well; the same chat with the same seed is the same."""
    args = ("--temperature", 2, "--max_new_tokens", 9, "--seed", 5)
    lines = ("hello", "/clear", "hello", "/clear", "/set seed 5", "hello")
    first, second, third = converse(script, chat_folder, *lines, args=args).out.split("\n")[:3]
    assert first == third != second
    assert converse(script, chat_folder, *lines, args=args).out.split("\n")[:3] == [first, second, third]


def test_a_chat_says_how_fast_it_was(script, chat_folder):
    assert "tok/s" in converse(script, chat_folder, "hello", args=("--max_new_tokens", 5)).err


def test_a_message_that_the_tokenizer_refuses(script, chat_folder):
    once = converse(script, chat_folder, "hello", args=("--max_new_tokens", 5))
    args = ("--checkpoint_path", chat_folder, "--interactive", "--max_new_tokens", 5)
    result = script(*args, stdin=b"ab\xff\nhello\n")
    assert result.out == once.out and "error: the text is not valid UTF-8" in result.err


# ---- settings ----

SAMPLED = ("--max_new_tokens", 12, "--seed", 3)
CHANGES = {  # what /set is told, and the flags that say the same
    "temperature 0.9": ("--temperature", 0.9),
    "top_k 40": ("--top_k", 40),
    "repetition_penalty 1.7": ("--repetition_penalty", 1.7),
    "frequency_penalty 2": ("--frequency_penalty", 2),
    "max_new_tokens 3": ("--max_new_tokens", 3),
    "min_new_tokens 12": ("--min_new_tokens", 12),
    'logit_bias {"70": 100}': ("--logit_bias", "70=100"),
    'bad_words ["a", "e"]': ("--bad_words", "a", "e"),
    "bad_words e": ("--bad_words", "e"),
    "stop e": ("--stop", "e"),
    'stop ["e", "\\n"]': ("--stop", "e", "\n"),
    "stop 5": ("--stop", "5"),
    "ignore_eos true": ("--ignore_eos",),
}


@pytest.mark.parametrize("change", CHANGES)
def test_set_is_what_the_flag_is(script, chat_folder, change):
    """Before and after others; what is set back changes nothing."""
    flagged = converse(script, chat_folder, "hello", "and", args=(*SAMPLED, *CHANGES[change]))
    name = change.split()[0]
    lines = (f"/set {change}", "hello", "and")
    result = converse(script, chat_folder, *lines, args=SAMPLED)
    assert (result.code, result.out) == (0, flagged.out)
    plain = converse(script, chat_folder, "hello", args=SAMPLED).out
    back = {"max_new_tokens": "12"}.get(name, "null")
    again = converse(script, chat_folder, *lines, "/clear", f"/set {name} {back}", "hello", args=SAMPLED)
    assert again.out == flagged.out + plain


def test_set_changes_what_is_written(script, chat_folder):
    """Lest the test above compares equal things: most of these matter to this model."""
    plain = converse(script, chat_folder, "hello", "and", args=SAMPLED).out
    changed = [converse(script, chat_folder, f"/set {change}", "hello", "and", args=SAMPLED).out for change in CHANGES]
    assert sum(out != plain for out in changed) >= 7


WRONG = [
    ("/set temperature hot", "temperature"),
    ("/set temperature -1", "temperature"),
    ("/set temperature NaN", "temperature"),
    ("/set temperature", "temperature"),
    ("/set top_k 1.5", "top_k"),
    ("/set top_p 0", "top_p"),
    ("/set max_new_tokens 0", "max_new_tokens"),
    ("/set max_new_tokens 99999", "context of 2048"),
    ('/set logit_bias {"400": 1}', "400"),
    ('/set logit_bias {"x": 1}', "logit_bias"),
    ("/set stop", "stop"),
    ("/set stop []x[", None),
    ("/set bad_words " + json.dumps([f"word {i}" for i in range(100)]), "bad_words"),
    ("/set bad_words " + "long" * 30, "bad_words"),
    ("/set volume 11", "volume"),
    ("/set", "setting"),
    ("/set ignore_eos 1", "ignore_eos"),
    ("/set seed -1", "seed"),
    ("/set min_new_tokens 3000", "min_new_tokens"),
]


@pytest.mark.parametrize("line, said", WRONG)
def test_a_bad_setting_is_said_and_changes_nothing(script, chat_folder, line, said):
    before, after = (
        converse(script, chat_folder, *lines, args=("--seed", 3)) for lines in (["/show"], [line, "/show"])
    )
    assert before.code == after.code == 0
    complaints = [text for text in after.err.splitlines() if text.startswith("error: ")]
    if said is None:  # a stop string like any other
        assert complaints == [] and "stop" in after.err
        return
    assert len(complaints) == 1 and said in complaints[0]
    assert [text for text in after.err.splitlines() if text not in complaints][3:] == before.err.splitlines()[3:]


def test_show_says_what_is_in_force(script, chat_folder):
    result = converse(
        script, chat_folder, "/set stop User:", "/set top_p 0.5", "/show", args=("--seed", 3, "--bad_words", "字")
    )
    shown = dict(line.split(" ", 1) for line in result.err.splitlines()[3:])
    assert json.loads(shown["stop"]) == "User:" and json.loads(shown["top_p"]) == 0.5
    assert json.loads(shown["temperature"]) == 1.0  # a filter samples
    assert json.loads(shown["bad_words"]) == ["字"] and json.loads(shown["seed"]) == 3
    assert json.loads(shown["repetition_penalty"]) == 1 and json.loads(shown["max_new_tokens"]) == 200
    assert shown.keys() == SETTINGS.keys()


def test_help_and_what_only_looks_like_a_command(script, chat_folder):
    result = converse(script, chat_folder, "/help", args=("--max_new_tokens", 5))
    assert result.out == "" and all(command in result.err for command in ("/set", "/show", "/clear", "/exit"))
    args = ("--max_new_tokens", 5)
    command = converse(script, chat_folder, "/usr/bin is what?", args=args)
    assert command.out == "" and "error: /usr/bin is not a command; /help" in command.err
    for line in ("/quit smoking, how?", "/clear my doubts"):
        said = converse(script, chat_folder, line, "hello", args=args)
        assert f"error: {line.split()[0]} stands alone" in said.err and said.out
    rows = json.dumps({"messages": [{"role": "user", "content": "/usr/bin is what?"}]}).encode()
    expected = script("--checkpoint_path", chat_folder, *args, "--prompt_file", "-", stdin=rows).out
    assert converse(script, chat_folder, "//usr/bin is what?", args=args).out == expected


def test_a_chat_speculates_and_says_the_same(script, chat_folder, base_folder):
    lines = ("hello", "and", "/set temperature 1", "so")
    plain = converse(script, chat_folder, *lines, args=SAMPLED).out
    for args in (("--prompt_lookup",), ("--draft_checkpoint_path", base_folder, "--speculate_k", 2)):
        assert converse(script, chat_folder, *lines, args=(*SAMPLED, *args)).out == plain


def test_penalties_of_a_chat_count_all_of_it(script, chat_folder, reference, tokenizer):
    """What the cache holds is part of the prompt for a repetition penalty, as it is for transformers."""
    text = transformers.AutoTokenizer.from_pretrained(chat_folder)
    chat, turns = [], ("hello", "and")
    for turn in turns:
        chat.append({"role": "user", "content": turn})
        ids = text.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        reply = greedy(reference, ids, 8, eos_token_id=[1, 2], repetition_penalty=1.8)
        chat.append({"role": "assistant", "content": tokenizer.decode(reply)})
    result = converse(script, chat_folder, *turns, args=("--max_new_tokens", 8, "--repetition_penalty", 1.8))
    assert result.out == "".join(message["content"] + "\n" for message in chat[1::2])


BESIDE = ["--json", "--num_samples 2", "--batch_size 2", "--prompt_file x", "--prompt hello", "--num_beams 2", "--echo"]


@pytest.mark.parametrize("flag", [*BESIDE, "--logprobs 2"])
def test_what_does_not_go_with_interactive(script, base_folder, flag):
    assert_refused(script("--checkpoint_path", base_folder, "--interactive", *flag.split()), "--interactive")
