"""Names that are no folder here: a mistyped path is refused at once, before anything asks the hub again and again."""

import difflib
import functools
from pathlib import Path

from prefuse.engine.errors import UserError, first_line

FIRST_FILE = {"model": "config.json", "dataset": "README.md"}  # what transformers and datasets ask for first


def require_repository(name: str, kind: str = "model") -> None:
    """Raises UserError where `name` is neither a path that exists, nor in the hub's cache, nor on the hub.

    A path that looks like one (`./model`, `/data/model`, `runs/dpo/model`) is not asked for there. The hub gets one
    question: transformers and datasets ask for 30 s where there is no network.
    """
    path = Path(name)
    if path.exists():
        return
    hint = f"; did you mean {' or '.join(near)}?" if (near := _neighbours(path)) else ""
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or near:
        raise UserError(f"{kind} folder {name} does not exist{hint}")
    _require_on_hub(name, kind)


def _neighbours(path: Path) -> list[str]:
    """Model folders beside `path` whose names are like its own."""
    siblings = [str(other) for other in path.parent.glob("*") if (other / "config.json").is_file()]
    return difflib.get_close_matches(str(path), siblings, n=2)


@functools.cache  # the hub is asked once
def _require_on_hub(name: str, kind: str) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    beside = f"; the folder {parent} has no {Path(name).name}" if (parent := Path(name).parent).name else ""
    beside = beside if parent.is_dir() else ""
    refusal = f"{name} is no folder here{beside}, and no {kind} of the hub that can be read: "
    try:
        if _in_cache(name, kind):
            return
        url = huggingface_hub.hf_hub_url(name, FIRST_FILE[kind], repo_type=kind)
        huggingface_hub.get_hf_file_metadata(url)
    except errors.EntryNotFoundError:  # it is there: a data set without a page, a model that is one .gguf file
        return
    except errors.OfflineModeIsEnabled:
        raise UserError(f"{refusal}HF_HUB_OFFLINE is set, and it is not in the cache") from None
    except errors.GatedRepoError:
        raise UserError(f"{refusal}it is gated; ask for access on its page, then `hf auth login`") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{refusal}there is none of that name (a private one needs `hf auth login`)") from None
    except errors.HfHubHTTPError as error:
        if error.response is not None and error.response.status_code < 500 and error.response.status_code != 429:
            raise UserError(f"{refusal}{first_line(error)}") from None
        # the hub is busy: transformers and datasets ask again
    except Exception as error:  # no valid name; no network, in the words of whatever library asks
        raise UserError(f"{refusal}{first_line(error)}") from None


def _in_cache(name: str, kind: str) -> bool:
    import huggingface_hub

    if isinstance(huggingface_hub.try_to_load_from_cache(name, FIRST_FILE[kind], repo_type=kind), str):
        return True
    if kind == "model":
        return False
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE, name.replace("/", "___")).is_dir()
