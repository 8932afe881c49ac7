"""NiNo on image classifiers of transformers: convolutions, batch normalization, patches."""

import pytest
import torch
from integration_helpers import NOWCASTERS, PERIOD, STEPS, make_nowcaster, nowcasts, uncovered, written
from torch import nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from hf_nino import NiNoTrainer, NiNoTrainingArguments

SIZE, CLASSES = 16, 3


def resnet():
    sizes = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(num_channels=1, num_labels=CLASSES, **sizes))


def convnext():
    sizes = {"patch_size": 2, "hidden_sizes": [4, 8], "depths": [1, 1], "num_stages": 2}
    return ConvNextForImageClassification(ConvNextConfig(num_channels=1, num_labels=CLASSES, **sizes))


def vit():
    sizes = {"image_size": SIZE, "patch_size": 4, "hidden_size": 16, "intermediate_size": 24}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2}
    return ViTForImageClassification(ViTConfig(num_channels=1, num_labels=CLASSES, **sizes, **layers))


def images(count=24):
    """Each class a stripe at a height of its own, in noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % CLASSES
    pixels = torch.randn(count, 1, SIZE, SIZE, generator=generator) / 4
    for row, label in enumerate(labels):
        pixels[row, 0, 5 * label : 5 * label + 3] += 1
    return [{"pixel_values": image, "labels": label} for image, label in zip(pixels, labels, strict=True)]


def trainer_for(folder, make, nowcaster, **others):
    set_seed(0)
    args = NiNoTrainingArguments(str(folder), **nowcasts(**others))
    return NiNoTrainer(model=make(), args=args, train_dataset=images(), nowcaster=make_nowcaster(nowcaster))


@pytest.mark.parametrize("make", [resnet, convnext, vit])
@NOWCASTERS
def test_image_classifiers_are_nowcast(tmp_path, make, nowcaster):
    """All nowcasts that are due are written, every trainable parameter is seen, and training goes on to learn."""
    trainer = trainer_for(tmp_path, make, nowcaster, learning_rate=3e-3)
    trainer.train()
    assert written(trainer) == [5, 10, 15]
    assert not uncovered(trainer.nowcasting, trainer.model)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == STEPS and min(losses[-4:]) < losses[0]


@NOWCASTERS
def test_the_statistics_of_batch_normalization_follow_a_jump(tmp_path, nowcaster):
    """Right after a nowcast the running means and variances of a ResNet are those of its new parameters, over the last
    training batches; without nowcasts they are the average of the optimizer's, which is something else."""
    ours, plain = (trainer_for(tmp_path, resnet, name, max_steps=PERIOD) for name in (nowcaster, "none"))
    ours.train()
    plain.train()
    assert written(ours) == [PERIOD] and len(ours._recent_inputs) == PERIOD
    first = ours.model.resnet.embedder.embedder
    outputs = [first.convolution(batch["pixel_values"]) for batch in ours._recent_inputs]
    means = torch.stack([output.mean((0, 2, 3)) for output in outputs]).mean(0)
    variances = torch.stack([output.var((0, 2, 3)) for output in outputs]).mean(0)
    torch.testing.assert_close(first.normalization.running_mean, means)
    torch.testing.assert_close(first.normalization.running_var, variances)
    other = plain.model.resnet.embedder.embedder.normalization
    assert not torch.allclose(other.running_mean, means, rtol=1e-2)
    norms = [module for module in ours.model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) > 2 and all(int(norm.num_batches_tracked) == PERIOD for norm in norms)
