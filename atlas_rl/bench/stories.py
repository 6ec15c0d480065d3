"""stories260K, a real pretrained decoder of 0.26 M parameters in llama2.c's format, as a transformers Llama with its tokenizer.

The files are not part of Atlas-RL; whoever has a folder with `stories260K.bin` and `tok512.bin` names it.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

UNK_ID, BOS_ID = 0, 1
"""BOS stands between stories: the model draws it where one ends."""
OPENINGS = [
    f"{when}, there was a {what} named {name}."
    for when in ("Once upon a time", "One day", "Long ago")
    for what in ("little girl", "small boy", "big dog", "red bird")
    for name in ("Lily", "Tom", "Max", "Sue", "Ben", "Mia")
]


def save_stories260k(data: Path, folder: Path) -> Path:
    """Write policy and tokenizer as a user would name them to a trainer."""
    model = load_stories260k(data)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = BOS_ID, UNK_ID
    model.save_pretrained(folder)
    load_tokenizer(data).save_pretrained(folder)
    return folder


def load_stories260k(data: Path, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    raw = (data / "stories260K.bin").read_bytes()
    dim, hidden, num_layers, num_heads, num_kv_heads, vocab_size, max_len = np.frombuffer(raw, np.int32, 7).tolist()
    config = LlamaConfig(
        vocab_size=abs(vocab_size),
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=max_len,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    values, place = torch.from_numpy(np.frombuffer(raw, np.float32, offset=28).copy()), 0

    def take(*dims: int) -> torch.Tensor:
        nonlocal place
        place += int(np.prod(dims))
        return values[place - int(np.prod(dims)) : place].view(dims)

    def halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
        """RoPE on interleaved pairs -> RoPE on halves."""
        return weight.view(heads, -1, 2, dim).transpose(1, 2).reshape(-1, dim)

    kv_dim = dim // num_heads * num_kv_heads
    state = {"model.embed_tokens.weight": take(abs(vocab_size), dim)}
    stacked = {
        "input_layernorm": take(num_layers, dim),
        "self_attn.q_proj": take(num_layers, dim, dim),
        "self_attn.k_proj": take(num_layers, kv_dim, dim),
        "self_attn.v_proj": take(num_layers, kv_dim, dim),
        "self_attn.o_proj": take(num_layers, dim, dim),
        "post_attention_layernorm": take(num_layers, dim),
        "mlp.gate_proj": take(num_layers, hidden, dim),
        "mlp.down_proj": take(num_layers, dim, hidden),
        "mlp.up_proj": take(num_layers, hidden, dim),
    }
    state["model.norm.weight"] = take(dim)
    for name, weights in stacked.items():
        for layer, weight in enumerate(weights):
            heads = {"self_attn.q_proj": num_heads, "self_attn.k_proj": num_kv_heads}.get(name)
            state[f"model.layers.{layer}.{name}.weight"] = halves(weight, heads) if heads else weight
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected
    return model.to(dtype).eval()


def load_tokenizer(data: Path) -> PreTrainedTokenizerFast:
    """SentencePiece's BPE: of two neighbours that make a piece, those go first whose piece has the higher score."""
    raw, place = (data / "tok512.bin").read_bytes(), 4
    scores: dict[str, float] = {}
    while place < len(raw):
        score, length = struct.unpack_from("<fi", raw, place)
        scores[raw[place + 8 : place + 8 + length].decode()] = score
        place += 8 + length
    splits = {piece: [(piece[:i], piece[i:]) for i in range(1, len(piece))] for piece in scores}
    merges = [
        (left, right)
        for piece in sorted(scores, key=scores.__getitem__, reverse=True)
        for left, right in splits[piece]
        if left in scores and right in scores
    ]
    pieces = list(scores)
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token=pieces[UNK_ID]))
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    bos = pieces[BOS_ID]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", "$B"], special_tokens=[(bos, BOS_ID)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=bos, pad_token=pieces[UNK_ID], padding_side="left"
    )
