"""Fine-tuning a language model on problems: only answers count, none of the evaluation is trained on."""

import sys
from types import ModuleType

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_nino import NeuralGraph
from hf_nino.bench.training.tasks import TASKS, ReasoningTask, reasoning
from hf_nino.demo import packages
from hf_nino.demo.packages import MissingPackage

QUICK = {"steps": 20, "batch_size": 8, "learning_rate": 1e-2, "constant_learning_rate": 1e-2}
CPU = torch.device("cpu")


def gym(name, size, seed):
    """Sums of two digits in words; the two seeds share some of them."""
    rng = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(size):
        first, second = torch.randint(0, 10, (2,), generator=rng).tolist()
        long = " plus 0" * 20 if (first, second) == (0, 0) else ""
        found.append({"question": f"{name} {first} plus {second}{long} is", "answer": f"{first + second}"})
    return found


@pytest.fixture
def made(tmp_path, monkeypatch):
    """The task on a tiny Llama that is not SmolLM2, with a reasoning-gym that is not installed."""
    module = ModuleType("reasoning_gym")
    module.create_dataset = gym
    monkeypatch.setitem(sys.modules, "reasoning_gym", module)
    monkeypatch.setattr(packages, "find_spec", lambda name: type("Spec", (), {"origin": f"/nowhere/{name}/x.py"}))
    words = ["<pad>", "<end>", "plus", "is", "add", "sum", *map(str, range(19))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(tmp_path / "model")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), tie_word_embeddings=True, **shape))
    model.save_pretrained(tmp_path / "model")
    settings = {"problems": ("add", "sum"), "length": 16, "training_rows": 60, "evaluation_rows": 30}
    return ReasoningTask(name="sums", model=str(tmp_path / "model"), **settings, **QUICK)


def test_no_problem_of_the_evaluation_is_trained_on(made, tmp_path):
    """Though both were made of the same few; none occurs twice, and those that are too long are left out."""
    data = made.load(tmp_path / "cache")
    training, evaluation = ({tuple(row) for row in rows.tolist()} for rows in (data.training, data.evaluation))
    assert training and evaluation and not training & evaluation
    assert (len(training), len(evaluation)) == (len(data.training), len(data.evaluation))
    first, second = (set(reasoning.make_problems(made.problems, seed, 60)) for seed in (0, 1))
    assert first & second and any(len(question.split()) > 16 for question, _ in first | second)


def test_the_loss_is_that_of_the_answers(made, tmp_path):
    """Computed by hand from all logits: answer and end of every row, and neither question nor padding; the accuracy
    is the share of rows that are right throughout."""
    data = made.load(tmp_path / "cache")
    model = made.build_model(data)
    losses, right = [], []
    for tokens, answers in zip(data.evaluation.long(), data.evaluation_answers, strict=True):
        (places,) = answers.nonzero(as_tuple=True)
        assert places.tolist() == list(range(places[0], places[0] + 2)) and tokens[places[-1]] == 1
        assert not tokens[places[-1] + 1 :].any() and tokens[: places[0]].all()
        logits = model(input_ids=tokens[None]).logits[0, places - 1]
        losses += [
            functional.cross_entropy(a[None], b[None]).item() for a, b in zip(logits, tokens[places], strict=True)
        ]
        right.append(bool((logits.argmax(-1) == tokens[places]).all()))
    found = made.evaluate(model, data)
    assert found["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert found["accuracy"] == pytest.approx(sum(right) / len(right))
    batch = next(made.batches(data, 0, CPU))
    logits = model(input_ids=batch["input_ids"]).logits
    targets = batch["input_ids"].where(batch["answers"], -100)
    by_hand = functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
    torch.testing.assert_close(made.loss(model, batch), by_hand)
    assert batch["input_ids"].shape[1] == int(batch["answers"].any(0).nonzero().max()) + 1 < 16


def test_it_is_learned_and_begins_with_the_pretrained_model(made, tmp_path):
    """Every seed begins with the same weights, those of the file; the loss of what is trained on falls to less than
    half, and that of the evaluation falls."""
    data = made.load(tmp_path / "cache")
    model, other = (made.build_model(data) for _ in range(2))
    pretrained = LlamaForCausalLM.from_pretrained(made.model)
    for one in (model, other):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), pretrained.parameters(), strict=True))
    before = made.evaluate(model, data)
    optimizer, batches = torch.optim.AdamW(model.parameters(), lr=1e-2), made.batches(data, 0, CPU)
    batch = next(batches)
    first = made.loss(model, batch).item()
    for _ in range(120):
        made.loss(model, next(batches)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert made.loss(model, batch).item() < first / 2
    assert made.evaluate(model, data)["loss"] < before["loss"]
    assert model.training


def test_its_neural_graph_builds(made, tmp_path):
    """From the inputs that a nowcaster on the graph is given."""
    data = made.load(tmp_path / "cache")
    inputs = made.example_inputs(next(made.batches(data, 0, CPU)))
    model = made.build_model(data)
    graph = NeuralGraph.from_model(model, example_inputs=inputs)
    assert graph.num_parameters == sum(parameter.numel() for parameter in model.parameters())


def test_what_is_missing_is_named(made, tmp_path, monkeypatch):
    """Packages, with the extra that brings them; settings; weights."""
    for name, value in (("problems", ()), ("length", 0), ("evaluation_rows", 0)):
        with pytest.raises(ValueError, match=f"`{name}` must"):
            ReasoningTask(name="sums", **{name: value}, **QUICK)
    data = made.load(tmp_path / "cache")
    del data.weights["model.norm.weight"]
    with pytest.raises(ValueError, match=r"a whole model, but model\.norm\.weight are not"):
        made.build_model(data)
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match=r"reasoning-gym, which is not installed; .*hf_nino\[reasoning\]"):
        made.load(tmp_path / "cache")


@pytest.mark.slow
def test_the_packages_are_what_they_are_taken_for(tmp_path):
    """SmolLM2 has 134,515,008 parameters, and problems of all four kinds fit."""
    task = TASKS["smollm2-reasoning"]
    try:
        data = task.load(tmp_path)
    except MissingPackage as absent:
        pytest.skip(str(absent))
    assert len(data.training) > 3000 and len(data.evaluation) > 100
    assert sum(parameter.numel() for parameter in task.build_model(data).parameters()) == 134_515_008
