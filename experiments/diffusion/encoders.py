"""Does latent diffusion help another encoder?

python -m experiments.diffusion.encoders data=FOLDER [key=value …]

Runs the control and the best form of the study with small versions of published encoders, frozen and finetuned, and
writes a row per encoder. The keys are those of config.yaml beside this file; the encoders are under ``others``.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

from experiments import evidence
from experiments.diffusion import tables
from experiments.diffusion.run import CONTROL, HERE, MAY_CHANGE, Settings, Study

BEST = "J1"
"""The form with the smallest error of frozen features."""


def of_encoder(settings: Settings, name: str) -> tables.Errors:
    """Return the errors of one encoder with both arms, frozen and finetuned."""
    epochs = f"stages.diffusion.epochs={settings.others_epochs[name]}"
    study = Study(
        replace(
            settings,
            runs=str(Path(settings.runs) / name),
            encoder=name,
            pretraining=[*settings.pretraining, *settings.others[name]],
            arms={**settings.arms, BEST: [*settings.arms[BEST], epochs]},
        )
    )
    study.prepare()
    for seed in settings.seeds:
        folders = [study.second_stage(arm, seed) for arm in (CONTROL, BEST)]
        for draw, folder, task in product(range(settings.finetuned_draws), folders, study.tasks):
            if task.task.name in settings.finetuned_tasks:
                study.finetune(folder, task, 300, draw)
    return tables.collect(study.runs, [CONTROL, BEST])


def main() -> None:
    """Run every encoder; write every error, and the table."""
    settings = evidence.settings(Settings, HERE, __doc__ or "", MAY_CHANGE)
    out, commit = Path(settings.out or HERE), evidence.current_commit(HERE)
    records = []
    for name in settings.others:
        file = out / "other_encoders" / f"{name}.json"
        errors = tables.read_measurements(file, [CONTROL, BEST]) | of_encoder(settings, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        tables.write_measurements(errors, file)
        for what in dict.fromkeys(what for what, _, _ in errors):
            found = tables.changes(errors, what, BEST, CONTROL)
            records.append(
                evidence.summarise(
                    list(found.values()),
                    name=name,
                    metric=what,
                    unit="%",
                    seeds=sorted(found),
                    data=f"mp_cgcnn of ≤ {settings.max_atoms} atoms; {BEST} against {CONTROL}",
                    command="python -m experiments.diffusion.encoders data=FOLDER",
                    commit=commit,
                )
            )
    evidence.write(out, records)


if __name__ == "__main__":
    main()
