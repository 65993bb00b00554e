"""mcore-bridge verify: the engine beside Transformers (and PEFT) on the same input."""

from .arguments import VerifyArguments, parse
from .launch import finish_distributed, init_distributed


def _inputs(arguments, folder, vocabulary, multiple):
    import torch

    if not arguments.text:
        length = arguments.length + -arguments.length % multiple
        generator = torch.Generator().manual_seed(arguments.seed)
        return [torch.randint(0, vocabulary, (1, length), generator=generator) for _ in range(arguments.batch)]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [tokenizer(text, return_tensors="pt")["input_ids"] for text in arguments.text]
    return [torch.cat([row, row.new_zeros(1, -row.shape[1] % multiple)], 1) for row in rows]


def reference_logits(folder, adapters, dtype, inputs):
    """Transformers' logits, on rank 0 alone."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    if adapters:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapters[0]).eval()
    if torch.cuda.is_available():
        model = model.cuda()
    with torch.no_grad():
        return [model(row.to(model.device)).logits.float().cpu() for row in inputs]


def run(command, argv):
    arguments = parse(VerifyArguments, command, argv)
    import torch
    import torch.nn.functional as F

    import mcore_bridge as mb

    from .session import build_config, load_adapter, resolve_model, sequence_multiples

    init_distributed()
    folder = resolve_model(arguments.model)
    config = build_config(arguments, folder)
    models = mb.get_mcore_model(config)
    config.bridge.load_weights(models, folder)
    if arguments.adapters:
        load_adapter(models, config, arguments.adapters[0])
    for model in models:
        model.eval()
    state = mb.get_parallel_state()
    inputs = _inputs(arguments, folder, config.padded_vocab_size, sequence_multiples(config, state)[0])
    ours = [mb.forward_logits(models, row).float().cpu() for row in inputs]
    bad = False
    if state.rank == 0:
        tolerance = arguments.tolerance or (2e-5 if config.params_dtype == torch.float32 else 2e-2)
        expected = reference_logits(folder, arguments.adapters, config.params_dtype, inputs)
        print(
            f"{'sequence':>8} {'tokens':>7} {'relative':>10} {'largest':>10} {'same argmax':>12} {'loss':>9} {'Transformers':>13}"
        )
        for index, (mine, theirs, row) in enumerate(zip(ours, expected, inputs)):
            relative = ((mine - theirs).double().norm() / theirs.double().norm()).item()
            losses = [F.cross_entropy(x[0, :-1], row[0, 1:]).item() for x in (mine, theirs)]
            same = (mine.argmax(-1) == theirs.argmax(-1)).float().mean().item()
            wrong = not relative <= tolerance
            bad = bad or wrong
            print(
                f"{index:8} {row.shape[1]:7} {relative:10.2e} {(mine - theirs).abs().max():10.2e} {same:12.1%} {losses[0]:9.5f} {losses[1]:13.5f}"
                + ("  <- over the tolerance" if wrong else "")
            )
        print(f"{'FAILED' if bad else 'ok'}: relative difference of logits, tolerance {tolerance:g}", flush=True)
    if torch.distributed.is_initialized():
        flag = torch.tensor([int(bad)])
        torch.distributed.broadcast(flag, 0)
        bad = bool(flag.item())
    finish_distributed()
    return int(bad)
