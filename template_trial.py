"""Try a chat template in a process of its own: it is foreign code that may loop for hours or fill the memory."""

import os
import signal
import time
from collections.abc import Callable

SECONDS, ROOM, LETTERS = 1, 2**30, 10_000_000  # of processor time, bytes, and length of a rendered chat
GIVEN_UP = 10  # seconds on the clock
TEXT = "One word comes after another. " * 300
ROLES = ["system", "user", "assistant", "user", "assistant", "user"]
# A long chat, and the same without its system turn, which some templates refuse.
CHATS = [[{"role": role, "content": TEXT} for role in roles] for roles in (ROLES, ROLES[1:], ROLES[1:2])]
outcomes: dict[str, str] = {}  # template -> why it is not used, or an empty string


def problem(template: str, render: Callable[[list[dict]], str], chat: list[dict]) -> str:
    """Why a chat template is not used, or an empty string. Each template is tried once, on CHATS and on `chat`."""
    if template not in outcomes:
        outcomes[template] = _try(render, [chat, *CHATS])
    return outcomes[template]


def _try(render, chats) -> str:
    """Render chats in a forked process, whose memory and time are limited by the system."""
    if not hasattr(os, "fork"):
        return ""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            _limit()
            code = int(any(_length(render, chat) > LETTERS for chat in chats))
        finally:
            os._exit(code)
    end = time.monotonic() + GIVEN_UP
    done, status = os.waitpid(child, os.WNOHANG)
    while not done:
        time.sleep(0.002)
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
        done, status = os.waitpid(child, os.WNOHANG)
    if status == 0:
        return ""
    return f"it takes over {SECONDS} s, 1 GB or {LETTERS:,} letters for a short chat"


def _limit() -> None:
    """Limit this process to so much more memory than it has, and to so much time."""
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    try:
        with open("/proc/self/statm") as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, size + ROOM))
    except (OSError, ValueError):  # not on Linux: the time alone is limited
        pass


def _length(render, chat) -> int:
    """Letters of a rendered chat; 0 where the template refuses it."""
    try:
        return len(render(chat))
    except MemoryError:
        return LETTERS + 1
    except Exception:  # whatever a foreign template raises is reported when it is used
        return 0
