"""Train an image classifier with NiNoTrainer, from scratch or from a pretrained one.

Offline, in a minute: a small ResNet on Fashion-MNIST, which `apt install dataset-fashion-mnist` brings, or which lies
in the folder that the environment variable FASHION_MNIST names:

    python examples/image_classification.py --output_dir runs/example-images --nowcaster spectral --max_steps 200

Other architectures, and any data set of the Hub:

    python examples/image_classification.py --output_dir runs/cifar --dataset_name uoft-cs/cifar10 --image_column img \
        --model_type vit --config_overrides "hidden_size=192,num_hidden_layers=6,num_attention_heads=3,patch_size=4" \
        --max_steps 5000

After a nowcast the statistics of batch normalization are computed anew from the last training batches.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, DatasetDict, load_dataset
from torch.utils.data import Dataset
from transformers import (
    CONFIG_MAPPING,
    AutoImageProcessor,
    AutoModelForImageClassification,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedModel,
    set_seed,
)

from hf_nino import NiNoTrainer, NiNoTrainingArguments
from hf_nino.bench.training.tasks.images import FOLDER, PACKAGE, VARIABLE, read_split

CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
SMALL = {
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16, 32], "depths": [1, 1, 1], "layer_type": "basic"},
    "convnext": {"patch_size": 2, "hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2},
    "vit": {
        "patch_size": 4,
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
}


@dataclass
class ModelArguments:
    """Which model to train."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Weights to begin with: a folder or a repository. Default: random ones."}
    )
    model_type: str = field(default="resnet", metadata={"help": "From scratch: a model type of transformers."})
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "From scratch: sizes, as in 'hidden_size=64'. Default: a small resnet, convnext or vit."},
    )


@dataclass
class DataArguments:
    """What to train it on."""

    dataset_name: str | None = field(default=None, metadata={"help": "Data set on the Hub. Default: Fashion-MNIST."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    image_column: str = field(default="image", metadata={"help": "Column with the image."})
    label_column: str = field(default="label", metadata={"help": "Column with the class."})
    image_size: int = field(default=32, metadata={"help": "From scratch: images of the Hub are scaled to this size."})
    max_eval_samples: int = field(default=1000, metadata={"help": "Images of one evaluation."})


class Images(Dataset):
    """Images and labels that are in memory."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index].numpy(), "label": int(self.labels[index])}


class Collator:
    """Images (arrays of bytes, or PIL's) -> ``pixel_values`` float32 [batch, channels, size, size], and ``labels``.

    Args:
        processor: of a pretrained model; ``None``: bytes are taken to -1 .. 1.
        size: PIL's images are scaled to it; ``None``: as they are.
    """

    def __init__(self, args: DataArguments, processor: Any = None, size: int | None = None) -> None:
        packaged = args.dataset_name is None
        self.image, self.label = ("image", "label") if packaged else (args.image_column, args.label_column)
        self.processor, self.size = processor, size

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        labels = torch.tensor([row[self.label] for row in rows])
        images = [row[self.image] for row in rows]
        if self.processor is not None:
            return {**self.processor([rgb(image) for image in images], return_tensors="pt"), "labels": labels}
        if self.size is not None:
            images = [rgb(image).resize((self.size, self.size)) for image in images]
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
        pixels = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
        return {"pixel_values": pixels.float() / 127.5 - 1, "labels": labels}


def rgb(image: Any) -> Any:
    """PIL's image in three colours."""
    from PIL import Image

    return (Image.fromarray(image) if isinstance(image, np.ndarray) else image).convert("RGB")


def load_images(args: DataArguments) -> tuple[Dataset, Dataset, list[str]]:
    """For training, for evaluation, and the names of the classes."""
    if args.dataset_name is None:
        folder = Path(os.environ.get(VARIABLE, FOLDER))
        if not (folder / "train-images-idx3-ubyte.gz").is_file():
            raise FileNotFoundError(
                f"Fashion-MNIST is not in {folder}: `apt install {PACKAGE}`, let {VARIABLE} name a folder with its "
                "four files, or pass --dataset_name"
            )
        images, labels = read_split(folder, "t10k")
        held_back = Images(images[: args.max_eval_samples], labels[: args.max_eval_samples])
        return Images(*read_split(folder, "train")), held_back, list(CLASSES)
    data: DatasetDict = load_dataset(args.dataset_name, args.dataset_config_name)
    if not isinstance(data["train"].features[args.label_column], ClassLabel):
        data = data.class_encode_column(args.label_column)
    held_back = next((name for name in ("validation", "test") if name in data), None)
    if held_back is None:
        data, held_back = data["train"].train_test_split(0.1, seed=0), "test"
    count = min(args.max_eval_samples, len(data[held_back]))
    return (
        data["train"],
        data[held_back].shuffle(seed=0).select(range(count)),
        data["train"].features[args.label_column].names,
    )


def load_model(args: ModelArguments, classes: list[str], image_shape: torch.Size) -> PreTrainedModel:
    """Args: image_shape: [channels, size, size]."""
    names = {"id2label": dict(enumerate(classes)), "label2id": {name: number for number, name in enumerate(classes)}}
    if args.model_name_or_path is not None:
        return AutoModelForImageClassification.from_pretrained(
            args.model_name_or_path, num_labels=len(classes), **names, ignore_mismatched_sizes=True
        )
    sizes = {"num_channels": image_shape[0], "image_size": image_shape[-1]} | SMALL.get(args.model_type, {})
    config = CONFIG_MAPPING[args.model_type](num_labels=len(classes), **names, **sizes)
    if args.config_overrides:
        config.update_from_string(args.config_overrides)
    return AutoModelForImageClassification.from_config(config)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((np.argmax(prediction.predictions, axis=-1) == prediction.label_ids).mean())}


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataArguments, NiNoTrainingArguments))
    parser.set_defaults(
        output_dir="runs/example-images",
        max_steps=200,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=250,
        learning_rate=3e-3,
        warmup_steps=10,
        logging_steps=20,
        remove_unused_columns=False,
        report_to="none",
    )
    model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    set_seed(training_args.seed)

    train, held_back, classes = load_images(data_args)
    pretrained = model_args.model_name_or_path
    processor = None if pretrained is None else AutoImageProcessor.from_pretrained(pretrained)
    collate = Collator(data_args, processor, data_args.image_size if data_args.dataset_name else None)
    trainer = NiNoTrainer(
        model=load_model(model_args, classes, collate([train[0]])["pixel_values"].shape[1:]),
        args=training_args,
        train_dataset=train,
        eval_dataset=held_back,
        processing_class=processor,
        data_collator=collate,
        compute_metrics=accuracy,
    )
    result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)


if __name__ == "__main__":
    main()
