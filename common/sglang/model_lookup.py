"""Is there such a model? Asked in a second, before SGLang spends a minute on finding out."""

import os
from pathlib import Path


def look_up_model(model: str, revision: str | None = None) -> None:
    """Make sure that `model` is a model's folder, a file of weights, or known to the Hugging Face hub.

    Raises:
        LookupError: it is none of them; the message says why, in one line.
    """
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file() and not (path / "params.json").is_file():
            raise LookupError("the folder holds no model (no config.json)")
    elif path.is_file() or "://" in model or os.getenv("SGLANG_USE_MODELSCOPE"):
        pass  # SGLang's to judge: a GGUF file, an object store, another hub
    elif path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise LookupError("no such folder")
    else:
        _look_up_on_hub(model, revision)


def _look_up_on_hub(model: str, revision: str | None) -> None:
    import httpx
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        if not isinstance(try_to_load_from_cache(model, "config.json", revision=revision), str):
            HfApi().model_info(model, revision=revision, timeout=10)
    except (HFValidationError, RepositoryNotFoundError):
        raise LookupError("no such folder, and no such model on the Hugging Face hub") from None
    except RevisionNotFoundError:
        raise LookupError(f"the Hugging Face hub has no revision {revision} of it") from None
    except (httpx.HTTPError, OSError) as error:
        raise LookupError(f"no such folder, and the Hugging Face hub is out of reach ({error})") from error
