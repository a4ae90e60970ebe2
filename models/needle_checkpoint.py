"""Write the needle checkpoint as a directory that any engine for Llama models can load."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing

from models.errors import CheckpointError
from models.needle import NEEDLE_CONFIG, needle_weights
from models.needle_codes import BOS_ID, EOS_ID, PAD_ID, SPECIAL_TOKENS
from models.needle_layer import MAX_POSITIONS

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_GENERATION_CONFIG = {
    "bos_token_id": BOS_ID,
    "do_sample": False,
    "eos_token_id": EOS_ID,
    "pad_token_id": PAD_ID,
}
_TOKENIZER_CONFIG = {
    "bos_token": SPECIAL_TOKENS[BOS_ID - 256],
    "clean_up_tokenization_spaces": False,
    "eos_token": SPECIAL_TOKENS[EOS_ID - 256],
    "model_max_length": MAX_POSITIONS,
    "pad_token": SPECIAL_TOKENS[PAD_ID - 256],
    "tokenizer_class": "PreTrainedTokenizerFast",
}
_FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


def write_needle_checkpoint(directory: Path, dtype: str = "float32") -> None:
    """Write weights (8.5 MB in float32), configuration and tokenizer into `directory`.

    The directory is made if it is missing; an older needle checkpoint in it is replaced.

    Raises:
        CheckpointError: `dtype` is not float32, bfloat16 or float16, or `directory` is a file
            or holds other files.
    """
    if dtype not in _DTYPES:
        raise CheckpointError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    _claim_directory(directory)
    weights = {name: tensor.to(_DTYPES[dtype]) for name, tensor in needle_weights().items()}
    path = directory / "model.safetensors"
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors lets nobody else read it
    _write_json(directory / "config.json", NEEDLE_CONFIG | {"dtype": dtype})
    _write_json(directory / "generation_config.json", _GENERATION_CONFIG)
    _write_json(directory / "tokenizer_config.json", _TOKENIZER_CONFIG)
    _byte_tokenizer().save(str(directory / "tokenizer.json"))


def _claim_directory(directory: Path) -> None:
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory} is a file; name a new or empty directory")
    directory.mkdir(parents=True, exist_ok=True)
    others = sorted({path.name for path in directory.iterdir()} - _FILES)
    if others:
        raise CheckpointError(
            f"{directory} already holds other files ({others[0]}, ...); "
            "name a new or empty directory for the needle checkpoint"
        )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _byte_tokenizer() -> Tokenizer:
    """Return a tokenizer whose id for a byte is its value, and which puts <bos> first."""
    vocab = {letter: byte for byte, letter in enumerate(_byte_letters())}
    vocab |= {name: 256 + index for index, name in enumerate(SPECIAL_TOKENS)}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL_TOKENS])
    bos = SPECIAL_TOKENS[BOS_ID - 256]
    tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, BOS_ID)]
    )
    return tokenizer


def _byte_letters() -> list[str]:
    """Return the letter by which byte-level tokenizers write each byte, ``[256]``.

    Printable bytes stand for themselves, the others for the letters from U+0100 on.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    unprintable = [byte for byte in range(256) if byte not in printable]
    shifted = {byte: chr(256 + index) for index, byte in enumerate(unprintable)}
    return [shifted.get(byte, chr(byte)) for byte in range(256)]
