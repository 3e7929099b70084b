"""Stop, misuse and poison a run on two ranks; print what each rank's exit status and the messages were, as JSON.

``python tests/two_ranks.py FOLDER DATA``. The ranks are forked from this process, with the environment that torchrun
gives them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from crysldnet import pretrain
from crysldnet.models.pretraining import PretrainingModel
from kill_and_resume import RUN, audit_every_batch, lines_of, metric_rows, start, wait, weights

SHORT = ["stages.vae.epochs=2", "stages.diffusion.epochs=1"]
TWO = ["trainer.devices=2", "strategy=ddp"]
OFFLINE = ["logger=wandb", "logger.mode=offline"] if importlib.util.find_spec("wandb") else []
ONE = ["trainer.devices=1", "strategy=auto"]


def break_the_second_rank(number: int) -> Callable[[], None]:
    """Raise an error in one training batch of rank 1. Return what undoes this."""
    original = pretrain.PretrainModule.training_step

    def training_step(module: pretrain.PretrainModule, batch: object, batch_idx: int) -> object:
        if module.global_step == number and module.global_rank == 1:
            raise ValueError("the second card fell out")
        return original(module, batch, batch_idx)

    pretrain.PretrainModule.training_step = training_step  # type: ignore[method-assign, assignment]
    return lambda: setattr(pretrain.PretrainModule, "training_step", original)


def poison_the_second_rank(number: int) -> None:
    """Make one training batch's loss infinite, on rank 1 alone."""
    original, count = PretrainingModel.forward, iter(range(10**6))

    def forward(self: PretrainingModel, batch: object) -> object:
        output = original(self, batch)  # type: ignore[arg-type]
        if self.training and next(count) == number and os.environ.get("RANK") == "1":
            output.terms["strain"] = output.terms["strain"] + torch.inf
        return output

    PretrainingModel.forward = forward  # type: ignore[method-assign, assignment]


def stop_after_validation() -> Callable[[], None]:
    """Tell a run to stop when it has validated: that is at the end of an epoch. Return what undoes this."""
    original = pretrain.PretrainModule.on_validation_epoch_end

    def on_validation_epoch_end(module: pretrain.PretrainModule) -> None:
        original(module)
        os.kill(os.getpid(), signal.SIGTERM)

    pretrain.PretrainModule.on_validation_epoch_end = on_validation_epoch_end  # type: ignore[method-assign]
    return lambda: setattr(pretrain.PretrainModule, "on_validation_epoch_end", original)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Return whether two states have the same names and, bit for bit, the same values."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def main(folder: Path, data: Path) -> dict:
    torch.set_num_threads(1)
    common = [*RUN, *SHORT, f"data.path={data}", f"runs={folder}"]
    found: dict = {}

    def go(name: str, *arguments: str, ranks: int = 2, stop_after: int | None = None) -> tuple[list[int], str]:
        log, before = folder / f"{name}.{len(found)}.txt", lines_of(folder / "audit.jsonl")
        pids = start([*common, *(TWO if ranks == 2 else ONE), f"name={name}", *arguments], ranks, log)
        if stop_after is not None:
            while lines_of(folder / "audit.jsonl") < before + stop_after:
                time.sleep(0.01)
            os.kill(pids[1], signal.SIGTERM)
        return wait(pids, log), log.read_text()

    audit_every_batch(folder / "audit.jsonl")
    found["whole"] = go("whole", *OFFLINE)[0]
    found["wandb_runs"] = len(list((folder / "pretrain/whole").rglob("offline-run-*")))
    found["stopped"], found["stopped_says"] = go("cut", stop_after=21)
    found["on_one"], found["on_one_says"] = go("cut", "resume=last", ranks=1)
    found["resumed"], _ = go("cut", "resume=last")
    whole, cut = folder / "pretrain/whole", folder / "pretrain/cut"
    found["equal_weights"] = same(weights(whole), weights(cut))
    found["equal_metrics"] = metric_rows(folder / "pretrain/whole", "vae") == metric_rows(
        folder / "pretrain/cut", "vae"
    )
    restore = stop_after_validation()
    found["one_then_two"] = go("grown", "stage=vae", ranks=1)[0]
    restore()
    before = lines_of(folder / "audit.jsonl")
    found["one_then_two"] += go("grown", "stage=vae", "resume=last")[0]
    rows = [json.loads(line) for line in (folder / "audit.jsonl").read_text().splitlines()[before:]]
    seen = [row for line in rows for row in line["rows"]]
    found["seen_on_two"] = [len(seen), len(set(seen)), sorted({line["epoch"] for line in rows})]
    sharded = ["stage=vae", "strategy=fsdp2", "trainer.ema_decay=null"]
    found["sharded_whole"] = go("sharded_whole", *sharded)[0]
    found["sharded_stopped"] = go("sharded", *sharded, stop_after=9)[0]
    found["sharded_resumed"] = go("sharded", *sharded, "resume=last")[0]
    a, b = (weights(folder / "pretrain" / name, ("vae",)) for name in ("sharded_whole", "sharded"))
    found["sharded_equal"] = same(a, b)
    mend = break_the_second_rank(3)
    found["broken"], found["broken_says"] = go("broken", "stage=vae")
    mend()
    found["resumed"], _ = go("broken", "stage=vae", "resume=last")
    poison_the_second_rank(3)
    found["poisoned"], found["poisoned_says"] = go("poisoned", "stage=vae")
    found["skipped"], found["skipped_says"] = go("skipped", "stage=vae", "trainer.max_nonfinite_steps=1")
    bad = (folder / "pretrain/skipped/vae/nonfinite_steps.jsonl").read_text().splitlines()
    found["bad"] = [json.loads(line) for line in bad]
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]))))
