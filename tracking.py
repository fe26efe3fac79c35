"""A run's log in TensorBoard or Weights & Biases, where they are installed; metrics.jsonl is there all the same."""

import hashlib
import json
from pathlib import Path


class Tracker:
    """Sends the lines of metrics.jsonl to each of the reports (tensorboard, wandb) too.

    A resumed run goes on in the same curves: the steps after its last save, which it does again, take the place of the
    old ones. step: the one it goes on from; config: its config as JSON.
    """

    def __init__(self, reports: tuple[str, ...], run: Path, config: str, step: int):
        makers = {"tensorboard": TensorBoard, "wandb": WandB}
        self.sinks = [makers[name](run, config, step) for name in reports]

    def log(self, line: dict) -> None:
        """A step's numbers go to train/, those of a dict within the line under its own name (eval/)."""
        numbers = {f"train/{k}": v for k, v in line.items() if k != "step"}
        for group, scores in line.items():
            numbers |= {f"{group}/{k}": v for k, v in scores.items()} if isinstance(scores, dict) else {}
        for sink in self.sinks:
            sink.log({k: v for k, v in numbers.items() if isinstance(v, (int, float))}, line["step"])

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
    """A W&B run in the project lasttoken, named and identified by the run's folder. What else W&B wants to know it
    takes from its own environment: WANDB_MODE=offline, WANDB_PROJECT and so on.
    """

    def __init__(self, run: Path, config: str, step: int):
        import wandb

        name = "/".join(run.absolute().parts[-4:])
        id = hashlib.sha256(str(run.absolute()).encode()).hexdigest()[:16]
        how = {"project": wandb.Settings().project or "lasttoken", "config": json.loads(config), "resume": "allow"}
        self.run = wandb.init(name=name, id=id, dir=run, **how)
        self.run.define_metric("*", step_metric="at")  # W&B's own step never goes back, a resumed run does

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.run.log({**numbers, "at": step})

    def close(self) -> None:
        self.run.finish()
