"""Gradients of objectives, split into pushes of target and tail, and the analysis of a trained student with them.

The public names stand in ``__init__.pyi`` and load on first use.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
