"""drkl: distil a language model into a smaller one that is faithful to its teacher, and as diverse.

The public names load on first use, so that ``import drkl`` and ``drkl --help`` stay light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from drkl._version import __version__

if TYPE_CHECKING:
    from drkl.errors import DrklError as DrklError
    from drkl.losses import LMHead as LMHead
    from drkl.losses import as_gkd_loss as as_gkd_loss
    from drkl.losses import distillation_loss as distillation_loss
    from drkl.losses import fused_distillation_loss as fused_distillation_loss
    from drkl.objectives import OBJECTIVES as OBJECTIVES
    from drkl.objectives import Objective as Objective
    from drkl.objectives import decoupled as decoupled
    from drkl.objectives import make_objective as make_objective

_HOMES = {
    "DrklError": "drkl.errors",
    "LMHead": "drkl.losses",
    "OBJECTIVES": "drkl.objectives",
    "Objective": "drkl.objectives",
    "as_gkd_loss": "drkl.losses",
    "decoupled": "drkl.objectives",
    "distillation_loss": "drkl.losses",
    "fused_distillation_loss": "drkl.losses",
    "make_objective": "drkl.objectives",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'drkl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
