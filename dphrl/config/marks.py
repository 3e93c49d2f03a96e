"""The marks around thoughts that graders know without being told."""

from __future__ import annotations

# The marks before and after a thought in what public models write. At the end are two formats with channels: there
# the answer begins where the channel of the thoughts ends, or where the channel "final" begins.
THINKING_MARKS: tuple[tuple[str, str], ...] = (
    *((f"<{name}>", f"</{name}>") for name in ("think", "thinking", "thought", "thoughts", "reasoning", "reflection")),
    *((f"<{name}>", f"</{name}>") for name in ("scratchpad", "seed:think", "mm:think", "longcat_think")),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|THINK_START|>", "<|THINK_END|>"),
    ("[THINK]", "[/THINK]"),
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),
    ("<start_working_out>", "<end_working_out>"),
    ("<|channel>thought", "<channel|>"),
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
)
