"""What test_strategies.py and test_gpu.py run, many cases in one launch: torchrun … two_processes.py FOLDER DATA.

Each rank writes the loss of every batch that it trained on, as FOLDER/CASE.RANK.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from conftest import draw_nothing
from crysldnet import finetune, pretrain
from crysldnet.build import build
from crysldnet.training.fit import export_weights
from crysldnet.training.trainer import TrainerSettings, make_trainer
from tiny import finetune_config, pretrain_config

STEPS = [
    "data.batch_size=16",
    "stage=vae",
    "stages.vae.epochs=2",
    "trainer.log_every_n_steps=1",
    "optimizer.weight_decay=0.1",
]
CASES = {
    "ddp": ["strategy=ddp"],
    "ddp_static": ["strategy=ddp_static"],
    "ddp_accumulating": ["strategy=ddp", "trainer.accumulate_grad_batches=2"],
    "ddp_half": ["strategy=ddp", "trainer.precision=bf16-mixed"],
    "ddp_double": ["strategy=ddp_static", "trainer.precision=64-true"],
    "fsdp2": ["strategy=fsdp2"],
    "fsdp2_less_memory": [
        "strategy=fsdp2",
        "trainer.activation_checkpointing=true",
        "trainer.accumulate_grad_batches=2",
    ],
    "ddp_less_memory": ["strategy=ddp", "trainer.activation_checkpointing=true", "trainer.ema_decay=0.9"],
    "ddp_static_less_memory": [
        "strategy=ddp_static",
        "trainer.activation_checkpointing=true",
        "trainer.ema_decay=0.9",
    ],
    "fsdp2_half": ["strategy=fsdp2", "trainer.precision=bf16-mixed"],
    "fsdp2_teacher": ["strategy=fsdp2", "stage=both", "stages.diffusion.epochs=1", "diffusion.target=ema"],
}
"""Beside two devices and STEPS."""
COMPILED = {
    "ddp_compiled": ["strategy=ddp", "trainer.compile=true"],
    "ddp_static_compiled": ["strategy=ddp_static", "trainer.compile=true"],
}
"""Run only by name: compiling takes half a minute."""
EXACT = ["latent.log_variance_init=-30", "encoder.dropout=0"]
"""Nothing is drawn in a step, for another device draws other numbers."""
ON_GPUS = {
    "gpu_ddp": ["strategy=ddp"],
    "gpu_ddp_static": ["strategy=ddp_static"],
    "gpu_fsdp": ["strategy=fsdp"],
    "gpu_fsdp2": ["strategy=fsdp2"],
    "gpu_deepspeed": ["strategy=deepspeed"],
    "gpu_ddp_half": ["strategy=ddp", "trainer.precision=bf16-mixed"],
    "gpu_ddp_float16": ["strategy=ddp", "trainer.precision=16-mixed"],
    "gpu_fsdp_less_memory": ["strategy=fsdp", "trainer.activation_checkpointing=true"],
}
"""Run only by name, where there are GPUs."""
FINETUNE = ["strategy=fsdp2", "trainer.devices=2", "epochs=2", "data.batch_size=16"]


class Recording:
    """Keeps the losses of training steps while a case runs."""

    def __init__(self, patch_into: type = pretrain.PretrainModule) -> None:
        self.losses: list[float] = []
        original = patch_into.training_step

        def recorded(module, batch, batch_idx):
            loss = original(module, batch, batch_idx)
            self.losses.append(float(loss.detach()))
            return loss

        self._undo = lambda: setattr(patch_into, "training_step", original)
        patch_into.training_step = recorded

    def __enter__(self) -> list[float]:
        return self.losses

    def __exit__(self, *_: object) -> None:
        self._undo()


def train(folder: Path, data: str, name: str, *arguments: str) -> list[float]:
    """Train a tiny model; return the loss of every batch of this process."""
    config, values = pretrain_config(f"runs={folder}", f"name={name}", f"data.path={data}", *STEPS, *arguments)
    with Recording() as losses:
        assert pretrain.run(config, values) == 0
    return losses


def export_untrained(folder: Path, data: str, name: str, *arguments: str) -> None:
    """Load one state under a strategy and export it without a step."""
    config, _ = pretrain_config(f"data.path={data}", *STEPS, *arguments)
    settings: TrainerSettings = build(config.trainer, "trainer")
    model = pretrain.build_model(config, with_flow=False)
    crystals = pretrain.make_data(config, model)
    module = pretrain.PretrainModule(model=model, optimizer=build(config.optimizer, "optimizer"))
    trainer = make_trainer(
        settings, build(config.strategy, "strategy"), folder=folder, epochs=1, seed=0, gradient_clip_val=None, owner={}
    )
    trainer.validate(module, datamodule=crystals, verbose=False)
    out, info = folder / "untrained" / name, {"encoder": config.encoder}
    export_weights("vae", trainer, lambda weights: pretrain.write_stage(out, "vae", weights, info))


if __name__ == "__main__":
    torch.set_num_threads(1)
    draw_nothing()
    runs, crystals_file, *only = sys.argv[1:]
    for case in only or CASES:
        where = [
            f"trainer.devices={os.environ['WORLD_SIZE']}",
            f"trainer.accelerator={'gpu' if case in ON_GPUS else 'cpu'}",
        ]
        where += EXACT if case in ON_GPUS else []
        found = train(Path(runs), crystals_file, case, *(CASES | COMPILED | ON_GPUS)[case], *where)
        (Path(runs) / f"{case}.{os.environ['RANK']}.json").write_text(json.dumps(found))
    if not only or only == ["finetune"]:
        settings, plain = finetune_config(f"runs={runs}", "name=fsdp2", f"data.path={crystals_file}", *FINETUNE)
        assert finetune.run(settings, plain) == 0
    for case in () if only else ("ddp", "ddp_static", "fsdp2"):
        export_untrained(Path(runs), crystals_file, case, *CASES[case], "trainer.devices=2")
