"""Which files of a model are needed, and how they come from the Hugging Face hub.

    folder = download("meta-llama/Llama-3.2-1B", revision=None)     # a folder in the ordinary Hugging Face cache
    choose_weights(["model.safetensors", "pytorch_model.bin"], "here")

Every answer of the hub or the network that is not a file ends as one UserError that says what to do.
"""

import errno
import fnmatch
import glob
import sys
from collections.abc import Iterable
from pathlib import Path

from config import ModelConfig
from errors import UserError
from files import check_disk, read_json
from formats import gptq_awq
from weights import read_index

CONFIG_FILES = ("config.json", "generation_config.json")
TOKENIZER_FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
WEIGHT_FILES = (  # the first that is there is taken; gptq_model-4bit-128g.safetensors is AutoGPTQ's name
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
    "gptq_model-*g.safetensors", "gptq_model-*g.safetensors.index.json", "gptq_model-*g.bin",
    "gptq_model-*g.bin.index.json", "*.pth",
)  # fmt: skip


def download(repo: str, revision: str | None) -> Path:
    """Brings what is needed of a hub repo into the ordinary Hugging Face cache and returns its folder there.

    Files that are already there are not fetched again. UserError in one line for what the hub or the network says.
    """
    for attempt in (1, 2):  # the client resumes a dropped connection by itself, but not one that was reset
        try:
            return fetch(repo, revision)
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


def fetch(repo: str, revision: str | None) -> Path:
    """The config first, so that an unsupported model is refused before gigabytes are fetched, then the weights."""
    import huggingface_hub as hub

    hub.logging.set_verbosity_error()  # its retries go unmentioned, its failures are raised
    if not sys.stderr.isatty():
        hub.utils.disable_progress_bars()
    info = hub.HfApi().model_info(repo, revision=revision, files_metadata=True)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}

    def get(names: list[str]) -> Path:
        patterns = [glob.escape(name) for name in names]
        return Path(hub.snapshot_download(repo, revision=info.sha, allow_patterns=patterns, max_workers=4))

    weights = choose_weights(sizes, repo)
    small = [*CONFIG_FILES, *gptq_awq.CONFIG_FILES, *TOKENIZER_FILES]
    small += [weights] if weights.endswith(".json") else []
    folder = get([name for name in small if name in sizes])
    files = [file.name for file in read_index(folder / weights)] if weights in small else [weights]
    for name in files:
        if name not in sizes:
            raise UserError(f"{repo} has no {name}, though its {weights} names it; take another --revision")
    if "config.json" in sizes and "hidden_size" in (config := read_json(folder / "config.json")):
        ModelConfig.from_hf(config)
        gptq_awq.read_format(config, folder)
    missing = [name for name in files if not hub.try_to_load_from_cache(repo, name, revision=info.sha)]
    check_disk(sum(sizes[name] for name in missing), Path(hub.constants.HF_HUB_CACHE))
    return get(files)


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


def choose_weights(names: Iterable[str], where: object) -> str:
    """The weight file, or index, to read of a folder or repo: that of the first pattern in WEIGHT_FILES."""
    names = list(names)
    for pattern in WEIGHT_FILES:
        found = sorted(name for name in names if fnmatch.fnmatchcase(name, pattern) and "/" not in name)
        if len(found) > 1:
            kind = pattern.removeprefix("*")
            raise UserError(f"{where} holds several {kind} files ({', '.join(found)}); name one as --checkpoint_dir")
        if found:
            return found[0]
    raise UserError(f"{where} has no weights (model.safetensors, pytorch_model.bin or .pth); take another")
