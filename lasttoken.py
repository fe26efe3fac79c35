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


def _ours(module) -> bool:
    """Whether a module is a file of this project."""
    return Path(getattr(module, "__file__", None) or "/").resolve().parent == HERE


_before = {name: sys.modules[name] for name in list(sys.modules) if name.partition(".")[0] in NAMES}
_others = {name for name, module in _before.items() if not _ours(_before.get(name.partition(".")[0], module))}
_path = sys.path[:]
for _name in _others:
    del sys.modules[_name]
sys.path.insert(0, str(HERE))
try:
    from errors import Degenerate, Untrusted, UserError
    from trained import Run, load_run
finally:
    sys.path[:] = _path
    for _name in NAMES - (_before.keys() - _others):
        sys.modules.pop(_name, None)
    sys.modules.update({name: _before[name] for name in _others})

__all__ = ["Degenerate", "Run", "Untrusted", "UserError", "load_run"]
