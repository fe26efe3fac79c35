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
        kinds = {"tensorboard": TensorBoard, "wandb": WandB}
        self.sinks = [kinds[name](run, config, step) for name in reports]

    def log(self, line: dict) -> None:
        """The numbers of a step are named train/..., those of a dict within the line by its own name (eval/...)."""
        values = {f"train/{name}": value for name, value in line.items() if name != "step"}
        for group, scores in line.items():
            if isinstance(scores, dict):
                values |= {f"{group}/{name}": value for name, value in scores.items()}
        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
        for sink in self.sinks:
            sink.log(numbers, line["step"])

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()


class TensorBoard:
    """Event files in run/tensorboard: tensorboard --logdir outputs."""

    def __init__(self, run: Path, config: str, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(run / "tensorboard", purge_step=step + 1 if step else None)

    def log(self, numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandB:
    """A W&B run in the project lasttoken, named and identified by the run's folder.

    Everything else is W&B's own environment: WANDB_MODE=offline, WANDB_PROJECT and so on.
    """

    def __init__(self, run: Path, config: str, step: int):
        import wandb

        folder = run.absolute()
        self.run = wandb.init(
            project=wandb.Settings().project or "lasttoken",
            name="/".join(folder.parts[-4:]),
            id=hashlib.sha256(str(folder).encode()).hexdigest()[:16],
            dir=run,
            config=json.loads(config),
            resume="allow",
        )
        self.run.define_metric("*", step_metric="at")  # W&B's own step never goes back, that of a resumed run does

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.run.log({**numbers, "at": step})

    def close(self) -> None:
        self.run.finish()
