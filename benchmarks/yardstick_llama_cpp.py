"""An outside yardstick: llama.cpp's prefill of the width-768 model in float32, on the same cores.

Needs `pip install llama-cpp-python gguf` (the binding builds from source), in an
environment of its own if need be; of this project it uses nothing.

    python benchmarks/yardstick_llama_cpp.py CHECKPOINT --lengths 1024,4096,8192 --threads 2
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np


def main() -> None:
    """Convert the checkpoint, time prefills, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--lengths", default="1024,4096,8192")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    lengths = [int(word) for word in options.lengths.split(",")]
    with tempfile.TemporaryDirectory() as directory:
        gguf_file = Path(directory) / "model.gguf"
        write_gguf(options.checkpoint, gguf_file)
        model = _load(gguf_file, max(lengths) + 1, options.threads)
        rng = np.random.default_rng(0)
        results = []
        for length in lengths:
            ids = rng.integers(0, 256, length).tolist()
            seconds = [_prefill_s(model, ids) for _ in range(options.repeats + 1)][1:]
            results.append(
                {"tokens": length, "median_s": statistics.median(seconds), "seconds": seconds}
            )
    print(json.dumps({"engine": "llama.cpp", "threads": options.threads, "runs": results}))


def write_gguf(checkpoint: Path, path: Path) -> None:
    """Write a Llama checkpoint of one safetensors file as float32 GGUF."""
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((checkpoint / "config.json").read_text())
    writer = gguf.GGUFWriter(str(path), "llama")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("no_vocab")
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        array = tensor.astype(np.float32)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            # llama.cpp turns neighbouring dims, transformers the two halves.
            count = heads if "q_proj" in name else kv_heads
            array = array.reshape(count, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(_gguf_name(name), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name: str) -> str:
    parts = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers.": "blk.",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for theirs, ours in parts.items():
        name = name.replace(theirs, ours)
    return name


def _load(path: Path, context: int, threads: int) -> Any:
    from llama_cpp import Llama

    return Llama(
        model_path=str(path),
        n_ctx=context,
        n_batch=2048,
        n_threads=threads,
        n_threads_batch=threads,
        flash_attn=True,
        type_k=0,  # float32, as everywhere here
        type_v=0,
        verbose=False,
    )


def _prefill_s(model: Any, ids: list[int]) -> float:
    model.reset()
    start_s = time.perf_counter()
    model.eval(ids)
    return time.perf_counter() - start_s


if __name__ == "__main__":
    main()
