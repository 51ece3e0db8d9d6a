"""`sagecompile bench block`: the block is what Transformers and diffusers write, each backend's figures its own."""

from __future__ import annotations

import json

import pytest
import torch
from support import ACCURATE, FAST, TOLERANCE, exact_attention, relative_error

from sagecompile.cli import main
from sagecompile.cli.bench.block import Block, angles, rotate_halves, rotate_pairs
from sagecompile.formats import FORMATS

B, N, H, D = 2, 12, 3, 16


def test_halves_are_rotated_as_transformers_does():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(hidden_size=H * D, num_attention_heads=H, max_position_embeddings=N)
    x, positions = torch.randn(B, H, N, D), torch.arange(N)[None]
    cos, sin = llama.LlamaRotaryEmbedding(config)(x, positions)
    ours = angles(N, D, "half", torch.float32, torch.device("cpu"))
    torch.testing.assert_close(ours["cos"], cos)
    torch.testing.assert_close(ours["sin"], sin)
    torch.testing.assert_close(rotate_halves(x, **ours), llama.apply_rotary_pos_emb(x, x, cos, sin)[0])


def test_pairs_are_rotated_as_diffusers_does():
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    x = torch.randn(B, N, H, D).bfloat16()
    cos, sin = embeddings.get_1d_rotary_pos_embed(D, torch.arange(N), use_real=True, freqs_dtype=torch.float32)
    ours = angles(N, D, "interleaved", x.dtype, torch.device("cpu"))
    torch.testing.assert_close(ours["cos"], cos)
    torch.testing.assert_close(ours["sin"], sin)
    expected = embeddings.apply_rotary_emb(x, (cos, sin), sequence_dim=1)
    assert torch.equal(rotate_pairs(x, **ours), expected)


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("rope", ["half", "interleaved"])
def test_a_block_is_norm_rope_and_attention(rope, is_causal):
    q, k, v = torch.randn(3, B, N, H, D)
    block = Block(D, rope, is_causal)
    block.q_norm.weight.uniform_(0.5, 2)
    cos_sin = angles(N, D, rope, torch.float32, torch.device("cpu"))

    def prepared(x, weight):
        x = x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt() * weight
        if rope == "half":
            return rotate_halves(x.transpose(1, 2), **cos_sin)
        return rotate_pairs(x, **cos_sin).transpose(1, 2)

    expected = exact_attention(
        prepared(q, block.q_norm.weight), prepared(k, block.k_norm.weight), v.transpose(1, 2), is_causal=is_causal
    )
    actual = block(q, k, v, **cos_sin)
    assert actual.shape == (B, N, H * D)
    assert relative_error(actual, expected.transpose(1, 2).flatten(2)) < 1e-5


def test_every_backend_has_a_row_with_its_own_decisions_and_error(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAGECOMPILE_POLICY", "never")  # the benchmark's own options go before it
    monkeypatch.setenv("SAGECOMPILE_MIN_SPEEDUP", "1000")  # so that `auto` keeps it
    size = ["--lengths", "48", "--head-dims", "64", "--heads", "2", "--dtypes", "float32"]
    assert main(["bench", "block", "--device", "cpu", *size, "--reference", "--json", "rows.json"]) == 0
    found = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == len(found)
    for is_causal in (False, True):
        rows = {row["what"]: row for row in found if row["is_causal"] == is_causal}
        assert list(rows) == ["inductor", *(f"always {name}" for name in FORMATS), "auto"]
        assert rows["inductor"]["ratio_to_inductor"] == 1 and rows["inductor"]["report"] is None
        assert rows["inductor"]["error"] < 1e-5
        assert rows["auto"]["report"]["kept"] == 1 and rows["auto"]["error"] < 1e-5
        for format in (ACCURATE, FAST):
            row = rows[f"always {format}"]
            assert 1e-4 < row["error"] < TOLERANCE[format] and row["decisions"].startswith(f"1 {format} by ")
            site = row["report"]["entries"][0]["site"]
            assert (site["q_len"], site["head_dim"], site["mask"]["ahead"]) == (48, 64, 0 if is_causal else None)


def test_what_only_the_reference_runs_is_left_out_unless_asked_for(capsys):
    size = ["--lengths", "16", "--head-dims", "64", "--heads", "1"]
    assert main(["bench", "block", "--device", "cpu", *size]) == 0
    out = capsys.readouterr().out
    assert f"always {FAST}: left out: the plain-torch reference would run it" in out and f"1 {FAST} by" not in out
