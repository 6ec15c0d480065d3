"""Draft heads in files: round trips, other people's EAGLE-3 checkpoints against an independent reference, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_llama
from safetensors.torch import load_file, save_file

from atlas_rl.drafters import checkpoints
from atlas_rl.drafters.checkpoints import load_head, save_head
from atlas_rl.drafters.eagle import EagleDrafter, EagleHead
from atlas_rl.drafters.heads import Windows
from atlas_rl.drafters.recurrent_head import RecurrentHead
from atlas_rl.engine.policy_view import PolicyView

SIZE, HEADS, KV_HEADS, HEAD_DIM, INNER, VOCAB, DRAFT_VOCAB, EPS, THETA = 64, 4, 2, 16, 96, 97, 40, 1e-5, 5000.0
LENGTH = 9
LAYER = {
    "model_type": "llama",
    "hidden_size": SIZE,
    "intermediate_size": INNER,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "rms_norm_eps": EPS,
    "rope_theta": THETA,
    "vocab_size": VOCAB,
}


def make_head(policy, **options) -> EagleHead:
    return EagleHead.for_policy(policy.config, (0, 2, 3), **options)


def foreign_tensors(layer: str) -> dict[str, torch.Tensor]:
    """Random weights under the names of SpecForge (`midlayer`) or speculators (`layers.0`)."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.2

    used = torch.randperm(VOCAB, generator=generator)[:DRAFT_VOCAB].sort().values
    tensors = {
        "fc.weight": normal(SIZE, 3 * SIZE),
        "norm.weight": 1 + normal(SIZE),
        "lm_head.weight": normal(DRAFT_VOCAB, SIZE),
        "d2t": used - torch.arange(DRAFT_VOCAB),
        "t2d": torch.zeros(VOCAB, dtype=torch.bool).index_fill_(0, used, True),
        f"{layer}.self_attn.q_proj.weight": normal(HEADS * HEAD_DIM, 2 * SIZE),
        f"{layer}.self_attn.k_proj.weight": normal(KV_HEADS * HEAD_DIM, 2 * SIZE),
        f"{layer}.self_attn.v_proj.weight": normal(KV_HEADS * HEAD_DIM, 2 * SIZE),
        f"{layer}.self_attn.o_proj.weight": normal(SIZE, HEADS * HEAD_DIM),
        f"{layer}.mlp.gate_proj.weight": normal(INNER, SIZE),
        f"{layer}.mlp.up_proj.weight": normal(INNER, SIZE),
        f"{layer}.mlp.down_proj.weight": normal(SIZE, INNER),
    }
    norms = ("input_layernorm", "hidden_norm", "post_attention_layernorm")
    return tensors | {f"{layer}.{norm}.weight": 1 + normal(SIZE) for norm in norms}


def write(folder: Path, config: dict, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def specforge(folder: Path, **fields) -> Path:
    aux = {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": [0, 1, 2]}
    config = LAYER | {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": DRAFT_VOCAB, "eagle_config": aux}
    return write(folder, config | fields, foreign_tensors("midlayer"))


def speculators(folder: Path, **fields) -> Path:
    config = {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "transformer_layer_config": LAYER,
        "draft_vocab_size": DRAFT_VOCAB,
        "norm_before_residual": False,
        "eagle_aux_hidden_state_layer_ids": [1, 2, 3],
    }
    return write(folder, config | fields, foreign_tensors("layers.0"))


def reference_logits(
    tensors: dict[str, torch.Tensor], embeds_ND: torch.Tensor, aux_N3D: torch.Tensor, norm_before_residual: bool
) -> torch.Tensor:
    """vLLM's llama_eagle3.py, step by step: `combine_hidden_states`, `LlamaDecoderLayer`, `compute_logits`."""
    w = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in tensors.items()}

    def rms_norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * w[f"{name}.weight"]

    def rope(x_HND: torch.Tensor) -> torch.Tensor:
        frequencies = THETA ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        angles = torch.arange(x_HND.shape[1])[:, None] * frequencies
        first, second = x_HND[..., : HEAD_DIM // 2], x_HND[..., HEAD_DIM // 2 :]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    hidden = aux_N3D.flatten(1) @ w["fc.weight"].T
    embeds = rms_norm(embeds_ND, "layers.0.input_layernorm")
    if norm_before_residual:
        hidden = rms_norm(hidden, "layers.0.hidden_norm")
        residual = hidden
    else:
        residual = hidden
        hidden = rms_norm(hidden, "layers.0.hidden_norm")
    both = torch.cat([embeds, hidden], dim=-1)
    heads = {}
    for name, count in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
        projected = both @ w[f"layers.0.self_attn.{name}_proj.weight"].T
        heads[name] = projected.view(-1, count, HEAD_DIM).transpose(0, 1).repeat_interleave(HEADS // count, dim=0)
    mixed = F.scaled_dot_product_attention(rope(heads["q"]), rope(heads["k"]), heads["v"], is_causal=True)
    attended = mixed.transpose(0, 1).flatten(1) @ w["layers.0.self_attn.o_proj.weight"].T
    residual = attended + residual
    hidden = rms_norm(residual, "layers.0.post_attention_layernorm")
    gate, up = (hidden @ w[f"layers.0.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
    residual = (F.silu(gate) * up) @ w["layers.0.mlp.down_proj.weight"].T + residual
    logits = rms_norm(residual, "norm") @ w["lm_head.weight"].T
    scattered = logits.new_full((len(logits), VOCAB), float("-inf"))
    scattered[:, torch.arange(DRAFT_VOCAB) + w["d2t"]] = logits
    return scattered


def our_logits(head: EagleHead, policy, token_ids_N: torch.Tensor, aux_N3D: torch.Tensor) -> torch.Tensor:
    """Of the first step from every start, by the unroll and the drafter's output head."""
    drafter = EagleDrafter(head)
    drafter.bind(PolicyView(policy))
    num = len(token_ids_N) - 1
    windows = Windows(
        token_ids_BW=torch.cat([token_ids_N, token_ids_N[-1:]])[None],
        hidden_BWD=torch.zeros(1, num + 1, SIZE),
        tapped_BWLD=torch.cat([aux_N3D, aux_N3D[-1:]])[None],
        positions_B=torch.tensor([0]),
        prompt_lens_B=torch.tensor([1]),
        seeds_B=torch.tensor([0]),
        lens_B=torch.tensor([num + 1]),
    )
    states = []
    head.norm.register_forward_pre_hook(lambda module, args: states.append(args[0]))
    head.unroll(windows, 1, policy.get_input_embeddings().weight)
    return drafter.logits(states[0][0])


@pytest.mark.parametrize("norm_before_residual", [False, True])
@pytest.mark.parametrize("make", [specforge, speculators])
def test_foreign_checkpoints_compute_what_vllm_computes(tmp_path, make, norm_before_residual):
    folder = make(tmp_path / "head", norm_before_residual=norm_before_residual)
    policy = tiny_llama(num_hidden_layers=4)
    head = load_head(folder)
    assert head.layers == (0, 1, 2)  # the outputs of these, in either layout
    torch.manual_seed(3)
    token_ids, aux = torch.randint(VOCAB, (LENGTH,)), torch.randn(LENGTH - 1, 3, SIZE)
    embeds = policy.get_input_embeddings().weight[token_ids[1:]]
    with torch.no_grad():
        expected = reference_logits(load_file(folder / "model.safetensors"), embeds, aux, norm_before_residual)
        got = our_logits(head, policy, token_ids, aux)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["specforge", "speculators"])
@pytest.mark.parametrize("own", [True, False], ids=["own head", "live head"])
def test_round_trip(tmp_path, layout, own):
    policy = tiny_llama(num_hidden_layers=4)
    options = {"draft_vocab_size": 20, "own_embedding": True, "norm_before_residual": True} if own else {}
    head = make_head(policy, **options)
    if own:
        head.draft_ids = torch.arange(20) * 3 + 1
    weight = policy.get_output_embeddings().weight
    for _ in range(2):  # the second time over the first
        save_head(head, tmp_path / "head", output_head=weight, policy_path="some/policy", layout=layout)
    again = load_head(tmp_path / "head")
    assert [p.name for p in tmp_path.iterdir()] == ["head"], "nothing is left behind"
    assert again.config_dict() == head.config_dict()
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), head.state_dict().values(), strict=True))
    if own:
        assert torch.equal(again.draft_ids, head.draft_ids)


@pytest.mark.parametrize("layout", ["specforge", "speculators"])
def test_what_is_written_is_what_other_engines_read(tmp_path, layout):
    policy = tiny_llama(num_hidden_layers=4)
    head = make_head(policy)
    weight = policy.get_output_embeddings().weight
    save_head(head, tmp_path / "head", output_head=weight, layout=layout)
    config = json.loads((tmp_path / "head" / "config.json").read_text())
    tensors = load_file(tmp_path / "head" / "model.safetensors")
    example = foreign_tensors("midlayer" if layout == "specforge" else "layers.0")
    assert tensors.keys() == example.keys()
    assert torch.equal(tensors["lm_head.weight"], weight.detach())
    assert not tensors["d2t"].any() and tensors["t2d"].all() and tensors["d2t"].dtype == torch.int64
    assert config["eagle_aux_hidden_state_layer_ids"] == [1, 3, 4]  # vLLM's: the layers whose inputs are read
    if layout == "specforge":
        assert config["architectures"] == ["LlamaForCausalLMEagle3"]
        assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 2, 3]  # SGLang's: whose outputs
        assert config["rope_theta"] == 10000.0 and config["draft_vocab_size"] == config["vocab_size"] == VOCAB
    else:
        assert config["transformer_layer_config"]["rope_theta"] == 10000.0
        assert config["speculators_config"]["algorithm"] == "eagle3" and config["norm_before_residual"] is False


def test_our_own_kinds_are_found_by_name(tmp_path):
    head = RecurrentHead.for_policy(PolicyView(tiny_llama()))
    save_head(head, tmp_path / "head")
    before = torch.get_rng_state()
    again = load_head(tmp_path / "head")
    assert torch.equal(torch.get_rng_state(), before), "the trainer's random numbers are its own"
    assert isinstance(again, RecurrentHead) and again.config_dict() == head.config_dict()
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), head.state_dict().values(), strict=True))
    write(tmp_path / "other", {"atlas_kind": "unheard-of"}, {})
    with pytest.raises(ValueError, match="'unheard-of' is unknown; known are eagle, recurrent"):
        load_head(tmp_path / "other")
    write(tmp_path / "newer", head.config_dict() | {"atlas_kind": "recurrent", "depth": 2}, {})
    with pytest.raises(ValueError, match="does not describe a recurrent head.*depth"):
        load_head(tmp_path / "newer")


def drop(name: str):
    return lambda tensors: tensors.pop(name)


def put(name: str, tensor: torch.Tensor):
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (drop("fc.weight"), "tensor fc.weight has shape none"),
        (put("fc.bias", torch.zeros(SIZE)), "tensor fc.bias"),
        (put("norm.weight", torch.zeros(3)), r"tensor norm.weight has shape \[3\].*says \[64\]"),
        (put("norm.weight", torch.full((SIZE,), float("nan"))), "tensor norm.weight holds NaN"),
        (put("d2t", torch.full((DRAFT_VOCAB,), VOCAB)), "d2t"),
        (put("d2t", torch.zeros(3, dtype=torch.int64)), "d2t"),
    ],
)
def test_faulty_tensors_are_named(tmp_path, change, fault):
    folder = specforge(tmp_path / "head")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=fault) as error:
        load_head(folder)
    assert "model.safetensors" in str(error.value)


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "no draft head"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": 2}, "num_hidden_layers is 2"),
        ({"attention_bias": True}, "attention_bias"),
        ({"norm_before_fc": True}, "norm_before_fc"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' cannot be run"),
    ],
)
def test_faulty_configs_are_named(tmp_path, fields, fault):
    with pytest.raises(ValueError, match=fault) as error:
        load_head(specforge(tmp_path / "head", **fields))
    assert "config.json" in str(error.value)


def test_speculators_have_to_say_where_the_residual_comes_from(tmp_path):
    folder = speculators(tmp_path / "head")
    config = json.loads((folder / "config.json").read_text())
    del config["norm_before_residual"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no norm_before_residual"):
        load_head(folder)


def test_damaged_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="config.json cannot be read"):
        load_head(tmp_path / "nowhere")
    folder = specforge(tmp_path / "head")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="model.safetensors cannot be read"):
        load_head(folder)
    weights.unlink()
    with pytest.raises(ValueError, match="model.safetensors is missing"):
        load_head(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not JSON"):
        load_head(folder)


def test_a_failed_save_leaves_the_old_head(tmp_path, monkeypatch):
    head = make_head(tiny_llama(num_hidden_layers=4))
    save_head(head, tmp_path / "head")

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(checkpoints, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_head(head, tmp_path / "head")
    monkeypatch.undo()
    assert isinstance(load_head(tmp_path / "head"), EagleHead)
    assert [p.name for p in tmp_path.iterdir()] == ["head"]


def test_layers_left_to_the_default_are_the_policys(tmp_path):
    head = load_head(specforge(tmp_path / "head", eagle_config={"use_aux_hidden_state": True}))
    drafter = EagleDrafter(head)
    drafter.bind(PolicyView(tiny_llama(num_hidden_layers=8)))
    assert drafter.layers == (1, 3, 4)
