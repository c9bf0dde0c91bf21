"""`qtdog demo`: QT-DoG, EoQ and ERM on one target domain of RotatedMNIST, in minutes on two CPU cores."""

from pathlib import Path

from qtdog.config import CollectConfig, DemoConfig, EnsembleConfig, FlatnessConfig, MethodName, TrainConfig
from qtdog.ensemble import make_ensembles
from qtdog.environment import cores
from qtdog.errors import UserError
from qtdog.flatness import measure_flatness
from qtdog.leave_one_out import carry_out, plan
from qtdog.runs import Log
from qtdog.tables import collect

TARGET = "30"


def run_demo(config: DemoConfig) -> None:
    """Train `members` QT-DoG models and one ERM model, then compose what the other subcommands do."""
    if config.members < 2:
        raise UserError(f"--members must be at least 2 to make an ensemble, not {config.members}")
    if config.steps < 5:
        raise UserError(f"--steps must be at least 5, not {config.steps}")
    methods: dict[MethodName, list[int]] = {"erm": [0], "qtdog": list(range(config.members))}
    planned = {
        method: plan(
            TrainConfig(
                dataset="RotatedMNIST",
                data_dir=config.data_dir,
                method=method,
                test_envs=[TARGET],
                seeds=seeds,
                output_dir=config.output_dir,
                steps=config.steps,
                checkpoint_freq=config.steps // 2,
                batch_size=1,
                lr=2.5e-4,
                eval_train_images=20,
                switch_step=config.steps * 2 // 5 if method == "qtdog" else None,
                device=config.device,
                resume=True,
            )
        )
        for method, seeds in methods.items()
    }
    # One thread a run: steps of five small images are too short to share, least of all on a machine that others use.
    carry_out([each for runs in planned.values() for each in runs], at_once=min(cores(), 1 + config.members))
    folders = {method: [each.folder for each in runs] for method, runs in planned.items()}
    make_ensembles(EnsembleConfig(runs=[str(folder) for folder in folders["qtdog"]], device=config.device))
    picture, _ = measure_flatness(
        FlatnessConfig(
            runs=[str(folders[method][0]) for method in methods],
            output=str(Path(config.output_dir) / "flatness.png"),
            radii=[0.0, 10.0, 20.0, 30.0, 40.0],
            directions=5,
            max_images=40,
            device=config.device,
        )
    )
    written = collect(CollectConfig(folder=config.output_dir))
    log = Log()
    log(f"table:         {written[0]} (also .md, .tex, .csv, .json)")
    log(f"checkpoint:    {folders['qtdog'][0] / 'model.safetensors'}")
    log(f"flatness plot: {picture}")
