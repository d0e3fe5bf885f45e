"""Python executes this where a new process begins, if the folder is on PYTHONPATH: the fault of `MGVQ_FAULT` is put in, and
`MGVQ_AUDIT` is told what happens."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
import audit
import faults

faults.arm_from_environment()
audit.listen()
