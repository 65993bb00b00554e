"""Tokens and loss masks of rows."""

import json

from ..utils import get_logger

IGNORE = -100


class Template:
    """Turns a normalised row into {"input_ids", "labels"}, labels aligned with input_ids (not yet shifted), -100: no loss.

    Conversations go through the tokenizer's chat template. A token is the assistant's when it lies in what an assistant turn
    adds to the rendered text and, if the template has {% generation %} marks, inside them too.
    """

    def __init__(self, tokenizer, use_chat_template=True, loss_scale="default"):
        self.tokenizer = tokenizer
        self.use_chat_template = use_chat_template
        self.loss_scale = loss_scale
        if use_chat_template and not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template; use --use_chat_template false or a chat model")
        self._marks = use_chat_template and "{% generation" in str(tokenizer.chat_template).replace("{%-", "{%")

    def encode(self, row):
        if "text" in row or not self.use_chat_template:
            return self._plain(row)
        messages = row["messages"]
        if not any(message["role"] == "assistant" for message in messages):
            raise ValueError("no assistant turn to learn from")
        return self._chat(messages, row)

    def _plain(self, row):
        text = row["text"] if "text" in row else "".join(message["content"] for message in row["messages"])
        tokens = self.tokenizer(text)["input_ids"]
        end = self.tokenizer.eos_token_id
        if end is not None and (not tokens or tokens[-1] != end):
            tokens = [*tokens, end]
        return {"input_ids": tokens, "labels": list(tokens)}

    def _arguments(self, row):
        arguments = dict(row.get("chat_template_kwargs") or {})
        tools = row.get("tools")
        if tools:
            arguments["tools"] = json.loads(tools) if isinstance(tools, str) else tools
        return arguments

    def _chat(self, messages, row):
        messages = [dict(message) for message in messages]
        wanted = [message["role"] == "assistant" and message.pop("loss", True) is not False for message in messages]
        if self.loss_scale == "last_round":
            last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
            wanted = [flag and index == last for index, flag in enumerate(wanted)]
        arguments = self._arguments(row)
        text = self._render(messages, arguments)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        tokens = encoded["input_ids"]
        if self.loss_scale == "all":
            return {"input_ids": tokens, "labels": list(tokens)}
        marked = [True] * len(tokens)
        if self._marks:
            again = self.tokenizer.apply_chat_template(
                messages, return_assistant_tokens_mask=True, return_dict=True, **arguments
            )
            if again["input_ids"] == tokens:
                marked = again["assistant_masks"]
        labels = [IGNORE] * len(tokens)
        for start, end in self._spans(messages, wanted, text, arguments):
            for index, (left, right) in enumerate(encoded["offset_mapping"]):
                if left >= start and right <= end and right > left and marked[index]:
                    labels[index] = tokens[index]
        return {"input_ids": tokens, "labels": labels}

    def _render(self, messages, arguments, prompt=False):
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **arguments)

    def _spans(self, messages, wanted, text, arguments):
        """Characters of `text` that the wanted assistant turns wrote."""
        spans = []
        last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
        for index, flag in enumerate(wanted):
            if not flag:
                continue
            before = self._render(messages[:index], arguments, prompt=True) if index else ""
            after = text if index == len(messages) - 1 else self._render(messages[: index + 1], arguments)
            if text.startswith(before) and text.startswith(after):
                spans.append((len(before), len(after)))
            elif index == last and text.startswith(before):
                spans.append((len(before), len(text)))
            else:
                get_logger().warning_once(
                    "the chat template renders earlier turns differently once later ones follow (it drops their reasoning, say); "
                    "such turns carry no loss, the last turn does"
                )
        if not spans:
            raise ValueError("the chat template does not let the assistant's tokens be found")
        return spans


def truncate(sample, max_length, strategy):
    """The sample cut to max_length tokens, or None when it is to be dropped (strategy delete, or nothing left to learn)."""
    length = len(sample["input_ids"])
    if length > max_length:
        if strategy == "delete":
            return None
        part = slice(length - max_length, None) if strategy == "left" else slice(0, max_length)
        sample = {key: value[part] for key, value in sample.items()}
    return sample if any(label != IGNORE for label in sample["labels"][1:]) else None
