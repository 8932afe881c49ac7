"""``python -m hf_nino.accelerate_configs NAME``: the path of a configuration, for ``accelerate launch``."""

from __future__ import annotations

import sys

from . import config_file, config_names


def main() -> None:
    """Write the path to standard output."""
    if len(sys.argv) != 2:
        sys.exit(f"usage: python -m hf_nino.accelerate_configs {{{','.join(config_names())}}}")
    try:
        sys.stdout.write(f"{config_file(sys.argv[1])}\n")
    except ValueError as error:
        sys.exit(f"{error}")


if __name__ == "__main__":
    main()
