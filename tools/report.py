"""The report of a study, or of a single run, from their run directories.

    python tools/report.py experiments/NAME [--runs=DIR] [--out=DIR]
    python tools/report.py RUN

Of a study: prints the tables and the verdicts on its claims as Markdown, and writes them with results.csv, trials.csv,
results.tex and report.html. Of a run: writes its report.html again, also while it runs. docs/studies.md explains each
figure.
"""

import sys
from pathlib import Path

from absl import flags

from lm import command_line
from lm.terminal import say, stop

_RUNS = flags.DEFINE_string("runs", "", "Folder of the study's runs; '' = runs/NAME.")
_OUT = flags.DEFINE_string("out", "", "Folder for the results of a study; '' = that of its runs.")


def main(argv: list[str]) -> None:
    """Reports on a study or a run; status 1 if something is damaged or wrong, after all the rest."""
    (name,) = command_line.arguments(argv, "experiments/NAME or RUN")
    folder = Path(name)
    with command_line.one_line_errors():
        if (folder / "study.py").exists():
            report(folder)
        elif (folder / "config.json").exists() or (folder / "metrics.jsonl").exists():
            from lm.tracking import report as run_report

            say(run_report.write_report(folder))
        else:
            stop(f"error: {folder}: expected the folder of a study, with study.py, or of a run, with config.json")


def report(folder: Path) -> None:
    """Prints and writes the report of a study."""
    from lm import study as study_lib
    from lm.study import analysis as analysis_lib
    from lm.study import report as report_lib

    study = study_lib.load(folder)
    root = Path(_RUNS.value or f"runs/{study.name}")
    analysis = analysis_lib.analyse(study, root)
    written = report_lib.write(analysis, Path(_OUT.value) if _OUT.value else root)
    say((written[0]).read_text(encoding="utf-8"))
    say("written:", ", ".join(map(str, written)))
    for error in analysis.errors:
        say(f"error: {error}", file=sys.stderr)
    if analysis.errors:
        stop(f"{len(analysis.errors)} errors; all that could be reported is above")


if __name__ == "__main__":
    command_line.run(main)
