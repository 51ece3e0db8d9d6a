"""One vLLM engine in a process of its own: `python engine.py WHAT.json RESULT.json`.

In: the arguments of `vllm.LLM`, prompts as token ids. Out: for each prompt the greedy tokens with the two best
log-probabilities at each, or the prompt's own, or its embedding; what our kernels did, by layer; the reports; what runs
attention in this process and in that of the worker, which is the same unless VLLM_ENABLE_V1_MULTIPROCESSING is 1.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}  # of `attention`, to the worker


def attention(worker: Any = None) -> dict[str, Any]:
    """Of the process that it is called in: the class of CPU_ATTN, the worker's layers', what of ours is there."""
    import torch
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    layers = worker.model_runner.compilation_config.static_forward_context.values() if worker is not None else ()
    return {
        "process": os.getpid(),
        "cpu_attn": _name(AttentionBackendEnum.CPU_ATTN.get_class()),
        "layers": [[_name(layer.attn_backend), _name(type(layer.impl))] for layer in layers],
        "modules": sorted(name for name in sys.modules if name.partition(".")[0] == "sagecompile"),
        "has_op": hasattr(torch.ops.sagecompile, "unified_attention_with_output"),
    }


def _name(of: type[Any]) -> str:
    return f"{of.__module__}.{of.__qualname__}"


def main(what: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    from sagecompile import report

    with report.recording() as reports:
        llm = LLM(**what["llm"], disable_log_stats=False)
    prompts = [{"prompt_token_ids": ids} for ids in what["prompts"]]
    if what["llm"].get("runner") == "pooling":
        results: list[Any] = [out.outputs.embedding for out in llm.embed(prompts, use_tqdm=False)]
    else:
        how = SamplingParams(max_tokens=what["max_tokens"], temperature=0, detokenize=False, logprobs=2)
        outputs = [out.outputs[0] for out in llm.generate(prompts, how, use_tqdm=False)]
        results = [{"tokens": list(out.token_ids), "best": [_best(at) for at in out.logprobs]} for out in outputs]
        scored = [{"prompt_token_ids": ids} for ids in what.get("scored", [])]
        how = SamplingParams(max_tokens=1, detokenize=False, prompt_logprobs=0)
        for out, prompt in zip(llm.generate(scored, how, use_tqdm=False), scored, strict=True):
            ids = prompt["prompt_token_ids"]
            results.append([at[token].logprob for at, token in zip(out.prompt_logprobs[1:], ids[1:], strict=True)])
    preempted = [one.value for one in llm.get_metrics() if one.name == "vllm:num_preemptions"]
    found = {"results": results, "preemptions": sum(preempted), "done": {}, "seen": {}}
    found["attention"] = [attention(), *llm.collective_rpc(attention)]
    found["reports"] = [one.to_dict() for one in reports]
    if "sagecompile.vllm.counters" in sys.modules:
        counts = sys.modules["sagecompile.vllm.counters"].counts
        found |= {"done": dict(counts.done), "seen": dict(counts.seen)}
    return found


def _best(at: dict[int, Any]) -> list[float]:
    """The two largest log-probabilities of a position."""
    return sorted((one.logprob for one in at.values()), reverse=True)[:2]


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
