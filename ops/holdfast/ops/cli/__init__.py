"""The command line: ``holdfast``.  :mod:`holdfast.ops.cli.app` is its entry point."""

from holdfast.ops.cli.app import main

__all__ = ["main"]
