"""Run atheris on one reader of foreign bytes; see tools/fuzz."""

from __future__ import annotations

import sys
from hashlib import sha256

import atheris

with atheris.instrument_imports(include=["fusemig"]):
    from support.fuzzing import CORPUS, TARGETS, seeds


def main() -> int:
    """Fuzz the target that was named, or write the seeds of all."""
    if sys.argv[1:] == ["--seeds"]:
        for name, inputs in seeds().items():
            (CORPUS / name).mkdir(parents=True, exist_ok=True)
            for data in inputs:
                (CORPUS / name / sha256(data).hexdigest()[:16]).write_bytes(data)
        return 0
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.stderr.write(f"usage: tools/fuzz --seeds | TARGET [libFuzzer's options]\ntargets: {', '.join(TARGETS)}\n")
        return 2
    target = TARGETS[sys.argv[1]]
    atheris.Setup([sys.argv[0], *sys.argv[2:], str(CORPUS / sys.argv[1])], target)
    atheris.Fuzz()
    return 0


sys.exit(main())
