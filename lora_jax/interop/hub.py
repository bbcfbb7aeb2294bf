"""Models by their names on the Hugging Face hub: `org/name`, or `org/name@revision`."""

import re
from pathlib import Path

import huggingface_hub

NAME = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w.-]+)(@(?P<revision>.+))?")
TEXT = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
WEIGHTS = ["model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"]


def is_name(path: str | Path) -> bool:
    """Whether something that is no path here reads as a name on the hub."""
    return bool(NAME.fullmatch(str(path))) and not str(path).endswith(".gguf")


def download(name: str, weights: bool = True) -> Path:
    """The folder of a model in the hub's cache, filled as far as it has to be.

    Nothing is asked of the network where `HF_HUB_OFFLINE` is set; `HF_HOME` says where the cache is.

    Args:
      name: `org/name`, or `org/name@revision` with a branch, a tag or a commit.
      weights: with the weights; without, the files that a text needs.

    Returns:
      The folder of one commit, whose hash is its name: the revision does not move while it is read.

    Raises:
      FileNotFoundError: neither the cache nor the hub has the model, or one may not read it.
    """
    match = NAME.fullmatch(name)
    if match is None:
        raise FileNotFoundError(f"{name}: not a name on the hub, which is org/name or org/name@revision")
    files = TEXT + WEIGHTS if weights else TEXT
    try:
        return Path(huggingface_hub.snapshot_download(match["repo"], revision=match["revision"], allow_patterns=files))
    except Exception as error:  # of the hub, of the HTTP library under it, or of the file system
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(
            f"{name}: there is no such folder here, and the hub did not give a model of that name ({said}); check the "
            "name, the network, HF_HUB_OFFLINE and, where a model is gated or private, HF_TOKEN"
        ) from None
