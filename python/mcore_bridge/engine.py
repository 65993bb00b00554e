"""The C++ module, with torch loaded first (it provides the symbols the engine links against)."""

import torch  # noqa: F401

try:
    from . import _core
except ImportError as error:  # pragma: no cover - depends on the installation
    raise ImportError(
        f"mcore_bridge's engine does not load: {error}. It is built for the torch it was installed with; after changing "
        "torch, build again: pip install --no-build-isolation --force-reinstall --no-deps mcore-bridge (or `make build`)"
    ) from error

__all__ = ["_core"]
