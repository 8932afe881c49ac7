"""``python -m hf_nino.cli``."""

from . import main

main()
