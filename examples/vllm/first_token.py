"""Time to the first token and decoding of 16 layers of Llama-8B's shape in vLLM on a GPU, by what runs the attention.

In: vllm, pass or custom; how many tokens a step takes (fewer than the prompt: it goes in chunks); prompt lengths. Out:
milliseconds to the first token of one prompt, medians of 5 or 9, and tokens a second with 1 and 64 requests, as JSON.
One way a process: `for way in vllm pass custom; do python examples/vllm/first_token.py $way; done`
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

from vllm import LLM, SamplingParams

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 14336,
    "vocab_size": 32000,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
PASS = {
    "use_inductor_graph_partition": True,
    "inductor_passes": {"post_grad_custom_post_pass": "sagecompile.vllm_pass"},
}
WAYS = {"vllm": ({}, {}), "pass": (PASS, {}), "custom": ({}, {"attention_backend": "CUSTOM"})}
"""By name: compilation config, other arguments."""


def start(way: str, longest: int, step_tokens: int) -> LLM:
    compilation, others = WAYS[way]
    folder = Path(tempfile.mkdtemp(prefix="llama-"))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return LLM(
        str(folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=longest + 1000,
        max_num_batched_tokens=step_tokens,
        max_num_seqs=64,
        gpu_memory_utilization=0.5,
        enable_prefix_caching=False,
        compilation_config={"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64], **compilation},
        **others,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("--step-tokens", type=int, default=66000, help="default 66000: whole prompts")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384, 32768, 65000])
    arguments = parser.parse_args()
    llm = start(arguments.way, max(arguments.lengths), arguments.step_tokens)
    numbers = random.Random(0)

    def seconds(count: int, length: int, tokens: int) -> float:
        prompts = [{"prompt_token_ids": [numbers.randrange(10, 31000) for _ in range(length)]} for _ in range(count)]
        how = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True, detokenize=False)
        begin = time.perf_counter()
        llm.generate(prompts, how, use_tqdm=False)
        return time.perf_counter() - begin

    first_token_ms, tokens_per_s = {}, {}
    for length in arguments.lengths:
        seconds(1, length, 1)
        runs = 9 if length <= 8192 else 5
        first_token_ms[length] = round(1e3 * statistics.median(seconds(1, length, 1) for _ in range(runs)), 2)
    for requests in (1, 64):
        seconds(requests, 128, 8)
        tokens_per_s[requests] = round(
            128 * requests / statistics.median(seconds(requests, 128, 128) for _ in range(3))
        )
    print(json.dumps({"way": arguments.way, "first_token_ms": first_token_ms, "tokens_per_s": tokens_per_s}))


if __name__ == "__main__":
    main()
