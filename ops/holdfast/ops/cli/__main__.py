"""``python -m holdfast.ops.cli``: the same as ``holdfast``."""

from holdfast.ops.cli.app import main

if __name__ == "__main__":
    main()
