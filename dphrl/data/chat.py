"""From problems to the token ids that engines and learner both see."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from dphrl.config_data import DataConfig
from dphrl.data.math_problems import Problem
from dphrl.types import Prompt

logger = logging.getLogger(__name__)


def build_prompts(problems: Sequence[Problem], tokenizer: Any, data_config: DataConfig) -> tuple[list[Prompt], int]:
    """Render and tokenize every problem; drop and count those longer than `max_prompt_tokens`.

    tokenizer: a transformers tokenizer. One without a chat template gets system prompt and question as plain text.
    `Prompt.text` is the rendered text, as the model sees it. Raises ValueError when no prompt is short enough.
    """
    if not getattr(tokenizer, "chat_template", None):
        logger.warning(
            "The tokenizer has no chat template: prompts are plain text (system prompt, blank line, question)"
        )
    prompts = []
    shortest: int | None = None
    for problem in problems:
        text, token_ids = _render(problem.text, tokenizer, data_config)
        shortest = len(token_ids) if shortest is None else min(shortest, len(token_ids))
        if len(token_ids) <= data_config.max_prompt_tokens:
            prompts.append(Prompt(problem.problem_id, text, token_ids, problem.answer, problem.dataset))
    if shortest is not None and not prompts:
        raise ValueError(
            f"data.max_prompt_tokens={data_config.max_prompt_tokens} drops all {len(problems)} prompts of "
            f"{problems[0].dataset}: the shortest has {shortest} tokens; raise it to at least {shortest}"
        )
    return prompts, len(problems) - len(prompts)


def _render(question: str, tokenizer: Any, data_config: DataConfig) -> tuple[str, tuple[int, ...]]:
    # replace, not str.format: a template may hold other braces, \boxed{} first of all.
    content = data_config.prompt_template.replace("{question}", question)
    if not getattr(tokenizer, "chat_template", None):
        text = f"{data_config.system_prompt}\n\n{content}" if data_config.system_prompt else content
        return text, tuple(tokenizer.encode(text))
    messages = [{"role": "user", "content": content}]
    if data_config.system_prompt:
        messages.insert(0, {"role": "system", "content": data_config.system_prompt})
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    # jinja's TemplateError; jinja is transformers' dependency, not ours. Templates refuse roles by raising it.
    except Exception as error:
        hint = "; set data.system_prompt to '' and put it into data.prompt_template" if len(messages) > 1 else ""
        raise ValueError(f"data: the tokenizer's chat template refused the prompt: {error}{hint}") from error
    # The template writes the special tokens, BOS included: adding them here would double them.
    return text, tuple(tokenizer.encode(text, add_special_tokens=False))
