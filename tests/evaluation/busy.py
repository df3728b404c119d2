"""`lbdt evaluate --processes 2` of a world that takes ten minutes to load: `python -m tests.evaluation.busy FOLDER`."""

import os
import sys
import time
from pathlib import Path

from lbdt.evaluation.request import EvaluationRequest, evaluate


class Busy:
    """Leaves the number of each process that loads it in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self):
        (self.folder / str(os.getpid())).touch()
        time.sleep(600)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    given = dict.fromkeys(("own", "others", "vlm", "nudity"))
    given |= {"kinds": (), "concepts": (), "seeds": (), "sweep_seeds": (), "quick": True}
    evaluate(
        EvaluationRequest(
            subject=Busy(folder), out=folder.with_name("out"), threads=1, device="cpu", **given
        ),
        processes=2,
        command="",
    )
