"""What a service or a notebook in another folder needs, under a name that is no other package's.

    import sys
    sys.path.append("/path/to/lasttoken")
    from lasttoken import load_run

The project's own files have plain names (data, model, evaluate), as other packages do. Here each side gets its own: the
project's files are imported as a group, and sys.path and sys.modules are left as they were.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
NAMES = {path.stem for path in HERE.glob("*.py")} - {"lasttoken"}


def _take() -> dict:
    """Take the modules of these names, and of packages of these names, out of sys.modules."""
    names = [name for name in sys.modules if name.partition(".")[0] in NAMES]
    return {name: sys.modules.pop(name) for name in names}


_inside = Path(getattr(sys.modules.get("trained"), "__file__", "/")).parent == HERE  # in one of the project's commands
_before = {} if _inside else _take()
sys.path.insert(0, str(HERE))
try:
    from errors import Degenerate, Untrusted, UserError
    from trained import Run, load_run
finally:
    sys.path.remove(str(HERE))
    if not _inside:
        _take()
        sys.modules.update(_before)

__all__ = [
    "Degenerate",
    "Run",
    "Untrusted",
    "UserError",
    "load_run",
]
