# SPDX-License-Identifier: Apache-2.0
"""Builds the tasks' tokenizer: one token a character, in the file format that transformers and vLLM load.

The vocabulary is printable ASCII and the newline, four role names, and the special tokens of ChatML. The role names
are tokens of their own so that a prompt stays short; ``<|im_end|>`` and a newline of one token are what verl's
multi-turn code expects of a Qwen3 model.
"""

import string

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, START, END, UNKNOWN = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|unk|>"
SPECIAL_TOKENS = (PAD, START, END, UNKNOWN)
ROLES = ("system", "user", "assistant", "tool")
CHARACTERS = "\n" + string.digits + string.ascii_letters + string.punctuation + " "

# Without a default system message: verl takes whatever a template puts before the first message for one.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)


def build_tokenizer(*, max_length: int = 128) -> PreTrainedTokenizerFast:
    """Returns a tokenizer whose ``save_pretrained`` writes a complete ``tokenizer.json``.

    Args:
        max_length: tokens that the model has room for.
    """
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *ROLES, *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(ROLES) + r"|[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
    )


def messages(prompt: str) -> list[dict[str, str]]:
    """Returns the chat messages of a prompt: one from the user."""
    return [{"role": "user", "content": prompt}]


def encode_prompt(tokenizer: PreTrainedTokenizerFast, prompt: str) -> list[int]:
    """Returns a prompt's token ids as the rollout sees them: with the chat template and its generation prompt."""
    return list(
        tokenizer.apply_chat_template(messages(prompt), add_generation_prompt=True, tokenize=True, return_dict=False)
    )
