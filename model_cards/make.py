"""The cards of the bundled nowcasters, made of the numbers beside them; with a benchmark, of its numbers.

python model_cards/make.py                                       # after a change of the words
python model_cards/make.py --benchmark docs/benchmark/summary.json
python model_cards/make.py --bundle runs/nino-small              # a nowcaster that `hf-nino remake` left
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path

from hf_nino.bench.training.summary import Summary
from hf_nino.metatrain.bundle import EVALUATION, bundle, write_card
from hf_nino.metatrain.remake import NOWCASTER, TRAJECTORIES, making_of
from hf_nino.nowcaster.hub import bundled_nowcasters

CARDS = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benchmark", type=Path, help="summary.json of a benchmark with runs of nino:NAME")
    parser.add_argument("--bundle", type=Path, help="folder that `hf-nino remake NAME` left, with the name of NAME")
    args = parser.parse_args()
    if args.bundle is not None:
        recorded = json.loads((args.bundle / TRAJECTORIES / "summary.json").read_text())
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], check=True, capture_output=True, text=True
        ).stdout.strip()
        hours = recorded["seconds"] / 3600
        name = args.bundle.name
        bundle(args.bundle / NOWCASTER, name, making_of(name), record_hours=hours, commit=commit)
    benchmark = None if args.benchmark is None else Summary.from_json(json.loads(args.benchmark.read_text()))
    for name in bundled_nowcasters():
        if benchmark is not None or (CARDS / name / EVALUATION).is_file():
            print(write_card(name, benchmark, CARDS))
        else:
            print(f"{name} has no card: it takes a benchmark with nino:{name}")


if __name__ == "__main__":
    main()
