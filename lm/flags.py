"""What the command lines of `lm.main` and the tools share."""

import os

from absl import app, logging

# What helps on TPU, read once when libtpu is loaded. XLA may cut a matrix product in pieces and send each as soon as it
# is done; with few thousand columns the pieces are too small for the matrix unit (docs/performance.md).
LIBTPU = "--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000"


def set_libtpu() -> None:
    """Sets `LIBTPU` where the user has not set LIBTPU_INIT_ARGS; before JAX finds its devices."""
    os.environ.setdefault("LIBTPU_INIT_ARGS", LIBTPU)


def parse(argv: list[str]) -> list[str]:
    """For `absl.app.run(flags_parser=...)`: a misspelt --config.a.b ends in one line, not in a traceback."""
    logging.set_verbosity(logging.WARNING)  # Orbax tells every detail of every save at INFO
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError) as error:  # how ml_collections refuses a key that the config lacks
        said = str(error).strip("\"'").replace("\\n", ". ").replace("\n", ". ").replace("\\'", "'")
        flag = next((f" in {arg}" for arg in argv if arg.startswith("--config.") and said.split("'")[0] in arg), "")
        raise SystemExit(f"error: unknown config key{flag}: {said}") from None
