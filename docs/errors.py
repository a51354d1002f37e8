"""Writes docs/errors.rst from ``zerog.exceptions``: ``python docs/errors.py``."""

from __future__ import annotations

from pathlib import Path

from zerog.exceptions import REASONS, tree


def text() -> str:
    """Return the reference of errors and reasons."""
    lines = ["Errors", "======", "", "Every error body is a problem document with one of these codes.", ""]
    # The class that brought a code in tells its meaning; those below it tell one case.
    meanings = {error.code: error for error in reversed(list(tree()))}
    for error in sorted(meanings.values(), key=lambda one: (one.status, one.code)):
        lines += [f"``{error.code}`` ({error.status})", f"    {error.title()}", ""]
    lines += ["Reasons", "=======", "", "Why a job failed: the member ``reason``, and the code of its data.", ""]
    for reason, meaning in sorted(REASONS.items()):
        lines += [f"``{reason}``", f"    {meaning}", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    Path(__file__).with_name("errors.rst").write_text(text())
