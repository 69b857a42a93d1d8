"""What the library needs to know of JAX and XLA, apart from everything else.

Versions of JAX (`compat`), the user's source lines (`source_lines`), primitives of our own
(`custom_primitives`), and what the device is good at (`device`). Used by its modules:
`from pjax.backend import compat`.
"""
