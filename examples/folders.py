"""What the scripts that save and resume ask of ``--folder``, before they load a model."""

from __future__ import annotations

import argparse
import tempfile


def check_folder(parser: argparse.ArgumentParser, args: argparse.Namespace, state: str) -> None:
    """A usage error if nothing can be saved in ``args.folder``, or if ``args.resume`` finds no ``state`` there, a pattern of names."""
    if args.resume and not any(args.folder.glob(state)):
        parser.error(f"--resume: no state in {str(args.folder)!r}; run without it first, or name another --folder")
    try:
        args.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=args.folder):
            pass
    except OSError as error:
        parser.error(f"--folder: cannot write into {str(args.folder)!r}: {error.strerror}")
