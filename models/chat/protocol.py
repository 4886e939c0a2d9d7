"""What the gateway and its template processes agree on: frames, deadlines and limits.

A frame is a length (4 bytes, big-endian) and as many bytes. The gateway's first frame is the greeting, JSON
with what stays the same: templates, special tokens, control tokens. The process answers with an empty JSON
object when it has compiled the templates, or with ``error``. Each further frame asks for one rendering, in
JSON; its answer is a line of JSON (``error``, or ``named`` and ``control_tokens``) and the text in UTF-8.
``last`` in an answer: the process ends now.

Imported by ``process`` and ``processes``, so it must import nothing: a template process starts fast.
"""

import struct

HEADER = struct.Struct(">I")

START_S = 30.0
"""From a process's start until it has compiled the templates, on a machine that may be busy."""
COMPILE_S = 5.0
"""Processor time for compiling all templates of a model."""
RENDER_S = 1.0
"""Processor time for rendering one conversation."""
ANSWER_S = 10.0
"""From a conversation's first byte to its answer's last one, on a machine that may be busy. The gateway then
kills a process that has not ended itself, as one that is stopped."""
GRACE_S = 0.5
"""For a process that has closed its pipes, or was killed, to end."""
MEMORY_BYTES = 512 << 20
"""Address space that a process may take besides what it has after its start. The longest conversation takes
16 MiB, or 64 MiB as a string of four bytes a character; a rendering holds about five such strings."""
MOST_DEPTH = 64
"""Levels of nested objects in tools, arguments of tool calls and template arguments."""

TEMPLATE_FIELDS = frozenset(
    {"messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize"}
)
"""Names that template arguments can't set: they have fields of their own, or are no variables."""
