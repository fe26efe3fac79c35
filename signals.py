"""What a stop signal does, in each phase of a command. Imports nothing heavy: signals are caught before torch loads.

Outside training a signal ends the process at once, with one line: nothing is lost. In training it is noted, and all
ranks stop together, with a save (loop.stoppable). No handler raises: Python swallows exceptions that are raised within
callbacks and destructors, and the run would continue as if nobody had asked.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

# SIGUSR1 and SIGUSR2: what Slurm can send before a job's time is over. SIGHUP: the terminal was closed.
NAMES = "SIGTERM SIGINT SIGHUP SIGUSR1 SIGUSR2".split()
NUMBERS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
AGAIN = 3.0  # seconds after which another Ctrl-C ends the process at once; launchers often send a signal twice


class Stopped(Exception):
    """All ranks agreed to stop: some rank was asked to."""

    exit_status = 1


class Stop:
    """What this process was asked to do, and what it does about it."""

    def __init__(self):
        self.number = 0  # of the signal that was noted in training
        self.noted = 0.0  # when
        self.training = False
        self.run: Path | None = None  # whose last/ holds everything that was trained
        self.in_thread = False  # a thread reads the signals (watch.py), so that a wait in C does not delay them
        self.before: dict = {}  # handlers that training replaced, where no command did

    def begin(self) -> None:
        """Training begins: signals are noted."""
        self.number, self.run = 0, None
        self.before = catch()
        self.training = True

    def end(self, run: Path | None) -> None:
        """Training is over; run: whose last/ holds everything. A signal that came after the last look is sent again."""
        late, self.number = self.number, 0
        self.training, self.run = False, run
        restore(self.before)
        if late and run:
            signal.raise_signal(late)

    def ask(self, number: int, of_another_rank: bool = False) -> None:
        """Note a stop in training; end the process otherwise. Launchers repeat signals; a second Ctrl-C is meant."""
        if not self.training:
            self.leave(number)
        if self.number and number == signal.SIGINT and time.monotonic() - self.noted > AGAIN:
            self.leave(number)
        if not self.number:
            self.number, self.noted = number, time.monotonic()
            if not of_another_rank:
                say(f"{signal.Signals(number).name}: stopping, with a save")

    def leave(self, number: int) -> None:
        """End the process, whatever it waits for."""
        advice = ""
        if self.run:
            mark(self.run, number)
            advice = f"; continue with --resume {self.run}"
        say(f"{signal.Signals(number).name}: stopped{advice}")
        os._exit(1)


STOP = Stop()


def say(line: str) -> None:
    """A line on stderr, in one piece, from wherever a signal comes; the terminal may be gone with it."""
    rank = f"rank {os.environ['RANK']}: " if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    with suppress(OSError):
        os.write(2, f"\n{rank}{line}\n".encode())


def mark(run: Path, number: int) -> None:
    """Leave a note in the folder of a run that was stopped; it is removed when the run continues."""
    with suppress(OSError):
        (run / "PREEMPTED").write_text(f"{signal.Signals(number).name}: continue with --resume {run}\n")


def on_signal(number: int, frame) -> None:
    if not STOP.in_thread:
        STOP.ask(number)


def catch() -> dict:
    """Let stop signals do what this file says; returns the handlers before, by signal."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {
        number: signal.signal(number, on_signal) for number in catchable() if signal.getsignal(number) is not on_signal
    }


def catchable() -> list[int]:
    """The stop signals; without that of a closed terminal where it is ignored, as under nohup."""
    return [n for n in NUMBERS if signal.Signals(n).name != "SIGHUP" or signal.getsignal(n) != signal.SIG_IGN]


def restore(before: dict) -> None:
    """Undo `catch`."""
    for number, handler in before.items():
        signal.signal(number, handler)


def end_with_parent() -> None:
    """Linux: be sent SIGTERM when the parent is gone, for an orphan would train on beside the run's next process."""
    if sys.platform == "linux":
        set_death_signal = 1
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGTERM)


def early() -> None:
    """What a command does before anything else: catch signals, and end with torchrun."""
    catch()
    STOP.run = None
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()
