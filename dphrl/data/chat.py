"""Turns problems into prompts: the token ids that both the engines and the learner see."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dphrl.config.data import DataConfig
from dphrl.data.messages import Message
from dphrl.data.problems import Problem, SqlContext
from dphrl.data.schema_fitting import FittedSchema, SchemaFitter
from dphrl.types import Prompt

logger = logging.getLogger(__name__)

_PLACEHOLDER = re.compile(r"\{(question|schema|evidence)\}")
# The token counts of a schema's lines add up to a little more or less than the count of the whole text, so a budget
# is corrected, at most this many times.
_MAX_REFITS = 4


class BuiltPrompts(NamedTuple):
    """num_dropped: problems too long for a prompt. num_lost_rows: prompts whose schema lacks sample rows;
    num_lost_names: prompts whose schema lacks tables or columns (and sample rows)."""

    prompts: list[Prompt]
    num_dropped: int
    num_lost_rows: int = 0
    num_lost_names: int = 0


def build_prompts(
    problems: Sequence[Problem],
    tokenizer: Any,
    data_config: DataConfig,
    advance: Callable[[], object] = lambda: None,
) -> BuiltPrompts:
    """Render and tokenize every problem; drop and count those longer than `max_prompt_tokens`.

    A schema is first trimmed: to its data set's `max_schema_tokens`, and to the room that the rest of the prompt
    leaves below `max_prompt_tokens`. Prompts with a trimmed schema are counted. tokenizer: a transformers tokenizer;
    without a chat template the prompt is plain text, system prompt and question. `Prompt.text` is the rendered text,
    as the model sees it. advance: called after every problem. Raises ValueError when no prompt is short enough, or
    when the chat template refuses a prompt.
    """
    renderer = _Renderer(tokenizer, data_config)
    prompts = []
    shortest: int | None = None
    num_lost_rows = num_lost_names = 0
    for problem in problems:
        text, token_ids, schema = renderer.render(problem)
        shortest = len(token_ids) if shortest is None else min(shortest, len(token_ids))
        if len(token_ids) <= data_config.max_prompt_tokens:
            prompts.append(Prompt(problem.problem_id, text, token_ids, problem.answer, problem.dataset))
            num_lost_names += schema.lost_names
            num_lost_rows += schema.lost_rows and not schema.lost_names
        advance()
    if shortest is not None and not prompts:
        raise ValueError(
            f"data.max_prompt_tokens={data_config.max_prompt_tokens} drops all {len(problems)} prompts of "
            f"{problems[0].dataset}: the shortest has {shortest} tokens; raise it to at least {shortest}"
        )
    return BuiltPrompts(prompts, len(problems) - len(prompts), num_lost_rows, num_lost_names)


def fill_template(template: str, question: str, schema: str = "", evidence: str = "") -> str:
    """The template with {question}, {schema} and {evidence} filled in.

    If there is no evidence, a line whose only placeholder is {evidence} is left out, together with its label.
    """
    # One pass of a regular expression, not str.format or a chain of replacements: a template may hold other braces
    # (most often \boxed{}), and so may a question.
    values = {"question": question, "schema": schema, "evidence": evidence}
    lines = template.split("\n")
    if not evidence:
        lines = [line for line in lines if set(_PLACEHOLDER.findall(line)) != {"evidence"}]
    return _PLACEHOLDER.sub(lambda match: values[match[1]], "\n".join(lines))


class _Renderer:
    """Renders prompts with one tokenizer and configuration; problems on one database share the work on its schema."""

    def __init__(self, tokenizer: Any, data_config: DataConfig) -> None:
        self._tokenizer = tokenizer
        self._config = data_config
        self._fitter = SchemaFitter(self._count_tokens)
        self._has_chat = bool(getattr(tokenizer, "chat_template", None))
        if not self._has_chat:
            logger.warning(
                "The tokenizer has no chat template: prompts are plain text (system prompt, blank line, question)"
            )
        for name in data_config.chat_template_kwargs:
            # The name may stand there for something else, so this may miss one that is not read. It names none that is.
            if not self._has_chat or not re.search(rf"\b{re.escape(name)}\b", str(tokenizer.chat_template)):
                logger.warning(
                    "data.chat_template_kwargs: the model's chat template never reads %s, so it changes nothing", name
                )

    def render(self, problem: Problem) -> tuple[str, tuple[int, ...], FittedSchema]:
        if problem.sql is None:
            return *self._with_schema(problem, ""), FittedSchema("")
        schema = self._fitter.whole(problem.sql.schema)
        budget = problem.sql.max_schema_tokens
        if budget is not None:
            schema = self._fit(problem, problem.sql, budget)
        text, token_ids = self._with_schema(problem, schema.text)
        if len(token_ids) <= self._config.max_prompt_tokens:
            return text, token_ids, schema
        rest = self._config.max_prompt_tokens - len(self._with_schema(problem, "")[1])
        budget = rest if budget is None else min(budget, rest)
        for _ in range(_MAX_REFITS):
            schema = self._fit(problem, problem.sql, budget)
            text, token_ids = self._with_schema(problem, schema.text)
            excess = len(token_ids) - self._config.max_prompt_tokens
            if excess <= 0:
                break
            budget -= excess
        return text, token_ids, schema

    def _fit(self, problem: Problem, context: SqlContext, max_tokens: int) -> FittedSchema:
        return self._fitter.fit(context.schema, f"{problem.text}\n{context.evidence}", max_tokens)

    def _with_schema(self, problem: Problem, schema: str) -> tuple[str, tuple[int, ...]]:
        evidence = problem.sql.evidence if problem.sql else ""
        template = self._config.template_for(problem.kind)
        content = fill_template(template, problem.text, schema, evidence)
        return self._tokenized([*problem.earlier, Message("user", content)], problem.location)

    def _tokenized(self, messages: list[Message], location: str) -> tuple[str, tuple[int, ...]]:
        system_prompt = self._config.system_prompt
        # A row's own system turn was written for its question, the configured one for all.
        added = system_prompt and messages[0].role not in ("system", "developer")
        if added:
            messages = [Message("system", system_prompt), *messages]
        if not self._has_chat:
            if unsayable := next((turn.role for turn in messages if turn.role not in ("system", "user")), None):
                raise ValueError(
                    f"{location}: the prompt has a turn of {unsayable!r}, but the tokenizer has no chat template to "
                    "write it; take a chat model, or set prompt_field to the question alone"
                )
            text = "\n\n".join(turn.content for turn in messages)
            return text, tuple(self._tokenizer.encode(text))
        turns = [{"role": turn.role, "content": turn.content} for turn in messages]
        try:
            text = self._tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, tokenize=False, **self._config.chat_template_kwargs
            )
        # A template refuses a role by raising jinja's TemplateError. The class is not named here, because jinja is a
        # dependency of transformers and not ours.
        except Exception as error:
            hint = "; set data.system_prompt to '' and put it into data.prompt_template" if added else ""
            place = location or "data"
            raise ValueError(f"{place}: the tokenizer's chat template refused the prompt: {error}{hint}") from error
        # The template writes the special tokens, BOS included: adding them here would double them.
        return text, tuple(self._tokenizer.encode(text, add_special_tokens=False))

    def _count_tokens(self, texts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
