"""Conversations to token ids, and what is cut where they are too long."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastppo.data.records import BadRow, Dropped, Record
from fastppo.errors import note
from fastppo.types import Pair, Prompt

if TYPE_CHECKING:
    from fastppo.templates import Template


def share_length(source: int, target: int, cutoff_len: int) -> tuple[int, int]:
    """Most tokens of a prompt and of its answer, together at most `cutoff_len`.

    The longer of the two gives way where the other fits in half; else both, in proportion.
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
    """The record's own system prompt, or the file's; None is the template's."""
    return record.system if record.system is not None else default_system


def fit_prompt(
    record: Record, template: Template, limit: int, default_system: str | None
) -> list[int]:
    """The record's prompt in at most `limit` tokens, its generation header kept."""
    ids = template.fit_prompt(record.messages, system_of(record, default_system), limit)
    if ids is None:
        raise BadRow(
            f"its prompt does not fit in {limit} tokens even without its question; raise cutoff_len"
        )
    return ids


def tell(dropped: Dropped) -> None:
    """A note on what was dropped; an error where it was most."""
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
    """Prompts with the generation header at their end, at most `cutoff_len` tokens each.

    With `lf_truncation` an over-long one is cut as LLaMA-Factory cuts it: at its end, header and
    all, and to what the record's own answer leaves of `cutoff_len`.
    """
    prompts, dropped = [], Dropped("dataset", seen=len(records))
    for record in records:
        system = system_of(record, default_system)
        try:
            if lf_truncation:
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
    tell(dropped)
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
    """Pairs in at most `cutoff_len` tokens, prompt and answer; one prompt for both.

    Where a pair is too long, prompt and answers share `cutoff_len` as in LLaMA-Factory; the prompt
    keeps its generation header and an answer its EOS, where its score is read. `suffix` writes
    behind EOS what LLaMA-Factory's template does: there its reward models are trained and scored.
    `lf_truncation` cuts heads and ends as LLaMA-Factory does, EOS and all.
    """
    pairs, dropped = [], Dropped("dataset", seen=len(records))
    behind = list(template.suffix_ids) if suffix else []
    for record in records:
        prompt = template.encode_prompt(record.messages, system_of(record, default_system))
        answers = [
            template.encode_response(text or "") for text in (record.chosen, record.rejected)
        ]
        end = 1 + len(behind)
        target = max(map(len, answers)) + len(behind)
        source, target = share_length(len(prompt), target, cutoff_len)
        try:
            if lf_truncation:
                prompt = prompt[:source]
                answers = [[*ids, *behind][:target] for ids in answers]
            else:
                if target < end:
                    raise BadRow(f"its answers do not fit in {cutoff_len} tokens; raise cutoff_len")
                prompt = fit_prompt(record, template, source, default_system)
                answers = [ids[:-1][: target - end] + ids[-1:] + behind for ids in answers]
        except BadRow as why:
            dropped.add(record.where, why)
            continue
        pairs.append(Pair(prompt, *answers))
    tell(dropped)
    return pairs
