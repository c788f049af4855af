"""Chat templates: rendered in a sandbox, from a GGUF or as llama.cpp knows them."""

from pathlib import Path

import pytest
from tiny_gguf import WORDS, write_tiny_llama

from edgekit.errors import EdgekitError
from edgekit.llama import apply_chat_template, chat_prompt, open_model

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
CHAT = [{"role": "system", "content": "brief"}, {"role": "user", "content": "the ab?"}]


def test_a_chat_template_is_rendered_with_one_bos(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "chat.gguf", words=WORDS, chat_template=TEMPLATE)
    with open_model(path, vocab_only=True) as chat:
        text = "[system] brief\n[user] the ab?\n[assistant] "
        assert apply_chat_template(chat, CHAT) == "<s>" + text
        assert chat_prompt(chat, CHAT) == chat.tokenize(text, add_special=True)
    with open_model(write_tiny_llama(tmp_path / "plain.gguf"), vocab_only=True) as plain:
        assert apply_chat_template(plain, CHAT) is None
        assert chat_prompt(plain, CHAT) is None


def test_a_hostile_template_does_not_reach_the_system(tmp_path: Path) -> None:
    """The payload of CVE-2024-34359: outside a sandbox it runs a command."""
    canary = tmp_path / "canary"
    payload = (
        "{% for x in ().__class__.__base__.__subclasses__() %}{% if 'warning' in x.__name__ %}"
        f"{{{{ x()._module.__builtins__['__import__']('os').system('touch {canary}') }}}}"
        "{% endif %}{% endfor %}"
    )
    path = write_tiny_llama(tmp_path / "bad.gguf", chat_template=payload)
    with (
        open_model(path, vocab_only=True) as model,
        pytest.raises(EdgekitError, match=r"chat template fails: .*unsafe"),
    ):
        apply_chat_template(model, CHAT)
    assert not canary.exists()


def test_a_template_that_fails_falls_back_to_the_one_llama_cpp_knows(tmp_path: Path) -> None:
    broken = "{{ raise_exception('no') }}<|im_start|>{{ messages }}<|im_end|>"  # looks like ChatML
    path = write_tiny_llama(tmp_path / "chatml.gguf", chat_template=broken)
    with open_model(path, vocab_only=True) as model:
        assert apply_chat_template(model, CHAT) == (
            "<|im_start|>system\nbrief<|im_end|>\n<|im_start|>user\nthe ab?<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
