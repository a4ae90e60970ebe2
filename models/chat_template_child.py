"""The process of `models.chat_template.ChatTemplate`: a line of JSON in, a line out.

The first line has the template, each other one a conversation. The process ends with its input.
"""

import json
import resource
import signal
import sys
from typing import Any

MiB = 2**20
MORE_BYTES = 1024 * MiB  # of memory, beside what the imports take
MOST_CHARACTERS = 64 * MiB  # of a rendered text


def main() -> None:
    """Answer until the input ends."""
    from transformers.utils.chat_template_utils import render_jinja_template

    about = json.loads(sys.stdin.readline())
    _limit()
    _tell({})
    for line in sys.stdin:
        # Whoever asked ends this process earlier; the alarm is for where they are gone.
        signal.alarm(int(2 * about["render_s"]) + 1)
        asked = json.loads(line)
        try:
            texts, _ = render_jinja_template(
                conversations=[asked["messages"]],
                chat_template=about["template"],
                add_generation_prompt=asked["add_generation_prompt"],
                **about["variables"],
            )
            told = {"text": texts[0]}
            if len(texts[0]) > MOST_CHARACTERS:
                told = {"error": f"its text has more than {MOST_CHARACTERS} characters"}
        except MemoryError:
            told = {"error": "it takes too much memory"}
        except Exception as error:  # a template is a program: it raises anything
            told = {"error": _sentence(error)}
        _tell(told)
        signal.alarm(0)


def _limit() -> None:
    """Take no more memory than a large conversation needs, and write no files."""
    with open("/proc/self/statm") as file:
        used_bytes = int(file.read().split()[0]) * resource.getpagesize()
    for kind, limit in (
        (resource.RLIMIT_AS, used_bytes + MORE_BYTES),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(kind)
        if hard == resource.RLIM_INFINITY or limit <= hard:
            resource.setrlimit(kind, (limit, limit))


def _tell(told: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(told) + "\n")
    sys.stdout.flush()


def _sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:500] if lines else type(error).__name__


if __name__ == "__main__":
    main()
