"""The chat template of a tokenizer, taken apart, so that long documents need not go through it."""

import numpy as np


class ChatFormat:
    """
    What stands around the turns of a conversation, as token ids.

    start    before the first message of the user
    reply    between a message of the user and the answer
    end      the token that ends an answer
    next     between that token and the next message of the user
    finish   between that token and the end of the row

    Raises: ValueError if the tokenizer has no chat template, or one that does not put the turns one after another.
    """

    def __init__(self, tokenizer):
        if not tokenizer.chat_template:
            raise ValueError("The tokenizer has no chat template: take that of an instruct model.")
        marks = ["@@1@@", "@@2@@", "@@3@@", "@@4@@"]
        roles = ["user", "assistant"] * 2
        messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks)]
        rest, between = tokenizer.apply_chat_template(messages, tokenize=False), []
        for mark in marks:
            before, found, rest = rest.partition(mark)
            if not found:
                raise ValueError("The chat template changes or leaves out messages: it cannot be used.")
            between.append(self._encode(tokenizer, before))
        last = self._encode(tokenizer, rest)
        if not len(last) or last[0] != between[2][0] or not np.array_equal(between[1], between[3]):
            raise ValueError("The chat template does not end every answer in the same way: it cannot be used.")
        self.start, self.reply = between[0], between[1]
        self.end, self.next, self.finish = between[2][:1], between[2][1:], last[1:]

    @staticmethod
    def _encode(tokenizer, text: str) -> np.ndarray:
        return np.array(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.uint16)
