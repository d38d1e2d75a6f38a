"""Which files of a model are needed, and how they come from the Hugging Face hub.

    folder = download("meta-llama/Llama-3.2-1B", revision=None)     # a folder in the ordinary Hugging Face cache
    folder, repo = cached("~/.cache/.../models--ORG--NAME")         # the snapshot in it, "ORG/NAME"
    choose_weights(names, "here", read_index).files                 # ["model.safetensors"]

Every answer of the hub or the network that is not a file ends as one UserError that says what to do.
"""

import errno
import fnmatch
import glob
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from config import ModelConfig
from errors import UserError
from files import check_disk, read_json
from formats import quantized
from weights import read_index

CONFIG_FILES = ("config.json", "generation_config.json")
IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")  # how a model with eyes wants its images
TOKENIZER_FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
# The first that is there is taken, as one file or as shards with an index; gptq_model-4bit-128g is AutoGPTQ's name.
WEIGHT_FILES = (
    "model.safetensors", "pytorch_model.bin", "gptq_model-*g.safetensors", "gptq_model-*g.bin", "*.pth",
)  # fmt: skip
OTHER_KINDS = (  # a file that tells a folder without weights of ours, what it is, what to do
    ("adapter_*", "a LoRA adapter", "name it as --adapter, and its base model as --repo or --checkpoint_dir"),
    ("mmproj*.gguf", "a projector of pictures", "name the GGUF file of the language model"),
    ("model_index.json", "a diffusers pipeline", "take a language model"),
    ("weights*.npz", "weights of mlx", "convert the original model"),
    ("params.json", "a model in the form of its authors", "get it in the form of Hugging Face, with config.json"),
    ("consolidated*", "a model in the form of its authors", "get it in the form of Hugging Face, with config.json"),
    ("*.onnx", "ONNX weights", "get the model in safetensors"),
    ("onnx*", "ONNX weights", "get the model in safetensors"),
    ("tf_model*", "TensorFlow weights", "get the model in safetensors"),
    ("flax_model*", "Flax weights", "get the model in safetensors"),
    ("*.nemo", "NeMo weights", "get the model in safetensors"),
    ("checkpoint-*", "the checkpoints of a training run", "name one of them"),
    ("tokenizer*", "a tokenizer", "put the weights beside it, or name the folder that has them"),
)


def download(repo: str, revision: str | None, file: str | None = None) -> Path:
    """Brings what is needed of a hub repo, or this GGUF file of it, into the ordinary Hugging Face cache and returns
    its folder there.

    Files that are already there are not fetched again. UserError in one line for what the hub or the network says.
    """
    return asking(repo, revision, lambda: fetch(repo, revision, file))


def download_adapter(repo: str) -> Path:
    """Brings an adapter of PEFT into the ordinary Hugging Face cache, with the tokenizer that it may have, and returns
    its folder there. UserError as download."""
    return asking(repo, None, lambda: fetch_adapter(repo))


def asking(repo: str, revision: str | None, fetch: Callable[[], Path]) -> Path:
    """What `fetch` returns, which asks the hub."""
    for attempt in (1, 2):  # the client resumes a dropped connection by itself, but not one that was reset
        try:
            return fetch()
        except UserError:
            raise
        except Exception as error:  # the client raises what its HTTP library does, and each version has another
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
                raise
            refusal = what_the_hub_says(error, repo, revision)
            if refusal or attempt == 2:
                what = " ".join(str(error.__cause__ or error).split())[:200]
                raise UserError(
                    refusal
                    or f"cannot download {repo} ({type(error).__name__}: {what}); check the network and run the same"
                    " again, or convert a local folder with --checkpoint_dir"
                ) from error
    raise AssertionError("not reached")


def fetch(repo: str, revision: str | None, file: str | None) -> Path:
    """The config first, so that an unsupported model is refused before gigabytes are fetched, then the weights."""
    import huggingface_hub as hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        at = f"{repo} at {revision!r}" if revision else repo
        folder = cached_snapshot(repo, revision)
        try:
            names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
            if choose_gguf(names, at, file) is None:
                choose_weights(names, at, lambda index: read_index(folder / index))
        except UserError as error:
            raise UserError(f"the cache does not hold all of {at} ({error}); unset HF_HUB_OFFLINE") from error
        return folder
    hub.logging.set_verbosity_error()  # its retries go unmentioned, its failures are raised
    if not sys.stderr.isatty():
        hub.utils.disable_progress_bars()
    info = hub.HfApi().model_info(repo, revision=revision, files_metadata=True)
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []}

    def get(names: list[str], revision: str | None) -> Path:
        patterns = [glob.escape(name) for name in names]
        return Path(hub.snapshot_download(repo, revision=revision, allow_patterns=patterns, max_workers=4))

    def check_room(files: list[str], revision: str) -> None:
        missing = [name for name in files if not hub.try_to_load_from_cache(repo, name, revision=revision)]
        check_disk(sum(sizes[name] for name in missing), Path(constants.HF_HUB_CACHE))

    if gguf := choose_gguf(sizes, repo, file):
        check_room(gguf, info.sha)
        return get(gguf, revision)
    small = [*CONFIG_FILES, *quantized.CONFIG_FILES, *TOKENIZER_FILES, *IMAGE_FILES]
    indexes = [name for name in sizes if any(fnmatch.fnmatchcase(name, f"{form}.index.json") for form in WEIGHT_FILES)]
    refuse_other_kinds(sizes, repo)
    # By the name of the branch, which the cache then knows offline as well; what follows is of the same commit.
    folder = get([name for name in (*small, *indexes) if name in sizes], revision)
    files = choose_weights(sizes, repo, lambda index: read_index(folder / index)).files
    if "config.json" in sizes and "dim" not in (config := read_json(folder / "config.json")):  # MiniMind's first has it
        ModelConfig.from_hf(config)
        quantized.read_quantization(config, folder)
    check_room(files, folder.name)
    return get(files, folder.name)


def fetch_adapter(repo: str) -> Path:
    """What there is of the files of an adapter."""
    import huggingface_hub as hub
    from huggingface_hub import constants

    folder = cached_snapshot(repo, None) if constants.HF_HUB_OFFLINE else None
    if folder is None:
        hub.logging.set_verbosity_error()
        if not sys.stderr.isatty():
            hub.utils.disable_progress_bars()
        names = [glob.escape(name) for name in (*ADAPTER_FILES, *TOKENIZER_FILES)]
        folder = Path(hub.snapshot_download(repo, allow_patterns=names, max_workers=4))
    if not (folder / ADAPTER_FILES[0]).is_file():
        raise UserError(f"{repo} has no {ADAPTER_FILES[0]}, so it is no adapter of PEFT; name another as --adapter")
    return folder


def cached_snapshot(repo: str, revision: str | None) -> Path:
    """The folder of a repo in the cache. UserError when it is not there."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE, "models--" + repo.replace("/", "--"))
    branch = cache / "refs" / (revision or "main")
    commit = branch.read_text().strip() if branch.is_file() else revision
    folder = cache / "snapshots" / str(commit)
    if not folder.is_dir():
        at = f"{repo} at {revision!r}" if revision else repo
        raise UserError(f"the cache in {constants.HF_HUB_CACHE} does not hold {at}; unset HF_HUB_OFFLINE")
    return folder


def what_the_hub_says(error: Exception, repo: str, revision: str | None) -> str | None:
    """What to do about an error that was the hub's answer; None when it was the network's."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return f"{repo} is gated; ask for access at https://huggingface.co/{repo}, then set HF_TOKEN to your token"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no revision {revision!r}; see its branches and tags on the hub"
    if isinstance(error, (errors.RepositoryNotFoundError, errors.HFValidationError)):
        return f"{repo} is not a model on the hub, or a private one; check the name, for a private one set HF_TOKEN"
    if (status := getattr(getattr(error, "response", None), "status_code", None)) in (401, 403):
        return f"the hub refuses {repo} ({status}); set HF_TOKEN to a valid token"
    return None


def cached(folder: Path) -> tuple[Path, str | None]:
    """The snapshot that a folder of the Hugging Face cache means, and its ORG/NAME; any other folder and None.

    `models--ORG--NAME` stands for its branch main. UserError where that is not there and there are several snapshots.
    """
    path = folder.resolve()
    root = path.parent.parent if path.parent.name == "snapshots" else path
    name = re.fullmatch(r"models--(?:(.+?)--)?(.+)", root.name)  # the oldest repos have no ORG
    if not name or not (root / "snapshots").is_dir():
        return folder, None
    repo = f"{name[1] or 'local'}/{name[2]}"
    if path != root:
        return path, repo
    snapshots = sorted(entry for entry in (root / "snapshots").iterdir() if entry.is_dir())
    main = root / "refs" / "main"
    if main.is_file() and (snapshot := root / "snapshots" / main.read_text().strip()) in snapshots:
        return snapshot, repo
    if len(snapshots) != 1:
        found = ", ".join(snapshot.name for snapshot in snapshots) or "none"
        raise UserError(f"{folder} does not hold the branch main; name one of its snapshots ({found})")
    return snapshots[0], repo


@dataclass(frozen=True)
class Weights:
    """The weight files of a folder or repo."""

    files: list[str]
    index: str | None = None  # names the tensors that they have to hold; None where there is none, or it is of others
    missing: str | None = None  # a file that the index names and that is not there
    warning: str | None = None


def choose_weights(
    names: Iterable[str], where: object, read_index: Callable[[str], list[Path]], partial: bool = False
) -> Weights:
    """The weight files to read of a folder or repo: those of the first form in WEIGHT_FILES.

    Shards whose index is complete go before a single file. Where an index names files that are not there, a single file
    or other shards may be: a model that was uploaded again. `partial`: or some of the shards may hold all tensors.
    UserError, which says what is there, when there are none.
    """
    names = {name for name in names if "/" not in name}
    refuse_other_kinds(names, where)
    for form in WEIGHT_FILES:
        single = only_one(names, form, where)
        index = only_one(names, f"{form}.index.json", where)
        if index is None and single is None:
            continue
        if index is None:
            return Weights([single])
        files = [path.name for path in read_index(index)]
        missing = next((name for name in files if name not in names), None)
        if not missing:
            unread = f"warning: {single} is not read, but the shards that {index} names" if single else None
            return Weights(files, index, warning=unread)
        others = [single] if single else complete_shards(names, index.removesuffix(".index.json"))
        there = [name for name in files if name in names and partial]
        if not others and not there:
            raise UserError(f"{where} has no {missing}, though its {index} names it; get the complete model")
        read = others or there
        shown = read[0] if len(read) == 1 else f"{read[0]} to {read[-1]}"
        warning = f"warning: {index} names {missing}, which is not there; {shown} is read instead"
        return Weights(read, None if others else index, missing, warning)
    raise UserError(f"{where} has no weights (model.safetensors, pytorch_model.bin or .pth); take another")


def choose_gguf(names: Iterable[str], where: object, file: str | None) -> list[str] | None:
    """The GGUF file to read of a folder or repo, with its other shards if it has some: `file`, or the only one where
    there are no other weights. None where those are to be read. UserError, which lists what is there, for none or many.

    A projector of pictures (mmproj-*) is no language model, and does not count.
    """
    names = list(names)
    found: dict[str, list[str]] = defaultdict(list)
    for name in sorted(fnmatch.filter(names, "*.gguf")):
        if not name.rpartition("/")[2].startswith("mmproj"):
            shard = re.fullmatch(r"(.*)-\d{5}-(of-\d{5}\.gguf)", name)
            found["-".join(shard.groups()) if shard else name].append(name)
    if file is not None:
        chosen = next((shards for shards in found.values() if file in shards), None)
        if chosen is None:
            there = ", ".join(shards[0] for shards in found.values())
            advice = f", but {there}; name one of them as --file" if there else "; leave --file out"
            raise UserError(f"{where} has no GGUF file {file!r}{advice}")
        return [file, *(shard for shard in chosen if shard != file)]
    others = [name for name in names if "/" not in name]  # where alone other weights are looked for
    if not found or any(fnmatch.filter(others, f"{form}*") for form in WEIGHT_FILES):
        return None
    if len(found) > 1:
        there = ", ".join(shards[0] for shards in found.values())
        raise UserError(f"{where} holds several GGUF files ({there}); name one of them as --file")
    return next(iter(found.values()))


def only_one(names: Iterable[str], form: str, where: object) -> str | None:
    """The name that fits a form. UserError when several do."""
    found = sorted(fnmatch.filter(names, form))
    if len(found) > 1:
        raise UserError(
            f"{where} holds several {form.removeprefix('*')} files ({', '.join(found)}); name one as --checkpoint_dir"
        )
    return found[0] if found else None


def complete_shards(names: Iterable[str], name: str) -> list[str]:
    """The shards of `model.safetensors`, named model-00001-of-00003.safetensors and so on, if one set is complete."""
    stem, suffix = name.rsplit(".", 1)
    sets = defaultdict(list)
    for found in sorted(names):
        if shard := re.fullmatch(rf"{re.escape(stem)}-(\d+)-of-(\d+)\.{suffix}", found):
            sets[shard[2]].append(found)
    complete = [files for total, files in sets.items() if len(files) == int(total)]
    return complete[0] if len(complete) == 1 else []


def refuse_other_kinds(names: Iterable[str], where: object) -> None:
    """UserError, which calls it by its name, where something else than a checkpoint of a language model was given."""
    names = {name for name in names if "/" not in name} | {name.split("/")[0] for name in names}
    weights = [name for form in WEIGHT_FILES for name in fnmatch.filter(names, f"{form}*")]
    if weights and not ("params.json" in names and all(name.startswith("consolidated") for name in weights)):
        return
    for form, what, advice in OTHER_KINDS:
        if found := sorted(fnmatch.filter(names, form)):
            if isinstance(where, Path) and where.is_file():
                raise UserError(f"{where} is {what}; {advice}")
            raise UserError(f"{where} has no weights to convert, but {what} ({found[0]}); {advice}")
