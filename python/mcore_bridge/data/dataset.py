"""Rows from files or the hub, brought to one shape: {"messages": [...], ...} or {"text": ...}."""

import json
import os
import random

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "tool_response": "tool",
    "observation": "tool",
    "tool_call": "tool_call",
    "function_call": "tool_call",
}
QUERY = ("query", "prompt", "input", "instruction", "question", "problem")
RESPONSE = (
    "response",
    "answer",
    "output",
    "targets",
    "target",
    "answer_key",
    "answers",
    "solution",
    "text",
    "completion",
    "content",
)
SYSTEM = ("system", "system_prompt")
FILES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
KEPT = ("tools", "channel", "chat_template_kwargs")


def split_source(source):
    """(name, count or None) of NAME or NAME#COUNT."""
    name, _, count = source.partition("#")
    if count and not count.isdigit():
        raise ValueError(f"dataset '{source}': '#{count}' is no number of rows")
    return name, int(count) if count else None


def local_files(name):
    """The data files that a path stands for; None for a hub id."""
    if os.path.isdir(name):
        files = sorted(os.path.join(name, file) for file in os.listdir(name) if file.endswith(FILES))
        if not files:
            raise FileNotFoundError(f"dataset '{name}': the folder holds no jsonl, json, csv, parquet or txt file")
        return files
    if os.path.isfile(name):
        return [name]
    if name.endswith(FILES):
        raise FileNotFoundError(f"dataset '{name}': no such file")
    return None


def numbered_rows(source, seed=42):
    """(index, row) of a file or hub dataset, where the index counts the rows as they lie there. `source`: path or id,
    optionally :subset and #count (below the size: a sample; above: repeated). Raises FileNotFoundError or ValueError with
    the line of a broken row."""
    name, count = split_source(source)
    files = local_files(name)
    rows = _read_hub(name) if files is None else [row for file in files for row in _read_file(file)]
    if not rows:
        raise ValueError(f"dataset '{name}' is empty")
    rows = list(enumerate(rows))
    return rows if count is None else take(rows, count, seed)


def read_rows(source, seed=42):
    """The rows (dicts) of numbered_rows()."""
    return [row for _, row in numbered_rows(source, seed)]


def take(rows, count, seed):
    """`count` rows: a random sample when there are more, whole repetitions topped up by a sample when there are fewer."""
    order = list(range(len(rows)))
    whole, rest = divmod(count, len(rows))
    picked = order * whole + sorted(random.Random(seed).sample(order, rest))
    return [rows[index] for index in picked]


def parse_line(line, path, number):
    """The row of a line of a jsonl file."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{number}: not JSON: {error}") from None


def _read_file(path):
    if path.endswith(".txt"):
        with open(path, encoding="utf-8") as file:
            return [{"text": line.rstrip("\n")} for line in file if line.strip()]
    if path.endswith(".jsonl"):
        with open(path, encoding="utf-8") as file:
            return [parse_line(line, path, number) for number, line in enumerate(file, 1) if line.strip()]
    if path.endswith(".json"):
        with open(path, encoding="utf-8") as file:
            try:
                rows = json.load(file)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}: not JSON: {error} (one object per line is .jsonl)") from None
        if not isinstance(rows, list):
            raise ValueError(f"{path}: holds no list of rows")
        return rows
    from datasets import load_dataset

    return list(load_dataset(path.rsplit(".", 1)[1], data_files=path, split="train"))


def _read_hub(name):
    from datasets import load_dataset

    path, _, subset = name.partition(":")
    try:
        return list(load_dataset(path, subset or None, split="train"))
    except Exception as error:
        raise FileNotFoundError(f"dataset '{name}' is neither a file here nor a hub dataset that opens: {error}") from None


def _first(row, names):
    return next((row[name] for name in names if row.get(name) is not None), None)


def _message(message, where):
    if not isinstance(message, dict):
        raise ValueError(f"{where}: a message is no object: {message!r}")
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if role not in ROLES:
        raise ValueError(f"{where}: role {role!r} is none of {', '.join(sorted(set(ROLES)))}")
    result = {"role": ROLES[role], "content": content if content is not None else ""}
    if not isinstance(result["content"], str):
        parts = result["content"]
        if not (isinstance(parts, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in parts)):
            raise ValueError(f"{where}: only text content is supported by this version, found {type(parts).__name__}")
        result["content"] = "".join(part["text"] for part in parts)
    for key in ("loss", "tool_calls", "reasoning_content", "name"):
        if message.get(key) is not None:
            result[key] = message[key]
    if result["role"] == "tool_call":
        call = json.loads(result["content"]) if result["content"] else {}
        result = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
    return result


def normalise(row, columns=None, system=None, where="row"):
    """A row as {"messages": [...]} or {"text": ...}. Understands messages (OpenAI, ShareGPT), Alpaca (instruction, input,
    output), query/response with history, and plain text. Raises ValueError for anything else."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: is no object")
    row = {(columns or {}).get(key, key): value for key, value in row.items()}
    kept = {key: row[key] for key in KEPT if row.get(key) is not None}
    conversation = _first(row, ("messages", "conversations", "conversation"))
    if conversation is not None:
        if not isinstance(conversation, list) or not conversation:
            raise ValueError(f"{where}: messages is no list of messages")
        if all(isinstance(turn, dict) and {"human", "assistant"} <= set(turn) for turn in conversation):
            sides = (("user", "human"), ("assistant", "assistant"))
            conversation = [{"role": role, "content": turn[side]} for turn in conversation for role, side in sides]
        messages = [_message(message, where) for message in conversation]
    elif row.get("instruction") is not None and row.get("output") is not None:
        query = row["instruction"] + ("\n" + row["input"] if row.get("input") else "")
        messages = [{"role": "user", "content": query}, {"role": "assistant", "content": row["output"]}]
    elif set(row) & set(QUERY) and _first(row, RESPONSE) is not None:
        messages = []
        for asked, answered in row.get("history") or []:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        messages += [
            {"role": "user", "content": str(_first(row, QUERY))},
            {"role": "assistant", "content": str(_first(row, RESPONSE))},
        ]
    elif isinstance(row.get("text"), str):
        return {"text": row["text"]}
    else:
        raise ValueError(f"{where}: has columns {sorted(row)}; expected messages, instruction/output, query/response or text")
    if messages[0]["role"] != "system":
        first = _first(row, SYSTEM) or system
        if first:
            messages.insert(0, {"role": "system", "content": first})
    return {"messages": messages, **kept}
