"""A time limit: whether a training step must be the last one."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Limit:
    """A time limit in seconds of this process (0 for none): whether a step must be the last one, so that the final
    evaluation and the saves still fit.

    val_tokens: of an evaluation, whose time is guessed from training until one was measured. Only rank 0 looks at the
    clock: the others hear of it with the step's sums.
    """

    seconds: float
    rank: int
    val_tokens: float
    clock: Callable  # () -> seconds since this process was started
    evaluation: float = 0.0  # seconds of an evaluation of all validation rows, once measured
    first: tuple | None = None  # (step, seconds) after this process's first step
    announced: bool = False

    def left(self, state) -> float:
        """Seconds for training: what is left without two evaluations, of the last step and of best/, and the saves."""
        guess = 0.5 * self.val_tokens * state.seconds / max(state.tokens, 1)
        return self.seconds - self.clock() - 2.2 * (self.evaluation or guess) - 4.0

    def over(self, state) -> bool:
        """Whether this step should be the last one."""
        return bool(self.seconds) and self.rank == 0 and self.left(state) < 0

    def forecast(self, state, total: int) -> str:
        """Once, after ten steps: how long all of them take and how many fit; an empty string otherwise."""
        self.first = self.first or (state.step, state.seconds)
        steps = state.step - self.first[0]
        if not self.seconds or self.announced or steps < 10:
            return ""
        self.announced = True
        seconds_per_step = (state.seconds - self.first[1]) / steps
        more = total - state.step
        fit = min(more, int(max(0.0, self.left(state)) / seconds_per_step))
        outcome = "all of them fit" if fit == more else f"it will end at about step {state.step + fit:,} of {total:,}"
        return (
            f"forecast: {more:,} more steps take about {more * seconds_per_step / 60:.1f} min; "
            f"with the time limit of {self.seconds / 60:.1f} min {outcome}"
        )
