"""A checkpoint's chat template is a program: what it must not do, and what it may."""

import time
from collections.abc import Callable, Iterator

import pytest

from models.chat_template import ChatTemplate
from models.errors import PromptError

HI = [{"role": "user", "content": "hi"}]
ATTACKS = (  # that jinja refuses
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ messages.append(messages) }}",
    "{% include '/etc/passwd' %}",
    "{% set x = 'a' * (2 ** 40) %}",
    "{% for a in range(10 ** 9) %}{% endfor %}",
    "{{ raise_exception('roles must alternate') }}",
    "{{ 1 / 0 }}",
)
HIDDEN = (  # that it renders as nothing
    "{{ self._TemplateReference__context }}",
    "{{ raise_exception.__globals__ }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{{ strftime_now.__code__ }}",
)
EMPTY = [{"role": "user", "content": ""}]
PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ eos }}"
Make = Callable[[str], ChatTemplate]


@pytest.fixture
def make() -> Iterator[Make]:
    """Give what makes templates that have two seconds; their processes end with the test."""
    made: list[ChatTemplate] = []

    def template(source: str) -> ChatTemplate:
        made.append(ChatTemplate(source, {"eos": "</s>"}, render_s=2.0))
        return made[-1]

    yield template
    for each in made:
        each.close()


def test_text_is_that_of_transformers(make: Make) -> None:
    """With special tokens and the generation prompt; characters beyond ASCII come back."""
    template = make(PLAIN + "{% if add_generation_prompt %}<assistant>{% endif %}")
    messages = [{"role": "user", "content": "h\u00e9 \ud800"}]

    assert template.render(messages, add_generation_prompt=True) == (
        "<user>h\u00e9 \ud800</s><assistant>"
    )
    assert template.render(HI, add_generation_prompt=False) == "<user>hi</s>"


@pytest.fixture(scope="module")
def hostile() -> Iterator[ChatTemplate]:
    """One template that tries what the message names."""
    source = "{% set asked = messages[0].content %}"
    for index, attack in enumerate(ATTACKS + HIDDEN):
        source += f"{{% if asked == '{index}' %}}{attack}{{% endif %}}"
    template = ChatTemplate(source + "{% if not asked %}ok{% endif %}", {})
    yield template
    template.close()


def try_attack(template: ChatTemplate, attack: str) -> str:
    index = (ATTACKS + HIDDEN).index(attack)
    messages = [{"role": "user", "content": str(index)}]
    return template.render(messages, add_generation_prompt=True)


@pytest.mark.parametrize("attack", ATTACKS)
def test_attack_is_refused_in_one_sentence(hostile: ChatTemplate, attack: str) -> None:
    """Nothing of the process is reached, and the next conversation is answered."""
    with pytest.raises(PromptError, match="does not take these messages: ") as told:
        try_attack(hostile, attack)

    assert "\n" not in str(told.value)
    assert hostile.render(EMPTY, add_generation_prompt=True) == "ok"


@pytest.mark.parametrize("hidden", HIDDEN)
def test_inside_of_the_process_is_not_shown(hostile: ChatTemplate, hidden: str) -> None:
    assert try_attack(hostile, hidden) == ""


def test_template_that_is_none_is_one_sentence(make: Make) -> None:
    with pytest.raises(PromptError, match="does not take these messages: "):
        make("{% if %}").render(HI, add_generation_prompt=True)


@pytest.mark.parametrize(
    "endless",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% set n = namespace(x='a') %}"
        "{% for a in range(99999) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    ],
)
def test_endless_template_is_ended(make: Make, endless: str) -> None:
    """It costs a limited time and memory, and the next conversation is answered."""
    template = make("{% if messages[0].content == 'hi' %}" + endless + "{% else %}ok{% endif %}")
    assert template.render(EMPTY, add_generation_prompt=True) == "ok"
    begin_s = time.monotonic()

    with pytest.raises(PromptError, match="chat template"):
        template.render(HI, add_generation_prompt=True)

    assert time.monotonic() - begin_s < 30
    assert template.render(EMPTY, add_generation_prompt=True) == "ok"


def test_endless_compilation_is_ended(make: Make) -> None:
    """Jinja computes constants when it reads a template."""
    with pytest.raises(PromptError, match="did not end within 2 s"):
        make("{{ 10 ** (10 ** 9) }}").render(HI, add_generation_prompt=True)
