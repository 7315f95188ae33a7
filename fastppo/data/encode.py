"""Encode conversations as token ids, and truncate those that are too long."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastppo.data.records import BadRow, DroppedRows, Record
from fastppo.errors import UserError, note
from fastppo.types import Pair, Prompt

if TYPE_CHECKING:
    from fastppo.templates import Template


def share_length(source: int, target: int, cutoff_len: int) -> tuple[int, int]:
    """How many tokens of a prompt and of its answer are kept: together at most `cutoff_len`.

    `source` and `target` are the lengths of prompt and answer. If one is shorter than half of
    `cutoff_len`, only the other is truncated; otherwise both are, in proportion.
    Source: LLaMA-Factory, `infer_seqlen`.
    """
    if 2 * target < cutoff_len:
        most = cutoff_len
    elif 2 * source < cutoff_len:
        most = cutoff_len - source
    else:
        most = int(cutoff_len * (target / (source + target)))
    target = min(most, target)
    return min(max(cutoff_len - target, 0), source), target


def system_of(record: Record, default_system: str | None) -> str | None:
    """The record's own system prompt, else `default_system`; None means the template's default."""
    return record.system if record.system is not None else default_system


def fit_prompt(
    record: Record, template: Template, limit: int, default_system: str | None
) -> list[int]:
    """Ids of the record's prompt, truncated to `limit` tokens; its generation header is kept.

    Raises:
        BadRow: the prompt does not fit even without its question.
    """
    if record.ids is not None:
        if len(record.ids) > limit:
            raise BadRow(f"its prompt has {len(record.ids)} tokens and cutoff_len is {limit}")
        return record.ids
    ids = template.fit_prompt(record.messages, system_of(record, default_system), limit)
    if ids is None:
        no_question = [{"role": "user", "content": ""}]
        least = len(template.encode_prompt(no_question, system_of(record, default_system)))
        raise BadRow(
            f"without its question it has {least} tokens, of the system prompt and the template, "
            f"and cutoff_len is {limit}"
        )
    return ids


def report(dropped: DroppedRows) -> None:
    """Print a note on dropped rows; raise UserError if more than half are dropped."""
    line = dropped.note()
    if line:
        note(line)


def encode_prompts(
    records: Sequence[Record],
    template: Template,
    cutoff_len: int,
    default_system: str | None = None,
    *,
    lf_truncation: bool = False,
) -> list[Prompt]:
    """The records' prompts as ids, at most `cutoff_len` each; they end with the generation header.

    With `lf_truncation` a prompt that is too long is truncated like in LLaMA-Factory: its end is
    cut off, with the header, so that prompt and the record's own answer share `cutoff_len`. Records
    that do not fit are dropped with a note.
    """
    prompts, dropped = [], DroppedRows("dataset", "raise cutoff_len", seen=len(records))
    for record in records:
        system = system_of(record, default_system)
        try:
            if lf_truncation and record.ids is None:
                ids = template.encode_prompt(record.messages, system)
                answer = template.encode_response(record.response or "")
                target = len(answer) + len(template.suffix_ids)
                ids = ids[: share_length(len(ids), target, cutoff_len)[0]]
            else:
                ids = fit_prompt(record, template, cutoff_len, default_system)
            if not ids:
                raise BadRow(f"nothing of its prompt is left in {cutoff_len} tokens")
        except BadRow as why:
            dropped.add(record.where, why)
            continue
        prompts.append(
            Prompt(
                ids=ids,
                text=record.messages[-1]["content"],
                reference=record.response,
                columns=record.columns,
                messages=[
                    *([{"role": "system", "content": system}] if system else []),
                    *record.messages,
                ],
            )
        )
    report(dropped)
    return prompts


def encode_pairs(
    records: Sequence[Record],
    template: Template,
    cutoff_len: int,
    default_system: str | None = None,
    *,
    lf_truncation: bool = False,
    suffix: bool = False,
) -> list[Pair]:
    """The records' pairs as ids: the prompt with either answer has at most `cutoff_len` tokens.

    If a pair is too long, prompt and answers share `cutoff_len` as in LLaMA-Factory
    (`share_length`). The prompt keeps its generation header; an answer keeps its EOS, at which its
    score is read. Both answers have the same prompt ids. With `suffix` the template's suffix
    follows EOS: LLaMA-Factory's reward models are trained and read there. With `lf_truncation`
    header and EOS can be cut off, as in LLaMA-Factory.
    """
    pairs, dropped = [], DroppedRows("dataset", "raise cutoff_len", seen=len(records))
    equal, equal_before = [], 0
    suffix_ids = list(template.suffix_ids) if suffix else []
    for record in records:
        prompt = template.encode_prompt(record.messages, system_of(record, default_system))
        answers = [
            template.encode_response(text or "") for text in (record.chosen, record.rejected)
        ]
        end = 1 + len(suffix_ids)
        target = max(map(len, answers)) + len(suffix_ids)
        source, target = share_length(len(prompt), target, cutoff_len)
        same = answers[0] == answers[1]
        try:
            if lf_truncation:
                prompt = prompt[:source]
                answers = [[*ids, *suffix_ids][:target] for ids in answers]
            else:
                if target < end:
                    raise BadRow(f"its answers do not fit in {cutoff_len} tokens")
                prompt = fit_prompt(record, template, source, default_system)
                answers = [ids[:-1][: target - end] + ids[-1:] + suffix_ids for ids in answers]
        except BadRow as why:
            dropped.add(record.where, why)
            continue
        if answers[0] == answers[1]:
            equal.append(record.where)
            equal_before += same
        pairs.append(Pair(prompt, *answers))
    report(dropped)
    report_equal(equal, equal_before, len(pairs))
    return pairs


def report_equal(equal: Sequence[str], equal_before: int, count: int) -> None:
    """Print a note on pairs of two equal answers, which teach nothing.

    Args:
        equal: where each of them is from.
        equal_before: how many of them were equal before they were cut to `cutoff_len`.
        count: all pairs.

    Raises:
        UserError: all pairs are such.
    """
    if not equal:
        return
    parts = []
    if equal_before:
        parts.append(f"{equal_before} as they stand")
    if cut := len(equal) - equal_before:
        parts.append(f"{cut} after the cut, so raise cutoff_len")
    line = (
        f"dataset: {len(equal)} of {count} pairs have two equal answers ({', '.join(parts)}; the "
        f"first is {equal[0]})"
    )
    if len(equal) == count:
        raise UserError(f"{line}, and there is nothing to learn from them; give pairs that differ")
    note(f"{line}: they teach nothing")
