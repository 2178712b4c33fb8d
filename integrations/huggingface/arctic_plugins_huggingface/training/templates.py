"""``data.chat_template``: give a tokenizer a chat template. Read in trl 1.16.0 and transformers 5.19.0.

Importing this module loads neither torch nor a host.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from arctic_plugins.errors import ConfigError, suggest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["known_templates", "read_template", "set_template"]

logger = logging.getLogger(__name__)

_CHATML = """\
{% for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>{% if message['role'] == 'assistant' and eos_token != '<|im_end|>' %}{{ eos_token }}\
{% endif %}

{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""OpenAI's ChatML. An answer also ends with the end-of-text token if that is not ``<|im_end|>``."""
_ALPACA = """\
{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% else %}Below is an instruction that describes a \
task. Write a response that appropriately completes the request.{% endif %}{% for message in messages %}\
{% if message['role'] == 'user' %}{{ '\\n\\n### Instruction:\\n' + message['content'] }}\
{% elif message['role'] == 'assistant' %}{{ '\\n\\n### Response:\\n' + message['content'] + eos_token }}\
{% elif not loop.first %}{{ raise_exception('The roles are user and assistant, and system in the first message.') }}\
{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '\\n\\n### Response:\\n' }}{% endif %}"""
"""The prompt of Stanford Alpaca (Taori et al., 2023), repeated for each exchange."""
_OWN = {"alpaca": _ALPACA, "chatml": _CHATML}
_MARK = "\u2460"


def _trl_templates() -> dict[str, Path]:
    """Return the templates in TRL's package, apart from its variants with marks for training: name -> file."""
    spec = find_spec("trl")
    files = (Path(spec.origin).parent / "chat_templates").glob("*.jinja") if spec and spec.origin else ()
    return {path.stem: path for path in files if not path.stem.endswith("_training")}


def known_templates() -> list[str]:
    """Return the names that ``data.chat_template`` accepts in place of a file."""
    return sorted(_OWN.keys() | _trl_templates().keys())


def read_template(name: str) -> str:
    """Return the chat template ``name``: the content of a file, or a known template.

    Raises:
        ConfigError: there is neither; or the file is not UTF-8.
    """
    if Path(name).is_file():
        try:
            return Path(name).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"data.chat_template {name} is not UTF-8: {error}", fix="save it as UTF-8") from error
    if name in _OWN:
        return _OWN[name]
    if (path := _trl_templates().get(name)) is not None:
        return path.read_text(encoding="utf-8")
    raise ConfigError(
        f"data.chat_template {name!r} is neither a file nor a known template",
        expected="a Jinja file, chatml, alpaca, or a template of TRL such as llama3 or qwen3",
        fix=suggest(name, known_templates()),
    )


def set_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Give ``tokenizer`` the chat template ``name``, and make the token that ends an answer its end-of-text token.

    Generation stops at that token, in transformers and in vLLM. There is a warning if no token ends an answer.
    """
    template = read_template(name)
    if name in _OWN and _adds_bos(tokenizer):
        template = "{{ bos_token }}" + template
    tokenizer.chat_template = template
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}]
    try:
        tail = str(tokenizer.apply_chat_template(chat, tokenize=False)).rpartition(_MARK)[2].lstrip()
    except Exception:  # a template is a program; what it rejects is reported with the record that it rejects
        return
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
    if ids and ids[0] in tokenizer.added_tokens_decoder and ids[0] != tokenizer.eos_token_id:
        tokenizer.eos_token = tokenizer.added_tokens_decoder[ids[0]].content
    elif tokenizer.eos_token_id not in ids:
        logger.warning(
            "with data.chat_template %s, an answer ends with %r, which is not a token of this tokenizer, so generation "
            "will not stop there; add it with data.new_tokens",
            name,
            tail.strip(),
        )


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the tokenizer begins every text with its beginning-of-text token."""
    return tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
