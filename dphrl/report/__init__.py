"""`dphrl report`: one self-contained HTML page of one or several runs, to read, print and mail.

The page can be read without network and without script; script adds the read-out, the legend's switches and the browser
of completions. Text of models and data is escaped, and a policy in the page forbids it to load or run anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from dphrl.config.loading import InputError
from dphrl.durable import DISK_FAULTS, write_output
from dphrl.report.page import render_page
from dphrl.report.runs import find_runs, group_arms


def write_report(run_dirs: Sequence[Path], output: Path) -> None:
    """Write the report of `run_dirs`, each a run's folder or one directly above run folders, to `output`.

    Runs of a suite are grouped by arm, with the interval over seeds; any other run is an arm of its own. If a run lacks
    something (it was killed, it has no reference stage), the page says so. The file is replaced as a whole.
    Raises InputError for a path that is neither of the two, or an output that cannot be written.
    """
    runs = find_runs([Path(path).expanduser() for path in run_dirs])
    page = render_page(group_arms(runs), datetime.now(UTC))
    output = Path(output).expanduser()
    if output.is_dir():
        raise InputError(f"{output}: is a folder; name the HTML file to write, such as {output / 'report.html'}")
    try:
        write_output(output, page)
    except OSError as error:
        if error.errno in DISK_FAULTS:
            raise
        raise InputError(f"{output}: cannot be written: {error.strerror}; name another file with -o") from None
