"""The runs below a folder: list, show, diff, compare, clean. Run directories are the only database.

    python tools/runs.py list    [FOLDER] [--where='best.nll<2.5'] [--sort=best] [--columns=name,state,nll]
    python tools/runs.py show    RUN
    python tools/runs.py diff    RUN RUN...
    python tools/runs.py compare RUN... [--out=runs.html] [--x=step|tokens|flops|seconds] [--metrics=nll,loss]
    python tools/runs.py clean   FOLDER [--state=failed] [--older_than=30d] [--keep=best,last] [--remove=runs] [--yes]

The FOLDER of list is 'runs' unless given. A condition of --where is KEY=VALUE (with * and ?), !=, <, <=, > or >=; a key
is a column, a key of the config or a figure of summary.json. docs/registry.md explains the commands.
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from lm import command_line
from lm.terminal import say, stop

_WHERE = flags.DEFINE_multi_string(
    "where", [], "list, compare, clean: only runs that fulfil the condition; several = all."
)
_SORT = flags.DEFINE_string("sort", "name", "list: key to sort by; -KEY = descending; best = the best first.")
_COLUMNS = flags.DEFINE_list("columns", [], "list: keys to show; none = the usual ones.")
_OUT = flags.DEFINE_string("out", "runs.html", "compare: the page.")
_X = flags.DEFINE_enum("x", "step", ["step", "tokens", "flops", "seconds"], "compare: what curves are over.")
_METRICS = flags.DEFINE_list("metrics", [], "compare: metrics to draw; none = the usual ones.")
_STATE = flags.DEFINE_list("state", [], "clean: only runs in these states.")
_OLDER = flags.DEFINE_string("older_than", "", "clean: only runs not written for so long: 12h, 30d, 8w.")
_REMOVE = flags.DEFINE_enum("remove", "checkpoints", ["checkpoints", "runs"], "clean: what to delete of them.")
_KEEP = flags.DEFINE_list("keep", ["best", "last"], "clean: which checkpoints stay: best, last, both; or none.")
_YES = flags.DEFINE_bool("yes", False, "clean: delete; otherwise only what would be deleted is listed.")


def main(argv: list[str]) -> None:
    """Runs a command; status 1 if something was wrong, after all the rest."""
    name, *arguments = command_line.arguments(argv, f"{'|'.join(COMMANDS)}...")
    if name not in COMMANDS:
        stop(f"error: no command '{name}'; expected one of {', '.join(COMMANDS)}; see --help")
    with command_line.one_line_errors():
        COMMANDS[name](arguments)


def list_runs(arguments: list[str]) -> None:
    """Prints a table of the runs below a folder."""
    from lm.registry import listing

    root = Path(_only(arguments, "list [FOLDER]", "runs"))
    found, values = _selected(root, [*_COLUMNS.value, _SORT.value.removeprefix("-")])
    entries = listing.arrange(found, _SORT.value, values)
    usual = [key for key in listing.COLUMNS if key != "arm" or any(entry.arm for entry in entries)]
    if entries:
        say(listing.table(entries, _COLUMNS.value or usual, values))


def show(arguments: list[str]) -> None:
    """Prints a run in detail."""
    from lm.registry import details

    _print(*details.show(Path(_only(arguments, "show RUN"))))


def diff(arguments: list[str]) -> None:
    """Prints the differences between runs."""
    from lm.registry import details

    if len(arguments) < 2:
        stop("error: diff: expected two runs or more; see --help")
    _print(*details.diff([Path(name) for name in arguments]))


def compare(arguments: list[str]) -> None:
    """Writes a page with the curves of runs; a folder of runs stands for all that --where selects."""
    from lm.registry import comparison

    command_line.check_output("out", _OUT.value)
    if not arguments:
        stop("error: compare: expected runs, or folders of runs; see --help")
    folders = [entry.folder for name in arguments for entry in _selected(Path(name))[0]]
    if not folders:
        stop("error: compare: no run is left")
    shown, wrong = comparison.write(folders, Path(_OUT.value), _X.value, _METRICS.value)
    _print(f"{_OUT.value}: {len(shown):,} runs", wrong)


def clean(arguments: list[str]) -> None:
    """Lists what would be deleted, and deletes it with --yes."""
    from lm.registry import cleaning, listing
    from lm.terminal import table

    root, what = Path(_only(arguments, "clean FOLDER")), _REMOVE.value
    if what == "runs" and not (_STATE.value or _OLDER.value or _WHERE.value):
        stop("error: --remove=runs: say which, with --state, --older_than or --where")
    if what == "runs" and flags.FLAGS["keep"].present:
        stop("error: --keep names checkpoints that stay, but --remove=runs deletes whole runs; leave one of them out")
    if _OLDER.value and not (listing.number(_OLDER.value, "age") or 0) > 0:
        stop(f"error: --older_than={_OLDER.value}: expected a time above 0 with a unit, such as 12h, 30d or 8w")
    older = [f"age>{_OLDER.value}"] if _OLDER.value else []
    for state in _STATE.value:
        listing.condition(f"state={state}")  # refuses one that there is not
    entries, _ = _selected(root, more=older)
    entries = [entry for entry in entries if not _STATE.value or entry.state in _STATE.value]
    removals = [each for each in cleaning.plan(entries, root, what, _KEEP.value) if each.paths or each.why]
    rows = [
        (each.run, listing.in_bytes(each.size) if each.paths else "", _goes(each.run, each.paths), each.why)
        for each in removals
    ]
    if rows:
        say(table(("run", "size", "goes", ""), rows, (1,)))
    number, size = sum(len(each.paths) for each in removals), sum(each.size for each in removals)
    if not number or not _YES.value:
        say(
            f"{number:,} folders, {listing.in_bytes(size)}; "
            + ("--yes deletes them" if number else "nothing to delete")
        )
        return
    freed, wrong = cleaning.carry_out(removals, say)
    _print(f"freed {listing.in_bytes(freed)}", wrong)


def _goes(run: Path, paths: Sequence[Path]) -> str:
    """What of a run goes, in words."""
    if run in paths:
        return "all of it"
    return ", ".join(str(path.relative_to(run)) for path in paths)


def _print(text: str, wrong: list[str]) -> None:
    """Prints a result; then ends with status 1 if something was wrong."""
    say(text)
    for each in wrong:
        say(f"error: {each}", file=sys.stderr)
    if wrong:
        sys.exit(1)


def _only(arguments: list[str], usage: str, default: str = "") -> str:
    """The only argument of a command."""
    if len(arguments) > 1 or not (arguments or default):
        stop(f"error: arguments: found {' '.join(arguments) or 'none'}, expected {usage}; see --help")
    return arguments[0] if arguments else default


def _selected(root: Path, keys: Iterable[str] = (), more: Iterable[str] = ()) -> Any:
    """The runs below a folder that --where and `more` select, and their `Values`; says on stderr what is wrong.

    Raises:
      ConfigError: no run below the folder, selected or not, has one of the keys or that of a condition.
    """
    from lm.registry import listing

    conditions = [listing.condition(text) for text in (*_WHERE.value, *more)]
    wanted = {each.key: None for each in conditions} | dict.fromkeys(keys)
    entries, notes = listing.find(root, wanted.keys() - listing.COLUMNS)
    values = listing.Values(entries)
    for key in wanted:
        values.check(key)
    selected = listing.select(entries, conditions, values)
    for note in notes:
        say(f"note: {note}", file=sys.stderr)
    say(f"{len(selected):,} of {len(entries):,} runs", file=sys.stderr)
    return selected, listing.Values(selected)


COMMANDS = {"list": list_runs, "show": show, "diff": diff, "compare": compare, "clean": clean}

if __name__ == "__main__":
    command_line.run(main)
