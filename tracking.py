"""A run's log in TensorBoard or Weights & Biases, if they are installed; metrics.jsonl is written in any case."""

import hashlib
import json
from pathlib import Path


class Tracker:
    """Sends the lines of metrics.jsonl to each of the reports (tensorboard, wandb) too.

    A resumed run continues the same curves: steps after its last save, which are repeated, replace the old ones.
    step: the step it continues from; config: its settings as JSON.
    """

    def __init__(self, reports: tuple[str, ...], run: Path, config: str, step: int):
        kinds = {"tensorboard": _tensorboard, "wandb": _weights_and_biases}
        self.sinks = [kinds[name](run, config, step) for name in reports]

    def log(self, line: dict) -> None:
        """The numbers of a step are named train/..., those of a dict within the line by its own name (eval/...)."""
        groups = {"train": line} | {name: scores for name, scores in line.items() if isinstance(scores, dict)}
        numbers = {f"{group}/{name}": value for group, values in groups.items() for name, value in values.items()}
        numbers = {name: value for name, value in numbers.items() if isinstance(value, int | float)}
        step = numbers.pop("train/step")
        for log, _ in self.sinks:
            log(numbers, step)

    def close(self) -> None:
        for _, close in self.sinks:
            close()


# A sink is two functions: one logs numbers by name at a step, one closes it.


def _tensorboard(run, config, step):
    """Event files in run/tensorboard: tensorboard --logdir outputs."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(run / "tensorboard", purge_step=step + 1 if step else None)

    def log(numbers, step):
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return log, writer.close


def _weights_and_biases(run, config, step):
    """A W&B run in the project lasttoken, named and identified by the run's folder.

    Everything else is W&B's own environment: WANDB_MODE=offline, WANDB_PROJECT and so on.
    """
    import wandb

    folder = run.absolute()
    report = wandb.init(
        project=wandb.Settings().project or "lasttoken",
        name="/".join(folder.parts[-4:]),
        id=hashlib.sha256(str(folder).encode()).hexdigest()[:16],
        dir=run,
        config=json.loads(config),
        resume="allow",
    )
    report.define_metric("*", step_metric="at")  # W&B's own step never goes back, that of a resumed run does
    return lambda numbers, step: report.log(numbers | {"at": step}), report.finish
