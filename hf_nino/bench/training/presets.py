"""Ready-made matrices, by how long one is willing to wait."""

from __future__ import annotations

from .plan import Matrix

SELECTION = {"language": "gpt2-32-kjv"}
BASELINES = ("ema", "lawa", "schedulefree", "muon", "l2o")
NOWCASTS = ("spectral", "linear", "momentum", "lookahead")
ON_OTHERS = ("muon+spectral", "muon+momentum", "muon+linear", "sgd", "sgd+spectral", "sgd+momentum", "sgd+linear")
SMALL_LANGUAGE = ("gpt2-64-kjv", "llama-64-sotu", "gpt2-64-wordnet", "llama-64-pystdlib")

PRESETS = {
    "smoke": Matrix(
        tasks=("tiny",),
        methods=("spectral", "linear", "momentum", "ema", "muon+momentum", "l2o"),
        protocols=("paper", "fixed"),
        seeds=(0,),
    ),
    "paper": Matrix(
        tasks=(*SMALL_LANGUAGE, "fm-conv16"),
        methods=(*NOWCASTS, *BASELINES, *ON_OTHERS),
        protocols=("paper",),
        selection=SELECTION,
    ),
    "tuned": Matrix(
        tasks=SMALL_LANGUAGE,
        methods=(*NOWCASTS, *BASELINES, *ON_OTHERS),
        protocols=("fixed", "tuned", "robust"),
        selection=SELECTION,
    ),
    "full": Matrix(
        tasks=(
            *SMALL_LANGUAGE,
            "gpt2-64-kjv-batch4",
            "gpt2-64-kjv-batch64",
            "gpt2-128-sotu",
            "llama-128-wordnet",
            "gpt2-256-sotu",
            "llama-384-sotu",
            "fm-conv16-paper",
            "fm-conv32-paper",
            "fm-vit",
            "minilm-tweets",
            "minilm-tweets-head",
            "minilm-tweets-lora",
            "smollm2-reasoning",
        ),
        methods=(*NOWCASTS, *BASELINES, *ON_OTHERS),
        selection=SELECTION,
    ),
}
"""``smoke``: everything works (2 minutes on 2 cores); ``paper`` and ``tuned``: hours on 2 cores; ``full``: a GPU."""
