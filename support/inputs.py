"""What a training stage will read, tried before its teacher's weights are fetched and read."""

from support.checkpoints import find_checkpoint, list_checkpoints
from support.errors import UserError
from support.pairs import read_index
from support.prompts import read_prompts


def check_inputs(args):
    """UserError where the run's folder, --init, --pairs or --eval-prompts would end the run later."""
    check_that_no_run_is_there(args)
    if getattr(args, "init", None):
        find_checkpoint(args.init)
    if getattr(args, "pairs", None):
        read_index(args.pairs)
    if args.eval_every:
        read_held_out_prompts(args)


def check_that_no_run_is_there(args):
    """UserError where --out has a run, unless it is to go on."""
    if list_checkpoints(args.out) and not args.resume:
        raise UserError(
            f"{args.out} holds a run already: add --resume to go on with it, or give another --out"
        )


def read_held_out_prompts(args):
    """The prompts of --eval-prompts, as read_prompts gives them."""
    return read_prompts(args.eval_prompts, args.eval_prompt_column, "--eval-prompt-column")
