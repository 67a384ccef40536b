"""The policy's tokenizer and chat template: loading it, rendering conversations, and what training may learn from."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from client.chat import NO_THINKING, turn_end
from client.chat_date import apply_dated
from client.schema import Message
from trainer.errors import ModelError
from trainer.policy.models import needs_trainer

# For base models, whose tokenizers have no chat template: plain text, no new tokens. An assistant turn ends with the
# end-of-sequence token, so that training on it teaches the model where to stop.
BASE_TEMPLATE: Final = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token + '\n\n' }}"
    "{% else %}{{ message['role'] | capitalize + ': ' + message['content'] + '\n\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# An untrained base model does not stop there: it writes the next question itself, and the response is cut before it.
BASE_STOPS: Final = ("\nUser:", "\nSystem:")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder`, always with a chat template and a padding token. Raises ModelError.

    Without a chat template of its own it gets BASE_TEMPLATE, preceded by the beginning-of-sequence token if the
    tokenizer adds one. Sampling, SFT and DPO all use that template, and it is saved with the trained model. Without a
    padding token it pads with its end-of-sequence token.
    """
    with needs_trainer():
        from transformers import AutoTokenizer
    auto: Any = AutoTokenizer
    try:
        tokenizer = auto.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"the tokenizer in {folder} cannot be loaded: {error}") from error
    if tokenizer.eos_token is None:
        raise ModelError(f"the tokenizer in {folder} has no end-of-sequence token: add one to tokenizer_config.json")
    if tokenizer.chat_template is None:
        tokenizer.chat_template = _bos(tokenizer) + BASE_TEMPLATE
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # Patched on the object because TRL renders with it too: with today's date in the prompt, a run resumed tomorrow
    # would train on other prompts than it sampled.
    tokenizer.apply_chat_template = partial(apply_dated, tokenizer)
    return tokenizer


def _bos(tokenizer: Any) -> str:
    adds = tokenizer.bos_token is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return "{{ bos_token }}" if adds else ""


def has_base_template(tokenizer: Any) -> bool:
    """Whether `load_tokenizer` gave it BASE_TEMPLATE, now or before the model was trained."""
    return isinstance(tokenizer.chat_template, str) and tokenizer.chat_template.endswith(BASE_TEMPLATE)


def chat_ids(tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
    """The token ids of a conversation in the chat template.

    Thinking is off, as it is for the judge. Control tokens inside a message's text become control tokens, as they do in
    training. Raises ModelError if the template refuses the conversation.
    """
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": add_generation_prompt}
    return list(_render(tokenizer, messages, **options)["input_ids"])


def unfinished_ids(tokenizer: Any, prompt: Sequence[Message], answer: Message) -> list[int]:
    """The token ids of a conversation that ends with the answer's last character; it `renders_as_sampled`."""
    asked = _render(tokenizer, prompt, tokenize=False, add_generation_prompt=True)
    rendered = _render(tokenizer, [*prompt, answer], tokenize=False, add_generation_prompt=False)
    # Templates may strip an answer. Its words may stand before it too, and behind it, such as the "end" of <|im_end|>.
    text = answer.content if rendered.find(answer.content, len(asked)) >= 0 else answer.content.strip()
    end = rendered.index(text, len(asked)) + len(text)
    return list(tokenizer(rendered[:end], add_special_tokens=False)["input_ids"])


def _render(tokenizer: Any, messages: Sequence[Message], **options: bool) -> Any:
    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        return tokenizer.apply_chat_template(turns, **options, **NO_THINKING)
    except Exception as error:  # templates raise anything, through jinja2
        raise ModelError(f"the model's chat template refuses a conversation: {error}") from error


def renders_as_sampled(tokenizer: Any, prompt: Sequence[Message], answer: Message) -> bool:
    """Whether the template renders a finished conversation as the policy would have generated it.

    That is the prompt's exact tokens, the answer's text (up to surrounding white space), and an end of turn. Templates
    that insert empty thoughts before an answer, or strip thoughts from it, fail this: training would teach the policy
    something it never sampled.
    """
    prompt_ids = chat_ids(tokenizer, prompt)
    all_ids = chat_ids(tokenizer, [*prompt, answer], add_generation_prompt=False)
    if all_ids[: len(prompt_ids)] != prompt_ids:
        return False
    # Both texts go through token ids because some tokenizers normalise.
    answer_ids = tokenizer(answer.content, add_special_tokens=False)["input_ids"]
    text, rendered = (_decode(tokenizer, ids).strip() for ids in (answer_ids, all_ids[len(prompt_ids) :]))
    rest = rendered.removeprefix(text).lstrip()
    turn = turn_end(tokenizer)
    ends = [tokenizer.eos_token, *map(tokenizer.decode, turn.ids), *(stop.strip() for stop in turn.texts)]
    return rendered.startswith(text) and (not rest or any(rest.startswith(end) for end in ends))


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def training_suffix(tokenizer: Any) -> str:
    """What training appends to an answer so that the policy learns to stop: the end-of-sequence token if the template
    puts no token after the last answer, else nothing.
    """
    return "" if turn_end(tokenizer).closes else str(tokenizer.eos_token)
