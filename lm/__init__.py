"""`lm`: pre-train language models, carry them over, and fine-tune them, in JAX.

    lm.load(RUN)               a trained run: .predict, .generate, .logits, .embed, .params, .config, .tokenizer
    lm.train(config, workdir)  trains, or resumes the run in `workdir`
    lm.LoadedModel             the type of what `load` returns
    lm.Generated               the type of texts with log-probabilities, from `.generate(..., log_probs=True)`

These names are the Python interface. `import lm` imports nothing else; JAX is imported when one of them is used.
"""

TYPE_CHECKING = False  # type checkers take it for true; even `typing` would take longer than all else here
if TYPE_CHECKING:
    from typing import Any

    from lm.predict import Generated as Generated
    from lm.predict import LoadedModel as LoadedModel
    from lm.predict import load as load

__version__ = "0.1.0"
_IN_PREDICT = ("Generated", "LoadedModel", "load")


def __getattr__(name: str) -> "Any":
    import importlib

    if name in _IN_PREDICT:
        return getattr(importlib.import_module("lm.predict"), name)
    if name == "train":  # the module, which can be called
        return importlib.import_module("lm.train")
    raise AttributeError(f"module 'lm' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *_IN_PREDICT, "train"])
