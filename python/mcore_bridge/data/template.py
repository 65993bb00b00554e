"""Tokens and loss masks of rows."""

import json
import os

from ..utils import get_logger

IGNORE = -100
# Stands for a turn's content while its place in the rendered text is looked for.
_MARK = "\u241f\u241e\u241f"


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
            again = self.tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True, **arguments)
            if again["input_ids"] == tokens:
                marked = again["assistant_masks"]
        labels = [IGNORE] * len(tokens)
        for start, end in self._spans(messages, wanted, text, arguments):
            for index, (left, right) in enumerate(encoded["offset_mapping"]):
                if left >= start and right <= end and right > left and marked[index]:
                    labels[index] = tokens[index]
        return {"input_ids": tokens, "labels": labels}

    def _render(self, messages, arguments, prompt=False):
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **arguments)
        except TemplateError as error:  # templates raise it for, say, roles that do not alternate
            raise ValueError(f"the chat template refuses the row: {error}") from None

    def _spans(self, messages, wanted, text, arguments):
        """Characters of `text` that the wanted assistant turns wrote."""
        spans = []
        for index in (index for index, flag in enumerate(wanted) if flag):
            span = self._prefix_span(messages, index, text, arguments) or self._marked_span(messages, index, text, arguments)
            if span:
                spans.append(span)
            else:
                get_logger().warning_once(
                    "the chat template hides what earlier assistant turns said once later ones follow: such turns carry no loss"
                )
        if not spans:
            raise ValueError("the chat template does not let the assistant's tokens be found")
        return spans

    def _prefix_span(self, messages, index, text, arguments):
        """From the prompt for turn `index` to the text with that turn, when both are prefixes of the whole text."""
        before = self._render(messages[:index], arguments, prompt=True) if index else ""
        after = text if index == len(messages) - 1 else self._render(messages[: index + 1], arguments)
        return (len(before), len(after)) if text.startswith(before) and text.startswith(after) else None

    def _marked_span(self, messages, index, text, arguments):
        """The turn's span in templates that render it differently once others follow (Qwen3 puts an empty <think> block into
        the last turn only): its content is where the text changes when the content does, its end what closes such a turn."""
        start = end = None
        if messages[index]["content"]:
            changed = self._render([*messages[:index], {**messages[index], "content": _MARK}, *messages[index + 1 :]], arguments)
            start = len(os.path.commonprefix([text, changed]))
            end = len(text) - len(os.path.commonprefix([text[start:][::-1], changed[start:][::-1]]))
            if _MARK not in changed or end <= start:
                return None
        before = self._render(messages[:index], arguments, prompt=True) if index else None
        if before is not None and text.startswith(before):
            start = len(before)
        if start is None:
            return None
        closing = self._render([*messages[:index], {"role": "assistant", "content": _MARK}], arguments).rpartition(_MARK)[2]
        if not closing.strip():
            return (start, end) if end else None
        at = text.find(closing, end or start)
        if at < 0:
            at, closing = text.find(closing.rstrip(), end or start), closing.rstrip()
        return (start, at + len(closing)) if at >= 0 else None


def truncate(sample, max_length, strategy):
    """The sample cut to max_length tokens, or None when it is to be dropped (strategy delete, or nothing left to learn)."""
    length = len(sample["input_ids"])
    if length > max_length:
        if strategy == "delete":
            return None
        part = slice(length - max_length, None) if strategy == "left" else slice(0, max_length)
        sample = {key: value[part] for key, value in sample.items()}
    return sample if any(label != IGNORE for label in sample["labels"][1:]) else None
