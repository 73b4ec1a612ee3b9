"""The report of a study, of a single run, or of several runs, from their run directories.

    python tools/report.py experiments/NAME [--runs=DIR] [--out=DIR]
    python tools/report.py RUN
    python tools/report.py RUN RUN... [--out=DIR]

Of a study: prints the tables and the verdicts on its claims as Markdown, and writes them with results.csv, trials.csv,
results.tex and report.html. Of a run: writes its report.html again, also while it runs. Of several runs: writes
runs.html, their curves over each other, as `tools/runs.py compare` does. docs/studies.md explains each figure.
"""

import sys
from pathlib import Path

from absl import flags

from lm import command_line
from lm.terminal import say, stop

_RUNS = flags.DEFINE_string("runs", "", "Folder of the study's runs; '' = runs/NAME.")
_OUT = flags.DEFINE_string("out", "", "Folder of what is written; '' = that of the study's runs; of several runs, '.'.")


def main(argv: list[str]) -> None:
    """Reports on a study or a run; status 1 if something is damaged or wrong, after all the rest."""
    folder, *others = map(Path, command_line.arguments(argv, "experiments/NAME or RUN..."))
    with command_line.one_line_errors():
        if others:
            overlay([folder, *others])
        elif (folder / "study.py").exists():
            report(folder)
        elif (folder / "config.json").exists() or (folder / "metrics.jsonl").exists():
            from lm.tracking import report as run_report

            say(run_report.write_report(folder))
        else:
            stop(f"error: {folder}: expected the folder of a study, with study.py, or of a run, with config.json")


def overlay(folders: list[Path]) -> None:
    """Writes the page of several runs; status 1 if one of them is damaged or missing, after all the rest."""
    from lm.registry import comparison

    if studies := [folder for folder in folders if (folder / "study.py").exists()]:
        stop(f"error: {studies[0]} is a study: give it alone, or the folders of runs")
    out = Path(_OUT.value or ".") / "runs.html"
    command_line.check_output("out", str(out))
    shown, wrong = comparison.write(folders, out)
    say(f"{out}: {len(shown):,} runs")
    for error in wrong:
        say(f"error: {error}", file=sys.stderr)
    if wrong:
        sys.exit(1)


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
