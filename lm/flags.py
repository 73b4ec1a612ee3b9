"""What the command lines of `lm.main` and the tools share."""

from absl import app, logging


def parse(argv: list[str]) -> list[str]:
    """For `absl.app.run(flags_parser=...)`: a misspelt --config.a.b ends in one line, not in a traceback."""
    logging.set_verbosity(logging.WARNING)  # Orbax tells every detail of every save at INFO
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError) as error:  # how ml_collections refuses a key that the config lacks
        said = str(error).strip("\"'").replace("\\n", ". ").replace("\n", ". ").replace("\\'", "'")
        flag = next((f" in {arg}" for arg in argv if arg.startswith("--config.") and said.split("'")[0] in arg), "")
        raise SystemExit(f"error: unknown config key{flag}: {said}") from None
