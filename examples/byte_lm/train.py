"""Train a byte-level Llama of 3.9 million parameters on five of Jane Austen's novels, in minutes on one GPU.

In: the folder that prepare_text.py wrote. Out: config.json, model.safetensors (bfloat16) and training.json in a folder.
Why: a demo of attention should run a model that was trained, so that a lost bit shows as worse text and not as noise.
"""

import argparse
import copy
import datetime
import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from trigram import Trigram

HERE = Path(__file__).resolve().parent
CONTEXT = 2048
EVALUATIONS = 40

# While it is being compiled, Transformers builds a mask tensor, and a mask rules flash attention out. For an attention
# that it knows no mask function for, it builds none: so the same SDPA under a new name stays `is_causal=True`.
MASKLESS_SDPA = "maskless_sdpa"
AttentionInterface.register(MASKLESS_SDPA, sdpa_attention_forward)


@dataclass(frozen=True)
class Recipe:
    """How to train: everything that changes the weights, apart from the text and the GPU."""

    minutes: float = 4.5
    """Wall-clock limit; it starts after the first step, which compiles."""
    steps: int | None = None
    """Stop after this many steps instead, for a smoke test."""
    batch: int = 64
    """Sequences of 2048 bytes a step."""
    learning_rate: float = 2e-3
    """Peak: reached after 2% of the run, then a cosine down to a hundredth of it."""
    weight_decay: float = 0.3
    """High, because the text is read a few hundred times; it spares norms and embeddings."""
    dropout: float = 0.2
    """On what each attention and each MLP adds to the residual stream."""
    average_decay: float = 0.998
    """Of the running average of the weights, which is what gets evaluated and saved."""
    seed: int = 0


def new_model(device: str) -> LlamaForCausalLM:
    """Build the model: 6 layers of width 256, 4 query heads of 64 on 2 KV heads, tied embeddings."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=576,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).to(device)
    model.set_attn_implementation(MASKLESS_SDPA)
    return model


def add_dropout(model: LlamaForCausalLM, probability: float) -> None:
    """Drop elements of each branch's output while training: Llama itself has no such dropout."""

    def drop(module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        return F.dropout(output, probability, module.training)

    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.down_proj.register_forward_hook(drop)


def draw_batch(text: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """Cut sequences out of text (bytes,) at random places. Returns inputs and targets, (batch, CONTEXT) each."""
    starts = torch.randint(len(text) - CONTEXT, (batch, 1), device=text.device)
    sequences = text[starts + torch.arange(CONTEXT + 1, device=text.device)].long()
    return sequences[:, :-1], sequences[:, 1:]


def mean_nats(model: LlamaForCausalLM, inputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of the model on one batch, in nats a byte, computed in bfloat16 from the model's own weights."""
    with torch.autocast(inputs.device.type, torch.bfloat16):
        logits = model(input_ids=inputs, use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


@torch.no_grad()
def bits_per_byte(model: LlamaForCausalLM, text: Tensor, batch: int = 16) -> float:
    """Score text (n * CONTEXT + 1,) in n separate blocks: a byte is predicted from those before it in its block."""
    model.eval()
    inputs, targets = text[:-1].long().view(-1, CONTEXT), text[1:].long().view(-1, CONTEXT)
    batches = zip(inputs.split(batch), targets.split(batch), strict=True)
    nats = torch.stack([len(x) * mean_nats(model, x, y) for x, y in batches]).sum()
    return nats.item() / len(inputs) / math.log(2)


def new_optimizer(model: LlamaForCausalLM, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW that decays the matrices of the layers and nothing else."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98), fused=True)


def rate_factor(progress: float) -> float:
    """The learning rate as a fraction of its peak: up in a line over 2% of the run, down along a cosine to 1%."""
    return min(progress / 0.02 + 0.01, 0.505 + 0.495 * math.cos(math.pi * progress))


def progress_of_run(recipe: Recipe) -> Iterator[float]:
    """Yield how much of the run is done, from 0 to 1, once before each step and once at the end."""
    step, started = 0, 0.0
    while True:
        if recipe.steps is not None:
            progress = step / recipe.steps
        else:
            progress = (time.monotonic() - started) / (60 * recipe.minutes) if started else 0.0
        yield min(progress, 1.0)
        started = started or time.monotonic()
        step += 1


def update_weights(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, learning_rate: float) -> None:
    """Take one optimizer step along the gradient of `loss`, clipped to norm 1. Nothing here waits for the device."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, step: int, decay: float) -> None:
    """Move the averaged weights towards the model's; early on the average is shorter, so the first weights fade."""
    weight = 1 - min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), weight)


def train(
    model: LlamaForCausalLM, text: Tensor, recipe: Recipe, validate: Callable[[LlamaForCausalLM], float]
) -> tuple[LlamaForCausalLM, dict[str, float]]:
    """Train, and return the averaged weights of the moment at which `validate` was lowest, with what happened."""
    average = best = copy.deepcopy(model)
    add_dropout(model.train(), recipe.dropout)
    optimizer = new_optimizer(model, recipe)
    loss_of = torch.compile(mean_nats, fullgraph=True, dynamic=False, disable=text.device.type == "cpu")
    lowest, evaluations, loss, started = math.inf, 0, torch.zeros(()), time.monotonic()
    for step, progress in enumerate(progress_of_run(recipe)):
        if step and progress >= min(1.0, (evaluations + 1) / EVALUATIONS):
            evaluations, bits = int(progress * EVALUATIONS), validate(average)
            if bits < lowest:
                lowest, best, best_step = bits, copy.deepcopy(average), step
            train_bits, seconds = loss.item() / math.log(2), time.monotonic() - started
            print(f"step {step:6d}  {seconds:5.0f} s  train {train_bits:.3f}  validation {bits:.4f}", flush=True)
        if progress == 1.0:
            break
        loss = loss_of(model, *draw_batch(text, recipe.batch))
        update_weights(model, optimizer, loss, recipe.learning_rate * rate_factor(progress))
        update_average(average, model, step, recipe.average_decay)
    return best, {
        "steps": step,
        "bytes_seen": step * recipe.batch * CONTEXT,
        "seconds": round(time.monotonic() - started, 1),
        "best_step": best_step,
        "validation_bits_per_byte": lowest,
    }


def read_text(path: Path, device: str, limit: int | None) -> Tensor:
    """Read a text to score, `limit` bytes of it if given, cut to a first byte and whole blocks: (n * CONTEXT + 1,)."""
    text = path.read_bytes()[:limit]
    blocks = (len(text) - 1) // CONTEXT
    return torch.frombuffer(bytearray(text[: blocks * CONTEXT + 1]), dtype=torch.uint8).to(device)


def describe_machine(device: str) -> dict[str, str]:
    """Name the device and the versions that made the weights."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=HERE / "data", help="folder that prepare_text.py wrote")
    parser.add_argument("--out", type=Path, default=HERE / "model", help="folder for the model")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--score-bytes", type=int, help="score only this much text, for a smoke test")
    parser.add_argument("--minutes", type=float, default=Recipe.minutes, help="wall-clock limit (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="stop after this many steps instead")
    parser.add_argument("--batch", type=int, default=Recipe.batch, help="sequences a step (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=Recipe.learning_rate)
    parser.add_argument("--weight-decay", type=float, default=Recipe.weight_decay)
    parser.add_argument("--dropout", type=float, default=Recipe.dropout)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    given, device = vars(arguments), arguments.device
    recipe = Recipe(**{name: given[name] for name in Recipe.__dataclass_fields__ if name in given})
    train_bytes = (arguments.data / "train.bin").read_bytes()
    text = torch.frombuffer(bytearray(train_bytes), dtype=torch.uint8).to(device)
    validation, heldout = (
        read_text(arguments.data / name, device, arguments.score_bytes) for name in ("validation.bin", "heldout.bin")
    )
    torch.manual_seed(recipe.seed)
    model = new_model(device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters on {device}; {len(text):,} bytes to train on", flush=True)

    best, run = train(model, text, recipe, lambda average: bits_per_byte(average, validation))
    best.to(torch.bfloat16).save_pretrained(arguments.out)
    stored = LlamaForCausalLM.from_pretrained(arguments.out, dtype=torch.bfloat16).to(device)
    figures = {
        "heldout_bits_per_byte": bits_per_byte(stored, heldout),
        "trigram_heldout_bits_per_byte": Trigram(train_bytes).bits_per_byte(bytes(heldout.cpu().numpy())),
        "heldout_bytes_scored": len(heldout) - 1,
    }
    report = (
        {"schema": 1, "parameters": parameters} | figures | run | describe_machine(device) | {"recipe": asdict(recipe)}
    )
    (arguments.out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
