"""Kill a run again and again at random moments, resume it each time, and compare its end with that of one left alone.

``python tests/kill_and_resume.py FOLDER DATA KILLS RANKS SEED`` prints what it saw as JSON. Every life of the run is a
process of its own, forked from this one so that it needn't import everything anew, and ended by SIGKILL. Each process
writes the rows of every batch that it trains on to ``audit.jsonl``: that is how the crystals of an epoch are counted.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import signal
import socket
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only

from crysldnet import cli, pretrain
from crysldnet.artifacts import model_file
from crysldnet.signals import RUN_NAME
from crysldnet.training.checkpoint_file import verify
from tiny import DENOISER, ENCODER, QUIET, repeatable

RUN = [
    *ENCODER,
    *DENOISER,
    *QUIET,
    "data.batch_size=8",
    "trainer.log_every_n_steps=1",
    "trainer.ema_decay=0.9",
    "diffusion.target=ema",
    "trainer.checkpoint_every_steps=2",
    "trainer.accelerator=cpu",
]


TRAINING_STEP = pretrain.PretrainModule.training_step


def audit_every_batch(file: Path) -> None:
    """Write down each batch before it is trained on."""

    def training_step(module: Any, batch: Any, batch_idx: int) -> Any:
        line = {
            "process": os.getpid(),
            "stage": "vae" if module.model.flow is None else "diffusion",
            "epoch": module.current_epoch,
            "batch": batch_idx,
            "rank": module.global_rank,
            "rows": batch.rows.tolist(),
        }
        with file.open("a") as lines:
            lines.write(json.dumps(line) + "\n")
        return TRAINING_STEP(module, batch, batch_idx)

    pretrain.PretrainModule.training_step = training_step  # type: ignore[method-assign]


def free_port() -> int:
    """Return a port that nothing listens on, of those that no outgoing connection is given."""
    while True:
        port = random.SystemRandom().randrange(10_000, 30_000)
        with socket.socket() as one, suppress(OSError):
            one.bind(("127.0.0.1", port))
            return port


def start(arguments: list[str], ranks: int, log: Path) -> list[int]:
    """Start the processes of a run; with several ranks as torchrun does."""
    port = free_port()
    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        faulthandler.register(signal.SIGUSR2, file=2)
        os.environ.pop(RUN_NAME, None)
        if ranks > 1:
            rank_zero_only.rank = rank
            os.environ |= {
                **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)},
                **{"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": str(ranks)},
                **{"TORCHELASTIC_RUN_ID": "a"},
            }
        sys.argv = ["crysldnet", "pretrain", *arguments]
        status = 1
        try:
            cli.main()
        except SystemExit as end:
            status = int(end.code or 0)
        except BaseException as error:
            sys.stderr.write(f"{error!r}\n")
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return pids


def wait(pids: list[int], log: Path, seconds: float = 300.0, *, agent: bool = False) -> list[int]:
    """Return the exit status of each process.

    Args:
        pids: the processes.
        log: what they wrote.
        seconds: after which one that hasn't ended is an error that says where it stands, or with an agent is killed.
        agent: end what is left as torchrun does: a rank that waits for a dead one to come to their meeting, at the
            start of a run, would wait for half an hour.
    """
    deadline = time.monotonic() + seconds
    status: dict[int, int] = {}
    while len(status) < len(pids):
        for pid in pids:
            if pid not in status:
                done, code = os.waitpid(pid, os.WNOHANG)
                if done:
                    status[pid] = os.waitstatus_to_exitcode(code)
        if time.monotonic() > deadline:
            left = set(pids) - status.keys()
            if not agent:
                for pid in left:
                    os.kill(pid, signal.SIGUSR2)
                    time.sleep(1.0)
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            if not agent:
                raise TimeoutError(f"{left} of {pids} didn't end in {seconds} s, {status} did\n{log.read_text()}")
            deadline += seconds
        time.sleep(0.01)
    return [status[pid] for pid in pids]


def lines_of(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def weights(run: Path, stages: tuple[str, ...] = ("vae", "diffusion")) -> dict[str, torch.Tensor]:
    found = {}
    for stage in stages:
        state = model_file.read(run / stage / "pretraining.safetensors", "pretraining")[1]
        found |= {f"{stage}.{name}": tensor for name, tensor in state.items()}
    return found


def seen_once(audit: Path, crystals: int, ranks: int) -> dict[str, Any]:
    """Count how often each crystal was trained on in an epoch, a step that was lost and repeated counting once.

    A step is lost when its process was killed before the next checkpoint; what it did is gone with the process. So of
    each (stage, epoch, batch, rank) the last line stands, and all its lines must name the same rows.
    """
    standing: dict[tuple, list[int]] = {}
    repeated = differing = 0
    order: dict[str, list[tuple[int, int]]] = {}
    for text in audit.read_text().splitlines():
        line = json.loads(text)
        key = (line["stage"], line["epoch"], line["batch"], line["rank"])
        if key in standing:
            repeated += 1
            differing += standing[key] != line["rows"]
        standing[key] = line["rows"]
        order.setdefault(f"{line['process']} {line['stage']}", []).append((line["epoch"], line["batch"]))
    epochs: dict[tuple[str, int], Counter] = {}
    for (stage, epoch, _, _), rows in standing.items():
        epochs.setdefault((stage, epoch), Counter()).update(rows)
    return {
        "epochs": len(epochs),
        "exactly_once": all(len(count) == crystals and set(count.values()) == {1} for count in epochs.values()),
        "batches": len(standing),
        "lost_and_repeated": repeated,
        "repeated_with_other_rows": differing,
        "in_order": all(steps == sorted(steps) for steps in order.values()),
    }


def metric_rows(run: Path, stage: str) -> list[dict[str, str]]:
    return repeatable(run / stage / "metrics.csv")


def main(folder: Path, data: Path, kills: int, ranks: int, seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    epochs = 6 if kills > 10 else 3
    common = [*RUN, f"data.path={data}", f"runs={folder}"]
    common += [f"stages.vae.epochs={epochs}", f"stages.diffusion.epochs={epochs}"]
    if ranks > 1:
        common += [f"trainer.devices={ranks}", "strategy=ddp"]
    torch.set_num_threads(1)
    audit_every_batch(folder / "whole.jsonl")
    log = folder / "log.txt"
    begun = time.monotonic()
    assert wait(start([*common, "name=whole"], ranks, log), log) == [0] * ranks, log.read_text()
    alone = time.monotonic() - begun
    steps = lines_of(folder / "whole.jsonl")

    audit = folder / "cut.jsonl"
    audit_every_batch(audit)
    cut = folder / "pretrain" / "cut"
    done = 0
    in_writing = before_a_step = 0
    statuses: Counter = Counter()
    while True:
        resume = ["resume=last"] if (cut / "config.yaml").exists() else []
        earlier = lines_of(audit)
        pids = start([*common, "name=cut", *resume], ranks, log)
        if done == kills:
            assert wait(pids, log) == [0] * ranks, log.read_text()[-3000:]
            break
        wanted = rng.choice([0, 0, 1, 1, 2, 2, 3] if kills > 10 else [0, 2, 4, 6]) * ranks
        pause = rng.uniform(0, 2.0 * alone / steps * ranks) if wanted else rng.uniform(0, 0.5)
        ended: list[int] = []
        while lines_of(audit) < earlier + wanted and not ended:
            ended = [pid for pid in pids if os.waitpid(pid, os.WNOHANG)[0]]
            time.sleep(0.002)
        if ended:
            raise RuntimeError(f"ended by itself after {done} kills; give it more steps\n{log.read_text()[-3000:]}")
        time.sleep(pause)
        victim = rng.choice(pids)
        os.kill(victim, signal.SIGKILL)
        for status in wait(pids, log, 20.0, agent=True):
            statuses[str(status)] += 1
        done += 1
        in_writing += any(cut.rglob(".*.partial"))
        before_a_step += lines_of(audit) == earlier
    whole = folder / "pretrain" / "whole"
    a, b = weights(whole), weights(cut)
    return {
        "kills": done,
        "ranks": ranks,
        "steps": steps // ranks,
        "killed_while_writing_a_file": in_writing,
        "killed_before_a_step": before_a_step,
        "exit_statuses": dict(statuses),
        "equal_weights": a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a),
        "equal_metrics": all(metric_rows(whole, stage) == metric_rows(cut, stage) for stage in ("vae", "diffusion")),
        "good_checkpoint": bool(verify(cut / "diffusion" / "checkpoints" / "last.ckpt")),
        **seen_once(audit, 64, ranks),
        "seconds": round(time.monotonic() - begun),
    }


if __name__ == "__main__":
    where, path, *numbers = sys.argv[1:]
    sys.stdout.write(json.dumps(main(Path(where), Path(path), *map(int, numbers))))
