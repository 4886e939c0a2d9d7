"""Template processes: limits, their ends, and that no other request notices."""

import gc
import os
import select
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from farshore.errors import InvalidRequest, ModelError
from farshore.models.chat.processes import PROCESSES, TemplateProcesses
from farshore.models.chat.protocol import GRACE_S, RENDER_S

WAIT_S = 30
NASTY = """
{%- set what = messages[0].content %}
{%- set n = messages[0].n %}
{%- if what == 'loop' %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}
{%- elif what == 'power' %}{{ 7 ** n }}
{%- elif what == 'grow' %}{% set x = namespace(s='x') %}
{%- for i in range(n) %}{% set x.s = x.s ~ x.s %}{% endfor %}
{%- elif what == 'repeat' %}{{ 'x' * n }}
{%- elif what == 'width' %}{{ ('%' ~ n ~ 'd') % 1 }}{{ ('{:>' ~ n ~ '}').format(1) }}
{%- elif what == 'list' %}{{ [what] * n }}
{%- elif what == 'fill' %}{{ what | center(n) }}
{%- else %}{{ what }}
{%- endif %}"""


def greeting(template=NASTY):
    return {"templates": {"default": template}, "special_tokens": {}, "control_tokens": {}}


def request(content, **fields):
    return {
        "messages": [{"role": "user", "content": content, **fields}],
        "tools": [],
        "template_arguments": "",
        "add_generation_prompt": True,
        "continue_final_message": False,
        "most_chars": 1 << 30,
        "mark": False,
        "named": False,
    }


@pytest.fixture
def start():
    """start(template) -> TemplateProcesses, closed after the test."""
    started = []

    def make(template=NASTY):
        started.append(TemplateProcesses(greeting(template), where="m"))
        return started[-1]

    yield make
    for processes in started:
        processes.close()


def pids(processes):
    return {process._child.pid for process in processes._idle}


def await_end(pid):
    """Blocks until a process that need not be ours has ended."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([descriptor], [], [], WAIT_S)[0], f"process {pid} goes on"
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("what", ["loop", "power"])
def test_a_template_that_takes_too_long(start, what):
    processes = start()
    assert processes.render(request("Hello")).text == "Hello"
    (before,) = pids(processes)
    with pytest.raises(InvalidRequest, match=r"^m: .* it took more than 1 s; shorten them"):
        processes.render(request(what, n=10**9))
    assert not os.path.exists(f"/proc/{before}")
    assert processes.render(request("Hello")).text == "Hello"


def test_a_busy_machine_is_no_templates_fault(start):
    """While a process is stopped, it uses no processor time."""
    processes = start()
    processes.await_compiled()
    (pid,) = pids(processes)
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)
    going_on = threading.Timer(RENDER_S + GRACE_S, os.kill, args=(pid, signal.SIGCONT))
    going_on.start()
    assert processes.render(request("Hello")).text == "Hello"
    going_on.join()
    assert pids(processes) == {pid}


@pytest.mark.parametrize(
    ("what", "n"),
    [
        ("grow", 60),
        ("repeat", 2**36),
        ("width", 2**31 - 2),
        ("list", 2**40),
        ("fill", 2**36),
        ("repeat", 2**62),
    ],
)
def test_a_template_that_takes_memory(start, what, n):
    processes = start()
    # Filling the memory may take the second.
    with pytest.raises(InvalidRequest, match=r"needs more than 512 MiB for|more than 1 s"):
        processes.render(request(what, n=n))
    assert processes.render(request("Hello")).text == "Hello"


def test_the_largest_conversation_fits(start):
    text = "wide \U0001f600 " * ((16 << 20) // 10)  # 16 MiB in UTF-8, four bytes a character in Python.
    rendered = start("{{ messages[0].content | trim }}").render(request(text))
    assert rendered.text == text.strip()


def test_a_slow_request_holds_no_other(start):
    processes = start()
    with ThreadPoolExecutor(2) as threads:
        slow = threads.submit(processes.render, request("loop"))
        while not slow.done():
            assert processes.render(request("Hello")).text == "Hello"
        with pytest.raises(InvalidRequest, match="more than 1 s"):
            slow.result()


def test_many_at_once(start):
    processes = start()
    texts = [f"{n} " * (n * 700) for n in range(100)]
    with ThreadPoolExecutor(16) as threads:
        rendered = list(threads.map(lambda text: processes.render(request(text)).text, texts))
    assert rendered == texts
    assert 1 <= len(pids(processes)) <= PROCESSES


def test_a_process_that_is_killed_while_idle(start):
    processes = start()
    processes.await_compiled()
    (pid,) = pids(processes)
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert processes.render(request("Hello")).text == "Hello"


@pytest.mark.heavy
def test_a_process_that_is_stopped(start):
    processes = start()
    processes.await_compiled()
    (pid,) = pids(processes)
    os.kill(pid, signal.SIGSTOP)
    os.waitpid(pid, os.WUNTRACED)
    with pytest.raises(InvalidRequest, match="it took more than 10 s"):
        processes.render(request("Hello"))
    assert processes.render(request("Hello")).text == "Hello"


@pytest.mark.parametrize(
    "source", ["{% for %}", "{{ 1 | nothing }}", "{{ x", "{% endif %}", "(" * 5000 + "{{" + "(" * 5000]
)
def test_a_template_that_is_not_valid(start, source):
    processes = start(source)
    for call in (processes.await_compiled, processes.await_compiled, lambda: processes.render(request("x"))):
        with pytest.raises(ModelError, match="m: its chat template isn't valid Jinja") as refused:
            call()
        assert "\n" not in str(refused.value) and len(str(refused.value)) < 400


@pytest.mark.heavy
def test_a_template_that_does_not_compile_in_time(start):
    with pytest.raises(ModelError, match="can't be compiled"):
        start("{{ 9 ** (9 ** 9) }}").await_compiled()  # Jinja evaluates constants when it compiles.


def test_half_a_surrogate_pair(start):
    with pytest.raises(InvalidRequest, match="half of a surrogate pair"):
        start("{{ x }}").render(request("") | {"template_arguments": r'{"x": "\ud83d"}'})


def test_processes_end_with_their_owner(start):
    processes = TemplateProcesses(greeting(), where="m")
    processes.await_compiled()
    (pid,) = pids(processes)
    del processes
    gc.collect()
    assert not os.path.exists(f"/proc/{pid}")


def test_closing_during_a_request(start):
    processes = start()
    processes.await_compiled()
    errors = []

    def loop():
        with pytest.raises(InvalidRequest) as refused:
            processes.render(request("loop"))
        errors.append(refused.value)

    thread = threading.Thread(target=loop)
    thread.start()
    processes.close()
    thread.join(WAIT_S)
    assert len(errors) == 1 and not pids(processes)


OWNER = """
import sys, threading
sys.path.insert(0, {folder!r})
from test_processes import TemplateProcesses, greeting, request
processes = TemplateProcesses(greeting(), where="m")
processes.await_compiled()
(busy,) = processes._idle
threading.Thread(target=processes.render, args=[request("loop")], daemon=True).start()
processes.render(request("Hello"))
print(busy._child.pid, *(process._child.pid for process in processes._idle), flush=True)
sys.stdin.read()
"""


def test_no_process_outlives_a_killed_gateway():
    """One process is idle, another in an endless loop."""
    script = OWNER.format(folder=os.path.dirname(__file__))
    with subprocess.Popen(
        [sys.executable, "-P", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        children = [int(pid) for pid in owner.stdout.readline().split()]
        owner.kill()
    assert children
    for pid in children:
        await_end(pid)


def test_a_start_imports_nothing_large():
    loaded = subprocess.run(
        [sys.executable, "-P", "-c", "import sys, farshore.models.chat.process; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert "jinja2" in loaded
    assert not {"torch", "grpc", "tokenizers", "google.protobuf", "numpy", "transformers"} & set(loaded)


def test_the_gateways_side_imports_no_jinja():
    code = "import sys, farshore.models.chat.processes; print('jinja2' in sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
