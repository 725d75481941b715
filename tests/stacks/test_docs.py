"""docs/stacks.md and README.md: their snippets run; the table of the former is the matrix."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import test_matrix  # noqa: F401 (registers the features)
import torch
from _matrix import FEATURES, TARGETS, Net
from _ranks import Ranks
from features_frameworks import Rows, WithLoss
from torch import nn

import lowrank_kernels as lk

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "stacks.md").read_text(encoding="utf-8")
SNIPPETS = dict(re.findall(r"```python (\w+)\n(.*?)```", PAGE, re.DOTALL))
README = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def adapted() -> nn.Module:
    """What the page calls ``model``."""
    torch.manual_seed(0)
    return WithLoss(lk.adapt(Net(), rank=2, target_modules=TARGETS, modules_to_save=["head"]))


def run(name: str) -> dict[str, Any]:
    """Execute a snippet with the names that the page takes for granted; returns its names."""
    model = adapted()
    names: dict[str, Any] = {
        "model": model,
        "base_model": WithLoss(Net()),
        "layers": [model.inner.up, model.inner.middle, model.inner.down],
        "train_dataset": Rows(),
        "loader": torch.utils.data.DataLoader(Rows(), batch_size=4),
    }
    exec(compile(SNIPPETS[name], f"docs/stacks.md ({name})", "exec"), names)
    return names


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.large if n in ("trainer", "lightning") else ()) for n in SNIPPETS if not n.startswith("fsdp2")],
)
@pytest.mark.filterwarnings("ignore")
def test_snippet(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "lightning":
        pytest.importorskip("lightning")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    names = run(name)
    if name in ("accelerate", "lightning", "trainer"):
        factors = [p for n, p in names["model"].named_parameters() if n.endswith("lora_B")]
        assert factors and all(p.detach().any() for p in factors), "the snippet trained nothing"


def run_on_rank(rank: int, world: int, name: str) -> bool:
    torch.set_default_device("cpu")
    names = run(name)
    model, optimizer = names["model"], names["optimizer"]
    batch = next(iter(names["loader"]))
    for _ in range(2 if name == "fsdp2" else 0):
        optimizer.zero_grad()
        model(**batch)["loss"].backward()
        optimizer.step()
    factors = [p for n, p in model.named_parameters() if n.endswith("lora_B")]
    return all((p.full_tensor() if hasattr(p, "full_tensor") else p.detach()).any().item() for p in factors)


@pytest.mark.large
@pytest.mark.parametrize("name", ["fsdp2", "fsdp2_whole"])
def test_fsdp2_snippet(name: str, ranks: Ranks) -> None:
    assert ranks(run_on_rank, name) == [True, True]


def test_every_snippet_is_named() -> None:
    assert PAGE.count("```python") == len(SNIPPETS)


def test_the_table_is_the_matrix() -> None:
    table = PAGE.split("| what | optimizers |\n|---|---|\n")[1].split("\n\n")[0].splitlines()
    assert table == [feature.row for feature in FEATURES.values()], "\n".join(feature.row for feature in FEATURES.values())


@pytest.mark.parametrize("snippet", README, ids=range(len(README)))
@pytest.mark.filterwarnings("ignore")
def test_snippet_of_the_readme(snippet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)

    def llama(*_: object, dtype: torch.dtype = torch.float32) -> nn.Module:
        sizes = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 50, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).to(dtype)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", llama)
    tokens = torch.randint(50, (2, 8))
    batches = [{"input_ids": tokens, "labels": tokens}] * 3
    names: dict[str, Any] = {"model": llama(), "base_model": llama(), "loader": batches, "few_batches": batches}
    if "optimizer =" not in snippet:
        names["optimizer"] = lk.AdamW(lk.adapt(names["model"], rank=2), lr=1e-3)
    exec(compile(snippet, "README.md", "exec"), names)
    model, optimizer = names["model"], names["optimizer"]
    optimizer.zero_grad()
    model(**batches[0]).loss.backward()
    optimizer.step()
