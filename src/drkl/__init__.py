"""drkl: distil a language model into a smaller one that is faithful to its teacher, and as diverse.

The public names stand in ``__init__.pyi``. They load on first use, so that ``import drkl`` stays light.
"""

import lazy_loader

from drkl._version import __version__ as __version__

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
