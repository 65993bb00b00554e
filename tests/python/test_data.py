"""Rows, templates, packing, batching, order."""

import json
from types import SimpleNamespace

import pytest
from mcore_bridge.data.batching import flat_batch, padded_batch
from mcore_bridge.data.dataset import normalise, read_rows, take
from mcore_bridge.data.packing import pack
from mcore_bridge.data.prepare import Units, encode_rows
from mcore_bridge.data.sampler import Sampler
from mcore_bridge.data.template import IGNORE, Template, truncate

CHAT = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} </s> {% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
MARKED = (
    "{% for m in messages %}<{{ m['role'] }}> {% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }} </s> {% endgeneration %}"
    "{% else %}{{ m['content'] }} </s> {% endif %}{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)
# Drops what earlier assistant turns said, as reasoning models' templates do with their thoughts.
FORGETFUL = (
    "{% for m in messages %}<{{ m['role'] }}> {% if m['role'] != 'assistant' or loop.last %}{{ m['content'] }} {% endif %}</s> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
# As Qwen3's: an empty block of thoughts in front of the last turn only.
THINKING = (
    "{% for m in messages %}<{{ m['role'] }}> {% if m['role'] == 'assistant' and loop.last %}g h {% endif %}{{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
# As reasoning models': the prompt opens a thought that turns without reasoning do not have.
OPENING = CHAT.replace("<assistant> {% endif %}", "<assistant> g {% endif %}")
TALK = [
    {"role": "user", "content": "a b"},
    {"role": "assistant", "content": "c d"},
    {"role": "user", "content": "e"},
    {"role": "assistant", "content": "f"},
]


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "</s>", "<user>", "<assistant>", "<system>", *"abcdefgh"]
    base = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    base.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=base, eos_token="</s>", unk_token="<unk>")


def learned(tokenizer, template, messages, **options):
    """The words that carry loss."""
    tokenizer.chat_template = template
    sample = Template(tokenizer, **options).encode({"messages": messages})
    assert len(sample["input_ids"]) == len(sample["labels"])
    assert all(label in (IGNORE, token) for label, token in zip(sample["labels"], sample["input_ids"]))
    return " ".join(tokenizer.convert_ids_to_tokens([label for label in sample["labels"] if label != IGNORE]))


@pytest.mark.parametrize("template", [CHAT, MARKED])
def test_loss_on_assistant_turns_only(tokenizer, template):
    assert learned(tokenizer, template, TALK) == "c d </s> f </s>"
    assert learned(tokenizer, template, TALK, loss_scale="last_round") == "f </s>"
    muted = [dict(TALK[0]), {**TALK[1], "loss": False}, *TALK[2:]]
    assert learned(tokenizer, template, muted) == "f </s>"
    assert learned(tokenizer, template, TALK, loss_scale="all").startswith("<user> a b")


def test_template_that_drops_earlier_turns(tokenizer):
    assert learned(tokenizer, FORGETFUL, TALK) == "f </s>"


def test_template_that_renders_the_last_turn_differently(tokenizer):
    assert learned(tokenizer, THINKING, TALK) == "c d </s> g h f </s>"
    assert learned(tokenizer, THINKING, [*TALK, {"role": "user", "content": "a"}]) == "c d </s> f </s>"
    muted = [TALK[0], {**TALK[1], "loss": False}, *TALK[2:]]
    assert learned(tokenizer, THINKING, muted) == "g h f </s>"
    same = [{"role": role, "content": "a"} for role in ("user", "assistant") * 3]
    assert learned(tokenizer, THINKING, same) == "a </s> a </s> g h a </s>"


def test_template_whose_prompt_opens_a_thought(tokenizer):
    assert learned(tokenizer, OPENING, TALK) == "c d </s> f </s>"


def test_row_that_the_template_refuses(tokenizer, caplog):
    tokenizer.chat_template = "{% if messages[0]['content'] == 'h' %}{{ raise_exception('no h') }}{% endif %}" + CHAT
    arguments = SimpleNamespace(columns={}, system=None, truncation_strategy="delete", dataset_num_proc=1, strict=False)
    rows = [{"messages": TALK}, {"messages": [{"role": "user", "content": "h"}, TALK[1]]}]
    assert len(encode_rows(rows, Template(tokenizer), arguments, 64)) == 1
    with pytest.raises(ValueError, match="row 1: the chat template refuses the row: no h"):
        encode_rows(rows, Template(tokenizer), SimpleNamespace(**{**vars(arguments), "strict": True}), 64)


def test_template_errors(tokenizer):
    tokenizer.chat_template = CHAT
    with pytest.raises(ValueError, match="assistant"):
        Template(tokenizer).encode({"messages": TALK[:1]})
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="chat template"):
        Template(tokenizer)
    assert Template(tokenizer, use_chat_template=False).encode({"text": "a b"})["labels"][-1] == tokenizer.eos_token_id


def test_row_formats():
    ours = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]}
    assert normalise(ours) == ours
    assert normalise({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}]}) == ours
    assert normalise({"conversation": [{"human": "q", "assistant": "r"}]}) == ours
    assert normalise({"instruction": "q", "input": "", "output": "r"}) == ours
    assert normalise({"instruction": "q", "input": "x", "output": "r"})["messages"][0]["content"] == "q\nx"
    assert normalise({"query": "q", "response": "r"}) == ours
    assert normalise({"prompt": "q", "completion": "r"}) == ours
    assert len(normalise({"query": "q", "response": "r", "history": [["a", "b"]]})["messages"]) == 4
    assert normalise({"frage": "q", "antwort": "r"}, columns={"frage": "query", "antwort": "response"}) == ours
    assert normalise({"text": "t"}) == {"text": "t"}
    assert normalise(ours, system="s")["messages"][0] == {"role": "system", "content": "s"}
    assert normalise({**ours, "system": "row"}, system="s")["messages"][0]["content"] == "row"
    for bad in ({}, {"messages": []}, {"messages": "x"}, {"messages": [{"role": "robot", "content": "x"}]}, 3):
        with pytest.raises(ValueError):
            normalise(bad)


def test_reading_files(tmp_path):
    rows = [{"text": f"row {index}"} for index in range(5)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "b.json").write_text(json.dumps(rows))
    (tmp_path / "c.txt").write_text("one\n\ntwo\n")
    (tmp_path / "d.csv").write_text("query,response\nq,r\n")
    assert read_rows(str(tmp_path / "a.jsonl")) == rows == read_rows(str(tmp_path / "b.json"))
    assert read_rows(str(tmp_path / "c.txt")) == [{"text": "one"}, {"text": "two"}]
    assert read_rows(str(tmp_path / "d.csv")) == [{"query": "q", "response": "r"}]
    assert len(read_rows(str(tmp_path))) == 13
    assert len(read_rows(f"{tmp_path / 'a.jsonl'}#3")) == 3
    assert len(take(rows, 12, 1)) == 12
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(ValueError, match="bad.jsonl:2"):
        read_rows(str(tmp_path / "bad.jsonl"))
    with pytest.raises(FileNotFoundError):
        read_rows(str(tmp_path / "none.jsonl"))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="empty"):
        read_rows(str(tmp_path / "empty.jsonl"))


def test_packing():
    lengths = [5, 9, 3, 1, 7, 2, 10, 4]
    rows = pack(lengths, 10)
    assert sorted(index for row in rows for index in row) == list(range(8))
    assert all(sum(lengths[index] for index in row) <= 10 for row in rows)
    assert len(rows) == 5  # 41 tokens in rows of 10 need at least 5
    assert rows == pack(lengths, 10)
    with pytest.raises(ValueError, match="11 tokens"):
        pack([11], 10)


def test_truncation():
    sample = {"input_ids": [1, 2, 3, 4], "labels": [IGNORE, 2, 3, 4]}
    assert truncate(sample, 4, "delete") is sample
    assert truncate(sample, 3, "delete") is None
    assert truncate(sample, 3, "right")["input_ids"] == [1, 2, 3]
    assert truncate(sample, 3, "left")["input_ids"] == [2, 3, 4]
    assert truncate({"input_ids": [1, 2], "labels": [1, IGNORE]}, 4, "right") is None, (
        "only the first token has a label: nothing predicts it"
    )


def test_batches():
    samples = [{"input_ids": [1, 2, 3], "labels": [IGNORE, 2, 3]}, {"input_ids": [4, 5], "labels": [4, 5]}]
    flat = flat_batch(samples, multiple=4)
    assert flat["input_ids"].tolist() == [[1, 2, 3, 4, 5, 0, 0, 0]]
    assert flat["labels"].tolist() == [[2, 3, IGNORE, 5, IGNORE, IGNORE, IGNORE, IGNORE]], "shifted inside each document"
    assert flat["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert flat["packed_seq_params"].cu_seqlens.tolist() == [0, 3, 5, 8]
    chunks = flat_batch(samples, multiple=8, pad_token=9, document_multiple=4)
    assert chunks["input_ids"].tolist() == [[1, 2, 3, 9, 4, 5, 9, 9]], "each document is padded behind its tokens"
    assert chunks["labels"].tolist() == [[2, 3, IGNORE, IGNORE, 5, IGNORE, IGNORE, IGNORE]]
    assert chunks["packed_seq_params"].cu_seqlens.tolist() == [0, 4, 8]
    assert flat_batch(samples[:1], 8, 9, 4)["packed_seq_params"].cu_seqlens.tolist() == [0, 4, 8], "a document that fills up"
    padded = padded_batch(samples, multiple=4, pad_token=9)
    assert padded["input_ids"].tolist() == [[1, 2, 3, 9], [4, 5, 9, 9]]
    assert padded["labels"].tolist() == [[2, 3, IGNORE, IGNORE], [5, IGNORE, IGNORE, IGNORE]]


@pytest.mark.parametrize("packing", [True, False])
def test_units(packing):
    samples = [
        {"input_ids": [index] * size, "labels": [IGNORE, *[index] * (size - 1)]} for index, size in enumerate((3, 4, 2, 5), 1)
    ]
    units = Units(samples, SimpleNamespace(packing=packing, packing_length=7, padding_free=False), 8, 4, 9)
    everything = range(len(units))
    assert len(units) == (2 if packing else 4) and units.tokens == 14
    assert units.loss_tokens(everything) == units.loss_tokens([*everything, None]) == 10
    batch = units.micro_batch(everything)
    assert (batch["labels"] != IGNORE).sum() == 10 and batch["input_ids"].shape[1] % 4 == 0
    nothing = units.micro_batch([None])
    assert nothing["input_ids"].shape == (1, 4) and (nothing["labels"] == IGNORE).all()


def test_order_depends_on_seed_and_epoch_only():
    def batches(size, steps=7):
        ranks = [Sampler(10, 1, 4, rank, size, seed=3) for rank in range(size)]
        return [[unit for sampler in ranks for micro in sampler.micro_batches(step) for unit in micro] for step in range(steps)]

    assert batches(1) == batches(2) == batches(4)
    flat = [unit for batch in batches(1, 5) for unit in batch]
    assert sorted(flat[:10]) == sorted(flat[10:20]) == list(range(10)), "every epoch holds every sample once"
    assert flat[:10] != flat[10:20]
    assert Sampler(10, 1, 4, 0, 1, shuffle=False).global_batch(2) == [8, 9, 0, 1]
    assert Sampler(10, 1, 4, 0, 1, shuffle=False, once=True).global_batch(2) == [8, 9, None, None]
    with pytest.raises(ValueError, match="global_batch_size"):
        Sampler(10, 3, 4, 0, 1)
    with pytest.raises(ValueError, match="no sample"):
        Sampler(0, 1, 4, 0, 1)
