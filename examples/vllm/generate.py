"""The byte-level Llama in vLLM with sagecompile's pass: reads some of a novel, and continues it.

In: nothing. Out: the text, and what vLLM's log says of the layers that were rewritten.
"""

from pathlib import Path

from vllm import LLM, SamplingParams

BYTE_LM = Path(__file__).resolve().parent.parent / "byte_lm"


def main() -> None:
    passes = {"post_grad_custom_post_pass": "sagecompile.vllm_pass"}
    llm = LLM(
        str(BYTE_LM / "model"),
        dtype="float32",
        skip_tokenizer_init=True,  # a token is a byte
        gpu_memory_utilization=0.5,  # of the CPU's memory, on a CPU
        compilation_config={"use_inductor_graph_partition": True, "inductor_passes": passes},
    )
    text = (BYTE_LM / "heldout.txt").read_bytes()[:1500]
    how = SamplingParams(max_tokens=200, temperature=0.8, seed=0, detokenize=False)
    (answer,) = llm.generate([{"prompt_token_ids": list(text)}], how, use_tqdm=False)
    print(f"...{text[-200:].decode()}|{bytes(answer.outputs[0].token_ids).decode(errors='replace')}")


if __name__ == "__main__":
    main()
