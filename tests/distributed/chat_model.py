"""A tiny model folder with a tokenizer and chat data, for whole runs."""

import json

import tiny

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} </s> {% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"


def make(path, family="qwen3_tied", rows=40, **overrides):
    """path/model, path/chat.jsonl and path/plain.txt."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tiny.save(family, path / "model", max_shard_size="5GB", **overrides)
    words = ["<pad>", "<unk>", "</s>", "<user>", "<assistant>", *[f"w{index}" for index in range(60)]]
    base = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    base.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base, eos_token="</s>", unk_token="<unk>", pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path / "model")
    lines = [
        {
            "id": f"row-{i}",
            "messages": [
                {"role": "user", "content": f"w{i % 7} w{i % 5}" + " w9" * (i % 4)},
                {"role": "assistant", "content": f"w{i % 3 + 10} w{i % 3 + 20} w30"},
            ],
        }
        for i in range(rows)
    ]
    (path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    (path / "plain.txt").write_text("".join(f"w{i % 9} w{i % 4} w5 w6" + " w7" * (i % 5) + "\n" for i in range(60)))
    return path
