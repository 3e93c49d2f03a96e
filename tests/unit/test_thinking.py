"""What a completion says once its thoughts are cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from dphrl.config.marks import THINKING_MARKS
from dphrl.rewards.thinking import decoder, opened_by, spoken


def said(text: str) -> str | None:
    """In one line, because a cut leaves blanks behind."""
    words = spoken(text, THINKING_MARKS)
    return None if words is None else " ".join(words.split())


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("5", "5"),
        ("<think>4</think>5", "5"),
        ("<think>\n\n</think>\n\n5", "5"),
        ("<THINK>4</Think>5", "5"),
        ("I <think>4</think> say <think>3</think> 5", "I say 5"),
        (r"\boxed{<think>4</think>5}", r"\boxed{ 5}"),
        # The prompt opened the thought.
        ("4</think>5", "5"),
        ("4 <think>3</think> 2</think>5", "5"),
        ("4</think>3</think>5", "5"),
        # Nested and repeated marks
        ("<think>1 <think>2</think> 3</think>5", "5"),
        ("<think><think>4</think>5", "5"),
        ("<think>1 <reasoning>2</reasoning> 3</think>5", "5"),
        ("<reasoning><think>4</think></reasoning>5", "5"),
        # Thinking that never ends
        ("<think>4", None),
        ("5 <think>but", None),
        ("<think>4</think>5<think>6", None),
        ("<think>4</thinking>5", None),
        ("I say <think>4</reasoning>3</think>5", "I say 5"),
        ("<think>4<|im_end|></think>5", None),
        ("<think>I close it with `</think>` and 5", None),
        ("<think>```</think>5", "5"),
        ("<think>```", None),
        # Marks that are only mentioned
        ("<think>4</think>5, see `</think>`", "5, see `</think>`"),
        ("<think>4</think>5, see the </think> tag", "5, see the </think> tag"),
        ("<think>4</think>5, see the <think> tags", "5, see the <think> tags"),
        ('5 "<think>"', '5 "<think>"'),
        (r"5 \text{<think>}", r"5 \text{<think>}"),
        ("```\n<think>\n```\n5", "``` <think> ``` 5"),
        ("~~~\n<think>\n~~~\n5", "~~~ <think> ~~~ 5"),
        ("<think>```</think>```\n<think>\n```\n5", "``` <think> ``` 5"),
        ("```\n4\n```\n<think>5", None),
        ("```\n<think>4</think>\n```\n5", "``` ``` 5"),
        # The turn ends
        ("5<|im_end|>4", "5"),
        ("5<|return|>", "5"),
        ("<think>4</think>5<|end|><|user|>4", "5"),
        ("5<end_of_turn>\n<start_of_turn>user\n4", "5"),
        ("5<\uff5cend\u2581of\u2581sentence\uff5c>", "5"),
        ("<think>4</think>5<|im_start|>user<think>", "5"),
        # Other marks
        ("<|begin_of_thought|>4<|end_of_thought|><|begin_of_solution|>5", "<|begin_of_solution|>5"),
        ("[THINK]4[/THINK]5", "5"),
        ("\u25c1think\u25b74\u25c1/think\u25b75", "5"),
        ("<seed:think>4</seed:think>5", "5"),
        ("<|channel>thought\n4<channel|>5", "5"),
        (
            "<|channel|>analysis<|message|>4<|end|><|start|>assistant<|channel|>commentary<|message|>3<|end|>"
            "<|start|>assistant<|channel|>analysis<|message|>2<|end|><|start|>assistant<|channel|>final<|message|>5",
            "5",
        ),
        ("[think 5", "[think 5"),
        ("x<thin\u212a>5", "x<thin\u212a>5"),
    ],
)
def test_thoughts_are_cut(text: str, rest: str | None) -> None:
    assert said(text) == rest


@pytest.mark.parametrize(("opening", "closing"), THINKING_MARKS)
def test_every_pair_of_marks_works(opening: str, closing: str) -> None:
    assert said(f"{opening}4{closing}5") == "5"
    assert said(f"4{closing}5") == "5"
    assert said(f"5{opening}4") is None


def test_other_marks_can_be_given() -> None:
    marks = (("Plan:", "Done."), ("\u00c4", "\u00d6"))
    assert spoken("plan: 4 DONE. 5", marks) == "\n 5"
    assert spoken("\u00c44\u00d65", marks) == "\n5"
    assert spoken("<think>4", marks) == "<think>4"
    assert spoken("<think>4", ()) == "<think>4"


@pytest.mark.parametrize(
    ("prompt", "opening"),
    [
        ("<|im_start|>assistant\n<think>\n", "<think>"),
        ("assistant\n<THINK>", "<think>"),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", ""),
        ("Write <think> first. assistant:", ""),
        ("", ""),
    ],
)
def test_a_prompt_may_open_a_thought(prompt: str, opening: str) -> None:
    assert opened_by(prompt, THINKING_MARKS) == opening
    assert opened_by(prompt, ()) == ""


@pytest.mark.parametrize("marks_are_special", [True, False])
def test_marks_stay_in_the_text_also_where_they_are_special_tokens(marks_are_special: bool) -> None:
    words = WordLevel({"a": 0, "4": 1, "5": 2, "final": 3, "<unk>": 4}, unk_token="<unk>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words))
    tokenizer.backend_tokenizer.pre_tokenizer = Whitespace()
    marks = ["[THINK]", "[/THINK]", "<|channel|>", "<|message|>"]
    tokenizer.add_tokens([AddedToken(mark, special=marks_are_special) for mark in marks])
    tokenizer.add_tokens([AddedToken("<|im_end|>", special=True)])
    decode = decoder(tokenizer, THINKING_MARKS)
    # A decoder that joins words by blanks would tear <|channel|>final apart where no token of it is special.
    texts = ["[THINK] 4 a [/THINK] 5 a", "4 <|channel|> final <|message|> 5 a"][: 1 + marks_are_special]
    for text in texts:
        ids = tuple(tokenizer.encode(f"{text} <|im_end|>", add_special_tokens=False))
        assert decode(ids).replace(" ", "") == text.replace(" ", "")
        assert said(decode(ids)) == "5 a"
        assert decode(ids[-2:]) == "a"
    assert decode(()) == ""


MARKS_AND_WORDS = st.lists(
    st.sampled_from(["<think>", "</think>", "<reasoning>", "</reasoning>", "a", " ", "\n"]), max_size=8
).map("".join)


@given(MARKS_AND_WORDS, MARKS_AND_WORDS)
def test_what_stands_beside_its_mark_is_never_said(before: str, after: str) -> None:
    assert "secret" not in (said(f"{before}<think>secret{after}") or "")
    assert "secret" not in (said(f"{before}secret</think>{after}") or "")


@given(st.text(alphabet="<>/[think] `a\n{}"))
def test_a_text_without_marks_stays_as_it_is(text: str) -> None:
    if not any(mark in text.lower() for pair in THINKING_MARKS for mark in pair):
        assert spoken(text, THINKING_MARKS) == text
