"""Threads in each rank that watch the others: they pass on a stop, and notice a rank that is gone or hangs.

The main thread of a rank often waits in a sum over ranks, in C, where it can neither be told to stop nor ask why the
others do not come. Each rank publishes a line every BEAT seconds: how often it did so, what its main thread does, how
far that is, and the signal that it was sent. Ranks compare lines over time, never clocks.
"""

import itertools
import os
import select
import signal
import threading
import time
from contextlib import contextmanager, suppress

from signals import STOP, say

BEAT = 1.0  # seconds between lines
SILENT = 120.0  # seconds without a new line: stopped, swapped out, or its machine is gone
STUCK = 600.0  # seconds within one micro-batch
HOSTED_BY_RANK_0 = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # the store
BUSY, COMPUTES, WAITS = "busy", "computes", "waits"  # busy: with what may take any time, such as a corpus or a save


class Watch(threading.Thread):
    """The thread of one rank, to be started before the ranks meet."""

    def __init__(self, rank: int, size: int):
        super().__init__(daemon=True, name="watch")
        self.rank, self.size = rank, size
        self.store = None  # torch's key-value store of these ranks
        self.doing, self.progress = BUSY, 0
        self.leaving = 0  # the signal that this rank was sent
        self.wake = threading.Event()  # it is to be published now
        self.told = threading.Event()  # the others can read that
        self.waiting = 0.0  # since when the main thread waits for the others
        self.lines = {other: "" for other in range(size) if other != rank}
        self.signals, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        STOP.in_thread = True

    def meet(self, store) -> None:
        """The ranks have met. store: a connection of its own, as an answer may never come: its host can hang too."""
        now = time.monotonic()
        self.heard = now  # when the store last answered
        self.alive = dict.fromkeys(self.lines, now)  # when each rank's line was last a new one
        self.moved = dict.fromkeys(self.lines, now)  # when its main thread last moved
        self.store = store
        threading.Thread(target=self.talk, daemon=True, name="talk").start()

    def run(self) -> None:
        """Read signals as they come, and judge the other ranks while the main thread waits for them."""
        while True:
            if select.select([self.signals], [], [], BEAT)[0]:
                for number in os.read(self.signals, 64):
                    self.leaving = number
                    self.wake.set()
                    if self.store and not STOP.training:
                        self.told.wait(BEAT)  # the others will not hear of it later
                    STOP.ask(number)
            if self.store and self.waiting and time.monotonic() - self.waiting > SILENT:
                self.judge()

    def talk(self) -> None:
        """Publish this rank's line and read the others', as long as the store answers."""
        with suppress(Exception):  # it is gone with its host: rank 0, or torchrun
            for beat in itertools.count():
                leaving = self.leaving
                self.store.set(f"watch/{self.rank}", f"{beat} {leaving or STOP.number} {self.doing} {self.progress}")
                if leaving:
                    self.told.set()
                    self.wake.clear()
                self.look()
                self.wake.wait(BEAT)

    def look(self) -> None:
        """Read the lines of the other ranks; a stop that one of them was asked for is this one's too."""
        names = [f"watch/{other}" for other in self.lines]
        lines = self.store.multi_get(names)
        self.heard = now = time.monotonic()
        for other, raw in zip(self.lines, lines, strict=True):
            line, before = raw.decode(), self.lines[other]
            if line == before:
                continue
            self.lines[other], self.alive[other] = line, now
            _, number, *place = line.split()
            if place != before.split()[2:] or COMPUTES not in place:
                self.moved[other] = now
            if int(number) and not STOP.number:
                STOP.ask(int(number), of_another_rank=True)

    def judge(self) -> None:
        """End this process when a rank that it waits for will not come."""
        now = time.monotonic()
        silent = {other for other, last in self.alive.items() if now - last > SILENT}
        stuck = {other for other, last in self.moved.items() if now - last > STUCK}
        if now - self.heard > SILENT:  # nothing is known but that the store's host is silent
            silent, stuck = ({0} if HOSTED_BY_RANK_0 else set()) & silent, set()
        problems = {other: "has been in one micro-batch for minutes" for other in stuck}
        problems |= {other: f"gives no sign of life for {now - self.alive[other]:.0f} s" for other in silent}
        if not problems:
            return
        speaker = min(set(range(self.size)) - problems.keys())
        if self.rank == speaker:
            text = ", ".join(f"rank {other} {problem}" for other, problem in sorted(problems.items()))
            say(f"error: {text}; all ranks end: continue with --resume auto")
        else:
            time.sleep(3)
        os._exit(1)

    @contextmanager
    def together(self):
        """Around what all ranks do together."""
        self.doing, self.waiting = WAITS, time.monotonic()
        try:
            yield
        finally:
            self.doing, self.waiting = BUSY, 0.0

    def computes(self) -> None:
        """The main thread begins a micro-batch."""
        self.progress += 1
        self.doing = COMPUTES
