"""Turn the dropout of a model off."""

from __future__ import annotations

from torch import nn


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability in a model to 0; its config keeps the published ones.

    Most families keep some as plain numbers for the functional form: T5 and Llama that of attention, BART all of them.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
