"""What a checkpoint is and needs, without loading it."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from actors.device_memory import available_kv_bytes
from models.config import check_max_model_len, read_model_config
from models.errors import RingspanError
from models.page_pool import kv_bytes_per_token
from models.tokenizer import Tokenizer
from models.weights import weight_files, weights_bytes


def checkpoint_facts(
    directory: Path, dtype: str, kv_cache_dtype: str, max_model_len: int | None
) -> dict[str, Any]:
    """Return the facts; what is wrong is a sentence in ``errors``, by subject."""
    facts: dict[str, Any] = {"errors": {}, "architecture": None}
    errors = facts["errors"]
    try:
        config = read_model_config(directory)
        check_max_model_len(config, max_model_len)
    except RingspanError as error:
        errors["config"] = str(error)
        return facts
    weights_dtype = config.dtype if dtype == "auto" else getattr(torch, dtype)
    facts |= {
        "architecture": config.architecture,
        "dtype": str(weights_dtype).removeprefix("torch."),
        "max_model_len": max_model_len or config.max_position_embeddings,
        "is_len_asked": max_model_len is not None,
        "weights_bytes": weights_bytes(config, weights_dtype),
        "kv_bytes_per_token": kv_bytes_per_token(
            config,
            weights_dtype,
            kv_cache_dtype,  # type: ignore[arg-type]
        ),
        # As a rank of this host would reckon, before its weights are there.
        "free_bytes": available_kv_bytes(torch.device("cpu"), 1.0, 1),
    }
    try:
        facts["tensors"] = _count_tensors(weight_files(directory))
    except RingspanError as error:
        errors["weights"] = str(error)
    except (SafetensorError, OSError) as error:
        errors["weights"] = f"a file of the weights is damaged: {error}"
    try:
        tokenizer = Tokenizer.load(directory)
        facts["has_tokenizer"] = tokenizer is not None
        facts["has_template"] = tokenizer is not None and tokenizer.has_chat_template
    except RingspanError as error:
        errors["tokenizer"] = str(error)
    return facts


def _count_tensors(files: list[Path]) -> int:
    """Return how many tensors the files have; a file that is cut off raises."""
    count = 0
    for path in files:
        with safe_open(path, framework="pt") as file:
            count += len(file.keys())
    return count
