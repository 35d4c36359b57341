"""A chat template is tried in a process of its own, with limits of time and memory.

A template comes with a model, from a stranger. transformers renders it in Jinja's sandbox, which
keeps it from the machine but lets it loop for days or print 10^8 characters. So before a template
renders rows here, a child process renders a few turns of chance words with it. A template may
behave with these words and loop on others, so each row has a limit of its own, too.

    check_ends(template, "the chat template of models/x")     # UserError where it does not end
    with limited(ROW_SECONDS):                                # TimeoutError where it does not
        text = render(row)
"""

from __future__ import annotations

import functools
import json
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxalign.errors import UserError

SECONDS, MEMORY, MOST = 3, 1 << 30, 1 << 20  # of processor time; bytes; characters of a few turns
PATIENCE = 120  # seconds by the clock, for a busy machine
ROW_SECONDS = 10.0  # of processor time, for one row
ROW_FACTOR = 10  # characters that a row may have for each of its texts', besides MOST

# The environment of transformers' templates, without transformers. Errors of the template are for
# whoever renders rows with it: they name the row.
CHILD = """
import json, sys
order = json.load(sys.stdin)
sys.path[:] = order["path"]
import jinja2, jinja2.ext, jinja2.sandbox
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (order["memory"],) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (order["seconds"],) * 2)
except ImportError:
    pass
class Generation(jinja2.ext.Extension):
    tags = {"generation"}
    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)
def refuse(message):
    raise jinja2.TemplateError(message)
env = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols],
    optimized=False)  # else a constant of 10^8 characters is written out and compiled
env.filters["tojson"] = lambda x, **given: json.dumps(x)
env.globals |= {"raise_exception": refuse, "strftime_now": lambda form: form}
wrong = ""
try:
    template = env.from_string(order["template"])
    for talk in order["talks"]:
        written = 0
        try:
            for part in template.generate(enable_thinking=False, bos_token="<s>", eos_token="</s>",
                                          **talk):
                written += len(part)
                if written > order["most"]:
                    raise MemoryError
        except MemoryError:
            raise
        except Exception:
            pass
except MemoryError:
    wrong = "length"
except Exception:
    pass
print(json.dumps(wrong))
"""


@functools.lru_cache(maxsize=64)
def check_ends(template: str, whose: str) -> None:
    """Tries a template on a few turns.

    Args:
      template: Jinja.
      whose: what the sentence calls it.

    Raises:
      UserError: it needs more time, memory or characters than a prompt can.
    """
    words = ["".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(24)]
    system, user, answer = " ".join(words[:8]), " ".join(words[8:16]), " ".join(words[16:])
    turns = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    talks = [
        {"messages": messages, "add_generation_prompt": opened}
        for messages, opened in (
            (turns[:1], True),
            ([{"role": "system", "content": system}, *turns, *turns[:1]], True),
            (turns, False),
        )
    ]
    limits = {"memory": MEMORY, "seconds": SECONDS, "most": MOST}
    order = {"template": template, "talks": talks, "path": sys.path, **limits}
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", CHILD], input=json.dumps(order), capture_output=True,
            text=True, timeout=PATIENCE,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise _endless(whose) from None
    except OSError:
        return  # no process to be had: the template is rendered without this check
    if done.returncode < 0:  # a signal: the limit of processor time
        raise _endless(whose)
    if done.stdout.strip() == '"length"' or "MemoryError" in done.stderr:
        raise UserError(
            f"{whose} prints endless text or fills the memory ({MOST} characters for a few words "
            "are the limit); fix or replace it"
        )


def _endless(whose: str) -> UserError:
    return UserError(
        f"{whose} does not come to an end: a few words took {SECONDS} seconds; fix or replace it"
    )


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Ends what is done inside after so much processor time of this process.

    Only the main thread of a system with POSIX timers can be interrupted; elsewhere there is no
    limit.

    Raises:
      TimeoutError: it took longer.
    """

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError(f"it does not come to an end in {seconds:g} seconds")

    here = threading.current_thread() is threading.main_thread()
    if not here or not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
