"""The precision plugin: a Lightning run is the bare loop, and fp16 has its scaler in the checkpoint."""

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from tests.hub import tiny

from parco.hub.lightning import ParcoPrecision
from parco.training import prepare_

WINDOWS = torch.randint(3, 300, (6, 32), generator=torch.Generator().manual_seed(1))


class Language(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = tiny.model("llama", torch.float32).train()

    def training_step(self, tokens: torch.Tensor, _: int) -> torch.Tensor:
        return self.model(input_ids=tokens, labels=tokens).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fitted(recipe: str, folder: Path, **named: Any) -> tuple[Language, ParcoPrecision, Any]:
    precision = ParcoPrecision(recipe, **named)
    trainer = lightning.Trainer(
        plugins=precision, accelerator="cpu", devices=1, max_steps=3, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    module = Language()
    torch.manual_seed(3)
    trainer.fit(module, torch.utils.data.DataLoader(list(WINDOWS), batch_size=2))
    return module, precision, trainer


def test_it_is_the_bare_loop(tmp_path: Path) -> None:
    module, precision, _ = fitted("mxfp8", tmp_path)
    model = tiny.model("llama", torch.float32).train()
    prepare_(model, "mxfp8")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for tokens in WINDOWS.split(2):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), module.model.parameters(), strict=True))
    assert precision.prepared is not None
    kinds = {str(recipe) for recipe in precision.prepared.recipes.values()}
    assert kinds == {"mxfp8", "bf16"}, "the head is bf16"


def test_fp16_has_a_scaler(tmp_path: Path) -> None:
    module, precision, trainer = fitted("fp16", tmp_path)
    trainer.save_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert kept["ParcoPrecision"]["scale"] == precision.scaler.get_scale() > 1  # type: ignore[union-attr]
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_a_filter_chooses(tmp_path: Path) -> None:
    _, precision, _ = fitted("int8", tmp_path, filter_fn=lambda module, name: "mlp" in name)
    assert precision.prepared is not None
    assert precision.prepared.recipes and all("mlp" in name for name in precision.prepared.recipes)
    with pytest.raises(ValueError, match="unknown recipe"):
        ParcoPrecision("fp7")
