"""Models with eyes against transformers' own classes, with tiny random weights in float32."""

import base64
import copy
import json
import math

import pytest
import torch
import transformers
from conftest import (
    GREEDY,
    assert_refused,
    converse,
    ids_of,
    nothing_compiles,
    parse,
    run_rows,
    set_up,
)
from ranks_worker import ROOT, torchrun
from safetensors.torch import save_file
from test_images import saved
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel
from vision_models import IMAGE, PUBLISHED, VOCAB, Made, converted, make, picture

from beam import BeamParams, beam_search
from checkpoint import load_config, load_model
from config import ModelConfig, VisionConfig
from config_fields import unknown_fields
from convert_hf_checkpoint import convert
from engine import Engine, Request
from errors import UserError
from images import load_options, place_images, read_image
from model import expected_shapes
from quantize import quantize
from tokenizer import load_tokenizer
from vision import VisionTransformer, rope_positions
from weights import read_safetensors

EYES = {"qwen2_vl": Qwen2VisionTransformerPretrainedModel, "qwen2_5_vl": Qwen2_5_VisionTransformerPretrainedModel}
KINDS = list(EYES)
# Each of a size of its own: several windows and parts of some, one window, less than one.
PICTURES = [picture(300, 220), picture(112, 224, 1), picture(60, 90, 2)]
TEXT = [20, 21, 22, 23, 24, 25]


@pytest.fixture(scope="module", params=KINDS)
def both(request, tmp_path_factory):
    """A model as published, and ours of it."""
    folder = tmp_path_factory.mktemp(request.param)
    made = make(request.param, folder / "hf")
    return made, converted(made, folder / "ours")


def inputs(folder, ids: list[int], pictures) -> tuple[list[int], tuple]:
    options = load_options(folder, load_config(folder).vision)
    return place_images(ids, [read_image(saved(image), options) for image in pictures], options)


@torch.no_grad()
def seen_by_reference(made: Made, pictures) -> torch.Tensor:
    given = made.processor(pictures, return_tensors="pt")
    return torch.cat(made.reference.get_image_features(**given).pooler_output)


@pytest.mark.parametrize("pictures", [PICTURES[:1], PICTURES[1:2], PICTURES, [PICTURES[0]] * 2 + PICTURES[1:]])
def test_image_embeddings(both, pictures):
    made, folder = both
    model = load_model(folder)
    _, images = inputs(folder, [IMAGE] * len(pictures), pictures)
    ours = model.vision(torch.cat([image.patches() for image in images]), [image.grid for image in images])
    theirs = seen_by_reference(made, pictures)
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_grids_have_to_fit():
    with pytest.raises(ValueError, match="16 patches"):
        VisionTransformer(VisionConfig(7, 48, 1, 3, 96, 64))(torch.zeros(16, 1176), [(1, 4, 2)])


# ---------------------------------------------------------------------------------------------------------------------
# config.json


def written_out(config: transformers.PreTrainedConfig) -> dict:
    """What transformers writes, every field in today's spelling."""
    return json.loads(config.to_json_string(use_diff=False)) | {"architectures": None}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs(name):
    """Every field is known, and all of it means what transformers takes it to mean, in the old spelling and the new."""
    config = PUBLISHED[name]
    assert unknown_fields(config) == []
    newer = written_out(CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(config)))
    assert isinstance(newer["text_config"], dict) and "hidden_size" not in newer
    assert unknown_fields(newer) == []
    ours = ModelConfig.from_hf(config)
    assert ours == ModelConfig.from_hf(newer)
    between = newer | {name: config[name] for name in ("hidden_size", "rope_theta", "rope_scaling")}  # both are written
    assert ours == ModelConfig.from_hf(between)
    theirs = CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(config)).vision_config
    with torch.device("meta"):
        eyes = EYES[config["model_type"]]._from_config(theirs)
    shapes = {name: shape for name, shape in expected_shapes(ours).items() if name.startswith("vision.")}
    assert sum(map(math.prod, shapes.values())) == sum(p.numel() for p in eyes.parameters())


def test_what_published_configs_mean():
    read = {name.partition("-VL-")[2].partition("-")[0]: ModelConfig.from_hf(PUBLISHED[name]) for name in PUBLISHED}
    assert set(read) == {"2B", "3B", "7B", "72B"} and read["2B"].tied and read["3B"].tied and not read["72B"].tied
    for config in read.values():
        assert config.rope.sections == (16, 24, 24) and config.rope.type == "default" and config.qkv_bias
        assert not any(config.window_layers) and config.vision.token == 151655
        assert (config.vision.dim, config.vision.n_layers, config.vision.out_dim) == (1280, 32, config.dim)
    assert read["3B"].vision.window == 8 and read["3B"].vision.full_layers == (7, 15, 23, 31)
    assert read["2B"].vision.ffn_dim == 5120 and read["72B"].vision.ffn_dim == 3456


@pytest.mark.parametrize("kind", KINDS)
def test_missing_fields_have_the_defaults_of_transformers(kind):
    """But for the width of what is seen, where theirs do not fit together: that is the language model's."""
    newer = written_out(CONFIG_MAPPING[kind]())
    newer["vision_config"]["out_hidden_size" if kind == "qwen2_5_vl" else "hidden_size"] = 8192
    assert ModelConfig.from_hf({"model_type": kind}) == ModelConfig.from_hf(newer)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24]}}, "mrope_section"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": "all"}}, "mrope_section"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0, "mrope_section": [16, 24, 24]}}, "rope_scaling"),
        ({"vision_config": 3}, "vision_config"),
        ({"vision_config": {"hidden_size": 7}}, "hidden_size"),
        ({"vision_config": {"hidden_size": 1536, "num_heads": 7}}, "num_heads"),
        ({"vision_config": {"hidden_size": 1536, "in_chans": 1}}, "in_channels"),
        ({"vision_config": {"hidden_size": 1536, "hidden_act": "mish"}}, "hidden_act"),
        ({"image_token_id": "x"}, "image_token_id"),
        ({"architectures": ["Qwen2ForCausalLM"]}, "architectures"),
    ],
)
def test_configs_that_are_refused(fields, word):
    with pytest.raises(UserError, match=word):
        ModelConfig.from_hf(PUBLISHED["Qwen/Qwen2-VL-2B-Instruct"] | fields)


def test_yarn_and_sections():
    config = PUBLISHED["Qwen/Qwen2.5-VL-7B-Instruct"]
    yarn = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 32768, "mrope_section": [16, 24, 24]}
    rope = ModelConfig.from_hf(config | {"rope_scaling": yarn}).rope
    assert (rope.type, rope.factor, rope.sections) == ("yarn", 4.0, (16, 24, 24))


PROMPTS = [[*TEXT, IMAGE, *TEXT, IMAGE, 7, IMAGE, *TEXT], [IMAGE, *TEXT, IMAGE, 5, IMAGE], [IMAGE]]


@pytest.mark.parametrize("ids", PROMPTS)
def test_positions(both, ids):
    made, folder = both
    pictures = PICTURES[: ids.count(IMAGE)]
    longer, images = inputs(folder, ids, pictures)
    given = made.inputs(ids, pictures)
    assert given["input_ids"][0].tolist() == longer
    expected, delta = made.reference.model.get_rope_index(
        given["input_ids"], given["mm_token_type_ids"], given["image_grid_thw"], attention_mask=given["attention_mask"]
    )
    positions = rope_positions(images, len(longer))
    assert torch.equal(positions, expected[:, 0])
    assert int(positions.max()) + 1 - len(longer) == int(delta)


# ---------------------------------------------------------------------------------------------------------------------
# Through the engine

CASES = {  # a prompt, and its images
    "one": ([*TEXT, 5, IMAGE, 7, *TEXT], PICTURES[:1]),
    "two": ([5, IMAGE, 7, *TEXT, 5, IMAGE, 7, 30, 31], PICTURES[1:]),
    "same twice": ([5, IMAGE, 7, 5, IMAGE, 7, *TEXT], [PICTURES[2]] * 2),
    "ends in one": ([*TEXT, 5, IMAGE], PICTURES[2:]),
    "none": (list(range(20, 60)), []),
}


def request(folder, ids, pictures, count=12, **others):
    longer, images = inputs(folder, ids, pictures)
    return Request(longer, GREEDY, count, images=images, **others)


@pytest.fixture(scope="module")
def engine(both):
    return Engine(load_model(both[1]))


@pytest.mark.parametrize("case", CASES)
def test_logits(both, engine, case):
    """Of every token of the prompt."""
    made, folder = both
    ids, pictures = CASES[case]
    asked = request(folder, ids, pictures, echo=True)
    set_up(engine, [asked])
    engine.take(asked, [0])
    logits = engine.model.logits(engine.prefill(0, asked))
    torch.testing.assert_close(logits, made.logits(ids, pictures), rtol=0, atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_greedy_tokens(both, engine, tokenizer_of, batch_size):
    """Rows with and without images beside each other."""
    made, folder = both
    requests = [request(folder, *case) for case in CASES.values()]
    set_up(engine, requests, batch_size=batch_size)
    tokens = ids_of(run_rows(engine, tokenizer_of, requests))
    for (name, (ids, pictures)), new in zip(CASES.items(), tokens, strict=True):
        made.assert_greedy(ids, pictures, new)
        if name != "ends in one":  # where generate goes on from the last row and column, other than its own forward
            assert new == made.greedy(ids, pictures, 12)


@pytest.fixture(scope="module")
def tokenizer_of(both):
    return load_tokenizer(both[1])


@pytest.mark.parametrize("most", [7, 33])
def test_prefill_in_pieces(both, engine, most):
    """Which begin and end within images."""
    made, folder = both
    for ids, pictures in CASES.values():
        asked = request(folder, ids, pictures)
        set_up(engine, [asked])
        engine.take(asked, [0])
        while len(engine.places[0].tokens) < len(asked.prompt):
            hidden = engine.prefill(0, asked, most)
        logits = engine.model.logits(hidden[-1:])
        torch.testing.assert_close(logits, made.logits(ids, pictures)[-1:], rtol=0, atol=1e-4)


def test_a_prefix_that_ends_within_an_image(both, engine, tokenizer_of):
    """What was read of a prompt that was given up in the middle of an image is used, and the rest of the image is seen
    in its place."""
    made, folder = both
    ids, pictures = [*TEXT, *TEXT, 5, IMAGE, 7, *TEXT], PICTURES[:1]
    first, then = request(folder, ids, pictures), request(folder, [*ids, 40], pictures)
    set_up(engine, [first])
    engine.take(first, [0])
    engine.prefill(0, first, 32)  # 13 tokens of text, 19 of the image
    (row,) = run_rows(engine, tokenizer_of, [then])
    assert row[-1].stats.cached_tokens == 32
    made.assert_greedy([*ids, 40], pictures, [token.id for token in row])


def test_prefixes_with_images(both, engine, tokenizer_of, prefills):
    """The same image counts, another one of the same size does not; nor does text that looks like one."""
    made, folder = both
    head, tail = [*TEXT, *TEXT, 5], [7, *TEXT]
    other = picture(*PICTURES[1].size, 9)
    count = inputs(folder, [IMAGE], [PICTURES[1]])[1][0].count
    written = Request([*head, *[IMAGE] * count, *tail], GREEDY, 4)  # nobody shows anything
    asked = [
        ([*head, IMAGE, *tail], [PICTURES[1]], 0),
        ([*head, IMAGE, *tail, 50], [PICTURES[1]], len(head) + count + len(tail)),
        ([*head, IMAGE, *tail], [other], len(head)),
        ([*head, IMAGE, *tail, 5, IMAGE, 7], [other, PICTURES[2]], len(head) + count + len(tail)),
    ]
    set_up(engine, [written])
    for ids, pictures, shared in asked:
        (row,) = run_rows(engine, tokenizer_of, [request(folder, ids, pictures, 4)])
        assert prefills[-1].cached == shared
        made.assert_greedy(ids, pictures, [token.id for token in row])
    run_rows(engine, tokenizer_of, [written])
    assert prefills[-1].cached == len(head)


def test_a_row_is_text_again(both, engine, tokenizer_of):
    """What a row was rotated by behind an image does not stay."""
    made, folder = both
    set_up(engine, [request(folder, *CASES["two"])])
    for case in ("two", "none", "one", "none"):
        (tokens,) = ids_of(run_rows(engine, tokenizer_of, [request(folder, *CASES[case])]))
        made.assert_greedy(*CASES[case], tokens)
    assert engine.model.rope_offset.tolist() == [0]


def test_samples_of_one_prompt(both, engine, tokenizer_of, prefills):
    """A row goes on from a copy of another one's, behind an image too."""
    made, folder = both
    requests = [request(folder, *CASES["one"])] * 3
    set_up(engine, requests, batch_size=3)
    tokens = ids_of(run_rows(engine, tokenizer_of, requests))
    assert tokens == [made.greedy(*CASES["one"], 12)] * 3
    assert [prefill.cached for prefill in prefills] == [0] + [len(requests[0].prompt) - 1] * 2


@pytest.mark.parametrize("how", ["lookup", "draft"])
def test_speculation(both, tokenizer_of, how):
    made, folder = both
    draft = load_model(folder) if how == "draft" else None
    engine = Engine(load_model(folder), draft=draft, prompt_lookup=draft is None, speculate_k=3)
    cases = [case for name, case in CASES.items() if name != "ends in one"]  # a draft reads the last two tokens again
    requests = [request(folder, *case) for case in cases]
    set_up(engine, requests, batch_size=2)
    for case, new in zip(cases, ids_of(run_rows(engine, tokenizer_of, requests)), strict=True):
        made.assert_greedy(*case, new)
    if draft is not None:  # which sees what the model sees
        assert engine.stats.accepted / engine.stats.proposed > 0.9


def test_beams(both, engine):
    made, folder = both
    ids, pictures = CASES["one"]
    asked, beams = request(folder, ids, pictures, 8), BeamParams(3, num_return_sequences=2)
    engine.setup(3, 600, plain=True)
    found = [hypothesis.tokens for hypothesis in beam_search(engine, asked, beams)]
    made.reference.model.rope_deltas = None
    others = dict(max_new_tokens=8, do_sample=False, num_beams=3, num_return_sequences=2, eos_token_id=VOCAB)
    rows = made.reference.generate(**made.inputs(ids, pictures), **others, pad_token_id=0)
    assert found == rows[:, len(asked.prompt) :].tolist()


@pytest.mark.slow
def test_nothing_is_compiled_for_an_image(tmp_path, monkeypatch):
    """Prompts with and without images take the prefill and the steps that were compiled before."""
    monkeypatch.setattr("engine.PREFILL_LENGTHS", (64,))
    made = make("qwen2_5_vl", tmp_path / "hf")
    folder = converted(made, tmp_path / "ours")
    engine, tokenizer = Engine(load_model(folder), compile=True, compile_prefill=True), load_tokenizer(folder)
    requests = [request(folder, *case) for case in CASES.values()]
    set_up(engine, requests, batch_size=2, max_seq_length=512)
    engine.warm_up()
    with nothing_compiles():
        rows = ids_of(run_rows(engine, tokenizer, requests))
    for case, new in zip(CASES.values(), rows, strict=True):
        made.assert_greedy(*case, new)


# ---------------------------------------------------------------------------------------------------------------------
# Other checkpoints


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spelling", ["old", "new"])
@pytest.mark.parametrize("tied", [False, True])
def test_spellings(tmp_path, kind, spelling, tied):
    made = make(kind, tmp_path / "hf", spelling, tie_word_embeddings=tied)
    names = [name for name in read_safetensors(made.folder / "model.safetensors")[0] if "visual" in name]
    assert names and all(name.startswith("model.visual." if spelling == "new" else "visual.") for name in names)
    assert ("text_config" in json.loads((made.folder / "config.json").read_text())) == (spelling == "new")
    folder = converted(made, tmp_path / "ours")
    assert load_config(folder).tied == tied
    assert (folder / "preprocessor_config.json").read_bytes() == (made.folder / "preprocessor_config.json").read_bytes()
    engine, (ids, pictures) = Engine(load_model(folder)), CASES["one"]
    asked = request(folder, ids, pictures)
    set_up(engine, [asked])
    engine.take(asked, [0])
    logits = engine.model.logits(engine.prefill(0, asked))
    torch.testing.assert_close(logits, made.logits(ids, pictures)[-1:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("mode", ["int8", "int4", "int4-gptq"])
def test_quantized(both, mode, tmp_path):
    """The language part, and nothing of what sees."""
    made, folder = both
    text = tmp_path / "text.txt"
    text.write_text("A decoder reads every weight once for each token that it writes. " * 40)
    path = quantize(folder, mode, calibration=text, out=folder / f"model_{mode}.safetensors")
    whole, rounded = read_safetensors(folder / "model.safetensors")[0], read_safetensors(path)[0]
    seeing = [name for name in whole if name.startswith("vision.")]
    assert seeing and all(torch.equal(whole[name].read(), rounded[name].read()) for name in seeing)
    layers = {name.removesuffix(".scales") for name in rounded if name.endswith(".scales")}
    assert len(layers) == 13 and "layers.0.attention.wqkv" in layers
    engine, (ids, pictures) = Engine(load_model(path)), CASES["one"]
    asked = request(folder, ids, pictures, echo=True)
    set_up(engine, [asked])
    engine.take(asked, [0])
    logits = engine.model.logits(engine.prefill(0, asked))
    expected = made.logits(ids, pictures)
    if mode != "int4-gptq":  # which is for what text like its own needs
        assert (logits - expected).std() < (0.05 if mode == "int8" else 0.4) * expected.std()
    assert logits.isfinite().all()


def test_bfloat16(both, tmp_path):
    made, _ = both
    convert(made.folder, tmp_path / "ours", torch.bfloat16)
    model = load_model(tmp_path / "ours")
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    _, images = inputs(tmp_path / "ours", [IMAGE], PICTURES[:1])
    seen = model.vision(images[0].patches(), [images[0].grid])
    expected = seen_by_reference(made, PICTURES[:1])
    assert seen.dtype == torch.bfloat16 and (seen.float() - expected).std() < 0.05 * expected.std()


def test_converted_again(both, tmp_path):
    """What sees is compared as all else is."""
    made, _ = both
    convert(made.folder, tmp_path / "ours")
    assert "unchanged" in convert(made.folder, tmp_path / "ours")


def test_tensors_that_are_missing_or_misshapen(tmp_path):
    made = make("qwen2_vl", tmp_path / "hf")
    path = made.folder / "model.safetensors"
    whole = {name: tensor.read().clone() for name, tensor in read_safetensors(path)[0].items()}
    for name, change in (
        ("visual.blocks.1.mlp.fc2.weight", None),
        ("visual.patch_embed.proj.weight", torch.zeros(48, 3, 1, 14, 14)),
        ("visual.merger.mlp.0.bias", torch.zeros(3)),
        ("visual.blocks.3.norm1.weight", torch.zeros(48)),
    ):
        tensors = {other: tensor for other, tensor in whole.items() if other != name}
        save_file(tensors if change is None else tensors | {name: change}, path)
        with pytest.raises(UserError, match=name):
            convert(made.folder, tmp_path / "ours")


@pytest.mark.slow
@pytest.mark.parametrize("both", KINDS[1:], indirect=True)
def test_two_ranks(both, files, script, tmp_path):
    """Each sees all of an image, which rank 0 has read."""
    _, folder = both
    content = [image_part(files[0]), text_part("Look."), image_part(files[2])]
    lines = [{"messages": [{"role": "user", "content": words}]} for words in (content, "No image.", content[:2])]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    args = ["--checkpoint_path", folder, "--prompt_file", tmp_path / "p.jsonl", "--json", "--batch_size", 2]
    args = [*map(str, args), "--max_new_tokens", "8", "--ignore_eos"]
    with torchrun(2, ROOT / "generate.py", *args) as launch:
        code, out, err = launch.finish()
    assert code == 0, err
    alone = parse(script(*args))
    assert [json.loads(line)["tokens"] for line in out.splitlines()] == [sample["tokens"] for sample in alone]


# ---------------------------------------------------------------------------------------------------------------------
# The command line


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for i, image in enumerate(PICTURES):
        image.save(folder / f"{i}.png")
    return [folder / f"{i}.png" for i in range(len(PICTURES))]


def rendered(made, messages) -> list[int]:
    """The ids by transformers, a token for each image."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(made.folder)
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False).input_ids


def image_part(path=None):
    return {"type": "image"} | ({} if path is None else {"image": str(path)})


def text_part(text):
    return {"type": "text", "text": text}


def test_command_line(both, files, script):
    made, folder = both
    flags = ("--checkpoint_path", folder, "--max_new_tokens", 8, "--ignore_eos", "--json")
    for prompt, content in (
        ("What?", [image_part(), image_part(), text_part("What?")]),
        ("A <image>, <image>.", [text_part("A "), image_part(), text_part(", "), image_part(), text_part(".")]),
    ):
        paths = [arg for path in files[:2] for arg in ("--image", path)]
        (sample,) = parse(script(*flags, *paths, "--prompt", prompt))
        ids = rendered(made, [{"role": "user", "content": content}])
        assert sample["tokens"] == made.greedy(ids, PICTURES[:2], 8)
        assert sample["prompt_tokens"] == made.inputs(ids, PICTURES[:2])["input_ids"].shape[1]


def test_lines_of_json(both, files, script, tmp_path):
    """A batch of rows with images and without."""
    made, folder = both
    url = "data:image/png;base64," + base64.b64encode(files[2].read_bytes()).decode()
    contents = [
        [image_part(files[0]), text_part("Look.")],
        "No image.",
        [text_part("This "), {"type": "image_url", "image_url": {"url": url}}, image_part(files[1])],
        [text_part("Only "), text_part("text.")],
    ]
    pictures = [PICTURES[:1], [], [PICTURES[2], PICTURES[1]], []]
    lines = [json.dumps({"messages": [{"role": "user", "content": content}]}) for content in contents]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    flags = ("--max_new_tokens", 8, "--ignore_eos", "--json", "--batch_size", 3)
    samples = parse(script("--checkpoint_path", folder, "--prompt_file", tmp_path / "p.jsonl", *flags))
    for sample, content, shown in zip(samples, contents, pictures, strict=True):
        ids = rendered(made, [{"role": "user", "content": content}])
        assert sample["tokens"] == made.greedy(ids, shown, 8)


def test_chat(both, files, script):
    """A conversation goes on behind an image, which is in the cache."""
    made, folder = both
    flags = ("--max_new_tokens", 6, "--ignore_eos", "--max_seq_length", 600)
    lines = ["Hello", f"/image {files[0]}", f"/image {files[2]}", "And these?", "Again"]
    result = converse(script, folder, *lines, args=flags)
    assert result.code == 0, result.err
    messages, pictures = [], []
    tokenizer = load_tokenizer(folder)
    shown = [text_part("And these?")]
    for content in ("Hello", [image_part(), image_part(), *shown], "Again"):
        pictures += [PICTURES[0], PICTURES[2]] if isinstance(content, list) else []
        messages.append({"role": "user", "content": content})
        reply = tokenizer.decode(made.greedy(rendered(made, messages), pictures, 6))
        assert reply in result.out
        messages.append({"role": "assistant", "content": reply})
    count = made.processor(PICTURES[0], return_tensors="pt")["pixel_values"].shape[0] // 4
    assert f"{files[0]} is {count} tokens" in result.err and result.err.count("of them cached") == 2


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize("kind", KINDS[:1])
def test_refused(tmp_path, base_folder, chat_folder, files, script, kind):
    made = make(kind, tmp_path / "hf")
    folder = converted(made, tmp_path / "ours")
    asked = ("--prompt", "What?", "--image", files[0])
    broken = tmp_path / "broken.png"
    broken.write_bytes(files[0].read_bytes()[:500])
    for words, args in (
        (("no eyes",), ("--checkpoint_path", chat_folder, *asked)),
        (("no eyes",), ("--checkpoint_path", base_folder, *asked)),
        (("of 1 images", "cache of 40"), ("--checkpoint_path", folder, *asked, "--max_seq_length", 40)),
        (("damaged", str(broken)), ("--checkpoint_path", folder, "--prompt", "x", "--image", broken)),
        (("none.png",), ("--checkpoint_path", folder, "--prompt", "x", "--image", tmp_path / "none.png")),
        (("1 <image> for 2 images",), ("--checkpoint_path", folder, "--prompt", "<image>", *asked[2:] * 2)),
        (("--image needs --prompt",), ("--checkpoint_path", folder, "--image", files[0])),
        (("places",), ("--checkpoint_path", folder, "--prompt", "<|image_pad|>", "--image", files[0])),
    ):
        assert_refused(script(*args), *words)
    lines = [
        {"messages": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/a.png"}}]}]},
    ]
    for line, word in zip(lines, ("messages", "messages", "download"), strict=True):
        (tmp_path / "p.jsonl").write_text(json.dumps(line))
        assert_refused(script("--checkpoint_path", folder, "--prompt_file", tmp_path / "p.jsonl"), word)


def test_prompt_cache(both, files, script, tmp_path):
    """A file of what was read knows its images."""
    _, folder = both
    args = ["--checkpoint_path", folder, "--prompt_cache", tmp_path / "cache", "--max_new_tokens", 4, "--json"]
    first, again, other = (
        parse(script(*args, "--image", path, "--prompt", "What is it?"))[0] for path in (files[0], files[0], files[2])
    )
    assert first["stats"]["cached_tokens"] == 0 and first["tokens"] == again["tokens"]
    assert again["stats"]["cached_tokens"] == again["prompt_tokens"] - 1
    assert other["stats"]["cached_tokens"] <= first["prompt_tokens"] - 54
